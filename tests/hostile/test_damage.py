"""Every kind of file, damaged in every way: named in one line, or the same result.

Each case makes a folder, and a use of it whose result is compared with that of the undamaged
folder; of another result a warning must name the file. An exception that is no exit with a message
fails the test with its traceback.
"""

import hashlib
import json
import random
import shutil

import pytest
from conftest import GOLDEN, picture_folder, small_checkpoint, small_vae, succeed
from safetensors.torch import load_file

from ddt.checkpoint import format as ckpt
from ddt.sampling.schedules import write_schedule
from ddt.sampling.settings import SamplerSettings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
SMALL = [
    "model.hidden_size=32", "model.depth=3", "model.encoder_depth=2", "model.patch_size=4", "sampler.num_steps=2",
    "trainer.warmup_steps=1", "trainer.global_batch_size=12", "trainer.preview_every=0", "trainer.validate_every=0",
    "trainer.log_every=1", "trainer.lr_schedule=constant", "trainer.num_workers=0",
]  # fmt: skip
TINY = GOLDEN / "tiny.weights.safetensors"


def outcome(script, *arguments):
    """Run a command in this process; return "" where it succeeds, else what it says on exit."""
    try:
        succeed(script, *arguments)
    except SystemExit as exit_:
        return str(exit_.code or "status 0")
    return ""


def digest(tensors):
    """Return one hash of a state dict."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(name.encode() + value.numpy().tobytes())
    return found.hexdigest()


def raising(error):
    def function(*_):
        raise error

    return function


# --- how files are damaged


def flip(data, rng):
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def zero(data, rng):
    place = rng.randrange(len(data))
    return data[:place] + bytes(len(data[place : place + 64])) + data[place + 64 :]


DAMAGES = {
    "a flipped bit": flip,
    "another flipped bit": flip,
    "zeros": zero,
    "cut short": lambda data, rng: data[: rng.randrange(len(data))],
    "empty": lambda data, rng: b"",
    "longer": lambda data, rng: data + b"\x00more",
    "something else": lambda data, rng: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
}


# --- the cases: make, use, and the folder whose files are damaged; use returns (message, result)


def make_checkpoint(place):
    small_checkpoint(place / "kept")


def sample_from_checkpoint(place):
    said = outcome("sample", f"ckpt={place / 'kept'}", "num_samples=3", f"out={place / 'out'}")
    return said, None if said else (place / "out" / "samples.npz").read_bytes()


def make_latent_checkpoint(place):
    small_checkpoint(place / "kept" / "ckpt", small_vae(place / "kept" / "vae"))


def sample_latents(place):
    said = outcome("sample", f"ckpt={place / 'kept' / 'ckpt'}", "num_samples=2", f"out={place / 'out'}")
    return said, None if said else (place / "out" / "samples.npz").read_bytes()


def train_arguments(place, max_steps):
    options = [*SMALL, "trainer.save_every=2", f"trainer.max_steps={max_steps}", "name=kept"]
    return ["train", "data=digits", *options]


def make_run(place):
    assert outcome(*train_arguments(place, 4)) == ""


def resume_run(place):
    said = outcome(*train_arguments(place, 6))
    if said:
        return said, None
    weights = digest(ckpt.read_weights(ckpt.newest_checkpoint(place / "runs" / "kept"), "model"))
    exported = digest(load_file(place / "runs" / "kept" / "export" / "ema.safetensors"))
    rows = [json.loads(line) for line in (place / "runs" / "kept" / "metrics.jsonl").read_text().splitlines()]
    return said, (weights, exported, [row["step"] for row in rows])


def make_unfinished_set(place):
    small_checkpoint(place / "ckpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddt.generation.sample_set.merge_parts", raising(FloatingPointError))
        assert outcome("sample", *set_arguments(place))


def set_arguments(place):
    return [f"ckpt={place / 'ckpt'}", "num_samples=6", "batch_size=2", f"out={place / 'kept'}"]


def finish_set(place):
    said = outcome("sample", *set_arguments(place))
    return said, None if said else (place / "kept" / "samples.npz").read_bytes()


def make_set(place):
    small_checkpoint(place / "ckpt")
    succeed("sample", *set_arguments(place))


def make_cache(place):
    picture_folder(place / "pictures")
    small_vae(place / "vae")
    arguments = ["data=folder", f"data.root={place / 'pictures'}", "data.image_size=16", "data.holdout_every=5"]
    arguments += ["autoencoder=kl", f"autoencoder.source={place / 'vae'}", "shard_size=8", "num_workers=0"]
    succeed("scripts.cache_latents", *arguments, f"out={place / 'kept'}")


def train_from_cache(place):
    arguments = ["data=latents", f"data.root={place / 'kept'}", "autoencoder=kl", f"autoencoder.source={place / 'vae'}"]
    options = [*SMALL, "model.patch_size=1", "trainer.max_steps=2", "name=run"]
    said = outcome("train", *arguments, *options)
    return said, None if said else digest(ckpt.read_weights(ckpt.newest_checkpoint(place / "runs" / "run"), "model"))


def make_release(place):
    (place / "kept").mkdir()
    shutil.copy(TINY, place / "kept" / "released.safetensors")


def convert_release(place):
    arguments = [f"released={place / 'kept' / 'released.safetensors'}", "encoder_depth=3", "resolution=256"]
    said = outcome("scripts.convert_checkpoint", *arguments, f"out={place / 'out'}")
    return said, None if said else digest(ckpt.read_weights(place / "out", "ema"))


def make_lightning(place):
    (place / "kept").mkdir()
    shutil.copy(GOLDEN / "patch1.lightning.ckpt", place / "kept" / "released.ckpt")
    small_vae(place / "vae", channels=8)


def convert_lightning(place):
    arguments = [f"released={place / 'kept' / 'released.ckpt'}", "encoder_depth=1", "patch_size=1", "resolution=256"]
    arguments += ["autoencoder=kl", f"autoencoder.source={place / 'vae'}"]
    said = outcome("scripts.convert_checkpoint", *arguments, f"out={place / 'out'}")
    return said, None if said else digest(ckpt.read_weights(place / "out", "ema"))


def make_export(place):
    small_checkpoint(place / "ckpt")
    succeed("scripts.export", f"ckpt={place / 'ckpt'}", "format=hub", f"out={place / 'kept'}")


def make_schedule(place):
    small_checkpoint(place / "ckpt")
    (place / "kept").mkdir()
    content = {"recompute_steps": [0, 2], "time_grid": SamplerSettings(num_steps=4, last_step=None).grid()}
    write_schedule(place / "kept" / "schedule.json", {**content, "guidance": {}, "solver": "euler"})


def sample_with_schedule(place):
    arguments = [f"ckpt={place / 'ckpt'}", f"recompute={place / 'kept' / 'schedule.json'}", "num_samples=2"]
    said = outcome("sample", *arguments, f"out={place / 'out'}")
    return said, None if said else (place / "out" / "samples.npz").read_bytes()


def make_pictures(place):
    picture_folder(place / "kept", count=4)


def train_from_pictures(place):
    options = [*SMALL, "data.holdout_every=0", "trainer.max_steps=2", "name=run"]
    said = outcome("train", "data=folder", f"data.root={place / 'kept'}", "data.image_size=8", *options)
    return said, None if said else digest(ckpt.read_weights(ckpt.newest_checkpoint(place / "runs" / "run"), "model"))


CASES = {
    "checkpoint": (make_checkpoint, sample_from_checkpoint, "kept"),
    "checkpoint of latents and its autoencoder": (make_latent_checkpoint, sample_latents, "kept"),
    "run": (make_run, resume_run, "runs/kept"),
    "unfinished set": (make_unfinished_set, finish_set, "kept"),
    "complete set": (make_set, finish_set, "kept"),
    "latent cache": (make_cache, train_from_cache, "kept"),
    "release": (make_release, convert_release, "kept"),
    "lightning release": (make_lightning, convert_lightning, "kept"),
    "export": (make_export, sample_from_checkpoint, "kept"),
    "schedule": (make_schedule, sample_with_schedule, "kept"),
    "images": (make_pictures, train_from_pictures, "kept"),
}
IGNORED = {"grid.png", "training_images.png", "README.md", ".lock", ".gitattributes"}  # for people, not read
UNCHECKED = {"images", "release", "lightning release"}  # files of others, which have no checksum


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function: case → its folder, a copy of it, and its undamaged result, made once."""
    known = {}

    def get(case):
        if case not in known:
            place, whole = tmp_path_factory.mktemp("place"), tmp_path_factory.mktemp("whole") / "copy"
            make, use, _ = CASES[case]
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(place)
                make(place)
                shutil.copytree(place, whole)
                said, result = use(place)
            assert said == ""
            known[case] = place, whole, result
        return known[case]

    return get


