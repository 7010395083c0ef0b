"""Every configuration composes, resolves and builds; every mistake is one line that names the key
and the fix.
"""

import dataclasses
import importlib.util
import shutil
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from conftest import ROOT, refusal, run, succeed, thinned, train_settings
from safetensors.torch import save_file

from ddt.autoencoder import KLAutoencoder, build_autoencoder
from ddt.autoencoder.vit_decoder import ViTDecoder
from ddt.cli import CONF
from ddt.config import Choice, check_arguments, convert, group_values, locate, parse, stored_choice
from ddt.data.images import Images
from ddt.epochs import in_steps
from ddt.errors import UserError
from ddt.generation.settings import SamplerOverrides
from ddt.model.layers import Block
from ddt.objective import Objective
from ddt.sampling.settings import SamplerSettings
from ddt.training.run import check, infer, with_timeshift
from ddt.training.settings import TrainerSettings

MODELS = [path.stem for path in sorted((CONF / "model").glob("*.yaml"))]
GROUPS = (
    "data",
    "recipe",
    "autoencoder",
    "alignment",
    "objective",
    "optimizer",
    "sampler",
    "trainer",
    "tracker",
    "experiment",
)
CHOICES = [f"{group}={path.stem}" for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]


def root(*overrides):
    """A data root for those configurations that need one."""
    missing = dict.fromkeys(
        ["data=folder", "data=shards", "data=folder_256", "data=in256", "data=in512", "data=latents",
         "data=in256_latents", "data=in512_latents", "data=in256_rae", "data=in512_rae", "experiment=xl_512",
         "experiment=finetune"],
        "data.root",
    ) | {"autoencoder=kl": "autoencoder.source"}  # fmt: skip
    deep = (
        "alignment=dispersive",
        "alignment=repa_dinov2",
        "alignment=irepa_dinov2",
        "data=in",
        "recipe=published",
    )  # these align the 8th block of the encoder
    extra = [f"{key}=somewhere" for choice, key in missing.items() if choice in overrides and choice != "data=folder"]
    extra += [f"data.root={ROOT / 'docs' / 'images'}"] if "data=folder" in overrides else []  # it is looked at
    if "data=shards" in overrides:  # so that they are not looked at
        extra += ["data.image_size=32", "data.channels=3", "model.patch_size=4"]
    extra += ["model=b_8en4de"] if any(o.startswith(deep) for o in overrides) else []
    extra += ["alignment.weights=null"] if "alignment=repa_efficientnet_lite0" in overrides else []
    if "objective=reg" in overrides:
        extra += ["autoencoder=rae_dinov2_b", "autoencoder.class_token=true", "model.patch_size=1"]
    return [*overrides, *extra]


@pytest.mark.parametrize("model", thinned(MODELS, 3))
def test_every_model_builds(model):
    choice = train_settings(f"model={model}").model
    with torch.device("meta"):
        network = choice.build(in_channels=4, num_classes=1000)
    halves = (
        [len(network.encoder.blocks), len(network.decoder.blocks)] if network.shares_encoder else [len(network.blocks)]
    )
    kind, _, split = model.partition("_")
    if "en" in split:
        assert f"{halves[0]}en{halves[1]}de" == split
    depths = {"nano": 6, "b": 12, "l": 24, "xl": 28}
    if split == "ditdh":
        depths = {"nano": 6, "s": 14, "b": 14, "xl": 30}
    assert sum(halves) == depths[split if kind == "dit" else kind]


@pytest.mark.parametrize("choice", thinned(CHOICES, 3))
def test_every_choice_composes_and_builds(choice):
    given = ["init_from=null"] if choice in ("experiment=xl_512", "experiment=finetune") else []
    check(infer(train_settings(*root(choice), *given)))


def test_default_run_is_the_nano_model_on_digits():
    settings = train_settings()
    assert settings.name == "digits_nano"
    assert (settings.model.settings["depth"], settings.model.settings["encoder_depth"]) == (6, 4)
    assert settings.data.target == "ddt.data.images.Digits"


IMAGENET = 1_281_167  # training images


