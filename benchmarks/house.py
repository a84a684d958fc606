"""Measure how the code is built: lines, complexity, long functions, large classes, many parameters, and rooms.

    python benchmarks/house.py                    # a table of src/chiasm
    python benchmarks/house.py FOLDER             # of another package
    python benchmarks/house.py --check            # name what is beyond a limit, exit 1: part of `make lint`

Complexity is that of radon 6.0.1 (`cc_visit`, which counts `and`, `or` and comprehensions), the mean over functions and
methods.  Lines of code are lines that are neither empty nor a comment nor within a docstring.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from radon.complexity import cc_visit
from radon.visitors import Class, Function

HERE = Path(__file__).parents[1] / "src" / "chiasm"
MOST_COMPLEX, MOST_LINES, MOST_PARAMETERS, LARGEST_CLASS, LONGEST_MODULE, LARGEST_ROOM = 12, 60, 7, 200, 500, 0.15
COMMANDS = "commands"  # whose functions have a parameter for each option
#: What is called from outside: keyword arguments with their explanations are the interface.
VERBS = (
    "predict",
    "evaluate",
    "register",
    "mumap",
    "write_cohort",
    "complete",
    "run_study",
    "train",
    "read_volume",
    "finetune",
    "run",
)


@dataclass(frozen=True)
class Place:
    """A function, a class or a module, and what was measured of it."""

    path: Path
    line: int
    name: str
    value: float

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.name}: {self.value:g}"


def modules(root: Path) -> list[Path]:
    """List the modules of a package; scripts of others that it ships are none."""
    return sorted(path for path in root.rglob("*.py") if "static" not in path.parts)


def complexities(path: Path) -> Iterator[Place]:
    """Measure every function, method and inner function of a module."""
    for block in cc_visit(path.read_text(encoding="utf-8")):
        if not isinstance(block, Class):
            yield from _with_closures(block, path)


def _with_closures(function: Function, path: Path) -> Iterator[Place]:
    yield Place(path, function.lineno, function.name, function.complexity)
    for inner in function.closures:
        yield from _with_closures(inner, path)


def sizes(path: Path, kinds: tuple[type[ast.AST], ...]) -> Iterator[Place]:
    """Measure the lines of functions or classes, docstrings and all."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, kinds) and isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield Place(path, node.lineno, node.name, (node.end_lineno or node.lineno) - node.lineno + 1)


def parameters(path: Path) -> Iterator[Place]:
    """Count the parameters of functions, `self` and `cls` left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            listed = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            yield Place(path, node.lineno, node.name, sum(one.arg not in ("self", "cls") for one in listed))


def code_lines(path: Path) -> int:
    """Count lines of code: no empty ones, no comments, no docstrings."""
    text = path.read_text(encoding="utf-8")
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        holds = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body
        if holds and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant):
            documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(text.splitlines(), start=1)
    return sum(number not in documented and bool(line.strip()) and line.strip()[0] != "#" for number, line in lines)


def rooms(root: Path) -> dict[str, float]:
    """Return each room's share of the lines; a module of its own is a room."""
    counts: Counter[str] = Counter()
    for path in modules(root):
        counts[path.relative_to(root).parts[0]] += len(path.read_text(encoding="utf-8").splitlines())
    return {name: count / counts.total() for name, count in counts.most_common()}


def broken(root: Path) -> dict[str, list[Place]]:
    """Name every place that is beyond a limit, by the limit."""
    functions, classes = (ast.FunctionDef,), (ast.ClassDef,)
    found: dict[str, list[Place]] = {
        f"complexity above {MOST_COMPLEX}": [],
        f"functions over {MOST_LINES} lines": [],
        f"classes over {LARGEST_CLASS} lines": [],
        f"more than {MOST_PARAMETERS} parameters": [],
        f"modules over {LONGEST_MODULE} lines": [],
    }
    limits = (MOST_COMPLEX, MOST_LINES, LARGEST_CLASS, MOST_PARAMETERS, LONGEST_MODULE)
    for path in modules(root):
        length = len(path.read_text(encoding="utf-8").splitlines())
        counted = () if COMMANDS in path.parts else parameters(path)
        measured = (
            complexities(path),
            sizes(path, functions),
            sizes(path, classes),
            counted,
            [Place(path, 1, "module", length)],
        )
        for places, (rule, listed), most in zip(measured, found.items(), limits, strict=True):
            open_door = rule.startswith(("more than", "functions over"))
            listed += [one for one in places if one.value > most and not (open_door and one.name in VERBS)]
    return found


def table(root: Path) -> list[str]:
    """Return the measurements as lines of a Markdown table."""
    every = [place.value for path in modules(root) for place in complexities(path)]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in modules(root))
    shares = rooms(root)
    largest = next(iter(shares))
    rows = {
        "modules": f"{len(modules(root))}",
        "lines / of them code": f"{lines:,} / {sum(map(code_lines, modules(root))):,}",
        "functions": f"{len(every):,}",
        "mean complexity": f"{sum(every) / len(every):.2f}",
        **{rule: f"{len(places)}" for rule, places in broken(root).items()},
        "largest room": f"{largest}, {100 * shares[largest]:.1f} % of the lines",
    }
    return ["| measure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def main() -> int:
    """Print the table; with --check only what is beyond a limit, and exit 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE)
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    if not asked.check:
        print("\n".join(table(asked.folder)))
        return 0
    found = broken(asked.folder)
    for rule, places in found.items():
        for place in places:
            print(f"{rule}: {place}")
    wide = [f"{room}: {100 * share:.1f} %" for room, share in rooms(asked.folder).items() if share > LARGEST_ROOM]
    for line in wide:
        print(f"a room over {100 * LARGEST_ROOM:g} % of the lines: {line}")
    return int(bool(wide) or any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
