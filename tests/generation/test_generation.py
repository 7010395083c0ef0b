"""Sets of images: the same on any processes and in any batch size, and resumed after a kill."""

import copy
import hashlib
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, inputs, refusal, small_checkpoint, small_ddt, small_network, small_vae, succeed, thinned
from PIL import Image

import ddt
from ddt.autoencoder import Identity
from ddt.checkpoint import format as ckpt
from ddt.errors import UserError
from ddt.generation import sample_set as generation
from ddt.generation.generator import Generator, cast_weights
from ddt.generation.image_set import image_set
from ddt.generation.load import check_guide_config
from ddt.generation.part_files import write_part
from ddt.generation.sample_set import remaining_batches, sample_set
from ddt.model import DiT
from ddt.model.layers import Block
from ddt.precision import autocast
from ddt.sampling.schedules import write_schedule
from ddt.sampling.settings import SamplerSettings

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = SamplerSettings(num_steps=3, cfg_interval=None)


def generator(**changes):
    parts = dict(model=small_ddt(in_channels=1), autoencoder=Identity(), shape=(1, 8, 8), settings=FAST)
    return Generator(**parts | dict(dtype="fp32", device=torch.device("cpu")) | changes)


def write_set(out, count=11, batch_size=4, **changes):
    """Sample a set in this process; return its images as integers."""
    names = {"class_names": list("abcde")}
    sample_set(generator(**changes), image_set(5, num_samples=count), batch_size, out, names, Accelerator(cpu=True))
    with np.load(out / "samples.npz") as file:
        return file["arr_0"].astype(int)


def test_batches_are_slices_of_the_whole_set():
    chunks = remaining_batches(11, 4, np.array([], dtype=np.int64))
    assert [c.tolist() for c in chunks] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    chunks = remaining_batches(11, 4, np.array([0, 1, 2, 3, 5, 6]))
    assert [c.tolist() for c in chunks] == [[4, 7], [8, 9, 10]]
    assert remaining_batches(3, 4, np.arange(3)) == []


def test_image_k_depends_on_no_batch_size(tmp_path):
    whole = write_set(tmp_path / "whole", batch_size=11)
    for batch_size in (1, 4):
        assert np.abs(write_set(tmp_path / str(batch_size), batch_size=batch_size) - whole).max() <= 1
    assert len({image.tobytes() for image in whole}) == 11


class Killed(Exception):
    """Stands for a kill in this process."""


def raising(error):
    """Return a function that raises an error."""

    def call(*_):
        raise error

    return call


def test_a_set_resumes_where_it_was_stopped(tmp_path, monkeypatch):
    whole = write_set(tmp_path / "whole")
    receipt = json.loads((tmp_path / "whole" / "receipt.json").read_text())
    calls = []

    def latents(self, classes, seeds):
        calls.append(list(seeds))
        if len(calls) == 3:
            raise Killed
        return original(self, classes, seeds)

    original = Generator.latents
    monkeypatch.setattr(Generator, "latents", latents)
    with pytest.raises(Killed):
        write_set(tmp_path / "a")
    parts = sorted(p.name for p in (tmp_path / "a" / ".parts").glob("*.npz"))
    assert parts == ["00000000-00000004.npz", "00000004-00000008.npz"]  # the batch in flight is all that is lost
    assert np.array_equal(write_set(tmp_path / "a"), whole)
    assert calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10], [8, 9, 10]]
    resumed = json.loads((tmp_path / "a" / "receipt.json").read_text())
    assert resumed["images_of_an_earlier_call"] == 8
    assert resumed["network_calls_an_image"] == receipt["network_calls_an_image"]
    assert (tmp_path / "a" / "samples.npz").read_bytes() == (tmp_path / "whole" / "samples.npz").read_bytes()


