"""The files of a reader study: `key.csv`, which says what each image is, and the ratings that the page writes."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn, cast

from chiasm.errors import RunError, shortened
from chiasm.names import is_plain
from chiasm.storage import whole_file

REAL = "real"  # what an image is that is no method's
PAGE, KEY = "rate.html", "key.csv"
LEVELS = 5  # of quality: 1 is worst
ANSWERS = ("real", "synthetic")
COLUMNS = ("study", "rater", "token", "answer", "quality", "seconds")  # of what the page writes

Answer = Literal["real", "synthetic"]
Planes = Literal["axial", "coronal", "sagittal"]
Place = tuple[str, int, str]  # case, slice, method


class StudyItem(NamedTuple):
    """One showing of one image.

    Attributes:
        study: Checksum of the study.
        token: What the page calls this showing.
        position: In the order of the page, from 1.
        case: Whose image it is.
        subject: The person: the unit of every test.
        method: That made it, or "real".
        plane: How it is cut.
        slice: Index in the canonical volume (right, front, up), from 0.
        showing: 1, or 2 for a repeat.
    """

    study: str
    token: str
    position: int
    case: str
    subject: str
    method: str
    plane: Planes
    slice: int
    showing: int

    @property
    def place(self) -> Place:
        """What is shown, however often."""
        return self.case, self.slice, self.method


class Rating(NamedTuple):
    """What one rater said of one showing.

    Attributes:
        item: What was shown.
        rater: By name.
        answer: Or None where it was not given.
        quality: 1 (worst) to 5, or None.
        seconds: That the image was looked at before both were given, or None.
    """

    item: StudyItem
    rater: str
    answer: Answer | None
    quality: int | None
    seconds: float | None


class Ratings(NamedTuple):
    """Readings of one or several raters, and sentences about what is missing."""

    readings: tuple[Rating, ...]
    notes: tuple[str, ...]


# The key


def write_key(folder: Path, items: Sequence[StudyItem]) -> Path:
    """Write `key.csv`, one row a showing.

    Raises:
        ChiasmError: If it cannot be written.
    """
    with whole_file(folder / KEY) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(StudyItem._fields)
        writer.writerows(items)
    return folder / KEY


def is_key(path: Path) -> bool:
    """Return whether a file is a key that `write_key` wrote."""
    return has_columns(path, StudyItem._fields)


def has_columns(path: Path, columns: Sequence[str]) -> bool:
    """Return whether a file is a table of these columns."""
    try:
        with path.open(encoding="utf-8", newline="") as content:
            return next(csv.reader(content, strict=True), []) == list(columns)
    except (OSError, ValueError, csv.Error):
        return False


def read_key(folder: Path) -> list[StudyItem]:
    """Read the key of a study's folder.

    Raises:
        RunError: If there is none, or it is damaged.
    """
    path = folder / KEY
    if not path.is_file():
        raise RunError(
            f"holds no {KEY}", path=folder, reason="no-study", hint="Name the folder of the study: chiasm rate -o OUT."
        )
    header, *lines = _read_table(path)
    if header != list(StudyItem._fields):
        raise RunError("is no key of a reader study", path=path, reason="columns", found=", ".join(header))
    try:
        items = [_item(line) for line in lines]
    except ValueError as error:
        raise RunError("is damaged", path=path, reason="damaged", found=error) from error
    if not items or len({item.study for item in items}) != 1 or len({item.token for item in items}) != len(items):
        raise RunError("is damaged: it must name one study, and each token once", path=path, reason="damaged")
    return items


def _item(line: Sequence[str]) -> StudyItem:
    study, token, position, case, subject, method, plane, index, showing = line
    if not all(map(is_plain, (case, subject, method))):
        raise ValueError(f"a name that no table may hold: {shortened((case, subject, method))}")
    return StudyItem(
        study, token, int(position), case, subject, method, cast("Planes", plane), int(index), int(showing)
    )


# Ratings


def read_ratings(paths: Sequence[Path], items: Sequence[StudyItem]) -> Ratings:
    """Read what raters said; a file that does not fit the study is refused whole.

    Args:
        paths: Files that the page wrote, one for each rater.
        items: Of the study.

    Returns:
        A reading for each showing that got an answer or a quality, and a
        sentence about each rater who left some out.

    Raises:
        RunError: If a file cannot be read, is of another study or rater than
            it should be, or holds an answer that the page does not write.
    """
    by_token = {item.token: item for item in items}
    readings: list[Rating] = []
    notes: list[str] = []
    files: dict[str, Path] = {}
    for path in paths:
        found = _read_rater(path, by_token)
        rater = found[0].rater
        if rater in files:
            raise RunError(
                f"is of rater {rater}, as {files[rater]} is: give one file for each rater", path=path, reason="rater"
            )
        files[rater] = path
        readings += found
        notes += _missing(rater, found, len(items))
    return Ratings(tuple(readings), tuple(notes))


def _read_rater(path: Path, by_token: Mapping[str, StudyItem]) -> list[Rating]:
    """Read the file of one rater; showings without any answer are left out."""
    lines = _lines_of_ratings(path)
    _check_study(path, {line[0] for line in lines}, next(iter(by_token.values())).study)
    _check_rater(path, {line[1] for line in lines})
    _check_tokens(path, [line[2] for line in lines], by_token)
    found = [_reading(path, line, by_token) for line in lines]
    return [one for one in found if one.answer is not None or one.quality is not None] or _refuse_empty(path)


def _refuse_empty(path: Path) -> NoReturn:
    raise RunError("holds no answer", path=path, reason="empty")


def _lines_of_ratings(path: Path) -> list[list[str]]:
    """Read the lines of a file of ratings, each with as many entries as there are columns."""
    header, *lines = _read_table(path)
    if header != list(COLUMNS):
        raise RunError(
            "is no file of ratings",
            path=path,
            reason="columns",
            found=shortened(", ".join(header)),
            expected=", ".join(COLUMNS),
        )
    if wrong := [number for number, line in enumerate(lines, 2) if len(line) != len(COLUMNS)]:
        raise RunError(f"line {wrong[0]} does not have {len(COLUMNS)} entries", path=path, reason="damaged")
    return lines or _refuse_empty(path)


def _check_study(path: Path, found: set[str], study: str) -> None:
    if found - {study}:
        raise RunError("belongs to another study", path=path, reason="other-study", found=shortened(min(found)))


def _check_rater(path: Path, found: set[str]) -> None:
    if len(found) != 1:
        raise RunError("must be of one rater", path=path, reason="rater", found=shortened(", ".join(sorted(found))))
    if not is_plain(name := next(iter(found))):
        raise RunError("has a rater's name that no table may hold", path=path, reason="rater", found=shortened(name))


def _check_tokens(path: Path, tokens: Sequence[str], by_token: Mapping[str, StudyItem]) -> None:
    if strange := [token for token in tokens if token not in by_token]:
        raise RunError(
            f"names {len(strange)} images that the study does not have",
            path=path,
            reason="token",
            found=shortened(strange[0]),
        )
    if doubles := [token for token, count in Counter(tokens).items() if count > 1]:
        raise RunError(f"rates {len(doubles)} images twice", path=path, reason="double", found=doubles[0])


def _reading(path: Path, line: Sequence[str], by_token: Mapping[str, StudyItem]) -> Rating:
    _, rater, token, answer, quality, seconds = line
    if answer not in (*ANSWERS, ""):
        raise _strange(path, token, "answer", answer, "real, synthetic or nothing")
    if quality not in (*map(str, range(1, LEVELS + 1)), ""):
        raise _strange(path, token, "quality", quality, f"1 to {LEVELS} or nothing")
    lasted = _seconds(seconds) if seconds else None
    if lasted is not None and not 0 <= lasted < math.inf:
        raise _strange(path, token, "time", seconds, "seconds or nothing")
    return Rating(
        by_token[token], rater, cast("Answer", answer) if answer else None, int(quality) if quality else None, lasted
    )


def _seconds(text: str) -> float:
    """Read a number, with the decimal comma of some spreadsheets; NaN of what is none."""
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return math.nan


def _strange(path: Path, token: str, what: str, found: str, expected: str) -> RunError:
    return RunError(
        f"image {token} has a strange {what}", path=path, reason=what, found=shortened(found), expected=expected
    )


def _missing(rater: str, found: Sequence[Rating], shown: int) -> list[str]:
    """Say how many images a rater left without an answer or a quality."""
    counts = {
        "an answer": shown - sum(one.answer is not None for one in found),
        "a quality": shown - sum(one.quality is not None for one in found),
    }
    return [f"{rater} left {count} of {shown} images without {what}" for what, count in counts.items() if count]


def _read_table(path: Path) -> list[list[str]]:
    """Read a CSV file with commas, or with the semicolons of some spreadsheets; at least its header.

    Raises:
        RunError: If it cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as content:
            first = content.readline()
            content.seek(0)
            lines = list(csv.reader(content, delimiter=";" if ";" in first else ",", strict=True))
    except OSError as error:
        raise RunError("cannot be read", path=path, reason="unreadable", found=error.strerror) from error
    except (ValueError, csv.Error) as error:
        raise RunError("is damaged", path=path, reason="damaged", found=error) from error
    return [line for line in lines if any(line)] or [[]]
