"""From noise to latents: `sample_latents` joins guidance, sharing and solver; `sample` is public.

Shapes: B batch, C channels, H W latent size.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddt.errors import require
from ddt.model import Denoiser
from ddt.sampling.graphs import Function, direct
from ddt.sampling.guidance import check_guided
from ddt.sampling.settings import LastStep, SamplerSettings
from ddt.sampling.sharing import CACHE_BYTES, GuidedVelocity
from ddt.sampling.solvers import SOLVERS, DiffusionName

Observer = Callable[[int, float | Tensor, Tensor, Tensor], None]  # step, t, x_t and v (B, C, H, W)


def check_inputs(model: Denoiser, noise: Tensor, y: Tensor) -> None:
    """Raise UserError unless noise (B, C, H, W) and y (B,) suit the network and each other.

    On a GPU the values of y are not checked: no device sync.
    """
    require(
        noise.ndim == 4 and noise.shape[1] == model.in_channels,
        f"noise has shape {tuple(noise.shape)}: expected (B, {model.in_channels}, H, W)",
    )
    require(
        y.ndim == 1 and not y.is_floating_point(),
        f"y has shape {tuple(y.shape)} and dtype {y.dtype}: expected (B,) int64",
    )
    require(
        y.device.type != "cpu" or len(y) == 0 or bool((y >= 0).all() and (y <= model.num_classes).all()),
        f"y={y.tolist() if y.device.type == 'cpu' else '…'}: classes must lie in 0..{model.num_classes - 1}",
    )
    require(len(noise) == len(y), f"noise has {len(noise)} rows and y has {len(y)}: give one class for each")


def check_guide(model: Denoiser, guide: Denoiser, settings: SamplerSettings) -> None:
    """Raise UserError unless a guide has the model's channels and classes and an effect."""
    check_guided(settings.cfg_scale)
    for name in ("in_channels", "num_classes"):
        ours, theirs = getattr(model, name), getattr(guide, name)
        require(
            ours == theirs, f"guide: has {name}={theirs}, the model {ours}; give a weaker checkpoint of the same data"
        )


def step_noise_fn(noise: Tensor, step_noise: Tensor | None, num_steps: int) -> Callable[[int], Tensor]:
    """Return the function step → noise (B, C, H, W) of a stochastic solver, to be called in order.

    step_noise: (num_steps or num_steps − 1, B, C, H, W), UserError for another shape; None samples
    from one generator per image, seeded by its starting noise (B, C, H, W): the same image on any
    device, in any batch.
    """
    if step_noise is not None:
        rows = max(num_steps - 1, 0)
        require(
            step_noise.ndim == 5 and len(step_noise) in (rows, num_steps) and step_noise.shape[1:] == noise.shape,
            f"step_noise has shape {tuple(step_noise.shape)}: expected ({rows} or {num_steps}, "
            f"{', '.join(map(str, noise.shape))}); the last step needs none",
        )
        return step_noise.to(noise.device, torch.float32).__getitem__
    generators = image_generators(noise)

    def draw(step: int) -> Tensor:
        drawn = torch.stack([torch.randn(noise.shape[1:], generator=g) for g in generators])
        if noise.is_cuda:
            drawn = drawn.pin_memory()  # the host draws and copies while the device runs the network
        return drawn.to(noise.device, non_blocking=True)

    return draw


def image_generators(noise: Tensor) -> list[torch.Generator]:
    """Return a generator for each image, seeded by its starting noise (B, C, H, W)."""
    hashes = [hashlib.sha256(row.numpy().tobytes()).digest() for row in noise.float().cpu()]
    return [torch.Generator().manual_seed(int.from_bytes(h[:4], "little")) for h in hashes]


