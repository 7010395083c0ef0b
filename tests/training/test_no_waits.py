"""A training step, sampling and decoding on a GPU that is not there: nothing is left on the CPU,
and nothing waits for the device.
"""

import contextlib
import functools
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import picture_folder, small_vae, thinned, train_settings
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode

from ddt.data.stream import TrainingStream
from ddt.model import layers
from ddt.sampling import sample
from ddt.sampling.sample import sample_latents
from ddt.sampling.settings import SamplerSettings
from ddt.training.ema import EMA, ConstantDecay
from ddt.training.loop import train_steps, training_step
from ddt.training.meter import Meter
from ddt.training.run import build_run
from ddt.training.state import TrainingState
from ddt.training.throughput import Clock
from scripts.benchmark.fake_gpu import CUDA, backward, fake_gpu, gradients, place

COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)
VIT = "test_vit"


class NoWaits(TorchDispatchMode):
    """Refuses copies to or from the device that are not asked to run beside the host. That a value
    is read, fake tensors refuse themselves. strict: False lets the first step fill its caches.
    """

    strict = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if self.strict and function.overloadpacket in COPIES:
            source = args[1] if function.overloadpacket is torch.ops.aten.copy_ else args[0]
            beside = kwargs.get("non_blocking", False) or args[2:] == (True,)
            assert source.device == result.device or beside, f"a copy waits: {source.device} to {result.device}"
        return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("no_waits")
    picture_folder(root / "pictures", count=6)
    torch.manual_seed(0)
    save_file(timm.create_model(VIT, num_classes=0).state_dict(), root / "vit.safetensors")
    small_vae(root / "vae")
    return root


class Enough(Exception):
    """Ends the loop."""


SMALL = [
    "model.hidden_size=32", "model.num_heads=2", "model.depth=3", "model.encoder_depth=2", "model.patch_size=2",
    "data=folder", "data.image_size=32", "data.holdout_every=0", "trainer.global_batch_size=4",
    "trainer.log_every=1000", "trainer.save_every=1000", "trainer.preview_every=0", "trainer.validate_every=0",
    "trainer.mixed_precision=bf16", "trainer.clip_norm=1.0",
]  # fmt: skip
BARE = ["autoencoder=identity", "model.patch_size=8", "alignment=none"]


def full(folder):
    """An autoencoder, and an alignment to a target."""
    return [
        "autoencoder=sd_ft_ema", f"autoencoder.source={folder / 'vae'}", "autoencoder.revision=null",
        "alignment=repa_dinov2_b", f"alignment.target={VIT}", f"alignment.weights={folder / 'vit.safetensors'}",
        "alignment.align_depth=1",
    ]  # fmt: skip


@contextlib.contextmanager
def on_fake_gpu(folder, parts):
    """A run of training, its networks on a fake GPU, and what the loop works with."""
    run = build_run(train_settings(*SMALL, f"data.root={folder / 'pictures'}", *parts))
    trainer = run.settings.trainer
    stream = TrainingStream(run.images, 0, run.latent_shape, run.autoencoder.stochastic, 10**6)
    batch = stream[[0, 1, 2, 3]]
    ema = EMA(run.objective.denoiser, ConstantDecay(0.999))
    with fake_gpu() as mode:
        for network in (run.objective, ema.model):
            place(network)
        for frozen, constants in ((run.alignment.target, ("mean", "std")), (run.autoencoder, ("shift", "scale"))):
            if getattr(frozen, "network", None) is not None:
                place(frozen.network)
                for name in constants:
                    setattr(frozen, name, mode.from_tensor(getattr(frozen, name)).to(CUDA))
        accelerator = SimpleNamespace(device=CUDA, process_index=0, num_processes=1)
        optimizer = run.settings.optimizer.build(named_parameters=run.objective.named_parameters())
        state = TrainingState(run.objective, optimizer, {"ema": ema}, accelerator, trainer.mixed_precision)

        no_waits = NoWaits()

        def batches():
            for step in range(3):
                no_waits.strict = step > 0
                yield batch
            raise Enough

        session = SimpleNamespace(
            accelerator=accelerator, model=run.objective, state=state, batches=batches(), num_micro=1,
            clock=Clock(CUDA, 1, 4, 1, 0, "bf16"), progress=SimpleNamespace(update=lambda size: None),
            requests=SimpleNamespace(agreed=lambda in_a_row: ("", 0)),  # reads the values of the step before
            saver=SimpleNamespace(write_seconds=0.0),
        )  # fmt: skip
        yield run, session, no_waits