def test_a_set_resumes_in_another_batch_size(tmp_path, monkeypatch):
    whole = write_set(tmp_path / "whole")
    write_set(tmp_path / "a", count=11)
    with monkeypatch.context() as patch:
        patch.setattr("ddt.generation.sample_set.merge_parts", raising(Killed))
        with pytest.raises(Killed):
            write_set(tmp_path / "b")
    for part in ("00000000-00000004.npz", "00000008-00000011.npz"):  # one batch of images that are not consecutive
        (tmp_path / "b" / ".parts" / part).unlink()
    assert np.abs(write_set(tmp_path / "b", batch_size=11) - whole).max() <= 1


@pytest.mark.parametrize("moment", ["write_json", "write_png", "shutil.rmtree"])
def test_a_kill_at_the_end_loses_nothing(tmp_path, monkeypatch, moment):
    """While receipt, grid and npz are written, and before the parts are removed."""
    whole = write_set(tmp_path / "whole")
    with monkeypatch.context() as patch:
        original = __import__("ddt.files", fromlist=["write_json"]).write_json

        def interrupted(path, *args, **kwargs):
            if path.name == "plan.json":
                return original(path, *args, **kwargs)
            raise Killed

        patch.setattr(f"ddt.generation.set_folder.{moment}", interrupted)
        with pytest.raises(Killed):
            write_set(tmp_path / "a")
    with monkeypatch.context() as patch:  # nothing is sampled again
        patch.setattr(Generator, "latents", raising(AssertionError))
        assert np.array_equal(write_set(tmp_path / "a"), whole)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["grid.png", "receipt.json", "samples.npz"]


def test_while_a_set_is_sampled_another_command_is_refused(tmp_path):
    (tmp_path / "a" / ".parts").mkdir(parents=True)
    lock = filelock.FileLock(tmp_path / "a" / ".parts" / ".lock")
    with lock, pytest.raises(ckpt.UserError, match="another command is sampling this set; wait for it"):
        write_set(tmp_path / "a")
    write_set(tmp_path / "a")


def test_while_a_batch_is_decoded_the_next_is_sampled(tmp_path, monkeypatch):
    sampled = threading.Semaphore(0)

    class Patient(Identity):
        def decode(self, latents):
            assert sampled.acquire(timeout=20)  # by the batch after this one, or by the last itself
            return super().decode(latents)

    def latents(self, classes, seeds):
        result = original(self, classes, seeds)
        if 0 not in seeds:
            sampled.release()
        if 10 in seeds:
            sampled.release()
        return result

    original = Generator.latents
    monkeypatch.setattr(Generator, "latents", latents)
    write_set(tmp_path / "a", autoencoder=Patient())


def test_an_error_while_decoding_ends_the_run(tmp_path):
    class Broken(Identity):
        def decode(self, latents):
            raise Killed

    with pytest.raises(Killed):
        write_set(tmp_path / "a", autoencoder=Broken())
    assert not (tmp_path / "a" / "samples.npz").exists()


@pytest.fixture
def run_folder(tmp_path):
    model = small_ddt(in_channels=1)
    network = dict(in_channels=1, patch_size=2, hidden_size=32, num_heads=2, depth=3, encoder_depth=2, num_classes=5)
    config = {
        "step": 3,
        "network": {"_target_": "ddt.model.DDT", **network},
        "latent_shape": [1, 8, 8],
        "autoencoder": {"_target_": "ddt.autoencoder.Identity"},
        "sampler": {"solver": "euler", "num_steps": 4, "cfg_scale": 2.0, "cfg_interval": [0.3, 1.0]},
        "class_names": list("abcde"),
    }
    ckpt.write_checkpoint(ckpt.checkpoint_folder(tmp_path / "run", 3), config, ema=model.state_dict())
    return tmp_path / "run"