@pytest.mark.parametrize(("size", "epochs"), [(256, 800), (512, 400)])
def test_ditdh_on_rae_latents_is_the_published_recipe(size, epochs):
    """docs/rae.md: every value of training and sampling."""
    settings = train_settings("model=xl_ditdh", f"data=in{size}_rae", "data.root=somewhere")
    objective, sampler = settings.objective.settings, settings.sampler
    trainer = in_steps(settings.trainer, IMAGENET, settings.trainer.global_batch_size, "trainer")
    assert (objective["time_distribution"], objective["t_min"], objective["label_dropout"]) == ("lognorm", 0.001, 0.1)
    assert settings.alignment is None
    optimizer = settings.optimizer.settings
    assert (optimizer["lr"], optimizer["betas"], optimizer["weight_decay"]) == (2e-4, (0.9, 0.95), 0)
    assert (trainer.global_batch_size, trainer.max_steps) == (1024, epochs * 1_251)
    assert (trainer.decay_after, trainer.decay_end) == (50_040, 1_000_800)
    assert (trainer.lr_end, trainer.lr_schedule) == (0.1, "linear")
    assert (trainer.clip_norm, trainer.ema_decay, trainer.mixed_precision) == (1.0, 0.9995, "tf32")
    assert settings.data.settings["horizontal_flip"] is True
    assert (sampler.num_steps, sampler.t_end, sampler.last_step, sampler.cfg_scale) == (49, 0.999, None, 1.0)


@pytest.mark.parametrize(
    ("overrides", "root"),
    thinned(
        [
            (["data=in256_rae", "data.root=x"], 48),
            (["data=in512_rae", "data.root=x"], 192),
            (["data=in256_rae", "data.root=x", "autoencoder=rae_dinov2_s"], 24),
            (["data=in256_rae", "data.root=x", "autoencoder=rae_dinov2_l"], 64),
            (["data=in256_rae", "data.root=x", "autoencoder=rae_dinov2_b_512", "data.image_size=512"], 192),
            (["data=photos", "autoencoder=rae_efficientnet_lite0"], 112 / 64),
            (["model=xl_22en6de", "data=in256", "data.root=x"], 1),
            (["data=digits"], 1),
        ],
        3,
    ),
)
def test_the_time_shift_of_training_and_sampling_is_that_of_the_latents(tmp_path, overrides, root):
    settings = train_settings(*overrides)
    assert (settings.objective.settings["timeshift"], settings.sampler.timeshift) == (None, None)
    plain = settings.autoencoder.plain()
    if "efficientnet" in str(plain.get("encoder")):  # the decoder's file says its size
        save_file(ViTDecoder(112, 4, 1, 4, 1, grid=8, patch_size=8).state_dict(), tmp_path / "decoder.safetensors")
        # its own run is not there, though a folder runs/ may be
        plain |= {"decoder": str(tmp_path / "decoder.safetensors"), "decoder_heads": 1, "statistics": None}
    if plain["_target_"].endswith("KLAutoencoder"):
        timeshift = KLAutoencoder.timeshift
    else:
        timeshift = build_autoencoder(plain, outline=True).timeshift
    objective, sampler = with_timeshift(settings.objective, settings.sampler, timeshift)
    assert objective.settings["timeshift"] == sampler.timeshift == pytest.approx(root**0.5, rel=1e-12)
    given = train_settings(*overrides, "objective.timeshift=3", "sampler.timeshift=4")
    objective, sampler = with_timeshift(given.objective, given.sampler, timeshift)
    assert (objective.settings["timeshift"], sampler.timeshift) == (3, 4)


