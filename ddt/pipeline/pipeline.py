"""`DDTPipeline`: classes and seeds to images, by the steps of `ddt.sample`.

A thin layer over `ddt.generation`: its images are those of sample.py. Shapes: B images, C H W.
"""

import dataclasses
import json
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor
from PIL import Image
from torch import Tensor

from ddt.autoencoder.diffusers import LatentDecoder
from ddt.autoencoder.identity import Identity
from ddt.config import did_you_mean
from ddt.draws import noise_of
from ddt.errors import UserError, require
from ddt.generation.generator import Generator, check_finite
from ddt.generation.image_set import MAX_SEED
from ddt.generation.settings import Stored, resolve_sampler
from ddt.pipeline.scheduler import DDTScheduler
from ddt.pipeline.transformer import DDTTransformer2DModel
from ddt.precision import Dtype
from ddt.sampling.fitting import resolve_recompute
from ddt.sampling.settings import SamplerSettings

DTYPES: dict[torch.dtype, Dtype] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
OUTPUTS = ("pil", "np", "pt", "latent")
# arguments of a call that have another name in this project
NAMES = {"num_inference_steps": "num_steps", "guidance_scale": "cfg_scale", "guidance_interval": "cfg_interval"}


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
        vae: diffusers' AutoencoderKL or AutoencoderTiny, or `DDTRAEDecoder`; None for a model of
            pixels.
        scheduler: the sampler's settings.
        id2label: class → names, separated by commas, as in diffusers' DiTPipeline.
        decode_chunk_size: latents decoded at once; bounds the memory.
    """

    code: ClassVar[Callable[[], str]]  # returns the text of pipeline.py in a shared folder
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

    def _parts(self) -> dict[str, tuple[str, Any]]:
        """Return the components with code in a shared folder: name → the file's name, class."""
        kinds = {
            name: type(component._orig_mod if is_compiled_module(component) else component)
            for name, component in self.components.items()
        }
        return {name: (f"{name}_ddt", kind) for name, kind in kinds.items() if hasattr(kind, "code")}

    def to_json_string(self) -> str:
        """Return model_index.json, which names the files of code that `save_config` writes."""
        parts = {name: (file, kind.__name__) for name, (file, kind) in self._parts().items()}
        named = {"_class_name": ("pipeline", "DDTPipeline"), **parts}
        return json.dumps(json.loads(super().to_json_string()) | named, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write model_index.json and the code of pipeline and components, so that the folder loads
        without this project; arguments of diffusers.
        """
        folder = Path(save_directory)
        files = {folder / name / f"{file}.py": kind for name, (file, kind) in self._parts().items()}
        for path, kind in {folder / "pipeline.py": type(self), **files}.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(kind.code(), encoding="utf-8")
        super().save_config(save_directory, push_to_hub, **kwargs)

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
        given = {name: value for name, value in chosen.items() if not isinstance(value, str) or value != "checkpoint"}
        values = {NAMES.get(name, name): KINDS[NAMES.get(name, name)](name, value) for name, value in given.items()}
        stored = {name: KINDS[name](f"scheduler.{name}", value) for name, value in self.scheduler.settings().items()}
        network = self.transformer.network
        try:
            return resolve_sampler(stored, values, network.shares_encoder, network.base_depth)
        except UserError as error:
            text = str(error)
            for argument, name in NAMES.items():
                text = text.replace(f"{name}=", f"{argument}=")
            raise UserError(text) from error

    def _autoencoder(self) -> Any:
        """Return the decoder around the `vae` component."""
        if self.vae is None:
            return Identity()
        # as sample.py's: torch computes a product of weights that need gradients in another way
        self.vae.requires_grad_(False)
        if hasattr(self.vae, "latent_decoder"):
            return self.vae.latent_decoder(self.config.decode_chunk_size).to(self._execution_device)
        name = type(self.vae).__name__
        require(name in AUTOENCODERS, f"vae: is a {name}; give an {' or an '.join(AUTOENCODERS)}")
        return LatentDecoder(self.vae, self.config.decode_chunk_size).to(self._execution_device)

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
        callable(getattr(scheduler, "settings", None)),
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


def whole_number(name: str, value: Any) -> int:
    """Return a whole number; UserError for several, and for anything else."""
    numbers = whole_numbers(name, value)
    require(len(numbers) == 1, f"{name}={value}: give one whole number")
    return numbers[0]


def real_number(name: str, value: Any) -> float:
    """Return a number; UserError for anything else, and for NaN and infinite ones."""
    try:
        require(not isinstance(value, bool | str) and math.isfinite(value), f"{name}={value}: give a finite number")
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name}={value}: give a finite number") from error


def bounds(name: str, value: Any) -> tuple[float, float]:
    """Return two numbers; UserError for anything else."""
    values = as_list(value)
    require(len(values) == 2, f"{name}={value}: give two numbers, as in {name}=(0.1, 1.0), or None")
    return real_number(name, values[0]), real_number(name, values[1])


def text(name: str, value: Any) -> str:
    """Return a text; UserError for anything else."""
    require(isinstance(value, str), f"{name}={value}: give text")
    return str(value)


def steps(name: str, value: Any) -> str | list[int]:
    """Return a recompute schedule as it is written; UserError for anything else."""
    return value if isinstance(value, str) else whole_numbers(name, value)


def optional(kind: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """Return the function that also lets None pass."""
    return lambda name, value: None if value is None else kind(name, value)


# `SamplerSettings` → function that returns a value of the right type; UserError names the argument
KINDS: dict[str, Callable[[str, Any], Any]] = {
    "solver": text,
    "num_steps": whole_number,
    "cfg_scale": real_number,
    "cfg_interval": optional(bounds),
    "cfg_steps": optional(whole_numbers),
    "last_step": optional(real_number),
    "timeshift": real_number,
    "recompute": optional(steps),
    "forecast_order": whole_number,
    "sde_diffusion": text,
    "sde_last": text,
    "tolerance": real_number,
    "t_end": real_number,
    "internal_scale": real_number,
    "internal_interval": optional(bounds),
}