def test_sample_writes_npz_grid_and_receipt(run_folder, tmp_path):
    arguments = ["num_samples=13", "batch_size=5", f"out={tmp_path / 'a'}", "recompute=uniform:2"]
    succeed("sample", f"ckpt={run_folder}", *arguments)
    with np.load(tmp_path / "a" / "samples.npz") as file:
        images, classes = file["arr_0"], file["arr_1"]
    assert (images.dtype, images.shape) == (np.uint8, (13, 8, 8, 1))
    assert (classes.dtype, classes.tolist()) == (np.int64, [k % 5 for k in range(13)])
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["grid.png", "receipt.json", "samples.npz"]
    receipt = json.loads((tmp_path / "a" / "receipt.json").read_text())
    assert receipt["samples"] == 13
    assert receipt["request"]["sampler"]["recompute"] == "uniform:2"
    calls = {"encoder": 2 * 2, "decoder": 4 + 3}  # guided at t = .32, .64, .96
    assert receipt["network_calls_an_image"] == calls
    assert receipt["recompute_steps"] == [0, 2]
    assert receipt["cached_modulations_bytes"] == 2 * 5 * 16 * (6 * 32 + 2 * 32) * 4
    assert receipt["request"]["seeds"] == "0-12"
    ema = run_folder / "checkpoints" / "step_0000003" / "ema.safetensors"
    assert receipt["request"]["checkpoint"]["ema_sha256"] == ckpt.sha256(ema)


@pytest.mark.slow
def test_kill_9_loses_at_most_the_batch_in_flight(run_folder, tmp_path):
    arguments = [f"ckpt={run_folder}", "num_samples=15", "batch_size=1", "num_steps=20", f"out={tmp_path / 'a'}"]
    child = subprocess.Popen([sys.executable, ROOT / "sample.py", *arguments], stderr=subprocess.DEVNULL)
    parts = tmp_path / "a" / ".parts"
    while len(list(parts.glob("[0-9]*.npz"))) <= 2 and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = len(list(parts.glob("[0-9]*.npz")))
    assert 2 < kept < 15
    succeed("sample", *arguments)
    assert json.loads((tmp_path / "a" / "receipt.json").read_text())["images_of_an_earlier_call"] >= kept - 1
    succeed("sample", *arguments[:-1], f"out={tmp_path / 'b'}")
    assert (tmp_path / "a" / "samples.npz").read_bytes() == (tmp_path / "b" / "samples.npz").read_bytes()


def test_paths_with_signs_that_hydra_reads_otherwise(run_folder):
    strange = run_folder.parent / "model.encoder_depth=2,seed=1 é"
    run_folder.rename(strange)
    succeed("sample", f"ckpt={strange}", "num_samples=1", "num_steps=1")
    assert (strange / "checkpoints" / "step_0000003" / "samples" / "samples.npz").is_file()


def test_a_place_that_cannot_be_written_is_named(run_folder, tmp_path):
    (tmp_path / "file").touch()
    assert refusal("sample", f"ckpt={run_folder}", "num_samples=1", f"out={tmp_path / 'file' / 'x'}").startswith(
        str(tmp_path)
    )


def test_bf16_is_not_fp32(run_folder, tmp_path):
    for dtype in ("fp32", "bf16"):
        succeed("sample", f"ckpt={run_folder}", "num_samples=5", f"dtype={dtype}", f"out={tmp_path / dtype}")
    images = [np.load(tmp_path / dtype / "samples.npz")["arr_0"].astype(int) for dtype in ("fp32", "bf16")]
    assert 0 < np.abs(images[0] - images[1]).mean() < 3


@pytest.mark.parametrize("sampler", ["euler", "sde", "adaptive"])
def test_other_batches_agree(run_folder, tmp_path, sampler):
    arguments = ["num_samples=37", f"sampler={sampler}"]
    for name, batch_size in (("one", 16), ("other", 5)):
        succeed("sample", f"ckpt={run_folder}", *arguments, f"batch_size={batch_size}", f"out={tmp_path / name}")
    sets = [np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("one", "other")]
    assert np.abs(sets[0] - sets[1]).max() <= 1


