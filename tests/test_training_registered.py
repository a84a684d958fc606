"""Training on pairs that do not lie together, from the outside: train, predict, evaluate, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from chiasm.checksums import sha256_of
from chiasm.cli import main
from chiasm.errors import CohortError, RunError
from chiasm.evaluation.predictions import score_folder
from chiasm.methods import make_recipe
from chiasm.prediction.folders import load, predict
from chiasm.preparation.plan import read_plan
from chiasm.recipe import Registration
from chiasm.reports.evaluation import evaluate, report_evaluation
from chiasm.reports.registration import report_registered
from chiasm.storage import read_json
from chiasm.training.run import train
from chiasm.training.run_planning import plan_run
from chiasm.volumes import read_volume
from conftest import QUICK
from synthetic_cohort import write_moved_heads


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_moved_heads(tmp_path_factory.mktemp("heads"), 4, short=4)


@pytest.fixture(scope="module")
def run(scanned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    asked = make_recipe("A1", "tiny", {**QUICK, "split.folds": 2, "data.registration": "rigid"})
    train(scanned, asked, folder, say=lambda _: None)
    return folder


@pytest.fixture(scope="module")
def predictions(run: Path, scanned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return predict(run, [scanned], tmp_path_factory.mktemp("predictions"), only="test").folder


def test_pairs_on_other_grids_are_refused_with_the_option_that_helps(scanned: Path, tmp_path: Path) -> None:
    with pytest.raises(CohortError, match=r"grid differs .*chiasm train --register rigid for a cohort"):
        plan_run(scanned, make_recipe("A1", "tiny", QUICK), tmp_path, say=lambda _: None)


def test_the_plan_tells_how_far_training_pairs_were_moved_and_of_no_other_case(run: Path) -> None:
    plan, split = read_plan(run / "plan.toml"), read_json(run / "splits.json")
    moved = {
        path.parent.name: read_json(path)["aligned"]["t2"]["mean_displacement_mm"]
        for path in run.glob("registered/*/registration.json")
    }
    assert len(moved) == 4
    most = max((name for name in moved if name in split["train"]), key=lambda name: moved[name])
    assert plan.registration == "rigid"
    assert f"{moved[most]:.1f} mm at most ({most})" in plan.reasons["registration"]
    assert not any(name in plan.reasons["registration"] for name in split["test"])


def test_the_same_command_registers_nothing_again(run: Path, scanned: Path) -> None:
    said: list[str] = []
    before = {path: path.stat().st_mtime_ns for path in (run / "registered").rglob("*.nii.gz")}
    asked = make_recipe("A1", "tiny", {**QUICK, "split.folds": 2, "data.registration": "rigid"})
    (run / "finished.json").unlink()  # else it ends at once
    train(scanned, asked, run, say=said.append)
    assert {path: path.stat().st_mtime_ns for path in (run / "registered").rglob("*.nii.gz")} == before
    assert not any(line.startswith("registering") for line in said) and any("mm (median)" in line for line in said)


def test_a_prediction_knows_nothing_of_the_target_and_lies_on_the_source(
    run: Path, scanned: Path, predictions: Path
) -> None:
    case = read_json(predictions / "predictions.json")["cases"][0]["case"]
    source = scanned / case / f"{case}_t1.nii.gz"
    alone = load(run).predict(source)
    assert np.array_equal(alone.image.array, read_volume(predictions / f"{case}_t2.nii.gz").array)
    assert alone.image.geometry.shape == read_volume(source).geometry.shape


def test_the_real_image_is_brought_to_the_source_before_it_is_compared_with_and_the_report_says_so(
    run: Path, scanned: Path, predictions: Path, tmp_path: Path
) -> None:
    before = sha256_of(next(scanned.rglob("*_t2.nii.gz")))
    aligned = evaluate(predictions, scanned, tmp_path / "aligned")
    assert not aligned.problems and sha256_of(next(scanned.rglob("*_t2.nii.gz"))) == before
    page = aligned.report.read_text()
    assert "aligned with the source before it was compared with (rigid" in page
    assert (tmp_path / "aligned" / "registered" / "index.html").exists()
    again = report_evaluation(tmp_path / "aligned")
    assert again.read_text() == page
    same_grid = write_moved_heads(tmp_path / "heads", 4)
    lying, problems, _ = score_folder(predictions, same_grid, register="none")
    assert not problems
    errors = [
        {row.case: row.value for row in rows if (row.method, row.region, row.metric) == ("A1", "mask", "mae")}
        for rows in (aligned.rows, lying)
    ]
    assert errors[0].keys() == errors[1].keys()
    for case, error in errors[0].items():
        assert error < 0.75 * errors[1][case]


def test_the_real_image_as_it_lies_is_refused_where_its_grid_is_another(
    scanned: Path, predictions: Path, tmp_path: Path
) -> None:
    with pytest.raises(CohortError, match="grid differs"):
        evaluate(predictions, scanned, tmp_path, register="none")


def test_sources_are_brought_together_at_prediction_and_it_is_told(run: Path, scanned: Path) -> None:
    predictor = load(run)
    plan = replace(
        predictor.model.plan,
        **{
            name: getattr(predictor.model.plan, name) * 2
            for name in ("source_kinds", "source_ranges", "source_histograms", "source_limits")
        },
        sources=("t1", "flair"),
        input_mean=(0.0, 0.0, 0.0),
        input_sd=(1.0, 1.0, 1.0),
    )
    from chiasm.preparation.arrays import prepare_source
    from chiasm.registration.cohort import align_sources

    place = scanned / "Toy_0001" / "Toy_0001"
    volumes = [read_volume(f"{place}_{name}.nii.gz") for name in ("t1", "t2")]
    together, told = align_sources(volumes, plan.sources, plan.registration)
    assert "flair was aligned to t1 (rigid), by" in told[0]
    both = prepare_source(together, plan)
    alone = prepare_source(volumes[:1], predictor.model.plan)
    assert np.array_equal(both.array[0], alone.array[0]) and np.array_equal(both.mask, alone.mask)


def test_the_page_of_a_run_shows_what_looks_worst_first_and_links_each_pair(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main_exit(["report", str(run)])
    page = run / "registered" / "index.html"
    assert str(page) in capsys.readouterr().out.replace("\n", "")
    text = page.read_text()
    shares = {
        path.parent.name: read_json(path)["aligned"]["t2"]["mutual_information"][-1]
        for path in run.glob("registered/*/registration.json")
    }
    places = [text.index(f'href="{case}/t2.html"') for case in sorted(shares, key=lambda case: shares[case])]
    assert places == sorted(places)
    pair = (run / "registered" / "Toy_0001" / "t2.html").read_text()
    assert "checkerboard, after" in pair and "http://" not in pair.replace("http://www.w3.org", "")
    with pytest.raises(RunError, match="no registered cases"):
        report_registered(run / "checkpoints")


def main_exit(arguments: list[str]) -> None:
    try:
        main(arguments)
    except SystemExit as stop:
        assert not stop.code


def test_an_unknown_registration_is_refused_with_the_known_ones(
    scanned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(scanned), "--source", "t1", "--target", "t2", "-o", str(tmp_path), "--register", "bspline"]
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert all(kind in told for kind in ("rigid", "affine", "demons")) and "bspline" in told


def test_a_recipe_without_the_setting_is_one_without_registration() -> None:
    kind: Registration = make_recipe("A1", "tiny", QUICK).data.registration
    assert kind == "none"
