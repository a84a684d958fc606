"""What a folder says itself of its cases: a manifest of them, and notes in `cohort.json`.

`manifest.csv`, `.tsv` or `.json` says which files belong together and makes
their names irrelevant.  `cohort.json` is heeded whatever the layout; every
part is optional:

    {"cases": {id: {"subject", "site", "head"}},
     "regions": {name: [values]},
     "labels": {"threshold": 0.5},
     "series": {modality: words of a DICOM series}, "structures": {region or "mask": [names of structures]},
     "reading": {"form", "assume_ras", "resample", "resample_tilt"},
     "select": [words of the names of files],
     "allow": ["burned-in", "synthetic"]}
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from pydantic import TypeAdapter, ValidationError

from chiasm.cohorts.cases import (
    LABEL_NAMES,
    LESION,
    MAPS,
    MASK_NAMES,
    MODALITIES,
    Case,
    Cohort,
    Problem,
    Regions,
    regions_of,
    repeated,
    role_of,
    volume_stem,
    with_files,
    without_problems,
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
class ManifestNotes:
    """What `cohort.json` says.

    Attributes:
        cases: Case id to subject, site and head.
        regions: Region name to label values, or None where it declares none.
        series: Modality to what its DICOM series is called.
        structures: Region name, or "mask", to the names of structures in a DICOM structure set.
        allow: Of `MARKS`, those that do not matter here.
        reading: What to assume of files whose headers leave a question open.
        label_threshold: From which value on a voxel of soft labels counts, or None.
        select: Words of the names of files that are preferred where a case has several for one image.
    """

    cases: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    regions: Regions | None = None
    series: Mapping[str, str] = field(default_factory=dict)
    structures: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    allow: tuple[str, ...] = ()
    reading: Reading = STRICT
    label_threshold: float | None = None
    select: tuple[str, ...] = ()


def _are_objects(cases: object) -> bool:
    return isinstance(cases, Mapping) and all(isinstance(note, Mapping) for note in cases.values())


def _are_words_of_series(series: object) -> bool:
    return isinstance(series, Mapping) and all(isinstance(words, (str, int)) for words in series.values())


def _are_marks(allow: object) -> bool:
    return isinstance(allow, list) and all(mark in MARKS for mark in allow)


def _states_threshold(labels: object) -> bool:
    """Return whether nothing is stated, or a threshold that soft labels can have."""
    if labels == {}:
        return True
    stated = labels.get("threshold") if isinstance(labels, Mapping) else None
    return isinstance(stated, (int, float)) and not isinstance(stated, bool) and 0 < stated <= MOST_THRESHOLD


def _are_texts(select: object) -> bool:
    return isinstance(select, list) and all(isinstance(word, str) for word in select)


def _are_structures(structures: object) -> bool:
    lists = structures.values() if isinstance(structures, Mapping) and all(map(is_plain, structures)) else [None]
    return all(_are_texts(names) and names and all(names) for names in lists)


#: Key of `cohort.json` to what checks whether its value is of the form that is expected, and that form.
_FORMS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "cases": (_are_objects, '{"cases": {id: {...}}}'),
    "series": (_are_words_of_series, '{"series": {"t1": "words of its folder or description"}}'),
    "allow": (_are_marks, '{"allow": [' + ", ".join(f'"{mark}"' for mark in MARKS) + "]}"),
    "labels": (_states_threshold, f'{{"labels": {{"threshold": 0.5}}}}, above 0 and at most {MOST_THRESHOLD}'),
    "structures": (_are_structures, '{"structures": {"lesion": ["GTV*"], "mask": ["BODY"]}}'),
    "select": (_are_texts, '{"select": ["acq-mprage"]}'),
}


def read_notes(root: Path) -> ManifestNotes:
    """Read the `cohort.json` of a folder; where there is none, it says nothing.

    Raises:
        CohortError: If it is damaged or of another form.
    """
    path = root / SIDECAR
    content: Mapping[str, Any] = read_object(path) if path.is_file() else {}
    _check_forms(content, path)
    threshold = content.get("labels", {}).get("threshold")
    return ManifestNotes(
        cases=content.get("cases", {}),
        regions=None if content.get("regions") is None else declared_regions(content["regions"], path),
        series={role_of(name): str(words) for name, words in content.get("series", {}).items()},
        structures={name: tuple(names) for name, names in content.get("structures", {}).items()},
        allow=tuple(content.get("allow", ())),
        reading=_reading(content.get("reading", {}), path),
        label_threshold=None if threshold is None else float(threshold),
        select=tuple(content.get("select", ())),
    )


def _check_forms(content: Mapping[str, Any], path: Path) -> None:
    """Refuse values that are not of the form that is expected."""
    for key, (is_expected, form) in _FORMS.items():
        if key in content and not is_expected(content[key]):
            raise _other_form(path, form)


def _other_form(path: Path, expected: str) -> CohortError:
    return CohortError("is not of the expected form", path=path, reason="sidecar", expected=expected)


def _reading(content: object, path: Path) -> Reading:
    """Read what is assumed of files."""
    refusal = _other_form(path, '{"reading": {"form": "sform" or "qform", "assume_ras": true, ...}}')
    if not isinstance(content, Mapping) or not set(content) <= {field.name for field in fields(Reading)}:
        raise refusal
    try:
        return TypeAdapter(Reading).validate_python(content)
    except ValidationError:
        raise refusal from None


def with_notes(cohort: Cohort, notes: ManifestNotes) -> Cohort:
    """Heed what `cohort.json` says of sites, subjects, regions and reading.

    A head that every case shares is a template, not a person.
    """
    heads = {str(notes.cases.get(case.id, {}).get("head")) for case in cohort.cases}
    return replace(
        cohort,
        cases=tuple(_noted(case, notes, with_head=len(heads) > 1) for case in cohort.cases),
        regions=cohort.regions if notes.regions is None else notes.regions,
    )


def _noted(case: Case, notes: ManifestNotes, *, with_head: bool) -> Case:
    """Use what is said of one case; `with_head` says whether heads identify persons."""
    note = notes.cases.get(case.id, {})
    head = note.get("head") if with_head else None
    person = note.get("subject") if head is None else head
    site = note.get("site")
    return replace(
        case,
        subject=case.subject if person is None else str(person),
        site=case.site if site is None else str(site),
        reading=case.reading | notes.reading,
        label_threshold=notes.label_threshold,
    )


def declared_regions(content: object, path: Path) -> Regions:
    """Check a table of regions.

    Raises:
        CohortError: If it is not of the form.
    """
    table = content if isinstance(content, Mapping) else {"": content}  # no region has an empty name
    lists = {str(name): _as_list(value) for name, value in table.items()}
    if not all(map(is_plain, lists)) or not all(map(_is_label, chain.from_iterable(lists.values()))):
        raise CohortError(
            "declares regions wrongly", path=path, reason="regions", expected='{"WT": [1, 2, 4], "ET": [4]}'
        )
    return {name: tuple(values) for name, values in lists.items()}


def _as_list(value: Any) -> list[Any]:
    """Return one value or several as a list."""
    return value if isinstance(value, list) else [value]


def _is_label(value: object) -> bool:
    """Return whether a value can be that of a region: a whole number above 0."""
    return isinstance(value, int) and value > 0


def read_object(path: Path) -> Mapping[str, object]:
    """Read a JSON file that holds an object.

    Raises:
        CohortError: If it is damaged or holds something else.
    """
    content = _json_content(path)
    if not isinstance(content, Mapping):
        raise CohortError("is no JSON object", path=path, reason="json")
    return content


def _json_content(path: Path) -> object:
    try:
        return read_json(path)
    except RunError as error:
        raise CohortError(error.what, path=path, reason=error.reason, found=error.found) from error


def with_unique_ids(root: Path, cases: Iterable[Case]) -> list[Case]:
    """Put cases in the order of their ids.

    Raises:
        CohortError: If two have one id.
    """
    ordered = sorted(cases, key=lambda case: case.id)
    if twice := repeated(case.id for case in ordered):
        raise CohortError(
            "two cases have the same id",
            path=root,
            reason="duplicate-id",
            found=", ".join(twice[:5]),
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
    rows, regions = _rows(path)
    columns = _image_columns(path, rows)
    _require_columns(path, rows, columns)
    cases, problems = without_problems([_case_of(row, columns) for row in rows])
    with_unique_ids(path, [*cases, *(Case(p.case, p.case, {}) for p in problems if p.case)])
    if not cases:
        raise _no_usable_row(path, problems[0])
    ordered = tuple(with_unique_ids(path, cases))
    return Cohort(path.parent, "manifest", ordered, regions_of(cases, regions or LESION), tuple(problems))


def _no_usable_row(path: Path, first: Problem) -> CohortError:
    """Say why no row of a manifest can be used."""
    reason = "unsafe-id" if first.reason == "unsafe-id" else "no-cases"
    return CohortError(f"has no usable row; {first.message}", path=path, reason=reason)


@dataclass(frozen=True)
class _Row:
    """One row of a manifest: its number from 1, and its cells by the meaning of their columns."""

    manifest: Path
    number: int
    cells: Mapping[str, str]

    @property
    def subject(self) -> str:
        return self.cells.get("subject", "")

    @property
    def case(self) -> str:
        return self.cells.get("id") or self.subject

    def problem(self, reason: str, message: str, path: Path | None = None) -> Problem:
        """Say why the row is left out."""
        return Problem(path or self.manifest, reason, f"{self.manifest.name}, row {self.number}: {message}", self.case)

    def refusal(
        self, what: str, reason: str, found: str, *, expected: str | None = None, hint: str | None = None
    ) -> CohortError:
        """Say why the whole manifest is refused for this row."""
        return CohortError(
            f"row {self.number}: {what}", path=self.manifest, reason=reason, found=found, expected=expected, hint=hint
        )


def _case_of(row: _Row, columns: Mapping[str, str]) -> Case | Problem:
    """Make a case of a row, or say why it is left out."""
    if not (is_safe_id(row.subject) and is_safe_id(row.case)):
        return _unsafe_row(row)
    split = _split_of(row)
    files = _files_of(row, columns)
    problem = _missing_file(row, files)
    if problem is not None:
        return problem
    case = with_files(Case(row.case, row.subject, {}, site=row.cells.get("site") or None, split=split), files)
    if not case.images:
        return row.problem("no-image", f"case {row.case} has no image")
    return replace(case, synthetic=_synthetic_images(row, case.images))


def _missing_file(row: _Row, files: Mapping[str, Path]) -> Problem | None:
    """Say which of a row's files is not there, if any."""
    missing = next((role for role, file in files.items() if not file.exists()), None)
    if missing is None:
        return None
    return row.problem("missing-file", f"the {missing} of case {row.case} does not exist", files[missing])


