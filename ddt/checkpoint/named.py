"""Published models by name: downloaded, converted once into a cache folder, and loaded from there.

The folder is `models/NAME` of DDT_CACHE, or of ~/.cache/ddt.
"""

import logging
from pathlib import Path

from filelock import FileLock

from ddt.checkpoint.convert import ConvertSettings, convert
from ddt.checkpoint.models import PUBLISHED
from ddt.checkpoint.published import find_released
from ddt.errors import UserError
from ddt.files import cache_folder

log = logging.getLogger(__name__)


def named_checkpoint(name: str) -> Path:
    """Return the checkpoint folder of a published model, a name of `ddt.list_models`.

    Raises UserError where the hub does not give its file, with what to do without the hub.
    """
    folder = cache_folder("models") / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # of several processes the first converts
        if not (folder / "manifest.json").is_file():
            model = PUBLISHED[name]
            settings = "".join(f" {key}={value}" for key, value in model.settings.items())
            command = f"python scripts/convert_checkpoint.py released=FILE{settings} out={folder}"
            try:
                find_released(name)
            except UserError as error:
                raise UserError(
                    f"{error}. Without the hub: copy the weights of {model.source} to this machine and, with their "
                    f"path as FILE, run once {command}; sample.py takes a copy of the autoencoder as autoencoder=FOLDER"
                ) from error
            log.info("%s: is converted once, into %s", name, folder)
            convert(ConvertSettings(released=name, out=str(folder)))
    return folder
