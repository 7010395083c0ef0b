"""`DDTPipeline`: the model as a diffusers pipeline, with network and sampler as components.

A thin layer over `ddt.generation`: its images are those of sample.py. Shapes: B images, C H W.
"""

import dataclasses
import inspect
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor
from PIL import Image
from torch import Tensor

from ddt.autoencoder import Autoencoder, Identity, KLAutoencoder, TinyAutoencoder
from ddt.autoencoder.diffusers import DiffusersAutoencoder
from ddt.checkpoint.config import check_sides
from ddt.config import convert, did_you_mean, parse
from ddt.distributed.compile import allow_recompiles
from ddt.draws import noise_of
from ddt.errors import UserError, require
from ddt.flow import velocity_of
from ddt.generation.generator import Generator, check_finite
from ddt.generation.image_set import MAX_SEED
from ddt.generation.settings import SamplerOverrides
from ddt.model import Denoiser, build_network
from ddt.precision import Dtype
from ddt.sampling.fitting import resolve_recompute
from ddt.sampling.settings import SamplerSettings

Stored = Literal["checkpoint"]
DTYPES: dict[torch.dtype, Dtype] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
OUTPUTS = ("pil", "np", "pt", "latent")
# arguments of a call: name in diffusers → name in this project
NAMES = {
    "num_inference_steps": "num_steps",
    "guidance_scale": "cfg_scale",
    "guidance_interval": "cfg_interval",
    "solver": "sampler",
}


