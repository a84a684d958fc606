"""The API, asked whatever its own description allows, and more: it never fails, and answers as it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from chiasm.prediction.folders import load
from chiasm.serving.web_limits import Page, WebLimits

pytest.importorskip("fastapi", reason="fastapi is not installed (pip install 'chiasm[serve]')")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (pip install 'chiasm[serve]')")
pytest.importorskip("schemathesis", reason="schemathesis is not installed (it is part of chiasm[dev])")

import schemathesis

from web_client import Client, served


@pytest.fixture(scope="module")
def client(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    page = Page(0, limits=WebLimits(waiting=8, finished=10_000), dicomweb=())
    with served(load(finished_run), tmp_path_factory.mktemp("fuzzed") / "jobs", page) as running:
        yield running


#: Of the API: method and path.
OPERATIONS = (
    ("GET", "/api/health"),
    ("GET", "/api/model"),
    ("POST", "/api/jobs"),
    ("GET", "/api/jobs/{job_id}"),
    ("DELETE", "/api/jobs/{job_id}"),
    ("GET", "/api/jobs/{job_id}/files/{name}"),
    ("GET", "/api/jobs/{job_id}/view"),
    ("POST", "/dicom-web/studies"),
    ("POST", "/dicom-web/studies/{study}"),
    ("GET", "/dicom-web/studies"),
    ("GET", "/dicom-web/series"),
    ("GET", "/dicom-web/instances"),
    ("GET", "/dicom-web/studies/{study}/series"),
    ("GET", "/dicom-web/studies/{study}/instances"),
    ("GET", "/dicom-web/studies/{study}/series/{series}/instances"),
    *(
        ("GET", f"/dicom-web/studies/{{study}}{below}{end}")
        for below in ("", "/series/{series}", "/series/{series}/instances/{instance}")
        for end in ("", "/metadata")
    ),
)
KIND = 'multipart/related; type="application/dicom"; boundary=edge'


@schemathesis.serializer("multipart/related")
def part_of(context: Any, value: Any) -> bytes:
    """Whatever was drawn as the only instance of a body that is to be stored."""
    content: bytes = value.data
    return b"--edge\r\nContent-Type: application/dicom\r\n\r\n" + content + b"\r\n--edge--\r\n"


#: Against its description only a form can be; of the others everything is text in an address.
WRONG = ("POST", "/api/jobs", "negative")


@pytest.fixture(scope="module")
def described(client: Client) -> Any:
    return schemathesis.openapi.from_url(f"{client.root}/api/openapi.json")


def test_the_description_holds_every_operation_and_no_other(described: Any) -> None:
    held = [found.ok() for found in described.get_all_operations()]
    assert sorted((one.method.upper(), one.path) for one in held) == sorted(OPERATIONS)


@pytest.mark.parametrize(("method", "path", "mode"), [(*one, "positive") for one in OPERATIONS] + [WRONG])
def test_the_api_answers_as_it_describes_itself(
    method: str, path: str, mode: str, described: Any, client: Client
) -> None:
    unread = [schemathesis.checks.positive_data_acceptance]  # bytes of any kind are no scan
    if mode == "negative":  # a form that has one of two alternatives counts as wrong there
        unread.append(schemathesis.checks.negative_data_rejection)
    operation = described[path][method]
    statuses = set()

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def ask(case: Any) -> None:
        more = {"headers": {"content-type": KIND}} if "dicom-web" in path and method == "POST" else {}
        answer = case.call_and_validate(excluded_checks=unread, **more)
        statuses.add(answer.status_code)
        if answer.status_code >= 400 and "dicom+json" not in str(answer.headers["content-type"]):
            said = answer.json()
            assert set(said) == {"message", "hint", "reason"} and "Traceback" not in answer.text

    ask()
    assert statuses and all(status < 500 or status == 503 for status in statuses)
    assert "failed (" not in "".join(client.log)