def test_epochs_are_steps_of_the_images_and_the_global_batch():
    """docs/rae.md: 1,251 steps an epoch; constant for 40 epochs, linear to 0.1 at epoch 800."""

    def trainer(*overrides, images=IMAGENET):
        found = train_settings("data=in256_rae", "data.root=x", *overrides).trainer
        return in_steps(found, images, found.global_batch_size, "trainer")

    published, of_80, guide = trainer(), trainer("trainer.max_steps=80epochs"), trainer("trainer.max_steps=14epochs")
    assert (of_80.max_steps, guide.max_steps) == (100_080, 17_514)
    assert guide == trainer("trainer.max_steps=17514")
    assert {guide.lr_factor(step) for step in (0, 9_000, 17_513)} == {1.0}
    for each in (published, of_80):  # the published 80 epochs are the first of the 800
        assert [each.lr_factor(1_251 * epoch) for epoch in (0, 40)] == [1, 1]
        assert each.lr_factor(75_060) == pytest.approx(1 - 0.9 * 20 / 760)
        assert each.lr_factor(100_080) == pytest.approx(1 - 0.9 * 40 / 760)
    assert published.lr_factor(1_000_800) == pytest.approx(0.1)
    longer = trainer("trainer.max_steps=900epochs")
    assert longer.lr_factor(1_100_000) == pytest.approx(0.1)
    small = trainer("trainer.global_batch_size=256", "trainer.max_steps=0.5epochs")
    assert (small.max_steps, small.decay_after, small.decay_end) == (2_502, 40 * 5_004, 800 * 5_004)
    with pytest.raises(UserError, match=r"^trainer\.max_steps=800epochs: 1,000 images fill no batch of .*; give steps"):
        trainer(images=1_000)
    with pytest.raises(UserError, match=r"^trainer\.decay_after=900epochs: must lie in|^trainer\.decay_after=1125900"):
        trainer("trainer.decay_after=900epochs")


def test_xl_on_imagenet_is_the_published_recipe():
    """method.md 2, 3 and 4, value by value."""
    settings = train_settings("model=xl_22en6de", "data=in256", "data.root=somewhere")
    assert settings.model.settings == dict(
        patch_size=2, hidden_size=1152, num_heads=16, depth=28, encoder_depth=22,
        decoder_block="attention", adaln_init="release", activation_checkpointing=False, decoder_hidden_size=None,
        decoder_num_heads=None,
    )  # fmt: skip
    assert settings.objective.settings["time_distribution"] == "lognorm"
    assert settings.objective.settings["label_dropout"] == 0.1
    optimizer = settings.optimizer
    assert optimizer.target == "ddt.training.optimizer.adamw"
    assert tuple(optimizer.settings[key] for key in ("lr", "betas", "weight_decay")) == (1e-4, (0.9, 0.95), 0)
    trainer = settings.trainer
    assert (trainer.max_steps, trainer.global_batch_size, trainer.mixed_precision) == (400_000, 256, "bf16")
    assert (trainer.ema_decay, trainer.warmup_steps, trainer.lr_schedule) == (0.9999, 0, "constant")
    assert trainer.save_every == 10_000
    assert settings.data.settings["image_size"] == 256
    assert settings.data.settings["holdout_every"] == 0
    assert settings.autoencoder.settings["source"] == "stabilityai/sd-vae-ft-ema"
    assert settings.alignment.settings == dict(
        target="vit_base_patch14_dinov2.lvd142m",
        weights=None,
        align_depth=8,
        weight=0.5,
        until_step=None,
        projector_width=None,
    )
    published = dict(
        solver="euler",
        num_steps=250,
        cfg_scale=2.0,
        cfg_interval=(0.3, 1.0),
        last_step=0.04,
        timeshift=None,  # 1 of these latents
        recompute=None,
        cfg_steps=None,
        forecast_order=0,
        sde_diffusion="sigma",
        sde_last="mean",
        tolerance=1e-3,
        t_end=1.0,
        internal_scale=1.0,
        internal_interval=None,
    )
    assert dataclasses.asdict(settings.sampler) == published
    large = train_settings("model=xl_22en6de", "data=in512", "data.root=somewhere")
    assert dataclasses.asdict(large.sampler) == published | {"cfg_scale": 3.0}
    assert large.data.settings["image_size"] == 512


