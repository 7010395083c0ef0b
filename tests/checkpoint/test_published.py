"""Published checkpoints are read strictly."""

import re
import warnings

import pytest
import torch
from conftest import GOLDEN, ROOT, refusal, small_vae, succeed
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import ddt
from ddt.checkpoint.convert import ConvertSettings, convert
from ddt.checkpoint.published import check_releasable, find_released, read_file, read_released, write_released
from ddt.config import Choice, parse
from ddt.errors import UserError
from ddt.sampling.settings import SamplerSettings

LIGHTNING = GOLDEN / "patch1.lightning.ckpt"


def changed(tmp_path, change, source="tiny.weights.safetensors"):
    state = load_file(GOLDEN / source)
    change(state)
    save_file(state, tmp_path / "changed.safetensors")
    return tmp_path / "changed.safetensors"


def test_ema_weights_are_taken_from_a_lightning_file():
    state = torch.load(LIGHTNING, weights_only=True)["state_dict"]
    model = ddt.load_released(LIGHTNING, encoder_depth=1, patch_size=1)
    weight = model.decoder.blocks[1].mixer.qkv.weight
    assert torch.equal(weight, state["ema_denoiser.blocks.2.attn.qkv.weight"])
    assert not torch.equal(weight, state["denoiser.blocks.2.attn.qkv.weight"])
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_architecture_is_read_from_the_shapes():
    model = ddt.load_released(GOLDEN / "tiny.weights.safetensors", encoder_depth=3)
    assert (model.in_channels, model.num_classes) == (4, 10)
    assert (len(model.encoder.blocks), len(model.decoder.blocks)) == (3, 2)
    assert model.encoder.blocks[0].mixer.num_heads == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(extra=torch.zeros(1)), "unknown key extra"),
        (lambda s: s.update({"blocks.0.attn.rope": torch.zeros(1)}), r"unknown key blocks\.0\.attn\.rope"),
        (lambda s: s.pop("blocks.1.norm1.weight"), r"encoder\.blocks\.1\.norm1\.weight are missing"),
        (lambda s: s.pop("final_layer.linear.weight"), r"key final_layer\.linear\.weight is missing"),
        (
            lambda s: s.pop("y_embedder.embedding_table.weight"),
            r"key y_embedder\.embedding_table\.weight is missing",
        ),
        (
            lambda s: s.update({"blocks.0.norm1.weight": torch.ones(65)}),
            r"blocks\.0\.norm1\.weight has shape \(65,\)",
        ),
        (
            lambda s: [s.pop(k) for k in list(s) if k.startswith("blocks.2.")],
            "4 blocks, numbered up to 4: some are missing",
        ),
        (lambda s: s.update({"blocks.0.norm1.weight": torch.full((64,), torch.nan)}), "holds NaN or infinite values"),
        (lambda s: s.update({"blocks.99999999999.x": torch.zeros(1)}), "some are missing"),
    ],
)
def test_every_key_is_used_or_refused_by_name(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        ddt.load_released(changed(tmp_path, change), encoder_depth=3)


def test_an_unknown_prefix_is_refused(tmp_path):
    state = torch.load(LIGHTNING, weights_only=True)
    state["state_dict"]["vae.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"unknown key \['vae\.weight'\]"):
        ddt.load_released(tmp_path / "x.ckpt", encoder_depth=1, patch_size=1)


@pytest.mark.parametrize("depth", [0, 5, -1])
def test_encoder_depth_out_of_range(depth):
    with pytest.raises(UserError, match=rf"encoder_depth={depth}: .* choose 1\.\.4"):
        ddt.load_released(GOLDEN / "tiny.weights.safetensors", encoder_depth=depth)


def test_patch_size_must_divide_the_output():
    with pytest.raises(UserError, match="patch_size=3: its square does not divide the 16 output rows"):
        ddt.load_released(GOLDEN / "tiny.weights.safetensors", encoder_depth=3, patch_size=3)


def test_baseline_and_ddt_are_told_apart():
    with pytest.raises(UserError, match="undivided baseline: give encoder_depth=null"):
        ddt.load_released(GOLDEN / "baseline.weights.safetensors", encoder_depth=3)
    with pytest.raises(UserError, match="give encoder_depth"):
        ddt.load_released(GOLDEN / "tiny.weights.safetensors", encoder_depth=None)


def test_an_unusual_encoder_depth_is_warned_of():
    with torch.device("meta"):
        model = ddt.DDT(4, 2, 768, 12, 12, 8, 1000)
    release = {"s_embedder.proj.weight": torch.empty(0)}
    release |= {"final_layer.linear.weight": model.decoder.output.linear.weight}
    release |= {"y_embedder.embedding_table.weight": model.encoder.y_embedder.embedding_table.weight}
    release |= {f"blocks.{i}.attn.q_norm.weight": model.encoder.blocks[0].mixer.q_norm.weight for i in range(12)}
    with pytest.warns(UserWarning, match=r"encoder_depth=9 is unusual for width 768 and 12 blocks"):
        ddt.DDT.release.settings(release, 9, 2, "b.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ddt.DDT.release.settings(release, 8, 2, "b.ckpt")["encoder_depth"] == 8


def test_unreadable_files_are_named(tmp_path):
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(LIGHTNING.read_bytes()[:5000])
    half = tmp_path / "half.safetensors"
    half.write_bytes((GOLDEN / "tiny.weights.safetensors").read_bytes()[:5000])
    code = tmp_path / "code.ckpt"
    torch.save({"state_dict": {}, "callback": print}, code)
    other = tmp_path / "other.ckpt"
    torch.save({"weights": {}}, other)
    for path, message in (
        (cut, "cannot be read"),
        (half, "cannot be read"),
        (code, "more than weights"),
        (other, "holds no state dict, for weights is no tensor"),
    ):
        with pytest.raises(UserError, match=rf"{path.name}: .*{message}"):
            ddt.load_released(path, encoder_depth=1, patch_size=1)
    with pytest.raises(UserError, match="no such file"):
        ddt.load_released(tmp_path / "absent.ckpt", encoder_depth=1)


def test_find_released(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="holds 0"):
        find_released(str(tmp_path))
    (tmp_path / "a.ckpt").touch()
    assert find_released(str(tmp_path)) == find_released(str(tmp_path / "a.ckpt")) == tmp_path / "a.ckpt"
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(UserError, match="holds 2"):
        find_released(str(tmp_path))
    with pytest.raises(UserError, match="the hub did not give it"):
        find_released("nobody/nothing")
    with pytest.raises(UserError, match="no hub id"):
        find_released("/no/such/place")
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="init_from=runs/slip: no such file or folder, and a folder runs/ is here"):
        find_released("runs/slip", "init_from")


def wrapped(key, wrapper):
    """A key as training under DDP or torch.compile saves it, the wrapper at its head, after its
    prefix, and inside.
    """
    prefix, _, rest = key.partition(".")
    return {
        "head": f"_orig_mod.{key}",
        "after the prefix": f"{prefix}._orig_mod.module.{rest}",
        "inside": key.replace("blocks.1.", "blocks.1._orig_mod.").replace("attn.", "attn.module."),
    }[wrapper]


def lightning(change=lambda key: key):
    return {change(key): value for key, value in torch.load(LIGHTNING, weights_only=True)["state_dict"].items()}


def same(state, expected):
    return state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("wrapper", ["head", "after the prefix", "inside"])
def test_weights_of_compiled_and_parallel_training_are_read(tmp_path, wrapper):
    expected = read_file(LIGHTNING)
    torch.save({"state_dict": lightning(lambda key: wrapped(key, wrapper))}, tmp_path / "x.ckpt")
    found = read_file(tmp_path / "x.ckpt")
    assert all(same(found[part], expected[part]) for part in ("ema", "model", "projector"))


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "safetensors"])
@pytest.mark.parametrize("form", ["bare", "bare, with prefixes", "bare, wrapped", "ema and model"])
def test_state_dicts_without_lightning_are_read(tmp_path, form, suffix):
    parts, path = read_file(LIGHTNING), tmp_path / f"x.{suffix}"
    content = {
        "bare": parts["ema"],
        "bare, with prefixes": lightning(),
        "bare, wrapped": {f"module.{key}": value for key, value in parts["ema"].items()},
        "ema and model": {"ema": parts["ema"], "model": parts["model"], "opt": {"lr": 1e-4}, "steps": 3},
    }[form]
    if suffix == "safetensors" and form == "ema and model":
        return  # a flat format
    (save_file if suffix == "safetensors" else torch.save)(content, path)
    found = read_released(path, encoder_depth=1, patch_size=1)
    reference = read_released(LIGHTNING, encoder_depth=1, patch_size=1)
    assert found.network == reference.network
    assert same(found.weights(), reference.weights())
    if form in ("bare, with prefixes", "ema and model"):
        assert same(found.weights("model"), reference.weights("model"))


