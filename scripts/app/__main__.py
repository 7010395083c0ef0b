"""Open a page in the browser that samples with a run or checkpoint (docs/sampling.md, "The app").

python -m scripts.app [ckpt=RUN_OR_CHECKPOINT] [guide=RUN_OR_CHECKPOINT] [port=7860] [key=value …]
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from ddt.cli import command
from ddt.config import require_packages
from ddt.errors import UserError

if TYPE_CHECKING:
    from scripts.app.settings import AppSettings
    from scripts.app.studio import Studio

log = logging.getLogger(__name__)
WARNING = (
    "warning: host=%s: there is no password; everyone who reaches port %d of this machine can use the model on it, "
    "and what it runs on"
)


def check_port(host: str, port: int) -> None:
    """Raise UserError where the app cannot listen at this address."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just left is free
            probe.bind((host, port))
    except socket.gaierror as error:
        raise UserError(f"host={host}: no such address here; leave it out for 127.0.0.1, or give 0.0.0.0") from error
    except OSError as error:
        raise UserError(f"port={port}: {error.strerror} on host={host}; choose another port=") from error


def serve(studio: Studio, settings: AppSettings) -> None:
    """Serve the page until SIGINT or SIGTERM. All files lie under `studio.root`: pictures of it are
    shown, others downloaded, and nothing is uploaded to it.
    """
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(studio.root)}  # read at its import
    from scripts.app.guard import app_arguments
    from scripts.app.page import LAUNCH, build_page

    page = build_page(studio).queue(max_size=settings.max_queue, default_concurrency_limit=1, api_open=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        page.launch(
            server_name=settings.host, server_port=settings.port, root_path=settings.root_path or None,
            app_kwargs=app_arguments(), **LAUNCH,
        )  # fmt: skip
        log.info("open http://%s:%d in your browser; Ctrl-C ends it", settings.host, settings.port)
        threading.Event().wait()
    except KeyboardInterrupt:
        log.info("closed")
    finally:
        studio.close()
        page.close(verbose=False)


@command("app", settings="scripts.app.settings.AppSettings")
def main(settings: AppSettings) -> None:
    """Sample on a page in the browser."""
    require_packages(("gradio",), "python -m scripts.app")
    check_port(settings.host, settings.port)
    from ddt.distributed.prepare import make_accelerator
    from scripts.app.studio import Studio

    with tempfile.TemporaryDirectory(prefix="ddt-app-") as root:
        studio = Studio(settings, Path(root).resolve(), make_accelerator())
        if settings.host not in ("127.0.0.1", "localhost"):
            log.warning(WARNING, settings.host, settings.port)
        serve(studio, settings)


if __name__ == "__main__":
    main()
