"""Write docs/options.md: every setting of every command, from the comments of conf/ and the heads of the scripts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.options import CONF, ROOT, Choice, Command, Group, Setting, commands

BY_FILE = "by file"  # in place of a default that is another one in each file of a group
PAGE = ROOT / "docs" / "options.md"
INTRODUCTION = """
# Every option of every command

Written by `python scripts/document_options.py` from the comments in `conf/`; a test holds it up to date.

A setting is given as `key=value`, a file of a group as `group=name`, a setting of a group as `group.key=value`.
`???` has no default and must be given. `null` is nothing; what that means stands beside it. The same lists, shorter:
`--help` of each command. What a list of arguments comes to: `--cfg job`.

In bash, `eval "$(python scripts/complete.py)"` (in `~/.bashrc`: with the whole path) makes Tab complete settings,
groups, choices and files after `python`, `torchrun` and `sbatch`. It answers in a tenth of a second, because it
imports neither torch nor Hydra; Hydra's own `-sc install=bash` works too and takes seconds a key. Other shells have not
been tried.
""".strip()


def cell(text: str) -> str:
    """Return a text as a cell of a table shows it."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def code(text: str) -> str:
    """Return a value as a cell of a table shows it."""
    if text == BY_FILE:
        return text
    return f"`{text}`".replace("|", "\\|")


def heading(group: Group) -> str:
    """Return what a group is called: its name, and whose it is where two share the name."""
    owner = group.folder.parent.relative_to(CONF).as_posix()
    return group.name if owner == "." else f"{group.name} of {owner}.py"


def anchor(text: str) -> str:
    """Return the link target that GitHub and mkdocs make of a heading."""
    return text.lower().replace(".", "").replace("/", "").replace(" ", "-")


def settings_table(settings: dict[str, Setting]) -> list[str]:
    """Return settings as a table."""
    lines = [f"| {code(key)} | {code(found.value)} | {cell(found.comment)} |" for key, found in settings.items()]
    return ["| setting | default | |", "|---|---|---|", *lines]


def command_section(found: Command) -> list[str]:
    """Return what there is to say of a command."""
    lines = [f"## {found.name}", "", found.description, ""]
    if found.usage:
        lines += ["```", *found.usage, "```", ""]
    if found.settings:
        lines += [*settings_table(found.settings), ""]
    if found.groups:
        lines += ["| group | file without another choice | |", "|---|---|---|"]
        for name, group in found.groups.items():
            link = f"[{name}](#{anchor(heading(group))})"
            lines.append(f"| {link} | {code(found.chosen.get(name, 'null'))} | {cell(found.comments.get(name, ''))} |")
        lines.append("")
    return lines


def own_values(choice: Choice, keys: set[str]) -> str:
    """Return what a choice sets, of some keys, and what it chooses of other groups."""
    values = [f"{key}={found.value}" for key, found in choice.settings.items() if key in keys]
    return " ".join(code(text) for text in [*(f"{group}={name}" for group, name in choice.overrides.items()), *values])


def group_section(group: Group) -> list[str]:
    """Return a group's files with what they set, and what each of the settings means, for each thing that is built."""
    lines = [f"### {heading(group)}", ""]
    targets = list(dict.fromkeys(choice.target for choice in group.choices.values() if choice.target is not None))
    tables, differing = [], {}
    for target in targets:
        members = {name: choice for name, choice in group.choices.items() if choice.target == target}
        keys = dict.fromkeys(key for choice in members.values() for key in choice.settings)
        table = {}
        for key in keys:
            found = [choice.settings[key] for choice in members.values() if key in choice.settings]
            same = len({setting.value for setting in found}) == 1
            comment = next((setting.comment for setting in found if setting.comment), "")
            table[f"{group.name}.{key}"] = Setting(found[0].value if same else BY_FILE, comment)
            if not same:
                differing.update({(name, key): None for name in members})
        if table:
            names = ", ".join(code(name) for name in members)
            title = [f"Settings of {names}:", ""] if len(targets) > 1 else []
            tables += [*title, *settings_table(table), ""]
    lines += ["| file | what it is | what it sets |", "|---|---|---|"]
    for name, choice in group.choices.items():
        keys = set(choice.settings) if group.is_preset else {key for member, key in differing if member == name}
        lines.append(f"| {code(f'{group.name}={name}')} | {cell(choice.head)} | {own_values(choice, keys)} |")
    return [*lines, "", *tables]


def shell_section() -> list[str]:
    """Return the head comments of the shell scripts."""
    lines = ["## Shell scripts", ""]
    files = [*sorted((ROOT / "scripts").glob("*.sh")), *sorted((ROOT / "scripts").rglob("*.sbatch"))]
    for path in files:
        head = []
        for line in path.read_text().splitlines()[1:]:
            if not line.startswith("#"):
                break
            if not line.startswith("#SBATCH"):
                head.append(line.lstrip("# "))
        lines += [f"- `{path.relative_to(ROOT).as_posix()}`: {' '.join(head).replace('<', '&lt;')}"]
    return [*lines, ""]


def page() -> str:
    """Return docs/options.md."""
    found = commands()
    groups = {group.folder: group for command in found for group in command.groups.values()}
    lines = [INTRODUCTION, ""]
    lines += [f"- [{command.name}](#{anchor(command.name)})" for command in found]
    lines += ["- [Shell scripts](#shell-scripts)", "- [Groups](#groups)", ""]
    for command in found:
        lines += command_section(command)
    lines += [*shell_section(), "## Groups", "", "Each is a folder of `conf/`, of which a command takes one file.", ""]
    for group in sorted(groups.values(), key=heading):
        lines += group_section(group)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
