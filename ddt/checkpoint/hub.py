"""The Hugging Face hub: recognizing its names, downloads and uploads of checkpoints."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from ddt.errors import UserError, first_line, require

HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
FILES = ("*.json", "*.safetensors")  # what loading reads; * also matches sub-folders


def is_hub_id(source: str) -> bool:
    """Return whether a string is a hub id, `owner/name` or `owner/name@revision`, and no path here.

    A misspelt run, `runs/digit_nano`, is not looked up on the hub while a folder `runs` exists.
    """
    named = re.fullmatch(rf"{HUB_ID}(@[\w./-]+)?", source) is not None
    return named and not Path(source).exists() and not Path(source.split("/")[0]).exists()


@contextlib.contextmanager
def hub_errors(message: str) -> Iterator[None]:
    """Turn an error of the hub's client into UserError(message), with its first line as {error}."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the client's errors have no common base across its versions
        raise UserError(message.replace("{error}", first_line(error))) from error


def download(source: str) -> Path:
    """Return the local folder of a hub model, `owner/name[@revision]`, downloaded unless cached.

    Raises UserError where the download fails or the model is not one of this project's.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    with hub_errors(
        f"{source}: no such folder here, and the hub did not give it ({{error}}); give a run folder such as "
        "runs/digits_nano, one of its checkpoints/step_*, or the name of a model on the hub"
    ):
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(FILES)))
    require(
        (folder / "manifest.json").is_file(),
        f"{source}: is on the hub, but no model of this project (no manifest.json); a published checkpoint goes "
        "through scripts/convert_checkpoint.py",
    )
    return folder


def check_push(name: str) -> None:
    """Raise UserError unless `name` is a valid hub id, still free, and a user is logged in."""
    require(re.fullmatch(HUB_ID, name) is not None, f"push={name}: no name of a model; write owner/name")
    from huggingface_hub import HfApi

    api = HfApi()
    with hub_errors(f"push={name}: the hub does not take it ({{error}}); log in by `hf auth login`, or leave it out"):
        api.whoami()
        exists = api.repo_exists(name)
    require(not exists, f"push={name}: exists already and is not written over; choose another name")


def push(folder: Path, name: str) -> str:
    """Create the private model `name` on the hub, upload a folder and return its URL.

    Raises UserError where that fails, with the command that uploads the folder.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with hub_errors(
        f"push={name}: {folder} is written, but the hub did not take it ({{error}}); upload it by "
        f"`hf upload {name} {folder}`"
    ):
        api.create_repo(name, private=True, exist_ok=False)
        api.upload_folder(repo_id=name, folder_path=folder)
    return f"https://huggingface.co/{name}"
