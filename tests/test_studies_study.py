"""A study end to end on toys: jobs that are recognised, resumed, named when they fail; runners that agree."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.image import imread

import fake_slurm
from chiasm.attempts import Lost
from chiasm.cli import main
from chiasm.cohorts.splits import count_subjects, read_splits
from chiasm.errors import ChiasmError, RecipeError, RunError
from chiasm.evaluation.loading import load_case
from chiasm.evaluation.predictions import open_predictions, score_folder
from chiasm.evaluation.rows import Row, read_evaluation
from chiasm.evaluation.scoring import reporting_unit
from chiasm.methods import make_recipe
from chiasm.runners import RUNNERS, Runner, find_runner
from chiasm.storage import read_json, read_toml, write_json, write_toml
from chiasm.studies.jobs import content_of, find_cases, list_jobs, warm_ups
from chiasm.studies.study import describe_jobs, run_study
from chiasm.studies.study_file import Phantom, Study, read_study
from chiasm.studies.study_report import Done, compare_arms, report, write_study_report
from chiasm.studies.work import simulate
from chiasm.volumes import read_volume
from conftest import QUICK, Opened
from synthetic_cohort import write_brats, write_moved_heads

SETTINGS = [
    f"{name}={list(value) if isinstance(value, tuple) else value}"
    for name, value in QUICK.items()
    if name.split(".")[0] in ("generator", "discriminators", "training") or name == "data.patch"
]


FEW = {"arm": "few", "against": "A1"}
THIN = ("data.task=super-resolution", "data.factor=3", "data.axis=J")


def study_file(folder: Path, cohort: Path, **changes: object) -> Path:
    content = {
        "data": str(cohort), "source": ["t1"], "target": "t2", "arms": ["A1", "A7"], "folds": 3, "only_folds": [0],
        "seeds": [0, 1], "size": "tiny", "steps": 12, "set": SETTINGS,
        "primary": {"arm": "A7", "against": "A1", "metric": "mae", "region": "mask"},
    } | changes  # fmt: skip
    path = folder / "study.toml"
    write_toml(path, {name: value for name, value in content.items() if value is not None})
    return path


def study(path: Path, out: Path, **options: object) -> Done:
    return run_study(path, out, say=lambda _: None, **options)  # type: ignore[arg-type]


def with_sites(folder: Path, count: int = 6) -> Path:
    """A manifest of toys at two sites."""
    data = write_brats(folder / "data", count)
    names = sorted(path.name for path in data.iterdir() if path.is_dir())
    lines = [f"{n},{'north' if i % 2 else 'south'},{n}/{n}_t1.nii.gz,{n}/{n}_t2.nii.gz" for i, n in enumerate(names)]
    (data / "manifest.csv").write_text("\n".join(["subject,site,t1,t2", *lines]) + "\n")
    return data


def roles(out: Path) -> dict[str, set[str]]:
    """Case ids by role, over all jobs of a study."""
    found: dict[str, set[str]] = {}
    for path in out.glob("jobs/*/splits.json"):
        for role, ids in read_json(path).items():
            if role != "cases":
                found.setdefault(f"{role} of {read_toml(path.parent / 'recipe.toml')['split']['fold']}", set()).update(
                    ids
                )
    return found


@pytest.fixture(scope="module")
def finished(toy_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Done]:
    folder = tmp_path_factory.mktemp("study")
    path = study_file(folder, toy_cohort, expected_error="A7")
    return path, folder / "out", study(path, folder / "out")


def test_a_study_leaves_rows_statistics_and_a_page(finished: tuple[Path, Path, Done]) -> None:
    _, out, done = finished
    assert not done.failed and done.report == out / "report.html"
    with (out / "evaluation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    arms = {(row["method"], row["seed"]) for row in rows}
    assert arms >= {("A1", "0"), ("A1", "1"), ("A7", "0"), ("A7", "1"), ("lookup", "0")}
    of_both = [row["method"] for row in rows if row["metric"] != "slice_steps"]  # which baselines are not scored by
    count = {arm: of_both.count(arm) for arm in ("A1", "lookup")}
    assert count["A1"] == count["lookup"]  # the baselines are scored once for each fold and seed, not once an arm
    first = done.comparisons[0]
    assert first.primary and (first.arm, first.against, first.seeds, first.subjects) == ("A7", "A1", 2, 2)
    assert "too few" in first.verdict
    assert (out / "statistics.csv").exists() and "too few" in done.report.read_text()
    assert "of unknown size" not in done.report.read_text()  # the rim of all lesions is none of them


def test_the_page_and_the_paragraph_count_the_subjects_of_each_fold(finished: tuple[Path, Path, Done]) -> None:
    _, out, done = finished
    record = read_splits(next(out.glob("jobs/*/splits.json")))
    said = count_subjects(record)
    assert said == f"{len(record.split.train)} training, {len(record.split.validation)} validation, 2 test subjects"
    assert done.report.read_text().count(said) >= 2  # data sheet and paragraph


def test_the_expected_error_map_is_assessed_beside_others_and_shown_on_the_page(
    finished: tuple[Path, Path, Done],
) -> None:
    _, out, done = finished
    rows = read_evaluation(out / "expected-error")
    assert {row.method.split(" ", 1)[1] for row in rows} >= {"map", "augmentation", "ensemble"}
    assert not {row.method for row in rows} & {row.method for row in done.rows}
    page = done.report.read_text()
    assert "A7 ensemble" in page and "Risk and coverage" in page


def test_the_findings_can_be_quoted_in_a_document(finished: tuple[Path, Path, Done]) -> None:
    _, out, done = finished
    text = (out / "findings.md").read_text()
    assert f"- {next(one.verdict for one in done.comparisons if one.primary)}\n" in text
    lines = {line.split(":")[0].split(" (")[0].strip("| ") for line in text.splitlines() if line.startswith("| ")}
    assert lines >= {"A1", "A7", "lookup"} and "| A7 map |" in text
    for name in ("trade-off", "forest", "calibration", "coverage"):
        plot = ElementTree.parse(out / "plots" / f"{name}.svg").getroot()
        used = set(re.findall(r"var\((--[\w-]+)\)", ElementTree.tostring(plot, encoding="unicode")))
        style = plot.findtext("{http://www.w3.org/2000/svg}style") or ""
        assert used and all(f"{name}:" in style for name in used)  # it brings the colours that it asks for


def test_the_pages_are_made_again_from_files_alone(finished: tuple[Path, Path, Done], tmp_path: Path) -> None:
    _, out, done = finished
    copy = tmp_path / "copy"
    shutil.copytree(out, copy, ignore=shutil.ignore_patterns("cache", "checkpoints", "report.html", "statistics.csv"))
    page = report(copy)
    assert page.read_bytes() == done.report.read_bytes()
    assert (copy / "statistics.csv").read_bytes() == (out / "statistics.csv").read_bytes()
    for case in {row.case for row in done.rows}:
        assert f'href="cases/{case}.html"' in page.read_text() and (copy / "cases" / f"{case}.html").exists()
    for place in (copy / "jobs", copy / "expected-error"):
        shutil.rmtree(place)
    assert "No pages of single cases were made" in report(copy).read_text()  # figures remain
    with pytest.raises(ChiasmError, match="no study, no evaluation"):
        report(tmp_path)


def test_each_case_is_shown_with_the_difference_of_errors_and_the_weight_of_the_attention(
    finished: tuple[Path, Path, Done],
) -> None:
    path, out, done = finished
    page, label = done.report.read_text(), "error of A7 minus error of A1; blue = A7 better"
    cohort, notes = find_cases(read_study(path), out), read_json(out / "study.json")
    jobs = {job["arm"]: out / job["folder"] / "predictions" for job in notes["jobs"] if job["seed"] == 0}
    bar = re.search(r"<span>−([\d.]+)</span><span>SD</span><span>([\d.]+)</span>", page)
    assert cohort is not None and bar is not None and bar[1] == bar[2]  # zero is white
    for case in {row.case for row in done.rows}:
        for name in ("source", "real", "synthetic, A7", "synthetic, A1", label, "weight F of A7"):
            assert len(re.findall(f'alt="{name}, axial slice \\d+ of {case}"', page)) == 1
        picture = re.search(f'base64,([^"]+)" alt="{label}, axial slice (\\d+) of {case}"', page)
        assert picture is not None
        errors = {}
        for arm in ("A7", "A1"):
            folder = open_predictions(jobs[arm])
            entry = next(entry for entry in folder.manifest.cases if entry.case == case)
            one = load_case(folder, entry, cohort, with_labels=False, naive=False)
            errors[arm] = np.abs(one.prediction - one.target) / reporting_unit(folder.plan)[1]
        inside = one.mask[:, :, int(picture[2]) - 1]
        difference = (errors["A7"] - errors["A1"])[:, :, int(picture[2]) - 1][inside]
        wanted = colormaps["RdBu_r"](np.clip(0.5 + difference / (2 * float(bar[1])), 0, 1), bytes=True)
        shown = (255 * imread(io.BytesIO(base64.b64decode(picture[1])))).round().astype(np.uint8)
        assert sorted(map(tuple, shown[shown[..., 3] > 0])) == sorted(map(tuple, wanted))  # a better A7 is blue


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("cases",), 1),
        (("jobs",), 10),
        (("jobs",), []),
        (("jobs", 0), []),
        (("jobs", 0, "folder"), 5),
        (("jobs", 0, "folder"), "../jobs"),
        (("jobs", 0, "folder"), "/etc"),
        (("study", "data"), 0),
        (("hours",), "soon"),
        (("cases",), {}),
        ((), []),
    ],
)
def test_notes_of_a_study_that_somebody_changed_are_refused_in_one_sentence(
    finished: tuple[Path, Path, Done], tmp_path: Path, place: tuple[Any, ...], value: object
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished[1], copy, ignore=shutil.ignore_patterns("cache", "jobs", "cases"))
    content = {"all": read_json(copy / "study.json")}
    part: Any = content
    *way, last = ("all", *place)
    for step in way:
        part = part[step]
    part[last] = value
    write_json(copy / "study.json", content["all"])
    with pytest.raises(RunError, match=r"study\.json"):
        report(copy)


def marked(page: str) -> set[str]:
    """Return the metrics with a best mean in the table of a study's scores."""
    table = page[page.index('id="scores"') : page.index('id="tests"')]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in table.split("<tr>") if "<b>" in row]
    return {row[1].partition(" <")[0] for row in rows}


