"""Names and settings of strangers: what no file, table, page or machine can hold is refused in one sentence."""

from __future__ import annotations

import csv
import json
import resource
import shutil
from pathlib import Path

import pytest

from chiasm.cli import main
from chiasm.cohorts.discovery import find_cohort
from chiasm.names import is_plain, is_safe_id
from chiasm.training import cost
from conftest import QUICK
from synthetic_cohort import write_brats

UNSAFE = ["=cmd", "+x", "-x", "@x", "<script>", "a>b", "x" * 240, "ｘ" * 100, "＝cmd", "‮abc", ".hidden", " ", "a\nb"]
SETTINGS = [
    f"{name}={list(value) if isinstance(value, tuple) else value}"
    for name, value in QUICK.items()
    if name not in ("data.sources", "data.target")
]


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    """Run a command in this process: exit code and what it printed."""
    with pytest.raises(SystemExit) as done:
        main(list(map(str, words)))
    printed = capsys.readouterr()
    return int(done.value.code or 0), printed.out + printed.err


@pytest.mark.parametrize("name", UNSAFE)
def test_a_name_that_some_file_table_or_page_cannot_hold_is_unsafe(name: str) -> None:
    assert not is_safe_id(name)


@pytest.mark.parametrize(
    "name", ["Toy_0001", "sub-1_ses-2", "patient 07", "R&D", "O'Brien", "Müller.2", "病人一", "x" * 190]
)
def test_usual_names_are_safe(name: str) -> None:
    assert is_safe_id(name) and is_plain(name)


