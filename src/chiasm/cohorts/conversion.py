"""`chiasm convert`: a cohort in another layout, with hard links for files that need no change.

Files that the layout can hold unchanged become hard links, or copies on another disk; all others are read and written
anew.  `conversion.json` lists the written files, so that no other file is ever replaced.  `cohort.json` holds the
earlier name and place of each case.  At the end the new folder is read like any other, and every case must be
unchanged.
"""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from chiasm.cohorts.cases import MAPS, Case, Cohort, Problem, volume_stem
from chiasm.cohorts.dicom_patients import Selection
from chiasm.cohorts.discovery import find_cohort
from chiasm.cohorts.folder_notes import SIDECAR
from chiasm.cohorts.target_layouts import TARGET_LAYOUTS, TargetLayout, channels_of
from chiasm.errors import ChiasmError, CohortError, RunError, unknown
from chiasm.locks import locked
from chiasm.outputs import refuse_data_folder, refuse_foreign, remove_files
from chiasm.progress import Progress, counted
from chiasm.storage import copy_file, read_facts, whole_file, write_json, write_text
from chiasm.volumes import read_volume, write_volume
from chiasm.volumes.screening import STRICT, SYNTHETIC

NOTE = "conversion.json"


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Attributes:
        folder: Where the cohort lies.
        cases: Ids of the cases that were converted.
        files: How many files were linked, copied, packed (gzip) and rewritten.
        problems: Cases and files that were left out, with reasons.
    """

    folder: Path
    cases: tuple[str, ...]
    files: Mapping[str, int]
    problems: tuple[Problem, ...]


class _Job(NamedTuple):
    """One case: its name in the layout, and its files by their places there."""

    case: Case
    name: str
    files: Mapping[str, tuple[str, Path]]


@dataclass
class _Plan:
    """Cases to convert, and problems of the others."""

    jobs: list[_Job] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    channels: list[str] = field(default_factory=list)


def convert(
    data: Path,
    to: str,
    out: Path,
    *,
    layout: str | None = None,
    selection: Selection | None = None,
    copy: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Write a cohort in another layout; voxels, affines, ids, subjects, sites, splits and regions stay.

    Args:
        data: Folder or manifest in a layout that is recognised.
        to: A name of `TARGET_LAYOUTS`.
        out: Where the new folder goes.
        layout: Name of the layout of `data`, where it fits several.
        selection: Which DICOM series and files are taken.
        copy: Whether to copy files that could be linked.
        progress: Called with cases done, all cases, the next case's id.

    Raises:
        RecipeError: If there is no such layout.
        CohortError: If `data` holds no cohort, or no case fits the layout.
        RunError: If `out` is the data's folder or inside it, or holds other files.
        ChiasmError: If `out` cannot be written.
    """
    if to not in TARGET_LAYOUTS:
        raise unknown("layout to convert to", to, list(TARGET_LAYOUTS))
    _check_outside(data, out)
    cohort = find_cohort(data, layout=layout, selection=selection)
    target = TARGET_LAYOUTS[to]
    plan = _plan_files(cohort, target)
    if not plan.jobs:
        why = plan.problems[0].message if plan.problems else "no case"
        raise CohortError(f"has no case that fits the layout {to}", path=data, reason="no-cases", found=why)
    with locked(out):
        documents = target.documents(cohort, {job.name: job.case for job in plan.jobs}, plan.channels)
        _make_room(out, [*(place for job in plan.jobs for place in job.files), *documents, SIDECAR], data, to)
        done, counts = [], dict.fromkeys(("linked", "copied", "packed", "rewritten"), 0)
        for job in counted(plan.jobs, lambda job: job.case.id, progress):
            failed = _write_case(job, out, counts, copy=copy)
            if failed is None:
                done.append(job)
            else:
                plan.problems.append(failed)
        _describe(out, cohort, target, done, plan.channels)
        lost = _check_again(out, done)
    problems = (*cohort.problems, *plan.problems, *lost)
    return Converted(out, tuple(job.case.id for job in done), counts, problems)


def _check_outside(data: Path, out: Path) -> None:
    """Refuse a folder that is the data's, or that would become part of the data."""
    refuse_data_folder(out, [data])
    root = data.parent if data.is_file() else data
    if out.resolve().is_relative_to(root.resolve()):
        raise RunError(
            "lies inside the folder of the data, so its files would become part of the data",
            path=out,
            reason="input",
            hint="Choose another folder with -o.",
        )


def _plan_files(cohort: Cohort, target: TargetLayout) -> _Plan:
    """Choose the place of each file; a file without a place, or a case that does not fit, is a problem."""
    plan = _Plan(channels=channels_of(cohort.cases))
    for case, name in zip(cohort.cases, target.names(cohort.cases), strict=True):
        lacking = [one for one in plan.channels if one not in case.images] if target.same_images else []
        if lacking:
            message = f"case {case.id} has no {' and no '.join(lacking)}; in this layout all cases have the same images"
            plan.problems.append(Problem(next(iter(case.images.values())), "missing-modality", message, case.id))
        else:
            _plan_case(case, name, target, plan)
    return plan


def _plan_case(case: Case, name: str, target: TargetLayout, plan: _Plan) -> None:
    """Add a case to a plan, and a problem for each of its files that the layout has no place for."""
    files: dict[str, tuple[str, Path]] = {}
    for role, path in _files_of(case):
        place = target.place(case, name, role, plan.channels)
        if place is None:
            message = f"case {case.id}: the layout has no place for {role}"
            plan.problems.append(Problem(path, "no-place", message, case.id, role))
        else:
            files[place + _suffix(path, target)] = (role, path)
    if any(role not in MAPS for role, _ in files.values()):
        plan.jobs.append(_Job(case, name, files))


