"""A frozen encoder's decoder is trained, resumed, and used as an autoencoder (RAE's stage 1)."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import composed, picture_folder, refusal, rows, run_inside, small_rae, succeed, thinned
from decoders import small_dino, train_with_small_dino
from late import written_late
from PIL import Image
from rae import golden
from safetensors.torch import load_file, save_file

from ddt.autoencoder import RAE
from ddt.data.images import ImageFolder
from ddt.data.reading import random_crop
from ddt.data.stream import ReconstructionStream
from ddt.distributed.launch import launch
from ddt.epochs import in_steps
from ddt.objective.lpips import STAGES, vgg_stages
from ddt.training.decoder.run import build_decoder, build_run, check

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = "ddt.training.decoder.settings.DecoderSettings"
L1 = ("reconstruction=l1",)
GAN = (
    "reconstruction.gan_weight=0.75", "reconstruction.dino_weights=dino.safetensors",
    "reconstruction.discriminator_start=1", "reconstruction.gan_start=2", "reconstruction.lpips_weight=1",
    "reconstruction.vgg_weights=vgg16.safetensors", "reconstruction.lpips_weights=lpips.pth",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures, an encoder and random weights of LPIPS."""
    folder = tmp_path_factory.mktemp("decoder")
    picture_folder(folder / "pictures", 8)
    small_rae(folder / "rae")
    (folder / "rae" / "decoder.safetensors").unlink()
    torch.manual_seed(0)
    save_file(
        {f"features.{k}": v for stage in vgg_stages() for k, v in stage.state_dict().items()},
        folder / "vgg16.safetensors",
    )
    torch.save(
        {f"lin{k}.model.1.weight": torch.rand(1, w[-1], 1, 1) for k, w in enumerate(STAGES)}, folder / "lpips.pth"
    )
    (folder / "dino.safetensors").touch()  # `with_small_dino` stands in for it
    return folder


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture
def with_small_dino(monkeypatch):
    monkeypatch.setattr("ddt.training.decoder.run.load_dino", small_dino)


def arguments(name, *more, steps=6):
    return (
        f"name={name}", "data=folder", "data.root=pictures", "data.image_size=16", "data.channels=3",
        "data.holdout_every=5", "autoencoder=rae_dinov2_b", "autoencoder.encoder=test_vit",
        "autoencoder.encoder_weights=rae/encoder.safetensors", "autoencoder.decoder_heads=2",
        "decoder.width=32", "decoder.depth=2", "decoder.mlp_width=64", "decoder.patch_size=4", "optimizer.lr=2e-3",
        f"trainer.max_steps={steps}", "trainer.global_batch_size=4", "trainer.micro_batch_size=2",
        "trainer.warmup_steps=2", "trainer.decay_end=null", "trainer.ema_decay=0.9", "trainer.log_every=1",
        "trainer.save_every=2", "trainer.validate_every=3", "trainer.preview_every=6", "trainer.num_workers=0", *more,
    )  # fmt: skip


def train(name, *more, **changes):
    succeed("scripts.train_autoencoder", *arguments(name, *more, **changes))


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(place, with_small_dino):
    train("straight", *GAN)
    straight, killed = place / "runs" / "straight", place / "runs" / "killed"
    shutil.copytree(straight, killed)
    for step in (4, 6):
        shutil.rmtree(killed / "checkpoints" / f"step_{step:07d}")
    shutil.rmtree(killed / "export")
    with written_late(step=4, until=3):  # of this call's steps: after step 5 of the run
        train("killed", *GAN)
    for folder in ("checkpoints/step_0000004", "checkpoints/step_0000006"):
        for name in ("ema", "model"):
            one, two = (load_file(run / folder / f"{name}.safetensors") for run in (straight, killed))
            assert equal(one, two)
        one, two = (torch.load(run / folder / "train_state.pt", weights_only=True) for run in (straight, killed))
        assert equal(one, two)
    assert any(key.endswith("_u") for key in one["discriminator"]["weights"])  # the spectral norms' vectors
    assert one["discriminator"]["steps"] == 5
    assert equal(rows(straight), rows(killed))
    before = torch.load(straight / "checkpoints/step_0000002/train_state.pt", weights_only=True)["discriminator"]
    moved = {k for k, v in before["weights"].items() if not torch.equal(v, one["discriminator"]["weights"][k])}
    vectors_of_one = {name for name in before["weights"] if ".last." in name and name.endswith("_u")}  # ±1
    assert moved == before["weights"].keys() - vectors_of_one
    said = run_inside("scripts.train_autoencoder", *arguments("killed", *GAN)).stderr
    assert "complete at step 6" in said