@pytest.mark.slow
def test_a_case_that_no_job_scored_is_named_on_the_page(finished: tuple[Path, Path, Done], tmp_path: Path) -> None:
    _, out, done = finished
    copy = tmp_path / "copy"
    shutil.copytree(out, copy, ignore=shutil.ignore_patterns("cache", "checkpoints", "report.html"))
    notes = read_json(copy / "study.json")
    notes["study"]["only_folds"] = None  # as if all folds had run: what is then without a figure was left out
    lost = sorted(set(notes["cases"]) - {row.case for row in done.rows})
    first = notes["study"]["arms"][:2]
    of_arms = {"arm": first[1], "against": first[0]}
    metrics = {"contrast_kept": "WT", "bias": "mask"}  # of the latter none is better: earlier versions took it
    notes["study"]["primary"] = [{**of_arms, "metric": metric, "region": metrics[metric]} for metric in metrics]
    notes["study"]["variants"] = {"few": ["A1", "split.training_subjects=1"]}
    notes["study"]["arms"].append("few")
    write_json(copy / "study.json", notes)
    page = report(copy).read_text()
    assert {"MAE ↓", "PSNR ↑", "SSIM ↑"} <= marked(done.report.read_text()) - marked(page) and marked(page)
    assert "arms learn from different subjects" in page and "arms learn from" not in done.report.read_text()
    assert f"declared, and not compared: contrast_kept in WT, {first[1]} against {first[0]}" in page
    assert "declared, and not compared: bias in mask" in page and "neither more nor less of it is better" in page
    assert lost and f"left out, for reasons that chiasm inspect shows: {', '.join(lost)}" in page
    assert "left out, as" not in done.report.read_text()
    assert write_study_report(copy).left_out == tuple(lost)


