"""The page's REST API among clients: what it makes of scans, and what it says of those that it cannot use."""

from __future__ import annotations

import errno
import gc
import warnings
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from threading import Lock
from urllib.parse import urljoin

import nibabel as nib
import numpy as np
import pydicom
import pytest

from chiasm.methods import make_recipe
from chiasm.prediction.folders import Predictor, load, predict
from chiasm.serving.scans import WRITTEN, Handed, Synthesiser, synthesise_scan
from chiasm.serving.web_limits import Page
from chiasm.training.run import train
from conftest import QUICK, Sibling
from dicom_patients import TELLTALE
from synthetic_cohort import write_brats

pytest.importorskip("fastapi", reason="fastapi is not installed (pip install 'chiasm[serve]')")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (pip install 'chiasm[serve]')")

from web_client import UNKNOWN, Client, problem, served, write_archive, write_scan, zipped


@pytest.fixture(scope="module")
def predictor(finished_run: Path) -> Predictor:
    return load(finished_run)


@pytest.fixture(scope="module")
def client(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with served(predictor, tmp_path_factory.mktemp("served") / "jobs", Page(0)) as running:
        yield running


@pytest.fixture(scope="module")
def of_two_sources(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = tmp_path_factory.mktemp("two")
    cohort = write_brats(folder / "cohort", 6)
    for path in cohort.glob("*/*_t1.nii.gz"):
        image = nib.load(path)
        other = np.sqrt(image.get_fdata()).astype(np.float32) * 10
        nib.save(nib.Nifti1Image(other, image.affine), str(path).replace("_t1.", "_flair."))
    recipe = make_recipe("A7", "tiny", {**QUICK, "data.sources": ("t1", "flair")})
    train(cohort, recipe, folder / "run", say=lambda _: None)
    return load(folder / "run")


# --- what is made ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["none", "flip"])
def test_progress_grows_until_the_last_network_has_run(average: str, finished_run: Path, tmp_path: Path) -> None:
    shares: list[float] = []
    scan = write_scan(tmp_path)
    synthesise_scan(
        tmp_path / "job",
        lambda doing, share: shares.append(share) if doing == "predicting" else None,
        handed=Handed({"t1": scan}),
        using=Synthesiser(load(finished_run, average=average), Lock()),
    )
    assert shares == sorted(set(shares)), "it stood still although networks ran"
    assert shares[-1] == pytest.approx(WRITTEN)


def test_a_scan_gives_what_predict_writes(client: Client, finished_run: Path, tmp_path: Path) -> None:
    scan = write_scan(tmp_path)
    answer = client.hand_in({"t1": scan})
    job = client.finish(answer)
    assert urljoin("/path/api/jobs", answer.headers["location"]) == f"/path/api/jobs/{job['id']}"
    assert job["state"] == "done" and job["progress"] == 1
    predict(finished_run, [scan], tmp_path / "out")
    assert [file["name"] for file in job["files"]] == [
        f"scan_{name}.nii.gz" for name in ("t2", "expected-error", "mask")
    ]
    for file in job["files"]:
        fetched = client.ask("GET", file["address"])
        assert fetched.content == (tmp_path / "out" / file["name"]).read_bytes()
        assert fetched.headers["content-disposition"] == f'attachment; filename="{file["name"]}"'


def test_several_models_give_the_mean_and_the_spread_that_predict_writes(
    finished_run: Path, sibling: Sibling, tmp_path: Path
) -> None:
    scan, runs = write_scan(tmp_path), [finished_run, sibling("served")]
    predict(runs, [scan], tmp_path / "out")
    with served(load(runs), tmp_path / "jobs", Page(0)) as client:
        job = client.finish(client.hand_in({"t1": scan}))
        names = [f"scan_{name}.nii.gz" for name in ("t2", "expected-error", "spread", "mask")]
        assert [file["name"] for file in job["files"]] == names
        for file in job["files"]:
            made = tmp_path / "out" / file["name"]
            assert client.ask("GET", file["address"]).content == made.read_bytes()
        about = client.ask("GET", "/api/model").json()
        assert about["models"] == 2 and about["method"] == "mean-of-2-A7" and about["title"] == "dual-attention (A7)"
        assert "Mean of 2 models." in client.ask("GET", "/").text
        archive = client.finish(client.hand_in({"t1": write_archive(tmp_path / "scan.zip", {"a": {}})}))
        content = client.ask("GET", archive["files"][-1]["address"]).content
        assert "spread.dcm" in zipfile.ZipFile(BytesIO(content)).namelist()


@pytest.mark.parametrize("ending", [".nii", ".mha", ".nrrd", ".mgz"])
def test_other_formats_and_names_without_an_ending_are_read_too(ending: str, client: Client, tmp_path: Path) -> None:
    from chiasm.volumes import read_volume, write_volume

    volume = read_volume(write_scan(tmp_path))
    path = tmp_path / f"scan{ending}"
    write_volume(path, volume.array, volume.geometry)
    assert client.finish(client.hand_in({"t1": path}))["state"] == "done"
    assert client.finish(client.hand_in({"t1": ("scan", path.read_bytes())}))["state"] == "done"


def test_a_dicom_series_comes_back_as_nifti_and_as_dicom_of_the_same_study(client: Client, tmp_path: Path) -> None:
    job = client.finish(client.hand_in({"t1": write_archive(tmp_path / "scan.zip", {"a": {}})}))
    assert [file["name"] for file in job["files"]] == [
        "scan_t2.nii.gz",
        "scan_expected-error.nii.gz",
        "scan_mask.nii.gz",
        "dicom.zip",
    ]
    archive = zipfile.ZipFile(BytesIO(client.ask("GET", job["files"][-1]["address"]).content))
    names = archive.namelist()
    assert names == ["expected-error.dcm", *(f"synthetic/{number:04d}.dcm" for number in range(1, 13))]
    made = pydicom.dcmread(BytesIO(archive.read(names[1])))
    assert made.PatientID == TELLTALE["PatientID"] and made.SyntheticData == "YES"


def test_a_rule_chooses_among_several_series(client: Client, tmp_path: Path) -> None:
    says = {"a": {"SeriesDescription": "brain one"}, "b": {"SeriesDescription": "brain two"}}
    archive = write_archive(tmp_path / "scan.zip", says)
    refused = client.finish(client.hand_in({"t1": archive}))
    assert refused["state"] == "failed" and not refused["files"]
    error = refused["error"]
    assert error["reason"] == "several-series" and "t1=2" in error["hint"] and "brain" not in str(error)
    assert "1: MR, 12 images, 36x40x12" in error["message"] and "2: MR" in error["message"]
    for says, reason in (({"modality": "CT"}, "modality"), ({"PatientID": "another"}, "no-cases")):
        other = write_archive(tmp_path / f"{reason}.zip", {"a": says, **({} if reason == "modality" else {"b": {}})})
        assert client.finish(client.hand_in({"t1": other}))["error"]["reason"] == reason
    for rule in ("brain two", "t1=brain two"):
        assert client.finish(client.hand_in({"t1": archive}, (rule,)))["state"] == "done"
    assert problem(client.hand_in({"t1": archive}, ("t1=",)))["reason"] == "series"


def test_a_model_of_two_sources_takes_a_file_for_each_or_one_archive(of_two_sources: Predictor, tmp_path: Path) -> None:
    with served(of_two_sources, tmp_path / "jobs", Page(0)) as client:
        scans = {"t1": write_scan(tmp_path, 1, "a.nii.gz"), "flair": write_scan(tmp_path, 2, "b.nii.gz")}
        job = client.finish(client.hand_in(scans))
        assert job["state"] == "done"
        for query, shown in (("", "Source (t1)"), ("?source=flair", "Source (flair)")):
            assert shown in client.ask("GET", f"/api/jobs/{job['id']}/view{query}").text
        assert problem(client.ask("GET", f"/api/jobs/{job['id']}/view?source=pd"))["reason"] == "source"
        says = {"a": {"SeriesDescription": "T1 mprage"}, "b": {"SeriesDescription": "FLAIR space"}}
        archive = write_archive(tmp_path / "scans.zip", says)
        assert client.finish(client.hand_in({"dicom": archive}))["files"][-1]["name"] == "dicom.zip"
        lacking = problem(client.hand_in({"t1": scans["t1"]}))
        assert lacking["reason"] == "sources" and "t1, flair" in lacking["message"]
        twice = client.finish(client.hand_in({"t1": scans["t1"], "flair": scans["t1"]}))
        assert twice["error"]["reason"] == "same-image"
        other = client.finish(client.hand_in({"dicom": scans["t1"]}))
        assert other["error"]["reason"] == "no-dicom"


def test_the_panes_of_a_result_are_a_page_that_can_reach_nothing(client: Client, tmp_path: Path) -> None:
    job = client.finish(client.hand_in({"t1": write_scan(tmp_path)}))
    shown = client.ask("GET", f"/api/jobs/{job['id']}/view")
    assert shown.status_code == 200 and "data:image/png" in shown.text and "Against the cohort" not in shown.text
    policy = shown.headers["content-security-policy"]
    assert "sandbox allow-scripts" in policy and "default-src 'none'" in policy and "connect-src" not in policy


def test_the_model_describes_itself(client: Client) -> None:
    said = client.ask("GET", "/api/model").json()
    assert (said["sources"], said["target"], said["has_expected_error"]) == (["t1"], "t2", True)
    form = client.ask("GET", "/api/openapi.json").json()["paths"]["/api/jobs"]["post"]["requestBody"]
    assert set(form["content"]["multipart/form-data"]["schema"]["properties"]) == {"t1", "dicom", "series"}


def test_a_node_at_work_and_the_page_take_turns(predictor: Predictor, tmp_path: Path) -> None:
    turn = Lock()
    with served(predictor, tmp_path / "jobs", Page(0), turn) as client:
        with turn:
            answer = client.hand_in({"t1": write_scan(tmp_path)})
            for _ in range(200):
                job = client.ask("GET", f"/api/jobs/{answer.json()['id']}").json()
                if "DICOM" in job["stage"]:
                    break
            assert job["stage"] == "waiting for the DICOM node" and job["state"] == "running"
        assert client.finish(answer)["state"] == "done"


# --- what is refused ---------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_refused_by_its_field_alone(client: Client, tmp_path: Path) -> None:
    scan = write_scan(tmp_path).read_bytes()
    bad = {
        "truncated": ("Miller^Anna.nii.gz", scan[:3000]),
        "text": ("Miller^Anna.nii.gz", b"no volume at all"),
        "archive": ("Miller^Anna.zip", zipped({"Miller.txt": b"no DICOM"})),
        "damaged": ("Miller^Anna.zip", zipped({"a.dcm": b"\0" * 128 + b"DICM"})[:90]),
    }
    for content in bad.values():
        job = client.finish(client.hand_in({"t1": content}))
        error = job["error"]
        assert job["state"] == "failed" and error["message"].startswith("t1.") and not job["files"]
        assert "Miller" not in str(job) and str(tmp_path) not in str(job) and "jobs" not in error["message"]
    assert "Miller" not in "".join(client.log)
    assert "failed" not in "".join(client.log)


@pytest.mark.parametrize(
    ("files", "status", "reason"),
    [
        ({}, 415, "form"),
        ({"t9": ("a.nii.gz", b"x")}, 422, "field"),
        ({"t1": ("a.docx", b"x")}, 422, "format"),
        ({"t1": ("a.mhd", b"x")}, 422, "format"),
        ({"t1": ("a.nii.gz", b"x"), "dicom": ("a.zip", b"x")}, 422, "sources"),
    ],
)
def test_a_form_that_does_not_fit_is_refused_at_once(
    files: dict[str, tuple[str, bytes]], status: int, reason: str, client: Client
) -> None:
    before = client.stored()
    answer = client.hand_in(files)
    assert (answer.status_code, problem(answer)["reason"]) == (status, reason)
    assert client.stored() == before


def test_wrong_addresses_and_methods_are_refused_in_the_same_words(client: Client) -> None:
    for method, path, status in (
        ("GET", f"/api/jobs/{UNKNOWN}", 404),
        ("DELETE", f"/api/jobs/{UNKNOWN}", 404),
        ("GET", f"/api/jobs/{UNKNOWN}/files/scan_t2.nii.gz", 404),
        ("GET", f"/api/jobs/{UNKNOWN}/view", 404),
        ("GET", "/etc/passwd", 404),
        ("GET", "/docs", 404),
        ("PUT", "/api/jobs", 405),
        ("GET", "/api/jobs", 405),
        ("HEAD", "/api/jobs", 405),
    ):
        answer = client.ask(method, path)
        assert answer.status_code == status and (method == "HEAD" or problem(answer))
    for path in ("/", "/api/health", "/api/model"):
        head, answer = client.ask("HEAD", path), client.ask("GET", path)
        assert head.status_code == 200 and head.content == b"" and answer.content
        assert head.headers["content-length"] == str(len(answer.content))
    assert client.ask("PUT", "/api/jobs").headers["allow"] == "POST"


def test_files_of_a_job_are_only_those_that_it_lists(client: Client, tmp_path: Path) -> None:
    job = client.finish(client.hand_in({"t1": write_scan(tmp_path)}))
    for name in (
        "sources",
        "t1.nii.gz",
        "%2e%2e%2f",
        "%2e%2e%2fsources%2ft1.nii.gz",
        "..%2f..%2f..%2fetc%2fpasswd",
        "T2.nii.gz",
    ):
        answer = client.ask("GET", f"/api/jobs/{job['id']}/files/{name}")
        assert answer.status_code == 404, name


def test_a_job_that_is_not_done_has_no_files_yet(predictor: Predictor, tmp_path: Path) -> None:
    turn = Lock()
    with served(predictor, tmp_path / "jobs", Page(0), turn) as client, turn:
        name = client.hand_in({"t1": write_scan(tmp_path)}).json()["id"]
        answer = client.ask("GET", f"/api/jobs/{name}/files/scan_t2.nii.gz")
        assert answer.status_code == 409 and problem(answer)["reason"] == "not-done"
        assert client.ask("DELETE", f"/api/jobs/{name}").status_code == 204
        assert client.ask("GET", f"/api/jobs/{name}").status_code == 404


def test_a_disk_that_is_full_is_an_answer_and_leaves_nothing(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = client.stored()
    monkeypatch.setattr("chiasm.serving.web_forms.shutil.copyfileobj", full)
    answer = client.hand_in({"t1": write_scan(tmp_path)})
    assert answer.status_code == 507 and problem(answer)["reason"] == "disk" and client.stored() == before
    assert "No space left" in client.log[-1]


def test_the_client_of_the_documentation_works_in_ten_lines(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "serve.md").read_text()
    code = page.partition("A client in ten lines of Python:\n```python\n")[2].partition("```")[0]
    assert len([line for line in code.splitlines() if line]) == 10
    write_scan(tmp_path, name="patient_t1.nii.gz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves files to Python to close
        exec(compile(code.replace("http://127.0.0.1:8000", client.root), "serve.md", "exec"), {})
        gc.collect()
    made = {f"scan_{name}.nii.gz" for name in ("t2", "expected-error", "mask")}
    assert {path.name for path in tmp_path.iterdir()} == {*made, "patient_t1.nii.gz"}