def test_the_command_line_wins_over_the_data():
    overrides = ["autoencoder=identity", "trainer.max_steps=7", "optimizer.lr=0.5"]
    settings = train_settings("data=in256", "data.root=x", *overrides)
    assert settings.autoencoder.target == "ddt.autoencoder.Identity"
    assert (settings.trainer.max_steps, settings.optimizer.settings["lr"]) == (7, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    thinned(
        [
            (["model=xl_22en6de", "data=in256"], "data.root: not set; give data.root=…"),
            (["data=in256", "data.root=."], "alignment.align_depth=8: the encoder has 4 blocks, choose 1..4"),
            (["model=b_8en4de", "data=in256", "data.root=/no"], "data.root=/no: no such folder"),
            (["alignment=repa_dinov2_b", "alignment.target=dinov2"], "alignment.target=dinov2: timm has no model"),
            (
                ["alignment=repa_dinov2_b", "alignment.align_depth=2", "alignment.weights=no.pth"],
                "alignment.weights=no.pth: ",
            ),
            (["init_from=runs/none"], "init_from=runs/none: no such file or folder, and runs/ is the folder of runs"),
            (["experiment=xl_512", "data.root=."], "init_from: not set; give init_from="),
            (["model.encoder_dept=3"], "model.encoder_dept: no such setting; did you mean model.encoder_depth?"),
            (["+model.foo=1"], "model.foo: no such setting"),
            (
                ["objective=reg", "objective.base_depth=2"],
                "objective.base_depth: no such setting of objective=reg; objective=flow_matching has it",
            ),
            (["modle=nano"], "modle: no such setting; did you mean model?"),
            (["model=nanoo"], "model=nanoo: no such choice; did you mean nano?"),
            (["trainer.max_steps=abc"], "trainer.max_steps=abc: give a whole number or epochs such as 80epochs"),
            (["trainer.max_steps=-1epochs"], "trainer.max_steps=-1epochs: give a whole number or epochs"),
            (["trainer.max_steps=1e8epochs"], "trainer.max_steps=1e8epochs: give a whole number or epochs"),
            (["trainer.max_steps=99999999epochs"], "trainer.max_steps=99999999epochs: too many; give fewer"),
            (["trainer.log_every=2.5"], "trainer.log_every=2.5: give a whole number"),
            (
                ["model.encoder_depth=6"],
                "model.encoder_depth=6 leaves no encoder or no decoder: with model.depth=6 choose 1..5",
            ),
            (["model.num_heads=5"], "model.num_heads=5 does not divide model.hidden_size=96"),
            (["trainer.micro_batch_size=7"], "trainer.micro_batch_size=7 does not divide the 64 images"),
            (["sampler.cfg_interval=[0.7,0.3]"], "sampler.cfg_interval=[0.7,0.3]: needs 0 <= lo < hi <= 1"),
            (["data=folder", "data.root=/no/such"], "data.root=/no/such: no such folder"),
            (["name=../elsewhere"], "name=../elsewhere: give a folder name"),
            (["seed=-1"], "seed=-1: must be at least 0"),
            (["objective.label_dropout=2"], "objective.label_dropout=2.0: must lie in 0..1"),
            (["trainer.mixed_precision=fp8"], "trainer.mixed_precision=fp8: give 'bf16'"),
            (["trainer.max_steps"], "Error parsing override"),
            (["optimizer.lr=abc"], "optimizer.lr=abc: give a number"),
            (["optimizer.lr=-1"], "optimizer.lr=-1.0: must be above 0"),
            (["optimizer.betas=[0.9]"], "optimizer.betas=[0.9]: "),
            (["optimizer._target_=torch.optim.Foo"], "optimizer._target_: cannot be set; choose a whole file"),
            (["sampler.cfg_scale=inf"], "sampler.cfg_scale=inf: give a finite number"),
            (["model=dit_b", "sampler.recompute=[0]"], "sampler.recompute=[0]: this model has no encoder to share"),
            (["model.patch_size=3"], "model.patch_size=3 does not divide the latent size 8×8"),
            (["+foo=1"], "foo: no such setting"),
            (["trainer.num_processes=0"], "trainer.num_processes=0: must be at least 1"),
            (["data=null"], "data=null: no such choice; choose from digits, "),
            (["model=[nano,dit_b]"], "model=[nano,dit_b]: no such choice"),
            (["model=[1]"], "model=[1]: no such choice"),
            (["~model"], "~model: a setting cannot be removed"),
            (["name.x=1"], "name.x: no such setting"),
            (["name="], "name=: give a folder name"),
            (
                [f"name={'a' * 201}"],
                f"name={'a' * 201}: give a folder name of letters, digits and _.=,+-, at most 200 bytes",
            ),
            (["++model._partial_=true"], "model._partial_: cannot be set"),
            (["trainer.max_steps={_target_:os.getcwd}"], "trainer.max_steps._target_: cannot be set"),
            (["trainer.num_workers=100000"], "trainer.num_workers=100000: must be at most 128"),
            (["trainer.global_batch_size=1000000000000"], "trainer.global_batch_size=1000000000000: must be at most"),
            (["trainer.max_steps=1e30"], "trainer.max_steps=1e+30: give a whole number"),
            (["trainer.ema_powers=[1e-300]"], "trainer.ema_powers=[1e-300]: give a number"),
            (["trainer.ema_powers=[1e-6]"], "trainer.ema_powers=[1e-06]: each is a relative standard deviation"),
            (["model.hidden_size=1000000000"], "model.hidden_size=1000000000: must be at most 65,536"),
            (["model.depth=1000000"], "model.depth=1000000: must be at most 1,000"),
            (["model.hidden_size=65536", "model.depth=900"], "model: 6.96e+13 parameters are "),
            (["data=photos", "data.crops=1000000000"], "data.crops=1000000000: must be at most"),
            (["seed=99999999999999999999"], "seed=99999999999999999999: give a number that 64 bits"),
        ],
        3,
    ),
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (line,) = refusal("train", *arguments).splitlines()
    assert line.startswith(message)
    assert not list(tmp_path.iterdir())


def test_a_mistake_ends_the_process_with_status_1_and_no_traceback(tmp_path):
    done = run(ROOT / "train.py", "model=xl_22en6de", "data=in256", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "data.root: not set; give data.root=…\n"


def test_all_mistakes_are_told_at_once_but_those_that_need_an_import_come_last():
    light, heavy = (
        ["trainer.max_steps=abc", "model.depth=x", "seed=x"],
        ["optimizer.betas=[0]", "optimizer.weight_decay=null"],
    )
    for given, told in ((light, light), (heavy, heavy), ([*light, *heavy], light)):
        assert {line.partition(":")[0] for line in refusal("train", *given).splitlines()} == set(told)
    mistakes = ("model.encoder_depth=6", "trainer.micro_batch_size=7", "sampler.num_steps=0")
    assert len(refusal("train", *mistakes).splitlines()) == 2  # of each group by itself
    assert len(refusal("train", mistakes[0], "optimizer.lr=-1").splitlines()) == 2


def test_files_of_another_folder_of_settings_may_be_chosen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "model").mkdir(parents=True)
    shutil.copy(CONF / "model" / "nano.yaml", tmp_path / "own" / "model" / "mine.yaml")
    chosen = ["--config-dir", str(tmp_path / "own"), "model=mine"]
    line = refusal("train", *chosen, "model.adaln_init=zero", "model.encoder_depth=99")
    assert line.startswith("model.encoder_depth=99 leaves no encoder or no decoder")
    assert refusal("train", *chosen, "model.depth=x") == "model.depth=x: give a whole number"


def test_a_resumed_run_does_not_look_for_init_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="init_from=gone: no such file or folder"):
        train_settings("init_from=gone", "name=x")
    (tmp_path / "runs" / "x" / "checkpoints").mkdir(parents=True)
    assert train_settings("init_from=gone", "name=x").init_from == "gone"


