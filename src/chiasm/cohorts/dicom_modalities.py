"""Which modality a DICOM series is, if its folder, header or description allows only one."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from chiasm.cohorts.cases import ALIASES, MODALITIES, only, role_of
from chiasm.volumes.dicom_choice import folder_name
from chiasm.volumes.dicom_series import Series

WITH_AGENT = {"ce", "gd", "gad", "gado", "post", "postcontrast", "contrast", "km", "c"}
#: Words of descriptions of what is no plain contrast.
NO_PLAIN_CONTRAST = {
    "star", "swi", "dwi", "adc", "trace", "map", "dti", "perf", "perfusion", "bold", "mra", "tof", "pc",
}  # fmt: skip
#: In a header, what no series of another modality has; "OT" and others may be anything.
EXCLUDING = {"CT", "MR", "PT", "NM", "US", "SEG", "RTDOSE"}
WEIGHTINGS = {"t1", "t1ce", "t2", "flair", "pd"}


def guess_modality(series: Series, scans: Sequence[Series]) -> str | None:
    """Guess a modality if folder, header or description allow only one; None if not, and for phase and maps.

    Args:
        series: One of
        scans: all scans of its patient.
    """
    return None if series.shows_no_contrast else modality_of(series, scans)


def modality_of(series: Series, scans: Sequence[Series]) -> str | None:
    """Guess a modality as `guess_modality` does, also of phase and maps.

    Args:
        series: One of
        scans: all scans of its patient.
    """
    by_folder = role_of(last_word(folder_name(series)))
    if by_folder in MODALITIES and not other_modality(series, by_folder):
        return by_folder
    if series.modality == "MR":
        return _contrast_of_mr(series, scans)
    return "ct" if series.modality == "CT" else None


def header_modality(modality: str) -> str:
    """Return the DICOM modality of images of one of `MODALITIES`.

    >>> header_modality("cbct"), header_modality("flair")
    ('CT', 'MR')
    """
    return "CT" if modality in ("ct", "cbct") else "MR"


def other_modality(series: Series, modality: str) -> str:
    """Return the modality in a header that excludes another one, such as CT for t1; "" where it does not.

    Args:
        series: With the modality of its header.
        modality: That it is to be.
    """
    is_other = modality in MODALITIES and series.modality in EXCLUDING - {header_modality(modality)}
    return series.modality if is_other else ""


def _contrast_of_mr(series: Series, scans: Sequence[Series]) -> str | None:
    """Return the weighting that a description names; without one, "mr" if it is the patient's only MR."""
    return _weighting(series) or ("mr" if _is_only_mr(series, scans) else None)


def last_word(name: str) -> str:
    """Return the last word of a name.

    >>> last_word("P07_T1c"), last_word("P07")
    ('T1c', 'P07')
    """
    return re.split(r"[_\-. ]", name)[-1]


def _weighting(series: Series) -> str | None:
    """Return the one weighting that the words of a description name."""
    text = series.description.lower() or series.protocol.lower()
    words = set(re.split(r"[^a-z0-9*]+", text))
    if words & NO_PLAIN_CONTRAST or "*" in text:
        return None
    found = _weightings_among(words)
    if found == {"t1"} and (series.contrast or words & WITH_AGENT):
        return "t1ce"
    return only(found)


def _weightings_among(words: Collection[str]) -> set[str]:
    """Return the weightings that words name; the description of a FLAIR may also contain T2."""
    found = {ALIASES.get(word, word) for word in words} & WEIGHTINGS
    return found - {"t2"} if "flair" in found else found


def _is_only_mr(series: Series, scans: Sequence[Series]) -> bool:
    """Return whether a patient has no other MR; images of one series that are listed apart count as one."""
    others = [one for one in scans if one.modality == "MR" and not (one.apart and one.uid == series.uid)]
    return len(others) == (0 if series.apart else 1)