def test_the_command_names_cases_that_a_study_left_out_and_ends_with_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Done((), (), (), tmp_path / "report.html", ("Case_7", "Case_9"))
    for done, code in ((found, 3), (replace(found, left_out=()), 0)):
        monkeypatch.setattr("chiasm.studies.study.run_study", lambda *_, made=done, **__: made)
        with pytest.raises(SystemExit) as ended:
            main(["study", str(tmp_path / "study.toml"), "-o", str(tmp_path / "out")])
        assert ended.value.code == code
        assert ("left out, for reasons that chiasm inspect shows: Case_7, Case_9" in capsys.readouterr().err) == (
            code == 3
        )


def test_the_page_in_a_browser_sorts_leads_to_its_cases_and_needs_no_network(
    finished: tuple[Path, Path, Done], open_page: Callable[..., Opened]
) -> None:
    opened = open_page(finished[2].report)
    page, sorted_columns = opened.page, 0
    for table in page.locator("table.sortable").all():
        for column, head in enumerate(table.locator("thead th").all()):
            values = table.locator(f"tbody tr td:nth-child({column + 1}), tbody tr th:nth-child({column + 1})")
            if "number" not in (head.get_attribute("class") or "").split():
                continue
            for way in (1, -1):
                head.locator("button").click()
                shown = [float(cell) for cell in values.evaluate_all("all => all.map(cell => cell.dataset.value)")]
                known = [value for value in shown if math.isfinite(value)]
                assert known == sorted(known, reverse=way < 0) and shown[: len(known)] == known
            sorted_columns += 1
    assert sorted_columns > 10
    names = page.locator('ul a[href^="cases/"]').all_inner_texts()
    assert len(names) == len({row.case for row in finished[2].rows})
    for figure in page.locator("figure.plot svg").all():
        box = figure.bounding_box()
        assert box["width"] > 200 and box["height"] > 100 and figure.get_attribute("aria-label")
    assert [url for url in opened.requests if not url.startswith("data:")] == [finished[2].report.as_uri()]
    page.locator('a[href^="cases/"]').first.click()
    page.wait_for_url("**/cases/*.html")
    assert names[0] in page.title() and opened.errors == []


