"""`chiasm explain`: words whose numbers are those of the files, and advice that depends on them."""

from __future__ import annotations

import csv
import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import chiasm
from chiasm.cli import main
from chiasm.errors import RunError
from chiasm.evaluation.rows import Row, read_evaluation, write_evaluation
from chiasm.reports.advice import RULES, advise
from chiasm.reports.evidence import Evidence, read_evidence
from chiasm.reports.explanation import Part, explain
from chiasm.storage import read_toml


@pytest.fixture(scope="module", autouse=True)
def few_steps_are_enough() -> Iterator[None]:
    """Trainings of these tests are so short that nothing else would ever be advised."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("chiasm.reports.advice.FEW_STEPS", 1)
        yield


@pytest.fixture(scope="module")
def results(finished_run: Path, toy_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `chiasm run` leaves it; the training went through all phases in 24 steps."""
    out = tmp_path_factory.mktemp("explained")
    shutil.copytree(finished_run, out / "run", ignore=shutil.ignore_patterns("cache", "checkpoints"))
    chiasm.predict(out / "run", [toy_cohort], out / "predictions", only="test")
    chiasm.evaluate(out / "predictions", toy_cohort, out / "evaluation")
    return out


@pytest.fixture
def copy(results: Path, tmp_path: Path) -> Path:
    return shutil.copytree(results, tmp_path / "results")


def words(place: Path) -> str:
    return "\n".join(f"{part.heading}\n" + "\n".join(part.sentences) for part in explain(place))


def advice(place: Path) -> str:
    short, *_ = explain(place)
    assert short.heading == "In short" and len(short.sentences) <= 4
    return short.sentences[-1]


def log(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "run" / "log.jsonl").read_text().splitlines()]


