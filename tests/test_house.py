"""The map in `chiasm/__init__.py` is the house, and imports follow it."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import chiasm

ROOT = Path(chiasm.__file__).parent
PROJECT = Path(__file__).parents[1]


def map_of_the_house() -> list[str]:
    """Dotted names in order, packages as `package.module`, from the map's lines."""
    places: list[str] = []
    text = re.sub(r"\n {5,}(?=\S)", " ", chiasm.__doc__ or "")  # a long line goes on, indented, in the next
    for line in text.splitlines():
        if not (match := re.fullmatch(r"    (\w+) {2,}(.+)", line)):
            continue
        name, told = match.groups()
        if (ROOT / name).is_dir():
            modules = [module.strip() for module in told.partition(":")[2].split(",")]
            places += [f"{name}.{module}" for module in modules] + [name]
        else:
            places.append(name)
    return places


def modules_on_disk() -> dict[str, Path]:
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        dotted = (
            ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__").removesuffix("__init__")
        )
        if dotted not in ("", "__main__"):
            names[dotted] = path
    return names


def imports_of(path: Path) -> set[str]:
    """Names inside chiasm that a module imports at any depth, without the leading `chiasm.`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name if is_module(name) else module for name in names}
    return {name.removeprefix("chiasm.") for name in found if name.startswith("chiasm.")}


def is_module(name: str) -> bool:
    path = ROOT.parent / Path(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def test_every_module_is_on_the_map_and_every_place_on_the_map_exists() -> None:
    assert sorted(map_of_the_house()) == sorted(modules_on_disk())


@pytest.mark.parametrize("name", sorted(modules_on_disk()))
def test_a_module_imports_only_from_lines_above_its_own(name: str) -> None:
    order = {place: position for position, place in enumerate(map_of_the_house())}
    for imported in imports_of(modules_on_disk()[name]):
        assert order[imported] < order[name], f"{name} imports {imported}, which stands below it on the map"


def test_a_wrong_import_would_be_found(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from chiasm.training import loop\nimport chiasm.errors\n")
    assert imports_of(wrong) == {"training.loop", "errors"}


def silent_functions(text: str) -> list[str]:
    """Name the public functions and methods that raise and whose docstring has no section `Raises`."""
    places: list[tuple[str, ast.AST]] = [("", ast.parse(text))]
    silent = []
    while places:
        owner, place = places.pop()
        for node in ast.iter_child_nodes(place):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name[0] == "_":
                continue
            if isinstance(node, ast.ClassDef):
                places.append((f"{owner}{node.name}.", node))
            elif "Raises:" not in (ast.get_docstring(node) or ""):
                silent += [owner + node.name] * any(isinstance(part, ast.Raise) for part in ast.walk(node))
    return silent


@pytest.mark.parametrize("name", sorted(modules_on_disk()))
def test_a_public_function_that_raises_says_so(name: str) -> None:
    from chiasm.cli import VERBS

    # the docstring of a verb is its help, and every mistake of a verb ends in exit code 2
    verbs = {verb.__name__ for group in VERBS.values() for verb in group} if name.startswith("commands.") else set()
    assert sorted({*silent_functions(modules_on_disk()[name].read_text())} - verbs) == []


def test_a_function_that_raises_in_silence_would_be_found() -> None:
    documented = '"""Do it.\n\n    Raises:\n        ValueError: Always.\n    """'
    said = f"def said():\n    {documented}\n    raise ValueError\n"
    silent = "def silent(x):\n    if x:\n        raise ValueError\n"
    method = (
        "class Thing:\n    def act(self):\n        raise ValueError\n    def _own(self):\n        raise ValueError\n"
    )
    assert silent_functions(said) == []
    assert silent_functions(silent) == ["silent"]
    assert silent_functions(method) == ["Thing.act"]


@pytest.mark.parametrize(
    ("arguments", "loaded"),
    [
        (["--help"], ""),
        (["--version"], ""),
        (["train", "--help"], ""),
        (["train", "--no-such-option"], ""),
        (["train"], "pydantic"),
        (["no-such-verb"], "pydantic"),
    ],
)
def test_help_and_wrong_arguments_never_load_torch_and_a_help_not_even_pydantic(
    arguments: list[str], loaded: str
) -> None:
    program = (
        "import sys\nfrom chiasm.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'monai', 'scipy.stats', 'matplotlib', 'pandas', 'nilearn', 'pydantic'}\n"
        "heavy &= set(sys.modules)\n"
        f"assert heavy <= {{'{loaded}'}}, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif("CI" not in os.environ, reason="only CI promises a machine without a GPU")
def test_no_cuda_wheel_came_in_on_ci() -> None:
    names = {(distribution.metadata["Name"] or "").lower() for distribution in importlib.metadata.distributions()}
    assert not {name for name in names if name.startswith(("nvidia", "cuda", "triton"))}


def test_importing_chiasm_is_light() -> None:
    program = "import chiasm, sys; assert not {'torch', 'numpy', 'typer'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_no_file_names_a_private_path_or_holds_a_volume() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in listed if name.endswith((".nii", ".nii.gz", ".mha", ".dcm", ".npy"))]
