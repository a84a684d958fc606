"""`chiasm models`: cards whose entries are those of the files, and comparisons that say where they are none."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

import chiasm
from chiasm.cli import main
from chiasm.errors import RunError
from chiasm.evaluation.rows import read_evaluation, write_evaluation
from chiasm.reports.model_cards import describe_models


@pytest.fixture(scope="module")
def results(finished_run: Path, toy_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cards")
    shutil.copytree(finished_run, out / "run", ignore=shutil.ignore_patterns("cache", "checkpoints"))
    chiasm.predict(out / "run", [toy_cohort], out / "predictions", only="test")
    chiasm.evaluate(out / "predictions", toy_cohort, out / "evaluation")
    return out


def call(*words: str | Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as done:
        main(["models", *map(str, words)])
    said = capsys.readouterr()
    return int(done.value.code or 0), said.out + said.err


def test_a_card_tells_what_the_files_hold(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = call(results, capsys=capsys)
    assert code == 0 and "dual-attention (A7), size tiny, 24 steps" in told and "t1 to t2" in told
    split = json.loads((results / "run" / "splits.json").read_text())
    assert f"{len(split['train'])} train, {len(split['validation'])} validation, {len(split['test'])} test" in told
    assert "folds by subject, fold 0 of 3" in told and "not for diagnostic use" in told
    for name in ("model.toml", "weights.safetensors"):
        assert hashlib.sha256((results / "run" / "model" / name).read_bytes()).hexdigest() in told
    errors = [
        row.value
        for row in read_evaluation(results / "evaluation")
        if (row.method, row.region, row.metric) == ("A7", "mask", "mae")
    ]
    assert f"mask, mae: {sum(errors) / len(errors):.3g} SD (n {len(errors)})" in told  # two subjects: no interval


def test_from_three_subjects_on_a_score_has_an_interval_that_holds_the_mean(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "more")
    folder = tmp_path / "more" / "evaluation"
    rows = read_evaluation(folder)
    write_evaluation(folder, [*rows, *(row._replace(case=f"{row.case}b", value=row.value * 1.5) for row in rows)])
    score = describe_models([tmp_path / "more"]).cards[0].scores[0]
    assert score.subjects == 4 and score.low is not None and score.high is not None
    assert score.low < score.mean < score.high


def test_a_licence_beside_the_model_is_quoted(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results / "run" / "model", tmp_path / "model")
    assert describe_models([tmp_path / "model"]).cards[0].facts["licence"].startswith("not stated")
    (tmp_path / "model" / "LICENCE").write_text("CC BY 4.0\nfull text")
    assert describe_models([tmp_path / "model"]).cards[0].facts["licence"] == "CC BY 4.0"
    assert chiasm.load(tmp_path / "model")  # which it does not harm


def test_models_stand_side_by_side_and_what_forbids_a_comparison_is_said(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(results, tmp_path / "same")
    code, told = call(results, tmp_path / "same", capsys=capsys)
    assert code == 0 and "warning" not in told and told.count("mask, mae") == 3  # both cards, and the table
    folder = tmp_path / "same" / "evaluation"
    write_evaluation(folder, [row._replace(case=f"{row.case}b") for row in read_evaluation(folder)])
    _, told = call(results, tmp_path / "same", capsys=capsys)
    assert "scored on different cases" in told


def test_a_model_that_saw_the_others_test_cases_is_named(
    toy_cohort: Path, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from chiasm.methods import make_recipe
    from conftest import QUICK

    other = make_recipe("A1", "tiny", {**QUICK, "split.fold": 1, "schedule.steps": 4, "training.validations": 1})
    chiasm.train(toy_cohort, other, tmp_path / "run", say=lambda _: None)
    _, told = call(results, tmp_path / "run", capsys=capsys)
    seen = set(json.loads((tmp_path / "run" / "splits.json").read_text())["train"])
    tested = set(json.loads((results / "run" / "splits.json").read_text())["test"])
    assert f"was trained on {len(seen & tested)} of the test cases of {results}" in told


def test_the_cards_are_there_for_programs_too(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, told = call(results, "--json", capsys=capsys)
    [card] = json.loads(told)["models"]
    assert card["method"].startswith("dual-attention") and card["scores"][0]["metric"] == "mae"


def test_a_run_without_a_model_and_a_folder_of_something_else_are_refused(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(results / "run", tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    with pytest.raises(RunError, match="no finished model yet"):
        describe_models([tmp_path / "run"])
    code, told = call(tmp_path, capsys=capsys)
    assert code == 2 or "no finished model yet" in told
    code, told = call(tmp_path / "nowhere", capsys=capsys)
    assert code == 2 and told.count("\n") == 1
