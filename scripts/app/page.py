"""The page of the app: its controls, and the functions of its buttons."""

import html
from collections.abc import Callable
from typing import Any

import gradio as gr
import torch

from ddt.errors import UserError, os_error_line
from ddt.sampling.settings import SamplerSettings
from scripts.app.controls import SOLVER_CHOICES, Controls, class_choices, has_base_head, sharing_choices
from scripts.app.guard import GuardedBlocks
from scripts.app.studio import Interrupted, Studio
from scripts.app.view import galleries, numbers, summary

LAUNCH: dict[str, Any] = {
    "share": False,
    "prevent_thread_lock": True,
    "quiet": True,
    "footer_links": [],
    "run_history": False,
    "enable_monitoring": False,
    "theme": gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=["system-ui", "sans-serif"]),
}
SHARING_NAMES = {
    "off": "off",
    "uniform": "every k-th step",
    "dp": "fitted to the model",
    "checkpoint": "the checkpoint's own",
}
FORECASTS = [("the last z", 0), ("a line", 1), ("a parabola", 2)]
PAGE_ONLY: dict[str, Any] = {"queue": False, "api_visibility": "private"}  # of events that change the page alone
Fields = dict[str, gr.components.Component]


def number(label: str, value: float, info: str, visible: bool = True) -> gr.Number:
    """Return a field for a number, which `make_requests` checks."""
    return gr.Number(value, label=label, info=info, visible=visible, min_width=100)


def add_controls(studio: Studio) -> Fields:
    """Lay out the controls with the checkpoint's values; return them by the names of `Controls`."""
    own, settings, fields = studio.controls, studio.settings, Fields()
    with gr.Group():
        fields["classes"] = gr.Dropdown(
            class_choices(studio.stored["class_names"]), value=own.classes, multiselect=True, label="Classes",
            info="click, and type to search",
        )  # fmt: skip
        with gr.Row(equal_height=True):
            fields["num_images"] = number("Images per class", own.num_images, f"{settings.max_images} in all, at most")
            fields["seed"] = number("Seed", own.seed, "of the first image")
    with gr.Group():
        with gr.Row(equal_height=True):
            fields["solver"] = gr.Dropdown(
                SOLVER_CHOICES, value=own.solver, label="Solver", info="method", min_width=100
            )
            fields["num_steps"] = number("Steps", own.num_steps, f"{settings.max_steps} at most")
        with gr.Row(equal_height=True):
            fields["timeshift"] = number("Time shift", own.timeshift, "above 1: early steps")
            length = "" if own.last_step is None else str(own.last_step)  # an empty gr.Number shows 0
            fields["last_step"] = gr.Textbox(
                length, label="Last step", info="length in t", placeholder="1 / steps", min_width=100,
                visible=SamplerSettings(**studio.stored["sampler"]).t_end == 1,  # else none follows
            )  # fmt: skip
    with gr.Group():
        what = "how strongly the class is followed" if settings.guide is None else "away from the guide"
        fields["cfg_scale"] = number("Guidance", own.cfg_scale, f"{what}; 1 is none")
        fields["limit_guidance"] = gr.Checkbox(own.limit_guidance, label="Guide only between two times")
        with gr.Row(equal_height=True, visible=own.limit_guidance) as between:
            fields["cfg_from"] = number("From t", own.cfg_from, "0 is noise")
            fields["cfg_to"] = number("To t", own.cfg_to, "1 is the image")
    fields["limit_guidance"].change(lambda on: gr.Row(visible=on), fields["limit_guidance"], between, **PAGE_ONLY)
    if has_base_head(studio.stored):
        fields |= add_internal_controls(own)
    choices = sharing_choices(studio.stored)
    return fields | add_sharing_controls(own, choices) if choices else fields


def add_internal_controls(own: Controls) -> Fields:
    """Lay out the controls of internal guidance."""
    fields = Fields()
    with gr.Group():
        fields["internal_scale"] = number("Internal guidance", own.internal_scale, "away from the base head; 1 is none")
        limited = gr.Checkbox(own.limit_internal, label="Guide internally only between two times")
        fields["limit_internal"] = limited
        with gr.Row(equal_height=True, visible=own.limit_internal) as between:
            fields["internal_from"] = number("Internal from t", own.internal_from, "0 is noise")
            fields["internal_to"] = number("Internal to t", own.internal_to, "1 is the image")
    limited.change(lambda on: gr.Row(visible=on), limited, between, **PAGE_ONLY)
    return fields


