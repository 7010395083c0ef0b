"""Published files of DiT^DH: recognised by their keys, their tables checked, read and written."""

import json
from pathlib import Path

import pytest
import torch
from conftest import refusal, run_inside, small_rae, small_vae, succeed
from rae import RAE, golden, network, weights
from safetensors.torch import load_file, save_file

import ddt
import ddt.checkpoint.format as ckpt
from ddt.checkpoint.config import other_latents
from ddt.checkpoint.convert import check_autoencoder
from ddt.checkpoint.published import PUBLISHED, check_releasable, find_released, read_released, write_released
from ddt.config import Choice, group_choice
from ddt.errors import UserError
from ddt.export import ExportSettings, export
from ddt.export.export import open_source
from ddt.model import build_network
from ddt.model.layers import integer_rope_table
from ddt.model.published_ditdh import ReleasedDiTDH

pytestmark = pytest.mark.usefixtures("one_thread")


def changed(tmp_path, change, name="network"):
    state = weights(name)
    change(state)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "changed.safetensors")
    return tmp_path / "changed.safetensors"


def test_sizes_are_read_from_the_shapes(tmp_path):
    model = network(tmp_path)
    assert (model.in_channels, model.num_classes, model.patch_size) == (24, 7, 1)
    assert (len(model.encoder.blocks), len(model.decoder.blocks)) == (3, 2)
    assert (model.hidden_size, model.decoder.hidden_size) == (32, 64)
    assert [stack.blocks[0].mixer.num_heads for stack in model.stacks] == [4, 4]
    assert torch.equal(model.encoder.t_embedder.W, weights()["t_embedder.W"])
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert [name for name, value in trained.items() if not value] == ["encoder.t_embedder.W"]


@pytest.mark.parametrize("form", ["bare", "ema", "ema, wrapped"])
def test_the_ema_of_a_training_checkpoint_is_taken(tmp_path, form):
    state, path = weights(), tmp_path / "stage2_model.pt"
    prefix = "module." if "wrapped" in form else ""
    ema = {f"{prefix}{key}": value for key, value in state.items()}
    raw = {key: value + 1 if key == "s_projector.bias" else value for key, value in state.items()}
    torch.save(ema if form == "bare" else {"ema": ema, "model": raw, "opt": {"lr": 2e-4}, "step": 9}, path)
    assert torch.equal(ddt.load_released(path).decoder.projector.bias, state["s_projector.bias"])
    if form != "bare":
        assert torch.equal(ddt.load_released(path, weights="model").decoder.projector.bias, raw["s_projector.bias"])


def turned(state):
    """Rotation tables of columns first."""
    for half, head_dim in (("enc", 8), ("dec", 16)):
        for kind, table in zip(("cos", "sin"), integer_rope_table(head_dim, 4, 4), strict=True):
            halves = table.chunk(2, dim=1)
            state[f"{half}_feat_rope.freqs_{kind}"] = torch.cat(halves[::-1], 1).repeat_interleave(2, 1)


def row_first(state):
    halves = state["pos_embed"].chunk(2, dim=-1)
    state["pos_embed"] = torch.cat(halves[::-1], -1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (turned, r"enc_feat_rope\.freqs_cos is another table of positions"),
        (row_first, r"pos_embed is another table of positions"),
        (lambda s: s["dec_feat_rope.freqs_sin"].mul_(1.001), r"dec_feat_rope\.freqs_sin is another table"),
        (lambda s: s["pos_embed"].fill_(torch.nan), r"pos_embed is another table"),
        (lambda s: s.pop("dec_feat_rope.freqs_cos"), r"key dec_feat_rope\.freqs_cos is missing"),
        (lambda s: s.pop("pos_embed"), r"key pos_embed is missing"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 9, 32)), r"pos_embed has shape \(1, 9, 32\), expected \(1, 16"),
        (lambda s: s.pop("t_embedder.W"), r"the weights for encoder\.t_embedder\.W are missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "unknown key extra"),
        (lambda s: s.pop("s_projector.bias"), r"decoder\.projector\.bias are missing"),
        (lambda s: s.update({"blocks.0.norm1.weight": torch.ones(64)}), "blocks of width 64, 32 are not an encoder's"),
        (lambda s: s.update({"s_embedder.proj.weight": torch.ones(32, 24, 2, 2)}), "patches of 1×1"),
        (lambda s: s.update({"s_embedder.proj.weight": torch.ones(32, 24)}), "expected 4 dimensions"),
        (
            lambda s: s.update({"enc_feat_rope.freqs_cos": torch.ones(15, 8)}),
            "15 tokens are no square",
        ),
    ],
)  # fmt: skip
def test_every_key_is_used_checked_or_refused_by_name(tmp_path, change, message):
    with pytest.raises(UserError, match=rf"changed\.safetensors: .*{message}|{message}"):
        ddt.load_released(changed(tmp_path, change))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("network", {"encoder_depth": 2}, "encoder_depth=2: .* has 3 blocks of the encoder's width; leave it out"),
        ("network", {"patch_size": 2}, "patch_size=2: .* leave it out"),
        ("network_equal_width", {}, "both halves are 32 wide: give encoder_depth"),
        ("network_equal_width", {"encoder_depth": 3}, r"encoder_depth=3: .* choose 1\.\.2"),
    ],
)
def test_sizes_that_the_file_says_otherwise_or_not(tmp_path, name, arguments, message):
    path = changed(tmp_path, lambda state: None, name)
    with pytest.raises(UserError, match=message):
        ddt.load_released(path, **arguments)
    right = {"encoder_depth": 2, "patch_size": 1} if "equal" in name else {"encoder_depth": 3, "patch_size": 1}
    assert isinstance(ddt.load_released(path, **right), ddt.DiTDH)


