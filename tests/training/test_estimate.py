"""Estimates against method.md, ddt.model.cost, sums by hand, and what autograd saves."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    SHARING,
    composed,
    inputs,
    picture_folder,
    refusal,
    run_inside,
    small_ddt,
    small_network,
    small_vae,
    thinned,
)

from ddt.autoencoder import Identity, KLAutoencoder
from ddt.config import Choice
from ddt.data.images import Digits, Outline
from ddt.data.photos import PHOTOS
from ddt.errors import UserError
from ddt.model import DiT
from ddt.model.cost import network_macs
from ddt.model.layers import positions
from ddt.objective import FlowMatching
from ddt.objective.alignment import REPA, AlignmentLoss, Projector
from ddt.sampling.cost import sampling_macs
from ddt.sampling.settings import SamplerSettings
from ddt.training.cost_growth import plot_growth
from ddt.training.ema import EMA, ConstantDecay
from ddt.training.estimate import (
    IMAGENET,
    Recipe,
    activation_bytes,
    assumed_rate,
    build_recipe,
    data_outline,
    disk,
    estimate,
    exchanged_bytes,
    flops,
    measured_rate,
    memory,
    report,
    saved_steps,
)
from ddt.training.optimizer import adamw
from ddt.training.settings import TrainerSettings
from ddt.training.state import TrainingState
from ddt.training.throughput import PEAKS, training_flops

pytestmark = pytest.mark.usefixtures("one_thread")
PERIODS = dict(log_every=1, validate_every=0, preview_every=0, num_workers=0, warmup_steps=0)
TRAINER = TrainerSettings(
    max_steps=10, global_batch_size=8, micro_batch_size=None, mixed_precision="bf16", num_processes=None, ema_decay=0.9,
    lr_schedule="constant", save_every=4, **PERIODS,
)  # fmt: skip
RATE = assumed_rate("H100", 0.5, None, "bf16")


def aligned(model, width=7, features=3):
    """Objective of a small network with a projector."""
    return FlowMatching(model, alignment=AlignmentLoss(Projector(32, width, features), 1, 0.5, (4, 4), (4, 4)))


def small_recipe(trainer=None, **changes):
    """A recipe of a few thousand weights, with latents (2, 8, 8) and 16 tokens."""
    settings = dict(
        objective=aligned(small_ddt().to("meta")), target=None, autoencoder=Identity(), shape=(2, 8, 8), image_size=8,
        num_images=40, cached=True, align_until=math.inf, trainer=dataclasses.replace(TRAINER, **(trainer or {})),
        sampler=SamplerSettings(num_steps=10), gpus=1, num_samples=100,
    )  # fmt: skip
    return Recipe(**(settings | changes))


def recipe_of(*overrides):
    """Recipe of train.py with these overrides."""
    return build_recipe(composed("estimate", "ddt.training.settings.EstimateSettings", "gpus=8", *overrides))


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    thinned([("xl_22en6de", 674_646_352), ("b_8en4de", 130_262_800), ("l_20en4de", 457_648_144)], 3),
)
def test_published_recipes_have_the_parameters_and_flops_of_the_method(name, parameters):
    recipe = recipe_of(f"model={name}", "data=in256", "sampler.recompute=uniform:5")
    model, work = recipe.objective.denoiser, flops(recipe)
    assert num_parameters(model) == parameters
    assert work["forward"] == 2 * network_macs(model, 32, 32).total
    assert work["training"] == training_flops(recipe.objective, (4, 32, 32))
    assert work["sampling"] == 2 * sampling_macs(model, 32, 32, SamplerSettings(recompute="uniform:5"))
    # DINOv2-B/14 on 224 px: patches of 14×14, 12 blocks over 256 tokens and the class, by hand
    blocks = 12 * (12 * 257 * 768**2 + 2 * 257**2 * 768)
    assert work["target"] == 2 * (256 * 768 * 3 * 14**2 + blocks)
    assert num_parameters(recipe.target.network) == 85_724_928
    assert num_parameters(recipe.autoencoder.network) == 83_653_863
    assert work["all_training"] == 400_000 * 256 * (work["training"] + work["target"])
    assert recipe.num_images == 1_281_167


@pytest.mark.slow
def test_fine_tuning_at_512_px_takes_latents_of_64_and_does_not_fit():
    recipe = recipe_of("experiment=xl_512")
    found = estimate(recipe, RATE)
    assert recipe.shape == (4, 64, 64)
    assert not found["memory"]["fits"]
    micro = int(found["memory"]["fix"].partition(",")[0].removeprefix("trainer.micro_batch_size="))
    rest, each = found["memory"]["total"] - found["memory"]["activations"], found["memory"]["activations"] / 32
    assert rest + micro * each <= 80e9 < rest + 2 * micro * each


def test_a_small_recipe_by_hand():
    recipe = small_recipe(trainer=dict(ema_decays=(0.5,), ema_powers=(0.1,), snapshot_every=3), align_until=4)
    found = estimate(recipe, RATE)
    network = num_parameters(small_ddt())
    projector = (32 * 7 + 7) + (7 * 7 + 7) + (7 * 3 + 3)
    assert found["parameters"]["denoiser"] == network
    assert found["parameters"]["projector"] == projector
    forward = network_macs(small_ddt(), 8, 8).total
    step = 6 * (forward + 16 * (32 * 7 + 7 * 7 + 7 * 3))
    work = 8 * (4 * step + 6 * 6 * forward)  # 4 steps with the projector, 6 without
    assert found["flops"]["all_training"] == work
    seconds = work / (0.5 * PEAKS["H100"])
    assert found["time"]["training_hours"] == pytest.approx(seconds / 3600)
    assert found["time"]["images_per_second"] == pytest.approx(80 / seconds)
    assert found["epochs"] == 2
    held = found["memory"]
    assert held["weights"] == held["gradients"] == held["AdamW moments"] / 2 == 4 * (network + projector)
    assert held["EMA weights"] == 3 * 4 * network
    checkpoint = 4 * (3 * (network + projector) + 3 * network)
    assert found["disk"]["checkpoint"] == checkpoint
    # checkpoints of steps 4, 8, 10; snapshots of 3, 6, 9, 10; a record: 2 channels of 8×8, float16
    assert found["disk"]["run"] == 3 * checkpoint + 4 * 4 * network
    assert found["disk"]["cache"] == 40 * 2 * 8 * 8 * 2


def test_a_checkpoint_is_as_large_as_training_says():
    objective = aligned(small_ddt())
    emas = {"ema": EMA(objective.denoiser, ConstantDecay(0.9))}
    optimizer = adamw(objective.named_parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    cpu = SimpleNamespace(device=torch.device("cpu"))
    state = TrainingState(objective, optimizer, emas, cpu)
    assert disk(small_recipe())["checkpoint"] == state.bytes()


def saved_bytes(objective, batch, bf16):
    """Bytes that autograd saves in a real forward."""
    x, t, y = inputs(batch=batch)
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        objective(x, y, x, t, t, torch.randn(batch, 16, 3))
    return sum(size for size, _ in held.values())


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("case", SHARING)
def test_activations_are_what_autograd_saves(case, bf16):
    objective = aligned(small_network(case))
    expected = (saved_bytes(objective, 8, bf16) - saved_bytes(objective, 4, bf16)) / 4
    assert activation_bytes(objective.to("meta"), (2, 8, 8), bf16) == pytest.approx(expected, rel=1e-3)
    assert type(positions(16, 4, 4, torch.device("cpu")).cos) is torch.Tensor  # the kept table is a real one


def test_activation_checkpointing_keeps_the_inputs_of_blocks_and_recomputes():
    deep = {"depth": 8, "encoder_depth": 5}
    kept, again = (
        small_recipe(objective=FlowMatching(small_ddt(activation_checkpointing=value, **deep).to("meta")))
        for value in (False, True)
    )
    assert memory(again)["activations"] < memory(kept)["activations"] / 3
    inside = 8 * 16 * 32 * 2  # 8 blocks' inputs, of 16 tokens of width 32 in bf16
    assert memory(again)["activations"] > 8 * inside
    work, base = flops(again), flops(kept)
    assert base["recomputed"] == 0
    assert work["all_training"] == base["all_training"] * 4 / 3


def test_selective_checkpointing_keeps_what_products_return():
    deep, heads, tokens, width = {"depth": 8, "encoder_depth": 5}, 2, 16, 32
    bytes_of = {
        kind: memory(small_recipe(objective=FlowMatching(small_ddt(activation_checkpointing=kind, **deep).to("meta"))))[
            "activations"
        ]
        for kind in (False, "selective", True)
    }
    inner = int(8 * width / 3)
    # qkv, attention with a float32 sum a head and token, its projection, w1, w3, w2: in bf16
    block = tokens * (2 * (3 * width + width + width + 2 * inner + width) + 4 * heads)
    adaln = 6 * width * 2 * (5 + 3 * tokens)  # of 5 encoder blocks a vector, of 3 decoder blocks one per token
    assert bytes_of["selective"] - bytes_of[True] == 8 * (8 * block + adaln)
    assert bytes_of["selective"] < bytes_of[False]
    selective = small_recipe(objective=FlowMatching(small_ddt(activation_checkpointing="selective").to("meta")))
    assert flops(selective)["recomputed"] == 0


def test_the_baseline_has_no_encoder():
    model = DiT(in_channels=2, patch_size=2, hidden_size=32, num_heads=2, depth=3, num_classes=5)
    found = estimate(small_recipe(objective=FlowMatching(model.to("meta"))), RATE)
    assert (found["parameters"]["encoder"], found["parameters"]["decoder"]) == (0, num_parameters(model))
    assert "encoder" not in report(found)


def test_sharding_divides_what_ddp_repeats():
    whole, sharded = (
        memory(small_recipe(trainer=dict(parallelism=kind), gpus=4, align_until=0)) for kind in ("ddp", "fsdp")
    )
    for part in ("weights", "gradients", "AdamW moments", "EMA weights"):
        assert sharded[part] == math.ceil(whole[part] / 4)
    assert (whole["buckets of DDP"], sharded["buckets of DDP"]) == (0, 0)  # gradients lie in them
    assert whole["gathered by FSDP"] == 0 < sharded["gathered by FSDP"]
    assert whole["activations"] == sharded["activations"]
    alone = memory(small_recipe())
    assert alone["activations"] == 4 * whole["activations"]
    assert alone["buckets of DDP"] == 0
    assert alone["total"] == sum(size for part, size in alone.items() if part != "total")


def test_micro_batches_add_up_whole_gradients():
    whole, sharded = (
        memory(small_recipe(trainer=dict(parallelism=kind, micro_batch_size=1), gpus=4)) for kind in ("ddp", "fsdp")
    )
    assert whole["weights"] == whole["gradients"] == sharded["gradients"] == whole["buckets of DDP"]
    assert sharded["buckets of DDP"] == 0


def test_blocks_are_gathered_in_the_precision_of_the_run_and_kept_where_asked_for():
    def of(**trainer):
        recipe = small_recipe(trainer=dict(parallelism="fsdp", **trainer), gpus=4)
        return memory(recipe)["gathered by FSDP"], exchanged_bytes(recipe) / (3 / 4)

    blocks = [sum(p.numel() for p in block.parameters()) for block in small_recipe().objective.denoiser.all_blocks]
    (freed, sent), (half, sent_half) = of(mixed_precision="fp32"), of(mixed_precision="bf16")
    kept, sent_kept = of(mixed_precision="bf16", reshard_after_forward=False)
    assert freed - half == 2 * 2 * max(blocks)
    assert sent - sent_half == 2 * 2 * sum(blocks)
    assert kept - half == 2 * (sum(blocks) - 2 * max(blocks))
    assert sent_half - sent_kept == 2 * sum(blocks)


def test_bytes_sent_per_step():
    trained = num_parameters(small_recipe().objective)
    assert exchanged_bytes(small_recipe()) == 0
    assert exchanged_bytes(small_recipe(gpus=4)) == 2 * 3 / 4 * 4 * trained
    recipe = small_recipe(trainer=dict(parallelism="fsdp", micro_batch_size=1, mixed_precision="fp32"), gpus=4)
    network = num_parameters(recipe.objective.denoiser)
    assert network < trained  # a projector
    # two micro-batches gather it twice and the projector once, the last hands out gradients
    assert exchanged_bytes(recipe) == 3 / 4 * 4 * (2 * (2 * network + trained - network) + trained)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, [4, 8, 10]),
        ({"save_every": 0}, [10]),
        ({"save_every": 5}, [5, 10]),
        ({"save_every": 1, "keep_last": 2}, [9, 10]),
        ({"save_every": 1, "keep_last": 2, "keep_every": 5}, [5, 9, 10]),
        ({"save_every": 1, "keep_last": 2, "keep_best": "validation_loss", "validate_every": 1}, [1, 9, 10]),
    ],
    ids=str,
)
def test_checkpoints_that_stay(changes, steps):
    assert saved_steps(dataclasses.replace(TRAINER, **changes)) == steps


def test_sizes_of_data_are_those_of_the_data():
    digits = Digits()
    expected = Outline(digits.channels, digits.image_size, 10, len(digits.labels))
    assert data_outline(Choice("ddt.data.images.Digits", {}), "digits", None) == expected
    photos = Choice("ddt.data.photos.Photos", {"image_size": 64, "crops": 200})
    assert data_outline(photos, "photos", None) == Outline(3, 64, len(PHOTOS), 200 * len(PHOTOS))
    assert {*IMAGENET} == {path.stem for path in (ROOT / "conf" / "data").glob("in*.yaml")}


def test_the_size_of_a_folder_is_inferred_where_its_images_are_there(tmp_path):
    picture_folder(tmp_path / "images", count=3)
    recipe = recipe_of("data=folder", f"data.root={tmp_path / 'images'}", "num_classes=2", "gpus=1")
    assert (recipe.image_size, recipe.shape) == (32, (3, 32, 32))


def test_an_autoencoder_folder_is_counted(tmp_path):
    folder = small_vae(tmp_path / "vae", levels=3)
    real, outline = KLAutoencoder(folder), KLAutoencoder.outline({"source": folder})
    assert outline.latent_shape(3, 32) == real.latent_shape(3, 32) == (4, 8, 8)
    assert num_parameters(outline.network) == num_parameters(real.network)
    assert outline.network.quant_conv.weight.is_meta
    with pytest.raises(UserError, match=r"autoencoder\.source=a/b: its shape is not known here; give a local folder"):
        KLAutoencoder.outline({"source": "a/b"})


def test_a_target_without_weights_is_a_target():
    outline = REPA("resnet18.a1_in1k").build_target(64, outline=True)
    assert (outline.grid, outline.num_features) == ((4, 4), 256)
    assert all(parameter.is_meta for parameter in outline.network.parameters())


SHAPE = (4, 32, 32)


def benchmark_file(tmp_path, **changes):
    """A result of scripts/benchmark."""
    common = {"images": 8, "case": "b_8en4de, batch 8"}
    rows = [
        {"part": "training", "way": "ours", "seconds": 2.0, "flops": 4e12, **common},
        {"part": "training", "way": "compiled", "seconds": 1.0, "flops": 3e12, **common},
        {"part": "training", "way": "plain", "seconds": 1.0, "flops": 9e12, **common},
        {"part": "sampling", "way": "ours", "seconds": 1.0, "flops": 5e12, **common},
        {"part": "sampling", "not_run": "out of time"},
        {"part": "training", "way": "ours", "seconds": 1.0, "flops": 7e12, "images": 8, "case": "batch 8, aligned"},
    ]
    content = {
        "kind": "benchmark", "rows": rows, "matmul": {"flops_per_second": 1e13, "dtype": "bf16"},
        "machine": {"device": "NVIDIA A100-SXM4-80GB"}, "settings": {"model": "b_8en4de"}, "command": "…",
        "date": "2026-01-02T03:04:05+00:00", **changes,
    }  # fmt: skip
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def test_a_measured_rate_is_the_fastest_row_that_is_ours(tmp_path):
    speed = measured_rate(str(benchmark_file(tmp_path)), None, "bf16", "b_8en4de", False, SHAPE, 8)
    assert (speed.training, speed.sampling, speed.memory, speed.measured) == (3e12, 5e12, 80e9, True)
    found = estimate(small_recipe(), speed)
    assert found["time"]["training_hours"] == found["flops"]["all_training"] / 3e12 / 3600
    assert found["time"]["sampling_hours"] == found["flops"]["all_sampling"] / 5e12 / 3600
    said = report(found)
    assert "measured: NVIDIA A100-SXM4-80GB, 2026-01-02 (training b_8en4de, batch 8, compiled; sampling" in said
    assert "ASSUMED" not in said
    other = measured_rate(str(benchmark_file(tmp_path)), None, "bf16", "xl_22en6de", True, SHAPE, 8)
    assert (other.training, other.sampling) == (7e12, 5e12)
    assert other.source.endswith("; training of b_8en4de and sampling of b_8en4de, ASSUMED for xl_22en6de too")


def gpu_check_file(tmp_path, **changes):
    """A result of scripts/gpu_check.sh."""
    common = {"part": "training", "case": "no alignment", "way": "ours compiled", "latent": [4, 32]}
    timed = [
        {"model": "b_8en4de", "images": 64, "seconds": 1.0, "flops": 3e12, "peak_bytes": 30e9, **common},
        {"model": "b_8en4de", "images": 32, "seconds": 1.0, "flops": 2e12, "peak_bytes": 20e9, **common},
        {
            "model": "b_8en4de",
            "images": 16,
            "seconds": 1.0,
            "flops": 1e12,
            "peak_bytes": 90e9,
            **common,
            "way": "plain",
        },
        {"model": "xl_22en6de", "images": 64, "seconds": 1.0, "flops": 8e12, "peak_bytes": 70e9, **common},
        {"model": "xl_22en6de", "part": "sampling", "case": "guided", "way": "ours", "seconds": 1.0, "flops": 6e12},
    ]
    rows = [{"check": "training", "row": row} for row in timed] + [{"check": "golden numbers", "row": None}]
    machine = {"device": "NVIDIA A100-SXM4-80GB"}
    content = {
        "kind": "gpu_check",
        "calls": [
            {"date": "2026-01-02T03:04:05+00:00", "machine": machine, "rows": rows[:3]},
            {"date": "2026-01-02T03:14:05+00:00", "machine": machine, "rows": rows[3:]},
        ],
        **changes,
    }
    path = tmp_path / "gpu_check.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_a_gpu_check_tells_rates_and_the_activations_of_compiled_blocks(tmp_path):
    path = gpu_check_file(tmp_path)
    speed = measured_rate(path, None, "bf16", "b_8en4de", False, SHAPE, 100)
    assert (speed.training, speed.sampling, speed.memory) == (3e12, 6e12, 80e9)
    assert measured_rate(path, None, "bf16", "b_8en4de", False, SHAPE, 20).training == 2e12  # the nearest batch
    assert speed.activations == 10e9 / 32
    assert speed.source.endswith("sampling guided, ours); sampling of xl_22en6de, ASSUMED for b_8en4de too")
    recipe = small_recipe()
    assert memory(recipe, speed.activations)["activations"] == 10e9 / 32 * recipe.trainer.micro_batches(1)[0]
    for model, shape in (("xl_22en6de", SHAPE), ("b_8en4de", (4, 64, 64))):  # one batch; another latent
        assert measured_rate(path, None, "bf16", model, False, shape, 8).activations is None
    for wrong in ({"calls": []}, {"calls": [{"rows": []}]}, {"kind": "else"}):
        with pytest.raises(UserError, match="is no result of these; give a benchmark"):
            measured_rate(gpu_check_file(tmp_path, **wrong), None, "bf16", "b_8en4de", False, SHAPE, 8)


def test_a_processor_that_was_measured_has_no_known_memory(tmp_path):
    path = benchmark_file(tmp_path, machine={"device": "AMD EPYC"}, matmul={"dtype": "fp32"})
    said = report(
        estimate(
            small_recipe(trainer={"mixed_precision": "fp32"}),
            measured_rate(str(path), None, "fp32", "b_8en4de", False, SHAPE, 8),
        )
    )
    assert "device unknown: give memory_gb=" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "sharing"}, "is no result of these"),
        ({"rows": None}, "is no result of these"),
        ({"machine": {}}, "is no result of these"),
        ({"rows": [{"part": "training", "way": "ours", "seconds": 0, "flops": 1}]}, "is no result of"),
        ({"rows": []}, "measured no training"),
        ({"rows": [{"part": "training", "way": "ours", "case": "", "seconds": math.nan, "flops": 1}]}, "measured no"),
        ({"matmul": {"dtype": "fp32"}}, "was measured in fp32, this recipe computes in bf16"),
    ],
    ids=str,
)
def test_files_that_are_no_benchmark_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        measured_rate(str(benchmark_file(tmp_path, **changes)), None, "bf16", "b_8en4de", False, SHAPE, 8)


def test_the_command_says_what_is_assumed_and_writes_a_file(tmp_path):
    out = tmp_path / "x" / "cost.json"
    done = run_inside(
        "scripts.estimate", "model=b_8en4de", "data=in256_latents", "alignment=none", "gpus=2", f"out={out}"
    )
    assert done.returncode == 0
    said = dict(line.split("  ", 1) for line in done.stderr.splitlines() if line[:1].strip())
    assert said["rate"].strip().startswith("ASSUMED: 40% of H100's data-sheet rate")
    assert "130,262,800" in said["parameters"]
    assert said["latent cache"].strip() == "16.4 kB per image, 21 GB in all"
    assert "assumed: 2 GPUs are 2 times as fast as one" in done.stderr
    found = json.loads(out.read_text())
    assert found["disk"]["cache"] == 1_281_167 * 2 * 8 * 32 * 32
    assert found["time"]["training_gpu_hours"] == 2 * found["time"]["training_hours"]


@pytest.mark.slow
def test_growth_passes_through_the_recipe_itself(tmp_path):
    """Where an axis holds the recipe's own value, the curve has the estimate's number."""
    settings = composed(
        "estimate", "ddt.training.settings.EstimateSettings", "model=nano", "data=digits", "gpus=2",
        "trainer.micro_batch_size=8", "sampler.recompute=uniform:5", "model.encoder_depth=3",
    )  # fmt: skip
    recipe = build_recipe(settings)
    sizes, depths, encoders, batches, processes = plot_growth(settings, recipe, tmp_path / "growth.png")
    work, depth = flops(recipe), settings.model.settings["depth"]

    def at(panel, point, curve):
        return panel.curves[curve][panel.points.index(point)]

    assert at(sizes, 8, "whole forward") == pytest.approx(work["forward"] / 1e9)
    assert at(sizes, 16, "attention") == pytest.approx(16 * at(sizes, 8, "attention"))
    assert at(depths, depth, "whole forward") == pytest.approx(work["forward"] / 1e9)
    assert at(encoders, 3, "at one of 5 steps") == pytest.approx(work["sampling"] / 1e12)
    assert at(encoders, 3, "encoder at every step") > at(encoders, 3, "at one of 5 steps")
    assert at(batches, 8, "none") == pytest.approx(memory(recipe)["total"] / 1e9)
    assert at(batches, 64, "none") > at(batches, 64, "selective") > at(batches, 64, "full")
    assert at(processes, 2, "DDP") == pytest.approx(exchanged_bytes(recipe) / 1e9)
    assert at(processes, 1, "FSDP") == 0
    assert (tmp_path / "growth.png").read_bytes()[:4] == b"\x89PNG"
    said = refusal("scripts.estimate", "model=dit_nano", f"plot={tmp_path / 'x.png'}")
    assert not (tmp_path / "x.png").exists()
    assert said.startswith(f"plot={tmp_path / 'x.png'}: needs a network with an encoder")


@pytest.mark.slow
def test_growth_of_a_recipe_whose_own_depths_and_steps_are_beyond_an_axis(tmp_path):
    out = tmp_path / "new" / "growth.pdf"
    changes = [
        "alignment=dispersive", "alignment.align_depth=4", "objective.base_depth=4",
        "sampler.num_steps=3", "sampler.last_step=null", "trainer.global_batch_size=7",
    ]  # fmt: skip
    done = run_inside("scripts.estimate", "model=nano", *changes, f"plot={out}")
    assert done.returncode == 0, done.stderr
    assert out.read_bytes()[:4] == b"%PDF"
    assert "warning" not in done.stderr
    assert "subset" not in done.stderr  # what matplotlib's writer of PDFs logs of fonts


def test_in_fp32_the_time_is_unknown():
    done = run_inside("scripts.estimate", "model=dit_nano")
    assert done.returncode == 0
    assert "rate            not known: H100's data sheet tells of bf16 and fp16; give measured=FILE" in done.stderr
    assert "training        not known\n" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    thinned(
        [
            (["gpus=0"], "gpus=0: must be at least 1"),
            (["gpus=3"], "trainer.global_batch_size=64 cannot be divided among 3 processes"),
            (["trainer.num_processes=2"], "trainer.num_processes=2: has no effect here; give gpus=2"),
            (["trainer.parallelism=fsdp"], "trainer.parallelism=fsdp: needs several processes"),
            (["measured=x.json", "device=A100"], "device=A100: has no effect with measured="),
            (["measured=nowhere.json"], "measured=nowhere.json: no such file; give a benchmark"),
            (["memory_gb=0"], "memory_gb=0.0: must be above 0"),
            (["share=2"], "share=2: must lie in 0..1"),
            (["device=H900"], "device=H900: its rate is not known here; choose from H200, "),
            (
                ["data=folder"],
                "data.image_size: data=folder does not tell it without being opened; give data.image_size=",
            ),
            (
                ["data=folder_256"],
                "num_classes: data=folder_256 does not tell it without being opened; give num_classes=",
            ),
            (["num_classes=7"], "num_classes=7: data=digits has 10; leave it out"),
            (["num_classes=0"], "num_classes=0: must be at least 1"),
            (["autoencoder=kl"], "autoencoder.source: not set; give autoencoder.source=…"),
            (["model=dit_nano", "sampler.recompute=uniform:5"], "sampler.recompute: DiT has no encoder to share"),
            (["sampler.solver=adaptive"], "sampler.solver=adaptive: chooses its own steps"),
            (["sampler.recompute=dp:5"], "sampler.recompute=dp:5: is fitted to a trained model"),
            (["model.patch_size=3"], "model.patch_size=3 does not divide the latent size 8×8"),
            (["optimizer=adamw"], "optimizer: has no effect here"),
            (["out=cost.txt"], "out=cost.txt: give a .json file"),
        ],
        3,
    ),
    ids=str,
)
def test_wrong_settings_are_one_line(arguments, message):
    said = refusal("scripts.estimate", *arguments)
    assert said.startswith(message)
    assert "\n" not in said
