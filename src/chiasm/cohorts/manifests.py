"""What a folder says itself of its cases: a manifest of them, and notes in `cohort.json`.

`manifest.csv`, `.tsv` or `.json` says which files belong together and makes
their names irrelevant.  `cohort.json` is heeded whatever the layout; every
part is optional:

    {"cases": {id: {"subject", "site", "head"}},
     "regions": {name: [values]},
     "labels": {"threshold": 0.5},
     "series": {modality: words of a DICOM series},
     "reading": {"form", "assume_ras", "resample", "resample_tilt"},
     "select": [words of the names of files],
     "allow": ["burned-in", "synthetic"]}
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from pydantic import TypeAdapter, ValidationError

from chiasm.cohorts.cases import (
    LABEL_NAMES,
    LESION,
    MASK_NAMES,
    MODALITIES,
    Case,
    Cohort,
    Problem,
    Regions,
    role_of,
    volume_stem,
)
from chiasm.errors import CohortError, RunError, shortened
from chiasm.names import SAFE_NAME, is_plain, is_safe_id
from chiasm.storage import read_json
from chiasm.volumes.screening import STRICT, Reading

MANIFESTS = ("manifest.csv", "manifest.tsv", "manifest.json")
SIDECAR = "cohort.json"
MOST_THRESHOLD = 255  # of probabilities that are stored as bytes
MARKS = ("burned-in", "synthetic")  # what images may say of themselves that keeps them from training


@dataclass(frozen=True)
class Notes:
    """What `cohort.json` says.

    Attributes:
        cases: Case id to subject, site and head.
        regions: Region name to label values, or None where it declares none.
        series: Modality to what its DICOM series is called.
        allow: Of `MARKS`, those that do not matter here.
        reading: What to assume of files whose headers leave a question open.
        label_threshold: From which value on a voxel of soft labels counts, or None.
        select: Words of the names of files that are preferred where a case has several for one image.
    """

    cases: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    regions: Regions | None = None
    series: Mapping[str, str] = field(default_factory=dict)
    allow: tuple[str, ...] = ()
    reading: Reading = STRICT
    label_threshold: float | None = None
    select: tuple[str, ...] = ()


def read_notes(root: Path) -> Notes:
    """Read the `cohort.json` of a folder; where there is none, it says nothing.

    Raises:
        CohortError: If it is damaged or of another form.
    """
    path = root / SIDECAR
    content = read_object(path) if path.is_file() else {}
    cases, series, allow = content.get("cases", {}), content.get("series", {}), content.get("allow", [])

    def refusal(expected: str) -> CohortError:
        return CohortError("is not of the expected form", path=path, reason="sidecar", expected=expected)

    if not isinstance(cases, Mapping) or not all(isinstance(note, Mapping) for note in cases.values()):
        raise refusal('{"cases": {id: {...}}}')
    if not isinstance(series, Mapping) or not all(isinstance(words, (str, int)) for words in series.values()):
        raise refusal('{"series": {"t1": "words of its folder or description"}}')
    if not isinstance(allow, list) or not set(allow) <= set(MARKS):
        raise refusal('{"allow": [' + ", ".join(f'"{mark}"' for mark in MARKS) + "]}")
    threshold = _threshold(content.get("labels", {}))
    if threshold is not None and not 0 < threshold <= MOST_THRESHOLD:
        raise refusal(f'{{"labels": {{"threshold": 0.5}}}}, above 0 and at most {MOST_THRESHOLD}')
    select = content.get("select", [])
    if not isinstance(select, list) or not all(isinstance(word, str) for word in select):
        raise refusal('{"select": ["acq-mprage"]}')
    regions = declared_regions(content["regions"], path) if content.get("regions") is not None else None
    reading = _reading(content.get("reading", {}))
    if reading is None:
        raise refusal('{"reading": {"form": "sform" or "qform", "assume_ras": true, ...}}')
    named = {role_of(name): str(words) for name, words in series.items()}
    return Notes(cases, regions, named, tuple(allow), reading, threshold, tuple(select))


def _reading(content: object) -> Reading | None:
    """Read what is assumed of files; None where it is of another form."""
    names = {field.name for field in fields(Reading)}
    if not isinstance(content, Mapping) or not set(content) <= names:
        return None
    try:
        return TypeAdapter(Reading).validate_python(content)
    except ValidationError:
        return None


def _threshold(labels: object) -> float | None:
    """Return the threshold of soft labels that a sidecar states; NaN where it is no number."""
    if labels == {}:
        return None
    stated = labels.get("threshold") if isinstance(labels, Mapping) else None
    return float(stated) if isinstance(stated, (int, float)) and not isinstance(stated, bool) else math.nan


def with_notes(cohort: Cohort, notes: Notes) -> Cohort:
    """Heed what `cohort.json` says of sites, subjects, regions and reading.

    A head that every case shares is a template, not a person.
    """
    heads = {str(notes.cases.get(case.id, {}).get("head")) for case in cohort.cases}

    def noted(case: Case) -> Case:
        note = notes.cases.get(case.id, {})
        head = note.get("head") if len(heads) > 1 else None
        person = note.get("subject") if head is None else head
        site = note.get("site")
        return replace(
            case,
            subject=case.subject if person is None else str(person),
            site=case.site if site is None else str(site),
            reading=case.reading | notes.reading,
            label_threshold=notes.label_threshold,
        )

    return replace(
        cohort,
        cases=tuple(map(noted, cohort.cases)),
        regions=cohort.regions if notes.regions is None else notes.regions,
    )


def declared_regions(content: object, path: Path) -> Regions:
    """Check a table of regions.

    Raises:
        CohortError: If it is not of the form.
    """
    if isinstance(content, Mapping):
        lists = {str(name): value if isinstance(value, list) else [value] for name, value in content.items()}
        if all(isinstance(v, int) and v > 0 for values in lists.values() for v in values) and all(map(is_plain, lists)):
            return {name: tuple(values) for name, values in lists.items()}
    raise CohortError("declares regions wrongly", path=path, reason="regions", expected='{"WT": [1, 2, 4], "ET": [4]}')


def read_object(path: Path) -> Mapping[str, object]:
    """Read a JSON file that holds an object.

    Raises:
        CohortError: If it is damaged or holds something else.
    """
    try:
        content = read_json(path)
    except RunError as error:
        raise CohortError(error.what, path=path, reason=error.reason, found=error.found) from error
    if not isinstance(content, Mapping):
        raise CohortError("is no JSON object", path=path, reason="json")
    return content


def with_unique_ids(root: Path, cases: Iterable[Case]) -> list[Case]:
    """Put cases in the order of their ids.

    Raises:
        CohortError: If two have one id.
    """
    ordered = sorted(cases, key=lambda case: case.id)
    if twice := [a.id for a, b in pairwise(ordered) if a.id == b.id]:
        raise CohortError(
            "two cases have the same id",
            path=root,
            reason="duplicate-id",
            found=", ".join(sorted(set(twice))[:5]),
            hint="Give each row of a manifest an id of its own, in a column called id.",
        )
    return ordered


# --- manifests -------------------------------------------------------------------------------------------------------

_RESERVED = {"subject": "subject", "id": "id", "case": "id", "site": "site", "split": "split", "synthetic": "synthetic"}
_RESERVED |= dict.fromkeys(MASK_NAMES, "mask") | dict.fromkeys(LABEL_NAMES, "labels")
ROLES = ("train", "validation", "test")


def read_manifest(path: Path) -> Cohort:
    """Read a CSV, TSV or JSON manifest: one row per case, one column per image.

    Columns: `subject`; `id` where a subject has several cases; `mask`;
    `regions` (a label map); `site`; `split` (train, validation or test);
    `synthetic` (which images of the row were made, not acquired: `t2 flair`).  Every
    other column whose cells name volumes is an image of that modality:
    `source`, `target`, `t1`, `source_flair` (which is `flair`) ...  An empty
    cell means that there is no such file.  JSON is a list of such rows, or
    ``{"cases": [...], "regions": {"WT": [1, 2, 4]}}``.

    Args:
        path: The manifest; paths in it start at its folder and stay inside it.

    Raises:
        CohortError: If it is damaged, lacks a column, repeats an id, or has a
            path with `..` or NUL, outside its folder, or led out by a link.
    """
    root = path.parent
    rows, regions = _rows(path)
    columns = _image_columns(path, rows)
    if not rows or "subject" not in rows[0] or not columns:
        raise CohortError(
            "lacks a column or has no row",
            path=path,
            reason="columns",
            found=", ".join(rows[0]) if rows else "no row",
            expected="subject and one column per image, such as source and target",
        )
    cases, problems, real_root = [], [], root.resolve()
    for number, row in enumerate(rows, start=1):
        where = f"row {number}"
        subject = row.get("subject", "")
        name = row.get("id") or subject
        if not is_safe_id(subject) or not is_safe_id(name):
            found = shortened(name if is_safe_id(subject) else subject)
            message = f"{path.name}, {where}: the subject or id {found} cannot be used: a name is {SAFE_NAME}"
            problems.append(Problem(path, "unsafe-id", message, name))
            continue
        split = row.get("split") or None
        if split not in (None, *ROLES):
            raise CohortError(
                f"{where}: unknown split", path=path, reason="split", found=split, expected="/".join(ROLES)
            )
        cells = {role: row[column] for column, role in columns.items() if row.get(column)}
        cells |= {role: row[role] for role in ("mask", "labels") if row.get(role)}
        files = {role: _inside(root, real_root, text, path, where) for role, text in cells.items()}
        if missing := [role for role, file in files.items() if not file.exists()]:
            message = f"{path.name}, {where}: the {missing[0]} of case {name} does not exist"
            problems.append(Problem(files[missing[0]], "missing-file", message, name))
            continue
        images = {role: file for role, file in files.items() if role not in ("mask", "labels")}
        if not images:
            problems.append(Problem(path, "no-image", f"{path.name}, {where}: case {name} has no image", name))
            continue
        made = tuple(map(role_of, row.get("synthetic", "").split()))
        if strange := [role for role in made if role not in images]:
            raise CohortError(
                f"{where}: an image that the row does not have is called synthetic",
                path=path,
                reason="synthetic",
                found=strange[0],
                expected=f"some of {', '.join(images)}",
            )
        mask, labels, site = files.get("mask"), files.get("labels"), row.get("site") or None
        cases.append(Case(name, subject, images, mask, labels, site, split, made))
    with_unique_ids(path, [*cases, *(Case(p.case, p.case, {}) for p in problems if p.case)])
    if not cases:
        reason = "unsafe-id" if problems[0].reason == "unsafe-id" else "no-cases"
        raise CohortError(f"has no usable row; {problems[0].message}", path=path, reason=reason)
    with_labels = any(case.labels for case in cases)
    declared = (regions or LESION) if with_labels else {}
    return Cohort(root, "manifest", tuple(with_unique_ids(path, cases)), declared, tuple(problems))


def manifest_of(root: Path, *, forced: bool) -> Path | None:
    """Return the manifest that `root` is or holds; a table without subjects is somebody else's.

    Raises:
        CohortError: If a manifest is asked for and there is none.
    """
    if root.is_file():
        return root if root.suffix.lower() in (".csv", ".tsv", ".json") else None
    for path in (root / name for name in MANIFESTS):
        if path.is_file() and (forced or "subject" in _head(path).lower()):
            return path
    if forced:
        raise CohortError("holds no manifest", path=root, reason="layout", expected=" or ".join(MANIFESTS))
    return None


def _head(path: Path) -> str:
    """Return a table's first line, or the start of a JSON file."""
    with path.open(encoding="utf-8", errors="replace") as text:
        start = text.read(4096)
    return start if path.suffix == ".json" else start.lstrip().partition("\n")[0]