@pytest.mark.parametrize(("name", "depth"), [("network", None), ("network_equal_width", 2)])
def test_weights_go_back_to_the_published_names_bit_for_bit(tmp_path, name, depth):
    path = changed(tmp_path, lambda state: None, name)
    released = read_released(path, depth, None)
    side = released.latent_size
    out = tmp_path / "out.safetensors"
    write_released(out, released.network, released.weights(), (released.network["in_channels"], side, side))
    found, expected = load_file(out), weights(name)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value) or ("_rope" in key and torch.allclose(found[key], value)), key


def test_networks_without_published_names_are_refused():
    network = {"_target_": "ddt.model.DiTDH", "patch_size": 2}
    with pytest.raises(UserError, match=r"model\.patch_size=2: the published format knows 1 alone"):
        check_releasable(network)
    network = {"_target_": "ddt.model.DDT", "hidden_size": 32, "num_heads": 4}
    check_releasable({**network, "decoder_hidden_size": 32, "decoder_num_heads": None})
    with pytest.raises(UserError, match=r"model\.decoder_hidden_size=64: the published format"):
        check_releasable({**network, "decoder_hidden_size": 64})


def test_conversion_writes_the_published_sampler(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = changed(tmp_path, lambda state: None)
    line = refusal("scripts.convert_checkpoint", f"released={path}", "out=converted", "autoencoder=sd_ft_ema")
    assert line == (
        "autoencoder: has 4 latent channels, the model 24; give autoencoder=rae_dinov2_b, or another of 24×4×4 for "
        "changed.safetensors"
    )


@pytest.fixture
def latents(monkeypatch):
    """An autoencoder of the golden network's latents, 24×4×4 at 64 px."""
    monkeypatch.setattr(
        "ddt.autoencoder.Identity.latent_shape", lambda self, channels, size: (24, size // 16, size // 16)
    )
    monkeypatch.setattr("ddt.autoencoder.Identity.image_size", lambda self, shape: 16 * shape[-1])
    monkeypatch.setattr("ddt.model.published_ditdh.dimension_timeshift", lambda shape: 2.0)
    return Choice("ddt.autoencoder.Identity", {})


def convert(tmp_path, *arguments, name="converted", golden_name="network", prefix="model."):
    path = tmp_path / f"{name}.safetensors"
    save_file(weights(golden_name, prefix), path)
    done = run_inside(
        "scripts.convert_checkpoint", f"released={path}", f"out={tmp_path / name}", "autoencoder=identity", *arguments
    )
    assert done.returncode == 0, done.stderr
    return tmp_path / name


def test_a_converted_model_samples_with_its_guide_as_published(tmp_path, latents):
    """Neither encoder depth nor resolution nor a sampler's setting is given."""
    model = convert(tmp_path)
    config = ckpt.read_config(model)
    assert config["latent_shape"] == [24, 4, 4]
    sampler = {"num_steps": 49, "cfg_scale": 1.0, "cfg_interval": None, "last_step": None, "t_end": 0.999}
    assert config["sampler"].items() >= (sampler | {"timeshift": 2.0, "solver": "euler"}).items()
    guide = convert(tmp_path, name="guide", golden_name="sampling", prefix="guide.")
    io = golden("sampling")
    settings = {key: config["sampler"][key] for key in ("timeshift", "t_end", "last_step", "cfg_interval")}
    latents = ddt.sample(
        ddt.load_model(model), io["noise"], io["labels"], cfg_scale=1.42, num_steps=7, guide=ddt.load_model(guide),
        **settings,
    )  # fmt: skip
    torch.testing.assert_close(latents, io["autoguidance"], rtol=1e-4, atol=1e-5)
    exported = tmp_path / "exported.safetensors"
    export(ExportSettings(str(model), "released", str(exported)))
    found, expected = load_file(exported), weights()
    assert all(torch.equal(found[key], expected[key]) for key in expected if "_rope" not in key)
    assert found.keys() == expected.keys()


def test_the_published_autoencoder_is_chosen(tmp_path, latents, monkeypatch):
    asked = []
    monkeypatch.setattr(ReleasedDiTDH, "usual_autoencoder", lambda self, size: asked.append(size) or "identity")
    path = changed(tmp_path, lambda state: None)
    done = run_inside("scripts.convert_checkpoint", f"released={path}", f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert ckpt.read_config(tmp_path / "out")["autoencoder"] == {"_target_": "ddt.autoencoder.Identity"}
    assert set(asked) == {4}


@pytest.mark.parametrize("size", [256, 512])
def test_published_autoencoders_have_the_latents_of_the_files(size):
    choice = group_choice("autoencoder", ReleasedDiTDH().usual_autoencoder(size // 16))
    settings = choice.settings
    assert (choice.target, "i512" in settings["decoder"]) == ("ddt.autoencoder.RAE", size == 512)
    assert ("_512" in settings["statistics"]) == (size == 512)


def test_a_resolution_that_the_file_says_otherwise(tmp_path, latents):
    path = changed(tmp_path, lambda state: None)
    with pytest.raises(UserError, match=r"resolution=256: changed\.safetensors makes images of 64 px .*; leave it out"):
        check_autoencoder(read_released(path, None, None), latents, (24, 4, 4), 256)


def test_a_ddt_needs_its_resolution(tmp_path):
    line = refusal(
        "scripts.convert_checkpoint", f"released={RAE.parent / 'tiny.weights.safetensors'}", "encoder_depth=3",
        f"out={tmp_path / 'out'}",
    )  # fmt: skip
    assert line == "resolution: tiny.weights.safetensors does not hold it; give 256 or 512"


def test_names_of_published_files(tmp_path, monkeypatch):
    """A name, or owner/name:FILE, is one file of a hub model that holds several."""
    asked = []

    def fetch(source, label, choose, advice):
        asked.append((source, label))
        choose(["DiTs/a.pt", *(entry.source.partition(":")[2] for entry in PUBLISHED.values())])
        return tmp_path

    monkeypatch.setattr("ddt.checkpoint.published.fetch", fetch)
    monkeypatch.chdir(tmp_path)
    files = {name: entry.source.partition(":")[2] for name, entry in PUBLISHED.items() if ":" in entry.source}
    for name, file in files.items():
        assert find_released(name) == tmp_path / file
    assert set(asked) == {("nyu-visionx/RAE-collections", f"released={name}") for name in files}
    assert find_released("a/b@main:DiTs/a.pt", "init_from") == tmp_path / "DiTs/a.pt"
    assert asked[-1] == ("a/b@main", "init_from=a/b@main:DiTs/a.pt")
    with pytest.raises(UserError, match=r"released=a/b:c\.pt: the hub's a/b has no file c\.pt"):
        find_released("a/b:c.pt")
    (tmp_path / "ditdh-xl-256").touch()
    assert find_released("ditdh-xl-256").is_file()  # a path that exists is a path


def test_a_published_file_begins_a_training(tmp_path):
    from ddt.training.init_from import check_network, read_source

    path = changed(tmp_path, lambda state: None)
    settings = read_released(path, None, None).network
    source = read_source(str(path), settings)
    check_network(source, {**settings, "activation_checkpointing": True})
    assert source.ema.keys() == ddt.load_released(path).state_dict().keys()
    with pytest.raises(UserError, match="encoder_depth=4"):
        read_source(str(path), {**settings, "encoder_depth": 4})
    ddt_network = {**settings, "_target_": "ddt.model.DDT", "patch_size": 2}
    with pytest.raises(UserError, match=r"init_from=changed\.safetensors: is a DiTDH, not a DDT; "):
        read_source(str(path), ddt_network)
    with pytest.raises(UserError, match=r"tiny\.weights\.safetensors: is a DDT, not a DiTDH; "):
        read_source(str(RAE.parent / "tiny.weights.safetensors"), settings)


def test_parts_of_an_autoencoder_are_named(tmp_path, rae):
    files = {"decoder": "the decoder of an RAE", "statistics": "statistics of latents"}
    for key, what in files.items():
        with pytest.raises(UserError, match=rf": is {what} \(autoencoder\.{key}\); give the file of a DDT"):
            ddt.load_released(rae[key])
    vae = Path(small_vae(tmp_path / "vae")) / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match=r": is an AutoencoderKL \(autoencoder\.source"):
        ddt.load_released(vae)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="holds no DDT"):
        ddt.load_released(tmp_path / "x.safetensors")


# --- the autoencoder of a converted checkpoint


def released(path):
    """A published file of a small DiT^DH on latents of the fixture `rae`."""
    sizes = {"in_channels": 64, "patch_size": 1, "hidden_size": 32, "num_heads": 2, "depth": 3, "encoder_depth": 2}
    settings = {"_target_": "ddt.model.DiTDH", **sizes, "decoder_hidden_size": 64, "decoder_num_heads": 2}
    network = {**settings, "num_classes": 5}
    torch.manual_seed(0)
    write_released(path, network, build_network(network).state_dict(), (64, 8, 8))
    return path


@pytest.fixture(scope="module")
def rae(tmp_path_factory):
    """Settings of an RAE of 64×8×8 at 16 px, with statistics, as a command line has them."""
    folder = tmp_path_factory.mktemp("rae")
    settings = small_rae(folder, 8, 2, statistics=str(folder / "stat.pt"), source="null", revision="null")
    torch.save({"mean": torch.zeros(64, 8, 8), "var": torch.ones(64, 8, 8)}, folder / "stat.pt")
    return {key: value for key, value in settings.items() if key != "_target_"}


def conversion(path, out, rae, **changes):
    words = [f"autoencoder.{key}={value}" for key, value in {**rae, **changes}.items()]
    return "scripts.convert_checkpoint", f"released={path}", f"out={out}", "autoencoder=rae_dinov2_b", *words


@pytest.mark.slow
def test_a_guide_of_another_autoencoder_is_refused(tmp_path, rae):
    """Converted checkpoints have no fingerprint, so their settings are compared."""
    path, other = released(tmp_path / "file.safetensors"), tmp_path / "other.pt"
    torch.save({"mean": torch.ones(64, 8, 8)}, other)
    for name, changes in {
        "model": {},
        "same": {"chunk_size": 3},
        "plain": {"statistics": "null"},
        "other": {"statistics": other},
    }.items():
        succeed(*conversion(path, tmp_path / name, rae, **changes))
    sample = ["sample", f"ckpt={tmp_path / 'model'}", "num_samples=2", "num_steps=2", "cfg_scale=1.4"]
    for name in ("plain", "other"):
        line = refusal(*sample, f"guide={tmp_path / name}", f"out={tmp_path / 'out'}")
        assert line.startswith("guide: has another autoencoder.statistics than the model")
        assert not (tmp_path / "out").exists()
    succeed(*sample, f"guide={tmp_path / 'same'}", f"out={tmp_path / 'out'}")
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert receipt["request"]["guide"]["ema_sha256"] == ckpt.weights_sha256(tmp_path / "same", "ema")
    assert len(receipt["request"]["checkpoint"]["autoencoder_sha256"]) == 64  # of the weights that were loaded


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"encoder_weights": "google/siglip2-base-patch16-256"}, "autoencoder.encoder_weights"),
        ({"encoder": "vit_base_patch16_siglip_256.v2_webli"}, "autoencoder.encoder"),
        ({"source": "a/b"}, "autoencoder.source"),
        ({"revision": "main"}, "autoencoder.revision"),
        ({"statistics": None}, "autoencoder.statistics"),
        ({"_target_": "ddt.autoencoder.KLAutoencoder", "source": "a/b"}, "autoencoder._target_"),
        ({"decoder": "decoders/dinov2/wReg_base/ViTXL_n05/model.pt", "decode_dtype": "bf16"}, None),
        ({"class_token": False}, None),
    ],
)
def test_what_latents_depend_on_tells_autoencoders_apart(changes, key):
    """Where a fingerprint is unknown; two known ones say it alone."""
    published = {
        "_target_": "ddt.autoencoder.RAE",
        **group_choice("autoencoder", "rae_mae_b").settings,
    }
    del published["class_token"]
    base = {"latent_shape": [768, 16, 16], "class_names": ["a"]}
    ours, theirs = ({**base, "autoencoder": each} for each in (published, {**published, **changes}))
    assert other_latents(ours, theirs) == key
    assert other_latents({**ours, "autoencoder_fingerprint": "a"}, theirs) == key
    known = [{**each, "autoencoder_fingerprint": "a"} for each in (ours, theirs)]
    assert other_latents(*known) is None
    assert other_latents(known[0], {**ours, "autoencoder_fingerprint": "b"}) == "autoencoder_fingerprint"


