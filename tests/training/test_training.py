"""The loop: reproducible, resumable anywhere, the same on any number of processes and
micro-batches.
"""

import contextlib
import dataclasses
import json
import math
import re
import shutil

import pytest
import torch
from conftest import ROOT, rows, run, run_inside, small_ddt, train_settings
from pair import train_on_two
from PIL import Image
from safetensors.torch import load_file

import ddt
from ddt.autoencoder import Identity
from ddt.checkpoint import format as ckpt
from ddt.data.images import Digits
from ddt.distributed.prepare import make_accelerator
from ddt.errors import UserError
from ddt.objective import FlowMatching
from ddt.sampling.settings import SamplerSettings
from ddt.training import loop
from ddt.training.measurements import picture_or_warning, validation_loss, write_preview
from ddt.training.settings import TrainerSettings

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = dict(
    max_steps=10,
    global_batch_size=8,
    micro_batch_size=None,
    mixed_precision="fp32",
    num_processes=None,
    ema_decay=0.9,
    warmup_steps=0,
    lr_schedule="constant",
    save_every=0,
    log_every=1,
    validate_every=0,
    preview_every=0,
    num_workers=0,
)
SMALL = [
    "model.hidden_size=32",
    "model.depth=3",
    "model.encoder_depth=2",
    "sampler.num_steps=2",
    "trainer.lr_schedule=constant",
    "trainer.warmup_steps=5",
    "trainer.global_batch_size=12",
    "trainer.log_every=4",
    "trainer.validate_every=0",
    "trainer.preview_every=0",
    "trainer.save_every=0",
]


