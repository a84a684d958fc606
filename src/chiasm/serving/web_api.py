"""The page and the REST API: hand in a scan, watch the job, look at the result, fetch it, delete it.

The API describes itself at `/api/openapi.json`, with the model's sources as fields of the form.  Every refusal is a
JSON object with a message, a hint and a code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, BinaryIO

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Query, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from chiasm import __version__
from chiasm.errors import ChiasmError
from chiasm.prediction.ensemble import name_of
from chiasm.reports.pages import render_page
from chiasm.serving.dicomweb_api import Web, add_dicomweb
from chiasm.serving.dicomweb_studies import Studies, rules_of
from chiasm.serving.jobs import FullError, JobQueue, ServedJob
from chiasm.serving.scans import ALL, SUFFIXES, Synthesiser, show_scan, synthesise_scan
from chiasm.serving.web_answers import (
    HEALTH,
    Health,
    JobStatus,
    ModelDescription,
    Refusal,
    describe_job,
    describe_models,
    form_schema,
)
from chiasm.serving.web_forms import receive_scan
from chiasm.serving.web_gate import WebError, error_json
from chiasm.serving.web_limits import Page

CHUNK = 2**18
MOST_DRAWN = 8  # results that wait to be drawn
DRAWING_S = 5.0  # about how long one takes, at most
JobId = Annotated[str, InPath(description="The id that POST returned.")]
Source = Annotated[str | None, Query(description="Which source is shown, of a model of several; else the first.")]
FileName = Annotated[str, InPath(description="A name of the job's list of files.")]
INLINE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
PAGE_POLICY = f"{INLINE}; connect-src 'self'; frame-src blob:; base-uri 'none'; form-action 'none'"
VIEW_POLICY = f"{INLINE}; sandbox allow-scripts"  # the panes of a result can reach nothing
CODES = {
    "invalid": "The request is wrong; the answer says what and what to do.",
    "full": "There is no place now; Retry-After says when to try again.",
}
FULL: dict[int | str, dict[str, Any]] = {503: {"model": Refusal, "description": CODES["full"]}}


@dataclass
class Service:
    """The state that the answers to requests need.

    Attributes:
        using: The model.
        queue: Of jobs.
        page: Where it listens and what it takes.
        say: Called with each line of the log.
        drawing: Lets only one result be drawn at a time; a waiting request takes memory but no thread.
    """

    using: Synthesiser
    queue: JobQueue
    page: Page
    say: Callable[[str], None]
    drawing: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))

    def job(self, name: str) -> ServedJob:
        """Return a job by its id.

        Raises:
            WebError: If there is none.
        """
        job = self.queue.find(name)
        if job is None:
            raise no_job()
        return job

    def finished(self, name: str) -> ServedJob:
        """Return a job that is done.

        Raises:
            WebError: If there is none of this id, or it is not done.
        """
        job = self.job(name)
        if job.state != "done":
            raise WebError(409, f"the job is not done: it is {job.state}", "not-done", "Ask for its state first.")
        return job


def no_job() -> WebError:
    """Return the refusal of an id that names no job."""
    return WebError(404, "there is no such job", "no-job", "It was deleted or is too old: send the scan again.")


def make_app(service: Service) -> FastAPI:
    """Return the application; put `web_gate.WebGate` before it."""
    model, limits = service.using.model, service.page.limits
    refused: dict[int | str, dict[str, Any]] = {"4XX": {"model": Refusal, "description": CODES["invalid"]}}
    refused[422] = refused["4XX"]
    app = FastAPI(
        title=f"chiasm: {' + '.join(model.plan.sources)} to {model.plan.target}",
        version=__version__,
        description="Hand in a scan and fetch the synthetic image. For research only; not for diagnostic use.",
        openapi_url="/api/openapi.json",
        docs_url=None,  # these pages fetch scripts from elsewhere
        redoc_url=None,
        responses=refused,
    )
    _handle_errors(app, service)
    shown = _render_page(service)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(shown, headers={"content-security-policy": PAGE_POLICY})

    @app.get("/api/health")
    async def health() -> Health:
        """Say that the server is there."""
        return HEALTH

    @app.get("/api/model")
    async def describe() -> ModelDescription:
        """Say what the model takes and makes."""
        return describe_models(service.using.predictor.models, limits)

    _add_jobs(app, service)
    _add_results(app, service)
    if service.page.dicomweb is not None:
        rules = rules_of(service.page.dicomweb, model.plan.sources)
        studies = Studies(service.queue, service.using, rules, service.say)
        add_dicomweb(app, Web(service.queue, studies))
    return app


def _add_jobs(app: FastAPI, service: Service) -> None:
    sources, queue = service.using.model.plan.sources, service.queue

    @app.post("/api/jobs", status_code=202, openapi_extra=form_schema(sources), responses=FULL)
    async def hand_in(request: Request, response: Response) -> JobStatus:
        """Hand in a scan: a file for each source of the model, or one DICOM archive."""
        job = queue.begin()
        try:
            handed = await receive_scan(request, job.folder, sources)
        except BaseException:  # also a client that leaves
            queue.delete(job.id)
            raise
        service.say(f"job {job.number}: handed in, files: {len(handed.files)}")
        work = partial(synthesise_scan, handed=handed, using=service.using)
        queue.submit(job, work, partial(show_scan, folder=job.folder, handed=handed, using=service.using))
        response.headers["location"] = f"jobs/{job.id}"  # a proxy may have put a path before it
        return describe_job(job, queue)

    @app.get("/api/jobs/{job_id}")
    async def state(job_id: JobId) -> JobStatus:
        """Say where a job is."""
        return describe_job(service.job(job_id), queue)

    @app.delete("/api/jobs/{job_id}", status_code=204)
    async def delete(job_id: JobId) -> None:
        """Forget a job, end the work on it and remove its files."""
        if not queue.delete(job_id):
            raise no_job()


def _add_results(app: FastAPI, service: Service) -> None:
    binary: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": {}}}}
    page = {200: {"content": {"text/html": {}}}, **FULL}

    @app.get("/api/jobs/{job_id}/files/{name}", response_class=Response, responses=binary)
    async def fetch(job_id: JobId, name: FileName) -> StreamingResponse:
        """Fetch a file of a job that is done."""
        job = service.finished(job_id)
        if name not in job.outcome.files:
            known = ", ".join(job.outcome.files)
            raise WebError(404, "the job has no file of this name", "no-file", f"It has {known}.")
        try:
            file = (job.folder / name).open("rb")
        except FileNotFoundError:  # deleted meanwhile
            raise no_job() from None
        headers = {
            "content-length": str((job.folder / name).stat().st_size),
            "content-disposition": f'attachment; filename="{name}"',
        }
        return StreamingResponse(_pieces(file), media_type="application/octet-stream", headers=headers)

    @app.get("/api/jobs/{job_id}/view", response_class=Response, responses=page)
    async def view(job_id: JobId, source: Source = None) -> HTMLResponse:
        """Look at a job that is done: source, synthesis and expected error in linked panes, as a page of its own."""
        job, sources = service.finished(job_id), service.using.model.plan.sources
        if source is not None and source not in sources:
            raise WebError(422, "the model has no such source", "source", f"The sources are {', '.join(sources)}.")
        if service.drawing.statistics().tasks_waiting >= MOST_DRAWN:
            raise FullError("too many results are to be drawn", DRAWING_S)
        drawn = await to_thread.run_sync(_draw, job, source or sources[0], limiter=service.drawing)
        return HTMLResponse(drawn, headers={"content-security-policy": VIEW_POLICY})


def _draw(job: ServedJob, source: str) -> str:
    assert job.view is not None
    try:
        return job.view(source, job.outcome.warnings)
    except (ChiasmError, OSError):
        if job.is_deleted:
            raise no_job() from None
        raise


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while piece := file.read(CHUNK):
            yield piece


def _handle_errors(app: FastAPI, service: Service) -> None:
    """Turn every error into a JSON object; of an unexpected error, log only its type."""

    def answer(status: int, error: ChiasmError, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse(error_json(error), status, dict(headers or {}))

    async def refused(_: Request, error: Exception) -> JSONResponse:
        if isinstance(error, WebError):
            return answer(error.status, error, error.headers)
        if isinstance(error, FullError):
            return answer(503, error, {"retry-after": str(error.retry_s)})
        return answer(422, error if isinstance(error, ChiasmError) else ChiasmError("the address is wrong"))

    async def unknown(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        known = ChiasmError(f"{error.detail}", reason="http", hint="The addresses are listed at /api/openapi.json.")
        return answer(error.status_code, known, error.headers)

    async def unwritable(_: Request, error: Exception) -> JSONResponse:
        service.say(f"a request failed: {getattr(error, 'strerror', None) or type(error).__name__}")
        return answer(507, ChiasmError("the server cannot store the request", reason="disk", hint="Try again later."))

    async def failed(_: Request, error: Exception) -> JSONResponse:
        service.say(f"a request failed ({type(error).__name__}): this is a mistake of chiasm")
        return answer(500, ChiasmError("the request failed", reason="failed", hint="This is a mistake of chiasm."))

    async def left(_: Request, __: Exception) -> Response:
        return Response(status_code=400)  # which nobody reads

    for kind in (ChiasmError, RequestValidationError):
        app.add_exception_handler(kind, refused)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(OSError, unwritable)
    app.add_exception_handler(ClientDisconnect, left)
    app.add_exception_handler(Exception, failed)


def _render_page(service: Service) -> str:
    plan, models = service.using.model.plan, service.using.predictor.models
    mean = f"Mean of {len(models)} models. " if len(models) > 1 else ""
    content = {
        "kind": "server",
        "title": f"{' + '.join(plan.sources)} to {plan.target}",
        "asked": f"{mean}Method {name_of(models).titles}. Scans stay on this server.",
        "sources": plan.sources,
        "target": plan.target,
        "all": ALL,
        "formats": SUFFIXES,
        "needs_token": bool(service.page.token),
        "keep_minutes": max(1, round(service.page.limits.keep_s / 60)),
        "most_mib": service.page.limits.body_bytes // 2**20,
    }
    return render_page("serve.html", content)