@pytest.mark.slow
def test_conversion_checks_the_autoencoders_local_files(tmp_path, rae):
    torch.save({"mean": torch.zeros(64, 4, 4)}, tmp_path / "small.pt")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    small = {"decoder": small_rae(tmp_path / "small")["decoder"], "statistics": "null"}
    hub = {"decoder": "decoders/dinov2/wReg_base/ViTXL_n08/model.pt", "source": "nyu-visionx/RAE-collections"}
    path = released(tmp_path / "file.safetensors")
    misfits = [
        ("autoencoder.encoder_weights=/nope: no such file", {"encoder_weights": "/nope"}),
        ("autoencoder.statistics=/nope.pt: no such file", {"statistics": "/nope.pt"}),
        ("autoencoder.statistics=/nope.pt: no such file", {"statistics": "/nope.pt", **hub}),
        ("autoencoder.decoder=/nope.pt: no such file", {"decoder": "/nope.pt"}),
        ("autoencoder.statistics: is of latents 64×4×4, not of this", {"statistics": tmp_path / "small.pt"}),
        (f"autoencoder.encoder_weights={tmp_path}", {"encoder_weights": tmp_path / "other.safetensors"}),
        ("autoencoder: has latents of 64×4×4, the model of 64×8×8; give autoencoder=rae_dinov2_b", small),
        ("autoencoder.decoder: is for tokens of 64 features", {"encoder": "test_vit3", "encoder_weights": "null"}),
    ]
    for message, changes in misfits:
        line = refusal(*conversion(path, tmp_path / "out", rae, **changes))
        assert line.startswith(message)
        assert not (tmp_path / "out").exists()
    ddt_file = RAE.parent / "tiny.weights.safetensors"
    convert_ddt = ("scripts.convert_checkpoint", f"released={ddt_file}", f"out={tmp_path / 'out'}", "encoder_depth=3")
    line = refusal(*convert_ddt, "resolution=256", "autoencoder=kl", "autoencoder.source=/nope")
    assert line.startswith("autoencoder.source=/nope: no such file or folder")
    line = refusal(*convert_ddt, "resolution=256", "autoencoder=rae_dinov2_b")
    assert line.startswith("autoencoder: has latents of 768×16×16, the model of 4×32×32; give autoencoder=sd_ft_ema")


def test_the_size_of_images_is_the_autoencoders(tmp_path, rae):
    """A decoder may make 2 pixels a cell, not 16 as the published ones."""
    path = released(tmp_path / "file.safetensors")
    succeed(*conversion(path, tmp_path / "out", rae))
    config = ckpt.read_config(tmp_path / "out")
    assert config["latent_shape"] == [64, 8, 8]
    assert open_source(tmp_path / "out", "hub").image_size() == 16
    line = refusal(*conversion(path, tmp_path / "again", rae), "resolution=256")
    assert line.startswith("resolution=256: file.safetensors makes images of 16 px with this autoencoder; leave it out")
    ckpt.write_checkpoint(
        tmp_path / "misfit", config | {"autoencoder": small_rae(tmp_path / "small")},
        ema=ckpt.read_weights(tmp_path / "out", "ema"),
    )  # fmt: skip
    line = refusal("sample", f"ckpt={tmp_path / 'misfit'}", "num_samples=1", f"out={tmp_path / 'set'}")
    assert line == "autoencoder: has latents of 64×4×4, the model of 64×8×8; choose the model's own"
