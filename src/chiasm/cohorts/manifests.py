"""A manifest of cases: `manifest.csv`, `.tsv` or `.json` lists the files that belong together, with any names."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePosixPath, PureWindowsPath

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
    with_unique_ids,
    without_problems,
)
from chiasm.cohorts.datalists import is_datalist, rows_of
from chiasm.cohorts.folder_notes import SPLITS, declared_regions, json_content
from chiasm.errors import CohortError, shortened
from chiasm.names import SAFE_NAME, is_safe_id

MANIFESTS = ("manifest.csv", "manifest.tsv", "manifest.json")


_RESERVED = {"subject": "subject", "id": "id", "case": "id", "site": "site", "split": "split", "synthetic": "synthetic"}
_RESERVED |= dict.fromkeys(MASK_NAMES, "mask") | dict.fromkeys(LABEL_NAMES, "labels")


def read_manifest(path: Path) -> Cohort:
    """Read a CSV, TSV or JSON manifest: one row per case, one column per image.

    Columns: `subject`; `id` where a subject has several cases; `mask`;
    `regions` (a label map); `site`; `split` (train, validation or test);
    `synthetic` (the synthetic images of the row: `t2 flair`).  Every
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
    if split not in (None, *SPLITS):
        raise row.refusal("unknown split", "split", split, expected="/".join(SPLITS))
    return split


def _files_of(row: _Row, columns: Mapping[str, str]) -> dict[str, Path]:
    """Return the files of a row by role: images first, then mask and labels."""
    named = {role: row.cells.get(column) for column, role in columns.items()}
    named |= {role: row.cells.get(role) for role in MAPS}
    return {role: _inside(text, row) for role, text in named.items() if text}


def _synthetic_images(row: _Row, images: Collection[str]) -> tuple[str, ...]:
    """Return the synthetic images of a row."""
    made = tuple(map(role_of, row.cells.get("synthetic", "").split()))
    strange = next((role for role in made if role not in images), None)
    if strange is not None:
        what = "an image that the row does not have is called synthetic"
        raise row.refusal(what, "synthetic", strange, expected=f"some of {', '.join(images)}")
    return made


def manifest_of(root: Path, *, forced: bool) -> Path | None:
    """Return the manifest that `root` is or holds; a table without subjects is not a manifest.

    Raises:
        CohortError: If the user asked for a manifest and there is none.
    """
    if root.is_file():
        return root if root.suffix.lower() in (".csv", ".tsv", ".json") else None
    return _manifest_in(root, forced)


def _manifest_in(root: Path, forced: bool) -> Path | None:
    """Return the first manifest in a folder; it needs subjects, unless the user asked for a manifest."""
    there = [root / name for name in MANIFESTS if (root / name).is_file()]
    if forced and not there:
        raise CohortError("holds no manifest", path=root, reason="layout", expected=" or ".join(MANIFESTS))
    return there[0] if forced else next(filter(_names_subjects, there), None)


def _names_subjects(path: Path) -> bool:
    """Return whether a table's first line, or the start of a JSON file, names subjects."""
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
    content, regions = json_content(path), None
    if isinstance(content, Mapping):
        regions = declared_regions(content["regions"], path) if "regions" in content else None
        content = rows_of(content, path) if is_datalist(content) else content.get("cases")
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
    """Return the cells of a row by the meaning of their columns."""
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
    """Return whether a column without another meaning holds volumes, by its name or by its cells."""
    if column in _RESERVED.values():
        return False
    is_modality = _modality_of(column) in (*MODALITIES, "source", "target")
    return is_modality or any(volume_stem(row.cells.get(column, "")) for row in rows)


def _inside(text: str, row: _Row) -> Path:
    """Return the file that a manifest's cell names; refuse paths that leave the manifest's folder."""
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
    """Return where a path leads; refuse a path that leads nowhere."""
    try:
        real = path.resolve()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # Python 3.13 resolves a loop of links without a word
    except (OSError, RuntimeError) as error:  # a loop of links, a name too long
        raise _strange_path(text, row, "a link leads nowhere") from error
    except ValueError as error:  # half a character
        raise _strange_path(text, row, "a path cannot be a file's name") from error
    return real


def _strange_path(text: str, row: _Row, why: str, reason: str = "outside") -> CohortError:
    """Refuse a manifest for a path in one of its rows."""
    hint = "Keep the files below the manifest, and name them from there."
    return row.refusal(why, reason, repr(text), hint=hint)
