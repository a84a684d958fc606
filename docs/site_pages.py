"""Pages of the site that are written when it is built, so that none of them is out of date.

A file in `docs/` stands for each of them; its content is replaced.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

#: What functions return or raise, and how a file is read: documented beside `chiasm.__all__`.
TYPES = (
    "chiasm.prediction.folders.Predictor",
    "chiasm.prediction.synthesis.Synthesis",
    "chiasm.volumes.Volume",
    "chiasm.volumes.Geometry",
    "chiasm.volumes.Reading",
    "chiasm.errors.ChiasmError",
)
READERS = ("chiasm.volumes.read_volume", "chiasm.volumes.write_volume")


def fill_page(page: str, text: str) -> str:
    """Return what stands on a page of the site.

    Args:
        page: Its name below `docs/`, without suffix.
        text: What its file holds.

    Returns:
        Markdown: written here where `page` is a page of `PAGES`, a notebook's cells, else `text`; links to files
        outside `docs/` lead to their pages of the site.
    """
    if page.startswith("notebooks/"):
        return notebook_page(json.loads(text))
    return _links(PAGES[page]() if page in PAGES else text)


def _links(text: str) -> str:
    """Let links to files that have a page of the site lead to it."""
    for file, page in OUTSIDE.items():
        text = re.sub(rf"\]\((?:\.\./)+{re.escape(file)}", f"]({page}", text)
    return text


def outside_page(file: str) -> str:
    """Return a document that lies beside `docs/`, its links as they are seen from there."""
    return (ROOT / file).read_text(encoding="utf-8").replace("](docs/", "](")


# Commands


def commands_page() -> str:
    """Return the reference of the command: each verb by group, its arguments and options, as `--help` says them."""
    from typer.main import get_command

    from chiasm.cli import VERBS, make_app

    command: Any = get_command(make_app())
    lines = [
        "# Commands",
        "",
        "This page is made from the help of the command; `chiasm VERB --help` says the same in a terminal.",
    ]
    for group, verbs in VERBS.items():
        lines += ["", f"## {group}"]
        for verb in verbs:
            lines += _verb(verb.__name__, command.commands[verb.__name__])
    lines += ["", "## Options of all verbs", "", *_table(command.params)]
    return "\n".join(lines) + "\n"


def _verb(name: str, verb: Any) -> Iterator[str]:
    """Document one verb."""
    arguments = [one for one in verb.params if _is_argument(one)]
    options = [one for one in verb.params if not _is_argument(one) and not one.hidden]
    usage = " ".join(
        [f"chiasm {name}", *map(_placeholder, arguments), *(f"{one.opts[-1]} ..." for one in options if one.required)]
    )
    yield from ("", f"### chiasm {name}", "", inspect.cleandoc(verb.help), "", "```text", usage + " [OPTIONS]", "```")
    if arguments:
        yield from ("", *_table(arguments))
    for panel in dict.fromkeys(one.rich_help_panel for one in options):
        yield from ("", f"**{panel or 'Options'}**", "")
        yield from _table([one for one in options if one.rich_help_panel == panel])


def _is_argument(parameter: Any) -> bool:
    return not parameter.opts[0].startswith("-")


def _placeholder(argument: Any) -> str:
    shown = argument.name.upper() + ("..." if argument.nargs == -1 else "")
    return shown if argument.required else f"[{shown}]"


def _table(parameters: Iterable[Any]) -> list[str]:
    """Return rows of a table: the name, what it means, what holds without it."""
    rows = ["| | what it means | default |", "|---|---|---|"]
    for one in parameters:
        named = [_placeholder(one)] if _is_argument(one) else [*one.opts, *one.secondary_opts]
        names = " ".join(f"`{name}`" for name in named)
        rows.append(f"| {names} | {_cell(one.help or '')} | {_default(one)} |")
    return rows


def _cell(text: str) -> str:
    """Return a text that stands in a cell: no markup of the terminal's, no column of its own."""
    without = re.sub(r"\[/?(?:bold|italic|dim|link)[^\]]*\]", "", text)
    return re.sub(r"([|*_<>\[\]])", r"\\\1", " ".join(without.split()))


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    return "" if value in (None, False, (), [], "") or callable(value) else f"`{value}`"


# Python


def python_page() -> str:
    """Return the reference of the functions and types, by Sphinx's autodoc from their docstrings."""
    import chiasm

    verbs = [f"chiasm.{name}" for name in chiasm.__all__ if not name.startswith("_")]
    parts = [
        "# Python",
        "",
        "The verbs of the command are functions, and a finished model is an object. This page is made from their",
        "docstrings.",
        *_documented("Functions", "autofunction", verbs),
        *_documented("Reading and writing volumes", "autofunction", READERS),
        *_documented("What they take, return and raise", "autoclass", TYPES),
    ]
    return "\n".join(parts) + "\n"


def _documented(title: str, directive: str, names: Sequence[str]) -> Iterator[str]:
    yield from ("", f"## {title}")
    members = "\n   :members:" if directive == "autoclass" else ""
    for name in names:
        yield from ("", f"### {name.rpartition('.')[2]}", "", "```{eval-rst}")
        yield from (f".. {directive}:: {name}{members}", "```")


# Notebooks


def notebook_page(notebook: Mapping[str, Any]) -> str:
    """Return the cells of a notebook as Markdown: text as it is, code in blocks, what it printed below."""
    return "\n\n".join("\n".join(_cell_of(cell)) for cell in notebook["cells"]) + "\n"


def _cell_of(cell: Mapping[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield from ("```python", source, "```")
    printed = "".join("".join(output.get("text", ())) for output in cell.get("outputs", ()))
    if printed:
        yield from ("", "```text", printed.rstrip("\n"), "```")


#: Files beside `docs/` that are pages of the site.
OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

PAGES: Mapping[str, Callable[[], str]] = {
    "contributing": lambda: outside_page("CONTRIBUTING.md"),
    "changelog": lambda: outside_page("CHANGELOG.md"),
    "reference/commands": commands_page,
    "reference/python": python_page,
}