def _files_of(case: Case) -> Iterator[tuple[str, Path]]:
    yield from case.images.items()
    yield from ((role, path) for role, path in (("mask", case.mask), ("labels", case.labels)) if path is not None)


def _suffix(path: Path, target: TargetLayout) -> str:
    """Return a file's suffix in a layout: its own suffix if the layout allows it."""
    suffix = suffix_of(path.name)
    return suffix if suffix in target.suffixes and path.is_file() else target.suffixes[0]


def suffix_of(name: str) -> str:
    """Return the suffix of a volume's name, in small letters; empty where it is no volume.

    >>> suffix_of("a.b.nii.gz"), suffix_of("IM0001")
    ('.nii.gz', '')
    """
    stem = volume_stem(name)
    return "" if stem is None else name[len(stem) :].lower()


def _make_room(out: Path, places: Sequence[str], data: Path, to: str) -> None:
    """Refuse to replace files that no conversion wrote; remove those of an earlier conversion that are not needed."""
    before = read_facts(out / NOTE).get("files", [])
    known = {name for name in before if isinstance(name, str)}
    refuse_foreign(out, sorted({*places, *([] if known else [NOTE])} - known))
    remove_files(out, sorted(known - set(places)))
    write_json(out / NOTE, {"from": str(data.absolute()), "layout": to, "files": sorted(places)})


def _write_case(job: _Job, out: Path, counts: dict[str, int], *, copy: bool) -> Problem | None:
    """Write the files of a case, all of them or none; return why not."""
    ways: list[str] = []
    for place, (role, path) in job.files.items():
        try:
            ways.append(_transfer(job.case, role, path, out / place, copy=copy))
        except ChiasmError as error:
            remove_files(out, job.files)
            return Problem(error.path or path, error.reason, f"case {job.case.id}: {error}", job.case.id)
        except OSError as error:
            remove_files(out, job.files)
            return Problem(path, "unreadable", f"case {job.case.id}: {error.strerror or error}", job.case.id)
    for way in ways:
        counts[way] += 1
    return None


def _transfer(case: Case, role: str, source: Path, target: Path, *, copy: bool) -> str:
    """Write one file; say in which way."""
    ends = (suffix_of(source.name) if source.is_file() else "", suffix_of(target.name))
    if ends[0] == ends[1]:
        return _link(source, target, copy=copy)
    if ends == (".nii", ".nii.gz"):
        with whole_file(target) as temporary, source.open("rb") as plain, gzip.open(temporary, "wb") as packed:
            shutil.copyfileobj(plain, packed)
        return "packed"
    labels = role in MAPS and not (role == "labels" and case.label_threshold is not None)
    volume = read_volume(source, labels=labels, reading=case.reading, allow_thin=True, allow_constant=True)
    remark = f"{SYNTHETIC}}}" if role in case.synthetic else ""
    write_volume(target, volume.array, volume.geometry, labels, remark=remark)
    return "rewritten"


def _link(source: Path, target: Path, *, copy: bool) -> str:
    """Link a file; copy it if `copy` says so, if it is a link itself, or if it lies on another disk."""
    if not copy and not source.is_symlink():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another disk, or one without links
            copy_file(source, target)
            return "copied"
        return "linked"
    copy_file(source, target)
    return "copied"


def _describe(out: Path, cohort: Cohort, target: TargetLayout, done: Sequence[_Job], channels: Sequence[str]) -> None:
    """Write the description of the converted cases that the layout and chiasm need."""
    cases = {job.name: job.case for job in done}
    for name, content in target.documents(cohort, cases, channels).items():
        if isinstance(content, str):
            write_text(out / name, content)
        else:
            write_json(out / name, content)
    write_json(out / SIDECAR, _notes(cohort, cases))


def _notes(cohort: Cohort, cases: Mapping[str, Case]) -> dict[str, Any]:
    """Return the content of `cohort.json`: what the layout has no place for."""
    first = next(iter(cases.values()), None)
    notes: dict[str, Any] = {"cases": {name: _note(case) for name, case in cases.items()}}
    if cohort.regions:
        notes["regions"] = {name: list(values) for name, values in cohort.regions.items()}
    if first is not None and first.label_threshold is not None:
        notes["labels"] = {"threshold": first.label_threshold}
    if first is not None and first.reading != STRICT:
        notes["reading"] = {name: value for name, value in asdict(first.reading).items() if value}
    if any(case.synthetic for case in cases.values()):
        notes["allow"] = ["synthetic"]
    return notes


def _note(case: Case) -> dict[str, str | None]:
    """Say what a case is; a split that is None keeps a folder's name, such as imagesTr, from fixing one."""
    return {"id": case.id, "subject": case.subject, "site": case.site, "split": case.split}


def _check_again(out: Path, done: Sequence[_Job]) -> list[Problem]:
    """Read the new folder like any other, and name each case that is not unchanged."""
    if not done:
        return []
    found = {case.id: case for case in find_cohort(out).cases}
    problems = []
    for job in done:
        case, again = job.case, found.get(job.case.id)
        kept = {role for role, _ in job.files.values() if role not in MAPS}
        is_same = again is not None and set(again.images) == kept and _note(again) == _note(case)
        if not is_same:
            message = f"case {case.id} was written, but is not read as the same case: its name does not fit the layout"
            problems.append(Problem(out, "not-found-again", message, case.id))
    return problems