def test_a_number_in_a_file_is_a_number_of_its_class():
    """So what `wrong_numbers` refuses before the class is imported, the class refuses, too."""
    checked = 0
    for path in sorted(CONF.glob("*/[!_]*.yaml")):
        group = path.parent.name
        values = group_values(group, path.stem)
        settings = values.get(group, values)
        for key, value in settings.items() if isinstance(settings, dict) and settings.get("_target_") else ():
            # the trainer is no choice: its numbers are compared with the light settings
            if isinstance(value, int | float) and not isinstance(value, bool) and group != "trainer":
                for text in ("x", "auto", "80epochs"):
                    (line,) = check_arguments(locate(settings["_target_"]), {key: text}, group)[1]
                    assert line.startswith(convert(text, type(value), f"{group}.{key}")[1][0]), (path, line)
                checked += 1
    assert checked > 100


def test_values_are_converted_to_the_annotated_types():
    def function(count: int, rate: float, pair: tuple[float, float] | None, name: str = "x") -> None: ...

    values, problems = check_arguments(function, {"count": 4e5, "rate": 1, "pair": [0, 1]}, "group")
    assert not problems
    assert (values["count"], type(values["count"]), values["pair"]) == (400_000, int, (0.0, 1.0))
    _, problems = check_arguments(function, {"count": "x", "nome": "y"}, "group")
    assert problems[0].startswith("group.count=x: ")
    assert problems[1] == "group.nome: no such setting; did you mean name?"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"count": True}, "count=true: give a number"),
        ({"pair": [False, 1]}, "pair=[false,1]: give a number"),
        ({"pair": [0, 1, 2]}, "pair=[0,1,2]: give 2 values or null"),
        ({"pair": [0]}, "pair=[0]: give 2 values or null"),
        ({"pair": 3}, "pair=3: give a list such as [a,b] or null"),
        ({"steps": 7}, "steps=7: give a list such as [a,b]"),
        ({"steps": None}, "steps=null: give a list such as [a,b]"),
        ({"flag": "maybe"}, "flag=maybe: give true or false"),
        ({"numbers": {"a": "x"}}, "numbers={a:x}: give a number"),
    ],
)
def test_mistakes_are_told_in_words_of_the_command_line(values, line):
    def function(
        count: int, pair: tuple[float, float] | None, steps: Sequence[int], flag: bool, numbers: dict[str, float]
    ) -> None: ...

    assert check_arguments(function, values, "")[1] == [line]