def test_done_jobs_are_recognised_and_nothing_is_trained_again(finished: tuple[Path, Path, Done]) -> None:
    path, out, done = finished
    before = {file: file.stat().st_mtime_ns for file in out.glob("jobs/*/model/weights.safetensors")}
    again = study(path, out)
    assert again.rows == done.rows
    assert {file: file.stat().st_mtime_ns for file in out.glob("jobs/*/model/weights.safetensors")} == before
    assert describe_jobs(path, out)[-1].startswith("9 jobs, 9 done, 0 steps to do")


def test_arms_branch_from_one_warm_up_and_do_not_repeat_it(finished: tuple[Path, Path, Done]) -> None:
    path, out, _ = finished
    lines = describe_jobs(path, out)
    assert sum("warm-up (generator)" in line for line in lines) == 2
    assert sum("warm-up (discriminators)" in line for line in lines) == 2  # only A7 has any
    assert len(list(out.glob("jobs/*"))) == 9 and len(list(out.glob("jobs/*/model"))) == 4


@pytest.mark.parametrize("runner", ["processes", pytest.param("slurm", marks=pytest.mark.long)])  # ray: test_runners.py
def test_every_runner_gives_the_same_numbers(
    runner: str,
    finished: tuple[Path, Path, Done],
    toy_cohort: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = "submitit" if runner == "slurm" else "numpy"
    pytest.importorskip(package, reason=f"the runner {runner} needs {package}")
    submitted = fake_slurm.install(tmp_path / "cluster", monkeypatch) if runner == "slurm" else None
    asked = {"slurm": {"gpus_per_node": 2, "mem_gb": 8}, "threads": 1}
    path = study_file(tmp_path, toy_cohort, arms=["A1"], warmup="own", primary=None, **asked)
    other = study(path, tmp_path / "out", runner=runner)
    for script in submitted.glob("*.sh") if submitted else ():
        assert all(f"--{line}\n" in script.read_text() for line in ("gpus-per-node=2", "mem=8GB", "cpus-per-task=1"))
    assert not other.failed
    assert sorted(map(repr, other.rows)) == sorted(repr(row) for row in finished[2].rows if row.method != "A7")


def test_a_warm_up_of_its_own_equals_the_shared_one_for_the_same_loss(
    finished: tuple[Path, Path, Done], toy_cohort: Path, tmp_path: Path
) -> None:
    own = study(study_file(tmp_path, toy_cohort, warmup="own"), tmp_path / "out")
    assert sorted(map(repr, own.rows)) == sorted(map(repr, finished[2].rows))


def test_a_job_that_fails_is_named_and_the_others_are_done(toy_cohort: Path, tmp_path: Path) -> None:
    wild = ["A4", "loss.penalty=1e6", "optimiser.discriminator_rate=1e6"]  # the critic leaves float32
    changes = {"arms": ["A1", "wild"], "seeds": [0], "primary": None, "variants": {"wild": wild}}
    path = study_file(tmp_path, toy_cohort, **changes)
    done = study(path, tmp_path / "out")
    assert [outcome.name for outcome in done.failed] == ["wild fold 0 seed 0"]
    assert {row.method for row in done.rows} >= {"A1", "lookup"}
    assert "wild fold 0 seed 0" in done.report.read_text()


def losing(name: str, times: int) -> Runner:
    """A runner that loses the worker of one job, and tries the job again as the others do."""

    def run(jobs: Sequence[Any], work: Callable[[Any], Any], folder: Path) -> Iterator[Any]:
        for job in jobs:
            gone = job.name == name
            if gone:
                yield Lost(job, "its process was killed by signal 9 (SIGKILL)", again=True)
            yield Lost(job, "its process was killed by signal 9 (SIGKILL)") if gone and times == 2 else work(job)

    return run


@pytest.mark.parametrize("times", [1, 2])
def test_a_job_whose_worker_is_lost_twice_is_named_and_the_others_are_done(
    times: int, toy_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(RUNNERS, "processes", losing("A1 fold 0 seed 1", times))
    path = study_file(tmp_path, toy_cohort, arms=["A1"], warmup="own", steps=2, primary=None)
    with pytest.raises(SystemExit) as ended:
        main(["study", str(path), "-o", str(tmp_path / "out"), "--runner", "processes"])
    told, page = capsys.readouterr().out, (tmp_path / "out" / "report.html").read_text()
    assert "lost: A1 fold 0 seed 1: its worker was lost: its process was killed by signal 9 (SIGKILL)" in told
    assert "it is tried once more" in told
    assert ended.value.code == (3 if times == 2 else 0)
    missing = "failed: A1 fold 0 seed 1: its worker was lost twice: its process was killed by signal 9 (SIGKILL)"
    assert (missing in told) == (missing in page) == (times == 2)
    assert {row.seed for row in read_evaluation(tmp_path / "out")} == ({0} if times == 2 else {0, 1})
    assert ".." not in told.replace("...", "")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "memory ran out. A smaller size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"), "memory ran out."),
        (OSError(28, "No space left on device", "log.jsonl"), "log.jsonl: No space left on device."),
    ],
)
def test_a_machine_that_is_too_small_costs_the_job_and_a_mistake_in_the_code_ends_the_study(
    error: Exception, told: str, toy_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("chiasm.studies.work.train", fail)
    path = study_file(tmp_path, toy_cohort, arms=["A1"], warmup="own", primary=None)
    with pytest.raises(ChiasmError, match="no job of the study could be finished") as caught:
        study(path, tmp_path / "out")
    assert told in str(caught.value) and not str(caught.value).endswith("..")
    error = RuntimeError("expected 4 channels")
    with pytest.raises(RuntimeError, match="expected 4 channels"):
        study(path, tmp_path / "out")


def test_a_study_for_slurm_is_refused_at_once_where_there_is_none(
    toy_cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    path = study_file(tmp_path, toy_cohort)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main(["study", str(path), "-o", str(tmp_path / "out"), "--runner", "slurm"])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "no SLURM on this machine" in told and "--runner processes" in told
    assert not (tmp_path / "out").exists()


def test_the_warm_ups_of_an_arm_learn_from_its_training_cases_alone() -> None:
    few = make_recipe("A7", "tiny", {"split.training_subjects": 2, "split.validation": 0.5})
    shared = [recipe for _, recipe in warm_ups(few, make_recipe("A1", "tiny"))]
    assert [recipe.split for recipe in shared] == [few.split] * 2


def test_arms_that_learn_from_different_subjects_are_compared_only_if_it_was_declared() -> None:
    few = ["split.training_subjects=2"]
    content = {
        "data": "DATA",
        "source": ["t1"],
        "target": "t2",
        "size": "tiny",
        "arms": ["A1", "A7", "A1 few", "A7 few"],
    }
    content |= {"variants": {"A1 few": ["A1", *few], "A7 few": ["A7", *few]}}
    declared = [("A7", "A1", "mae"), ("A7 few", "A1 few", "mae"), ("A1 few", "A1", "mae_own")]
    content["primary"] = [{"arm": arm, "against": other, "metric": metric} for arm, other, metric in declared]
    planned = Study.model_validate(content)
    rows = [
        Row(case, 0, 0, arm, "mask", metric, place + len(arm), "SD", "chiasm")
        for arm in planned.arms
        for metric in ("mae", "mae_own")
        for place, case in enumerate("abcdef")
    ]
    found = compare_arms(planned, rows, [], {case: case for case in "abcdef"})
    pairs = {metric: {(one.arm, one.against) for one in found if one.metric == metric} for metric in ("mae", "mae_own")}
    assert pairs["mae"] == {("A7", "A1"), ("A7 few", "A1 few")}
    assert pairs["mae_own"] == pairs["mae"] | {("A1 few", "A1")}
    assert [one.metric for one in found if one.primary] == ["mae", "mae", "mae_own"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"slurm": {"gpus_per_node": -1}}, "slurm.gpus_per_node"),
        ({"slurm": {"gpus": 1}}, "slurm.gpus"),
        ({"slurm": {"timeout_min": 0}}, "slurm.timeout_min"),
        ({"ray": {"num_gpus": "all"}}, "ray.num_gpus"),
        ({"arms": ["A1", "A99"], "primary": None}, "A99"),
        ({"arms": ["A1", "A1"]}, "twice"),
        ({"folds": 40}, "fewer subjects"),
        ({"primary": {"arm": "A7", "against": "A0", "metric": "mae", "region": "mask"}}, "A0"),
        ({"primary": {"arm": "A7", "against": "A1", "metric": "mae", "region": "ET2"}}, "ET2"),
        ({"size": "huge"}, "tiny"),
        ({"seeds": []}, "seeds"),
        ({"source": None}, "source"),
        ({"colour": "red"}, "colour"),
        ({"data": "nowhere"}, "nowhere"),
        ({"data": None}, "either data"),
        ({"phantom": {"subjects": 8}}, "either data"),
        ({"only_folds": [3]}, "no fold 3"),
        ({"folds": "site"}, "have no site"),
        ({"target": "pet"}, "pet"),
        ({"variants": {"sharp": ["A7", "attention.beta=3"]}}, "'sharp' is none of the arms"),
        ({"arms": ["A1", "A7", "sharp"], "variants": {"sharp": ["A99"]}}, "A99"),
        ({"arms": ["A1", "A7", "sharp"], "variants": {"sharp": ["A7", "attention.gamma=3"]}}, "gamma"),
        ({"arms": ["A1", "A7", "sharp"], "variants": {"sharp": []}}, "variants.sharp"),
        ({"arms": ["A1", "A7", "other"], "variants": {"other": ["A7", "split.seed=1"]}}, "tested on the same subjects"),
        ({"arms": ["A1", "few"], "variants": {"few": ["A1", "split.training_subjects=1"]}, "primary": FEW}, "mae_own"),
        ({"primary": {"arm": "A7", "against": "A1", "metric": "maee"}}, "'maee'"),
        ({"primary": {"arm": "A7", "against": "A1", "metric": "sharpness"}}, "'sharpness'"),
        ({"variants": {"A7": ["A1"]}}, "'A7' has the name of another arm"),
        ({"arms": ["A1", "A7", "lookup"], "variants": {"lookup": ["A1"]}}, "'lookup' has the name of"),
        ({"target": "t1"}, "also a source"),
        ({"target": "t1", "set": [*SETTINGS, *THIN], "expected_error": "A7"}, "super-resolution yet"),
    ],
)
def test_an_impossible_study_is_refused_before_anything_runs(
    changes: dict[str, object], told: str, toy_cohort: Path, tmp_path: Path
) -> None:
    path = study_file(tmp_path, toy_cohort, **changes)
    with pytest.raises(ChiasmError, match=told):
        study(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folds_by_site_test_one_site_each_and_sealed_cases_wait_until_they_are_opened(tmp_path: Path) -> None:
    changes = {"folds": "site", "only_folds": None, "seeds": [0], "locked": 0.3, "arms": ["A1"], "primary": None}
    path = study_file(tmp_path, with_sites(tmp_path, 8), **changes)
    out = tmp_path / "out"
    done = study(path, out)
    where = roles(out)
    locked = where["locked of 0"]
    assert locked == where["locked of 1"] and len(locked) == 2
    assert where["test of 0"].isdisjoint(where["test of 1"]) and len(where["test of 0"] | where["test of 1"]) == 6
    assert {row.case for row in done.rows} == where["test of 0"] | where["test of 1"]
    weights = {file: file.stat().st_mtime_ns for file in out.glob("jobs/*/model/weights.safetensors")}
    opened = study(path, out, open_locked=True)
    assert {row.case for row in opened.rows} == locked and {row.fold for row in opened.rows} == {0, 1}
    assert opened.report == out / "locked" / "report.html" and (out / "locked" / "evaluation.csv").exists()
    assert weights == {file: file.stat().st_mtime_ns for file in out.glob("jobs/*/model/weights.safetensors")}
    page, notes = opened.report.read_text(), out / "locked" / "study.json"
    assert "Locked test set, t1 to t2" in page and "2 subjects were kept apart from all folds" in page
    today = json.loads(notes.read_text())["opened"]
    assert f"2 locked cases, on {today[0]}" in page and "only the first was untouched" not in page
    noted = sorted(out.glob("jobs/*/locked/opened.json"))
    for file in noted:
        file.write_text('["2026-01-31"]')
    shutil.rmtree(notes.parent)  # as if it had been killed before the scores were gathered
    said: list[str] = []
    again = run_study(path, out, open_locked=True, say=said.append)
    assert any("was scored before, on 2026-01-31" in line for line in said)
    assert "locked cases, on 2026-01-31<" in again.report.read_text()  # nothing was scored anew
    next(out.glob("jobs/*/locked/evaluation.csv")).unlink()
    again = study(path, out, open_locked=True)
    assert f"on 2026-01-31 and {today[0]}: only the first was untouched" in again.report.read_text()
    notes.write_text("damaged")
    assert f"on 2026-01-31 and {today[0]}: only" in study(path, out, open_locked=True).report.read_text()
    for file in (*noted, notes):  # a study of before noted none
        file.write_text("damaged")
    for _ in range(2):  # and it stays noted
        assert "on a day that was not noted<" in study(path, out, open_locked=True).report.read_text()
    with pytest.raises(ChiasmError, match="has no locked test set"):
        study(study_file(tmp_path, tmp_path / "data"), out, open_locked=True)


def test_a_simulated_cohort_is_written_into_the_study_and_its_jobs_are_known_before(tmp_path: Path) -> None:
    preset = {"subjects": 3, "seed": 5, "spacing_mm": 4.0}
    changes = {"data": None, "phantom": preset, "arms": ["A1"], "seeds": [0], "primary": None, "steps": 2}
    path = study_file(tmp_path, Path(), **changes)
    before = describe_jobs(path, tmp_path / "out")
    assert not (tmp_path / "out").exists() and before[-1].startswith("2 jobs, 0 done")
    done = study(path, tmp_path / "out")
    assert not done.failed and len(list((tmp_path / "out" / "cohort").glob("PHANTOM_*"))) == 3
    page = done.report.read_text()
    assert "No weight F is shown, since A1 has no attention." in page and "minus error of" not in page  # of one arm
    after = describe_jobs(path, tmp_path / "out")[:-1]
    assert [line.split()[2] for line in after] == [l.split()[3] for l in before[:-1]]


def test_arms_with_the_same_discriminators_share_their_warm_up_and_others_have_their_own(
    tmp_path: Path, toy_cohort: Path
) -> None:
    path = study_file(tmp_path, toy_cohort, arms=["A0", "A3", "A6", "A6b", "A7", "A8", "C4"], seeds=[0], primary=None)
    lines = describe_jobs(path, tmp_path / "out")
    assert sum("warm-up (generator)" in line for line in lines) == 1
    assert sum("warm-up (discriminators)" in line for line in lines) == 2  # A3 has the global one alone


def test_a_phase_without_steps_is_no_warm_up(toy_cohort: Path, tmp_path: Path) -> None:
    path = study_file(tmp_path, toy_cohort, steps=4, arms=["A7"], seeds=[0], primary=None)
    lines = describe_jobs(path, tmp_path / "out")
    assert sum("warm-up" in line for line in lines) == 1  # 2 of 4 steps are of the generator alone
    assert not study(path, tmp_path / "out").failed


def test_a_variant_is_an_arm_with_settings_of_its_own_and_arms_answer_to_their_aliases(
    tmp_path: Path, toy_cohort: Path
) -> None:
    primary = {"arm": "sharp", "against": "dual-attention", "metric": "mae", "region": "mask"}
    changes = {"arms": ["l2", "dual-attention", "sharp"], "variants": {"sharp": ["A7", "attention.beta=3"]}}
    path = study_file(tmp_path, toy_cohort, **changes, seeds=[0], primary=primary)
    done = study(path, tmp_path / "out")
    assert {row.method for row in done.rows} >= {"A1", "A7", "sharp"}
    assert [(one.arm, one.against) for one in done.comparisons if one.primary] == [("sharp", "A7")]
    recipes = [read_toml(file) for file in (tmp_path / "out").glob("jobs/*/recipe.toml")]
    betas = {recipe["method"]: recipe["attention"]["beta"] for recipe in recipes}
    assert betas["A7"] == 1 and betas["sharp"] == 3 and len(recipes) == 5  # both warm-ups are shared
    assert "dual-attention with attention.beta=3" in done.report.read_text()


def test_a_variant_of_the_optimiser_or_schedule_has_a_beginning_of_its_own(tmp_path: Path, toy_cohort: Path) -> None:
    variants = {"slow": ["A7", "optimiser.generator_rate=1e-5"], "long": ["A7", "schedule.discriminators_alone=0.3"]}
    path = study_file(tmp_path, toy_cohort, arms=["A7", "slow", "long"], variants=variants, seeds=[0], primary=None)
    lines = describe_jobs(path, tmp_path / "out")
    assert sum("warm-up (generator)" in line for line in lines) == 3
    assert sum("warm-up (discriminators)" in line for line in lines) == 3


def test_a_setting_that_shapes_only_other_networks_makes_no_new_job(tmp_path: Path, toy_cohort: Path) -> None:
    def keys(**changes: object) -> list[str]:
        (tmp_path / "study.toml").unlink(missing_ok=True)
        arms = [line.split()[2] for line in describe_jobs(study_file(tmp_path, toy_cohort, **changes), tmp_path)[:-1]]
        return [key for key in arms if re.fullmatch("[0-9a-f]{16}", key)]

    scaled = [*SETTINGS, "generator.scale=0.5", "discriminators.scale=0.5"]
    assert keys() and keys() == keys(set=scaled)
    literature = {"arms": ["unet", "pix2pix"], "primary": []}
    assert not set(keys(**literature)) & set(keys(**literature, set=scaled))


def test_super_resolution_of_one_modality_is_a_study_like_others(tmp_path: Path, toy_cohort: Path) -> None:
    told = describe_jobs(study_file(tmp_path, toy_cohort, target="t1", set=[*SETTINGS, *THIN]), tmp_path)
    other = describe_jobs(study_file(tmp_path, toy_cohort), tmp_path)
    assert len(told) == len(other) > 4 and told != other


def test_an_unknown_setting_of_a_study_lists_the_known_ones(tmp_path: Path, toy_cohort: Path) -> None:
    with pytest.raises(RecipeError, match=r"no setting slurm\.acount; known are .*partition, account, qos, options"):
        read_study(study_file(tmp_path, toy_cohort, slurm={"acount": "lab"}))


def test_unknown_runners_list_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="serial, processes, ray, slurm"):
        find_runner("fog")
    assert find_runner("serial") is RUNNERS["serial"]


