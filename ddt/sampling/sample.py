"""From noise to latents: `sample_latents` puts grid, guidance, sharing and solver together, and
`sample` is its public face.

Shapes: B batch, C channels, H W latent size.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddt.errors import require
from ddt.model import Denoiser
from ddt.sampling.settings import LastStep, SamplerSettings
from ddt.sampling.sharing import CACHE_BYTES, GuidedVelocity
from ddt.sampling.solvers import SOLVERS, DiffusionName, VelocityFn

Observer = Callable[[int, float | Tensor, Tensor, Tensor], None]  # step, t, x_t and v (B, C, H, W)


def check_inputs(model: Denoiser, noise: Tensor, y: Tensor) -> None:
    """Raise UserError unless noise (B, C, H, W) suits the network and y (B,) holds a class for each
    row.

    On a GPU the values of y are not looked at: no device sync.
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
    """Raise UserError unless a guide is of the same latents and classes as the model, and guides
    anything.
    """
    require(
        settings.cfg_scale != 1,
        "guide: has no effect with cfg_scale=1; choose another scale, or leave the guide out",
    )
    for name in ("in_channels", "num_classes"):
        ours, theirs = getattr(model, name), getattr(guide, name)
        require(
            ours == theirs, f"guide: has {name}={theirs}, the model {ours}; give a weaker checkpoint of the same data"
        )


def step_draws(noise: Tensor, step_noise: Tensor | None, num_steps: int) -> Callable[[int], Tensor]:
    """Return the function step → draws (B, C, H, W) of a stochastic solver, which asks for the
    steps in order.

    They are step_noise (num_steps or num_steps − 1, B, C, H, W), or else come from one generator an
    image, seeded by the image's starting noise (B, C, H, W): the same image on any device, in any
    batch. Raises UserError for a step_noise of another shape.
    """
    if step_noise is not None:
        rows = max(num_steps - 1, 0)
        require(
            step_noise.ndim == 5 and len(step_noise) in (rows, num_steps) and step_noise.shape[1:] == noise.shape,
            f"step_noise has shape {tuple(step_noise.shape)}: expected ({rows} or {num_steps}, "
            f"{', '.join(map(str, noise.shape))}); the last step draws none",
        )
        given = step_noise.to(noise.device, torch.float32)
        return lambda step: given[step]
    hashes = [hashlib.sha256(row.numpy().tobytes()).digest() for row in noise.float().cpu()]
    generators = [torch.Generator().manual_seed(int.from_bytes(h[:4], "little")) for h in hashes]
    return lambda step: torch.stack([torch.randn(noise.shape[1:], generator=g) for g in generators]).to(noise.device)


def solve(
    velocity_fn: VelocityFn, noise: Tensor, settings: SamplerSettings, step_noise: Tensor | None = None
) -> Tensor:
    """Walk the settings' grid with their solver from noise (B, C, H, W); return float32 latents (B,
    C, H, W).
    """
    noise, solver = noise.float(), SOLVERS[settings.solver]
    options: dict[str, Any] = {argument: getattr(settings, name) for name, argument in solver.options.items()}
    if solver.stochastic:
        options["draw"] = step_draws(noise, step_noise, settings.num_steps)
    return solver.integrate(velocity_fn, noise, settings.grid(), **options)


def observed(velocity: VelocityFn, observe: Observer) -> VelocityFn:
    """Return a velocity that shows `observe` each of its calls."""

    def call(x_t: Tensor, t: float | Tensor, step: int) -> Tensor:
        v = velocity(x_t, t, step)
        observe(step, t, x_t, v)
        return v

    return call


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
) -> Tensor:
    """Sample latents from noise (B, C, H, W) and classes y (B,) with a sampler; return float32 (B,
    C, H, W).

    settings: its `recompute` is None, a list of steps or uniform; `fitting.resolve_recompute` makes
    a list of the other forms. The other arguments, guarantees and errors: see `sample`.
    """
    require(
        step_noise is None or SOLVERS[settings.solver].stochastic,
        f"step_noise: the solver {settings.solver} draws no noise; leave it out",
    )
    check_inputs(model, noise, y)
    if guide is not None:
        check_guide(model, guide, settings)
    velocity = GuidedVelocity(model, y, settings, guide, cache_bytes)
    latents = solve(velocity if observe is None else observed(velocity, observe), noise, settings, step_noise)
    if counts is not None:
        for name, number in velocity.calls.items():
            counts[name] = counts.get(name, 0) + number
        counts["cached_bytes"] = max(counts.get("cached_bytes", 0), velocity.cached_bytes)
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
    guide: Denoiser | None = None,
    cache_bytes: float = CACHE_BYTES,
    counts: dict[str, int] | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Sample latents from noise; return float32 (B, C, H, W).

    Args:
        model: DDT, or with `recompute=None` also the undivided DiT.
        noise: (B, C, H, W) float32, standard normal.
        y: classes (B,) int64 on the same device.
        solver: a name of `solvers.SOLVERS`. num_steps, last_step (None: 1/num_steps), timeshift:
            the time grid (`flow.time_grid`); "adaptive" has no grid, num_steps bounds its steps and
            tolerance their error.
        cfg_scale: strength of guidance, 1 is none. cfg_interval: times between which it acts, None
            is always. cfg_steps: steps in which it acts, None is all.
        recompute: step indices at which the encoder runs, 0 among them; None is every step.
        forecast_order: what z_t is at the other steps: 0 the last one as it is, as published; 1 or
            2 the line or parabola through the last ones (`sharing.SharedNetwork`).
        step_noise: draws (steps, B, C, H, W) of a stochastic solver, the last step needs none; None
            draws them from the starting noise (`step_draws`). sde_diffusion, sde_last: see
            `solvers.sde`.
        guide: a weaker network of the same classes to guide away from (autoguidance); None guides
            away from the unconditional velocity (classifier-free guidance).
        cache_bytes: bound on the memory of the decoder's kept modulations, of each network; 0 keeps
            none. Only speed depends on it.
        counts: a dict to which the network calls per image are added (`GuidedVelocity.calls`), and
            in which `cached_bytes` becomes the most memory that kept modulations have taken.
        observe: called as (step, t, x_t, v) with every guided velocity v (B, C, H, W), before the
            solver uses it: for progress, or for a look at the prediction of the clean latent, x_t +
            (1 − t)·v.

    Deterministic; the global random state, the model's mode and gradients stay as they are. Runs
    under the caller's autocast; the solver's arithmetic stays float32. The defaults are the
    published sampler at 256 px. Raises UserError for settings that make no sampler, or that would
    have no effect. Source: method.md 4.
    """
    require(
        not isinstance(recompute, str), f"recompute={recompute}: give the list of steps, as ddt.uniform_schedule does"
    )
    settings = SamplerSettings(
        solver, num_steps, cfg_scale, cfg_interval, cfg_steps, last_step, timeshift, recompute, forecast_order,
        sde_diffusion, sde_last, tolerance,
    )  # fmt: skip
    return sample_latents(
        model, noise, y, settings, guide=guide, step_noise=step_noise, cache_bytes=cache_bytes, counts=counts,
        observe=observe,
    )  # fmt: skip
