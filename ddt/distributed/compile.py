"""Compiling blocks: all blocks of a kind share one compilation, whatever the depth."""

import importlib.util
import logging
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch
from torch import nn

from ddt.errors import require
from ddt.model import Denoiser

log = logging.getLogger(__name__)
# Graphs of one piece of code, which all blocks are: with and without cached modulations, of model
# and guide, of one image and several, of the runs of a sweep. Sampling with a guide needs more than
# torch's default, 8.
RECOMPILE_LIMIT = 64


def missing_compiler(device: torch.device) -> str | None:
    """Return what torch's compiler lacks for a device, in words, or None where it lacks nothing."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "Triton"
        compilers, words = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"], "C compiler"
    else:
        compilers = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
        words = "C++ compiler"
    if not any(map(shutil.which, compilers)):
        return f"a {words} ({' or '.join(compilers)})"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers (Python.h)"
    return None


def compiles(key: str, chosen: bool | None, default: bool, device: torch.device) -> bool:
    """Return whether to compile: `chosen`, or where that is None `default` if there is a compiler.

    Raises UserError, naming the setting `key`, where `chosen` is true and there is no compiler.
    """
    if not (default if chosen is None else chosen):
        return False
    missing = missing_compiler(device)
    require(
        missing is None or chosen is None,
        f"{key}=true: torch's compiler needs {missing}, which is not found; install it, or give {key}=false",
    )
    if missing is not None:
        log.info("blocks are not compiled: torch's compiler needs %s, which is not found", missing)
    return missing is None


def compile_block(block: nn.Module, dynamic: bool) -> None:
    """Compile one block in place; arguments and errors as of `compile_blocks`."""
    # otherwise torch chooses kernels by timing them: other last bits in each process
    block.compile(fullgraph=True, dynamic=dynamic, options={"deterministic": True})


def allow_recompiles() -> None:
    """Let torch compile all graphs of a block's code; by its default some would run eagerly."""
    from torch._dynamo import config  # takes a second to import

    config.recompile_limit = RECOMPILE_LIMIT


def compile_blocks(network: Denoiser, dynamic: bool) -> None:
    """Compile each block of a denoiser in place, when it is first called.

    Names of weights do not change, and copies of the network are not compiled. dynamic: one graph
    for batches of any size, instead of one for each. A block that cannot be compiled whole is an
    error: no silent fallback to eager code.
    """
    from torch._dynamo import config  # takes a second to import

    allow_recompiles()
    # Under DDP torch would split each block at DDP's buckets to send gradients early; a graph per
    # block does that already
    config.optimize_ddp = False
    kinds = len(network.stacks)
    log.info("compiling %d kind%s of block at first use, which takes up to minutes", kinds, "s" if kinds > 1 else "")
    for block in network.all_blocks:
        compile_block(block, dynamic)
