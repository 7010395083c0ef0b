"""What the server refuses: uploads and all else that the page does not ask for, but gradio offers.

Without a guard, everyone who reaches the port can store files here, and fetch any address by it.
"""

import html
from typing import Any

import gradio as gr
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ddt.config import shown
from ddt.errors import brief

API = "/gradio_api/"
POSTS = ("queue/join", "run/", "call/", "cancel", "reset")  # of the page's buttons and of gradio_client
GETS = ("file=http", "file/http", "proxy=", "deep_link")  # fetch an address, or write the state of a session
MAX_BODY = 2**20  # bytes of a request; a thousand classes are 6 kB


def refusal(scope: Scope) -> tuple[int, str] | None:
    """Return status and reason to refuse an HTTP request, None where the page may ask for it."""
    path = scope["path"].removeprefix(scope.get("root_path", "")).removeprefix(API)
    length = Headers(scope=scope).get("content-length", "")
    if scope["method"] in ("GET", "HEAD"):
        return (403, "this server fetches nothing and keeps no state") if path.lower().startswith(GETS) else None
    if scope["method"] != "POST" or not path.startswith(POSTS):
        return 403, "this server takes no files"
    if not length.isdecimal():
        return 411, "the request does not say how long it is"
    return (413, f"the request is longer than {MAX_BODY} bytes") if int(length) > MAX_BODY else None


class Guard:
    """ASGI middleware that answers what `refusal` refuses."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        refused = refusal(scope) if scope["type"] == "http" else None
        answer = self.app if refused is None else PlainTextResponse(refused[1], refused[0])
        await answer(scope, receive, send)


def app_arguments() -> dict[str, Any]:
    """Return the arguments of the server's FastAPI app, for one server: gradio changes them."""
    return {"middleware": [Middleware(Guard)]}


def refused(text: str) -> gr.Error:
    """Return the error that shows the lines of a user's mistake on the page, as text."""
    return gr.Error(html.escape(text).replace("\n", "<br>"), duration=None, print_exception=False)


def takes(control: gr.components.Component, value: Any) -> bool:
    """Return whether a control takes a value of an event as it is."""
    values = value if isinstance(value, list) else [value]
    if any(isinstance(each, dict | list) for each in values):
        return False
    try:
        return control.preprocess(value) == value
    except (gr.Error, TypeError, ValueError):
        return False


def wanted(control: gr.components.Component) -> str:
    """Return what to give a control."""
    if not isinstance(control, gr.Number | gr.Slider):
        return "give what it offers"
    whole = "whole " if control.precision == 0 else ""
    limits = "" if control.minimum is None else f" from {control.minimum} to {control.maximum}"
    return f"give a {whole}number{limits}"


class GuardedBlocks(gr.Blocks):
    """A page whose controls take text, numbers, booleans and lists of them: no file by its address,
    which gradio would download.
    """

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        """Raise an error that names the control for other values of an event, and those out of its
        range or choices.
        """
        super().validate_inputs(block_fn, inputs)
        for control, value in zip(block_fn.inputs, inputs, strict=True):
            if not takes(control, value):
                raise refused(f"{control.label} = {brief(shown(value), 40)}: {wanted(control)}")
