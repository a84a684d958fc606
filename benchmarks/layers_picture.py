"""Draw the rooms of the code from the ground up, with their modules, as `docs/pictures/layers.svg`.

    python benchmarks/layers_picture.py

A room stands above every room that it imports; its width is its share of the lines.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
from house import HERE, modules
from matplotlib.patches import FancyBboxPatch

PICTURE = HERE.parents[1] / "docs" / "pictures" / "layers.svg"
WIDTH, GAP, ROW = 100.0, 1.2, 1.0
INCHES = 0.16  # of half a unit of width: names then fit their boxes


def room_of(path: Path) -> str:
    """Return the folder below the package that holds a module, or the module's own name."""
    return path.relative_to(HERE).parts[0].removesuffix(".py")


def imports() -> dict[str, set[str]]:
    """Return the rooms that each room imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in modules(HERE):
        found[room_of(path)] |= set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("chiasm."):
                found[room_of(path)].add(str(node.module).split(".")[1])
    rooms = {room for room in found if not room.startswith("__")}
    return {room: found[room] & rooms - {room} for room in rooms}


def floors(needs: dict[str, set[str]]) -> list[list[str]]:
    """Sort rooms into floors, each above all that it needs."""
    level: dict[str, int] = {}
    while len(level) < len(needs):
        ready = [room for room in needs if room not in level and needs[room] <= level.keys()]
        for room in ready:
            level[room] = 1 + max((level[other] for other in needs[room]), default=-1)
    return [sorted(room for room in level if level[room] == floor) for floor in range(max(level.values()) + 1)]


def main() -> None:
    """Write the picture."""
    lines: dict[str, int] = defaultdict(int)
    for path in modules(HERE):
        lines[room_of(path)] += len(path.read_text(encoding="utf-8").splitlines())
    needs = imports()
    storeys = floors(needs)
    scale = WIDTH / max(sum(lines[room] for room in storey) for storey in storeys)
    plt.rcParams |= {"svg.hashsalt": "layers", "svg.fonttype": "none"}
    rows = [[max(scale * lines[room], 1.7 * len(room) + 1.5) for room in storey] for storey in storeys]
    half = max(sum(widths) + GAP * (len(widths) - 1) for widths in rows) / 2 + GAP
    figure, axes = plt.subplots(figsize=(half * INCHES, 0.62 * len(storeys) + 0.6))
    for height, (storey, widths) in enumerate(zip(storeys, rows)):
        left = -(sum(widths) + GAP * (len(widths) - 1)) / 2
        for room, width in zip(storey, widths):
            box = FancyBboxPatch(
                (left, height + 0.12),
                width,
                ROW - 0.24,
                boxstyle="round,pad=0,rounding_size=0.15",
                fc="#dbe7f3",
                ec="#33526e",
            )
            axes.add_patch(box)
            axes.text(left + width / 2, height + 0.56, room, ha="center", va="center", fontsize=9, weight="bold")
            axes.text(left + width / 2, height + 0.3, f"{lines[room]:,}", ha="center", va="center", fontsize=6.5)
            left += width + GAP
    axes.set_xlim(-half, half)
    axes.set_ylim(0, len(storeys))
    axes.axis("off")
    axes.set_title("Rooms of chiasm and their lines; each stands above the rooms that it imports", fontsize=10)
    figure.savefig(PICTURE, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
