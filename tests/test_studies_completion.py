"""A cohort with gaps becomes one without, marked; and what that is worth is measured where nothing leaks."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from chiasm.cli import main
from chiasm.cohorts.cases import Case
from chiasm.cohorts.completed import is_synthetic
from chiasm.cohorts.dicom_patients import Selection
from chiasm.cohorts.discovery import find_cohort
from chiasm.cohorts.splits import read_splits
from chiasm.errors import ChiasmError, CohortError
from chiasm.evaluation.predictions import score_folder
from chiasm.evaluation.rows import read_evaluation
from chiasm.methods import make_recipe
from chiasm.prediction.folders import Predicted, predict
from chiasm.preparation.plan import read_plan
from chiasm.recipe import Recipe
from chiasm.reports.evaluation import evaluate
from chiasm.studies.completion import Completed, complete, survey_cohort
from chiasm.training.run import train
from chiasm.training.run_planning import plan_run
from chiasm.volumes import read_volume
from conftest import QUICK
from synthetic_cohort import affine, pair, save, write_brats

GAPS, LACKING = ("Toy_0002", "Toy_0005"), "Toy_0007"
ALLOWED = Selection(allow=("synthetic",))


def recipe_with(method: str = "A1", **changes: object) -> Recipe:
    quick = {**QUICK, "split.folds": 2, "schedule.steps": 4, "training.validations": 1}
    return make_recipe(method, "tiny", {**quick, **{name.replace("__", "."): value for name, value in changes.items()}})


def gappy_cohort(folder: Path, *, third: bool = True) -> Path:
    """Six cases with T1, T2 and FLAIR, two of them without T2; a seventh with FLAIR alone."""
    write_brats(folder, 6)
    for number in range(1, 8):
        name = f"Toy_{number:04d}"
        if third:
            source, target, _ = pair(number)
            save(folder / name / f"{name}_flair.nii.gz", source + target / 2, affine())
        if name in GAPS:
            (folder / name / f"{name}_t2.nii.gz").unlink()
    return folder


def fingerprints(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gappy_cohort(tmp_path_factory.mktemp("gappy"))


@pytest.fixture(scope="module")
def before(data: Path) -> dict[str, str]:
    return fingerprints(data)


@pytest.fixture(scope="module")
def done(data: Path, before: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Completed:
    out = tmp_path_factory.mktemp("completion")
    return complete(data, recipe_with(), out, utility="flair", say=lambda _: None)


def cells(done: Completed) -> list[Path]:
    return sorted((done.folder / "utility").iterdir())


def test_the_originals_keep_their_bytes_and_the_copies_have_them(
    done: Completed, data: Path, before: dict[str, str]
) -> None:
    assert fingerprints(data) == before
    copies = find_cohort(done.cohort)
    for case in find_cohort(data).cases:
        copy = next(one for one in copies.cases if one.id == case.id)
        assert {name: path.read_bytes() for name, path in copy.images.items()} == {
            name: path.read_bytes() for name, path in case.images.items()
        }


def test_every_gap_is_filled_with_what_predict_makes_and_marked(done: Completed, tmp_path: Path) -> None:
    cohort = find_cohort(done.cohort, selection=ALLOWED)
    assert done.cases == GAPS and [case.id for case in cohort.cases if case.synthetic] == list(GAPS)
    for case in (case for case in cohort.cases if case.synthetic):
        image = case.images["t2"]
        assert image.name == f"{case.id}_t2_synthetic.nii.gz" and is_synthetic(image)
        told = json.loads(image.with_name(f"{case.id}_t2_synthetic.json").read_text())
        source = case.images["t1"]
        assert told["sources"] == {"t1": hashlib.sha256(source.read_bytes()).hexdigest()}
        assert told["expected_error"] is None and any("no local discriminator" in word for word in told["warnings"])
        made = predict(done.folder / "run", [source], tmp_path / case.id, accelerator="cpu")
        assert told["model"] == made.manifest.sha256
        by_hand = read_volume(tmp_path / case.id / made.manifest.cases[0].image)
        np.testing.assert_array_equal(read_volume(image).array, by_hand.array)


def test_training_takes_completed_cases_only_where_it_is_allowed_and_never_tests_on_them(
    done: Completed, tmp_path: Path
) -> None:
    said: list[str] = []
    plain = plan_run(done.cohort, recipe_with(), tmp_path / "plain", say=said.append)
    assert not set(GAPS) & {*plain.split.train, *plain.split.validation, *plain.split.test}
    assert {problem.case for problem in plain.problems if problem.reason == "synthetic"} == set(GAPS)
    allowed = plan_run(done.cohort, recipe_with(), tmp_path / "allowed", say=said.append, selection=ALLOWED)
    assert set(GAPS) <= set(allowed.split.train) and len(allowed.split.test) == len(plain.split.test)
    assert "of these 2 with images that were made, not acquired" in said


def test_no_completion_model_of_the_utility_saw_a_test_subject_and_each_is_tested_once(done: Completed) -> None:
    tested: list[str] = []
    for cell in cells(done):
        test = {row.case for row in read_evaluation(cell)}
        for part in ("completion", "without", "with"):
            split = read_splits(cell / part / "splits.json").split
            assert not test & {*split.train, *split.validation, *split.test}
        assert not test & set(GAPS)
        tested += test
    assert sorted(tested) == ["Toy_0001", "Toy_0003", "Toy_0004", "Toy_0006"]


def test_with_and_without_differ_in_nothing_but_the_completed_cases(done: Completed) -> None:
    for cell in cells(done):
        ours, theirs = cell / "with", cell / "without"
        assert (ours / "recipe.toml").read_bytes() == (theirs / "recipe.toml").read_bytes()
        more, fewer = (read_splits(folder / "splits.json").split for folder in (ours, theirs))
        assert set(more.train) == {*fewer.train, *GAPS} and more.validation == fewer.validation
        plan, other = read_plan(ours / "plan.toml"), read_plan(theirs / "plan.toml")
        assert plan.trained_on == more.train and replace(plan, trained_on=other.trained_on) == other
        units = {row.convention for row in read_evaluation(cell) if row.region == "mask"}
        assert len(units) == 1  # range and scale are told with each figure


def test_the_difference_told_is_the_mean_over_subjects_of_the_pairs_in_the_files(done: Completed) -> None:
    rows = [row for cell in cells(done) for row in read_evaluation(cell)]
    mae = {(r.method, r.case): r.value for r in rows if (r.region, r.metric) == ("mask", "mae")}
    cases = sorted({case for _, case in mae})
    by_hand = np.mean([mae["with", case] - mae["without", case] for case in cases])
    first = done.comparisons[0]
    assert (first.arm, first.against, first.region, first.metric) == ("with", "without", "mask", "mae")
    assert first.difference == pytest.approx(by_hand, rel=1e-12) and first.low <= by_hand <= first.high
    told = json.loads((done.folder / "completion.json").read_text())
    assert told["utility"]["comparisons"][0]["difference"] == first.difference
    pairs = {one["case"]: (one["without"], one["with"]) for one in told["utility"]["cases"]}
    assert pairs == {case: (mae["without", case], mae["with", case]) for case in cases}
    assert first.verdict in done.lines and first.verdict in (done.folder / "completion.md").read_text()


def test_a_case_that_lacks_a_source_too_is_left_alone_and_named(done: Completed) -> None:
    assert [(problem.case, problem.reason) for problem in done.problems] == [(LACKING, "missing-modality")]
    assert "no t2 and no t1" in done.problems[0].message
    kept = next(case for case in find_cohort(done.cohort, selection=ALLOWED).cases if case.id == LACKING)
    assert set(kept.images) == {"flair"}


def test_a_synthetic_image_is_never_a_reference(done: Completed, tmp_path: Path) -> None:
    shutil.copytree(done.cohort, tmp_path / "cohort")
    (tmp_path / "cohort" / "cohort.json").write_text('{"allow": ["synthetic"]}')
    predict(done.folder / "run", [done.cohort], tmp_path / "made", accelerator="cpu")
    rows, problems, _ = score_folder(tmp_path / "made", tmp_path / "cohort", naive=False)
    assert not {row.case for row in rows} & set(GAPS)
    assert {problem.case for problem in problems if problem.reason == "synthetic"} == set(GAPS)
    entries = [case for case in find_cohort(tmp_path / "cohort").cases if case.id in GAPS]
    predict(done.folder / "run", entries, tmp_path / "gaps", accelerator="cpu")
    with pytest.raises(CohortError, match="made, not acquired"):
        evaluate(tmp_path / "gaps", tmp_path / "cohort", tmp_path / "scored")


def test_the_same_command_again_trains_nothing_and_makes_only_what_is_missing(done: Completed, data: Path) -> None:
    images = {name: done.cohort / name / f"{name}_t2_synthetic.nii.gz" for name in GAPS}
    kept, lost = images.values()
    content, stamp = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    steps: list[int] = []
    again = complete(
        data,
        recipe_with(),
        done.folder,
        utility="flair",
        say=lambda _: None,
        progress=lambda step, total, figures: steps.append(step),
    )
    assert not steps and repr((again.rows, again.comparisons)) == repr((done.rows, done.comparisons))  # NaN is no NaN
    assert kept.stat().st_mtime_ns == stamp
    assert lost.read_bytes() == content


def test_a_bad_case_is_named_the_others_are_completed_and_the_command_exits_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = gappy_cohort(tmp_path / "data", third=False)
    bad = folder / GAPS[0] / f"{GAPS[0]}_t1.nii.gz"
    bad.write_bytes(b"not a scan")
    words = ["complete", str(folder), "--source", "t1", "--target", "t2", "-o", str(tmp_path / "out")]
    words += ["--utility", "none", "--method", "A7", "--size", "tiny", "--steps", "12"]
    given = [(name, QUICK[name]) for name in QUICK if not name.startswith(("data.s", "data.t", "split", "schedule"))]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--set", *(f"{name}={list(v) if isinstance(v, tuple) else v}" for name, v in given)])
    told = capsys.readouterr()
    assert ended.value.code == 3 and GAPS[0] in told.err and "1 of 2 cases completed" in told.out
    cohort = find_cohort(tmp_path / "out" / "cohort", selection=ALLOWED)
    assert [case.id for case in cohort.cases if case.synthetic] == [GAPS[1]]
    image = cohort.root / GAPS[1] / f"{GAPS[1]}_t2_synthetic.nii.gz"
    trust = json.loads(image.with_name(f"{GAPS[1]}_t2_synthetic.json").read_text())["expected_error"]
    expected, made = (read_volume(image.with_name(name)).array for name in (trust, image.name))
    assert expected.shape == made.shape and expected.min() >= 0 and not np.array_equal(expected, made)
    run = train(tmp_path / "out" / "cohort", recipe_with(), tmp_path / "run", say=lambda _: None, selection=ALLOWED)
    assert GAPS[1] in run.split.train and (run.folder / "model").is_dir()


@pytest.mark.parametrize(
    ("changes", "utility", "told"),
    [
        ({"data.target": "flair"}, "none", "nothing to complete"),
        ({"data.target": "pet"}, "none", "no case has the modality 'pet'"),
        ({}, "t2", "cannot be the target of the later model"),
        ({}, "ct", "do not share the modality 'ct'"),
        ({"split.folds": 1}, "flair", "--folds 2"),
        ({"training.devices": 2}, "none", "one device"),
        ({"split.folds": 5}, "flair", "5 folds need at least 5 subjects"),
    ],
)
def test_what_cannot_be_completed_or_measured_is_refused_before_anything_is_written(
    data: Path, tmp_path: Path, changes: dict[str, object], utility: str, told: str
) -> None:
    recipe = recipe_with(**{name.replace(".", "__"): value for name, value in changes.items()})
    with pytest.raises(ChiasmError, match=told):
        complete(data, recipe, tmp_path / "out", utility=utility, say=lambda _: None)
    assert not (tmp_path / "out").exists()


def test_an_image_that_is_the_same_everywhere_completes_nothing(
    done: Completed, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chiasm.studies import filling

    def collapsed(run: Path, inputs: list[Case], out: Path, **options: str) -> Predicted:
        made = predict(run, inputs, out, **options)
        image = out / made.manifest.cases[0].image
        save(image, np.full_like(read_volume(image).array, 71.5), affine())
        return made

    monkeypatch.setattr(filling, "predict", collapsed)
    gaps = [case for case in find_cohort(data).cases if case.id in GAPS]
    filled, problems = filling.fill(gaps, done.folder / "run", tmp_path, recipe_with())
    assert not filled and [problem.case for problem in problems] == list(GAPS)
    assert "nearly the same t2 everywhere" in problems[0].message and not list(tmp_path.rglob("*.nii.gz"))


def test_one_complete_subject_is_too_few(data: Path, tmp_path: Path) -> None:
    cohort = find_cohort(data)
    few = replace(cohort, cases=cohort.cases[:2])
    with pytest.raises(CohortError, match="too few subjects"):
        survey_cohort(few, recipe_with(), "none")


def test_auto_takes_a_third_modality_or_else_the_way_back(data: Path) -> None:
    cohort = find_cohort(data)
    task = survey_cohort(cohort, recipe_with(), "auto").task
    assert task is not None and task == (("t1", "t2"), "flair") and str(task) == "t1 + t2 to flair"
    bare = replace(
        cohort,
        cases=tuple(
            replace(case, images={name: path for name, path in case.images.items() if name != "flair"})
            for case in cohort.cases
            if case.id != LACKING
        ),
    )
    assert survey_cohort(bare, recipe_with(), "auto").task == (("t2",), "t1")


def test_another_scan_of_a_test_subject_teaches_nothing(data: Path) -> None:
    cohort = find_cohort(data)
    cases = tuple(replace(case, subject="P1") if case.id in ("Toy_0001", "Toy_0002") else case for case in cohort.cases)
    survey = survey_cohort(replace(cohort, cases=cases), recipe_with(), "flair")
    for fold in survey.folds:
        people = {case.subject for case in fold.test}
        assert not people & {case.subject for case in (*fold.pairs, *fold.real, *fold.gaps)}
    assert {len(fold.gaps) for fold in survey.folds} == {1, 2}  # P1 tests in one fold and helps in another
