"""Shared fixtures: golden numbers, small networks, and a way to run the entry points as a user
does.
"""

import contextlib
import errno
import hashlib
import importlib
import io
import json
import logging
import mmap
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a hub; read when its client is imported
os.environ.setdefault("WANDB_MODE", "offline")  # nor for W&B

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hydra import compose, initialize_config_dir
from hydra._internal.config_repository import ConfigRepository
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from omegaconf import open_dict
from PIL import Image
from safetensors.torch import load_file, save_file

import ddt
import ddt.autoencoder
import ddt.checkpoint.format
from ddt.cli import CONF, typed
from ddt.logs import SteadyStream

ROOT = Path(__file__).resolve().parent.parent

# columns of metrics.jsonl that differ between equal runs
TIMINGS = (
    "images_per_second", "data_wait", "tflops_per_process", "mfu", "mfu_with_target", "gpu_memory_gib",
)  # fmt: skip
GOLDEN = ROOT / "tests" / "golden"
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # workers side by side share the cores


LONG = (  # files of more than ten seconds
    "training/test_resume.py", "training/test_training.py", "metrics/test_evaluation.py",
    "generation/test_generation.py", "objective/test_alignment.py", "test_cli.py", "test_config.py", "test_docs.py",
    "training/test_decoder_training.py", "scripts/test_kernels.py", "model/test_triton_kernels.py", "test_imports.py",
    "data/test_caching.py", "export/test_pipeline.py", "scripts/test_app.py", "scripts/test_gpu_check.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Long files first, so that workers, which take a file at a time, end together."""
    items.sort(key=lambda item: item.path.relative_to(ROOT / "tests").as_posix() not in LONG)


@pytest.fixture(scope="session", autouse=True)
def settings_are_parsed_once():
    """Let Hydra parse each file of settings once, and again where it changed: a third of what a
    refused command costs, and hundreds are called in a process.
    """
    load, parsed = ConfigRepository.load_config, dict[object, bytes]()

    def load_once(repository, config_path):
        source = repository._find_object_source(config_path=config_path, object_type=ObjectType.CONFIG)
        if source is None:
            return load(repository, config_path)
        file = Path(source.path.removeprefix("file://"), source._normalize_file_name(config_path))
        key = source.path, config_path, (file.stat().st_mtime_ns, file.stat().st_size) if file.is_file() else None
        if key not in parsed:
            parsed[key] = pickle.dumps(load(repository, config_path))
        return pickle.loads(parsed[key])  # a copy, which overrides change

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigRepository, "load_config", load_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keep what is made once on a machine with this session, shared by its workers."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDT_CACHE", str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"))
        yield


@pytest.fixture(scope="session")
def golden():
    return json.loads((GOLDEN / "golden.json").read_text())


@pytest.fixture(scope="session")
def samplers():
    return load_file(GOLDEN / "samplers.safetensors")


@pytest.fixture
def tiny():
    return ddt.load_released(GOLDEN / "tiny.weights.safetensors", encoder_depth=3, patch_size=2)


def picture(seed, width=24, height=20):
    """A picture of coloured noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def picture_folder(root, count=11, classes=2):
    """A folder with `count` pictures in each of some classes."""
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for k in range(count):
            picture(20 * label + k).save(root / f"class{label}" / f"{k:02d}.png")
    return root


SMALL = dict(in_channels=2, patch_size=2, hidden_size=32, num_heads=2, depth=3, encoder_depth=2, num_classes=5)
WIDE = dict(decoder_hidden_size=48, decoder_num_heads=4)  # a decoder of another width and other heads
# the networks whose encoder steps can share, by the name of a test's case
SHARING = {"ddt": (ddt.DDT, {}), "wide ddt": (ddt.DDT, WIDE), "ditdh": (ddt.DiTDH, WIDE)}


def randomised(model):
    """The network with all its weights moved, so that no zero hides an error."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def small_ddt(**changes):
    """A network of a few thousand weights, all of them random."""
    return small_network("ddt", **changes)


def small_network(case, **changes):
    """A network of `SHARING`, with the sizes of `small_ddt`."""
    kind, sizes = SHARING[case]
    torch.manual_seed(0)
    return randomised(kind(**(SMALL | sizes | changes)))


def small_vae(folder, channels=4, levels=4, **config):
    """An AutoencoderKL of the SD-VAE's kind with few, random weights, in a local folder."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    settings = dict(
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )
    AutoencoderKL(**{**settings, **config}).save_pretrained(folder)
    return str(folder)


def small_rae(folder, grid=4, patch_size=4, **changes):
    """Settings of an RAE with few, random weights, in local files: a timm network of 64 features,
    and a decoder of grid·patch_size pixels.
    """
    import timm

    from ddt.autoencoder.vit_decoder import ViTDecoder

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), folder / "encoder.safetensors")
    decoder = ViTDecoder(64, 32, 2, 64, num_heads=2, grid=grid, patch_size=patch_size)
    save_file(decoder.state_dict(), folder / "decoder.safetensors")
    files = {"encoder_weights": str(folder / "encoder.safetensors"), "decoder": str(folder / "decoder.safetensors")}
    return {"_target_": "ddt.autoencoder.RAE", "encoder": "test_vit", **files, "decoder_heads": 2, **changes}


# what a checkpoint holds of its run's settings, as far as it is read
RUN = {
    "name": "x",
    "seed": 3,
    "data": {"_target_": "ddt.data.images.Digits", "fingerprint": "f00", "image_size": 8},
    "alignment": None,
    "objective": {"_target_": "ddt.objective.FlowMatching"},
    "optimizer": {"_target_": "ddt.training.optimizer.adamw", "lr": 0.001},
    "trainer": {"global_batch_size": 4, "lr_schedule": "constant", "mixed_precision": "fp32", "ema_decay": 0.99},
}


def small_config(model, vae=None, target="ddt.model.DDT", **changes):
    """What a checkpoint's config.json holds of a network of `small_ddt`'s sizes, and `changes`."""
    sizes = dict(patch_size=2, hidden_size=32, num_heads=2, depth=3, encoder_depth=2)
    if target == "ddt.model.DiT":
        del sizes["encoder_depth"]
    identity = {"_target_": "ddt.autoencoder.Identity"}
    kl = {"_target_": "ddt.autoencoder.KLAutoencoder", "source": vae, "revision": None, "chunk_size": 2}
    network = {"_target_": target, **sizes, "in_channels": model.in_channels, "num_classes": model.num_classes}
    config = {
        "step": 7,
        "network": network,
        "latent_shape": [model.in_channels, 8, 8],
        "autoencoder": identity if vae is None else kl,
        "autoencoder_fingerprint": None if vae is None else ddt.autoencoder.build_autoencoder(kl).fingerprint,
        "sampler": {"num_steps": 4, "cfg_interval": [0.0, 0.9], "last_step": None},
        "class_names": list("abcdefghij"[: model.num_classes]),
    }
    return {**config, **changes}


def small_checkpoint(folder, vae=None, model=None, target="ddt.model.DDT", raw=None, **changes):
    """A checkpoint of a small network, of pixels or (vae: an autoencoder's folder) of latents.

    raw: the raw weights are these times the EMA weights; None: there are none.
    """
    model = model or small_ddt(in_channels=1 if vae is None else 4)
    ema = model.state_dict()
    weights = {"ema": ema} if raw is None else {"ema": ema, "model": {name: raw * ema[name] for name in ema}}
    ddt.checkpoint.format.write_checkpoint(folder, small_config(model, vae, target, **changes), **weights)
    return folder


TO_TRANSFORMERS = {  # Meta's and timm's names → those of transformers' Dinov2Model
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "blocks.": "encoder.layer.",
    ".attn.proj.": ".attention.output.dense.",
    ".ls1.gamma": ".layer_scale1.lambda1",
    ".ls2.gamma": ".layer_scale2.lambda1",
}


def to_transformers(state):
    """The state dict as transformers saves it: other names, and q, k and v apart."""
    result = {}
    for name, value in state.items():
        new = name
        for old, theirs in TO_TRANSFORMERS.items():
            new = new.replace(old, theirs)
        new = new.replace("norm.", "layernorm.") if new.startswith("norm.") else new
        if ".attn.qkv." in new:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                result[new.replace(".attn.qkv.", f".attention.attention.{part}.")] = rows.clone()
        else:
            result[new] = value
    return result


def inputs(batch=3, channels=2, height=8, width=8, classes=5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, height, width, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.randint(classes, (batch,), generator=generator)


BROWSER = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    """A running Chromium of Playwright."""
    assert Path(BROWSER).is_file(), f"no {BROWSER}: apt-get install chromium"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=BROWSER, args=FLAGS) as running:
        yield running


@pytest.fixture(scope="module")
def one_thread():
    """At these sizes, threads on a busy machine cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train_settings(*overrides):
    """Compose as train.py does; return its settings."""
    return composed("train", "ddt.training.settings.TrainSettings", *overrides)


def composed(command, settings, *overrides):
    """Compose as a command does; return its settings."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(command, overrides=list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        name = cfg.name  # resolved while Hydra's part is there
        with open_dict(cfg):
            del cfg.hydra
            cfg.name = name
        return typed(cfg, settings)


def rows(run_dir):
    """The logged values of a run that are no timings."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def copy_repository(folder):
    """Copy what belongs to the repository, without what was made in it."""
    made = (".venv", ".git", "site", "runs", "cache", "checkpoints", ".*_cache", "__pycache__")
    return shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*made))


