"""`chiasm run`: one command from scans to a report, that says what it will do and goes on where it was stopped."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from pathlib import Path

import pytest

import chiasm
from chiasm.cli import main
from chiasm.errors import RecipeError
from chiasm.methods import make_recipe
from chiasm.pipeline import Watch, minutes_before, plan_ahead
from chiasm.prediction.model_files import find_model
from chiasm.recipe import read_recipe
from chiasm.storage import read_toml
from conftest import QUICK
from struck import run_struck

SETTINGS = [
    f"{name}={list(value) if isinstance(value, tuple) else value}"
    for name, value in QUICK.items()
    if name not in ("data.sources", "data.target", "split.folds", "schedule.steps")
]
QUIET = Watch(say=lambda _: None)


def asked(data: Path, out: Path, *more: str) -> list[str]:
    words = ["run", data, "--source", "t1", "--target", "t2", "-o", out, "--size", "tiny", "--folds", "3"]
    return [*map(str, words), *more, "--set", *SETTINGS]


def call(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        main(words)
    said = capsys.readouterr()
    return int(done.value.code or 0), said.out, said.err


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.stat().st_size) for path in found}


def quickstart() -> list[list[str]]:
    """The words of each command that the quickstart goes through step by step."""
    page = (Path(__file__).parents[1] / "docs" / "quickstart.md").read_text().partition("step by step")[2]
    return [shlex.split(line)[1:] for line in page.split("```")[1].strip().splitlines()]


def test_the_quickstart_goes_from_nothing_to_a_report_and_then_answers_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    told = {}
    for words in quickstart():
        code, told[words[0]], _ = call(words, capsys)
        assert code == 0
    assert list(told) == ["phantom", "inspect", "run", "explain", "predict"]
    assert "6 cases of 6 subjects" in told["inspect"] and told["explain"] in told["run"]
    assert "train l2-expected-error (A17), tiny, 40 steps" in told["run"] and "predict 1 test case" in told["run"]
    assert told["run"].index("in all") < told["run"].index("model:")  # the plan is said before the work
    assert told["run"].splitlines()[-1] == "report: OUT/report.html"
    out = Path("OUT")
    assert "evaluation/report.html" in (out / "report.html").read_text()
    assert (out / "evaluation" / "report.html").is_file() and (out / "run" / "model" / "model.toml").is_file()
    assert (
        len(list((out / "predictions").glob("*_t2.nii.gz"))) == len(list(Path("PREDICTIONS").glob("*_t2.nii.gz"))) == 1
    )

    before = files_below(out)
    run = next(words for words in quickstart() if words[0] == "run")
    code, again, _ = call(run, capsys)
    assert code == 0 and "finished already" in again and again.splitlines()[-1] == told["run"].splitlines()[-1]
    assert files_below(out) == before


def test_several_models_score_every_case_in_one_command(
    toy_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["run", toy_cohort, "--source", "t1", "--target", "t2", "-o", out, "--size", "tiny", "--models", "2"]
    kept = [one for one in SETTINGS if not one.startswith("split.")]
    words = [*map(str, words), "--steps", "24", "--set", *kept]
    code, told, _ = call([*words, "--dry-run"], capsys)
    assert code == 0 and not out.exists()
    assert "train 2 models of l2-expected-error (A17), tiny, 24 steps in all" in told
    assert "predict 6 cases, each by the model that did not learn from it" in told
    code, told, _ = call(words, capsys)
    assert code == 0 and "predicted: 6 test cases" in told and "Each of 2 models" in told
    assert len(list((out / "predictions").glob("*/*_t2.nii.gz"))) == 6
    before = files_below(out)
    code, again, _ = call(words, capsys)
    assert code == 0 and again.count("finished already") == 2 and files_below(out) == before


def test_the_time_of_the_first_call_holds_for_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert minutes_before(out, 40.0) == 40.0
    (out / "job.json").write_text('{"minutes": 5.0, "is_finished": false}')
    assert minutes_before(out, 40.0) == 5.0
    (out / "job.json").write_text('{"minutes": null, "is_finished": false}')
    assert minutes_before(out, 40.0) is None


def test_a_model_is_found_in_what_run_wrote(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run / "model", tmp_path / "out" / "run" / "model")
    assert find_model(tmp_path / "out") == tmp_path / "out" / "run" / "model"


def test_what_single_stages_made_is_taken_over(toy_cohort: Path, tmp_path: Path) -> None:
    recipe = make_recipe("A1", "tiny", QUICK)
    chiasm.train(toy_cohort, recipe, tmp_path / "run", say=lambda _: None)
    log = (tmp_path / "run" / "log.jsonl").stat().st_mtime_ns
    done = chiasm.run(toy_cohort, recipe, tmp_path, minutes=None, watch=QUIET)
    assert done.report.is_file() and (tmp_path / "run" / "log.jsonl").stat().st_mtime_ns == log


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    toy_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told, _ = call(asked(toy_cohort, tmp_path / "out", "--dry-run"), capsys)
    assert code == 0 and "400 steps" in told and "in all less than a minute" in told  # of size tiny
    assert not (tmp_path / "out").exists()


def test_steps_are_fitted_into_the_minutes_and_stay_the_same_when_it_goes_on(
    toy_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chiasm.training import cost

    monkeypatch.setattr(cost, "time_convolution", lambda *_: 1e-3)  # a machine whose speed is known
    recipe = make_recipe("A1", "tiny", {**QUICK, "schedule.steps": 400})
    lines: list[str] = []
    plan_ahead(toy_cohort, recipe, tmp_path / "out", minutes=0.02, say=lines.append)
    planned = chiasm.run(toy_cohort, recipe, tmp_path / "out", minutes=0.02, watch=QUIET)
    steps = read_recipe(tmp_path / "out" / "run" / "recipe.toml").schedule.steps
    pace = read_toml(tmp_path / "out" / "run" / "plan.toml")["expected"]["seconds_per_step"]
    assert steps == int(0.02 * 60 * cost.PART_OF_TIME / pace) and 20 <= steps < 400
    assert any(f"{steps} steps" in line for line in lines) and planned.report.is_file()
    monkeypatch.setattr(cost, "time_convolution", lambda *_: 2e-3)  # slower today: no other recipe
    assert chiasm.run(toy_cohort, recipe, tmp_path / "out", minutes=0.02, watch=QUIET).report == planned.report


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--minutes", "0.00001"], "too short for a training"),
        (["--minutes", "-3"], "--minutes is not a time"),
        (["--minutes", "nan"], "--minutes is not a time"),
        (["--minutes", "3", "--steps", "24"], "at odds"),
        (["--folds", "1"], "nothing could be evaluated"),
        (["--folds", "40"], "folds"),
        (["--method", "A77"], "A7"),
        (["--set", "training.devices=2"], "chiasm train --devices"),
        (["--target", "pet"], "pet"),
        (["--engine", "abacus"], "onnxruntime"),
        (["--format", "jpeg"], "metaimage"),
        (["--format", "dicom"], "cannot be evaluated"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry"])
def test_bad_input_is_refused_in_one_sentence_before_work_begins(
    more: list[str], told: str, dry: list[str], toy_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = call([*asked(toy_cohort, tmp_path / "out"), *more, *dry], capsys)
    assert code == 2 and told in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists() or not files_below(tmp_path / "out")


def test_another_time_is_refused_and_somebody_elses_report_is_not_replaced(
    toy_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "job.json").write_text('{"minutes": 5.0, "is_finished": false}')
    code, _, said = call(asked(toy_cohort, tmp_path / "a", "--minutes", "9"), capsys)
    assert code == 2 and "5 minutes of training and is asked for with 9 minutes" in said
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "report.html").write_text("mine")
    code, _, said = call(asked(toy_cohort, tmp_path / "b"), capsys)
    assert code == 2 and "report.html" in said and (tmp_path / "b" / "report.html").read_text() == "mine"


def test_predictions_are_made_by_the_engine_and_in_the_format_that_were_given(
    toy_cohort: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished_run, out / "run", ignore=shutil.ignore_patterns("cache"))
    words = asked(toy_cohort, out, "--steps", "24", "--method", "dual-attention")
    code, *_ = call([*words, "--engine", "onnxruntime", "--format", "metaimage"], capsys)
    assert code == 0 and len(list((out / "predictions").glob("*_t2.mha"))) == 2
    manifest = json.loads((out / "predictions" / "predictions.json").read_text())
    assert all(case["engine"].startswith("onnxruntime") for case in manifest["cases"])
    before = files_below(out)
    for option, given in (("--engine", "torch"), ("--format", "nifti")):
        for dry in ([], ["--dry-run"]):
            code, _, said = call([*words, option, given, *dry], capsys)
            first = {"--engine": "onnxruntime", "--format": "metaimage"}[option]
            assert code == 2 and said.count("\n") == 1
            assert f"was started with {option} {first} and is asked for with {option} {given}" in said
    code, told, _ = call(words, capsys)  # what the first call was given holds
    assert code == 0 and "finished already" in told and files_below(out) == before


def test_a_job_that_is_damaged_is_refused(toy_cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"minutes": "soon"}')
    with pytest.raises(chiasm.errors.RunError, match=r"not what chiasm run writes"):
        chiasm.run(toy_cohort, make_recipe("A1", "tiny", QUICK), tmp_path, watch=QUIET)


def test_a_time_that_is_none_is_refused(toy_cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not a time"):
        chiasm.run(toy_cohort, make_recipe("A1", "tiny", QUICK), tmp_path / "out", minutes=float("inf"), watch=QUIET)


def test_ctrl_c_stops_and_the_same_command_goes_on_to_the_report(
    toy_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*asked(toy_cohort, tmp_path / "out", "--steps", "120", "--method", "l2"), "training.validations=5"]
    stopped = run_struck(
        "from chiasm.cli import main\nmain(argv[1:])",
        words,
        tmp_path / "out/run/checkpoints/*.toml",
        signal.SIGINT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also where tests run in the background
    )
    said = stopped.stderr
    assert stopped.returncode == 130 and "goes on from here" in said and "Traceback" not in said
    assert not (tmp_path / "out" / ".lock").exists() and not (tmp_path / "out" / "report.html").exists()
    code, told, _ = call([*words, "--dry-run"], capsys)
    assert code == 0 and "of them done" in told
    code, _, said = call(words, capsys)
    assert code == 0, said
    assert (tmp_path / "out" / "evaluation" / "report.html").is_file()
    assert json.loads((tmp_path / "out" / "job.json").read_text()) == {
        "minutes": None,
        "is_finished": True,
        "engine": "auto",
        "format": "volume",
    }


@pytest.mark.parametrize("stage", ["predictions", "evaluation"])
def test_a_later_stage_that_was_stopped_goes_on(
    stage: str, toy_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("A1", "tiny", QUICK)

    def stop(done: int, of: int, case: str) -> None:
        raise KeyboardInterrupt

    stopping = {
        "predictions": Watch(lambda _: None, predicting=stop),
        "evaluation": Watch(lambda _: None, None, None, stop),
    }
    with pytest.raises(KeyboardInterrupt):
        chiasm.run(toy_cohort, recipe, tmp_path / "out", minutes=None, watch=stopping[stage])
    assert not (tmp_path / "out" / "report.html").exists()
    done = chiasm.run(toy_cohort, recipe, tmp_path / "out", minutes=None, watch=QUIET)
    assert done.report.is_file() and (tmp_path / "out" / stage).is_dir()