def add_sharing_controls(own: Controls, choices: list[str]) -> Fields:
    """Lay out the controls of encoder sharing; those that have no effect are not shown."""

    def visible(sharing: str) -> list[bool]:
        return [sharing == "uniform", sharing == "dp", sharing != "off", sharing != "off"]

    every, budget, forecast, compare = visible(own.sharing)
    fields = Fields()
    with gr.Group():
        fields["sharing"] = gr.Radio(
            [(SHARING_NAMES[name], name) for name in choices], value=own.sharing, label="Encoder sharing",
            info="at which steps the encoder runs",
        )  # fmt: skip
        fields["every"] = number("k", own.every, "the encoder runs at steps 0, k, 2k, …", every)
        fields["budget"] = number("Encoder runs", own.budget, "number of steps, which are chosen to fit", budget)
        fields["forecast_order"] = gr.Radio(
            FORECASTS, value=own.forecast_order, label="Between two runs", visible=forecast,
            info="z stays as it was, as published, or is forecast",
        )  # fmt: skip
        fields["compare"] = gr.Checkbox(own.compare, label="Side by side with sharing off", visible=compare)
    dependents = [fields[name] for name in ("every", "budget", "forecast_order", "compare")]
    fields["sharing"].change(
        lambda sharing: [gr.update(visible=on) for on in visible(sharing)], fields["sharing"], dependents, **PAGE_ONLY
    )
    return fields


def add_outputs() -> list[gr.components.Component]:
    """Lay out the result: numbers, images, comparison, command, files."""
    text = gr.Markdown("Choose what to sample, and press Generate.", elem_id="numbers")
    look: dict[str, Any] = {"object_fit": "contain", "interactive": False, "buttons": ["download", "fullscreen"]}
    with gr.Row():
        images = gr.Gallery(label="Images", elem_id="images", **look)
        unshared = gr.Gallery(label="Without sharing", elem_id="unshared", visible=False, **look)
    slider = gr.ImageSlider(label="Without sharing, and with it", interactive=False, visible=False, elem_id="slider")
    command = gr.Textbox(
        label="The same on the command line", visible=False, interactive=False, buttons=["copy"], elem_id="command"
    )
    files = gr.File(label="Files", visible=False, interactive=False, file_count="multiple")
    return [text, images, unshared, slider, command, files]


def refused(text: str) -> gr.Error:
    """Return the error that shows the lines of a user's mistake on the page, as text."""
    return gr.Error(html.escape(text).replace("\n", "<br>"), duration=None, print_exception=False)


def sampling(studio: Studio, stopping: set[str | None]) -> Callable[..., list[Any]]:
    """Return the function of the button. stopping: the sessions that have asked to stop."""

    def sample(request: gr.Request, progress: gr.Progress = gr.Progress(), **values: Any) -> list[Any]:  # noqa: B008
        """Sample the controls' values; return the values of `add_outputs`."""
        session = request.session_hash
        try:
            sets = studio.sample(values, progress, lambda: session in stopping)
        except Interrupted:
            gr.Info("Stopped; nothing of it was kept.")
            return [gr.skip()] * 6
        except (UserError, FloatingPointError) as error:
            raise refused(str(error)) from None
        except OSError as error:
            raise refused(os_error_line(error)) from None
        except torch.OutOfMemoryError:
            text = f"batch_size={studio.settings.batch_size}: is too much for the GPU's memory; choose fewer images"
            raise refused(text) from None
        files = [str(path) for path in sorted(sets[0].folder.iterdir()) if path.suffix in (".npz", ".zip", ".json")]
        more = [gr.update(value=value, visible=True) for value in (sets[0].request.command, files)]
        return [numbers(sets), *galleries(sets, studio.stored["class_names"]), *more]

    return sample


def build_page(studio: Studio) -> gr.Blocks:
    """Return the page of a loaded checkpoint; `/sample` is its one public endpoint."""
    stopping: set[str | None] = set()

    def start_soon(request: gr.Request) -> list[Any]:
        stopping.discard(request.session_hash)
        return [gr.Button(interactive=False), gr.Button(interactive=True)]

    def stop_soon(request: gr.Request) -> None:
        stopping.add(request.session_hash)

    with GuardedBlocks(title="DDT", analytics_enabled=False) as page:
        gr.Markdown(f"# DDT\n{summary(studio)}")
        with gr.Row():
            with gr.Column(scale=3, min_width=340):
                controls = add_controls(studio)
            with gr.Column(scale=7):
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", scale=3)
                    stop = gr.Button("Stop", interactive=False, scale=1)
                outputs = add_outputs()
        buttons = [start, stop]
        running = start.click(start_soon, None, buttons, **PAGE_ONLY).then(
            sampling(studio, stopping), inputs_kwargs=controls, outputs=outputs, api_name="sample",
            show_progress_on=[outputs[1]],
        )  # fmt: skip
        for ended in (running.success, running.failure):
            ended(lambda: [gr.Button(interactive=True), gr.Button(interactive=False)], None, buttons, **PAGE_ONLY)
        stop.click(stop_soon, None, None, **PAGE_ONLY)
    return page
