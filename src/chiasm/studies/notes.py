"""The file with all that a study's pages need beside its scores: cases, jobs, failures, remarks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from chiasm.cohorts.cases import Cohort, grouped
from chiasm.errors import RunError
from chiasm.evaluation.rows import MaskUse, Remarks, read_remarks
from chiasm.recipe import Section
from chiasm.records import read_record
from chiasm.storage import read_json
from chiasm.studies.jobs import Job
from chiasm.studies.study_file import Study
from chiasm.studies.work import LOCKED, JobOutcome, days_of, locked_folder

NOTES = "study.json"
PLOT_NAMES = ("trade-off", "forest", "calibration", "coverage")  # version 0.1 called the first "plane"
PLOTS = ("plots", "figures")  # folder of plots; its name in version 0.1
#: What a study writes in its folder, beside the pages of single cases.
FILES = (
    *(NOTES, "evaluation.csv", "evaluation.json", "statistics.csv", "summary.csv", "report.html", "findings.md"),
    *(f"{folder}/{name}.svg" for folder in PLOTS for name in ("plane", *PLOT_NAMES)),
)
FOLDERS = ("cases", "pictures", *PLOTS, "jobs", "expected-error", "reliability", *LOCKED)
UNNOTED = "a day that was not noted"
AGAIN = "Run the same chiasm study command again: it writes the file anew."


class NotedCase(Section):
    """The subject and the site of a case."""

    subject: str
    site: str | None = None


class NotedJob(Section):
    """A training that was finished."""

    name: str
    arm: str
    fold: int
    seed: int
    folder: Annotated[str, Field(pattern=r"^jobs/[A-Za-z0-9_-]+$")]


class StudyNotes(Section):
    """What a study's pages need beside its scores.

    Attributes:
        study: The study file, resolved.
        cases: Case id to subject and site.
        regions: Names of the label regions.
        jobs: Finished trainings; at least one.
        hours: Of computing, all together.
        failed: Failures, in sentences.
        remarks: Warnings on the scores.
        opened: Days on which the locked test set was scored, of its own notes.
    """

    study: Study
    cases: dict[str, NotedCase]
    regions: tuple[str, ...]
    jobs: Annotated[tuple[NotedJob, ...], Field(min_length=1)]
    hours: Annotated[float, Field(ge=0)]
    failed: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    opened: tuple[str, ...] = ()

    @property
    def subjects(self) -> dict[str, str]:
        """Case id to subject."""
        return {name: case.subject for name, case in self.cases.items()}

    def people(self, cases: Iterable[str]) -> set[str]:
        """Return the subjects of some cases."""
        return {self.cases[name].subject for name in cases}

    @property
    def is_whole(self) -> bool:
        """Whether every case should have been scored."""
        return self.study.only_folds is None and not self.study.locked and not self.failed


def is_study(folder: Path) -> bool:
    """Return whether `chiasm study` wrote in a folder; damaged notes count too."""
    try:
        content = read_json(folder / NOTES)
    except RunError:
        return (folder / NOTES).is_file()
    return not isinstance(content, dict) or bool(content.keys() & {"study", "cases", "jobs"})


def notes_of(
    study: Study, cohort: Cohort, jobs: Sequence[Job], failed: Sequence[JobOutcome], *, opened: Sequence[str]
) -> dict[str, Any]:
    """Collect what a study's page needs beside its scores.

    Args:
        study: The study file, resolved.
        cohort: All cases.
        jobs: All jobs.
        failed: Those that failed.
        opened: Days on which the locked test set was scored; none for the page of the study itself.
    """
    arms = [job for job in jobs if job.kind == "arm" and job.is_done]
    return {
        "study": study.model_dump(mode="json", by_alias=True),
        "cases": _case_facts(cohort),
        "regions": list(cohort.regions),
        "jobs": list(map(_job_facts, arms)),
        "hours": round(sum(job.seconds for job in jobs) / 3600, 2),
        "failed": [f"failed: {outcome.name}: {outcome.error}" for outcome in failed],
        "remarks": _sentences(_read_all(scored_folders(arms, opened=bool(opened)))),
        **({"opened": list(opened)} if opened else {}),
    }


def days_opened(out: Path, jobs: Iterable[Job]) -> tuple[str, ...]:
    """Return the days on which a study's locked test set was scored; none where it never was.

    Args:
        out: The study's folder, whose notes name days too: versions before noted none beside a model.
        jobs: All jobs.
    """
    folders = [locked_folder(job) for job in jobs if job.kind == "arm"]
    in_notes, noted = _days_in_notes(out / LOCKED[0]), {folder: days_of(folder) for folder in folders}
    days = {*in_notes, *chain.from_iterable(noted.values())}
    if not in_notes and any(not noted[one] and (one / "evaluation.csv").is_file() for one in folders):
        days.add(UNNOTED)
    return tuple(sorted(days, key=lambda day: (day != UNNOTED, day)))


def _days_in_notes(folder: Path) -> tuple[str, ...]:
    """Return the days in the notes on a locked test set; none where these are missing, or damaged and written anew."""
    try:
        return read_notes(folder).opened
    except RunError:
        return ()


def scored_folders(arms: Sequence[Job], *, opened: bool) -> list[Path]:
    """Return the folders with the scores of finished arms, on their test cases or on the locked test set."""
    return [locked_folder(job) if opened else job.folder for job in arms]


def _read_all(folders: Sequence[Path]) -> list[Remarks]:
    """Read the remarks of the folders that have any."""
    return [read_remarks(folder) for folder in folders if (folder / "evaluation.json").is_file()]


def _case_facts(cohort: Cohort) -> dict[str, dict[str, str | None]]:
    """Return the subject and the site of each case."""
    return {case.id: {"subject": case.subject, "site": case.site} for case in cohort.cases}


def _job_facts(job: Job) -> dict[str, Any]:
    """Return the facts on the training of a job, and its folder."""
    folder = str(Path("jobs", job.key))
    return {"name": job.name, "arm": job.arm, "fold": job.fold, "seed": job.seed, "folder": folder}


def _sentences(found: Sequence[Remarks]) -> list[str]:
    """Warn of labels that were not used, and of arms that were scored in different voxels of a case."""
    unused = [f"labels not used: {message}" for remarks in found for message in remarks.problems]
    masks = grouped(chain.from_iterable(remarks.masks for remarks in found), lambda use: use.case)
    return list(dict.fromkeys([*unused, *_differing_masks(masks)]))


def _differing_masks(masks: Mapping[str, Sequence[MaskUse]]) -> Iterator[str]:
    """Warn if arms were scored in different voxels of a case; `masks` are those of each case."""
    differing = {case: uses for case, uses in masks.items() if len({use.sha256 for use in uses}) > 1}
    if differing:
        arms = sorted({use.method for use in chain.from_iterable(differing.values())})
        yield (
            f"{', '.join(arms)} were not scored in the same voxels of {len(differing)} of {len(masks)} cases "
            f"({', '.join(list(differing)[:3])}), because their masks are found differently: "
            "their scores compare masks as well as methods"
        )


def read_notes(folder: Path) -> StudyNotes:
    """Read what a study's page needs beside its scores.

    Raises:
        RunError: If the file is missing or damaged, or names a folder outside the study's.
    """
    return read_record(folder / NOTES, StudyNotes, "not what chiasm study writes", AGAIN)