def _unsafe_row(row: _Row) -> Problem:
    """Say that a row's subject or id cannot be used."""
    found = shortened(row.case if is_safe_id(row.subject) else row.subject)
    return row.problem("unsafe-id", f"the subject or id {found} cannot be used: a name is {SAFE_NAME}")


def _split_of(row: _Row) -> str | None:
    split = row.cells.get("split") or None
    if split not in (None, *ROLES):
        raise row.refusal("unknown split", "split", split, expected="/".join(ROLES))
    return split


def _files_of(row: _Row, columns: Mapping[str, str]) -> dict[str, Path]:
    """Return the files of a row by role: images first, then mask and labels."""
    named = {role: row.cells.get(column) for column, role in columns.items()}
    named |= {role: row.cells.get(role) for role in MAPS}
    return {role: _inside(text, row) for role, text in named.items() if text}


def _synthetic_images(row: _Row, images: Collection[str]) -> tuple[str, ...]:
    """Return which images of a row were made, not acquired."""
    made = tuple(map(role_of, row.cells.get("synthetic", "").split()))
    strange = next((role for role in made if role not in images), None)
    if strange is not None:
        what = "an image that the row does not have is called synthetic"
        raise row.refusal(what, "synthetic", strange, expected=f"some of {', '.join(images)}")
    return made


