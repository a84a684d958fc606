"""DICOMweb: studies come by STOW-RS, and what was made of them is found by QIDO-RS and fetched by WADO-RS.

It lies beside the page's API and behind the same gate, and its jobs wait in the same queue.  Results lie in the study
that came; what came itself cannot be fetched.

Reference:
    DICOM PS3.18, 10 (Studies Service).
"""

from __future__ import annotations

import json
import re
import secrets
import zipfile
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from typing import Annotated, Any, BinaryIO, NamedTuple

from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi import Path as InPath
from fastapi.responses import Response, StreamingResponse

from chiasm.serving.dicomweb_receive import Received, read_received, receive_instances
from chiasm.serving.dicomweb_results import (
    Attributes,
    FoundInstance,
    FoundSeries,
    describe_instance,
    describe_series,
    describe_study,
    read_metadata,
)
from chiasm.serving.dicomweb_search import SEARCHED, Level, matches, parse_search
from chiasm.serving.dicomweb_studies import ARRIVING, Studies
from chiasm.serving.jobs import JobQueue, ServedJob
from chiasm.serving.scans import DICOM_ARCHIVE
from chiasm.serving.web_answers import Refusal
from chiasm.serving.web_gate import WebError

ROOT = "/dicom-web"
PREFIX = re.compile(r"(/[\w.~-]+)*", re.ASCII)  # a path that a proxy puts before ours
JSON, DICOM = "application/dicom+json", "application/dicom"
PLAIN = "1.2.840.10008.1.2.1"  # transfer syntax of the results
CHUNK = 2**18
Uid = Annotated[str, InPath(pattern=r"^[0-9.]{1,64}$", description="A UID.")]
Handler = Callable[..., Awaitable[Response]]
Answers = dict[int | str, dict[str, Any]]
MULTIPART: dict[str, Any] = {"multipart/related": {"schema": {"type": "string", "format": "binary"}}}
OBJECTS: dict[str, Any] = {JSON: {"schema": {"type": "array", "items": {"type": "object"}}}}
FOUND: Answers = {200: {"content": OBJECTS}, 204: {"description": "Nothing is found."}}


class Web(NamedTuple):
    """The state that the answers of DICOMweb need."""

    queue: JobQueue
    studies: Studies


class Fetched(NamedTuple):
    """Instances of one job."""

    job: ServedJob
    instances: tuple[FoundInstance, ...]


def add_dicomweb(app: FastAPI, web: Web) -> None:
    """Add the addresses of DICOMweb to the page's application."""
    _add_store(app, web)
    _add_searches(app, web)
    _add_retrievals(app, web)


# --- STOW-RS -----------------------------------------------------------------------------------------------------


def _add_store(app: FastAPI, web: Web) -> None:
    described = {"requestBody": {"required": True, "content": MULTIPART}}
    said = {JSON: {"schema": {"type": "object"}}}
    stored: Answers = {
        200: {"content": said, "description": "All instances are stored."},
        202: {"content": said, "description": "Some instances are not stored; the answer says why."},
        409: {"content": said, "description": "No instance is stored; the answer says why."},
        503: {"model": Refusal, "description": "There is no place now; Retry-After says when to try again."},
    }

    @app.post(f"{ROOT}/studies", response_class=Response, openapi_extra=described, responses=stored)
    async def store(request: Request) -> Response:
        """Hand in instances (STOW-RS); a study is synthesised when nothing of it came for five seconds."""
        return await _store(request, web, None)

    @app.post(f"{ROOT}/studies/{{study}}", response_class=Response, openapi_extra=described, responses=stored)
    async def store_in(request: Request, study: Uid) -> Response:
        """Hand in instances of one study (STOW-RS)."""
        return await _store(request, web, study)


async def _store(request: Request, web: Web, study: str | None) -> Response:
    sender = "" if request.client is None else request.client.host
    job = web.queue.begin()
    folder = job.folder / ARRIVING
    try:
        with web.studies.sending(sender):
            folder.mkdir(mode=0o700)
            try:
                await receive_instances(request, folder)
            except BaseException:  # also a client that leaves
                web.studies.broke_off(job.folder)
                raise
            received = await to_thread.run_sync(read_received, folder, study)
            added = web.studies.add(job, received, sender)
    finally:
        if not web.studies.keeps(job):
            web.queue.delete(job.id)
    return _stored(added, _root(request))


def _stored(added: Sequence[Received], root: str) -> Response:
    """Say which instances are stored and which are not, as PS3.18 10.5.3 has it."""
    kept, failed = ([one for one in added if bool(one.failure) == is_failed] for is_failed in (False, True))
    said: dict[str, Any] = {}
    if kept:
        said["00081190"] = {"vr": "UR", "Value": [f"{root}/studies/{kept[0].study}"]}
        said["00081199"] = {"vr": "SQ", "Value": [{**_named(one), "00081190": {"vr": "UR"}} for one in kept]}
    if failed:
        reasons = [{**_named(one), "00081197": {"vr": "US", "Value": [one.failure]}} for one in failed]
        said["00081198"] = {"vr": "SQ", "Value": reasons}
    status = 200 if not failed else 202 if kept else 409
    return Response(json.dumps(said), status, media_type=JSON)