def test_two_processes_with_the_same_batches_give_the_same_bytes(run_folder, tmp_path):
    arguments = ["num_samples=7", "batch_size=2"]
    succeed("sample", f"ckpt={run_folder}", *arguments, f"out={tmp_path / 'one'}")
    succeed("sample", f"ckpt={run_folder}", *arguments, "num_processes=2", f"out={tmp_path / 'two'}")
    assert json.loads((tmp_path / "two" / "receipt.json").read_text())["num_processes"] == 2
    assert (tmp_path / "one" / "samples.npz").read_bytes() == (tmp_path / "two" / "samples.npz").read_bytes()


def test_png_files_now_or_later(run_folder, tmp_path):
    arguments = [f"ckpt={run_folder}", "num_samples=5", f"out={tmp_path / 'a'}"]
    succeed("sample", *arguments, "png=2")
    images = np.load(tmp_path / "a" / "samples.npz")["arr_0"]
    folder = tmp_path / "a" / "png"
    assert len(list(folder.iterdir())) == 2
    assert np.array_equal(np.asarray(Image.open(folder / "000001.png")), images[1, ..., 0])
    succeed("sample", *arguments, "png=all")  # the set itself is complete
    assert len(list(folder.iterdir())) == 5


def test_dp_schedules_are_fitted_and_reused_on_resume(run_folder, tmp_path, monkeypatch):
    arguments = [f"ckpt={run_folder}", "num_samples=5", "recompute=dp:2", f"out={tmp_path / 'a'}"]
    with monkeypatch.context() as patch:
        patch.setattr("ddt.generation.sample_set.merge_parts", raising(Killed))
        with pytest.raises(Killed):
            succeed("sample", *arguments)
    path = tmp_path / "a" / ".parts" / "plan.json"
    plan = json.loads(path.read_text())
    assert len(plan["recompute_steps"]) == 2
    path.write_text(json.dumps({**plan, "recompute_steps": [0]}))
    assert "(plan.json is of other settings, or damaged)" in refusal("sample", *arguments)
    path.write_text(json.dumps(plan))
    monkeypatch.setattr("ddt.generation.set_folder.resolve_recompute", raising(AssertionError))
    succeed("sample", *arguments)
    receipt = json.loads((tmp_path / "a" / "receipt.json").read_text())
    assert (receipt["recompute"], receipt["recompute_steps"]) == ("dp:2", plan["recompute_steps"])


def test_schedule_files_are_compared_by_content(run_folder, tmp_path, capfd):
    def written(name, steps, grid=None):
        grid = grid or SamplerSettings(num_steps=4).grid()
        content = {"recompute_steps": steps, "time_grid": grid, "guidance": {}, "solver": "euler"}
        write_schedule(tmp_path / name, content)
        return f"recompute={tmp_path / name}"

    arguments = [f"ckpt={run_folder}", "num_samples=5", f"out={tmp_path / 'a'}"]
    succeed("sample", *arguments, written("one.json", [0, 3]))
    assert json.loads((tmp_path / "a" / "receipt.json").read_text())["recompute_steps"] == [0, 3]
    succeed("sample", *arguments, written("two.json", [0, 3]))
    assert "holds another set" in refusal("sample", *arguments, written("two.json", [0, 2]))
    other = written("other.json", [0, 2], SamplerSettings(num_steps=5).grid())
    assert "was fitted to another time grid" in refusal("sample", *arguments[:2], f"out={tmp_path / 'b'}", other)
    assert not (tmp_path / "b" / "samples.npz").exists()