def manifest_of(root: Path, *, forced: bool) -> Path | None:
    """Return the manifest that `root` is or holds; a table without subjects is somebody else's.

    Raises:
        CohortError: If a manifest is asked for and there is none.
    """
    if root.is_file():
        return root if root.suffix.lower() in (".csv", ".tsv", ".json") else None
    there = [root / name for name in MANIFESTS if (root / name).is_file()]
    if forced and not there:
        raise CohortError("holds no manifest", path=root, reason="layout", expected=" or ".join(MANIFESTS))
    return there[0] if forced else next(filter(_names_subjects, there), None)


def _names_subjects(path: Path) -> bool:
    """Return whether a table's first line, or the start of a JSON file, speaks of subjects."""
    with path.open(encoding="utf-8", errors="replace") as text:
        start = text.read(4096)
    head = start if path.suffix == ".json" else start.lstrip().partition("\n")[0]
    return "subject" in head.lower()


_Pairs = Sequence[tuple[str, str]]  # headings and cells of a row


def _rows(path: Path) -> tuple[list[_Row], Regions | None]:
    """Read a manifest's rows, keys in lower case and values as text, and the regions it declares."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CohortError("cannot be read as text", path=path, reason="unreadable", found=error) from error
    if "\0" in text:
        raise CohortError("holds a NUL character", path=path, reason="nul")
    regions = None
    if path.suffix.lower() == ".json":
        given, regions = _json_rows(path)
    else:
        given = _table_rows(path, text)
    return [_Row(path, number, _by_meaning(pairs, path)) for number, pairs in enumerate(given, start=1)], regions


def _json_rows(path: Path) -> tuple[list[_Pairs], Regions | None]:
    """Read a list of rows, or an object with one and perhaps regions."""
    content, regions = _json_content(path), None
    if isinstance(content, Mapping):
        regions = declared_regions(content["regions"], path) if "regions" in content else None
        content = content.get("cases")
    if not isinstance(content, list) or not all(map(_is_row, content)):
        raise CohortError("is no list of rows", path=path, reason="json", expected='[{"subject": ...}, ...]')
    return [_cells_of(row) for row in content], regions


def _is_row(row: object) -> bool:
    scalar = (str, int, float, type(None))
    return isinstance(row, Mapping) and all(isinstance(cell, scalar) for cell in row.values())


def _cells_of(row: Mapping[object, object]) -> _Pairs:
    """Return headings and cells of a row of JSON, as text."""
    return [(str(key), "" if cell is None else str(cell)) for key, cell in row.items()]


def _table_rows(path: Path, text: str) -> list[_Pairs]:
    """Read a table, every row of which is as long as its header; empty rows are passed over."""
    lines = text.splitlines()
    separator = "\t" if path.suffix.lower() == ".tsv" else _separator("".join(lines[:1]))
    try:
        table = [row for row in csv.reader(lines, delimiter=separator) if any(map(str.strip, row))]
    except csv.Error as error:  # a cell without end
        raise CohortError("is no table", path=path, reason="ragged", found=error) from error
    _check_lengths(table, path)
    return [list(zip(table[0], row, strict=True)) for row in table[1:]]


def _check_lengths(table: Sequence[Sequence[str]], path: Path) -> None:
    """Refuse a table in which a row is longer or shorter than the header."""
    for number, row in enumerate(table):
        if len(row) != len(table[0]):
            raise CohortError(
                f"row {number} has another length than the header",
                path=path,
                reason="ragged",
                found=f"{len(row)} cells",
                expected=len(table[0]),
            )


def _separator(header: str) -> str:
    return ";" if header.count(";") > header.count(",") else ","


def _by_meaning(pairs: _Pairs, path: Path) -> dict[str, str]:
    """Return the cells of a row by what their columns mean."""
    keys = [_RESERVED.get(key.strip().lower(), key.strip().lower()) for key, _ in pairs]
    if twice := repeated(keys):
        raise CohortError("has two columns of one meaning", path=path, reason="columns", found=", ".join(twice))
    return {key: cell.strip(" \t") for key, (_, cell) in zip(keys, pairs, strict=True)}


def _image_columns(path: Path, rows: Sequence[_Row]) -> dict[str, str]:
    """Map each column that holds images to its modality."""
    keys = dict.fromkeys(chain.from_iterable(row.cells for row in rows))
    columns = {key: _modality_of(key) for key in keys if _holds_images(key, rows)}
    if twice := repeated(columns.values()):
        raise CohortError("has two columns of one modality", path=path, reason="columns", found=", ".join(twice))
    return columns


def _require_columns(path: Path, rows: Sequence[_Row], columns: Mapping[str, str]) -> None:
    """Refuse a manifest without a column of subjects or of images."""
    headings = rows[0].cells if rows else {}
    if "subject" not in headings or not columns:
        raise CohortError(
            "lacks a column or has no row",
            path=path,
            reason="columns",
            found=", ".join(headings) or "no row",
            expected="subject and one column per image, such as source and target",
        )


def _modality_of(column: str) -> str:
    return role_of(re.sub(r"^(source|target)[_:. -]+", "", column))


def _holds_images(column: str, rows: Sequence[_Row]) -> bool:
    """Return whether a column that means nothing else names volumes, by its own name or by its cells."""
    if column in _RESERVED.values():
        return False
    is_modality = _modality_of(column) in (*MODALITIES, "source", "target")
    return is_modality or any(volume_stem(row.cells.get(column, "")) for row in rows)


def _inside(text: str, row: _Row) -> Path:
    """Return the file that a manifest's cell names, refusing whatever leaves the manifest's folder."""
    root = row.manifest.parent
    candidate = root / text
    if "\0" in text:
        raise _strange_path(text, row, "a path holds a NUL character", reason="nul")
    if ".." in (*PurePosixPath(text).parts, *PureWindowsPath(text).parts):
        raise _strange_path(text, row, "a path holds '..'")
    if Path(text).is_absolute() and not candidate.is_relative_to(root.absolute()):
        raise _strange_path(text, row, "an absolute path lies outside the manifest's folder")
    if not _without_links(candidate, text, row).is_relative_to(root.resolve()):
        raise _strange_path(text, row, "a link leads out of the manifest's folder")
    return candidate


def _without_links(path: Path, text: str, row: _Row) -> Path:
    """Return where a path leads, refusing one that leads nowhere."""
    try:
        real, _ = path.resolve(), path.exists()
    except (OSError, RuntimeError) as error:  # a loop of links, a name too long
        raise _strange_path(text, row, "a link leads nowhere") from error
    except ValueError as error:  # half a character
        raise _strange_path(text, row, "a path cannot be a file's name") from error
    return real


def _strange_path(text: str, row: _Row, why: str, reason: str = "outside") -> CohortError:
    """Refuse a manifest for a path in one of its rows."""
    hint = "Keep the files below the manifest, and name them from there."
    return row.refusal(why, reason, repr(text), hint=hint)
