"""Sets of images: exact, interleaved, the same on any number of processes and in any batch size."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, refusal, run, small_ddt

from ddt import checkpoint as ckpt
from ddt.autoencoder import Identity
from ddt.errors import UserError
from ddt.generation import generate, image_grid, image_set, noise_of
from ddt.sampling import SamplerSettings

FAST = SamplerSettings(num_steps=3, cfg_interval=None)


def test_num_samples_interleaves_the_classes():
    images = image_set(num_classes=10, num_samples=7, classes=[3, 1, 4])
    assert images.classes == [3, 1, 4, 3, 1, 4, 3]
    assert images.seeds == list(range(7))
    assert len(set(image_set(10, num_samples=50, seed=1).seeds) & set(image_set(10, num_samples=50).seeds)) == 0


def test_every_seed_with_every_class():
    images = image_set(num_classes=3, seeds=[5, 9])
    assert list(zip(images.classes, images.seeds, strict=True)) == [
        (0, 5),
        (1, 5),
        (2, 5),
        (0, 9),
        (1, 9),
        (2, 9),
    ]
    assert image_set(3, num_samples=6, seeds=[5, 9]) == images
    assert image_set(3, seeds=5, classes=2).classes == [2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": [1, 10]}, r"classes=\[10\]: the model has classes 0\.\.9"),
        ({"classes": []}, r"classes=\[\]"),
        ({"seeds": [-1]}, r"seeds=\[-1\]"),
        ({"seeds": [2**32]}, r"seeds=\[4294967296\]"),
        ({"num_samples": 7, "seeds": [1]}, r"num_samples=7 disagrees with 1 seeds × 10 classes = 10"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"num_samples": 4, "seed": 5000}, "seed=5000"),
    ],
)
def test_impossible_sets_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        image_set(10, **arguments)


def test_noise_of_an_image_is_its_own_generator():
    expected = torch.randn((2, 4, 4), generator=torch.Generator().manual_seed(11))
    assert torch.equal(noise_of([3, 11], (2, 4, 4))[1], expected)


def test_image_k_depends_on_neither_batch_size_nor_processes():
    model, images = small_ddt(in_channels=1), image_set(5, num_samples=11)

    def draw(batch_size, num_processes):
        drawn = np.empty((11, 8, 8, 1), dtype=np.uint8)
        for rank in range(num_processes):
            indices, part = generate(
                model,
                Identity(),
                (1, 8, 8),
                images,
                FAST,
                "fp32",
                batch_size,
                torch.device("cpu"),
                rank,
                num_processes,
            )
            drawn[indices] = part
        return drawn.astype(int)

    whole = draw(11, 1)
    for batch_size, num_processes in ((4, 1), (3, 2), (1, 3)):
        assert np.abs(draw(batch_size, num_processes) - whole).max() <= 1
    assert len({image.tobytes() for image in whole}) == 11


def test_grid_enlarges_small_images():
    picture = image_grid(torch.full((6, 1, 8, 8), 7, dtype=torch.uint8), columns=3)
    assert picture.shape == (2 * 50 + 2, 3 * 50 + 2, 3)
    assert picture[25, 25].tolist() == [7, 7, 7]


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


def sample(run_folder, *arguments):
    return run(ROOT / "sample.py", f"ckpt={run_folder}", *arguments, cwd=run_folder.parent)


def test_sample_writes_npz_grid_and_receipt(run_folder, tmp_path):
    done = sample(run_folder, "num_samples=13", "batch_size=5", f"out={tmp_path / 'a'}", "recompute=uniform:2")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "a" / "samples.npz") as file:
        images, classes = file["arr_0"], file["arr_1"]
    assert (images.dtype, images.shape) == (np.uint8, (13, 8, 8, 1))
    assert (classes.dtype, classes.tolist()) == (np.int64, [k % 5 for k in range(13)])
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["grid.png", "receipt.json", "samples.npz"]
    receipt = json.loads((tmp_path / "a" / "receipt.json").read_text())
    assert receipt["samples"] == 13
    assert receipt["request"]["sampler"]["recompute"] == "uniform:2"
    assert receipt["network_calls_an_image"] == {
        "encoder": 2 * 2,
        "decoder": 4 + 3,
    }  # guided at t = .32, .64, .96
    assert receipt["request"]["seeds"] == list(range(13))
    ema = run_folder / "checkpoints" / "step_0000003" / "ema.safetensors"
    assert receipt["request"]["checkpoint"]["ema_sha256"] == ckpt.sha256(ema)


def test_an_interrupted_set_is_drawn_again(run_folder, tmp_path):
    arguments = ["num_samples=3", f"out={tmp_path / 'a'}"]
    assert sample(run_folder, *arguments).returncode == 0
    whole = (tmp_path / "a" / "samples.npz").read_bytes()
    (tmp_path / "a" / "samples.npz").unlink()  # a kill before the last file
    again = sample(run_folder, *arguments)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "a" / "samples.npz").read_bytes()[-500:] == whole[-500:]


def test_paths_with_signs_that_hydra_reads_otherwise(run_folder, tmp_path):
    strange = run_folder.parent / "model.encoder_depth=2,seed=1 é"
    run_folder.rename(strange)
    done = sample(strange, "num_samples=1", "num_steps=1")
    assert done.returncode == 0, done.stderr
    assert (strange / "checkpoints" / "step_0000003" / "samples" / "samples.npz").is_file()


def test_a_place_that_cannot_be_written_is_named(run_folder, tmp_path):
    (tmp_path / "file").touch()
    assert refusal("sample", f"ckpt={run_folder}", "num_samples=1", f"out={tmp_path / 'file' / 'x'}").startswith(
        str(tmp_path)
    )


def test_bf16_is_not_fp32(run_folder, tmp_path):
    for dtype in ("fp32", "bf16"):
        assert sample(run_folder, "num_samples=5", f"dtype={dtype}", f"out={tmp_path / dtype}").returncode == 0
    images = [np.load(tmp_path / dtype / "samples.npz")["arr_0"].astype(int) for dtype in ("fp32", "bf16")]
    assert 0 < np.abs(images[0] - images[1]).mean() < 3


def test_two_processes_give_the_set_of_one(run_folder, tmp_path):
    for name, arguments in (("one", []), ("two", ["num_processes=2", "batch_size=2"])):
        done = sample(run_folder, "num_samples=7", f"out={tmp_path / name}", *arguments)
        assert done.returncode == 0, done.stderr
    one, two = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("one", "two"))
    assert json.loads((tmp_path / "two" / "receipt.json").read_text())["num_processes"] == 2
    assert np.abs(one - two).max() <= 1


def test_the_same_set_again_is_left_alone_and_another_is_refused(run_folder, tmp_path):
    out = tmp_path / "a"
    sample(run_folder, "seeds=[1]", f"out={out}")
    before = {p: p.read_bytes() for p in out.iterdir()}
    again = sample(run_folder, "seeds=[1]", f"out={out}")
    assert again.returncode == 0
    assert "complete, nothing to do" in again.stderr
    other = sample(run_folder, "seeds=[2]", f"out={out}")
    assert other.returncode != 0
    assert other.stderr.strip() == f"out={out}: holds another set and is not written over; choose another out="
    assert {p: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("classes=[7]", "classes=[7]: the model has classes 0..4"),
        ("seeds=[1.5]", "seeds=[1.5]: "),
        ("sampler=rk9", "sampler=rk9: "),
        ("cfg_interval=[0.9,0.2]", "cfg_interval=[0.9,0.2]: needs 0 <= lo < hi <= 1"),
        ("recompute=[3]", "recompute=[3]: step 0 must be among them"),
        ("dtype=int8", "dtype=int8: input should be 'bf16' or 'fp32'"),
        ("num_stepz=4", "num_stepz: no such setting; did you mean num_steps?"),
        ("batch_size=0", "batch_size=0: must be at least 1"),
        ("num_processes=-1", "num_processes=-1: must be at least 1"),
        ("cfg_scale=inf", "cfg_scale=inf: input should be a finite number"),
    ],
)
def test_wrong_input_is_one_line(run_folder, argument, message):
    (line,) = refusal("sample", f"ckpt={run_folder}", argument).splitlines()
    assert line.startswith(message)
    assert not (run_folder / "checkpoints" / "step_0000003" / "samples").exists()


def test_a_missing_checkpoint_is_one_line(tmp_path):
    (line,) = refusal("sample", f"ckpt={tmp_path / 'nothing'}").splitlines()
    assert line.startswith(f"{tmp_path / 'nothing'}: no such folder; give a run folder")