def rewrite_log(place: Path, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    lines = "".join(json.dumps(change(line)) + "\n" for line in log(place))
    (place / "run" / "log.jsonl").write_text(lines)


def rewrite_scores(place: Path, change: Callable[[Row], Row]) -> None:
    folder = place / "evaluation"
    write_evaluation(folder, [change(row) for row in read_evaluation(folder)])


def mean(place: Path, method: str, region: str, metric: str) -> float:
    """Read a score as somebody would who does not know the code."""
    with (place / "evaluation" / "evaluation.csv").open() as file:
        values = [
            float(line["value"])
            for line in csv.DictReader(file)
            if (line["method"], line["region"], line["metric"]) == (method, region, metric)
        ]
    return statistics.fmean(value for value in values if not math.isnan(value))


def test_each_number_is_that_of_the_files(results: Path) -> None:
    told = words(results)
    recipe, plan = read_toml(results / "run" / "recipe.toml"), read_toml(results / "run" / "plan.toml")
    split = json.loads((results / "run" / "splits.json").read_text())
    counts = {role: len(split[role]) for role in ("train", "validation", "test")}
    assert f"{recipe['schedule']['steps']} steps" in told
    assert f"Cases: {', '.join(f'{count} {role}' for role, count in counts.items())} (fold 0 of 3, by subject)." in told
    for name in ("mask_rule", "spacing_mm", "patch", "source_kinds", "lookup"):
        assert plan["reasons"][name] in told
    assert " x ".join(f"{side:g}" for side in plan["spacing_mm"]) in told

    validation = [line for line in log(results) if line["kind"] == "validation"]
    lowest = min(validation, key=lambda line: line["mae"])
    assert validation[0]["step"] == 0 and f"was {validation[0]['mae']:.3g} before training and" in told
    assert f"{validation[-1]['mae']:.3g} at step {validation[-1]['step']};" in told
    assert f"its lowest was {lowest['mae']:.3g} at step {lowest['step']}." in told
    losses = [line["reconstruction"] for line in log(results) if "reconstruction" in line]
    tenth = max(1, len(losses) // 10)
    assert f"from {statistics.fmean(losses[:tenth]):.3g} to {statistics.fmean(losses[-tenth:]):.3g}" in told
    accuracy = [line["accuracy_local"] for line in log(results) if "accuracy_local" in line][-1]
    assert f"(accuracy {accuracy:.2f})" in told
    times = json.loads((results / "run" / "times.json").read_text())
    assert f"training {times['training']:.0f} s" in told and f"planning {times['planning']:.0f} s" in told

    scored = json.loads((results / "evaluation" / "evaluation.json").read_text())["rows"]
    names = {row["method"] for row in scored} - {"A7"}
    best = min(names, key=lambda name: mean(results, name, "mask", "mae"))
    ours, theirs = mean(results, "A7", "mask", "mae"), mean(results, best, "mask", "mae")
    error = f"mask: mean absolute error {ours:.3g} SD in 2 subjects, {100 * (ours / theirs - 1):+.1f} % against"
    assert f"{error} the best baseline ({best}, {theirs:.3g} SD): fewer than 6 subjects" in told
    assert f"{mean(results, 'A7', 'mask', 'calibration'):.2f} times the true one" in told
    assert f"{mean(results, 'A7', 'lesions', 'false_lesions'):.3g} for each case" in told


def test_the_report_opens_with_the_same_words(results: Path) -> None:
    from html import unescape

    page = unescape((results / "evaluation" / "report.html").read_text()).replace("\N{NO-BREAK SPACE}", " ")
    assert page.index("In short") < page.index('id="gallery"')
    short, *parts = explain(results)
    assert len(short.sentences) == 4 and all(f"<li>{sentence}</li>" in page for sentence in short.sentences)
    for part in parts:
        listed = "\n".join(f"<li>{sentence}</li>" for sentence in part.sentences)
        assert f"<strong>{part.heading}</strong></summary>\n<ul>\n{listed}\n</ul>" in page


def test_run_evaluation_and_all_of_it_are_explained_alike(results: Path) -> None:
    assert explain(results) == explain(results / "evaluation")
    of_run = explain(results / "run")
    assert [part.heading for part in of_run] == ["In short", "Chosen", "In training"]
    assert of_run[1] == explain(results)[1] == explain(results / "run" / "model")[1]
    assert "chiasm evaluate" in advice(results / "run")


def test_three_unlike_runs_get_three_pieces_of_advice(results: Path, tmp_path: Path) -> None:
    short, long, foreign = (Path(shutil.copytree(results, tmp_path / name)) for name in ("short", "long", "foreign"))
    falling = iter((0.9, 0.7, 0.6, 0.5, 0.4))
    rewrite_log(short, lambda line: {**line, "mae": next(falling)} if line["kind"] == "validation" else line)
    rising = iter((0.45, 0.5, 0.7, 0.8, 0.9))  # the first is of weights that learnt nothing yet
    rewrite_log(long, lambda line: {**line, "mae": next(rising)} if line["kind"] == "validation" else line)
    manifest = json.loads((foreign / "predictions" / "predictions.json").read_text())
    for case, by in zip(manifest["cases"], ("", "model 1, 3: "), strict=True):  # by all models, and by two of them
        case["warnings"] = [f"{by}the input is out of distribution: it has voxels of 9 x 9 x 9 mm"]
    (foreign / "predictions" / "predictions.json").write_text(json.dumps(manifest))
    told = [advice(place) for place in (short, long, foreign)]
    steps = [line["step"] for line in log(short) if line["kind"] == "validation"]
    assert told[0].startswith("The validation error was still falling") and "--steps 48" in told[0]
    assert f"to {[0.9, 0.7, 0.6, 0.5, 0.4][len(steps) - 1]:g} at step {steps[-1]}" in told[0]
    assert told[1].startswith("The validation error rose from 0.5") and f"--steps {steps[1]}" in told[1]
    assert told[2].startswith("2 of 2 inputs are out of distribution")
    assert "2 of 2 inputs are out of distribution: Toy" in words(foreign)


def test_a_stopped_training_is_told_to_go_on(copy: Path) -> None:
    shutil.rmtree(copy / "run" / "model")
    shutil.rmtree(copy / "evaluation")
    assert advice(copy) == "The training stopped after step 24 of 24: run the same command again to go on."


def calm(found: Evidence) -> Evidence:
    """Evidence in which nothing stands out: six cases, better than the baselines, healthy, trusted."""
    rows = [
        Row(f"case{number}", 0, 0, method, region, metric, value, "SD", "chiasm (range 0 to 1)")
        for number in range(6)
        for method, region, metric, value in (
            ("A7", "mask", "mae", 0.5),
            ("lookup", "mask", "mae", 0.9),
            ("A7", "WT", "mae", 0.6),
            ("lookup", "WT", "mae", 0.9),
            ("A7", "mask", "calibration", 1.0),
            ("A7", "mask", "spearman", 0.5),
        )
    ]
    history = [
        {"kind": "step", "step": 24, "accuracy_global": 0.8, "accuracy_local": 0.8},
        *({"kind": "validation", "step": step, "mae": 0.5, "gate_closed_share": 0.0} for step in (12, 24)),
    ]
    return replace(found, rows=rows, history=history, naive=("lookup",), entries=(), sites={})


def with_value(found: Evidence, region: str, metric: str, value: float) -> Evidence:
    rows = [
        row._replace(value=value) if (row.method, row.region, row.metric) == ("A7", region, metric) else row
        for row in found.rows
    ]
    return replace(found, rows=rows)


def with_setting(found: Evidence, section: str, **settings: object) -> Evidence:
    changed = getattr(found.recipe, section).model_copy(update=settings)
    return replace(found, recipe=found.recipe.model_copy(update={section: changed}))


def with_last(found: Evidence, kind: str, **figures: float) -> Evidence:
    return replace(found, history=[*found.history, {"kind": kind, "step": 24, "mae": 0.5, **figures}])


CHANGES: list[tuple[str, Callable[[Evidence], Evidence]]] = [
    ("No weakness stands out", lambda found: found),
    (
        "training.lesion_share=0.5",
        lambda found: with_value(with_setting(found, "training", lesion_share=0.0), "WT", "mae", 1),
    ),
    ("--method difficult-transplants", lambda found: with_value(found, "WT", "mae", 1.0)),
    (
        "more cases with lesions",
        lambda found: with_value(with_setting(found, "training", transplant_share=0.5), "WT", "mae", 1.0),
    ),
    ("--register rigid", lambda found: with_value(found, "mask", "mae", 1.0)),
    (
        "may be too few",
        lambda found: with_value(replace(found, plan=replace(found.plan, registration="rigid")), "mask", "mae", 1.0),
    ),
    ("off in 80 % of its steps", lambda found: with_last(found, "validation", gate_closed_share=0.8)),
    ("weigh 1.01 times", lambda found: with_last(found, "validation", weight_ratio=1.01)),
    ("halve its rate", lambda found: with_last(found, "step", accuracy_global=0.99)),
    ("double its rate", lambda found: with_last(found, "step", accuracy_local=0.5)),
    (
        "1.60 times the true one: calibrate it on more cases, chiasm train --set split.validation=0.4",
        lambda found: with_value(replace(found, roles={"train": 8, "validation": 2}), "mask", "calibration", 1.6),
    ),
    (  # of two subjects one validates, whatever the share
        "1.60 times the true one: it needs more cases",
        lambda found: with_value(replace(found, roles={"train": 1, "validation": 1}), "mask", "calibration", 1.6),
    ),
    ("Only 5 cases", lambda found: replace(found, rows=[row for row in found.rows if row.case != "case5"])),
]


@pytest.mark.parametrize(("told", "change"), CHANGES, ids=[told for told, _ in CHANGES])
def test_the_advice_is_about_what_stands_out(told: str, change: Callable[[Evidence], Evidence], results: Path) -> None:
    assert told in advise(change(calm(read_evidence(results))))


def test_a_harder_site_is_named(results: Path) -> None:
    found = calm(read_evidence(results))
    found = replace(
        found,
        sites={f"case{number}": "north" if number < 3 else "south" for number in range(6)},
        rows=[
            row._replace(value=0.7) if row[0] in ("case0", "case1", "case2") and row.value == 0.5 else row
            for row in found.rows
        ],
    )
    assert advise(found).startswith("Site north is harder (0.7 against 0.5 at south)")


def test_a_training_of_few_steps_is_too_short_to_judge(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chiasm.reports.advice.FEW_STEPS", 200)
    assert advice(copy).startswith("Only 24 steps were trained, too few to assess the method")


def test_every_rule_is_reached(results: Path) -> None:
    found = calm(read_evidence(results))
    spoken = {rule for _, change in CHANGES for rule in RULES if rule(change(found))}
    assert {rule.__name__ for rule in RULES} - {rule.__name__ for rule in spoken} == {
        *("_unfinished", "_unevaluated", "_inputs", "_too_short", "_steps", "_sites")  # of which the tests above tell
    }


def test_a_folder_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match="neither a training nor an evaluation"):
        explain(tmp_path)
    with pytest.raises(SystemExit) as done:
        main(["explain", str(tmp_path / "nowhere")])
    assert done.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_command_prints_every_sentence(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["explain", str(results)])
    told = capsys.readouterr().out
    assert done.value.code == 0 and max(map(len, told.splitlines())) <= 80
    flat = " ".join(told.split()).replace("- ", "-")
    for part in explain(results):
        assert isinstance(part, Part)
        for sentence in part.sentences:
            assert " ".join(sentence.split()).replace("- ", "-") in flat
