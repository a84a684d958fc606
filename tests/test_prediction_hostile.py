"""Model folders that are made to harm: each is refused in one sentence, and no code of theirs runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "faults" / "hostile_models.py"


@pytest.fixture(scope="module")
def hostile() -> ModuleType:
    """The script that makes the folders."""
    spec = importlib.util.spec_from_file_location("hostile_models", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hostile_models"] = module
    spec.loader.exec_module(module)
    return module


def test_no_hostile_model_runs_code_and_each_ends_in_one_sentence(
    hostile: ModuleType, finished_run: Path, toy_cohort: Path, tmp_path: Path
) -> None:
    pytest.importorskip("monai", reason="MONAI is not installed")
    scan = next(iter(sorted(toy_cohort.rglob("*_t1.nii.gz"))))
    answers = hostile.offer_all(finished_run / "model", scan, tmp_path)
    assert len(answers) >= 20
    assert not [(answer.name, answer.sentence) for answer in answers if not answer.is_refused]
    assert not (tmp_path / hostile.CANARY).exists()
    assert not list(tmp_path.glob("*-out"))  # nothing was begun


def test_the_canary_would_appear(hostile: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile.plant(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(hostile.PLANTED)
    assert (tmp_path / hostile.CANARY).exists()
    monkeypatch.delitem(sys.modules, hostile.PLANTED)