def test_raw_weights_of_a_published_file(tmp_path, monkeypatch):
    state = lightning()
    model = ddt.load_released(LIGHTNING, encoder_depth=1, patch_size=1, weights="model")
    assert torch.equal(model.decoder.blocks[1].mixer.qkv.weight, state["denoiser.blocks.2.attn.qkv.weight"])
    only = {key: value for key, value in state.items() if not key.startswith("ema_denoiser.")}
    torch.save({"state_dict": only}, tmp_path / "raw.ckpt")
    raw = ddt.load_released(tmp_path / "raw.ckpt", encoder_depth=1, patch_size=1, weights="model").state_dict()
    assert same(raw, model.state_dict())
    with pytest.raises(UserError, match=r"weights=ema: raw\.ckpt holds no EMA weights .*give weights=model"):
        ddt.load_released(tmp_path / "raw.ckpt", encoder_depth=1, patch_size=1)
    with pytest.raises(UserError, match="weights=raw: choose from ema, model"):
        ddt.load_released(LIGHTNING, encoder_depth=1, patch_size=1, weights="raw")
    settings = ConvertSettings(
        released=str(tmp_path / "raw.ckpt"), encoder_depth=1, resolution=256, patch_size=1, out=str(tmp_path / "out"),
        autoencoder=Choice("ddt.autoencoder.KLAutoencoder", {"source": "a/b"}), weights="model",
    )  # fmt: skip
    convert(settings)
    assert same(ddt.load_model(tmp_path / "out", weights="model").state_dict(), raw)
    with pytest.raises(UserError, match=r"weights=ema: .* choose from model"):
        ddt.load_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("final_layer.linear.weight", torch.zeros(3)),
        ("final_layer.linear.weight", torch.zeros(0, 64)),
        ("blocks.0.attn.q_norm.weight", torch.tensor(1.0)),
        ("y_embedder.embedding_table.weight", torch.zeros(11)),
        ("blocks.0.attn.q_norm.weight", torch.zeros(640)),
        ("x_embedder.proj.weight", torch.zeros(64, 16, dtype=torch.int64)),
    ],
)
def test_impossible_shapes_are_named(tmp_path, key, value):
    path = changed(tmp_path, lambda state: state.update({key: value}))
    with pytest.raises(UserError, match=rf"changed\.safetensors: {re.escape(key)}|model\.num_heads=0"):
        ddt.load_released(path, encoder_depth=3)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize(("name", "depth"), [("tiny", 3), ("baseline", None)])