def _rows(path: Path) -> tuple[list[dict[str, str]], Regions | None]:
    """Read a manifest's rows, keys in lower case and values as text, and the regions it declares."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CohortError("cannot be read as text", path=path, reason="unreadable", found=error) from error
    if "\0" in text:
        raise CohortError("holds a NUL character", path=path, reason="nul")
    regions = None
    if path.suffix.lower() == ".json":
        try:
            content = read_json(path)
        except RunError as error:
            raise CohortError(error.what, path=path, reason=error.reason, found=error.found) from error
        if isinstance(content, Mapping):
            regions = declared_regions(content["regions"], path) if "regions" in content else None
            content = content.get("cases")
        rows_of: list[Any] = content if isinstance(content, list) else [None]
        scalar = (str, int, float, type(None))
        if not all(isinstance(row, Mapping) and all(isinstance(c, scalar) for c in row.values()) for row in rows_of):
            raise CohortError("is no list of rows", path=path, reason="json", expected='[{"subject": ...}, ...]')
        given = [[(str(key), "" if cell is None else str(cell)) for key, cell in row.items()] for row in rows_of]
    else:
        lines = text.splitlines()
        semicolons = bool(lines) and lines[0].count(";") > lines[0].count(",")
        separator = "\t" if path.suffix.lower() == ".tsv" else ";" if semicolons else ","
        try:
            table = [row for row in csv.reader(lines, delimiter=separator) if any(cell.strip() for cell in row)]
        except csv.Error as error:  # a cell without end
            raise CohortError("is no table", path=path, reason="ragged", found=error) from error
        for number, row in enumerate(table):
            if len(row) != len(table[0]):
                raise CohortError(
                    f"row {number} has another length than the header",
                    path=path,
                    reason="ragged",
                    found=f"{len(row)} cells",
                    expected=len(table[0]),
                )
        given = [list(zip(table[0], row)) for row in table[1:]]
    rows = []
    for pairs in given:
        keys = [_RESERVED.get(key.strip().lower(), key.strip().lower()) for key, _ in pairs]
        if twice := [key for key, count in Counter(keys).items() if count > 1]:
            raise CohortError("has two columns of one meaning", path=path, reason="columns", found=", ".join(twice))
        rows.append({key: cell.strip(" \t") for key, (_, cell) in zip(keys, pairs)})
    return rows, regions


def _image_columns(path: Path, rows: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Map each column that holds images to its modality."""
    columns: dict[str, str] = {}
    for key in dict.fromkeys(key for row in rows for key in row if key not in _RESERVED.values()):
        bare = re.sub(r"^(source|target)[_:. -]+", "", key)
        if role_of(bare) in (*MODALITIES, "source", "target") or any(volume_stem(row.get(key, "")) for row in rows):
            columns[key] = role_of(bare)
    if twice := [role for role, count in Counter(columns.values()).items() if count > 1]:
        raise CohortError("has two columns of one modality", path=path, reason="columns", found=", ".join(twice))
    return columns


def _inside(root: Path, real_root: Path, text: str, manifest: Path, where: str) -> Path:
    """Return the file that a manifest's cell names, refusing whatever leaves the manifest's folder."""
    candidate = root / text

    def refusal(reason: str, why: str) -> CohortError:
        hint = "Keep the files below the manifest, and name them from there."
        return CohortError(f"{where}: {why}", path=manifest, reason=reason, found=repr(text), hint=hint)

    if "\0" in text:
        raise refusal("nul", "a path holds a NUL character")
    if ".." in PurePosixPath(text).parts or ".." in PureWindowsPath(text).parts:
        raise refusal("outside", "a path holds '..'")
    if Path(text).is_absolute() and not candidate.is_relative_to(root.absolute()):
        raise refusal("outside", "an absolute path lies outside the manifest's folder")
    try:
        real, _ = candidate.resolve(), candidate.exists()
    except (OSError, RuntimeError) as error:  # a loop of links, a name too long
        raise refusal("outside", "a link leads nowhere") from error
    except ValueError as error:  # half a character
        raise refusal("outside", "a path cannot be a file's name") from error
    if not real.is_relative_to(real_root):
        raise refusal("outside", "a link leads out of the manifest's folder")
    return candidate
