"""init_from: weights of another run or a published file; what is loaded, new, refused."""

import json

import pytest
import torch
from conftest import GOLDEN, refusal, small_ddt, succeed, thinned
from safetensors.torch import load_file, save_file

from ddt.checkpoint.format import write_checkpoint
from ddt.checkpoint.published import read_released
from ddt.class_names import imagenet_synsets
from ddt.objective import FlowMatching
from ddt.objective.alignment import Dispersive
from ddt.training.ema import EMA, ConstantDecay
from ddt.training.init_from import initialise

SMALL = [
    "model.hidden_size=32",
    "model.depth=3",
    "model.encoder_depth=2",
    "sampler.num_steps=2",
    "trainer.global_batch_size=8",
    "trainer.log_every=1",
    "trainer.validate_every=0",
    "trainer.preview_every=0",
    "trainer.lr_schedule=constant",
]
OTHER = "init_from=runs/source/checkpoints/step_0000004: is another network"
PATCH1 = GOLDEN / "patch1.lightning.ckpt"
TABLE = "encoder.y_embedder.embedding_table.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run of four steps on digits."""
    root = tmp_path_factory.mktemp("initial")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        succeed("train", *SMALL, "name=source", "trainer.max_steps=4", "trainer.ema_decay=0.5")
    return root


def weights(run, name, step):
    return load_file(run / f"checkpoints/step_{step:07d}/{name}.safetensors")


def frozen(*options):
    """Options of a step that changes no weights, so that the initial weights are saved."""
    return [*SMALL, "optimizer.lr=1e-30", "trainer.max_steps=1", "trainer.ema_decay=0.999999", *options]


def test_a_run_starts_from_raw_and_ema_weights(place, monkeypatch, caplog):
    monkeypatch.chdir(place)
    caplog.set_level("INFO")
    succeed("train", *frozen("name=same", "init_from=runs/source"))
    for name in ("model", "ema"):
        found, expected = weights(place / "runs/same", name, 1), weights(place / "runs/source", name, 4)
        assert found.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-6)
    raw, ema = (weights(place / "runs/source", n, 4)["decoder.output.linear.weight"] for n in ("model", "ema"))
    assert not torch.allclose(raw, ema, atol=1e-6)
    assert "raw and EMA weights loaded, label table loaded, no projector" in caplog.text


def test_resuming_ignores_the_source_but_not_a_change_of_it(place, monkeypatch, caplog):
    monkeypatch.chdir(place)
    caplog.set_level("INFO")
    options = [*SMALL, "name=again", "init_from=runs/source/checkpoints/step_0000004"]
    succeed("train", *options, "trainer.max_steps=1")
    caplog.clear()
    succeed("train", *options, "trainer.max_steps=2")
    assert "resuming at step 1" in caplog.text
    assert "loaded" not in caplog.text
    message = refusal("train", *SMALL, "name=again", "trainer.max_steps=3")
    assert "init_from runs/source/checkpoints/step_0000004 -> None" in message


def test_other_classes_get_a_new_table_and_keep_the_null_row(place, monkeypatch, caplog, tmp_path):
    from conftest import picture_folder

    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    grey = [
        "data=folder",
        f"data.root={picture_folder(tmp_path / 'pictures', count=4, classes=3)}",
        "data.image_size=8",
        "model.patch_size=2",
    ]
    colour = [o for o in SMALL if "lr_schedule" not in o] + ["trainer.lr_schedule=constant", *grey]
    succeed("train", *colour, "name=source", "trainer.max_steps=2")
    more = picture_folder(tmp_path / "more", count=4, classes=5)
    options = [o for o in frozen() if o not in SMALL]
    succeed(
        "train", *colour[:-2], f"data.root={more}", "data.image_size=16", *options, "name=more", "init_from=runs/source"
    )
    assert "label table new (3 -> 5 classes)" in caplog.text
    for name in ("model", "ema"):
        source, found = weights(tmp_path / "runs/source", name, 2), weights(tmp_path / "runs/more", name, 1)
        assert found[TABLE].shape == (6, 32)
        torch.testing.assert_close(found[TABLE][-1], source[TABLE][-1], rtol=0, atol=1e-6)
        assert not torch.allclose(found[TABLE][:3], source[TABLE][:3], atol=1e-3)
        for key in source.keys() - {TABLE}:
            torch.testing.assert_close(found[key], source[key], rtol=0, atol=1e-6)
    config = json.loads((tmp_path / "runs/more/checkpoints/step_0000001/config.json").read_text())
    assert config["latent_shape"] == [3, 16, 16]  # the size of images may differ