@contextlib.contextmanager
def small_disk(size=4096):
    """A disk on which no file becomes larger than `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def no_mmap(monkeypatch):
    """A file system without mmap."""

    def refusing(*args, **kwargs):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(mmap, "mmap", refusing)


def full_disk_stream():
    """Return a text stream on a full disk, on which every write fails."""
    return io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True)


def run(*command, cwd=ROOT, timeout=300, **environment):
    """Run an entry point as a user does; return the finished process with its output as text."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def thinned(values, every):
    """Return values, or tuples of them, for parametrize: every `every`-th from the first runs by
    default, the others with --slow.
    """
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*row, marks=() if n % every == 0 else pytest.mark.slow) for n, row in enumerate(rows)]


def succeed(script, *arguments):
    """Call an entry point in this process; it must end without an error."""
    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        try:
            module.main()
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)  # as a process of its own leaves none


def run_inside(script, *arguments):
    """Call an entry point in this process, in the present folder; return its status and what it
    said, as `run` does.
    """
    said = SteadyStream(io.StringIO())  # which logging_setup leaves in place, so that tqdm knows the handler's stream
    handler = logging.StreamHandler(said)
    root, level, status = logging.getLogger(), logging.getLogger().level, 0
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stderr(said):
            succeed(script, *arguments)
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
        said.write(f"{exit_.code}\n")
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    return SimpleNamespace(returncode=status, stderr=said.getvalue())