@pytest.mark.parametrize("kind", [SamplerSettings, TrainerSettings])
def test_a_value_names_no_code_to_call(tmp_path, kind):
    """A checkpoint of others holds such values."""
    node = {"_target_": "os.mkdir", "path": str(tmp_path / "called")}
    key = next(iter(kind.__dataclass_fields__))
    with pytest.raises(UserError, match=rf"{key}=.*os\.mkdir"):
        parse(kind, {key: node})
    assert not (tmp_path / "called").exists()


def test_a_group_takes_its_own_settings_alone(tmp_path):
    node = {"_target_": "os.mkdir", "path": str(tmp_path / "called")}
    assert convert(node, SamplerSettings | None, "sampler")[1] == [
        "sampler._target_=os.mkdir: is no settings of this group; choose a file of it"
    ]
    for target in ("os.mkdir", "ddt.files.write_json", "ddt.training.tracking.JsonlTracker", "ddt.model.DDT",
                   "ddt.objective.Objective", "ddt.data.images.Digits", "nowhere", None, {"a": 1}):  # fmt: skip
        with pytest.raises(UserError, match=r"^objective\._target_=.*: is no Objective of this code"):
            stored_choice(node | {"_target_": target}, Objective, "objective", late="denoiser")
    with pytest.raises(UserError, match=r"_target_=ddt\.data\.images\.FileImages: is no Images of this code"):
        stored_choice({"_target_": "ddt.data.images.FileImages", "root": "x"}, Images, "data", late="split")
    known = {"_target_": "ddt.objective.FlowMatching", "label_dropout": "0.5"}
    assert stored_choice(known, Objective, "objective", late="denoiser").settings == {"label_dropout": 0.5}
    for change, line in (({"label_dropout": "x"}, "objective.label_dropout=x: give a number"),
                         ({"gone": 1}, "objective.gone: no such setting")):  # fmt: skip
        with pytest.raises(UserError, match=f"^{line}"):
            stored_choice(known | change, Objective, "objective", late="denoiser")
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("package", "arguments", "key", "extra"),
    [
        ("torchode", ["sampler.solver=adaptive"], "sampler.solver=adaptive", "torchode"),
        ("wandb", ["tracker=wandb"], "tracker", "-e ."),
        ("diffusers", ["autoencoder=sd_ft_ema"], "autoencoder", "-e ."),
        ("timm", ["alignment=repa_dinov2_b"], "alignment", "-e ."),
        ("torch_fidelity", ["features=digits", "trainer.eval_every=5"], "features", "-e ."),
        ("skimage", ["data=photos"], "data", "-e '.[photos]'"),
        ("sklearn", [], "data", "-e ."),
    ],
)
def test_a_missing_package_is_told_before_anything_is_built(tmp_path, monkeypatch, package, arguments, key, extra):
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    assert refusal("train", *arguments) == f"{key}: needs the package {package}; run pip install {extra}"
    assert not list(tmp_path.iterdir())


