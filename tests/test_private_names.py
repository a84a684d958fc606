"""Tests use what modules offer, so that what a module keeps to itself can change."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = sorted(Path(__file__).parent.glob("*.py"))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(path: Path) -> Iterator[str]:
    """Private names of chiasm's modules that a test imports, patches or reaches."""
    tree = ast.parse(path.read_text())
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "chiasm":
            yield from (alias.name for alias in node.names if is_private(alias.name))
            modules |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            of_tuples = node.attr in ("_replace", "_fields", "_asdict")
            yield from [f"{node.value.id}.{node.attr}"] if is_private(node.attr) and not of_tuples else []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            words = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            ours = any(isinstance(one, ast.Name) and one.id in modules for one in node.args)
            yield from (
                word for word in words if (ours or word.startswith("chiasm.")) and is_private(word.split(".")[-1])
            )


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_no_test_reaches_into_what_a_module_keeps_to_itself(path: Path) -> None:
    assert list(private_names(path)) == []


def test_a_private_name_would_be_found(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from chiasm.training import loop\nfrom chiasm.storage import _sync\nloop._signals()\n"
        "monkeypatch.setattr(loop, '_cut', 1)\nmonkeypatch.setattr('chiasm.cli._version', 1)\nother._private\n"
    )
    assert sorted(private_names(wrong)) == ["_cut", "_sync", "chiasm.cli._version", "loop._signals"]
