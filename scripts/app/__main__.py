"""Open a page in the browser that draws what you choose with a run or checkpoint: docs/app.md.

python scripts/app/__main__.py [ckpt=RUN_OR_CHECKPOINT] [port=7860] [max_images=64] [key=value …]
"""

import importlib.util
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from omegaconf import DictConfig

from ddt.checkpoint import folder as ckpt
from ddt.cli import arguments_for, checked, entry_point
from ddt.distributed.prepare import make_accelerator
from ddt.errors import UserError, require
from ddt.generation.generator import Dtype
from scripts.app.controls import Limits, Source
from scripts.app.jobs import Studio

log = logging.getLogger(__name__)
DEMO = "runs/demo"
OWN_HOSTS = ("127.0.0.1", "localhost")


def settings_of(
    ckpt: str | None,
    weights: str,
    autoencoder: str,
    dtype: Dtype | None,
    batch_size: int,
    max_images: int,
    max_steps: int,
    max_queue: int,
    host: str,
    port: int,
) -> None:
    """Refuse settings that cannot be, and a port that is taken, before anything is loaded."""
    require(
        importlib.util.find_spec("gradio") is not None,
        "scripts/app/__main__.py: needs gradio; install it with pip install -e '.[app]'",
    )
    require(batch_size >= 1, f"batch_size={batch_size}: must be at least 1")
    require(max_queue >= 1, f"max_queue={max_queue}: must be at least 1")
    require(host != "", "host=: is empty; leave it out for 127.0.0.1, or give 0.0.0.0")
    require(1 <= port <= 65535, f"port={port}: must lie in 1..65535")
    require(
        ckpt is not None or Path(DEMO).exists(),
        f"ckpt: not set, and there is no {DEMO}; run bash scripts/demo.sh first, or give ckpt=RUN_OR_CHECKPOINT",
    )
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was left a moment ago is free
            probe.bind((host, port))
    except socket.gaierror as error:
        raise UserError(f"host={host}: no such address here; leave it out for 127.0.0.1, or give 0.0.0.0") from error
    except OSError as error:
        raise UserError(f"port={port}: {error.strerror} on host={host}; choose another port=") from error


def serve(studio: Studio, host: str, port: int, max_queue: int, root: Path) -> None:
    """Serve the page until the process is interrupted or told to end. All files are kept under
    `root`.
    """
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(root)}  # read when it is imported
    from scripts.app.page import LAUNCH, build

    page = build(studio).queue(max_size=max_queue, default_concurrency_limit=1, api_open=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        page.launch(server_name=host, server_port=port, allowed_paths=[str(root)], **LAUNCH)
        log.info("open http://%s:%d in your browser; Ctrl-C ends it", host, port)
        threading.Event().wait()
    except KeyboardInterrupt:
        log.info("closed")
    finally:
        page.close(verbose=False)


@entry_point("app")
def main(cfg: DictConfig) -> None:
    """Check, load, serve."""
    arguments = arguments_for(settings_of, checked(cfg))
    settings_of(**arguments)
    limits = Limits(arguments["max_images"], arguments["max_steps"])
    folder = ckpt.find_checkpoint(arguments["ckpt"] or DEMO)
    ckpt.check_weights(folder, arguments["weights"])
    source = Source(folder, *(arguments[key] for key in ("weights", "autoencoder", "dtype", "batch_size")))
    if arguments["host"] not in OWN_HOSTS:
        log.warning(
            "warning: host=%s: there is no password; everyone who reaches port %d of this machine can use the model on "
            "it, and what it runs on",
            arguments["host"],
            arguments["port"],
        )
    with tempfile.TemporaryDirectory(prefix="ddt-app-") as root:
        studio = Studio(source, limits, Path(root).resolve(), make_accelerator("no"))
        serve(studio, arguments["host"], arguments["port"], arguments["max_queue"], studio.root)


if __name__ == "__main__":
    main()