def train(folder, parts):
    """Take three steps, the last two without waits."""
    with on_fake_gpu(folder, parts) as (run, session, no_waits):
        with no_waits, pytest.raises(Enough):
            train_steps(run, session, functools.partial(training_step, run))
        assert session.state.step == 3
        everything = [
            *run.objective.parameters(),
            *session.state.ema.model.parameters(),
            *session.state.meter.sums.values(),
        ]
        assert {each.device for each in everything} == {CUDA}


def test_a_training_step_neither_waits_nor_leaves_the_gpu(folder):
    train(folder, full(folder))


@pytest.mark.parametrize("read", thinned([
    lambda norm: norm.item(), lambda norm: bool(norm > 0), lambda norm: norm[None][norm[None] > 0],
    lambda norm: norm.cpu(), lambda norm: torch.tensor([1.0]).to(norm.device),
], 2), ids=["item", "bool", "mask", "cpu", "to device"])  # fmt: skip
def test_a_wait_in_the_step_is_seen(folder, monkeypatch, read):
    end_step = Meter.end_step
    monkeypatch.setattr(Meter, "end_step", lambda self, norm, *rest: end_step(self, norm, *rest) or read(norm))
    with pytest.raises((AssertionError, DataDependentOutputException, DynamicOutputShapeException)) as caught:
        train(folder, BARE)
    assert "<lambda>" in [entry.name for entry in caught.traceback]


def test_a_tensor_left_on_the_cpu_is_seen(folder, monkeypatch):
    embed = layers.timestep_embedding
    monkeypatch.setattr(layers, "timestep_embedding", lambda t, dim: embed(t, dim) * torch.ones(dim))
    with pytest.raises(RuntimeError, match="cuda:0"):
        train(folder, BARE)


def test_sampling_and_decoding_neither_wait_nor_leave_the_gpu(folder, monkeypatch):
    grid = SamplerSettings.grid

    def real_grid(self):  # of the host's numbers, which are no fake ones
        with unset_fake_temporarily():
            return grid(self)

    monkeypatch.setattr(SamplerSettings, "grid", real_grid)
    # seeds are hashes of the noise, which has no values here, and only CUDA pins memory
    monkeypatch.setattr(sample, "image_generators", lambda noise: [torch.Generator() for _ in noise])
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    changes = [
        {}, {"recompute": "uniform:2", "cfg_interval": None}, {"solver": "heun"}, {"solver": "adams2"},
        {"solver": "sde"},
    ]  # fmt: skip
    ways = [SamplerSettings(num_steps=4, **each) for each in changes]
    with on_fake_gpu(folder, full(folder)) as (run, session, no_waits), torch.no_grad():
        network, shape = session.state.ema.network(), run.latent_shape
        noise, y = torch.zeros(2, *shape, device=CUDA), torch.zeros(2, dtype=torch.int64, device=CUDA)
        for settings in ways:
            sample_latents(network, noise, y, settings)  # fills caches
            with no_waits:
                latents = sample_latents(network, noise, y, settings)
            assert (latents.shape, latents.device) == (noise.shape, CUDA)
        with no_waits:
            images = run.autoencoder.decode(latents)
    assert (images.shape, images.dtype, images.device) == ((2, 3, 32, 32), torch.uint8, CUDA)


@pytest.mark.parametrize("tokens", [1, 16])
def test_gradients_of_the_fake_gpu_are_torchs(tokens):
    torch.manual_seed(0)
    block, at = layers.Block(48, 4), layers.Positions(*layers.rope_table(12, 4, 4), 4, 4)
    x, c = (torch.randn(2, n, 48, requires_grad=True) for n in (16, tokens))
    unused = torch.ones(3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x, c, at)
    inputs = [x, unused, c, *block.parameters()]
    wanted = torch.autograd.grad(y.sum(), inputs, retain_graph=True, allow_unused=True)
    for one, other in zip(gradients(y.sum(), inputs), wanted, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    backward(y.sum())
    backward(y.sum())
    torch.testing.assert_close(x.grad, 2 * wanted[0])
    assert unused.grad is None