@pytest.mark.slow
def test_two_processes_train_what_one_does(place, with_small_dino):
    """Until the discriminator's first update: its spectral norms move once for each micro-batch."""
    train("one", *GAN)
    settings = composed("train_autoencoder", SETTINGS, *arguments("two_processes", *GAN, "trainer.num_processes=2"))
    launch(train_with_small_dino, 2, settings)
    one, two = rows(place / "runs" / "one"), rows(place / "runs" / "two_processes")
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for a, b in zip(one, two, strict=True):
        close = 1e-4 if a["step"] <= 2 else 0.05
        for key in ("loss", "l1", "validation_psnr", "discriminator_loss"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=close), (key, a["step"])


@pytest.mark.slow
def test_each_loss_begins_at_its_step_and_the_discriminator_counts_its_own(place, with_small_dino):
    more = ("reconstruction.gan_start=3", "trainer.lr_schedule=cosine", "trainer.lr_end=0.1", "trainer.save_every=1")
    train("starts", *GAN, *more)
    logged = [row for row in rows(place / "runs" / "starts") if "loss" in row]
    assert ["discriminator_loss" in row for row in logged] == [False, True, True, True, True, True]
    assert ["gan" in row for row in logged] == [False, False, False, True, True, True]
    assert all("lpips" in row for row in logged)
    factors = [0.5, 1, 1, *(0.1 + 0.45 * (1 + np.cos(np.pi * k / 4)) for k in (1, 2, 3))]
    assert [row["lr"] for row in logged] == pytest.approx([2e-3 * factor for factor in factors])
    own = [row["discriminator_lr"] for row in logged[1:]]
    assert own == pytest.approx([2e-3 * factor for factor in factors[:5]])
    # the discriminator's first loss is of the decoder that this step has updated
    run = build_run(composed("train_autoencoder", SETTINGS, *arguments("starts", *GAN, *more)))
    last = place / "runs" / "starts" / "checkpoints"
    run.objective.network.load_state_dict(load_file(last / "step_0000002/model.safetensors"))
    state = torch.load(last / "step_0000001/train_state.pt", weights_only=True)
    run.discrimination.load_state_dict(state["discriminator"]["weights"])
    run.discrimination.train()
    stream, losses = ReconstructionStream(run.images, 0, run.latent_shape), []
    for positions in ([4, 5], [6, 7]):
        batch = stream[positions]
        fakes = run.objective.fakes(run.autoencoder.encode(batch["images"]))
        uniform = torch.cat([batch["augment_uniform"][1], batch["augment_uniform"][2]], dim=1)
        losses.append(run.discrimination(fakes, batch["images"].float() / 255, uniform).item())
    assert logged[1]["discriminator_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_decoder_learns_and_is_the_autoencoders(place):
    rarely = [f"trainer.{key}_every=60" for key in ("save", "validate", "preview")]
    train("learns", *L1, *rarely, "trainer.compile=false", "optimizer.lr=5e-3", "reconstruction.noise=0.1", steps=60)
    logged = rows(place / "runs" / "learns")
    losses = [row["loss"] for row in logged if "loss" in row]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    last = logged[-1]
    assert last["validation_loss"] == last["validation_l1"]
    # what the last row says is what the file gives
    settings = dict(
        encoder="test_vit", encoder_weights="rae/encoder.safetensors", decoder="export/ema.safetensors",
        decoder_heads=2, source="runs/learns",
    )  # fmt: skip
    codec = RAE(**settings)
    held_out = ImageFolder("pictures", 16, "test", holdout_every=5)
    images = torch.from_numpy(held_out.load(np.arange(len(held_out.labels))))
    made = codec.decode(codec.sample(codec.encode(images)))
    error = (made.double() - images.double()).square().mean(dim=(1, 2, 3))
    assert (10 * torch.log10(255**2 / error)).mean().item() == pytest.approx(last["validation_psnr"], abs=1e-3)
    with Image.open("runs/learns/previews/step_0000060.png") as picture:
        assert picture.width > 16
    # statistics, cache
    chosen = [f"autoencoder.{key}={value}" for key, value in settings.items()]
    data = ["data=folder", "data.root=pictures", "data.image_size=16", "data.channels=3", "data.holdout_every=5"]
    common = [*data, "autoencoder=rae_dinov2_b", *chosen, "num_workers=0"]
    succeed("scripts.latent_statistics", *common, "autoencoder.statistics=null", "out=statistics.safetensors")
    normalised = [*common, "autoencoder.statistics=statistics.safetensors"]
    succeed("scripts.cache_latents", *normalised, "out=cache")
    found = RAE(**settings, statistics="statistics.safetensors")
    assert found.latent_shape(3, 16) == (64, 4, 4)
    # a decoder samples nothing
    said = refusal("sample", "ckpt=runs/learns", "out=samples")
    assert "is an autoencoder's decoder, which samples nothing" in said
    assert len(said.splitlines()) == 1


def test_the_learning_rates_are_those_of_the_public_code():
    """A decay from step 20, of the cosine after a warm-up, to step 60."""
    common = ("autoencoder=rae_dinov2_b", "trainer.max_steps=70", "trainer.decay_end=60", "reconstruction=l1")
    for schedule, start in (("cosine", ["trainer.warmup_steps=20"]),
                            ("linear", ["trainer.warmup_steps=0", "trainer.decay_after=20"])):  # fmt: skip
        chosen = (*common, f"trainer.lr_schedule={schedule}", *start)
        trainer = composed("train_autoencoder", SETTINGS, *chosen).trainer
        expected = golden("stage1")[f"lr_{schedule}"].tolist()
        assert [trainer.lr_factor(step) for step in range(len(expected))] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_epochs_of_stage_1_are_steps_of_its_images(place, with_small_dino):
    epochs = ("trainer.max_steps=2epochs", "trainer.warmup_steps=1epoch", "trainer.decay_end=2epochs")
    starts = ("reconstruction.discriminator_start=1epoch", "reconstruction.gan_start=1.5epochs")
    given = [each for each in GAN if "_start" not in each]
    said = run_inside("scripts.train_autoencoder", *arguments("epochs", *given, *epochs, *starts)).stderr
    assert "an epoch of 12 images is 3 steps: trainer.max_steps=6, trainer.warmup_steps=3, trainer.decay_end=6" in said
    assert "training to step 6;" in said
    assert "2 epochs in all" in said
    config = json.loads((place / "runs" / "epochs" / "config.json").read_text())
    assert (config["reconstruction"]["discriminator_start"], config["reconstruction"]["gan_start"]) == (3, 4)
    assert (config["trainer"]["max_steps"], config["trainer"]["warmup_steps"]) == (6, 3)
    never = (*given, *epochs, *starts[:1], "reconstruction.gan_start=2epochs")
    assert refusal("scripts.train_autoencoder", *arguments("never", *never)).startswith("reconstruction.gan_start=6: ")


def test_the_small_choices_fit_one_another():
    chosen = ("autoencoder=rae_efficientnet_lite0", "decoder=vit_nano", "reconstruction=l1", "recipe=rae_decoder_small")
    settings = composed("train_autoencoder", SETTINGS, *chosen)
    assert settings.name == "photos_rae_efficientnet_lite0"
    check(settings)
    assert build_decoder(settings, 112, 8).image_size == settings.data.settings["image_size"]


def test_the_published_recipe_is_the_default():
    settings = composed("train_autoencoder", SETTINGS, "autoencoder=rae_dinov2_b", "data=in256", "data.root=x")
    trainer, epoch = in_steps(settings.trainer, 1_281_167, 512, "trainer"), 2_502
    assert (trainer.max_steps, trainer.global_batch_size, trainer.warmup_steps) == (16 * epoch, 512, epoch)
    assert (trainer.lr_schedule, trainer.lr_end) == ("cosine", 0.1)
    assert (trainer.decay_after, trainer.decay_end) == (None, 16 * epoch)
    assert (trainer.ema_decay, trainer.clip_norm, trainer.mixed_precision) == (0.9978, None, "tf32")
    assert settings.optimizer.settings == {"lr": 2e-4, "betas": (0.9, 0.95), "weight_decay": 0.0}
    given = in_steps(settings.reconstruction, 1_281_167, 512, "reconstruction")
    assert (given.noise, given.lpips_weight, given.gan_weight) == (0.8, 1.0, 0.75)
    assert (given.discriminator_start, given.gan_start) == (6 * epoch, 8 * epoch)
    assert not settings.data.settings["horizontal_flip"]
    counts = {"vit_xl": 415_056_640, "vit_l": 303_887_104, "vit_b": 86_237_952}
    for name, count in counts.items():
        heads = 12 if name == "vit_b" else 16
        chosen = composed("train_autoencoder", SETTINGS, "autoencoder=rae_dinov2_b", f"decoder={name}",
                          f"autoencoder.decoder_heads={heads}")  # fmt: skip
        with torch.device("meta"):
            decoder = build_decoder(chosen, 768, 16)
        assert sum(parameter.numel() for parameter in decoder.parameters()) == count


@pytest.mark.parametrize(
    ("more", "message"),
    thinned([
        (["reconstruction.gan_weight=0", "reconstruction.discriminator_start=0", "reconstruction.gan_start=0"],
         "reconstruction.vgg_weights: not set; give torchvision's vgg16-397923af.pth"),
        ([*GAN, "reconstruction.dino_weights=none.pth"], "reconstruction.dino_weights=none.pth: no such file"),
        ([*GAN, "reconstruction.gan_start=6"], "reconstruction.gan_start=6: is never reached with trainer.max_steps=6"),
        ([*L1, "trainer.mixed_precision=fp16"], "trainer.mixed_precision=fp16: not for an autoencoder's decoder"),
        ([*L1, "trainer.eval_every=5"], "trainer.eval_every=5: not for an autoencoder's decoder"),
        ([*L1, "trainer.compile=true"], "trainer.compile=true: not for an autoencoder's decoder"),
        ([*L1, "autoencoder.decoder_heads=3"], "autoencoder.decoder_heads=3: does not divide the decoder's width 32"),
        ([*L1, "decoder.patch_size=5"], "data.image_size=16: is no multiple of decoder.patch_size=5"),
        ([*L1, "decoder.width=30"], "decoder.width=30: must be a multiple of 4"),
        ([*L1, "data.channels=1"], "data: images of 1 channels and 16 px do not fit this autoencoder"),
        ([*L1, "steps=9"], "steps: has no effect here; choose from name, seed"),
        ([*L1, "autoencoder.encoder_weights=none"], "autoencoder.encoder_weights=none"),
    ], 3),
)  # fmt: skip
def test_mistakes_are_one_line_before_anything_is_written(place, more, message):
    (line,) = refusal("scripts.train_autoencoder", *arguments("wrong", *more)).splitlines()
    assert line.startswith(message), line
    assert not (place / "runs" / "wrong").exists()


@pytest.mark.slow
def test_another_decoder_is_another_training(place):
    train("two", *L1, steps=2)
    message = refusal("scripts.train_autoencoder", *arguments("two", *L1, "decoder.depth=3", steps=2))
    assert "belongs to another training (decoder.depth 2 -> 3)" in message
    message = refusal("train", "name=two", "data=digits")
    assert "belongs to another training" in message


def test_the_stream_is_of_positions_and_crops(place):
    images = ImageFolder("pictures", 16, "train", holdout_every=5, horizontal_flip=True)
    stream = ReconstructionStream(images, 3, (2, 4, 4))
    both = stream[[5, 6]]
    assert {key: tuple(value.shape) for key, value in both.items()} == {
        "images": (2, 3, 16, 16), "noise": (2, 2, 4, 4), "noise_uniform": (2,), "augment_uniform": (3, 5, 2),
    }  # fmt: skip
    alone = ReconstructionStream(images, 3, (2, 4, 4))[[6]]
    assert torch.equal(alone["images"][0], both["images"][1])
    assert torch.equal(alone["noise"][0], both["noise"][1])
    assert torch.equal(alone["augment_uniform"][..., 0], both["augment_uniform"][..., 1])
    count = len(images.labels)
    again = stream[[5 + count * k for k in range(40)]]["images"]
    assert len({bytes(image.numpy()) for image in again}) > 20  # other images, other places


def test_a_random_crop_is_of_one_and_a_half_times_the_size():
    image = Image.fromarray(np.arange(48 * 96, dtype=np.float32).reshape(48, 96).astype(np.uint8)).convert("RGB")
    assert random_crop(image, 32, np.zeros(2)).size == (32, 32)  # the shorter side is 48 already
    for place, (row, column) in (((0, 0), (0, 0)), ((0.999, 0.999), (16, 64)), ((0.5, 0.25), (8, 16))):
        found = np.asarray(random_crop(image, 32, np.array(place)))
        assert np.array_equal(found, np.asarray(image)[row : row + 32, column : column + 32])
    assert random_crop(image.resize((501, 333)), 256, np.array([0.9, 0.9])).size == (256, 256)


def test_the_run_says_what_it_is(place):
    train("says", *L1, steps=2)
    config = json.loads((place / "runs/says/export/config.json").read_text())
    assert config["decoder"] == {"width": 32, "depth": 2, "mlp_width": 64, "patch_size": 4, "channels": 64, "grid": 4}
    assert config["latent_shape"] == [64, 4, 4]
