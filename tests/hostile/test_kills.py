"""Commands killed at random moments, over and over, end as the one that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, picture_folder, small_checkpoint, small_vae
from hostile.test_damage import SMALL, digest

from ddt.checkpoint import format as ckpt
from ddt.data.latent_cache import VERIFIED

pytestmark = pytest.mark.slow
KILLS = 4
LIMIT = 300  # seconds a call


def start(command, place):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, str(ROOT / command[0]), *command[1:]]
    return subprocess.Popen(
        arguments, cwd=place, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def straight(command, place):
    """Run to the end; return the seconds that it took."""
    began = time.monotonic()
    process = start(command, place)
    _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, said
    return time.monotonic() - began


def with_kills(command, place, seconds, rng):
    """Kill the whole process group at random moments, then run to the end."""
    for _ in range(KILLS):
        process = start(command, place)
        try:
            process.communicate(timeout=rng.uniform(0.2, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        else:
            assert process.returncode == 0
    straight(command, place)


def contents(folder):
    """The files that a command leaves, by their path; without the marker of which shards a resumed
    cache has verified, which holds times.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != VERIFIED]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def weights(run):
    """All weights of a run's newest checkpoint, as one hash each."""
    newest = ckpt.newest_checkpoint(run)
    return newest.name, {name: digest(ckpt.read_weights(newest, name)) for name in ckpt.weights_names(newest)}


TRAIN = ["train.py", "data=digits", *SMALL, "trainer.save_every=3", "trainer.max_steps=60", "trainer.keep_last=2"]


def of_train(place):
    return [*TRAIN, "name=run"], lambda: weights(place / "runs" / "run")


def of_sweep(place):
    sweep = [*TRAIN, "trainer.max_steps=20", "-m", "seed=0,1", "name=sweep"]

    def result():
        runs = [path for path in sorted((place / "runs" / "sweep").iterdir()) if path.is_dir()]
        assert len(runs) == 2
        return [weights(run) for run in runs]

    return sweep, result


def of_sample(place):
    small_checkpoint(place / "ckpt")
    command = ["sample.py", "ckpt=ckpt", "num_samples=400", "batch_size=4", "num_steps=40", "png=20", "out=out"]
    names = ("samples.npz", "grid.png")

    def result():
        found = contents(place / "out")
        assert not [path for path in found if ".tmp-" in str(path) or ".parts" in str(path)]
        return {path: data for path, data in found.items() if path.name in names or path.parent.name == "png"}

    return command, result


def of_cache(place):
    picture_folder(place / "pictures", count=60)
    small_vae(place / "vae")
    data = ["data=folder", "data.root=pictures", "data.image_size=32", "data.holdout_every=5"]
    command = ["scripts/cache_latents.py", *data, "autoencoder=kl", "autoencoder.source=vae", "shard_size=16"]
    return [*command, "num_workers=1", "out=cache"], lambda: contents(place / "cache")


@pytest.mark.parametrize("prepare", [of_train, of_sample, of_cache, of_sweep])
def test_kills_change_nothing(tmp_path, prepare):
    results = []
    rng = random.Random(prepare.__name__)
    seconds = 0.0
    place = tmp_path / "place"  # the same one for both, for receipts hold paths
    for killed in (False, True):
        place.mkdir()
        command, result = prepare(place)
        if killed:
            with_kills(command, place, seconds, rng)
        else:
            seconds = straight(command, place)
        results.append(result())
        place.rename(tmp_path / f"place_{killed}")
    assert results[0] == results[1]