class DDTTransformer2DModel(ModelMixin, ConfigMixin):
    """A network of `ddt.model` as a diffusers model.

    sample_size: H and W of the latents. settings: of `build_network`. Both come from config.json;
    raises UserError for wrong ones.
    """

    # float32 as under autocast, so that weights loaded in 16 bits give the bits of sample.py
    _keep_in_fp32_modules: ClassVar = ["norm", "norm1", "norm2", "q_norm", "k_norm", "embedding_table", "W"]
    _repeated_blocks: ClassVar = ["Block"]

    @register_to_config
    def __init__(self, sample_size: tuple[int, int] | None = None, settings: dict[str, Any] | None = None) -> None:
        super().__init__()
        size, problems = convert(sample_size, tuple[int, int], "sample_size")
        network, others = convert(settings, dict[str, Any], "settings")
        require(not problems + others, "; ".join(problems + others))
        self.network: Denoiser = build_network(network)
        check_sides("sample_size", size, self.network.patch_size)

    @apply_forward_hook
    def denoiser(self) -> Denoiser:
        """Return the network, moved to its device by diffusers' offloading."""
        return self.network

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Return v_t (B, C, H, W) for x_t (B, C, H, W), t (B,) in [0, 1], 0 is noise, y (B,)."""
        output = self.network(hidden_states, timestep, class_labels)
        return velocity_of(output, hidden_states, timestep, self.network.prediction)

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile each block in place, at its first call; arguments of `torch.compile`."""
        allow_recompiles()
        super().compile_repeated_blocks(*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `compile_repeated_blocks`: the pipeline calls encoder and decoder, not this module."""
        self.compile_repeated_blocks(*args, **kwargs)


class DDTScheduler(SchedulerMixin, ConfigMixin):
    """`SamplerSettings` as a diffusers component; `ddt.sampling.sample` takes the steps."""

    def __init__(self, **settings: Any) -> None:
        arguments = inspect.signature(SamplerSettings).bind(**settings)
        arguments.apply_defaults()
        self.register_to_config(**arguments.arguments)

    # by which diffusers knows what a config may hold
    __init__.__signature__ = inspect.signature(SamplerSettings.__init__)  # type: ignore[attr-defined]

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `SamplerSettings`."""
        return {name: self.config[name] for name in SamplerSettings.__dataclass_fields__}


class Interrupted(Exception):
    """`DDTPipeline._interrupt` was set. latents: the last step's result (B, C, H, W)."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents


class StepObserver:
    """Advances the progress bar and calls diffusers' callback at the end of each step.

    inputs: names of the tensors that the callback gets, copies of the sampler's own.
    """

    def __init__(
        self, pipeline: "DDTPipeline", progress: Any, callback: Callable[..., Any] | None, inputs: Sequence[str]
    ) -> None:
        self.pipeline, self.progress, self.callback, self.inputs = pipeline, progress, callback, inputs
        self.step, self.t = -1, 0.0  # none yet

    def observe(self, step: int, t: float | Tensor, x_t: Tensor, v: Tensor) -> None:
        """Take a velocity; at a step's first, x_t (B, C, H, W) is the last step's result."""
        if step == self.step:
            return
        if self.step >= 0:
            self.end(x_t)
        if self.pipeline.interrupt:
            raise Interrupted(x_t)
        self.step, self.t = step, t if isinstance(t, float) else float(t.flatten()[0])

    def end(self, latents: Tensor) -> None:
        """End a step, whose result is `latents` (B, C, H, W)."""
        self.progress.update()
        if self.callback is None:
            return
        shown = latents.clone()
        returned = self.callback(self.pipeline, self.step, self.t, {name: shown for name in self.inputs})
        other = isinstance(returned, dict) and returned.get("latents", shown) is not shown
        require(
            not other and torch.allclose(shown, latents, rtol=0, atol=0, equal_nan=True),
            "callback_on_step_end: changes the latents; it can watch the steps, or end them by pipeline._interrupt",
        )


class DDTPipeline(DiffusionPipeline):
    """Samples images of classes with a Decoupled Diffusion Transformer, as `sample.py` does.

    Args:
        vae: diffusers' AutoencoderKL or AutoencoderTiny; None for a model of pixels.
        scheduler: the sampler's settings.
        id2label: class → names, separated by commas, as in diffusers' DiTPipeline.
        decode_chunk_size: latents decoded at once; bounds the memory.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar = ["vae"]
    _callback_tensor_inputs: ClassVar = ["latents"]
    _interrupt = False

    def __init__(
        self,
        transformer: DDTTransformer2DModel,
        vae: Any,
        scheduler: DDTScheduler,
        id2label: dict[str, str] | None = None,
        decode_chunk_size: int = 16,
    ) -> None:
        super().__init__()
        check_scheduler(scheduler)
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(id2label=id2label, decode_chunk_size=decode_chunk_size)

    @property
    def interrupt(self) -> bool:
        """Whether `_interrupt` was set during this call: the steps left are skipped."""
        return self._interrupt

    @property
    def labels(self) -> dict[str, list[int]]:
        """The classes of each name. ImageNet has two "crane"s."""
        classes: dict[str, list[int]] = {}
        for k, names in (self.config.id2label or {}).items():
            for name in dict.fromkeys([names, *(part.strip() for part in names.split(","))]):
                classes.setdefault(name, []).append(int(k))
        return dict(sorted(classes.items()))

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Return the classes of names; raise UserError for unknown and ambiguous names."""
        labels, classes = self.labels, []
        for name in [label] if isinstance(label, str) else label:
            require(name in labels, f"class_labels={name}: no such class{did_you_mean(name, labels)}")
            numbers = " and ".join(map(str, labels[name]))
            require(len(labels[name]) == 1, f"class_labels={name}: is the name of classes {numbers}; give the number")
            classes += labels[name]
        return classes

    def _classes(self, class_labels: int | str | Sequence[int | str], num_images_per_class: int) -> list[int]:
        """Return the class of each image; raise UserError for invalid ones."""
        classes: list[int] = []
        for label in as_list(class_labels):
            classes += self.get_label_ids(label) if isinstance(label, str) else whole_numbers("class_labels", label)
        require(len(classes) > 0, "class_labels=[]: name at least one class")
        counts = whole_numbers("num_images_per_class", num_images_per_class)
        require(len(counts) == 1 and counts[0] >= 1, f"num_images_per_class={num_images_per_class}: must be at least 1")
        last = self.transformer.network.num_classes - 1
        wrong = [k for k in classes if not 0 <= k <= last]
        require(not wrong, f"class_labels={wrong[:3]}: the model has classes 0..{last}")
        return [k for k in classes for _ in range(counts[0])]

    def _shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of the latents."""
        height, width = self.transformer.config.sample_size
        return self.transformer.network.in_channels, height, width

    def _noise(self, count: int, seeds: int | Sequence[int] | None, generator: Any, latents: Tensor | None) -> Tensor:
        """Return the noise (B, C, H, W), float32; UserError where it does not fit `count`."""
        sources = [name for name, value in (("seeds", seeds), ("generator", generator), ("latents", latents))
                 if value is not None]  # fmt: skip
        require(len(sources) <= 1, f"{', '.join(sources)}: each sets the noise; give one")
        shape, device = self._shape(), self._execution_device
        if latents is not None:
            require(
                isinstance(latents, Tensor) and latents.is_floating_point(),
                f"latents: are {getattr(latents, 'dtype', type(latents).__name__)}; give a tensor of floats",
            )
            expected = (count, *shape)
            require(
                tuple(latents.shape) == expected, f"latents: have shape {tuple(latents.shape)}, expected {expected}"
            )
            require(bool(latents.isfinite().all()), "latents: hold NaN or infinite values; give standard normal noise")
            return latents.to(device, torch.float32)
        if seeds is not None:
            numbers = whole_numbers("seeds", seeds)
            require(len(numbers) == count, f"seeds: {len(numbers)} of them for {count} images; give one for each image")
            wrong = [s for s in numbers if not 0 <= s < MAX_SEED]
            require(not wrong, f"seeds={wrong[:3]}: a seed must lie in 0..{MAX_SEED - 1}")
            return noise_of(numbers, shape).to(device)
        if generator is not None and not isinstance(generator, torch.Generator):
            generator = as_list(generator)
            kinds = [type(each).__name__ for each in generator if not isinstance(each, torch.Generator)]
            require(not kinds, f"generator: {kinds[:1]} in place of a torch.Generator; give one, or one for each image")
            require(
                len(generator) == count,
                f"generator: {len(generator)} of them for {count} images; give one, or one for each image",
            )
        return randn_tensor((count, *shape), generator=generator, device=device, dtype=torch.float32)

    def _dtype(self) -> Dtype:
        """Return the precision of the network; raise UserError for an unsupported one."""
        dtype = self.transformer.dtype
        require(
            dtype in DTYPES,
            f"torch_dtype={dtype}: the networks run in {', '.join(map(str, DTYPES))}; choose one of them",
        )
        return DTYPES[dtype]

    def _settings(self, chosen: dict[str, Any]) -> SamplerSettings:
        """Return the scheduler's settings with the values of a call, unless "checkpoint"."""
        check_scheduler(self.scheduler)
        try:
            overrides = parse(SamplerOverrides, {NAMES.get(name, name): value for name, value in chosen.items()})
            network = self.transformer.network
            return overrides.resolve(self.scheduler.settings(), network.shares_encoder, network.base_depth)
        except UserError as error:
            text = str(error)
            for argument, name in NAMES.items():
                text = text.replace(f"{name}=", f"{argument}=")
            raise UserError(text) from error

    def _autoencoder(self) -> Autoencoder:
        """Return the autoencoder around the `vae` component."""
        if self.vae is None:
            return Identity()
        name = type(self.vae).__name__
        kinds: dict[str, type[DiffusersAutoencoder]] = {kind.kind: kind for kind in (KLAutoencoder, TinyAutoencoder)}
        require(name in kinds, f"vae: is a {name}; give an {' or an '.join(kinds)}")
        return kinds[name].around(self.vae, self.config.decode_chunk_size).to(self._execution_device)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        num_images_per_class: int = 1,
        seeds: int | Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        num_inference_steps: int | Stored = "checkpoint",
        guidance_scale: float | Stored = "checkpoint",
        guidance_interval: tuple[float, float] | Stored | None = "checkpoint",
        internal_scale: float | Stored = "checkpoint",
        internal_interval: tuple[float, float] | Stored | None = "checkpoint",
        recompute: str | Sequence[int] | None = "checkpoint",
        forecast_order: int | Stored = "checkpoint",
        solver: str | Stored = "checkpoint",
        timeshift: float | Stored = "checkpoint",
        last_step: float | Stored | None = "checkpoint",
        t_end: float | Stored = "checkpoint",
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images, all in one batch.

        Args:
            class_labels: one or several, by number or name (`labels`).
            seeds: one per image, as in sample.py. generator: torch's, one or one per image.
                latents: the initial noise (B, C, H, W). None of them: torch's global generator.
            num_inference_steps, guidance_scale, guidance_interval (None: guidance at all times),
                internal_scale, internal_interval (of a model with a base head; None: at all times),
                recompute (None: the encoder at every step; "uniform:5"; "dp:10", fitted at each
                call; a list of steps; a schedule file), forecast_order, solver, timeshift,
                last_step (None: 1/num_inference_steps), t_end: as in sample.py; "checkpoint": as
                exported.
            output_type: "pil"; "np" (B, H, W, C) or "pt" (B, C, H, W), float32 in [0, 1]; "latent"
                (B, C, H, W).
            callback_on_step_end: called as (pipeline, step, t, {"latents": x}) with a copy of the
                result of each step, which it cannot change; where it sets `pipeline._interrupt`,
                the images are those of this step. A function, or diffusers' `PipelineCallback`.
            callback_on_step_end_tensor_inputs: names of the tensors it gets; there are "latents".

        Returns `ImagePipelineOutput`, or a tuple of the images if return_dict is False. Weights in
        16 bits run under autocast, the solver in float32. Raises UserError, a ValueError, for
        invalid arguments, and FloatingPointError where an image is NaN or infinite.
        """
        require(
            not is_compiled_module(self.transformer),
            "transformer: torch.compile(…) wraps a call that sampling does not make; use transformer.compile()",
        )
        require(
            callback_on_step_end is None or callable(callback_on_step_end),
            f"callback_on_step_end={callback_on_step_end}: is no function",
        )
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        require(
            not unknown,
            f"callback_on_step_end_tensor_inputs={unknown}: choose from {', '.join(self._callback_tensor_inputs)}",
        )
        require(output_type in OUTPUTS, f"output_type={output_type}: choose from {', '.join(OUTPUTS)}")
        channels = 3 if self.vae is not None else self.transformer.network.in_channels
        require(
            output_type != "pil" or channels in (1, 3),
            f"output_type=pil: images of {channels} channels are not supported; give np, pt or latent",
        )
        settings = self._settings(
            {
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "guidance_interval": guidance_interval,
                "internal_scale": internal_scale,
                "internal_interval": internal_interval,
                "recompute": recompute,
                "forecast_order": forecast_order,
                "solver": solver,
                "timeshift": timeshift,
                "last_step": last_step,
                "t_end": t_end,
            }
        )
        classes = self._classes(class_labels, num_images_per_class)
        noise = self._noise(len(classes), seeds, generator, latents)
        device, model = self._execution_device, self.transformer.denoiser()
        sampler = Generator(
            model=model,
            autoencoder=self._autoencoder(),
            shape=self._shape(),
            settings=settings,
            dtype=self._dtype(),
            device=device,
        )
        with sampler.exact(), self.progress_bar(total=settings.num_steps) as progress:
            with sampler.autocast():
                settings, _ = resolve_recompute(model, sampler.shape, settings, device)
            observer = StepObserver(self, progress, callback_on_step_end, callback_on_step_end_tensor_inputs)
            sampler = dataclasses.replace(sampler, settings=settings, observe=observer.observe)
            self._interrupt = False
            try:
                sampled, _ = sampler.from_noise(noise, classes)
                observer.end(sampled)
            except Interrupted as stop:
                sampled = stop.latents
            check_finite(sampled, advice="dtype=torch.float32, forecast_order=0 or a smaller guidance_scale")
            images: Any = sampled if output_type == "latent" else sampler.pixels(sampled, None, None)
        self.maybe_free_model_hooks()
        if output_type == "pil":
            images = [Image.fromarray(image[..., 0] if channels == 1 else image) for image in images]
        elif output_type != "latent":
            images = images.astype(np.float32) / 255
            images = torch.from_numpy(images).permute(0, 3, 1, 2) if output_type == "pt" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def check_scheduler(scheduler: Any) -> None:
    """Raise UserError for a scheduler of another sampler."""
    require(
        isinstance(scheduler, DDTScheduler),
        f"scheduler: {type(scheduler).__name__} takes other steps than this model's; give a DDTScheduler, and choose "
        "by solver=",
    )


def as_list(values: Any) -> list[Any]:
    """Return one value, or several (a sequence, an array, a tensor), as a list."""
    several = isinstance(values, Iterable) and not isinstance(values, str) and getattr(values, "ndim", 1) > 0
    return list(values) if several else [values]


def whole_numbers(name: str, values: Any) -> list[int]:
    """Return one or several whole numbers, of any integer type, as a list; UserError for others."""
    numbers: list[int] = []
    for value in as_list(values):
        try:
            require(not isinstance(value, bool), f"{name}={value}: give a whole number")
            numbers.append(operator.index(value))
        except TypeError as error:
            raise UserError(f"{name}={value}: give a whole number") from error
    return numbers


def build_pipeline(
    model: Denoiser, stored: dict[str, Any], autoencoder: Autoencoder, id2label: dict[str, str]
) -> DDTPipeline:
    """Return the pipeline of a network and its checkpoint's config; the network is not copied."""
    settings = {key: value for key, value in stored["network"].items() if key != "activation_checkpointing"}
    with torch.device("meta"):
        transformer = DDTTransformer2DModel(stored["latent_shape"][1:], settings)
    transformer.network = model
    scheduler = DDTScheduler(**stored["sampler"])
    chunk_size = stored["autoencoder"].get("chunk_size", 16)
    return DDTPipeline(transformer.eval(), autoencoder.network, scheduler, id2label, chunk_size)
