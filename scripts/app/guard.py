"""What the server refuses: uploads and all else that the page does not ask for, but gradio offers.

Without a guard, everyone who reaches the port can store files here, and fetch any address by it.
"""

from typing import Any

import gradio as gr
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

API = "/gradio_api/"
POSTS = ("queue/join", "run/", "call/", "cancel", "reset")  # of the page's buttons and of gradio_client
GETS = ("file=http", "file/http", "proxy=", "deep_link")  # fetch an address, or write the state of a session
MAX_BODY = 2**20  # bytes of a request; a thousand classes are 6 kB


def refusal(scope: Scope) -> tuple[int, str] | None:
    """Return status and reason to refuse an HTTP request, None where the page may ask for it."""
    path, length = scope["path"].removeprefix(API), Headers(scope=scope).get("content-length", "")
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


class GuardedBlocks(gr.Blocks):
    """A page whose controls take text, numbers, booleans and lists of them: no file by its address,
    which gradio would download.
    """

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        """Raise gradio's error for other values of an event."""
        values = [each for value in inputs for each in (value if isinstance(value, list) else [value])]
        if any(isinstance(value, dict | list) for value in values):
            raise gr.Error("a control has a value of no kind that it takes", print_exception=False)
        super().validate_inputs(block_fn, inputs)
