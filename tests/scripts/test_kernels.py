"""The bytes of XL's compiled blocks on an H100, and how they are counted."""

import json

import pytest
from conftest import refusal, succeed

from ddt.model import DDT, layers
from ddt.model.cost import weight_macs
from scripts.benchmark.traffic import compiled_blocks

KERNELS = "scripts.benchmark.kernels"
BATCH, TOKENS, WIDTH = 64, 256, 1152
# MB of element-wise traffic and launches, products' too; 64 images in bf16
TRAINING = {("encoder", "training"): (2_468, 55), ("decoder", "training"): (3_439, 50)}
SAMPLING = {
    ("encoder", "sampling"): (795, 13),
    ("decoder", "sampling"): (907, 12),
    ("decoder", "sampling, kept modulations"): (907, 11),
}


def two_blocks(**sizes):
    """XL with one block in each half: a block is compiled once, whatever the depth."""
    return DDT(**sizes, patch_size=2, hidden_size=WIDTH, num_heads=16, depth=2, encoder_depth=1)


def compiled(training, with_assembly=False):
    cases = compiled_blocks(two_blocks, 4, 32, BATCH, "bf16", training, with_assembly)
    return {(case.stack, case.use): case for case in cases}


def block_flops(use):
    """FLOPs of a block's forward pass, by its weights."""
    block = layers.Block(WIDTH, 16)
    rows = {"encoder": BATCH, "decoder": BATCH * TOKENS}[use[0]] if "kept" not in use[1] else 0
    macs = BATCH * (TOKENS * weight_macs([block.mixer, block.mlp]) + 2 * TOKENS**2 * WIDTH)
    return 2 * (macs + rows * weight_macs([block.adaln]))


def check(cases, limits):
    """That no block moves more bytes or is launched in more pieces; its forward's FLOPs."""
    assert cases.keys() == limits.keys()
    for use, (most_mb, most_launches) in limits.items():
        case = cases[use]
        assert 0.9e6 * most_mb < case.bytes < 1e6 * most_mb, use
        assert case.launches <= most_launches, use
        assert sum(product.flops for product in case.graphs[0].products) == block_flops(use)


def test_a_training_block_moves_no_more_bytes_than_it_did():
    check(compiled(training=True), TRAINING)


@pytest.mark.slow
def test_a_sampling_block_moves_no_more_bytes_and_its_kernels_compile():
    cases = compiled(training=False, with_assembly=True)
    check(cases, SAMPLING)
    for case in cases.values():
        assert all(kernel.registers > 0 and kernel.spills == 0 for kernel in case.kernels)


@pytest.mark.slow
def test_a_block_without_its_kernels_is_seen(monkeypatch):
    monkeypatch.setattr(layers, "runs_kernels", lambda x: False)
    with pytest.raises(AssertionError, match="encoder"):
        check(compiled(training=True), TRAINING)


@pytest.mark.slow
def test_the_command_reports_blocks_and_steps(tmp_path):
    out = tmp_path / "kernels.json"
    succeed(KERNELS, "model=nano", "batch_size=8", "sampling_batch_size=8", f"out={out}")
    result = json.loads(out.read_text())
    assert [(block["stack"], block["use"]) for block in result["blocks"]] == [*TRAINING, *SAMPLING]
    step = result["steps"][0]
    assert step["seconds"] == pytest.approx(step["products"] + step["element-wise"] + step["others"])
    depth = 4 * result["blocks"][0]["bytes"] + 2 * result["blocks"][1]["bytes"]  # nano's encoder and decoder
    assert step["element-wise"] == pytest.approx(depth / 2.9e12)


def test_impossible_settings_are_refused(tmp_path):
    assert "copy_tbs=0" in refusal(KERNELS, "copy_tbs=0")
    assert "batch_size=0" in refusal(KERNELS, "batch_size=0")
    (tmp_path / "there.json").write_text("{}")
    assert "there.json: exists already" in refusal(KERNELS, f"out={tmp_path / 'there.json'}")