def refusal(script, *arguments):
    """Call an entry point in this process with arguments that it must refuse; return what it says
    on exit.
    """
    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        try:
            with pytest.raises(SystemExit) as exit_:
                module.main()
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
    assert exit_.value.code not in (0, None)
    return str(exit_.value.code)


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """Random weights of the whole Inception network, in the file format of the real ones; 95 MB, so
    drawn anew.
    """
    expected = json.loads((GOLDEN / "eval" / "expected.json").read_text())["e2e_random_inception"]
    rng = np.random.RandomState(expected["weights_seed"])  # the generator of the golden numbers
    state, digest = {}, hashlib.sha256()
    for name, shape in sorted(json.loads((GOLDEN / "eval" / "inception_param_shapes.json").read_text())):
        if name.startswith("fc."):
            values = rng.standard_normal(shape) * 0.5
        elif name.endswith("conv.weight"):
            values = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        else:
            bounds = {
                "bn.weight": (0.8, 1.2),
                "bn.bias": (-0.1, 0.3),
                "bn.running_mean": (-0.2, 0.2),
                "bn.running_var": (0.7, 1.3),
            }
            values = rng.uniform(*bounds[".".join(name.split(".")[-2:])], shape)
        if name.startswith("Mixed_7c.") and name.endswith((".bn.weight", ".bn.bias")):
            values = values * 0.25
        state[name] = torch.from_numpy(values.astype(np.float32))
        digest.update(name.encode() + state[name].numpy().tobytes())
    assert digest.hexdigest() == expected["weights_sha256"]
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(state, path)
    return path