@torch.no_grad()
def sample_latents(
    model: Denoiser,
    noise: Tensor,
    y: Tensor,
    settings: SamplerSettings,
    *,
    guide: Denoiser | None = None,
    step_noise: Tensor | None = None,
    cache_bytes: float = CACHE_BYTES,
    counts: dict[str, int] | None = None,
    observe: Observer | None = None,
    call: Function = direct,
) -> Tensor:
    """Sample latents from noise (B, C, H, W) and classes y (B,); return float32 (B, C, H, W).

    settings: `recompute` is None, a list of steps or uniform; `fitting.resolve_recompute` makes a
    list of the other forms. call: how networks are called (`graphs.Graphs`). The other arguments,
    guarantees and errors: see `sample`.
    """
    solver = SOLVERS[settings.solver]
    require(
        step_noise is None or solver.stochastic,
        f"step_noise: the solver {settings.solver} takes no noise; leave it out",
    )
    check_inputs(model, noise, y)
    settings.check_packages()
    if guide is not None:
        check_guide(model, guide, settings)
    guided = GuidedVelocity(model, y, settings, guide, cache_bytes, call)

    def velocity_fn(x_t: Tensor, t: float | Tensor, step: int) -> Tensor:
        v = guided(x_t, t, step)
        if observe is not None:
            observe(step, t.clone() if isinstance(t, Tensor) else t, x_t.clone(), v.clone())
        return v

    noise = noise.float()
    options: dict[str, Any] = {argument: getattr(settings, name) for name, argument in solver.options.items()}
    if solver.stochastic:
        options["noise"] = step_noise_fn(noise, step_noise, settings.num_steps)
    if solver.adaptive:
        options["max_steps"] = settings.num_steps
    latents = solver.integrate(velocity_fn, noise, settings.grid(), **options)
    if counts is not None:
        for name, number in guided.calls.items():
            counts[name] = counts.get(name, 0) + number
        counts["cached_bytes"] = max(counts.get("cached_bytes", 0), guided.cached_bytes)
    return latents


def sample(
    model: Denoiser,
    noise: Tensor,
    y: Tensor,
    solver: str = "euler",
    num_steps: int = 250,
    cfg_scale: float = 2.0,
    cfg_interval: tuple[float, float] | None = (0.3, 1.0),
    last_step: float | None = 0.04,
    timeshift: float = 1.0,
    recompute: Sequence[int] | None = None,
    step_noise: Tensor | None = None,
    *,
    cfg_steps: Sequence[int] | None = None,
    forecast_order: int = 0,
    sde_diffusion: DiffusionName = "sigma",
    sde_last: LastStep = "mean",
    tolerance: float = 1e-3,
    t_end: float = 1.0,
    internal_scale: float = 1.0,
    internal_interval: tuple[float, float] | None = None,
    guide: Denoiser | None = None,
    cache_bytes: float = CACHE_BYTES,
    counts: dict[str, int] | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Sample latents from noise; return float32 (B, C, H, W).

    Args:
        model: DDT or DiTDH, or with `recompute=None` also the undivided DiT.
        noise: (B, C, H, W) float32, standard normal.
        y: classes (B,) int64 on the same device.
        solver: a name of `solvers.SOLVERS`. num_steps, last_step (None: 1/num_steps), timeshift,
            t_end (below 1, with last_step=None: where sampling ends): see `flow.time_grid`; for
            "adaptive", num_steps bounds its steps, tolerance their error.
        cfg_scale: guidance scale, 1 is none. cfg_interval: times between which it acts, None is
            always. cfg_steps: steps in which it acts, None is all.
        recompute: step indices at which the encoder runs, 0 among them; None is every step.
        forecast_order: z_t at the other steps: 0 the last one, as published; 1 or 2 the line or
            parabola through the last ones (`sharing.SharedNetwork`).
        step_noise: (steps, B, C, H, W) for a stochastic solver, whose last step needs none; None
            samples it (`step_noise_fn`). sde_diffusion, sde_last: see `solvers.sde`.
        internal_scale: guidance away from the model's base head, 1 is none. internal_interval: the
            times from lo to hi at which it acts, None is always.
        guide: a weaker network to guide away from (autoguidance); None guides away from the
            unconditional velocity (classifier-free guidance).
        cache_bytes: bound on cached decoder modulations, for each network; changes only the speed.
        counts: a dict to which network calls per image are added (`GuidedVelocity.calls`), and the
            peak of `cached_bytes`.
        observe: called as (step, t, x_t, v) with copies of every guided velocity v (B, C, H, W)
            and of its inputs, before the solver uses them; it cannot change the result.

    Deterministic; keeps the global random state, the model's mode and gradients. Runs under the
    caller's autocast; the solver's arithmetic is float32. The defaults are the published sampler at
    256 px. Raises UserError for impossible settings, or without effect. Source: method.md 4.
    """
    require(
        not isinstance(recompute, str), f"recompute={recompute}: give the list of steps, as ddt.uniform_schedule does"
    )
    settings = SamplerSettings(
        solver, num_steps, cfg_scale, cfg_interval, cfg_steps, last_step, timeshift, recompute, forecast_order,
        sde_diffusion, sde_last, tolerance, t_end, internal_scale, internal_interval,
    )  # fmt: skip
    return sample_latents(
        model, noise, y, settings, guide=guide, step_noise=step_noise, cache_bytes=cache_bytes, counts=counts,
        observe=observe,
    )  # fmt: skip