def network(**sizes):
    return {"_target_": "ddt.model.DDT", "in_channels": 4, "patch_size": 2, "hidden_size": 64, "num_heads": 4,
            "depth": 5, "encoder_depth": 3, "num_classes": 10, **sizes}  # fmt: skip


def stored_config(step, **sizes):
    settings = network(**sizes)
    return {
        "step": step,
        "network": settings,
        "latent_shape": [settings["in_channels"], 8, 8],
        "autoencoder": {"_target_": "ddt.autoencoder.Identity"},
        "sampler": {},
        "class_names": ["0"] * settings["num_classes"],
    }


def run_config(network, autoencoder=None):
    class_names = ["0"] * network["num_classes"]
    pixels = {"_target_": "ddt.autoencoder.Identity"}
    return {
        "network": network, "autoencoder": pixels, "autoencoder_fingerprint": autoencoder, "class_names": class_names,
    }  # fmt: skip


def objective(**sizes):
    settings = {key: value for key, value in network(**sizes).items() if key != "_target_"}
    return FlowMatching(small_ddt(**settings), alignment=sizes.get("alignment"))


def emas(trained):
    return {"ema": EMA(trained.denoiser, ConstantDecay(0.9))}


def test_a_published_file_gives_raw_and_ema_weights():
    sizes = read_released(PATCH1, encoder_depth=1, patch_size=1).network
    trained = objective(**sizes)
    ema = EMA(trained.denoiser, ConstantDecay(0.9))
    initialise(str(PATCH1), run_config(network(**sizes)), trained, {"ema": ema})
    state = torch.load(PATCH1, weights_only=True)["state_dict"]
    for prefix, model in (("ema_denoiser.", ema.model), ("denoiser.", trained.denoiser)):
        found = model.state_dict()
        assert torch.equal(found["encoder.input.proj.weight"], state[f"{prefix}s_embedder.proj.weight"])
        assert torch.equal(found["decoder.blocks.1.mixer.qkv.weight"], state[f"{prefix}blocks.2.attn.qkv.weight"])
        assert torch.equal(found[TABLE], state[f"{prefix}y_embedder.embedding_table.weight"])


def test_raw_weights_alone_stand_for_both(tmp_path):
    state = torch.load(PATCH1, weights_only=True)["state_dict"]
    raw = {f"module.{key}": value for key, value in state.items() if not key.startswith("ema_denoiser.")}
    torch.save({"state_dict": raw}, tmp_path / "raw.ckpt")
    sizes = read_released(PATCH1, encoder_depth=1, patch_size=1).network
    trained = objective(**sizes)
    ema = EMA(trained.denoiser, ConstantDecay(0.9))
    initialise(str(tmp_path / "raw.ckpt"), run_config(network(**sizes)), trained, {"ema": ema})
    for model in (ema.model, trained.denoiser):
        found = model.state_dict()["encoder.input.proj.weight"]
        assert torch.equal(found, state["denoiser.s_embedder.proj.weight"])


def test_a_converted_checkpoint_has_ema_weights_alone(tmp_path, caplog):
    caplog.set_level("INFO")
    source = objective(num_classes=7).denoiser
    config = stored_config(None, num_classes=7) | {"autoencoder_fingerprint": "other"}
    write_checkpoint(tmp_path / "converted", config, ema=source.state_dict())
    trained = objective()
    ema = EMA(trained.denoiser, ConstantDecay(0.9))
    fresh = trained.denoiser.state_dict()[TABLE].clone()
    initialise(str(tmp_path / "converted"), run_config(network(), "mine"), trained, {"ema": ema})
    assert torch.equal(trained.denoiser.state_dict()[TABLE][:-1], fresh[:-1])
    assert torch.equal(trained.denoiser.state_dict()[TABLE][-1], source.state_dict()[TABLE][-1])
    for key, value in source.state_dict().items():
        if key != TABLE:
            assert torch.equal(trained.denoiser.state_dict()[key], value)
            assert torch.equal(ema.model.state_dict()[key], value)
    assert "was trained on latents of another autoencoder than this run's" in caplog.text