@pytest.mark.parametrize("name", ["=cmd|calc", "<script>alert(1)<script>", "@SUM(A1)", "y" * 240])
def test_a_case_with_an_unsafe_name_is_left_out_by_name_and_the_others_go_on(
    name: str, toy_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    for source in ("Toy_0001", "Toy_0002"):
        shutil.copytree(toy_cohort / source, tmp_path / "data" / source)
    (tmp_path / "data" / name).mkdir()
    for kind in ("t1", "t2"):
        shutil.copy(toy_cohort / "Toy_0003" / f"Toy_0003_{kind}.nii.gz", tmp_path / "data" / name / f"{kind}.nii.gz")
    (tmp_path / "data" / "manifest.csv").write_text(
        "subject,t1,t2\n"
        + "".join(f"{case},{case}/{case}_t1.nii.gz,{case}/{case}_t2.nii.gz\n" for case in ("Toy_0001", "Toy_0002"))
        + f'"{name}",{name}/t1.nii.gz,{name}/t2.nii.gz\n'
    )
    cohort = find_cohort(tmp_path / "data")
    assert [case.id for case in cohort.cases] == ["Toy_0001", "Toy_0002"]
    assert [(problem.reason, problem.case) for problem in cohort.problems] == [("unsafe-id", name)]
    code, told = run(capsys, "inspect", tmp_path / "data")
    assert code == 3 and "manifest.csv" in told and name[:40] in told and "2 cases" in told


def test_sites_and_subjects_of_cohort_json_are_checked_too(tmp_path: Path) -> None:
    data = write_brats(tmp_path / "data", 3)
    sites = {"Toy_0001": "=HYPERLINK(1)", "Toy_0002": "GE / 1.5T", "Toy_0003": "-"}
    notes = {"cases": {case: {"site": site} for case, site in sites.items()}}
    (data / "cohort.json").write_text(json.dumps(notes))
    cohort = find_cohort(data)
    assert [(case.id, case.site) for case in cohort.cases] == [("Toy_0002", "GE / 1.5T"), ("Toy_0003", "-")]
    assert "case 'Toy_0001': its site '=HYPERLINK(1)' cannot be used" in cohort.problems[-1].message


def test_predict_names_the_inputs_whose_names_it_cannot_use(
    finished_run: Path, toy_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = next(toy_cohort.rglob("*_t1.nii.gz"))
    names = ["good.nii.gz", "=cmd.nii.gz", f"{'z' * 235}.nii.gz"]
    inputs = [Path(shutil.copy(scan, tmp_path / name)) for name in names]
    code, told = run(capsys, "predict", finished_run, *inputs, "-o", tmp_path / "out")
    assert code == 3 and told.count("left out: ") == 2 and "'=cmd'" in told
    assert {path.name for path in (tmp_path / "out").glob("*_t2.nii.gz")} == {"good_t2.nii.gz"}


@pytest.mark.parametrize(
    "setting",
    [
        "data.spacing_mm=0.0001",
        "data.spacing_mm=1e-300",
        "data.spacing_mm=nan",
        "data.spacing_mm=1e300",
        "data.window_hu=[-inf, inf]",
        "data.window_hu=[nan, 100.0]",
        "data.window_hu=[-1e300, 1e300]",
        "loss.global_weight=inf",
        "loss.clip=1e-300",
        "attention.magnitude_mm=1e-12",
        "optimiser.betas=[1.0, 0.9]",
        "optimiser.generator_rate=nan",
        "split.seed=-1",
        "split.folds=1000000000000",
        "training.devices=100000",
        "training.batch=1e400",
        "training.seed=" + "9" * 5000,
        "training.seed=0x" + "f" * 5000,
        "generator.options={depth=1000000000}",
        "generator.options={depth=inf}",
        "generator.refiner=[8, 8, 8, 8, 8, 8, 8, 8, 8]",
        "data.sources=" + "[" * 5000,
        "data=5",
        'data.target="../../etc/t2"',
        'data.target="=t2"',
        'data.sources=["t1", "<b>"]',
        'method="../A7"',
    ],
)
def test_an_impossible_setting_ends_in_one_sentence(
    setting: str, toy_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--source", "t1", "--target", "t2", "-o", tmp_path / "run", "--size", "tiny", "--set", *SETTINGS, setting]
    code, told = run(capsys, "plan", toy_cohort, *asked)
    assert code == 2 and told.startswith("chiasm: ") and told.count("\n") == 1 and len(told) < 700
    assert not (tmp_path / "run" / "plan.toml").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["generator.widths=[4096,4096,4096,4096,4096]"], "GB needed"),
        (["training.batch=4096", "generator.widths=[2048,2048,2048]"], "GB needed"),
        (["data.patch=1024", "data.dims=3d"], "data.patch is too large"),
        (["data.spacing_mm=0.002"], "too fine for these images"),
    ],
)
def test_a_training_that_no_machine_can_hold_is_refused_by_plan(
    settings: list[str],
    told: str,
    toy_cohort: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cost, "machine_mb", lambda _: 16 * 1024.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    asked: list[str | Path] = [
        "--source",
        "t1",
        "--target",
        "t2",
        "-o",
        tmp_path / "run",
        "--size",
        "tiny",
        "--set",
        *SETTINGS,
        *settings,
    ]
    code, printed = run(capsys, "plan", toy_cohort, *asked)
    last = printed.splitlines()[-1]
    assert code == 2 and last.startswith("chiasm: ") and told in last, printed
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


def test_more_processes_than_cores_are_refused(
    toy_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--source", "t1", "--target", "t2", "-o", tmp_path / "run", "--accelerator", "cpu", "--devices", "1000"]
    code, printed = run(capsys, "train", toy_cohort, *asked)
    assert code == 2 and printed.count("\n") == 1 and "fewer devices" in printed


def test_a_page_and_a_table_hold_no_markup_and_no_formula_of_a_strangers_files(
    finished_run: Path, toy_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, scored, mark = tmp_path / "made", tmp_path / "scored", "<img src=x onerror=alert(1)>"
    run(capsys, "predict", finished_run, toy_cohort, "-o", made, "--only", "test")
    manifest = json.loads((made / "predictions.json").read_text())
    for entry in manifest["cases"]:
        entry["warnings"] = [f"see {mark}"]
    (made / "predictions.json").write_text(json.dumps(manifest))
    code, told = run(capsys, "evaluate", made, toy_cohort, "-o", scored)
    assert code == 0, told
    asked = json.loads((scored / "asked.json").read_text())
    (scored / "asked.json").write_text(json.dumps({**asked, "problems": [f"case {mark}", "=cmd"]}))
    assert run(capsys, "report", scored)[0] == 0
    pages = [path.read_text() for path in scored.rglob("*.html")]
    assert len(pages) > 1 and not any("<img src=x" in page for page in pages)
    assert any("&lt;img src=x" in page for page in pages)
    for table in scored.rglob("*.csv"):
        for row in csv.reader(table.read_text().splitlines()):
            assert not [cell for cell in row if cell[:1] in "=+@" and cell]


@pytest.mark.parametrize("name", ["=cmd", "<script>x", "../../x"])
@pytest.mark.parametrize("field", ["method", "target", "unit"])
def test_a_manifest_of_predictions_with_such_a_word_is_refused(
    field: str, name: str, finished_run: Path, toy_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if field == "unit" and name == "../../x":
        return  # no part of a file's name
    content = {"model": "m", "sha256": "0", "method": "A7", "seed": 0, "fold": 0, "sources": ["t1"], "target": "t2"}
    content |= {"unit": "a.u.", "cases": [], "failed": [], field: name}
    (tmp_path / "predictions.json").write_text(json.dumps(content))
    code, told = run(capsys, "evaluate", tmp_path, toy_cohort, "-o", tmp_path / "out")
    assert code == 2 and "predictions.json" in told and told.count("\n") == 1
