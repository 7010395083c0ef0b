"""The Hugging Face hub: which settings name a model there, downloads into its cache, uploads.

A path that exists is a path. `owner/name` or `owner/name@revision` is a model of the hub, unless a
folder `owner` is here or it is `runs/name`: then it is a typing error in a path. The local cache is
asked first, and the network only for what is missing there; with HF_HUB_OFFLINE=1 never.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ddt.errors import UserError, first_line, require

HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
TIMEOUT = 10  # seconds for the hub's first answer

Choose = Callable[[list[str]], list[str]]  # of a model's files those to load; UserError where they do not do


def is_hub_id(source: str) -> bool:
    """Return whether a string is a hub id, `owner/name` or `owner/name@revision`, and no path here.

    A misspelt run, `runs/digit_nano`, is not looked up on the hub.
    """
    named = re.fullmatch(rf"{HUB_ID}(@[\w./-]+)?", source) is not None
    folder = source.split("/")[0]
    here = folder == "runs" or os.path.exists(source) or os.path.exists(folder)  # no error for a name too long
    return named and not here and ".." not in source


def pinned(source: str, revision: str | None) -> str:
    """Return `source` at a commit where it is a hub id; a path has none."""
    return f"{source}@{revision}" if revision and is_hub_id(source) else source


def local_path(source: str, label: str, advice: str) -> Path | None:
    """Return the path `source`, None for a hub id; raise UserError where it is neither.

    label: the setting, for messages: "released=FILE". advice: what to do instead.
    """
    path = Path(source)
    if path.exists():
        return path
    if not is_hub_id(source):
        if re.fullmatch(HUB_ID, source) is None:
            raise UserError(f"{label}: no such file or folder, and no hub id (owner/name); {advice}")
        parent = source.split("/")[0]
        why = f"a folder {parent}/ is here" if os.path.exists(parent) else f"{parent}/ is the folder of runs"
        raise UserError(f"{label}: no such file or folder, and {why}, so it is no model of the hub; {advice}")
    return None


def resolve(source: str, label: str, choose: Choose, advice: str) -> Path:
    """Return the path `source`, or the local folder of a hub model with the files of `choose`.

    As `local_path`; advice: also what to do without the hub. Raises UserError also where the hub
    does not give the files.
    """
    path = local_path(source, label, advice)
    return fetch(source, label, choose, advice) if path is None else path


def fetch(
    source: str, label: str, choose: Choose, advice: str, complete: Callable[[Path], bool] = lambda folder: True
) -> Path:
    """Return the local folder of a hub model with the files that `choose` picks of its own.

    From the cache, where `choose` and `complete` accept what is there; else downloaded into it.
    """
    from huggingface_hub import HfApi, snapshot_download

    name, _, revision = source.partition("@")
    with hub_errors(f"{label}: no such file or folder here, and the hub did not give it ({{error}}); {advice}"):
        cached = cached_folder(name, revision or None)
        if cached is not None:
            with contextlib.suppress(UserError):  # the hub may have more
                choose(sorted(str(path.relative_to(cached)) for path in cached.rglob("*") if path.is_file()))
                if complete(cached):
                    return cached
        # without a network this fails at once, where downloads try again and again
        siblings = HfApi().model_info(name, revision=revision or None, timeout=TIMEOUT).siblings or []
        chosen = choose(sorted(sibling.rfilename for sibling in siblings))
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=chosen))


def cached_folder(name: str, revision: str | None) -> Path | None:
    """Return the folder in the hub's cache of a model at a revision, with what is there of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError:
        return None


@contextlib.contextmanager
def hub_errors(message: str) -> Iterator[None]:
    """Turn an error of the hub's client into UserError(message), with its first line as {error}."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the client's errors have no common base across its versions
        raise UserError(message.replace("{error}", first_line(error))) from error


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