@pytest.mark.parametrize("converted", [True, False])
def test_other_classes_than_a_published_source_are_warned_of(tmp_path, caplog, converted):
    synsets, path = imagenet_synsets(), tmp_path / "source.safetensors"
    sizes = network(num_classes=len(synsets), hidden_size=16)
    source = objective(num_classes=len(synsets), hidden_size=16)
    state = source.denoiser.state_dict()
    if converted:
        write_checkpoint(path, {**stored_config(None), "network": sizes, "class_names": synsets}, ema=state)
    else:
        release = type(source.denoiser).release
        save_file({release.published_name(key, sizes): value for key, value in state.items()}, path)
    config = run_config(sizes) | {"class_names": [*synsets[:7], synsets[8], synsets[7], *synsets[9:]]}
    initialise(str(path), config, source, emas(source))
    assert f"2 rows of the label table change their class, the first is 7, from {synsets[7]} to {synsets[8]}" in (
        caplog.text
    )
    caplog.clear()
    initialise(str(path), config | {"class_names": synsets}, source, emas(source))
    assert "change their class" not in caplog.text


def test_a_projector_is_loaded_where_it_fits(tmp_path, caplog):
    from ddt.objective.alignment import AlignmentLoss, Projector

    caplog.set_level("INFO")

    def aligned(features):
        loss = AlignmentLoss(Projector(64, 8, features), 2, 0.5, (2, 2), (2, 2))
        return FlowMatching(objective().denoiser, alignment=loss)

    source = aligned(6)
    config = stored_config(1) | {"class_names": ["1"] * 10}
    state = source.denoiser.state_dict()
    write_checkpoint(
        tmp_path / "run", config, ema=state, model=state, train_state={"alignment": source.alignment.state_dict()}
    )
    fits, other = aligned(6), aligned(5)
    initialise(str(tmp_path / "run"), run_config(network()), fits, emas(fits))
    assert torch.equal(fits.alignment.projector[4].weight, source.alignment.projector[4].weight)
    assert "projector loaded" in caplog.text
    assert "has as many classes, but others" in caplog.text
    initialise(str(tmp_path / "run"), run_config(network()), other, emas(other))
    assert "projector new" in caplog.text
    assert Dispersive().build_loss().state_dict() == {}


@pytest.mark.parametrize(
    ("option", "message"),
    thinned([
        ("init_from=nowhere", "init_from=nowhere: no such file or folder, and no hub id"),
        ("init_from=runs/slip", "init_from=runs/slip: no such file or folder, and a folder runs/ is here"),
        ("init_from=runs", "init_from=runs: holds 0 files of weights (.ckpt, .safetensors"),
        ("model.encoder_depth=1 init_from=runs/source", f"{OTHER} (model.encoder_depth 2 -> 1)"),
        ("model.decoder_block=mlp init_from=runs/source", f"{OTHER} (model.decoder_block attention -> mlp)"),
        ("model.depth=4 init_from=runs/source", f"{OTHER} (model.depth 3 -> 4)"),
        (f"init_from={PATCH1} model.decoder_block=mlp", f"init_from={PATCH1}: is another network (model.decoder_block"),
        (f"init_from={PATCH1}", f"init_from={PATCH1}: is another network (model.hidden_size 48 -> 32"),
        (f"init_from={GOLDEN / 'golden.json'}", f"init_from={GOLDEN / 'golden.json'}: is JSON"),
    ], 3),
)  # fmt: skip
def test_invalid_sources_are_one_line(place, monkeypatch, option, message):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    (line,) = refusal("train", *SMALL, "name=new", *option.split()).splitlines()
    assert line.startswith(message)
    assert sorted(place.rglob("*")) == before
