"""The page of the app: its controls, and what its buttons call."""

import html
from collections.abc import Callable
from typing import Any

import gradio as gr
import torch

from ddt.errors import UserError, os_error_line
from scripts.app.controls import SOLVER_CHOICES, Controls, class_choices, sharing_choices
from scripts.app.jobs import Interrupted, Studio
from scripts.app.view import CSS, numbers_of, pictures_of, summary

LAUNCH: dict[str, Any] = {
    "share": False,
    "prevent_thread_lock": True,
    "quiet": True,
    "show_error": False,  # what is no UserError is told on the terminal, never on the page
    "footer_links": [],
    "run_history": False,
    "ssr_mode": False,
    "pwa": False,
    "mcp_server": False,
    "enable_monitoring": False,
    "theme": gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=["system-ui", "sans-serif"]),
    "css": CSS,
}
SHARING_NAMES = {
    "off": "off",
    "uniform": "every k-th step",
    "dp": "fitted to the model",
    "checkpoint": "the checkpoint's own",
}
FORECASTS = [("the last z", 0), ("a line", 1), ("a parabola", 2)]
AT_ONCE: dict[str, Any] = {"queue": False, "api_visibility": "private"}  # of what changes the page alone
Fields = dict[str, gr.components.Component]


def number(label: str, value: float, info: str, visible: bool = True) -> gr.Number:
    """Return a field for a number, which is checked where it is used."""
    return gr.Number(value, label=label, info=info, visible=visible, min_width=100)


def controls_of(studio: Studio) -> Fields:
    """Lay out the controls with the checkpoint's values; return them by name."""
    own, limits, made = studio.defaults, studio.limits, Fields()
    with gr.Group():
        made["classes"] = gr.Dropdown(
            class_choices(studio.stored["class_names"]), value=own.classes, multiselect=True, label="Classes",
            info="click, and type to search",
        )  # fmt: skip
        with gr.Row(equal_height=True):
            made["num_images"] = number(
                "Pictures of each class", own.num_images, f"{limits.max_images} in all, at most"
            )
            made["seed"] = number("Seed", own.seed, "of the first picture")
    with gr.Group():
        with gr.Row(equal_height=True):
            made["solver"] = gr.Dropdown(SOLVER_CHOICES, value=own.solver, label="Solver", info="method", min_width=100)
            made["num_steps"] = number("Steps", own.num_steps, f"{limits.max_steps} at most")
        with gr.Row(equal_height=True):
            made["timeshift"] = number("Time shift", own.timeshift, "above 1: early steps")
            length = "" if own.last_step is None else str(own.last_step)  # an empty gr.Number shows 0
            made["last_step"] = gr.Textbox(
                length, label="Last step", info="length in t", placeholder="1 / steps", min_width=100
            )
    with gr.Group():
        made["cfg_scale"] = number("Guidance", own.cfg_scale, "how strongly the class is followed; 1 is none")
        made["limit_guidance"] = gr.Checkbox(own.limit_guidance, label="Guide only between two times")
        with gr.Row(equal_height=True, visible=own.limit_guidance) as between:
            made["cfg_from"] = number("From t", own.cfg_from, "0 is noise")
            made["cfg_to"] = number("To t", own.cfg_to, "1 is the picture")
    made["limit_guidance"].change(lambda on: gr.Row(visible=on), made["limit_guidance"], between, **AT_ONCE)
    choices = sharing_choices(studio.stored)
    return made | sharing_controls(own, choices) if choices else made


