"""Which kind of MR image each DICOM image is: magnitude or phase, echo time, inversion time, b-value.

A series may hold images of several kinds, for example the magnitude and the
phase of one scan.  They show different things and make no volume together.
Times of acquisition or triggers, and echo times that differ by rounding, make
no kind.

Reference: DICOM PS3.3, C.8.3.1 and C.8.13.3 (MR images).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from chiasm.volumes.dicom_files import text

if TYPE_CHECKING:
    from pydicom import Dataset

APART = 0.01  # relative difference above which two times or b-values are not the same
COMPONENTS = ("magnitude", "phase", "real", "imaginary")
ADC = "adc"  # a map of the apparent diffusion coefficient, which has no b-value of its own
OTHER = "other"  # an ImageType that is none of these
NOT_SAID = "component unknown"
#: Components that no modality is read from unless they are asked for.
NO_CONTRAST = ("phase", "real", "imaginary", ADC)
#: What a later value of ImageType says of the component: by itself, or before an underscore, as in M_FFE.
LETTERS = {"M": "magnitude", "P": "phase", "R": "real", "I": "imaginary"}
WORDS = {**LETTERS, **{name.upper(): name for name in COMPONENTS}, "PHASE MAP": "phase", "VELOCITY MAP": "phase"}
KIND_TAGS = ("Modality", "ImageType", "ComplexImageComponent", "EchoTime", "InversionTime", "DiffusionBValue")

#: What `parse_kind` reads in the words for a series, such as "phase", "TE=30", "b = 1000" or "TI unknown".
_NUMBER = re.compile(r"(?<![a-z0-9])(te|ti|b)(?:\s*=\s*(\d+(?:\.\d+)?)\s*(?:ms\b)?|\s+unknown\b)", re.IGNORECASE)
_COMPONENT = re.compile(rf"(?<![a-z0-9])({'|'.join((*COMPONENTS, ADC, OTHER, NOT_SAID))})(?![a-z0-9])", re.IGNORECASE)
_ADC = re.compile(r"ADC(?![A-Z0-9])")


class ImageKind(NamedTuple):
    """The kind of an MR image; images of other modalities are all of the empty kind.

    Attributes:
        component: Of `COMPONENTS`, "adc", "other", or "" where nothing is said.
        te: Echo time, ms, or None.
        ti: Inversion time, ms, or None.
        b: Diffusion b-value, s/mm2, or None.

    Where a user asks for a kind, `component` may be "component unknown", and an infinite number asks for images
    that do not state it.
    """

    component: str = ""
    te: float | None = None
    ti: float | None = None
    b: float | None = None

    def fits(self, asked: ImageKind) -> bool:
        """Return whether it is of the kind that is asked for; fields that are not asked for may have any value."""
        numbers = zip(asked[1:], self[1:], strict=True)
        return all(_fits(wish, has) for wish, has in numbers) and asked.component in ("", self.component or NOT_SAID)


UNKNOWN = ImageKind()


class Group(NamedTuple):
    """Images of one kind.

    Attributes:
        words: What distinguishes them from the others, "" where there are no others.
        kind: Theirs.
        places: Indices of its images, from 0.
    """

    words: str
    kind: ImageKind
    places: tuple[int, ...]


def kind_of(dataset: Dataset, group: Callable[[str], Dataset | None]) -> ImageKind:
    """Read the kind of one image.

    Args:
        dataset: Its file's, with the attributes of `KIND_TAGS`.
        group: Finds a functional group of the image, or the data set itself in a file of one image.
    """
    if text(dataset, "Modality") != "MR":
        return UNKNOWN

    def value(name: str, attribute: str, plain: str) -> float | None:
        holder = group(name)
        found = "" if holder is None else text(holder, attribute)
        return _number(found or text(dataset, plain))

    return ImageKind(
        _component(dataset, group("MRImageFrameTypeSequence") or dataset),
        value("MREchoSequence", "EffectiveEchoTime", "EchoTime") or None,  # 0 stands for an unknown time
        value("MRModifierSequence", "InversionTimes", "InversionTime") or None,
        0.0 if _undirected(group("MRDiffusionSequence")) else value("MRDiffusionSequence", *["DiffusionBValue"] * 2),
    )


def split_kinds(kinds: Sequence[ImageKind]) -> list[Group]:
    """Group images by kind.

    An image that does not say its component or a time goes with the others if
    these are all of one kind, and is a kind of its own if not.  Where any image
    is weighted by diffusion, one without a b-value, such as a map, is a kind of its own.

    Args:
        kinds: Of each image.

    Returns:
        At least one group, in the order of component, echo time, inversion time and b-value.

    >>> five = [ImageKind("magnitude", 5), ImageKind("phase", 5), ImageKind("magnitude", 5.01)]
    >>> [(one.words, one.places) for one in split_kinds(five)]
    [('magnitude', (0, 2)), ('phase', (1,))]
    >>> [one.words for one in split_kinds([ImageKind("magnitude", 5), ImageKind("magnitude", 10)])]
    ['TE=5', 'TE=10']
    """
    components, te, ti, b = zip(*kinds, strict=True)
    columns = [
        _components_apart(components),
        _numbers_apart("TE", te),
        _numbers_apart("TI", ti),
        _numbers_apart("b", b, alone=any(b)),
    ]
    groups: dict[tuple[tuple[float, str], ...], list[int]] = defaultdict(list)
    for place, marks in enumerate(zip(*columns, strict=True)):
        groups[marks].append(place)
    return [
        Group(" ".join(word for _, word in marks if word), kinds[places[0]], tuple(places))
        for marks, places in sorted(groups.items())
    ]


def parse_kind(words: str) -> tuple[ImageKind, str]:
    """Read the kind that words ask for, and return the words that are left.

    >>> parse_kind("ax t2 TE=90 ms Phase")
    (ImageKind(component='phase', te=90.0, ti=None, b=None), 'ax t2')
    >>> parse_kind("adc b unknown")
    (ImageKind(component='adc', te=None, ti=None, b=inf), '')
    """
    numbers = {name.lower(): float(value or math.inf) for name, value in _NUMBER.findall(words)}
    left = _NUMBER.sub(" ", words)
    components = _COMPONENT.findall(left)
    left = " ".join(_COMPONENT.sub(" ", left).replace(",", " ").split())
    return ImageKind(components[0].lower() if components else "", **numbers), left


def is_kind_word(name: str) -> bool:
    """Return whether what stands before an equals sign asks for a kind of image, and names no modality."""
    return name.strip().lower() in ("te", "ti", "b")


def _component(dataset: Dataset, frame: Dataset) -> str:
    """Return the first component that an image, or else its file, names in so many words."""
    for holder, attribute in ((frame, "FrameType"), (dataset, "ImageType")):
        said = text(holder, "ComplexImageComponent").lower()
        if found := said if said in COMPONENTS else _component_among(_types(holder, attribute)):
            return found
    return OTHER if any(_types(dataset, "ImageType")[:1]) else ""


def _types(holder: Dataset, attribute: str) -> list[str]:
    """Return the words of an image type behind the two that every image has."""
    return text(holder, attribute).upper().split("\\")[2:]


def _component_among(types: Sequence[str]) -> str:
    """Return the component that words of an image type name first, or that they are of a map of diffusion."""
    if any(map(_ADC.match, types)):
        return ADC
    named = (WORDS.get(word) or LETTERS.get(word[:1] if word[1:2] == "_" else "") for word in types)
    return next(filter(None, named), "")


def _undirected(diffusion: Dataset | None) -> bool:
    """Say whether a frame of a multi-frame image says of itself that no diffusion weighs it."""
    return diffusion is not None and text(diffusion, "DiffusionDirectionality").upper() == "NONE"


def _number(written: str) -> float | None:
    """Return the first of the values of an attribute, or None where it is no number or less than 0."""
    try:
        value = float(written.partition("\\")[0])
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _fits(wish: float | None, has: float | None) -> bool:
    if wish is None:
        return True
    return wish == math.inf if has is None else not _apart(wish, has)


def _apart(one: float, other: float) -> bool:
    return abs(one - other) > APART * min(one, other) * (1 + 1e-9)


def _components_apart(components: Sequence[str]) -> list[tuple[float, str]]:
    """Return, for each image, a place in an order and the word that distinguishes it, "" where all are alike."""
    order = (*COMPONENTS, ADC, OTHER, "")
    if len(set(components) - {""}) < 2:
        return [(0.0, "")] * len(components)
    return [(float(order.index(name)), name or NOT_SAID) for name in components]


def _numbers_apart(name: str, values: Sequence[float | None], *, alone: bool = False) -> list[tuple[float, str]]:
    """As `_components_apart`, for numbers, of which neighbours are alike that are close to one another.

    With `alone`, one that is not said is like no other.
    """
    start = _starts({value for value in values if value is not None})
    if len(set(start.values())) + (alone and None in values) < 2:
        return [(0.0, "")] * len(values)
    start[None] = math.inf
    return [(start[value], f"{name} unknown" if value is None else f"{name}={start[value]:g}") for value in values]


def _starts(numbers: Collection[float]) -> dict[float | None, float]:
    """Return, for each number, the least of those that are alike, neighbour by neighbour."""
    start: dict[float | None, float] = {}
    first = before = min(numbers, default=0.0)
    for value in sorted(numbers):
        first = value if _apart(before, value) else first
        start[value], before = first, value
    return start
