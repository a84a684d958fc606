"""From predictions to a table, a CSV and a page."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from chiasm.errors import CohortError, RecipeError, RunError
from chiasm.evidence.folders import score_folder
from chiasm.evidence.reporting import Scored, evaluate
from chiasm.metrics import CONVENTIONS
from chiasm.prediction.folders import predict
from chiasm.volumes import read_volume
from synthetic_cohort import affine, forget_digests, save


@pytest.fixture(scope="module")
def predictions(toy_cohort: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return predict(finished_run, [toy_cohort], tmp_path_factory.mktemp("predictions"), only="test").folder


@pytest.fixture(scope="module")
def scored(predictions: Path, toy_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    return evaluate(predictions, toy_cohort, tmp_path_factory.mktemp("evaluation"))


def test_every_figure_is_a_row_with_its_unit_and_convention(scored: Scored) -> None:
    with (scored.report.parent / "evaluation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["case", "fold", "seed", "method", "region", "metric", "value", "unit", "convention"]
    assert len(rows) == len(scored.rows)
    assert {row["method"] for row in rows} == {"A7", "identity", "mean", "histogram", "lookup"}
    assert {"mask", "image", "healthy", "edges", "lesion-edge"} <= {row["region"] for row in rows}
    assert all(row["unit"] and "chiasm" in row["convention"] for row in rows)
    as_json = json.loads((scored.report.parent / "evaluation.json").read_text())["rows"]
    assert [row["metric"] for row in as_json] == [row["metric"] for row in rows]


def test_the_mean_error_is_what_numpy_makes_of_the_files(
    scored: Scored, predictions: Path, toy_cohort: Path, finished_run: Path
) -> None:
    from chiasm.cohorts.intensity import fit_intensity
    from chiasm.cohorts.planning import read_plan

    plan = read_plan(finished_run / "model" / "plan.toml")
    case = scored.rows[0].case
    image = read_volume(predictions / f"{case}_t2.nii.gz").array
    mask = read_volume(predictions / f"{case}_mask.nii.gz", labels=True).array > 0
    real = read_volume(toy_cohort / case / f"{case}_t2.nii.gz").array
    own = fit_intensity(real, mask, plan.target_kind)
    one_sd = plan.target_sd * (plan.target_reference.values[-1] - plan.target_reference.values[0])
    one_sd /= plan.target_reference.normalised[-1] - plan.target_reference.normalised[0]
    error = np.abs(image - plan.target_reference.invert(own.apply(real)))[mask].mean() / one_sd
    told = next(r for r in scored.rows if (r.case, r.method, r.region, r.metric) == (case, "A7", "mask", "mae"))
    assert told.unit == "SD"
    if plan.target_kind in ("median_iqr", "zscore"):  # one slope, so one unit everywhere
        assert told.value == pytest.approx(error, rel=1e-4)


def test_the_table_stands_beside_naive_baselines_and_the_report_stands_alone(scored: Scored) -> None:
    table = "\n".join(scored.table)
    for word in ("A7", "identity", "mean", "histogram", "lookup", "mask", "healthy", "Convention"):
        assert word in table
    page = scored.report.read_text()
    assert "<html" in page and "http://" not in page.replace("http://www.w3.org", "") and 'src="data:image' in page
    assert "only 2 cases" in page


def test_the_reliability_map_is_judged(scored: Scored) -> None:
    found = {row.metric for row in scored.rows if row.method == "A7" and row.region == "mask"}
    assert {"spearman", "auroc_worst", "ausc", "ause", "expected_error", "calibration"} <= found
    assert not {row.metric for row in scored.rows if row.method == "lookup"} & {"ause", "expected_error"}


def test_cases_seen_in_training_are_marked(toy_cohort: Path, finished_run: Path, tmp_path: Path) -> None:
    predict(finished_run, [toy_cohort], tmp_path / "p", only="train")
    done = evaluate(tmp_path / "p", toy_cohort, tmp_path / "e")
    assert "were used in training" in done.report.read_text()


def test_a_case_without_its_target_is_named_and_the_others_are_scored(
    predictions: Path, toy_cohort: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(toy_cohort, data)
    case = sorted(path.name.split("_t2")[0] for path in predictions.glob("*_t2.nii.gz"))[0]
    (data / case / f"{case}_t2.nii.gz").unlink()
    done = evaluate(predictions, data, tmp_path / "e")
    assert [problem.case for problem in done.problems] == [case]
    assert {row.case for row in done.rows} and case not in {row.case for row in done.rows}


def test_a_prediction_on_another_grid_is_refused(predictions: Path, toy_cohort: Path, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    shutil.copytree(predictions, folder)
    for path in folder.glob("*_t2.nii.gz"):
        save(path, read_volume(path).array, affine((1.0, 1.0, 2.5)))
    forget_digests(folder)
    with pytest.raises(CohortError, match=r"no predicted case could be scored.*grid differs"):
        evaluate(folder, toy_cohort, tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_a_normalised_image_against_a_raw_one_is_refused(predictions: Path, toy_cohort: Path, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    shutil.copytree(predictions, folder)
    for path in folder.glob("*_t2.nii.gz"):
        volume = read_volume(path)
        save(path, volume.array / 1e4, volume.geometry.affine)
    forget_digests(folder)
    with pytest.raises(CohortError, match="not in one unit"):
        evaluate(folder, toy_cohort, tmp_path / "e")


def test_every_convention_can_be_asked_for_and_an_unknown_one_is_refused(
    predictions: Path, toy_cohort: Path, tmp_path: Path
) -> None:
    for name in CONVENTIONS:
        rows, _ = score_folder(predictions, toy_cohort, convention=name, naive=False)
        assert rows and all(row.convention.startswith(name) for row in rows)
    told = evaluate(predictions, toy_cohort, tmp_path / "asked", convention=name).rows
    assert all(row.convention.startswith(name) for row in told)
    with pytest.raises(RecipeError, match="chiasm"):
        evaluate(predictions, toy_cohort, tmp_path / "e", convention="best")
    with pytest.raises(RunError, match=r"predictions\.json"):
        evaluate(toy_cohort, toy_cohort, tmp_path / "e")


def test_evaluation_never_loads_torch(predictions: Path, toy_cohort: Path, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom chiasm.evidence.reporting import evaluate\n"
        "evaluate(*map(Path, sys.argv[1:]))\nassert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(predictions), str(toy_cohort), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