def sharing_controls(own: Controls, choices: list[str]) -> Fields:
    """Lay out the controls of encoder sharing; those that have no effect are not shown."""

    def shown(sharing: str) -> list[bool]:
        return [sharing == "uniform", sharing == "dp", sharing != "off", sharing != "off"]

    every, budget, forecast, compare = shown(own.sharing)
    made = Fields()
    with gr.Group():
        made["sharing"] = gr.Radio(
            [(SHARING_NAMES[name], name) for name in choices], value=own.sharing, label="Encoder sharing",
            info="at which steps the encoder runs",
        )  # fmt: skip
        made["every"] = number("k", own.every, "the encoder runs at steps 0, k, 2k, …", visible=every)
        made["budget"] = number("Encoder runs", own.budget, "number of steps, which are chosen to fit", visible=budget)
        made["forecast_order"] = gr.Radio(
            FORECASTS, value=own.forecast_order, label="Between two runs", visible=forecast,
            info="z stays as it was, as published, or is forecast",
        )  # fmt: skip
        made["compare"] = gr.Checkbox(own.compare, label="Side by side with sharing off", visible=compare)
    dependents = [made[name] for name in ("every", "budget", "forecast_order", "compare")]
    made["sharing"].change(
        lambda sharing: [gr.update(visible=on) for on in shown(sharing)], made["sharing"], dependents, **AT_ONCE
    )
    return made


def refused(text: str) -> gr.Error:
    """Return the error that shows a user's mistake on the page, each line of it, as text."""
    return gr.Error(html.escape(text).replace("\n", "<br>"), duration=None, print_exception=False)


def drawing(studio: Studio, stopping: set[str | None]) -> Callable[..., list[Any]]:
    """Return what the button calls. stopping: the sessions that have asked to stop."""

    def draw(request: gr.Request, progress: gr.Progress = gr.Progress(), **values: Any) -> list[Any]:  # noqa: B008
        """Draw what the controls ask for: the numbers, the pictures, the same as a command, and the
        files.
        """
        session = request.session_hash
        try:
            result = studio.draw(values, lambda done, what: progress(done, what), lambda: session in stopping)
        except Interrupted:
            gr.Info("Stopped; nothing of it was kept.")
            return [gr.skip()] * 4
        except (UserError, FloatingPointError) as error:
            raise refused(str(error)) from None
        except OSError as error:
            raise refused(os_error_line(error)) from None
        except torch.OutOfMemoryError:
            text = f"batch_size={studio.source.batch_size}: is too much for the GPU's memory; choose fewer pictures"
            raise refused(text) from None
        names, files = studio.stored["class_names"], [str(path) for path in result.files]
        more = [gr.update(value=value, visible=True) for value in (result.request.command, files)]
        return [numbers_of(result), pictures_of(result, names), *more]

    return draw


def outputs_of() -> list[gr.components.Component]:
    """Lay out where a result is shown: numbers, pictures, the command, files."""
    return [
        gr.HTML("Choose what to draw, and press Generate.", label="Numbers"),
        gr.HTML("", label="Pictures", min_height=200),
        gr.Textbox(
            label="The same on the command line", visible=False, interactive=False, buttons=["copy"], elem_id="command"
        ),
        gr.File(label="Files", visible=False, interactive=False, file_count="multiple"),
    ]


def build(studio: Studio) -> gr.Blocks:
    """Return the page of a loaded checkpoint; `/draw` is its one public endpoint."""
    stopping: set[str | None] = set()

    def begin(request: gr.Request) -> list[Any]:
        stopping.discard(request.session_hash)
        return [gr.Button(interactive=False), gr.Button(interactive=True)]

    def stop_soon(request: gr.Request) -> None:
        stopping.add(request.session_hash)

    with gr.Blocks(title="DDT", analytics_enabled=False) as page:
        gr.Markdown(f"# DDT\n{summary(studio)}")
        with gr.Row():
            with gr.Column(scale=3, min_width=340):
                controls = controls_of(studio)
            with gr.Column(scale=7):
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", scale=3)
                    stop = gr.Button("Stop", interactive=False, scale=1)
                outputs = outputs_of()
        buttons = [start, stop]
        running = start.click(begin, None, buttons, **AT_ONCE).then(
            drawing(studio, stopping), inputs_kwargs=controls, outputs=outputs, api_name="draw",
            show_progress_on=[outputs[1]],
        )  # fmt: skip
        for ended in (running.success, running.failure):
            ended(lambda: [gr.Button(interactive=True), gr.Button(interactive=False)], None, buttons, **AT_ONCE)
        stop.click(stop_soon, None, None, **AT_ONCE)
    return page