def train(folder, name, *overrides):
    small = [argument for argument in SMALL if "model=dit_b" not in overrides or "encoder_depth" not in argument]
    arguments = [*small, f"name={name}", *overrides]
    if "trainer.num_processes=2" in overrides or "trainer.num_processes=3" in overrides:
        return folder / "runs" / name, run(ROOT / "train.py", *arguments, cwd=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder / "runs" / name, run_inside("train", *arguments)


def validated(network, time_distribution="lognorm"):
    """The objective that validation calls, of a network."""
    return FlowMatching(network, time_distribution).for_validation(network)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder, where runs/ is made."""
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def straight(folder):
    """18 steps without a stop."""
    path, done = train(folder, "straight", "trainer.max_steps=18")
    assert done.returncode == 0, done.stderr
    return path


def weights(path, step=18):
    checkpoint = path / "checkpoints" / f"step_{step:07d}"
    return {f"{n}.{k}": v for n in ("model", "ema") for k, v in load_file(checkpoint / f"{n}.safetensors").items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def optimizer_state(path, step=18):
    state = torch.load(path / "checkpoints" / f"step_{step:07d}" / "train_state.pt", weights_only=True)["optimizer"]
    return {f"{i}.{k}": v for i, entry in state["state"].items() for k, v in entry.items()}


def test_same_seed_same_run_other_seed_other_run(folder, straight):
    again, _ = train(folder, "again", "trainer.max_steps=18")
    assert rows(again) == rows(straight)
    assert equal(weights(again), weights(straight))
    other, _ = train(folder, "other", "trainer.max_steps=4", "seed=1")
    assert rows(other)[0]["loss"] != rows(straight)[0]["loss"]


def test_resume_is_bit_for_bit_the_uninterrupted_run(folder, straight):
    """9 + 9 steps, stopped between two log rows, with other workers in the second part."""
    first, _ = train(folder, "resumed", "trainer.max_steps=9")
    assert rows(first)[-1] == {**rows(first)[-1], "step": 9, "partial": True}
    path, done = train(folder, "resumed", "trainer.max_steps=18", "trainer.num_workers=2")
    assert done.returncode == 0, done.stderr
    assert "resuming at step 9 to step 18" in done.stderr
    assert equal(weights(path), weights(straight))
    assert equal(optimizer_state(path), optimizer_state(straight))
    assert rows(path) == rows(straight)  # the row 9..12 spans the stop


def test_resume_between_log_rows_keeps_the_means(folder):
    """Stopping by a save alone, the row that spans the stop is the uninterrupted run's."""
    whole, _ = train(folder, "whole", "trainer.max_steps=12", "trainer.save_every=6", "trainer.log_every=4")
    part = folder / "runs" / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step_0000012")
    config = json.loads((part / "checkpoints" / "step_0000006" / "config.json").read_text())
    assert config["step"] == 6
    path, done = train(folder, "part", "trainer.max_steps=12", "trainer.save_every=6", "trainer.log_every=4")
    assert done.returncode == 0, done.stderr
    assert rows(path) == rows(whole)
    assert equal(weights(path, 12), weights(whole, 12))


def test_a_log_tells_what_is_trained_and_how_it_goes(folder):
    path, done = train(folder, "told", *VALIDATED, "trainer.log_every=4", "trainer.num_processes=1")
    lines = done.stderr.splitlines()
    assert "\r" not in done.stderr
    assert lines[0] == "runs/told: training to step 8; the same command resumes it"
    said = dict(line.split(maxsplit=1) for line in lines[1:6])
    assert list(said) == ["parameters", "device", "data", "latents", "batch"]
    count = sum(value.numel() for key, value in weights(path, 8).items() if key.startswith("model.")) / 1e6
    assert said["parameters"].startswith(f"{count:.1f}M: encoder ")
    assert said["device"].startswith("1 × CPU, ")
    assert said["data"] == "digits: 1,497 images, 300 held out, 10 classes"
    first, second = (row for row in rows(path) if "loss" in row)
    (validated,) = [row["validation_loss"] for row in rows(path) if "validation_loss" in row]
    (line,) = [line for line in lines if line.startswith("step 4 of 8: ")]
    assert line.startswith(f"step 4 of 8: loss {first['loss']:.4f}, ")
    assert line.endswith(" left")
    assert f"step 8: validation loss {validated:.4f}" in lines
    assert [line for line in lines if line.startswith(f"step 8 of 8: loss {second['loss']:.4f}, ")]


def test_all_of_a_training_in_tf32_is_inside_its_products(folder, monkeypatch):
    seen, step = [], loop.training_step

    @contextlib.contextmanager
    def products(device, dtype):
        seen.append(("begins", dtype))
        yield
        seen.append("ends")

    monkeypatch.setattr(loop, "products", products)
    monkeypatch.setattr(loop, "training_step", lambda *given: (seen.append("step"), step(*given))[1])
    _, done = train(folder, "tf32", "trainer.max_steps=2", "trainer.mixed_precision=tf32", "trainer.num_processes=1")
    assert done.returncode == 0, done.stderr
    assert seen == [("begins", "tf32"), "step", "step", "ends"]


def test_a_complete_run_says_so_and_is_left_alone(folder, straight):
    before = {p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.is_file()}
    _, done = train(folder, "straight", "trainer.max_steps=18")
    assert done.returncode == 0
    assert "complete at step 18" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.is_file()} == before


def test_another_training_is_refused_under_the_same_name(folder, straight):
    before = (straight / "config.json").read_text()
    _, done = train(folder, "straight", "trainer.max_steps=40", "optimizer.lr=1.0", "model.encoder_depth=1")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1
    assert re.search(r"model\.encoder_depth 2 -> 1, optimizer\.lr 0\.002 -> 1\.0.*another name=", lines[0])
    assert (straight / "config.json").read_text() == before


VALIDATED = ["trainer.max_steps=8", "trainer.validate_every=8", "trainer.ema_decay=0.5"]


WHOLE = ["trainer.num_processes=2", "trainer.micro_batch_size=3"]
SHARDED = [*WHOLE, "trainer.parallelism=fsdp", "trainer.validate_every=18", "trainer.preview_every=18"]