def test_a_change_of_the_data_makes_new_jobs(tmp_path: Path) -> None:
    data = write_brats(tmp_path / "data", 3)
    path = study_file(tmp_path, data, seeds=0, source="t1")  # as lists of one
    before = describe_jobs(path, tmp_path / "out")
    file = data / "Toy_0001" / "Toy_0001_t1.nii.gz"
    file.write_bytes(file.read_bytes() + b"\0")
    after = describe_jobs(path, tmp_path / "out")
    assert {line.split()[2] for line in before[:-1]}.isdisjoint({line.split()[2] for line in after[:-1]})
    assert read_study(path).data == data and read_study(path).sources == ("t1",)


def moved_study(folder: Path, heads: Path, **changes: object) -> Path:
    given: dict[str, object] = {
        "arms": ["A1", "A1 rigid"], "variants": {"A1 rigid": ["A1", "data.registration=rigid"]},
        "seeds": [0], "folds": 2, "warmup": "own", "primary": None, "reference": str(heads.parent / "truth"),
    }  # fmt: skip
    return study_file(folder, heads, **(given | changes))


def test_arms_that_register_differently_are_scored_against_the_same_truth(tmp_path: Path) -> None:
    heads = write_moved_heads(tmp_path / "heads", 4)
    path = moved_study(tmp_path, heads)
    done = study(path, tmp_path / "out")
    assert not done.failed
    found = sorted(path.name for path in (tmp_path / "out" / "cache" / "registered-rigid").iterdir() if path.is_dir())
    assert found == [f"Toy_{number:04d}" for number in range(1, 5)]
    assert not list((tmp_path / "out").rglob("predictions/registered"))
    assert "which were never registered" in done.report.read_text()
    for job in (tmp_path / "out" / "jobs").iterdir():  # by hand against the truth: the same figures
        rows, problems, _ = score_folder(job / "predictions", heads.parent / "truth", register="none", naive=False)
        told, by_hand = (
            {row.case: row.value for row in some if (row.method, row.region, row.metric) == (arm, "mask", "mae")}
            for some, arm in ((done.rows, rows[0].method), (rows, rows[0].method))
        )
        assert told == by_hand and len(told) == 2 and not problems
    names = {row.method for row in done.rows}
    assert names >= {"A1", "A1 rigid", "identity"}
    asked = {job.key for job in list_jobs(read_study(path), tmp_path, find_cases(read_study(path), tmp_path))}
    bare = read_study(moved_study(tmp_path, heads, reference=None, arms=["A1"], variants={}))
    assert not asked & {job.key for job in list_jobs(bare, tmp_path, find_cases(bare, tmp_path))}


