"""`benchmarks/interoperability.py`: it runs, tells right from wrong, and its tables stand in the document."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import interoperability as benchmark  # noqa: E402
import interoperability_habits as habits  # noqa: E402
from interoperability_readers import TOOLS, Tool  # noqa: E402

DOCUMENT = (ROOT / "docs" / "interoperability.md").read_text()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[benchmark.File]:
    return benchmark.written(tmp_path_factory.mktemp("written"))


def test_what_is_written_is_read_the_same_by_chiasm(files: list[benchmark.File]) -> None:
    assert {file.title: benchmark.verdict(file, TOOLS["chiasm"]) for file in files} == {
        file.title: "same" for file in files
    }


def test_a_wrong_reader_is_told_from_a_right_one(files: list[benchmark.File]) -> None:
    volume = files[0].volume

    def wrong(values: float = 0.0, shift_mm: float = 0.0, axes: int = 3) -> str:
        affine = volume.geometry.affine.copy()
        affine[0, 3] += shift_mm
        array = (volume.array + np.float32(values)).reshape(*volume.array.shape[: axes - 1], -1)
        return benchmark.verdict(files[0], Tool(lambda path: (array, affine), lambda: ""))

    assert wrong() == "same"
    assert (wrong(1.0), wrong(shift_mm=2.0)) == ("other values", "2 mm off")
    assert wrong(axes=2) == "2 axes"
    picture = Tool(lambda path: (volume.array[..., ::-1] / 9, None), lambda: "", shows=True)
    assert benchmark.verdict(files[0], picture) == "shown right"
    mirrored = Tool(lambda path: (volume.array[::-1] / 9, None), lambda: "", shows=True)
    assert benchmark.verdict(files[0], mirrored).startswith("shown with correlation")

    def refuse(path: Path) -> None:
        raise OSError(path)

    assert benchmark.verdict(files[0], Tool(refuse, lambda: "")) == "refused: OSError"  # type: ignore[arg-type]


def test_every_tool_and_every_habit_has_its_place_in_the_document(files: list[benchmark.File]) -> None:
    assert [name for name in TOOLS if f"| {name}" not in DOCUMENT] == []
    assert [file.title for file in files if f"| {file.title} |" not in DOCUMENT] == []
    assert [habit.done for habit in habits.HABITS if f"| {habit.done} |" not in DOCUMENT] == []
    assert "not here |" not in DOCUMENT, "the table was made where a tool was missing"
