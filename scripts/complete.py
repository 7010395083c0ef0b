"""Complete commands in bash: `eval "$(python scripts/complete.py)"`, then `python train.py mo<Tab>`.

Hydra's own completion starts the whole program for each key press, which imports torch. This reads conf/ alone.
"""

import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.options import PATHS, Command, command

# What readline takes for the word begins after the last "=", where "=" is one of bash's word breaks, as by default.
BASH = """
_ddt_complete() {
    local line="${COMP_LINE:0:COMP_POINT}"
    local word="${line##*[[:space:]]}" prefix=""
    [[ $COMP_WORDBREAKS == *=* && $word == *=* ]] && prefix="${word%"${word##*=}"}"
    local IFS=$'\\n'
    COMPREPLY=($(PYTHON SCRIPT "$line"))
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=./] ]] && compopt -o nospace 2>/dev/null
    COMPREPLY=("${COMPREPLY[@]#"$prefix"}")
}
complete -o default -o bashdefault -F _ddt_complete python python3 torchrun sbatch
"""


def paths(start: str) -> list[str]:
    """Return the files and folders that begin so; a folder ends with a slash."""
    folder, _, name = start.rpartition("/")
    parent = Path(folder or ("/" if start.startswith("/") else "."))
    found = parent.iterdir() if parent.is_dir() else ()
    prefix = f"{folder}/" if "/" in start else ""
    return [f"{prefix}{p.name}{'/' if p.is_dir() else ''}" for p in found if p.name.startswith(name)]


def script_of(words: list[str]) -> Command | None:
    """Return the entry point that a command line names; scripts/slurm/train.sbatch starts train.py."""
    for word in words:
        path = Path(word).resolve()
        found = command(path.parent.parent.parent / "train.py" if path.name == "train.sbatch" else path)
        if found is not None:
            return found
    return None


def candidates(line: str) -> list[str]:
    """Return what the last word of a command line may become; nothing where the line names none of our commands."""
    before, _, word = line.rpartition(" ")
    words = before.split()
    found = script_of(words)
    if found is None:
        return []
    given = dict(part.lstrip("+").split("=", 1) for part in words if "=" in part)
    chosen = found.with_arguments(given)
    key, equals, value = word.partition("=")
    settings = dict(found.settings)
    for group in found.groups:
        settings |= found.settings_of(group, chosen)
    if not equals:
        names = [f"{name}=" for name in (*found.settings, *found.groups)]
        names += [f"{name}=" for name in settings if "." in name and "." in word]
        if "." not in word:
            names += sorted({f"{name.partition('.')[0]}." for name in settings if "." in name})
        options = ["--help", "--cfg", "--multirun"] if word.startswith("-") else []
        return [name for name in [*names, *options] if name.startswith(word)]
    if key in found.groups:
        values = list(found.groups[key].choices)
    elif key in PATHS:
        values = paths(value)
    else:
        # the words that the comment offers, or else the default
        setting = settings.get(key)
        offered = re.match(r"[\w.]+(?:(?: \| |, | or )[\w.]+)+(?=[ ;:]|$)", setting.comment) if setting else None
        values = re.split(r" \| |, | or ", offered[0]) if offered else [setting.value] if setting else []
    return [f"{key}={found}" for found in values if found.startswith(value)]


def main() -> None:
    """Print what a line may go on with, or, without one, what bash evaluates to ask."""
    if len(sys.argv) > 1:
        print("\n".join(candidates(sys.argv[1])))
        return
    quoted = {"PYTHON": shlex.quote(sys.executable), "SCRIPT": shlex.quote(str(Path(__file__).resolve()))}
    print(re.sub("PYTHON|SCRIPT", lambda match: quoted[match[0]], BASH).strip())


if __name__ == "__main__":
    main()
