"""The head-to-head with other tools: its judge, its tables, and what it writes for KonfAI."""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from chiasm.cohorts.cases import Case

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import peers_konfai
import peers_tables
from levers import judge


def test_the_judge_takes_any_unit_of_a_prediction_and_counts_errors_in_sd_of_the_brain() -> None:
    rng = np.random.default_rng(0)
    truth, brain, lesion = rng.normal(size=(6, 7, 8)), np.ones((6, 7, 8), bool), np.zeros((6, 7, 8), bool)
    lesion[:3] = True
    truth[lesion] += 2
    made = truth + rng.normal(size=truth.shape)
    assert judge(7 - 3 * made, truth, brain, lesion) == pytest.approx(judge(made, truth, brain, lesion))
    assert judge(5 * truth, truth, brain, lesion) == pytest.approx({"brain": 0, "WT": 0, "kept": 1}, abs=1e-9)
    line = np.polynomial.Polynomial.fit(made.ravel(), truth.ravel(), 1)  # the same, by another way
    expected = np.abs(line(made) - truth).mean() / truth.std()
    assert judge(made, truth, brain, lesion)["brain"] == pytest.approx(expected)


def _rows(tool: str, seeds: int, brain: float) -> list[peers_tables.Row]:
    scores = {"WT": 1.0, "kept": 0.5, "steps": 10, "seconds": 330.0, "fold": 0, "cohort": "tested"}
    return [
        {"tool": tool, "seed": seed, "case": f"case{n}", "site": f"site{n // 2}", "brain": brain + 0.1 * n, **scores}
        for seed in range(seeds)
        for n in range(6)
    ]


def test_tables_count_a_difference_over_the_seeds_that_both_tools_have(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*_rows("chiasm", 3, 0.45), *_rows("other", 2, 0.55)]  # 0.70 and 0.80 in the mean of six
    peers_tables.print_tables(rows, {"KonfAI UNet": "not installed"})
    printed = capsys.readouterr().out
    assert "| chiasm | 3 | 10 | 330 | 0.700 | 1.000 | 50 % | 6 |" in printed
    assert "| KonfAI UNet | not installed |" in printed
    assert "| site2 | 0.900 / 1.000 / 50 % | 1.000 / 1.000 / 50 % |" in printed
    assert (
        "| chiasm | other | brain | -12.5 (-12.5 to -12.5) | 0.031 | 2 | 6 of 6 | 3 of 3 |" in printed
    )  # 2 of 64 flips
    assert "| chiasm | other | WT | +0.0 (+0.0 to +0.0) | 1 | 2 | 0 of 6 | 0 of 3 |" in printed


def test_without_konfai_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert peers_konfai.missing() == "konfai cannot be imported: pip install konfai SimpleITK"


@pytest.mark.skipif(peers_konfai.missing() is not None, reason="konfai is not installed")
def test_konfai_learns_as_many_steps_as_asked_and_predicts_on_the_grid_of_the_source(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cases = []
    for name in ("one", "two"):
        images = {}
        for modality in ("t1", "t2"):
            images[modality] = tmp_path / f"{name}_{modality}.nii.gz"
            voxels = rng.uniform(1, 100, (30, 34, 6)).astype(np.float32)
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), images[modality])
        cases.append(Case(name, name, images))
    peers_konfai.train(cases[:1], 0, 3, tmp_path / "run")
    assert len([*(tmp_path / "run" / "Checkpoints" / "run").glob("*.pt")]) == 1  # it stopped by itself
    [made] = peers_konfai.predict(tmp_path / "run", cases[1:])
    assert made.shape == (30, 34, 6)
    assert np.isfinite(made).all()
