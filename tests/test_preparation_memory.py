"""What a case takes while it is prepared, and what this machine has."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from chiasm.errors import RecipeError
from chiasm.methods import make_recipe
from chiasm.preparation import memory, planning
from chiasm.preparation.arrays import prepare_case
from chiasm.preparation.memory import available_bytes, check_prepared, prepared_bytes
from chiasm.preparation.planning import make_plan
from synthetic_cohort import write_cohort


def test_the_forecast_is_what_was_measured(tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path / "cohort", 1)
    plan = make_plan(make_recipe("A7", "tiny", {}), cohort, [cohort.cases[0].id])
    plan = replace(plan, spacing_mm=tuple(step / 3 for step in plan.spacing_mm))  # type: ignore[arg-type]
    tracemalloc.start()
    prepared = prepare_case(cohort.cases[0], plan, tmp_path / "cache")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert prepared_bytes(prepared.source.shape[1:], len(plan.sources)) == pytest.approx(peak, rel=0.3)


def test_a_spacing_on_which_no_case_fits_in_memory_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = write_cohort(tmp_path / "cohort", 2)
    names = [case.id for case in cohort.cases]
    monkeypatch.setattr(memory, "available_bytes", lambda: 4 * 2.0**20)
    make_plan(make_recipe("A7", "tiny", {}), cohort, names)
    fine = make_recipe("A7", "tiny", {"data.spacing_mm": 0.3})
    with pytest.raises(RecipeError, match=r"voxels, or about .* GB, expected at most 0.0 GB.*data\.spacing_mm"):
        make_plan(fine, cohort, names)
    monkeypatch.setattr(memory, "available_bytes", lambda: math.inf)
    monkeypatch.setattr(planning, "NAMED_FROM", 2**10)
    assert "GB while it is prepared" in make_plan(fine, cohort, names).reasons["spacing_mm"]


def test_the_limit_follows_from_memory_and_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 34e6)
    check_prepared((100, 100, 100), 1)
    with pytest.raises(RecipeError, match="100 x 100 x 100 voxels"):
        check_prepared((100, 100, 100), 2)


def test_the_least_of_machine_and_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2000 kB\n")
    (tmp_path / "max").write_text("max\n")
    monkeypatch.setattr(memory, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "LIMITS", (tmp_path / "max", tmp_path / "missing"))
    assert available_bytes() == 2000 * 1024
    (tmp_path / "max").write_text("4096\n")
    assert available_bytes() == 4096
    monkeypatch.setattr(memory, "MEMORY", tmp_path / "missing")
    monkeypatch.setattr(memory, "LIMITS", ())
    assert available_bytes() == math.inf