def test_weights_selects_the_weights(tmp_path):
    folder = small_checkpoint(tmp_path / "checkpoint")
    ema = ckpt.read_weights(folder, "ema")
    raw = {key: 1.2 * value for key, value in ema.items()}
    config = ckpt.read_config(folder)
    ckpt.write_checkpoint(tmp_path / "both", config, ema=ema, model=raw)
    ckpt.write_checkpoint(tmp_path / "raw", config, ema=raw)
    images = {}
    for name, chosen in (("both", "model"), ("both", "ema"), ("raw", "ema")):
        out = tmp_path / f"{name}_{chosen}"
        succeed(
            "sample", f"ckpt={tmp_path / name}", f"weights={chosen}", "num_samples=3", "num_processes=1", f"out={out}"
        )
        with np.load(out / "samples.npz") as file:
            images[out.name] = file["arr_0"]
    assert np.array_equal(images["both_model"], images["raw_ema"])
    assert not np.array_equal(images["both_model"], images["both_ema"])


def test_autoguidance_by_a_weaker_checkpoint(run_folder, tmp_path):
    config = ckpt.read_config(ckpt.find_checkpoint(run_folder))
    config["network"] |= {"depth": 2, "encoder_depth": 1}
    weaker = small_ddt(in_channels=1, depth=2, encoder_depth=1)
    ckpt.write_checkpoint(tmp_path / "weaker", config, ema=weaker.state_dict())
    arguments = [f"ckpt={run_folder}", "num_samples=5"]
    succeed("sample", *arguments, f"guide={tmp_path / 'weaker'}", f"out={tmp_path / 'a'}")
    receipt = json.loads((tmp_path / "a" / "receipt.json").read_text())
    assert receipt["network_calls_an_image"] == {"encoder": 4, "decoder": 4, "guide_encoder": 3, "guide_decoder": 3}
    message = refusal("sample", *arguments, f"guide={tmp_path / 'weaker'}", "cfg_scale=1", f"out={tmp_path / 'c'}")
    assert message.startswith("guide: has no effect with cfg_scale=1")
    ckpt.write_checkpoint(tmp_path / "other", config | {"class_names": list("vwxyz")}, ema=weaker.state_dict())
    message = refusal("sample", *arguments, f"guide={tmp_path / 'other'}", f"out={tmp_path / 'c'}")
    assert message.startswith("guide: has another class_names than the model")
    assert not (tmp_path / "c").exists()
    by_weights = {key: value | {"autoencoder_fingerprint": key} for key, value in (("a", config), ("b", config))}
    for name, content in by_weights.items():
        ckpt.write_checkpoint(tmp_path / f"of_{name}", content, ema=weaker.state_dict())
    with pytest.raises(UserError, match="guide: has another autoencoder_fingerprint than the model"):
        check_guide_config(*(ckpt.read_config(tmp_path / f"of_{name}") for name in "ab"))
    assert receipt["request"]["guide"]["ema_sha256"] == ckpt.sha256(tmp_path / "weaker" / "ema.safetensors")
    succeed("sample", *arguments, f"out={tmp_path / 'b'}")
    assert (tmp_path / "a" / "samples.npz").read_bytes() != (tmp_path / "b" / "samples.npz").read_bytes()


def test_what_was_refused_can_be_corrected_in_the_same_folder(run_folder, tmp_path):
    """Without a sampled image the plan may change."""
    arguments = [f"ckpt={run_folder}", "num_samples=2", f"out={tmp_path / 'a'}"]
    message = refusal("sample", *arguments, "sampler=adaptive", "num_steps=1", "tolerance=1e-9")
    assert "was not reached in num_steps=1 steps" in message
    succeed("sample", *arguments, "sampler=heun")


def test_a_set_without_its_npz_is_sampled_again(tmp_path):
    whole = write_set(tmp_path / "a")
    (tmp_path / "a" / "samples.npz").unlink()
    assert np.array_equal(write_set(tmp_path / "a"), whole)


