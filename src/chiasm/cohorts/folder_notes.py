"""The notes of a folder on its own cases, `cohort.json`, which chiasm reads in every layout.

Every part is optional:

    {"cases": {name: {"id", "subject", "site", "split", "head"}},
     "regions": {name: [values]},
     "labels": {"threshold": 0.5},
     "series": {modality: words of a DICOM series}, "structures": {region or "mask": [names of structures]},
     "reading": {"form", "assume_ras", "resample", "resample_tilt"},
     "select": [words of the names of files],
     "allow": ["burned-in", "synthetic"]}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from chiasm.cohorts.cases import Case, Cohort, Regions, role_of, with_unique_ids
from chiasm.errors import CohortError, RunError
from chiasm.names import is_plain
from chiasm.storage import read_json
from chiasm.volumes.screening import STRICT, Reading

SIDECAR = "cohort.json"
SPLITS = ("train", "validation", "test")
MOST_THRESHOLD = 255  # of probabilities that are stored as bytes
MARKS = ("burned-in", "synthetic")  # what images may say of themselves that keeps them from training


@dataclass(frozen=True)
class ManifestNotes:
    """The content of `cohort.json`.

    Attributes:
        cases: Name of a case in the folder to its id, subject, site, split and head.
        regions: Region name to label values, or None where it declares none.
        series: Modality to words of its DICOM series.
        structures: Region name, or "mask", to the names of structures in a DICOM structure set.
        allow: Marks of `MARKS` that do not exclude images here.
        reading: What to assume of files whose headers leave a question open.
        label_threshold: The value from which a voxel of soft labels counts, or None.
        select: Words in the names of preferred files, if a case has several files for one image.
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
    """Return whether the value is empty, or a threshold that soft labels can have."""
    if labels == {}:
        return True
    stated = labels.get("threshold") if isinstance(labels, Mapping) else None
    return isinstance(stated, (int, float)) and not isinstance(stated, bool) and 0 < stated <= MOST_THRESHOLD


def _are_texts(select: object) -> bool:
    return isinstance(select, list) and all(isinstance(word, str) for word in select)


def _are_structures(structures: object) -> bool:
    lists = structures.values() if isinstance(structures, Mapping) and all(map(is_plain, structures)) else [None]
    return all(_are_texts(names) and names and all(names) for names in lists)


#: Key of `cohort.json` to a check of its value's form, and the expected form in words.
_FORMS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "cases": (_are_objects, '{"cases": {id: {...}}}'),
    "series": (_are_words_of_series, '{"series": {"t1": "words of its folder or description"}}'),
    "allow": (_are_marks, '{"allow": [' + ", ".join(f'"{mark}"' for mark in MARKS) + "]}"),
    "labels": (_states_threshold, f'{{"labels": {{"threshold": 0.5}}}}, above 0 and at most {MOST_THRESHOLD}'),
    "structures": (_are_structures, '{"structures": {"lesion": ["GTV*"], "mask": ["BODY"]}}'),
    "select": (_are_texts, '{"select": ["acq-mprage"]}'),
}


def read_notes(root: Path) -> ManifestNotes:
    """Read the `cohort.json` of a folder; without one, the notes are empty.

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
    """Refuse values of another form than expected."""
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
    """Apply what `cohort.json` says of sites, subjects, regions and reading.

    A head that every case shares is a template, not a person.

    Raises:
        CohortError: If two cases are given one id.
    """
    heads = {str(notes.cases.get(case.id, {}).get("head")) for case in cohort.cases}
    cases = [_noted(case, notes, with_head=len(heads) > 1) for case in cohort.cases]
    return replace(
        cohort,
        cases=tuple(with_unique_ids(cohort.root / SIDECAR, cases)),
        regions=cohort.regions if notes.regions is None else notes.regions,
    )


def _noted(case: Case, notes: ManifestNotes, *, with_head: bool) -> Case:
    """Apply the notes of one case; `with_head` says whether heads identify persons."""
    note = notes.cases.get(case.id, {})
    head = note.get("head") if with_head else None
    person = note.get("subject") if head is None else head
    site, split = note.get("site"), note.get("split", case.split)
    return replace(
        case,
        id=str(note.get("id", case.id)),
        split=str(split) if split in SPLITS else None,
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
    """Return whether a value can be the label of a region: a whole number above 0."""
    return isinstance(value, int) and value > 0


def read_object(path: Path) -> Mapping[str, object]:
    """Read a JSON file that holds an object.

    Raises:
        CohortError: If it is damaged or holds something else.
    """
    content = json_content(path)
    if not isinstance(content, Mapping):
        raise CohortError("is no JSON object", path=path, reason="json")
    return content


def json_content(path: Path) -> object:
    """Read a JSON file.

    Raises:
        CohortError: If it is damaged.
    """
    try:
        return read_json(path)
    except RunError as error:
        raise CohortError(error.what, path=path, reason=error.reason, found=error.found) from error
