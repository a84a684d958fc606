"""A cohort is examined once by a process, for all models that learn from it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from chiasm import checksums
from chiasm.cohorts.cases import Cohort
from chiasm.errors import CohortError
from chiasm.preparation import examination
from chiasm.preparation.examination import examine_cohort
from chiasm.recipe import Data
from synthetic_cohort import write_cohort

DATA = Data(sources=("t1",), target="t2")


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cases whose files are read, one for each time."""
    names: list[str] = []
    examine = examination.examine_case

    def noting(case, *others):
        names.append(case.id)
        return examine(case, *others)

    monkeypatch.setattr(examination, "examine_case", noting)
    monkeypatch.setattr(checksums, "SETTLED_SECONDS", 0.0)
    return names


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    return write_cohort(tmp_path / "data", 3)


def test_the_same_cohort_is_examined_once_and_gives_the_same_facts(
    cohort: Cohort, looked_at: list[str], tmp_path: Path
) -> None:
    first = examine_cohort(cohort, DATA, tmp_path)
    again = examine_cohort(cohort, DATA.model_copy(), tmp_path)
    assert looked_at == [case.id for case in cohort.cases]
    assert again.cohort == first.cohort and again.problems == first.problems
    for name in first.cases:
        assert (again.cases[name].facts.samples == first.cases[name].facts.samples).all()
        assert again.cases[name].images["t1"].voxels == first.cases[name].images["t1"].voxels


def replaced(path: Path) -> None:
    path.with_name("new").write_bytes(path.read_bytes())
    path.with_name("new").replace(path)


def touched(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [replaced, touched])
def test_a_file_that_may_have_changed_lets_the_cohort_be_examined_again(
    change: Callable[[Path], None], cohort: Cohort, looked_at: list[str], tmp_path: Path
) -> None:
    examine_cohort(cohort, DATA, tmp_path)
    change(cohort.cases[1].images["t2"])
    examine_cohort(cohort, DATA, tmp_path)
    assert len(looked_at) == 6


def test_other_settings_let_the_cohort_be_examined_again(cohort: Cohort, looked_at: list[str], tmp_path: Path) -> None:
    examine_cohort(cohort, DATA, tmp_path)
    examine_cohort(cohort, DATA.model_copy(update={"mask": "body"}), tmp_path)
    assert len(looked_at) == 6


def test_files_that_were_written_a_moment_ago_are_examined_again(
    cohort: Cohort, looked_at: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "SETTLED_SECONDS", 3600.0)
    for _ in range(2):
        examine_cohort(cohort, DATA, tmp_path)
    assert len(looked_at) == 6


def test_a_cohort_without_a_usable_case_is_refused_each_time(
    cohort: Cohort, looked_at: list[str], tmp_path: Path
) -> None:
    for case in cohort.cases:
        case.images["t2"].write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(CohortError, match="none of its 3 cases can be used"):
            examine_cohort(cohort, DATA, tmp_path)


def test_a_case_with_one_image_for_two_modalities_is_left_out_and_named(cohort: Cohort, tmp_path: Path) -> None:
    case = cohort.cases[0]
    case.images["t2"].write_bytes(case.images["t1"].read_bytes())
    found = examine_cohort(cohort, DATA, tmp_path)
    assert [(one.case, one.reason) for one in found.problems] == [(case.id, "same-image")]
    assert case.id not in found.cases
