"""From predictions to a table, a CSV and a page."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from chiasm.cohorts.discovery import find_cohort
from chiasm.errors import CohortError, RecipeError, RunError
from chiasm.evaluation.loading import EvaluationCase, PredictionFolder
from chiasm.evaluation.predictions import Scoring, open_predictions, score_cases, score_folder
from chiasm.evaluation.rows import Row, read_remarks
from chiasm.evaluation.scoring import harmonise, reporting_unit
from chiasm.metrics.conventions import CONVENTIONS
from chiasm.prediction.folders import predict
from chiasm.prediction.manifest import read_manifest
from chiasm.preparation.plan import read_plan
from chiasm.reports.case_page import PackedPage
from chiasm.reports.evaluation import Scored, evaluate, report_evaluation
from chiasm.reports.explanation import explain
from chiasm.storage import read_json, write_json
from chiasm.volumes import read_volume
from synthetic_cohort import affine, forget_digests, save


@pytest.fixture(scope="module")
def model(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model without the log of its training: no page draws curves."""
    return shutil.copytree(finished_run / "model", tmp_path_factory.mktemp("shipped") / "model")


@pytest.fixture(scope="module")
def predictions(toy_cohort: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return predict(model, [toy_cohort], tmp_path_factory.mktemp("predictions"), only="test").folder


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
    scored: Scored, predictions: Path, toy_cohort: Path, model: Path
) -> None:
    from chiasm.preparation.intensity import fit_intensity

    plan = read_plan(model / "plan.toml")
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
    as_scanned = own.invert(plan.target_reference.apply(image))  # the prediction in the intensities of the real image
    told = next(r for r in scored.rows if (r.case, r.method, r.region, r.metric) == (case, "A7", "mask", "mae_own"))
    assert told.unit == "own units"
    assert told.value == pytest.approx(np.abs(as_scanned - real)[mask].mean(), rel=1e-4)


def test_beams_at_given_angles_are_rows_of_a_ct_and_refused_for_what_is_none(
    predictions: Path, toy_cohort: Path, finished_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="path lengths of beams and electron density need a CT"):
        evaluate(predictions, toy_cohort, tmp_path / "mr", angles="30")
    with pytest.raises(RecipeError, match="gantry angles"):
        evaluate(predictions, toy_cohort, tmp_path / "mr", angles="30;60")
    shutil.copytree(finished_run / "model", tmp_path / "model")
    plan = tmp_path / "model" / "plan.toml"
    text = re.sub(r"(?m)^checksum = .*\n", "", plan.read_text())
    plan.write_text(re.sub(r"(?m)^target_unit = .*$", 'target_unit = "HU"', text))
    made = evaluate(predictions, toy_cohort, tmp_path / "ct", model=tmp_path / "model", angles="0,33.5")
    found = {row.region: row for row in made.rows if row.metric == "path_error" and row.region.startswith("gantry")}
    assert set(found) == {"gantry 0", "gantry 33.5"}
    assert all(row.value > 0 and row.unit == "mm" for row in found.values())
    assert read_json(tmp_path / "ct" / "asked.json")["angles"] == [0.0, 33.5]


def test_a_density_curve_of_the_users_scanner_changes_densities_and_paths_alone(
    predictions: Path, toy_cohort: Path, finished_run: Path, tmp_path: Path
) -> None:
    curve = tmp_path / "curve.csv"
    curve.write_text("HU,density\n-1000,0\n0,2\n1950,4\n")  # twice that of the default
    with pytest.raises(RecipeError, match="need a CT") as caught:
        evaluate(predictions, toy_cohort, tmp_path / "mr", density_curve=curve)
    assert "without --density-curve" in str(caught.value.hint)
    shutil.copytree(finished_run / "model", tmp_path / "model")
    plan = tmp_path / "model" / "plan.toml"
    text = re.sub(r"(?m)^checksum = .*\n", "", plan.read_text())
    plan.write_text(re.sub(r"(?m)^target_unit = .*$", 'target_unit = "HU"', text))
    plain = evaluate(predictions, toy_cohort, tmp_path / "plain", model=tmp_path / "model")
    own = evaluate(predictions, toy_cohort, tmp_path / "own", model=tmp_path / "model", density_curve=curve)
    doubled = {"mae_density", "path_error", "path_error_95"}
    for first, second in zip(plain.rows, own.rows, strict=True):
        factor = 2 if first.metric in doubled else 1
        assert second.value == pytest.approx(factor * first.value, rel=1e-5, nan_ok=True), first
    assert doubled <= {row.metric for row in plain.rows}
    assert read_json(tmp_path / "own" / "asked.json")["density_curve"] == [[-1000, 0], [0, 2], [1950, 4]]