def test_weights_go_back_to_the_published_names(tmp_path, name, depth, suffix):
    golden = load_file(GOLDEN / f"{name}.weights.safetensors")
    released = read_released(GOLDEN / f"{name}.weights.safetensors", depth, 2)
    state, out = released.weights(), tmp_path / "new" / f"out{suffix}"
    write_released(out, released.network, state, (4, 8, 8))
    found = read_file(out)["ema"]
    assert found.keys() == golden.keys()
    assert all(torch.equal(found[key], golden[key]) for key in golden)
    if suffix == ".ckpt":
        content = torch.load(out, weights_only=True)
        assert set(content["state_dict"]) == {f"ema_denoiser.{key}" for key in golden}
    again = ddt.load_released(out, depth).state_dict()
    assert all(torch.equal(again[key], state[key]) for key in state)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_what_the_release_has_no_names_for_is_refused():
    network = {"_target_": "ddt.model.DDT", "encoder_depth": 3}
    check_releasable({**network, "decoder_block": "attention"})
    check_releasable({"_target_": "ddt.model.DiT"})
    with pytest.raises(UserError, match=r"model\.decoder_block=conv: the published format knows attention alone"):
        check_releasable({**network, "decoder_block": "conv"})
    assert ddt.DDT.release.published_name("decoder.blocks.1.mixer.qkv.weight", network) == "blocks.4.attn.qkv.weight"
    with pytest.raises(AssertionError, match="two weights have one published name"):
        write_released(
            None, network, {f"{half}.t_embedder.w": torch.zeros(1) for half in ("encoder", "decoder")}, (4, 8, 8)
        )


@pytest.mark.parametrize("resolution", [256, 512])
def test_published_samplers_are_those_of_conf(resolution):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        sampler = compose("train", overrides=[f"sampler=xl_{resolution}"]).sampler
    values = {key: value for key, value in OmegaConf.to_container(sampler).items() if key != "_target_"}
    published = ddt.DDT.release.sampler((4, resolution // 8, resolution // 8))
    assert values["timeshift"] is None  # of the latents: 1, for SD-VAE's
    assert parse(SamplerSettings, values | {"timeshift": 1.0}) == SamplerSettings(**published)


def test_conversion_end_to_end(tmp_path):
    out = tmp_path / "converted"
    arguments = [f"released={LIGHTNING}", "encoder_depth=1", "patch_size=1", "resolution=512", f"out={out}"]
    message = refusal("scripts.convert_checkpoint", *arguments, "resolution=300")
    assert message == "resolution=300: published models exist at 256 and 512 px"
    message = refusal("scripts.convert_checkpoint", *arguments)
    assert message.startswith("autoencoder: has 4 latent channels, the model 8; give autoencoder=sd_ft_ema")
    vae = small_vae(tmp_path / "vae", channels=8)
    arguments += ["autoencoder=kl", f"autoencoder.source={vae}"]
    succeed("scripts.convert_checkpoint", *arguments)
    model = ddt.load_model(out)
    reference = ddt.load_released(LIGHTNING, encoder_depth=1, patch_size=1)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b)
    config = ddt.checkpoint.format.read_config(out)
    assert config["latent_shape"] == [8, 64, 64]
    published = dict(
        solver="euler", num_steps=250, cfg_scale=3.0, cfg_interval=[0.3, 1.0], last_step=0.04, timeshift=1.0
    )
    assert SamplerSettings(**config["sampler"]) == SamplerSettings(**published, recompute=None)
    assert config["autoencoder"]["source"] == vae
    message = refusal("scripts.convert_checkpoint", *arguments)
    assert message == f"out={out}: exists already and is not written over; choose another out="
