"""The parameters of a QIDO-RS search, and whether attributes match them.

Reference:
    DICOM PS3.18, 8.3.4 (query parameters); PS3.4, C.2.2.2 (matching).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from chiasm.serving.dicomweb_results import INSTANCE, SERIES, STUDY, Attributes
from chiasm.serving.web_gate import WebError

Level = Literal["studies", "series", "instances"]

#: The attributes that may be searched for, by what is listed.
SEARCHED: Mapping[Level, tuple[str, ...]] = {
    "studies": (*STUDY, "ModalitiesInStudy"),
    "series": (*STUDY, *SERIES),
    "instances": (*STUDY, *SERIES, *INSTANCE),
}
IGNORED = ("includefield", "fuzzymatching")  # all that is known is returned; a fuzzy match is an exact one
LARGEST = 10**9


class Wanted(NamedTuple):
    """A search.

    Attributes:
        values: What attributes must match, by their tags.
        limit: Most results.
        offset: Results that are passed over.
    """

    values: Mapping[str, str]
    limit: int
    offset: int


def parse_search(parameters: Iterable[tuple[str, str]], level: Level) -> Wanted:
    """Read the parameters of a search: attributes by keyword or tag, `limit` and `offset`.

    Raises:
        WebError: If one is unknown or no number.

    >>> parse_search([("PatientID", "7*"), ("0020000d", "1.2"), ("limit", "5")], "studies")
    Wanted(values={'00100020': '7*', '0020000D': '1.2'}, limit=5, offset=0)
    """
    from pydicom.datadict import tag_for_keyword

    known = {word: f"{tag_for_keyword(word):08X}" for word in SEARCHED[level]}
    known |= {tag: tag for tag in known.values()}
    values: dict[str, str] = {}
    numbers = {"limit": LARGEST, "offset": 0}
    for name, value in parameters:
        tag = known.get(name) or known.get(name.upper())
        if name in numbers:
            numbers[name] = _number(name, value)
        elif tag:
            values[tag] = value
        elif name not in IGNORED:
            hint = f"It may have limit, offset, includefield, and {', '.join(SEARCHED[level])}."
            raise WebError(400, f"the search of {level} has a parameter that is not known", "search", hint)
    return Wanted(values, numbers["limit"], numbers["offset"])


def _number(name: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise WebError(400, f"{name} is no whole number", "search", "Give a number of at most 9 digits.")
    return int(value)


def matches(said: Attributes, wanted: Mapping[str, str]) -> bool:
    """Return whether attributes match a search: by lists of UIDs, ranges of dates and times, and wildcards.

    >>> said = {"00080020": {"vr": "DA", "Value": ["20240229"]}, "00100020": {"vr": "LO", "Value": ["QX-7"]}}
    >>> matches(said, {"00080020": "20240101-", "00100020": "qx*"})
    False
    >>> matches(said, {"00080020": "20240101-", "00100020": "QX-?"})
    True
    """
    return all(_matches(said.get(tag, {}), text) for tag, text in wanted.items())


def _matches(attribute: Mapping[str, object], wanted: str) -> bool:
    """Return whether one of the values of an attribute matches."""
    if wanted in ("", "*"):  # universal matching
        return True
    given, vr = attribute.get("Value"), str(attribute.get("vr"))
    values = given if isinstance(given, list) else []
    texts = (str(one.get("Alphabetic", "")) if isinstance(one, dict) else str(one) for one in values)
    return any(_matches_one(text, vr, wanted) for text in texts)


def _matches_one(text: str, vr: str, wanted: str) -> bool:
    if vr == "UI":
        return text in re.split(r"[,\\]", wanted)
    if vr in ("DA", "TM") and "-" in wanted:
        first, _, last = wanted.partition("-")
        return first <= text <= (last or text) + "~"  # 12~ is later than 120500
    pattern = wanted.replace("[", "[[]")
    return fnmatchcase(*((text.lower(), pattern.lower()) if vr == "PN" else (text, pattern)))
