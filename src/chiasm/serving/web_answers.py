"""The answers of the API, as records that its own description lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field

from chiasm import __version__
from chiasm.prediction.ensemble import name_of
from chiasm.prediction.model import Model
from chiasm.serving.jobs import JobQueue, ServedJob, State
from chiasm.serving.scans import ALL, SUFFIXES
from chiasm.serving.web_forms import SERIES
from chiasm.serving.web_gate import error_json
from chiasm.serving.web_limits import WebLimits


class Refusal(BaseModel):
    """Why a request or a job was refused."""

    message: str = Field(description="What is wrong, where, what was found and what was expected, in one sentence.")
    hint: str = Field(description="What to do; may be empty.")
    reason: str = Field(description="A short code for programs.")


class ResultFile(BaseModel):
    """A file that a job made."""

    name: str
    title: str = Field(description="What it is, in words.")
    address: str = Field(description="Where GET fetches it.")


class JobStatus(BaseModel):
    """The state of a job, and its result."""

    id: str
    state: State
    stage: str = Field(description="What is done with it now, in words.")
    progress: float = Field(ge=0, le=1, description="Share of the work that is done.")
    jobs_before: int = Field(ge=0, description="How many jobs are worked on first.")
    expected_s: float | None = Field(description="About how many seconds a waiting job takes until it is done.")
    seconds: float | None = Field(description="How long the work took.")
    expires_s: float | None = Field(description="In how many seconds a finished job and its files are removed.")
    warnings: list[str] = Field(description="What a reader of the images must know.")
    files: list[ResultFile]
    error: Refusal | None = Field(description="Why it failed.")


class ModelDescription(BaseModel):
    """The sources and the target of the server's model."""

    method: str = Field(description="As tables of scores name it.")
    title: str = Field(description="What to call it.")
    sources: list[str] = Field(description="Modalities that go in: one file for each.")
    target: str
    unit: str = Field(description="Of the image and of the expected error.")
    sha256: str = Field(description="Of the model's card; of several, of the list of theirs.")
    models: int = Field(ge=1, description="How many models' images are averaged.")
    has_expected_error: bool
    formats: list[str] = Field(description="How names of files may end.")
    most_bytes: int = Field(description="Of a request.")
    keep_s: float = Field(description="For how many seconds a finished job is kept.")


class Health(BaseModel):
    """The server is running."""

    status: str
    version: str


HEALTH = Health(status="ok", version=__version__)


def describe_job(job: ServedJob, queue: JobQueue) -> JobStatus:
    """Describe a job."""
    is_waiting, is_over = job.state == "waiting", job.state in ("done", "failed")
    before = queue.place(job)
    return JobStatus(
        id=job.id,
        state=job.state,
        stage=job.stage,
        progress=round(job.progress, 3),
        jobs_before=before,
        expected_s=round(queue.expected_s(before + 1), 1) if is_waiting else None,
        seconds=round(job.seconds, 2) if is_over else None,
        expires_s=queue.expires_s(job),
        warnings=list(job.outcome.warnings),
        files=[
            ResultFile(name=name, title=title, address=f"/api/jobs/{job.id}/files/{name}")
            for name, title in job.outcome.files.items()
        ],
        error=None if job.error is None else Refusal(**error_json(job.error)),
    )


def describe_models(models: Sequence[Model], limits: WebLimits) -> ModelDescription:
    """Describe a model, or several whose images are averaged, and the formats that are accepted."""
    plan, name = models[0].plan, name_of(models)
    return ModelDescription(
        method=name.method,
        title=name.titles,
        sources=list(plan.sources),
        target=plan.target,
        unit=plan.target_unit,
        sha256=name.sha256,
        models=len(models),
        has_expected_error=all(model.local_discriminator is not None for model in models),
        formats=list(SUFFIXES),
        most_bytes=limits.body_bytes,
        keep_s=limits.keep_s,
    )


def form_schema(sources: Sequence[str]) -> dict[str, Any]:
    """Describe the form that hands in a scan, for OpenAPI."""
    formats = ", ".join(SUFFIXES)
    fields: dict[str, Any] = {
        name: {"type": "string", "format": "binary", "description": f"The {name}: {formats}."} for name in sources
    }
    fields[ALL] = {
        "type": "string",
        "format": "binary",
        "description": "Instead of these: a zip archive of DICOM files that holds every source.",
    }
    fields[SERIES] = {
        "type": "array",
        "items": {"type": "string"},
        "description": "Which DICOM series is which source: MODALITY=WORDS, as chiasm predict --series.",
    }
    ways = [{"required": list(sources)}, {"required": [ALL]}]
    schema = {"type": "object", "properties": fields, "anyOf": ways, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
