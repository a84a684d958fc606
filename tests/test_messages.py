"""Every option that a message names is an option of the command that prints it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import chiasm
from chiasm.cli import make_app

ROOT = Path(chiasm.__file__).parent
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")

READERS = {"inspect", "plan", "train", "complete", "predict", "serve", "evaluate", "mumap", "register", "rate", "view"}
#: Commands that print an option which a message names without naming a command before it.
PRINTED_BY = {
    **{word: READERS | {"study"} for word in ("--form", "--assume-ras", "--resample", "--resample-tilt")},
    "--series": READERS,
    "--select": {"inspect", "plan", "train", "complete", "predict", "evaluate", "study", "rate"},
    "--subject-pattern": {"inspect", "plan", "train", "complete", "evaluate", "study", "rate"},
    "--runner": {"predict", "study"},
    "--case": {"view"},
    "--trust": {"predict", "serve", "study", "complete"},
    **{word: {"plan", "train"} for word in ("--task", "--factor", "--axis")},
    "--target": {"plan", "train", "complete"},
    **{word: {"complete"} for word in ("--utility", "--folds")},
    **{word: {"serve"} for word in ("--dicom-port", "--send-to", "--allow", "--host", "--port", "--token-file")},
}
#: Modules whose strings are no messages: CSS, the declarations of options, and how another program is called.
NO_MESSAGES = {"reports/drawing.py", "prediction/monai_bundle.py"}


COMMANDS = typer.main.get_command(make_app()).commands  # type: ignore[attr-defined]
OPTIONS = {name: {word for one in command.params for word in one.opts} for name, command in COMMANDS.items()}


def text_of(node: ast.AST) -> str | None:
    """The text of a string, with a mark where a value is put in; None where it is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


def strings_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """All strings but docstrings and the declarations of options, with their lines."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "Option":
            skipped |= {id(part) for part in ast.walk(node)}
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
    for node in ast.walk(tree):
        if id(node) not in skipped and (text := text_of(node)) is not None:
            yield node.lineno, text  # type: ignore[attr-defined]


def mistakes(text: str) -> list[str]:
    """What is wrong with the options that a message names."""
    found = []
    for match in OPTION.finditer(text):
        word = match[0]
        named = [name for name in re.findall(r"chiasm (\w+)", text[: match.start()]) if name in OPTIONS]
        printed_by = {named[-1]} if named else PRINTED_BY.get(word, set())
        if not printed_by:
            found.append(f"{word}: say whose option it is, as in chiasm train {word}")
        found += [f"chiasm {name} has no {word}" for name in sorted(printed_by) if word not in OPTIONS[name]]
    return found


MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


@pytest.mark.parametrize("module", [name for name in MODULES if name not in NO_MESSAGES])
def test_an_option_in_a_message_is_one_of_the_command_that_prints_it(module: str) -> None:
    tree = ast.parse((ROOT / module).read_text())
    told = [
        f"line {line}: {mistake}"
        for line, text in strings_of(tree)
        if not OPTION.fullmatch(text)  # an option alone is a word of a command line
        for mistake in mistakes(text)
    ]
    assert told == []


def test_a_wrong_hint_would_be_found() -> None:
    assert mistakes("Use --folds 1.") == [] or mistakes("Use --nonsense 1.")
    assert mistakes("Use --nonsense 1.") == ["--nonsense: say whose option it is, as in chiasm train --nonsense"]
    assert mistakes("Use chiasm mumap --steps 3.") == ["chiasm mumap has no --steps"]
    assert mistakes("Use chiasm train --steps 3.") == []


@pytest.mark.parametrize("word", sorted(PRINTED_BY))
def test_every_command_that_prints_an_option_has_it(word: str) -> None:
    assert [name for name in PRINTED_BY[word] if word not in OPTIONS[name]] == []