def test_arms_that_register_differently_need_a_reference(tmp_path: Path) -> None:
    heads = write_moved_heads(tmp_path / "heads", 2)
    with pytest.raises(RecipeError, match=r"A1: none, A1 rigid: rigid.*reference"):
        describe_jobs(moved_study(tmp_path, heads, reference=None), tmp_path / "out")
    with pytest.raises(RecipeError, match="only for simulated patients who moved"):
        read_study(moved_study(tmp_path, heads, reference="held"))
    with pytest.raises(RecipeError, match="leave out reference, or expected_error"):
        read_study(moved_study(tmp_path, heads, expected_error="A1"))


def test_simulated_patients_who_moved_are_known_as_if_they_had_not(tmp_path: Path) -> None:
    asked = Phantom(subjects=2, seed=5, spacing_mm=4.0, misregistration_mm=4.0, movement="rigid")
    simulate(asked, tmp_path / "cohort")
    simulate(asked, tmp_path / "unmoved", movement="held")
    for contrast, alike in (("t1", True), ("mask", True), ("seg", True), ("t2", False)):
        one, other = (
            read_volume(
                tmp_path / name / "PHANTOM_0001" / f"PHANTOM_0001_{contrast}.nii.gz", labels=contrast in ("mask", "seg")
            ).array
            for name in ("cohort", "unmoved")
        )
        assert np.array_equal(one, other) == alike, contrast


def test_jobs_of_studies_without_the_new_fields_keep_their_keys(toy_cohort: Path, tmp_path: Path) -> None:
    before = Study(phantom=Phantom(subjects=4), source=("t1",), target="t2", arms=("A1",), folds=2)
    stated = before.model_copy(update={"phantom": Phantom(subjects=4, movement="elastic")})
    moved = before.model_copy(update={"phantom": Phantom(subjects=4, movement="rigid")})
    keys = [[job.key for job in list_jobs(one, tmp_path, None)] for one in (before, stated, moved)]
    assert keys[0] == keys[1] and not set(keys[0]) & set(keys[2])
    assert content_of(before, None) == '{"subjects":4,"seed":0,"difficulty":"standard","spacing_mm":2.0}'


@pytest.mark.parametrize("name", ["rigid", "elastic", "none"])
def test_the_study_of_misregistration_can_be_run(name: str, tmp_path: Path) -> None:
    lines = describe_jobs(Path(__file__).parents[1] / "studies" / f"misregistration_{name}.toml", tmp_path)
    assert len(lines) == {"rigid": 10, "elastic": 10, "none": 4}[name]