def flip_byte(npz):
    content = bytearray(npz.read_bytes())
    content[len(content) // 2] ^= 1
    npz.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    thinned(
        [
            flip_byte,
            lambda npz: npz.write_bytes(npz.read_bytes()[:200]),
            lambda npz: np.savez(npz, arr_0=np.zeros((11, 8, 8, 1), dtype=np.uint8), arr_1=np.arange(11) % 5),
            lambda npz: np.savez(npz, arr_0=np.zeros((3, 8, 8, 1), dtype=np.uint8), arr_1=np.arange(3)),
        ],
        2,
    ),
    ids=["byte", "cut", "other images", "fewer images"],
)
def test_a_set_is_complete_only_as_the_file_of_its_receipt(run_folder, tmp_path, change):
    out = tmp_path / "a"
    arguments = [f"ckpt={run_folder}", "num_samples=11", f"out={out}", "num_processes=1"]
    succeed("sample", *arguments)
    whole = (out / "samples.npz").read_bytes()
    assert json.loads((out / "receipt.json").read_text())["samples_sha256"] == hashlib.sha256(whole).hexdigest()
    change(out / "samples.npz")
    (line,) = refusal("sample", *arguments, "png=all").splitlines()
    assert line.startswith(f"{out / 'samples.npz'}: damaged or replaced")
    assert sorted(p.name for p in out.iterdir()) == ["grid.png", "receipt.json", "samples.npz"]
    (out / "samples.npz").unlink()
    succeed("sample", *arguments)
    assert (out / "samples.npz").read_bytes() == whole


def test_parts_of_another_set_are_removed(tmp_path):
    whole = write_set(tmp_path / "whole")
    parts = tmp_path / "a" / ".parts"
    parts.mkdir(parents=True)
    write_part(parts, 0, np.zeros((4, 8, 8, 1), dtype=np.uint8), {})
    assert np.array_equal(write_set(tmp_path / "a"), whole)


def test_a_set_finished_meanwhile_by_another_command_is_unchanged(tmp_path, monkeypatch):
    whole = write_set(tmp_path / "a")
    monkeypatch.setattr(generation, "set_state", lambda *_: "new")  # as seen before the lock
    monkeypatch.setattr(Generator, "latents", raising(AssertionError))
    assert np.array_equal(write_set(tmp_path / "a"), whole)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["grid.png", "receipt.json", "samples.npz"]


KINDS = [("ddt", "bf16"), ("ddt", "fp16"), ("conv", "bf16"), ("dit", "bf16"), ("ditdh", "bf16")]


