"""Choose one of several DICOM series."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from chiasm.errors import VolumeError
from chiasm.volumes.dicom_kinds import NOT_SAID, UNKNOWN, ImageKind, parse_kind
from chiasm.volumes.dicom_scan import scan_series
from chiasm.volumes.dicom_series import Series


def pick_series(path: Path | str, wanted: str | int | None = None) -> Series:
    """Choose a series of a place where no DICOM file is damaged: a slice could be lacking.

    Args:
        path: As for `find_series`.
        wanted: As for `choose_series`.

    Raises:
        VolumeError: If none or several fit, or a file is damaged.
    """
    scan = scan_series(path)
    if scan.broken:
        raise scan.broken[0]
    return choose_series(scan.series, wanted, Path(path))


def choose_series(series: Sequence[Series], wanted: str | int | None, path: Path) -> Series:
    """Choose the one series that fits what was asked for.

    Args:
        series: From one place.
        wanted: As for `fitting`; None where there is only one scan.
        path: The place, for messages.

    Raises:
        VolumeError: If none or several fit; the message lists them.
    """
    images = [one for one in series if one.is_readable]
    if not images:
        raise _without_images(series, path)
    found = _scans_first(images) if wanted is None else fitting(images, wanted)
    if len(found) == 1:
        return found[0]
    raise _not_one(found, images, wanted, path)


def _scans_first(images: list[Series]) -> list[Series]:
    """Return the scans among series with images; all of these where there are none."""
    return [one for one in images if one.is_scan] or images


def _not_one(found: Sequence[Series], images: Sequence[Series], wanted: str | int | None, path: Path) -> VolumeError:
    """Say that none or several series fit, and list them."""
    listed = "; ".join(one.described() for one in (found or images)[:12])
    if not found:
        return VolumeError(f"holds no series {wanted!r}", path=path, reason="no-series", found=listed)
    return VolumeError(
        "holds several series",
        path=path,
        reason="several-series",
        found=listed,
        hint="Choose one with --series (series= in Python): its number, its modality, words of its description, or "
        "what distinguishes it, such as phase, TE=30 or b=1000. chiasm inspect shows descriptions.",
    )


def _without_images(series: Sequence[Series], path: Path) -> VolumeError:
    if not series:
        return VolumeError("holds no DICOM file", path=path, reason="no-dicom")
    kinds = ", ".join(sorted({one.modality or "unknown" for one in series}))
    return VolumeError("holds DICOM without images", path=path, reason="no-pixels", found=f"modality {kinds}")


def folder_name(series: Series) -> str:
    """Return the name of the folder that holds the first file of a series."""
    return series.parts[0].place.parent.name


def names_of_series(series: Series) -> tuple[str, str, str]:
    """Return the three names of a series: its folder, its description, its protocol; each may be empty."""
    return folder_name(series), series.description, series.protocol


def fitting(series: Sequence[Series], wanted: str | int) -> list[Series]:
    """Return the series that fit what was asked for.

    Rules are tried from strict to loose; the first rule that any series fits decides.

    Args:
        series: With images.
        wanted: SeriesInstanceUID, number in the listing, name of its folder,
            description, DICOM modality, or a part of folder or description;
            whole words count before parts of words, and a whole number is no
            part of a word (7 of P07).  Where that fits none or several, a kind
            of images may choose one, alone or with such words: "phase",
            "TE=30", "space TI=800", "b=1000", "TI unknown".
    """
    asked = str(wanted).strip()
    found = _fitting_words(series, asked)
    if len(found) == 1:
        return found
    closer = _fitting_kind(series, asked)
    is_better = closer and (not found or len(closer) == 1)
    return closer if is_better else found


def _fitting_kind(series: Sequence[Series], asked: str) -> list[Series]:
    """Return the series of a kind of images that is asked for, and of these those that fit the other words."""
    kind, words = parse_kind(asked)
    if kind == UNKNOWN:
        return []
    of_kind = [one for one in series if _is_of_kind(one, kind)]
    return _fitting_words(of_kind, words) if words else of_kind


def _is_of_kind(one: Series, asked: ImageKind) -> bool:
    """Say whether images are of a kind; "unknown" is meant as the listing says it, of images apart from others."""
    unknown = [f"{name} unknown" for name, value in zip(("TE", "TI", "b"), asked[1:], strict=True) if value == math.inf]
    unknown += [NOT_SAID] * (asked.component == NOT_SAID)
    return one.kind.fits(asked) and all(words in one.apart for words in unknown)


#: What a series may be called by, the strictest first.
_CALLED: tuple[Callable[[Series], str], ...] = (
    lambda one: one.uid,
    lambda one: str(one.choice),
    folder_name,
    lambda one: one.description,
    lambda one: one.modality,
)


def _fitting_words(series: Sequence[Series], asked: str) -> list[Series]:
    """Return the series that are called as asked, else those with these words, else with parts of words."""
    low = asked.lower()
    if not low:
        return []
    word = re.compile(rf"(?<![a-z0-9]){re.escape(low)}(?![a-z0-9])")
    found = _called(series, low) or _named(series, word)
    if found or low.isdigit():  # 7 is no part of the folder P07
        return found
    return _named(series, re.compile(re.escape(low)))


def _called(series: Sequence[Series], low: str) -> list[Series]:
    """Return the series that are called so, by the strictest of `_CALLED` by which any is."""
    by_call = ([one for one in series if called(one).lower() == low] for called in _CALLED)
    return next(filter(None, by_call), [])


def _named(series: Sequence[Series], words: re.Pattern[str]) -> list[Series]:
    """Return the series in one of whose names words occur."""
    return [one for one in series if any(words.search(name.lower()) for name in names_of_series(one))]
