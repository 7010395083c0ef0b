"""The page of the app: its controls, and the functions of its buttons."""

import secrets
from collections.abc import Callable
from typing import Any

import gradio as gr
import torch
from gradio.context import LocalContext

from ddt.errors import UserError, os_error_line
from ddt.generation.image_set import MAX_SEED
from ddt.sampling.settings import SamplerSettings
from scripts.app.controls import (
    FORECASTS,
    LABELS,
    SOLVER_CHOICES,
    class_choices,
    has_base_head,
    in_page_words,
    sharing_choices,
)
from scripts.app.guard import GuardedBlocks, refused
from scripts.app.studio import Interrupted, Result, Studio
from scripts.app.view import galleries, numbers, summary

CSS = """
html {scrollbar-gutter: stable}  /* the page keeps its width when it grows beyond the window */
#dice {font-size: 1.6em}
#numbers th:not(:first-child), #numbers td:not(:first-child) {white-space: nowrap}
.grid-wrap {min-height: 0 !important}
.grid-container {grid-template-columns: repeat(var(--grid-cols), minmax(52px, 1fr)) !important}
.grid-container {grid-auto-rows: auto !important}
.caption-label {font-size: 0.65em !important; padding: 1px 4px !important}
"""
SCROLL = """() => {
    const place = innerWidth < 800 ? "start" : "nearest"  // a phone shows the result below the controls
    document.getElementById("numbers").scrollIntoView({behavior: "smooth", block: place})
}"""
LAUNCH: dict[str, Any] = {
    "share": False,
    "ssr_mode": False,
    "prevent_thread_lock": True,
    "quiet": True,
    "footer_links": [],
    "run_history": False,
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
PAGE_ONLY: dict[str, Any] = {"queue": False, "api_visibility": "private"}  # of events that change the page alone
Fields = dict[str, gr.components.Component]


def add_controls(studio: Studio) -> Fields:
    """Lay out the controls with the checkpoint's values; return them by the names of `Controls`."""
    own, settings, fields = studio.controls, studio.settings, Fields()

    def add(kind: type[gr.components.Component], name: str, info: str | None = None, **more: Any) -> None:
        more = {"value": getattr(own, name), "min_width": 100} | more
        fields[name] = kind(label=LABELS[name], info=info, **more)

    def slider(name: str, info: str, minimum: float, maximum: float, step: float) -> None:
        most = max(maximum, getattr(own, name))
        add(gr.Slider, name, info, minimum=minimum, maximum=most, step=step, precision=0 if step == 1 else None)

    def whole(name: str, info: str, **more: Any) -> None:
        add(gr.Number, name, info, precision=0, **more)

    def times(lo: str, hi: str, to: str) -> None:
        with gr.Row():
            slider(lo, "0 is noise", 0, 1, 0.01)
            slider(hi, to, 0, 1, 0.01)

    with gr.Group():
        names = class_choices(studio.stored["class_names"])
        add(gr.Dropdown, "classes", "click, and type to search", choices=names, multiselect=True)
        slider("num_images", f"{settings.max_images} in all, at most", 1, max(2, settings.max_images), 1)
        with gr.Row(equal_height=True):
            whole("seed", "of the first image of each class", minimum=0, maximum=MAX_SEED - 1, scale=4)
            dice = gr.Button("⚄", scale=1, min_width=56, elem_id="dice")
        dice.click(lambda: secrets.randbelow(2**31), None, fields["seed"], **PAGE_ONLY)
    with gr.Group():
        slider("num_steps", "of the solver, from noise to image", 1, max(2, settings.max_steps), 1)
        what = "towards the class" if settings.guide is None else "away from the guide"
        slider("cfg_scale", f"{what}; 1 is none", 0, 10, 0.01)
    choices = sharing_choices(studio.stored)
    if choices:
        with gr.Group():
            named = [(SHARING_NAMES[name], name) for name in choices]
            add(gr.Radio, "sharing", "at which steps the encoder runs", choices=named)
            whole("every", "the encoder runs at steps 0, k, 2k, …")
            whole("budget", "number of steps, which are chosen to fit")
            add(gr.Radio, "forecast", "z is held, as published, or extrapolated", choices=FORECASTS)
            add(gr.Checkbox, "compare")
        show_dependents(fields, own.sharing)
    with gr.Accordion("Advanced", open=False):
        add(gr.Dropdown, "solver", choices=SOLVER_CHOICES)
        times("cfg_from", "cfg_to", "1 is the image")
        with gr.Row(equal_height=True):
            add(gr.Number, "timeshift", "above 1: early steps")
            length = "" if own.last_step is None else str(own.last_step)  # an empty gr.Number shows 0
            ends = SamplerSettings(**studio.stored["sampler"]).t_end == 1  # else no last step follows
            add(gr.Textbox, "last_step", "length in t", value=length, placeholder="1 / steps", visible=ends)
        if has_base_head(studio.stored):
            slider("internal_scale", "away from the base head; 1 is none", 0, 10, 0.01)
            times("internal_from", "internal_to", "1 is the image")
    return fields


def show_dependents(fields: Fields, sharing: str) -> None:
    """Show the controls of encoder sharing that have an effect, now and when it changes."""
    dependents = [fields[name] for name in ("every", "budget", "forecast", "compare")]

    def visible(sharing: str) -> list[bool]:
        return [sharing == "uniform", sharing == "dp", sharing != "off", sharing != "off"]

    for field, shown in zip(dependents, visible(sharing), strict=True):
        field.visible = shown
    fields["sharing"].change(
        lambda sharing: [gr.update(visible=on) for on in visible(sharing)], fields["sharing"], dependents, **PAGE_ONLY
    )


def add_outputs() -> list[gr.components.Component]:
    """Lay out the result: numbers, comparison, images, command, files."""
    look: dict[str, Any] = {"object_fit": "contain", "height": "auto", "interactive": False}
    look |= {"buttons": ["download", "fullscreen"]}
    text = gr.Markdown("Sampling a first set …", elem_id="numbers")
    slider = gr.ImageSlider(label="Without sharing, and with it", interactive=False, visible=False, elem_id="slider")
    images = gr.Gallery(label="Images", elem_id="images", **look)
    unshared = gr.Gallery(label="Without sharing", elem_id="unshared", visible=False, **look)
    command = gr.Textbox(
        label="The same on the command line", visible=False, interactive=False, buttons=["copy"], elem_id="command"
    )
    files = gr.File(label="Files", visible=False, interactive=False, file_count="multiple")
    return [text, slider, images, unshared, command, files]


def still_wanted() -> Callable[[], bool]:
    """Return a function that tells whether a client still waits for the current event.

    gradio forgets an event that was cancelled, and marks one whose client has gone.
    """
    page, name = LocalContext.blocks.get(), LocalContext.event_id.get(None)
    assert page is not None
    events = page._queue.event_ids_to_events
    return lambda: name in events and events[name].alive


def shown(result: Result, class_names: list[str]) -> list[Any]:
    """Return the values of `add_outputs`."""
    folder, command = result.sets[0].folder, result.sets[0].request.command
    files = [str(path) for path in sorted(folder.iterdir()) if path.suffix in (".npz", ".zip", ".json")]
    more = [gr.update(value=value, visible=True) for value in (command, files)]
    return [numbers(result), *galleries(result.sets, class_names), *more]


def build_page(studio: Studio) -> gr.Blocks:
    """Return the page of a loaded checkpoint; `/sample` is its one public endpoint."""

    def sample(progress: gr.Progress = gr.Progress(), **values: Any) -> list[Any]:  # noqa: B008
        """Sample the controls' values, without them the opening set; return the outputs' values."""
        wanted = still_wanted()
        try:
            result = studio.sample(values, progress, wanted) if values else studio.opening(progress, wanted)
            return shown(result, studio.stored["class_names"])
        except Interrupted:
            raise refused("stopped") from None
        except (UserError, FloatingPointError) as error:
            raise refused(in_page_words(str(error))) from None
        except OSError as error:
            raise refused(os_error_line(error)) from None
        except torch.OutOfMemoryError:
            name = LABELS["num_images"]
            raise refused(f"{name}: these need more memory than the GPU has; choose fewer") from None

    with GuardedBlocks(title="DDT", analytics_enabled=False) as page:
        gr.Markdown(f"# DDT\n{summary(studio)}")
        with gr.Row():
            with gr.Column(scale=3, min_width=340):
                controls = add_controls(studio)
            with gr.Column(scale=7, min_width=340):
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", scale=3)
                    stop = gr.Button("Stop", scale=1)
                outputs = add_outputs()
        look: dict[str, Any] = {"show_progress_on": [outputs[2]], "concurrency_id": "sample"}
        opening = page.load(sample, None, outputs, api_name="opening", api_visibility="private", **look)
        running = start.click(sample, inputs_kwargs=controls, outputs=outputs, api_name="sample", **look)
        start.click(None, js=SCROLL, **PAGE_ONLY)
        stop.click(None, None, None, cancels=[opening, running], api_visibility="private")
    return page