def train_pair(folder, *jobs):
    """Train on two processes in a folder; return the folder of the runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_on_two(*(train_settings(*SMALL, *job) for job in jobs))
    return folder / "runs"


@pytest.fixture(scope="module")
def pair(folder):
    """Runs on two processes: "two", "straight" on them; "sharded" among them, stopped and resumed;
    "validated2", `VALIDATED`.
    """
    return train_pair(
        folder,
        ["name=two", *WHOLE, "trainer.max_steps=18"],
        ["name=sharded", *SHARDED, "trainer.max_steps=9"],
        ["name=sharded", *SHARDED, "trainer.max_steps=18"],
        ["name=validated2", "trainer.num_processes=2", *VALIDATED],
    )


def test_two_processes_train_what_one_does(pair, straight):
    path = pair / "two"
    assert json.loads((path / "config.json").read_text())["num_processes"] == 2
    for a, b in zip(rows(path), rows(straight), strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    found, expected = weights(path), weights(straight)
    assert found.keys() == expected.keys()  # no wrapper's names
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=5e-4)


def test_sharded_processes_train_what_whole_ones_do(pair):
    """FSDP, stopped and resumed: losses, weights and EMA are DDP's, and one process can sample with
    them.
    """
    path, two = pair / "sharded", pair / "two"
    assert (path / "checkpoints" / "step_0000009").is_dir()
    for a, b in zip((row for row in rows(path) if "loss" in row), rows(two), strict=True):
        assert {key: pytest.approx(value, rel=1e-5) for key, value in b.items()} == a
    newest = ckpt.newest_checkpoint(path)
    assert sum(name.startswith("ema-0000") for name in ckpt.read_manifest(newest).files) == 2
    expected = weights(two)
    for name in ("model", "ema"):
        for key, value in ckpt.read_weights(newest, name).items():
            torch.testing.assert_close(value, expected[f"{name}.{key}"], rtol=0, atol=1e-5)
    assert (path / "previews" / "step_0000018.png").is_file()
    assert rows(path)[-1]["validation_loss"] == pytest.approx(
        validation_loss(validated(ddt.load_model(path)), Digits("test"), Identity(), make_accelerator(), (1, 8, 8), 64),
        rel=1e-5,
    )


@pytest.mark.slow
def test_blocks_gathered_in_bf16_train_what_whole_ones_do(folder):
    """But for the weights of norms, which are rounded too."""
    half = ["trainer.mixed_precision=bf16", "trainer.log_every=1", "trainer.max_steps=6"]
    pair = train_pair(
        folder,
        ["name=bf16_two", *WHOLE, *half],
        ["name=bf16_sharded", *SHARDED, *half, "trainer.reshard_after_forward=false"],
    )
    whole, sharded = (rows(pair / f"bf16_{name}") for name in ("two", "sharded"))
    for a, b in zip(sharded, whole, strict=False):
        assert a["loss"] == pytest.approx(b["loss"], rel=3e-3)
    state = ckpt.read_weights(ckpt.newest_checkpoint(pair / "bf16_sharded"), "model")
    matrices = {key: value for key, value in state.items() if "blocks." in key and value.ndim == 2}
    assert {value.dtype for value in matrices.values()} == {torch.float32}
    for key, value in matrices.items():  # the optimizer's weights are not rounded
        assert not torch.equal(value, value.bfloat16().float()), key


@pytest.mark.slow
def test_shards_are_written_while_processes_train(folder, pair):
    """A late one delays no step, and where one fails there is no checkpoint."""
    train_pair(folder, ["name=late", *SHARDED, "trainer.max_steps=9", "trainer.save_every=3"])
    late = ckpt.list_checkpoints(pair / "late")
    assert list(late) == [6, 9]
    assert [path for path in (pair / "late" / "checkpoints").iterdir() if path.name.startswith(".")] == []
    for folder in late.values():
        for file in ckpt.read_manifest(folder).files:
            ckpt.verify_file(folder, file)
    expected, found = (ckpt.read_manifest(pair / run / "checkpoints/step_0000009").files for run in ("sharded", "late"))
    assert expected.pop("config.json") != found.pop("config.json")  # of names and periods
    assert found == expected
    assert len(found) == 6


@pytest.mark.slow
def test_a_ditdh_is_sharded_with_its_frozen_weights(folder):
    """Stopped and resumed, as above."""
    ditdh = ["model=nano_ditdh", "trainer.log_every=3"]
    pair = train_pair(
        folder,
        ["name=ditdh_two", *ditdh, *WHOLE, "trainer.max_steps=6"],
        ["name=ditdh_sharded", *ditdh, *SHARDED, "trainer.max_steps=3"],
        ["name=ditdh_sharded", *ditdh, *SHARDED, "trainer.max_steps=6"],
    )
    two, sharded = (pair / f"ditdh_{name}" for name in ("two", "sharded"))
    for name in ("model", "ema"):
        expected, found = (ckpt.read_weights(ckpt.newest_checkpoint(run), name) for run in (two, sharded))
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)
    initial = ckpt.read_weights(two / "checkpoints" / "step_0000006", "ema")["encoder.t_embedder.W"]
    assert torch.equal(found["encoder.t_embedder.W"], initial)


def test_accelerates_own_configuration_changes_nothing(folder, straight, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    path, _ = train(folder, "configured", "trainer.max_steps=4")
    assert rows(path)[0] == rows(straight)[0]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    _, done = train(folder, "foreign", "trainer.max_steps=4")
    assert done.stderr.splitlines()[-1].startswith("ACCELERATE_USE_FSDP: is not supported")


def test_one_process_has_nothing_to_shard_among(folder):
    _, done = train(folder, "unsharded", "trainer.parallelism=fsdp")
    assert "trainer.parallelism=fsdp: needs several processes" in done.stderr
    assert not (folder / "runs" / "unsharded").exists()


@pytest.mark.slow
def test_resume_on_three_processes_is_bit_for_bit(folder):
    """Three summands show in which order gradients are added; two would not."""
    parts = {"three": [6], "three_resumed": [3, 6]}
    for name, ends in parts.items():
        for end in ends:
            path, done = train(
                folder, name, f"trainer.max_steps={end}", "trainer.num_processes=3", "trainer.log_every=2"
            )
            assert done.returncode == 0, done.stderr
    three = folder / "runs" / "three"
    assert equal(weights(path, 6), weights(three, 6))
    assert equal(optimizer_state(path, 6), optimizer_state(three, 6))
    assert rows(path) == rows(three)


def test_validation_is_that_of_the_ema_weights_on_any_number_of_processes(folder, pair):
    one, done = train(folder, "validated1", *VALIDATED)
    assert done.returncode == 0, done.stderr
    path = pair / "validated2"
    values = {number: rows(run)[-1]["validation_loss"] for number, run in ((1, one), (2, path))}
    assert values[1] == pytest.approx(values[2], rel=1e-4)
    arguments = (Digits("test"), Identity(), make_accelerator(), (1, 8, 8), 64)
    averaged = ddt.load_model(path)
    assert values[2] == pytest.approx(validation_loss(validated(averaged), *arguments), rel=1e-5)
    averaged.load_state_dict(load_file(path / "checkpoints" / "step_0000008" / "model.safetensors"))
    loss = validation_loss(validated(averaged), *arguments)
    assert values[2] != pytest.approx(loss, rel=1e-4)
    assert validation_loss(validated(averaged, "uniform"), *arguments) != loss


def test_a_diverged_run_ends_before_it_is_saved(folder):
    path, done = train(
        folder, "diverged", "optimizer.lr=1e30", "trainer.max_steps=9", "trainer.save_every=1", "trainer.log_every=9"
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "lower optimizer.lr" in done.stderr
    for checkpoint in (path / "checkpoints").glob("step_*"):
        assert all(value.isfinite().all() for value in load_file(checkpoint / "ema.safetensors").values())


@pytest.mark.slow
def test_a_row_cut_short_by_a_kill_is_no_obstacle(folder):
    options = ["trainer.save_every=4", "trainer.lr_schedule=constant"]
    path, _ = train(folder, "torn", "trainer.max_steps=8", *options)
    (path / "metrics.jsonl").write_text((path / "metrics.jsonl").read_text()[:-9])
    _, done = train(folder, "torn", "trainer.max_steps=12", *options)
    assert done.returncode == 0, done.stderr
    assert "the last line was cut short" in done.stderr
    assert [row["step"] for row in rows(path)] == [4, 12]


def test_bf16_is_not_fp32(folder, straight):
    path, _ = train(folder, "bf16", "trainer.max_steps=4", "trainer.mixed_precision=bf16")
    assert rows(path)[0]["loss"] != rows(straight)[0]["loss"]
    assert rows(path)[0]["loss"] == pytest.approx(rows(straight)[0]["loss"], rel=0.02)


def picture_folder(root, broken=None):
    for label in range(2):
        (root / f"class{label}").mkdir(parents=True)
        for k in range(8):
            Image.new("RGB", (9, 9), (90 * label, 10 * k, 5)).save(root / f"class{label}" / f"{k}.png")
    if broken:
        picture = root / broken
        picture.write_bytes(picture.read_bytes()[:-30])  # its head can be read, its pixels cannot
    return ["data=folder", f"data.root={root}", "data.image_size=8", "data.holdout_every=0"]


def test_a_broken_image_is_named_before_the_first_step(tmp_path):
    data = picture_folder(tmp_path / "pictures", broken="class1/3.png")
    path, done = train(tmp_path, "broken", *data, "trainer.max_steps=3")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].count("class1/3.png: not a readable image") == 1
    assert "data.skip_broken=true" in done.stderr
    assert not path.exists()


@pytest.mark.slow
def test_a_run_stopped_by_a_broken_image_resumes_without_it(tmp_path, monkeypatch):
    """As in a folder so large that only a part is decoded before: the loading process names it."""
    data = picture_folder(tmp_path / "pictures", broken="class0/5.png")
    monkeypatch.setattr("ddt.data.survey.MAX_PIXELS", 1)
    options = [*data, "trainer.max_steps=4", "trainer.global_batch_size=4", "trainer.save_every=1"]
    path, done = train(tmp_path, "resumed", *options, "trainer.num_workers=1")
    assert done.returncode != 0
    assert done.stderr.count("class0/5.png: not a readable image") == 1
    assert {checkpoint.name for checkpoint in (path / "checkpoints").iterdir()} == {"step_0000001", "step_0000002"}
    _, done = train(tmp_path, "resumed", *options, "data.skip_broken=true")
    assert done.returncode == 0, done.stderr
    assert "class0/6.png stands in for it" in done.stderr
    straight, _ = train(tmp_path, "straight", *options, "data.skip_broken=true")
    assert equal(weights(path, 4), weights(straight, 4))


def test_other_images_are_another_training(tmp_path):
    """What changed is told in words, not in hashes."""
    data = picture_folder(tmp_path / "pictures")
    train(tmp_path, "pictures", *data, "trainer.max_steps=1")

    def refused():
        _, done = train(tmp_path, "pictures", *data, "trainer.max_steps=2")
        assert done.returncode != 0
        return done.stderr

    image = tmp_path / "pictures" / "class1" / "7.png"
    Image.new("RGB", (9, 9), (1, 2, 3)).save(image)
    assert "another training (data.fingerprint: contents of images changed)" in refused()
    image.unlink()
    assert "another training (data.fingerprint: the list of images changed)" in refused()


def test_accumulated_micro_batches_train_what_the_big_batch_does(folder, straight):
    path, done = train(folder, "micro", "trainer.max_steps=18", "trainer.micro_batch_size=3")
    assert done.returncode == 0, done.stderr
    for a, b in zip(rows(path), rows(straight), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_resume_what_one_began(folder, straight):
    train(folder, "one_then_two", "trainer.max_steps=9")
    path, done = train(
        folder,
        "one_then_two",
        "trainer.max_steps=18",
        "trainer.num_processes=2",
        "trainer.micro_batch_size=2",
    )
    assert done.returncode == 0, done.stderr
    assert "changed since the checkpoint: trainer.num_processes None -> 2" in done.stderr
    for a, b in zip(rows(path)[-2:], rows(straight)[-2:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_bf16_baseline_previews_validation_and_wandb_offline(folder):
    """One run through everything else the loop can do."""
    path, done = train(
        folder,
        "everything",
        "model=dit_b",
        "model.num_heads=2",
        "trainer.max_steps=4",
        "trainer.mixed_precision=bf16",
        "trainer.validate_every=2",
        "trainer.preview_every=3",
        "trainer.log_every=2",
        "tracker=wandb",
        "tracker.mode=offline",
    )
    assert done.returncode == 0, done.stderr
    logged = rows(path)
    assert [row["step"] for row in logged if "loss" in row] == [2, 4]
    validated = [row for row in logged if "validation_loss" in row]
    assert [row["step"] for row in validated] == [2, 4]
    assert all(0 < row["validation_loss"] < 10 for row in validated)
    assert sorted(p.name for p in (path / "previews").iterdir()) == [
        "step_0000003.png", "step_0000004.png", "training_images.png",
    ]  # fmt: skip
    assert list((path / "wandb").glob("offline-run-*"))
    first = next(iter(weights(path, 4).values()))
    assert first.dtype == torch.float32


def test_validation_loss_depends_on_network_and_images_alone():
    objective = validated(small_ddt(in_channels=1, num_classes=10))
    arguments = (Digits("test"), Identity(), make_accelerator(), (1, 8, 8))
    first = validation_loss(objective, *arguments, batch_size=64)
    torch.manual_seed(5)
    assert validation_loss(objective, *arguments, batch_size=64) == first
    assert validation_loss(objective, *arguments, batch_size=7) == pytest.approx(first, rel=1e-5)


def test_learning_rate_schedules():
    constant = TrainerSettings(**SETTINGS | {"warmup_steps": 4})
    assert [constant.lr_factor(s) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    linear = TrainerSettings(**SETTINGS | {"warmup_steps": 2, "lr_schedule": "linear"})
    assert [linear.lr_factor(s) for s in (0, 1, 2, 6, 9)] == [0.5, 1, 1, 0.5, 0.125]
    cosine = TrainerSettings(**SETTINGS | {"warmup_steps": 2, "lr_schedule": "cosine"})
    assert [cosine.lr_factor(s) for s in (0, 2, 6)] == pytest.approx([0.5, 1, 0.5])
    assert cosine.lr_factor(4) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    assert TrainerSettings(**SETTINGS).lr_factor(0) == 1
    late = {"max_steps": 10, "lr_schedule": "linear", "decay_after": 4, "lr_end": 0.1}
    late = TrainerSettings(**SETTINGS | {"warmup_steps": 0} | late)
    assert [late.lr_factor(s) for s in (0, 4, 7, 10)] == pytest.approx([1, 1, 0.55, 0.1])
    for max_steps in (3, 7, 20):  # where it ends is its own number
        ending = dataclasses.replace(late, max_steps=max_steps, decay_end=10)
        assert [ending.lr_factor(s) for s in (0, 4, 7, 10, 19)] == pytest.approx([1, 1, 0.55, 0.1, 0.1])
    for change, key in (
        ({"lr_end": 0.1}, "lr_end"), ({"decay_after": 4}, "decay_after"),
        ({"lr_schedule": "linear", "decay_after": 10}, "decay_after"), ({"decay_end": 4}, "decay_end"),
        ({"lr_schedule": "linear", "decay_after": 4, "decay_end": 4}, "decay_after"),
        ({"lr_schedule": "linear", "warmup_steps": 4, "decay_end": 4}, "decay_end"),
        ({"lr_schedule": "cosine", "lr_end": 2.0}, "lr_end"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"trainer.{key}="):
            TrainerSettings(**SETTINGS | {"max_steps": 10} | change)
    short = TrainerSettings(**SETTINGS | {"max_steps": 2, "warmup_steps": 4, "lr_schedule": "linear"})
    assert [short.lr_factor(s) for s in range(2)] == [0.25, 0.5]  # a trial run ends within the warm-up


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 3}, r"trainer\.micro_batch_size=3 does not divide the 8 images"),
        ({"num_processes": 3}, r"trainer\.global_batch_size=8 cannot be divided among 3 processes"),
        ({"max_steps": 0}, r"trainer\.max_steps=0: must be at least 1"),
        ({"ema_decay": 1.0}, r"trainer\.ema_decay=1\.0"),
        ({"save_every": -1}, r"trainer\.save_every=-1"),
        ({"keep_last": 1}, r"trainer\.keep_last=1: must be at least 2"),
        ({"keep_every": 20}, r"trainer\.keep_every=20: has no effect without trainer\.keep_last="),
        ({"keep_best": "fid_5k"}, r"trainer\.keep_best=fid_5k: has no effect without trainer\.keep_last="),
        ({"keep_last": 2, "keep_best": "loss"}, r"trainer\.keep_best=loss: give validation_loss, or a metric of"),
        ({"keep_last": 2, "save_every": 4, "keep_every": 6}, r"trainer\.keep_every=6: must be a multiple"),
        (
            {"keep_last": 2, "keep_best": "fid_5k"},
            r"trainer\.keep_best=fid_5k: is never measured; set trainer\.eval_every",
        ),
        ({"keep_last": 2, "save_every": 4, "keep_best": "validation_loss", "validate_every": 6}, "no multiple of"),
        ({"clip_norm": 0.0}, r"trainer\.clip_norm=0\.0: must be above 0"),
        ({"max_hours": -1.0}, r"trainer\.max_hours=-1\.0: must be above 0"),
        ({"max_hours": 0.01}, r"trainer\.max_hours=0\.01: give more than 0\.033"),
        ({"ema_decays": (1.0,)}, r"trainer\.ema_decays=\[1\.0\]: each must lie in 0\.\.1"),
        ({"ema_decays": (0.9, 0.9)}, r"trainer\.ema_decays=\[0\.9, 0\.9\]: names a value twice"),
        ({"ema_powers": (0.3,)}, r"trainer\.ema_powers=\[0\.3\]: each is a relative standard deviation"),
        ({"snapshot_every": 5}, r"trainer\.snapshot_every=5: has no effect without trainer\.ema_powers="),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        TrainerSettings(**SETTINGS | changes)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_preview_of_non_finite_samples_is_a_warning_and_no_picture(tmp_path, caplog, bad):
    network = small_ddt(in_channels=1)
    path, device = tmp_path / "previews" / "step_0000001.png", torch.device("cpu")
    names = [str(k) for k in range(network.num_classes)]
    arguments = (path, network, Identity(), device, (1, 8, 8), SamplerSettings(num_steps=2, last_step=None), names)
    write_preview(*arguments)
    path.unlink()
    torch.nn.init.constant_(next(network.parameters()), bad)
    with picture_or_warning(path):
        write_preview(*arguments)
    assert not path.exists()
    assert f"warning: {path}: is not written (image 0 or one of the 19 after it is NaN or infinite" in caplog.text