def test_the_table_stands_beside_naive_baselines_and_the_report_stands_alone(scored: Scored) -> None:
    table = "\n".join(scored.table)
    for word in ("A7", "identity", "mean", "histogram", "lookup", "mask", "healthy", "Convention"):
        assert word in table
    page = scored.report.read_text()
    assert "<html" in page and "http://" not in page.replace("http://www.w3.org", "") and 'src="data:image' in page
    assert "too few cases (2)" in page


def test_pages_packed_while_scoring_are_those_made_from_files(
    toy_cohort: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chiasm.reports import evaluation_cases

    predict(model, [toy_cohort], tmp_path / "p", only="all")
    loads: list[str] = []
    load_case = evaluation_cases.load_case
    monkeypatch.setattr(evaluation_cases, "load_case", lambda *a, **k: loads.append(a[1].case) or load_case(*a, **k))
    out = evaluate(tmp_path / "p", toy_cohort, tmp_path / "e").report.parent
    packed = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    cases = [path.stem for path in packed if path.parent.name == "cases"]
    assert loads == [] and len(cases) > 4 and not list(out.glob(".chiasm*"))
    report_evaluation(out)
    assert loads and packed == {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("naive", [True, False])
def test_the_part_of_a_cut_out_case_gives_the_images_and_scores_of_the_whole_case(
    toy_cohort: Path, finished_run: Path, tmp_path: Path, naive: bool
) -> None:
    from chiasm.evaluation.loading import load_case
    from chiasm.evaluation.predictions import Scoring, open_predictions, open_reference, score_case

    cohort_folder = wide_cohort(toy_cohort, tmp_path / "wide")
    predict(finished_run, [cohort_folder], tmp_path / "p", only="all")
    assessed = open_predictions(tmp_path / "p")
    cohort = open_reference(cohort_folder, [assessed], tmp_path / "r").cohort
    entry = assessed.manifest.cases[0]
    whole, part = (
        load_case(assessed, entry, cohort, with_labels=True, naive=naive, narrow=narrow) for narrow in (False, True)
    )
    assert whole.part is None and part.part is not None and part.use == whole.use
    box = part.part.box
    assert part.part.shape == whole.mask.shape and part.mask.size < 0.8 * whole.mask.size
    for name in ("prediction", "target", "expected_error", "mask", "labels"):
        assert np.array_equal(getattr(part, name), getattr(whole, name)[box]), name
    assert np.array_equal(part.source.laid_out(part.mask), whole.source.laid_out(whole.mask)[box])
    assert part.guesses.keys() == whole.guesses.keys()
    corner = [side.start for side in box]
    assert np.allclose(part.grid.affine[:3, 3], (whole.grid.affine @ [*corner, 1])[:3])
    scores = [
        {row[:6]: row.value for row in score_case(one, assessed, cohort, Scoring("chiasm"))} for one in (part, whole)
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-12, nan_ok=True)


def test_a_case_is_kept_whole_where_the_real_image_has_a_background(
    toy_cohort: Path, finished_run: Path, tmp_path: Path
) -> None:
    from chiasm.evaluation.loading import load_case
    from chiasm.evaluation.predictions import open_predictions, open_reference

    cohort_folder = wide_cohort(toy_cohort, tmp_path / "wide", noise=True)
    predict(finished_run, [cohort_folder], tmp_path / "p", only="all")
    assessed = open_predictions(tmp_path / "p")
    cohort = open_reference(cohort_folder, [assessed], tmp_path / "r").cohort
    loaded = load_case(assessed, assessed.manifest.cases[0], cohort, with_labels=True, narrow=True)
    assert loaded.part is None and loaded.target.shape == loaded.source.array.shape


def wide_cohort(cohort: Path, folder: Path, *, noise: bool = False) -> Path:
    """Copy a cohort with a wide background around its heads, turned so that axes run backwards."""
    for path in sorted(cohort.rglob("*.nii.gz")):
        volume = read_volume(path, labels="seg" in path.name)
        array = np.pad(volume.array, ((9, 12), (14, 8), (10, 11)))[::-1]
        if noise and "t2" in path.name:
            array = array + (array == 0) * np.random.default_rng(0).integers(1, 3, array.shape)
        target = folder / path.relative_to(cohort)
        target.parent.mkdir(parents=True, exist_ok=True)
        save(target, array, volume.geometry.affine @ np.diag([-1.0, 1, 1, 1]))
    return folder


def test_of_many_cases_only_the_median_may_be_read_twice_and_few_packed_pages_are_kept(
    toy_cohort: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chiasm.reports import evaluation, evaluation_cases

    predict(model, [toy_cohort], tmp_path / "p", only="all")
    read: list[str] = []
    kept: list[int] = []
    load_case, save_page = evaluation_cases.load_case, evaluation_cases.save_page

    def save(path: Path, page: PackedPage) -> None:
        save_page(path, page)
        kept.append(len(list(path.parent.iterdir())))

    monkeypatch.setattr(evaluation_cases, "load_case", lambda *a, **k: read.append(a[1].case) or load_case(*a, **k))
    monkeypatch.setattr(evaluation_cases, "save_page", save)
    monkeypatch.setattr(evaluation, "CasePages", partial(evaluation_cases.CasePages, most=2))
    done = evaluate(tmp_path / "p", toy_cohort, tmp_path / "e")
    errors = {row.case: row.value for row in done.rows if (row.method, row.region, row.metric) == ("A7", "mask", "mae")}
    worst_first = sorted(errors, key=lambda case: -errors[case])
    shown = {path.stem for path in (tmp_path / "e" / "cases").iterdir()}
    assert len(errors) == 6 and shown == {worst_first[0], worst_first[3]} and max(kept) <= 4
    assert read in ([], [worst_first[3]])


def test_several_processes_write_the_files_of_one_to_the_byte_and_name_what_fails_in_their_words(
    toy_cohort: Path, model: Path, tmp_path: Path
) -> None:
    made = predict(model, [toy_cohort], tmp_path / "predictions", only="all").folder
    broken = next(path for path in sorted(made.glob("*_t2.nii.gz"))[1:])
    broken.write_bytes(broken.read_bytes()[:-9])
    done = {count: evaluate(made, toy_cohort, tmp_path / str(count), processes=count) for count in (1, 2)}
    before = (tmp_path / "1" / "evaluation.json").read_bytes()
    with pytest.raises(ValueError, match="at least 1 process"):
        evaluate(made, toy_cohort, tmp_path / "1", processes=0, overwrite=True)
    assert (tmp_path / "1" / "evaluation.json").read_bytes() == before
    with pytest.raises(ValueError, match="at least 0 cases get a page"):
        report_evaluation(tmp_path / "1", pages=-1)
    assert done[2].rows == done[1].rows and len({row.case for row in done[1].rows}) > 2
    assert [one.message for one in done[2].problems] == [one.message for one in done[1].problems] != []
    files = {count: sorted(path for path in (tmp_path / str(count)).rglob("*") if path.is_file()) for count in done}
    names = {count: [path.relative_to(tmp_path / str(count)) for path in files[count]] for count in done}
    assert names[1] == names[2] and any(name.parts[0] == "cases" for name in names[1])
    for one, other in zip(files[1], files[2]):
        assert one.name == "asked.json" or one.read_bytes() == other.read_bytes(), one.name


def test_a_process_that_dies_costs_its_case_alone(
    scored: Scored, predictions: Path, toy_cohort: Path, model: Path, tmp_path: Path
) -> None:
    made = predict(model, [toy_cohort], tmp_path / "predictions", only="all").folder
    one = open_predictions(made)
    work = [(one, entry) for entry in one.manifest.cases[:3]]
    found = score_cases(work, find_cohort(toy_cohort), Scoring("chiasm"), after=_die_at, processes=2)
    first, *others = [entry.case for _, entry in work]
    assert {row.case for row in found.rows} == set(others)
    assert [problem.case for problem in found.problems] == [first] and "lost twice" in found.problems[0].message
    assert [mask.case for mask in found.masks] == others


def _die_at(loaded: EvaluationCase, assessed: PredictionFolder, rows: Sequence[Row]) -> None:
    """End the process that scores the first case of a folder."""
    if loaded.case.id == assessed.manifest.cases[0].case:
        os._exit(3)


def test_the_expected_error_map_is_assessed(scored: Scored) -> None:
    found = {row.metric for row in scored.rows if row.method == "A7" and row.region == "mask"}
    assert {"spearman", "auroc_worst", "ausc", "ause", "expected_error", "calibration"} <= found
    assert not {row.metric for row in scored.rows if row.method == "lookup"} & {"ause", "expected_error"}


def test_cases_seen_in_training_are_marked(toy_cohort: Path, model: Path, tmp_path: Path) -> None:
    predict(model, [toy_cohort], tmp_path / "p", only="train")
    done = evaluate(tmp_path / "p", toy_cohort, tmp_path / "e")
    said = "were used in training, so these results do not hold for new patients"
    assert said in done.report.read_text() and said in done.headlines[0]
    assert said in explain(tmp_path / "e")[0].sentences[1]


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


def test_a_real_image_that_lies_elsewhere_is_named_and_scored(
    predictions: Path, toy_cohort: Path, tmp_path: Path
) -> None:
    assert not any("mm from the source" in note for note in score_folder(predictions, toy_cohort).remarks.notes)
    data = tmp_path / "data"
    shutil.copytree(toy_cohort, data)
    case = sorted(path.name.split("_t2")[0] for path in predictions.glob("*_t2.nii.gz"))[0]
    file = data / case / f"{case}_t2.nii.gz"
    image = read_volume(file)
    save(file, np.roll(image.array, 8, 1), image.geometry.affine)
    (note,) = score_folder(predictions, data, naive=False).remarks.notes
    assert note.startswith(f"case {case}: the real t2 seems to lie about 8 mm from the source")


def test_a_prediction_on_another_grid_is_refused(predictions: Path, toy_cohort: Path, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    shutil.copytree(predictions, folder)
    for path in folder.glob("*_t2.nii.gz"):
        save(path, read_volume(path).array, affine((1.0, 1.0, 2.5)))
    forget_digests(folder)
    with pytest.raises(CohortError, match=r"no predicted case could be scored.*grid differs"):
        evaluate(folder, toy_cohort, tmp_path / "e")
    assert not (tmp_path / "e").exists()
    other = next(path for path in sorted(toy_cohort.iterdir()) if path.is_dir() and not [*folder.glob(f"{path.name}*")])
    shutil.copytree(other, tmp_path / "others" / other.name)
    with pytest.raises(CohortError, match=rf"others: has no case \w+ \(found {other.name}\)\. A real image belongs"):
        evaluate(folder, tmp_path / "others", tmp_path / "e")


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
        rows, *_ = score_folder(predictions, toy_cohort, convention=name, naive=False)
        assert rows and all(row.convention.startswith(name) for row in rows)
    told = evaluate(predictions, toy_cohort, tmp_path / "asked", convention=name).rows
    assert all(row.convention.startswith(name) for row in told)
    with pytest.raises(RecipeError, match="chiasm"):
        evaluate(predictions, toy_cohort, tmp_path / "e", convention="best")
    with pytest.raises(RunError, match=r"predictions\.json"):
        evaluate(toy_cohort, toy_cohort, tmp_path / "e")


def test_evaluation_never_loads_torch(predictions: Path, toy_cohort: Path, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom chiasm.reports.evaluation import evaluate\n"
        "evaluate(*map(Path, sys.argv[1:]))\nassert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(predictions), str(toy_cohort), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def shrunk(data: Path) -> None:
    """Give every case a mask file that holds half of the body."""
    for path in data.rglob("*_t1.nii.gz"):
        volume = read_volume(path)
        mask = (volume.array != 0).astype(np.uint8)
        mask[mask.shape[0] // 2 :] = 0
        save(path.with_name(path.name.replace("_t1", "_mask")), mask, affine())


def error_inside(case: str, mask: Path, folder: Path, data: Path, model: Path) -> float:
    """Compute the mean error in SDs inside a mask file, as the report tells it."""
    plan = read_plan(model / "plan.toml")
    inside = read_volume(mask, labels=True).array > 0
    real = harmonise(read_volume(data / case / f"{case}_t2.nii.gz").array, inside, plan)
    made = read_volume(folder / f"{case}_t2.nii.gz").array
    return float(np.abs(made - real)[inside].mean(dtype=np.float64)) / reporting_unit(plan)[1]


def test_a_case_is_scored_in_the_mask_that_its_prediction_was_made_with(
    predictions: Path, toy_cohort: Path, model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(toy_cohort, data)
    shrunk(data)  # after the prediction: it knows nothing of these files
    given = predict(model, [data], tmp_path / "given", only="test")
    case = given.manifest.cases[0].case
    own = {folder: folder / f"{case}_mask.nii.gz" for folder in (predictions, given.folder)}
    sizes = {folder: np.count_nonzero(read_volume(path, labels=True).array) for folder, path in own.items()}
    assert sizes[given.folder] < 0.6 * sizes[predictions]
    for folder, reason in ((predictions, "found by the rule nonzero"), (given.folder, "from the mask file beside")):
        done = evaluate(folder, data, tmp_path / f"scored-{folder.name}")
        told = next(r for r in done.rows if (r.case, r.method, r.region, r.metric) == (case, "A7", "mask", "mae"))
        assert told.value == pytest.approx(error_inside(case, own[folder], folder, data, model), rel=1e-5)
        use = next(mask for mask in read_remarks(done.report.parent).masks if mask.case == case)
        assert use.used == "prediction" and reason in use.reason and use.voxels == sizes[folder]
        page = done.report.read_text()
        assert reason in page and ("not in the mask file of the cohort" in page) == (folder == predictions)


def naive_scores(rows: Sequence[Row]) -> dict[tuple[str, str, str, str], float]:
    return {(row.case, row.method, row.region, row.metric): row.value for row in rows if row.method != "A7"}


def test_naive_baselines_are_made_with_the_mask_of_the_prediction_whatever_mask_the_reference_has(
    toy_cohort: Path, model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(toy_cohort, data)
    shrunk(data)
    given = predict(model, [data], tmp_path / "given", only="test").folder
    scores = [naive_scores(score_folder(given, reference).rows) for reference in (data, toy_cohort)]
    assert scores[0] == pytest.approx(scores[1], nan_ok=True)
    for path in data.rglob("*_mask.nii.gz"):  # another mask than that of the prediction
        mask = read_volume(path, labels=True)
        save(path, mask.array[::-1].copy(), affine())
    assert naive_scores(score_folder(given, data).rows) == pytest.approx(scores[0], nan_ok=True)


@pytest.mark.parametrize("lost", [("t1",), ("t1", "seg"), ("t1", "mask"), ("mask",), ("seg",), ("t1", "mask", "seg")])
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_case_of_which_the_reference_lacks_what_scores_do_not_need_is_scored_and_that_is_said(
    predictions: Path, scored: Scored, toy_cohort: Path, tmp_path: Path, lost: tuple[str, ...], everywhere: bool
) -> None:
    data = tmp_path / "data"
    shutil.copytree(toy_cohort, data)
    shrunk(data)
    first = read_manifest(predictions).cases[0].case
    for case in data.iterdir() if everywhere else [data / first]:
        for name in lost:
            for path in case.glob(f"*_{name}.nii.gz"):
                path.unlink()
    done = evaluate(predictions, data, tmp_path / "e")
    assert not done.problems

    def ours(scored: Scored, region: str) -> dict[str, float]:
        return {
            row.case: row.value for row in scored.rows if (row.method, row.region, row.metric) == ("A7", region, "mae")
        }

    assert ours(done, "mask") == pytest.approx(ours(scored, "mask"))
    assert (first in ours(done, "healthy")) == ("seg" not in lost)
    bare = {row.case for row in done.rows if row.method == "A7"} - {
        row.case for row in done.rows if row.method == "mean"
    }
    told = [note for note in done.notes if "without the naive baselines (identity, mean, histogram, lookup)" in note]
    assert len(told) == len(bare) == (0 if "t1" not in lost else len(ours(done, "mask")) if everywhere else 1)
    assert not bare or (
        f"case {first}: the reference has no t1" in " ".join(told) and told[0] in done.report.read_text()
    )
    if len(bare) == 1:  # the table is of the cases that all methods have
        assert {line.split("|")[3].strip() for line in done.table if line.startswith("| mask ")} == {"1"}


def test_a_case_without_its_source_that_has_no_mask_either_is_left_out_by_name(
    predictions: Path, toy_cohort: Path, tmp_path: Path
) -> None:
    folder, data = tmp_path / "p", tmp_path / "data"
    shutil.copytree(predictions, folder)
    shutil.copytree(toy_cohort, data)
    forget_digests(folder)
    content = json.loads((folder / "predictions.json").read_text())
    for entry in content["cases"]:
        entry["mask"] = None
    (folder / "predictions.json").write_text(json.dumps(content))
    first = content["cases"][0]["case"]
    (data / first / f"{first}_t1.nii.gz").unlink()
    done = evaluate(folder, data, tmp_path / "e")
    assert [problem.case for problem in done.problems] == [first]
    assert "lacks its t1, without which it cannot be scored: the mask is found in it" in done.problems[0].message
    assert {row.case for row in done.rows} and first not in {row.case for row in done.rows}


def test_without_a_mask_file_of_its_own_a_prediction_is_scored_in_another_mask_and_that_is_said(
    predictions: Path, toy_cohort: Path, tmp_path: Path
) -> None:
    folder, data = tmp_path / "p", tmp_path / "data"
    shutil.copytree(predictions, folder)
    shutil.copytree(toy_cohort, data)
    forget_digests(folder)
    content = json.loads((folder / "predictions.json").read_text())
    before = {entry["case"]: np.count_nonzero(read_volume(folder / entry["mask"]).array) for entry in content["cases"]}
    for entry in content["cases"]:
        entry["mask"] = None
    (folder / "predictions.json").write_text(json.dumps(content))
    scores = score_folder(folder, data, naive=False)
    assert not scores.problems and {mask.used for mask in scores.remarks.masks} == {"plan"}
    assert {mask.case: mask.voxels for mask in scores.remarks.masks} == before  # found as the model found it
    assert all("found by the plan's rule, nonzero" in mask.reason for mask in scores.remarks.masks)
    shrunk(data)
    scores = score_folder(folder, data, naive=False)
    assert {mask.used for mask in scores.remarks.masks} == {"cohort"}
    assert all(mask.voxels < 0.6 * before[mask.case] for mask in scores.remarks.masks)


@pytest.mark.parametrize("content", [[], 3, {"predictions": 5}, {"select": True}, {"register": "glue"}])
def test_what_an_evaluation_was_asked_for_is_refused_in_one_sentence_where_it_was_changed(
    scored: Scored, predictions: Path, toy_cohort: Path, tmp_path: Path, content: object
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(scored.report.parent, copy)
    whole = read_json(copy / "asked.json")
    write_json(copy / "asked.json", {**whole, **content} if isinstance(content, dict) else content)
    with pytest.raises(RunError, match=r"asked\.json"):
        report_evaluation(copy)
    with pytest.raises(RunError, match=r"asked\.json"):
        evaluate(predictions, toy_cohort, copy)


def test_another_evaluation_is_not_mixed_in_and_a_case_that_is_not_predicted_yet_is_named(
    predictions: Path, toy_cohort: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "p", tmp_path / "e"
    shutil.copytree(predictions, folder)
    content = json.loads((folder / "predictions.json").read_text())
    content |= {"cases": content["cases"][:1], "pending": ["Toy_0009"]}
    (folder / "predictions.json").write_text(json.dumps(content))
    done = evaluate(folder, toy_cohort, out)
    assert [(problem.case, problem.reason) for problem in done.problems] == [("Toy_0009", "unfinished")]
    (out / "cases" / "notes.html").write_text("of the user")
    assert evaluate(folder, toy_cohort, out).rows == done.rows and (out / "cases" / "notes.html").exists()
    with pytest.raises(RunError, match="regions was seg and is none") as caught:
        evaluate(folder, toy_cohort, out, regions="none")
    assert caught.value.reason == "other-evaluation" and "--overwrite" in str(caught.value)
    assert evaluate(folder, toy_cohort, out, regions="none", overwrite=True).rows
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(RunError, match="holds a study"):
        evaluate(folder, toy_cohort, tmp_path, overwrite=True)
    shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-moved" / "tree")
    moved = tmp_path.parent / f"{tmp_path.name}-moved" / "tree" / "e"
    assert report_evaluation(moved).exists()


def test_the_page_of_a_case_that_is_gone_is_removed_and_every_file_of_the_user_stays(
    predictions: Path, toy_cohort: Path, tmp_path: Path
) -> None:
    folder, out = shutil.copytree(predictions, tmp_path / "p"), tmp_path / "e"
    evaluate(folder, toy_cohort, out)
    content = json.loads((folder / "predictions.json").read_text())
    gone = content["cases"].pop()["case"]
    (folder / "predictions.json").write_text(json.dumps(content))
    own = [out / "cases" / "scan.nii.gz", out / "pictures" / "mine" / "brain.png", out / "registered" / "P1" / "t2.nii"]
    for path in own:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("of the user")
    evaluate(folder, toy_cohort, out)
    assert not (out / "cases" / f"{gone}.html").exists() and not (out / "pictures" / f"{gone}.png").exists()
    evaluate(folder, toy_cohort, out, regions="none", overwrite=True)
    assert all(path.read_text() == "of the user" for path in own)


@pytest.mark.parametrize("place", ["cases", "pictures", "registered", "registered/deep"])
def test_data_where_an_evaluation_writes_are_refused_and_stay(
    place: str, predictions: Path, toy_cohort: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(toy_cohort, tmp_path / "e" / place)
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    link = tmp_path / "link"
    link.symlink_to(data, target_is_directory=True)
    for spelled in (data, link, data / ".." / data.name):
        for overwrite in (False, True):
            with pytest.raises(RunError, match="belongs to the data, and the evaluation would replace it"):
                evaluate(predictions, spelled, tmp_path / "e", overwrite=overwrite)
    with pytest.raises(RunError, match="is the folder of the data"):
        evaluate(predictions, data, link)
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before


def test_files_and_links_that_an_evaluation_did_not_write_are_refused(
    predictions: Path, toy_cohort: Path, tmp_path: Path
) -> None:
    out = tmp_path / "e"
    (out / "cases").mkdir(parents=True)
    (out / "cases" / "Toy_0001.html").write_text("of the user")
    (out / "report.html").write_text("of the user")
    with pytest.raises(RunError, match=r"holds report\.html, cases/Toy_0001\.html, which were not written") as caught:
        evaluate(predictions, toy_cohort, out)
    assert "chiasm evaluate --overwrite" in str(caught.value) and (out / "report.html").read_text() == "of the user"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "cases").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(RunError, match="is a link"):
        evaluate(predictions, toy_cohort, tmp_path / "linked", overwrite=True)
    done = evaluate(predictions, toy_cohort, tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "cases")
    (tmp_path / "whole" / "cases").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(RunError, match="is a link"):
        report_evaluation(done.report.parent)
    assert not list((tmp_path / "elsewhere").iterdir())