def test_a_stored_sampler_is_read_without_its_package(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "torchode" else find(name, *rest)
    )
    stored = {"solver": "adaptive"}
    assert parse(SamplerSettings, stored).adaptive
    assert SamplerOverrides(sampler="euler").resolve(stored, True).solver == "euler"
    with pytest.raises(UserError, match=r"^sampler=adaptive: needs the package torchode; run pip install"):
        SamplerOverrides().resolve(stored, True)


def test_a_warm_up_that_does_not_end_is_told(caplog):
    caplog.set_level("INFO")
    settings = train_settings("trainer.warmup_steps=50", "trainer.max_steps=50")
    check(infer(settings))
    assert "hint: trainer.warmup_steps=50 is not below trainer.max_steps=50" in caplog.text
    assert settings.trainer.lr_factor(49) == 1
    caplog.clear()
    check(infer(train_settings("trainer.warmup_steps=50", "trainer.max_steps=51")))
    assert "hint" not in caplog.text


def test_truth_values_stay_what_they_are():
    def function(flag: bool, either: bool | Literal["selective"], nothing: bool | None) -> None: ...

    given = {"flag": True, "either": False, "nothing": None}
    assert check_arguments(function, given, "") == (given, [])


@pytest.mark.slow
def test_processes_of_a_launcher_tell_a_mistake_once(tmp_path):
    command = ("-m", "torch.distributed.run", "--nproc-per-node=2", ROOT / "train.py", "trainer.max_steps=abc")
    done = run(*command, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("trainer.max_steps=abc: give a whole number") == 1


def test_a_word_beside_true_and_false_is_named():
    _, problems = check_arguments(Block, {"activation_checkpointing": "all"}, "model")
    assert problems[0] == "model.activation_checkpointing=all: give true or false or 'selective'"


@pytest.mark.slow
def test_a_sweep_is_a_run_for_each_job(tmp_path, monkeypatch):
    small = ["trainer.max_steps=2", "trainer.preview_every=0", "trainer.validate_every=0", "sampler.num_steps=1"]
    monkeypatch.chdir(tmp_path)
    succeed("train", "-m", "seed=3", "model.hidden_size=32", *small)  # two and more: tests/test_cli.py
    folder = tmp_path / "runs" / "digits_nano" / "model.hidden_size=32,sampler.num_steps=1,seed=3"
    assert (folder / "checkpoints" / "step_0000002" / "manifest.json").is_file()


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int
    ratio: float = 0.5

    def __post_init__(self):
        if self.size < 1:
            raise UserError(f"size={self.size}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    maybe: Inner | None
    choice: Choice | None


def test_settings_are_parsed_to_dataclasses():
    node = {"_target_": "test_config.Inner", "size": 3}
    parsed = parse(Outer, {"name": 7, "inner": {"size": "4"}, "maybe": {"_target_": None}, "choice": node})
    assert parsed == Outer("7", Inner(4), None, Choice("test_config.Inner", {"size": 3}))
    assert parsed.choice.build(ratio=1.0) == Inner(3, 1.0)
    assert parsed.choice.plain() == node
    assert parse(Outer, {"name": "", "inner": node, "maybe": node, "choice": node}).maybe == Inner(3)


def test_all_problems_of_settings_are_told_with_their_keys():
    values = {"name": "x", "inner": {"size": 0}, "maybe": {"sise": 1}, "choice": {"a": 1}, "more": 1}
    with pytest.raises(UserError) as error:
        parse(Outer, values)
    assert str(error.value).splitlines() == [
        "inner.size=0: must be at least 1",
        "maybe.sise: no such setting; did you mean size?",
        "maybe.size: not set; give maybe.size=…",
        "choice={a:1}: has no _target_; choose a whole file of the group, not a part of one",
        "more: no such setting; choose from choice, inner, maybe, name",
    ]