def restore(place, whole):
    """Make a folder what it was; in its place, for its files hold absolute paths."""
    for path in place.iterdir():
        shutil.rmtree(path)
    shutil.copytree(whole, place, dirs_exist_ok=True)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("case", CASES)
def test_damage_is_named_or_changes_nothing(made, monkeypatch, caplog, case, damage):
    place, whole, result = made(case)
    monkeypatch.chdir(place)
    _, use, folder = CASES[case]
    files = sorted(p.relative_to(whole) for p in (whole / folder).rglob("*") if p.is_file() and p.name not in IGNORED)
    assert files
    wrong = []
    for name in files:
        restore(place, whole)
        data = (place / name).read_bytes()
        if not data:
            continue
        changed = DAMAGES[damage](data, random.Random(f"{case} {damage} {name}"))
        (place / name).write_bytes(changed)
        caplog.clear()
        said, found = use(place)
        if said and ("\n" in said.strip() or len(said) > 1000 or not (name.name in said or name.parent.name in said)):
            wrong.append(f"{name}: said {said[:500]!r}")
        warnings = "\n".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
        if not said and found != result and case not in UNCHECKED and name.name not in warnings:
            wrong.append(f"{name}: another result")
    print(f"{case}, {damage}: {len(files)} files")
    assert not wrong, "\n".join(wrong)