def test_the_dtype_that_an_autoencoder_wants(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ddt.autoencoder.Identity.sampling_dtype", "bf16")
    for name, arguments in {"wanted": [], "chosen": ["dtype=fp32"]}.items():
        succeed("sample", f"ckpt={run_folder}", "num_samples=1", f"out={tmp_path / name}", *arguments)
    dtypes = [
        json.loads((tmp_path / name / "receipt.json").read_text())["request"]["dtype"] for name in ("wanted", "chosen")
    ]
    assert dtypes == ["bf16", "fp32"]


@pytest.mark.parametrize("options", [{}, {"recompute": [0, 2]}, {"recompute": [0, 2], "cache_bytes": 30_000}])
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_cast_weights_give_the_bits_of_autocast(kind, dtype, options):
    sizes = dict(in_channels=2, patch_size=2, hidden_size=32, num_heads=2, depth=3, num_classes=5)
    model = DiT(**sizes) if kind == "dit" else small_ddt(decoder_block="conv" if kind == "conv" else "attention")
    model = small_network("ditdh") if kind == "ditdh" else model
    if kind == "dit":
        options = {}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    x, t, y = inputs()
    cast = copy.deepcopy(model)
    cast_weights(cast, dtype)
    dtypes = {name: parameter.dtype for name, parameter in cast.named_parameters()}
    kept = [name for name, dtype in dtypes.items() if dtype == torch.float32]
    assert all("norm" in name or "embedding_table" in name or name.endswith(".W") for name in kept)
    # norms of blocks, q and k, and the table of classes; of a DiT^DH, of blocks and output, and the
    # frequencies
    assert len(kept) == {"conv": 11, "ditdh": 9}.get(kind, 13)
    with autocast(torch.device("cpu"), dtype):
        assert torch.equal(model(x, t, y), cast(x, t, y))
        counts = {}, {}
        latents = [
            ddt.sample(network, x, y, num_steps=4, last_step=None, counts=count, **options)
            for network, count in zip((model, cast), counts, strict=True)
        ]
    assert torch.equal(*latents)
    assert counts[0] == counts[1]
    assert (0 < counts[0]["cached_bytes"] <= options.get("cache_bytes", 1e9)) == bool(options)


def test_bf16_sets_are_sampled_with_cast_weights(run_folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("ddt.generation.run.sample_set", lambda generator, *_, **__: seen.append(generator))
    succeed(
        "sample", f"ckpt={run_folder}", "num_samples=2", f"out={tmp_path / 'a'}", "dtype=bf16", f"guide={run_folder}"
    )
    succeed("sample", f"ckpt={run_folder}", "num_samples=2", f"out={tmp_path / 'a'}")
    assert {p.dtype for p in seen[1].model.parameters()} == {torch.float32}
    for network in (seen[0].model, seen[0].guide):
        assert network.encoder.blocks[0].adaln.weight.dtype == torch.bfloat16
    assert not seen[1].compiled


@pytest.mark.slow
def test_compiled_sets_are_other_sets(run_folder, tmp_path, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(Block, "compile", lambda block, **_: torch.nn.Module.compile(block, backend=counted))
    graphs = []

    def counted(graph, _):
        graphs.append(graph)
        return graph.forward

    arguments = [f"ckpt={run_folder}", "num_samples=3"]
    succeed("sample", *arguments, f"out={tmp_path / 'plain'}")
    assert not graphs
    assert "holds another set" in refusal("sample", *arguments, "compile=true", f"out={tmp_path / 'plain'}")
    succeed("sample", *arguments, "compile=true", f"out={tmp_path / 'compiled'}", f"guide={run_folder}")
    assert graphs
    compiled = json.loads((tmp_path / "compiled" / "receipt.json").read_text())["request"]
    plain = json.loads((tmp_path / "plain" / "receipt.json").read_text())["request"]
    assert (plain["compile"], compiled["compile"]) == (False, True)


def test_large_sets_are_compiled_on_gpus_alone(run_folder, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("ddt.generation.run.sample_set", lambda *_, **__: None)
    monkeypatch.setattr("ddt.generation.run.compiles", lambda *arguments: bool(calls.append(arguments)))
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr("ddt.generation.run.make_accelerator", lambda *_, **__: accelerator)
    succeed("sample", f"ckpt={run_folder}", "num_samples=1000", f"out={tmp_path / 'a'}")
    monkeypatch.setattr("torch.nn.Module.to", lambda module, *_: module)
    monkeypatch.setattr("ddt.autoencoder.Identity.to", lambda autoencoder, *_: autoencoder)
    accelerator.device = torch.device("cuda")
    for count in (999, 1000):
        succeed("sample", f"ckpt={run_folder}", f"num_samples={count}", f"out={tmp_path / 'a'}")
    assert [default for _, _, default, _ in calls] == [False, False, True]
    assert {(key, chosen) for key, chosen, _, _ in calls} == {("compile", None)}


def test_non_finite_latents_are_an_error(tmp_path):
    model = small_ddt(in_channels=1)
    with torch.no_grad():
        model.decoder.output.linear.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="image 0 or one of the 3 after it is NaN or infinite"):
        write_set(tmp_path / "a", model=model)
    assert not list((tmp_path / "a" / ".parts").glob("*.npz"))


def test_foreign_files_are_never_written_over(run_folder, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "grid.png").write_text("mine")
    assert "holds grid.png, not written by this" in refusal("sample", f"ckpt={run_folder}", f"out={tmp_path / 'a'}")
    assert [p.read_text() for p in (tmp_path / "a").iterdir()] == ["mine"]


def test_an_autoencoder_of_other_latents_is_named_at_once(run_folder, tmp_path):
    folder = run_folder / "checkpoints" / "step_0000003"
    config = ckpt.read_config(folder) | {
        "autoencoder": {"_target_": "ddt.autoencoder.KLAutoencoder", "source": small_vae(tmp_path / "vae")}
    }
    weights = small_ddt(in_channels=1).state_dict()
    ckpt.write_checkpoint(tmp_path / "other", config, ema=weights)
    message = refusal("sample", f"ckpt={tmp_path / 'other'}", "num_samples=1", f"out={tmp_path / 'a'}")
    assert message == "autoencoder: has 4 latent channels, the model 1; choose the model's own"
    assert not (tmp_path / "a").exists()


def test_num_processes_is_the_launchers(run_folder, monkeypatch):
    of_torchrun = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    for name, value in of_torchrun.items():
        monkeypatch.setenv(name, str(value))
    message = refusal("sample", f"ckpt={run_folder}", "num_samples=1", "num_processes=2")
    assert message.startswith("num_processes=2: 1 processes were launched already; leave it out")


def test_the_same_set_again_is_unchanged_and_another_is_refused(run_folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    out = tmp_path / "a"
    arguments = [f"ckpt={run_folder}", f"out={out}"]
    succeed("sample", *arguments, "seeds=[1]")
    before = {p: p.read_bytes() for p in out.iterdir()}
    assert "complete" not in caplog.text
    succeed("sample", *arguments, "seeds=[1]")
    assert "complete, nothing to do" in caplog.text
    for other in ("seeds=[2]", "num_steps=3", "cfg_scale=1.1", "dtype=bf16", "classes=[1,0,2,3,4]"):
        others = [other] if other.startswith("seeds") else ["seeds=[1]", other]
        message = refusal("sample", *arguments, *others)
        assert message.startswith(f"out={out}: holds another set (receipt.json is of other settings, or damaged)")
    assert {p: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize(
    ("argument", "message"),
    thinned(
        [
            ("classes=[7]", "classes=[7]: the model has classes 0..4"),
            ("seeds=[1.5]", "seeds=[1.5]: "),
            ("sampler=rk9", "sampler=rk9: "),
            ("num_steps=true", "num_steps=true: give a number"),
            ("recompute=uniform:5", "recompute=uniform:5: choose 1..num_steps=4 (uniform:1 shares nothing"),
            (
                "cfg_interval=[0.31,0.32]",
                "cfg_interval=[0.31,0.32]: guides none of the 4 steps, whose times are 0.000, ",
            ),
            ("dtype=int8", "dtype=int8: give 'bf16', 'fp16' or 'fp32' or null"),
            ("num_stepz=4", "num_stepz: no such setting; did you mean num_steps?"),
            ("batch_size=0", "batch_size=0: must be at least 1"),
            ("num_processes=-1", "num_processes=-1: must be at least 1"),
            ("cfg_scale=inf", "cfg_scale=inf: give a finite number"),
            (
                "recompute=missing.json",
                "recompute=missing.json: no such file; python -m scripts.studies.sharing.fit writes",
            ),
            ("sde_last=euler", "sde_last=euler: has no effect with sampler=euler"),
            ("guide=nowhere", "nowhere: no such folder"),
            ("png=some", "png=some: "),
            ("png=-1", "png=-1: give a number of images, or all"),
            ("cache_gib=-1", "cache_gib=-1.0: must be at least 0"),
            ("reference=x.npz", "reference: no such setting"),
            ("~num_steps", "~num_steps: a setting cannot be removed"),
            ("ckpt=nothing", "nothing: no such folder; give a run folder"),
            ("experiment=nothing", "experiment=nothing: no such choice"),
        ],
        3,
    ),
)
def test_wrong_input_is_one_line(run_folder, argument, message):
    (line,) = refusal("sample", f"ckpt={run_folder}", argument).splitlines()
    assert line.startswith(message)
    assert not (run_folder / "checkpoints" / "step_0000003" / "samples").exists()