def _named(one: Received) -> Attributes:
    found = {"00081150": one.sop_class, "00081155": one.instance}
    return {tag: {"vr": "UI", "Value": [uid]} if uid else {"vr": "UI"} for tag, uid in found.items()}


def _root(request: Request) -> str:
    """Return the address that a client uses, also before a proxy with TLS or a path: only that client is answered."""
    scheme = request.headers.get("x-forwarded-proto", "")
    path = request.headers.get("x-forwarded-prefix", "").rstrip("/")
    seen = request.base_url.replace(scheme=scheme) if scheme in ("http", "https") else request.base_url
    return f"{str(seen).rstrip('/')}{path if PREFIX.fullmatch(path) else ''}{ROOT}"


# --- QIDO-RS -----------------------------------------------------------------------------------------------------


def _add_searches(app: FastAPI, web: Web) -> None:
    def search(level: Level, path: str) -> Callable[[Handler], Handler]:
        described = {"parameters": _parameters(level)}
        return app.get(f"{ROOT}{path}", response_class=Response, openapi_extra=described, responses=FOUND)

    @search("studies", "/studies")
    async def studies(request: Request) -> Response:
        """Find studies of which something was made (QIDO-RS)."""
        return _search(request, web, "studies")

    @search("series", "/series")
    async def series(request: Request) -> Response:
        """Find series that were made."""
        return _search(request, web, "series")

    @search("series", "/studies/{study}/series")
    async def series_of_study(request: Request, study: Uid) -> Response:
        """Find the series that were made of a study."""
        return _search(request, web, "series", study)

    @search("instances", "/instances")
    async def instances(request: Request) -> Response:
        """Find instances that were made."""
        return _search(request, web, "instances")

    @search("instances", "/studies/{study}/instances")
    async def instances_of_study(request: Request, study: Uid) -> Response:
        """Find the instances that were made of a study."""
        return _search(request, web, "instances", study)

    @search("instances", "/studies/{study}/series/{series}/instances")
    async def instances_of_series(request: Request, study: Uid, series: Uid) -> Response:
        """Find the instances of a series that was made."""
        return _search(request, web, "instances", study, series)


def _parameters(level: Level) -> list[dict[str, Any]]:
    """Describe what a search takes, for OpenAPI."""
    number = {"type": "string", "pattern": "^[0-9]{1,9}$"}
    said = {"limit": ("Most results.", number), "offset": ("Results that are passed over.", number)}
    words = {
        name: (f"What {name} must match; * and ? stand for others.", {"type": "string"}) for name in SEARCHED[level]
    }
    known = {**said, **words, "includefield": ("All that is known is returned.", {"type": "string"})}
    return [
        {"name": name, "in": "query", "required": False, "description": what, "schema": schema}
        for name, (what, schema) in known.items()
    ]


def _search(request: Request, web: Web, level: Level, study: str | None = None, series: str | None = None) -> Response:
    wanted = parse_search(request.query_params.multi_items(), level)
    given = [one for one in web.studies.series(study) if series in (None, one.uid)]
    matching = (said for said in _described(given, level, _root(request)) if matches(said, wanted.values))
    found = islice(matching, wanted.offset, wanted.offset + wanted.limit)
    first = next(found, None)
    return Response(status_code=204) if first is None else _listed(chain([first], found))


def _described(given: Sequence[FoundSeries], level: Level, root: str) -> Iterator[Attributes]:
    """Describe what was made, level by level."""
    if level == "studies":
        for study in dict.fromkeys(one.study for one in given):
            yield describe_study([one for one in given if one.study == study], root)
    for one in given:
        if level == "series":
            yield describe_series(one, root)
        elif level == "instances":
            yield from (describe_instance(one, instance, root) for instance in one.instances)


def _listed(said: Iterable[Attributes]) -> StreamingResponse:
    """Answer with a JSON array that is made as the client takes it."""
    return StreamingResponse(_array(said), media_type=JSON)


def _array(said: Iterable[Attributes]) -> Iterator[str]:
    for number, one in enumerate(said):
        yield ("," if number else "[") + json.dumps(one)
    yield "]"


# --- WADO-RS -----------------------------------------------------------------------------------------------------


def _add_retrievals(app: FastAPI, web: Web) -> None:
    def retrieve(path: str, content: Mapping[str, Any]) -> Callable[[Handler], Handler]:
        return app.get(f"{ROOT}{path}", response_class=Response, responses={200: {"content": dict(content)}})

    @retrieve("/studies/{study}", MULTIPART)
    async def study(request: Request, study: Uid) -> Response:
        """Fetch all that was made of a study (WADO-RS)."""
        return _fetch(request, _found(web, study))

    @retrieve("/studies/{study}/series/{series}", MULTIPART)
    async def series(request: Request, study: Uid, series: Uid) -> Response:
        """Fetch a series that was made."""
        return _fetch(request, _found(web, study, series))

    @retrieve("/studies/{study}/series/{series}/instances/{instance}", MULTIPART)
    async def instance(request: Request, study: Uid, series: Uid, instance: Uid) -> Response:
        """Fetch an instance that was made."""
        return _fetch(request, _found(web, study, series, instance))

    @retrieve("/studies/{study}/metadata", OBJECTS)
    async def metadata_of_study(study: Uid) -> Response:
        """Fetch the attributes of all that was made of a study, without pixels."""
        return _listed(_metadata(_found(web, study)))

    @retrieve("/studies/{study}/series/{series}/metadata", OBJECTS)
    async def metadata_of_series(study: Uid, series: Uid) -> Response:
        """Fetch the attributes of a series that was made, without pixels."""
        return _listed(_metadata(_found(web, study, series)))

    @retrieve("/studies/{study}/series/{series}/instances/{instance}/metadata", OBJECTS)
    async def metadata_of_instance(study: Uid, series: Uid, instance: Uid) -> Response:
        """Fetch the attributes of an instance that was made, without pixels."""
        return _listed(_metadata(_found(web, study, series, instance)))


def _found(web: Web, study: str, series: str | None = None, instance: str | None = None) -> list[Fetched]:
    """Find instances that were made, by job.

    Raises:
        WebError: If there are none; it says what has become of the study.
    """
    found = [
        Fetched(one.job, tuple(each for each in one.instances if instance in (None, each.uid)))
        for one in web.studies.series(study)
        if series in (None, one.uid)
    ]
    if any(one.instances for one in found):
        return found
    job = web.studies.job_of(study)
    if job is None or job.state == "done":
        raise WebError(404, "there is no such study, series or instance", "no-study", "Only results can be fetched.")
    if job.error is not None:
        raise WebError(409, f"the study was refused: {job.error.what}", job.error.reason, job.error.hint or "")
    raise WebError(409, f"the study is not done: it is {job.state}", "not-done", "Ask again in some seconds.")


def _fetch(request: Request, found: Sequence[Fetched]) -> Response:
    _check_accepted(request.headers.get("accept", "*/*"))
    boundary = secrets.token_hex(16)
    kind = f'multipart/related; type="{DICOM}"; boundary={boundary}'
    return StreamingResponse(_parts(_opened(found), boundary), headers={"content-type": kind})


def _check_accepted(accepted: str) -> None:
    """Refuse who takes no DICOM files in explicit little endian.

    Raises:
        WebError: If that is the case.
    """
    from python_multipart.multipart import parse_options_header

    for one in accepted.split(","):
        kind, options = parse_options_header(one.strip())
        of = options.get(b"type", b"application/dicom").strip()
        is_type = kind in (b"*/*", b"multipart/*") or (
            kind == b"multipart/related" and of in (b"application/dicom", b"*/*")
        )
        if is_type and options.get(b"transfer-syntax", b"*").strip() in (b"*", PLAIN.encode()):
            return
    raise WebError(
        406, "results are sent in one form only", "accept", f'Accept multipart/related; type="{DICOM}" in {PLAIN}.'
    )


def _opened(found: Sequence[Fetched]) -> list[tuple[BinaryIO, Fetched]]:
    """Open the archives, so that they stay until they are sent."""
    with ExitStack() as held:
        opened: list[tuple[BinaryIO, Fetched]]
        opened = [(held.enter_context((one.job.folder / DICOM_ARCHIVE).open("rb")), one) for one in found]
        held.pop_all()
    return opened


def _parts(opened: Sequence[tuple[BinaryIO, Fetched]], boundary: str) -> Iterator[bytes]:
    with ExitStack() as held:
        for file, _ in opened:
            held.enter_context(file)
        for file, fetched in opened:
            with zipfile.ZipFile(file) as archive:
                for instance in fetched.instances:
                    yield f"--{boundary}\r\nContent-Type: {DICOM}; transfer-syntax={PLAIN}\r\n\r\n".encode()
                    with archive.open(instance.member) as member:
                        while piece := member.read(CHUNK):
                            yield piece
                    yield b"\r\n"
    yield f"--{boundary}--\r\n".encode()


def _metadata(found: Sequence[Fetched]) -> Iterator[Attributes]:
    for one in found:
        yield from read_metadata(one.job.folder / DICOM_ARCHIVE, [instance.member for instance in one.instances])
