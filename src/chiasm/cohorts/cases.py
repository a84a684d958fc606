"""One subject's files, and a folder's worth of them: paths only, nothing is read here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """The files of one examination of one subject.

    Attributes:
        id: Unique in its cohort and safe as a file name.
        subject: The person: the unit of every split and of every statistic.
        images: Modality ("t1", "t2", "ct", ...) to file.
        mask: Valid voxels (brain or body), or None: derived from the source.
        labels: Label map whose regions the cohort names, or None.
        site: Hospital or scanner, where the layout tells.
        split: "train", "validation" or "test" where a manifest fixes it.
    """

    id: str
    subject: str
    images: Mapping[str, Path]
    mask: Path | None = None
    labels: Path | None = None
    site: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Problem:
    """Why a file or a case is not used.

    Attributes:
        path: The file or folder.
        reason: A short code, such as "no-pair" or "truncated".
        message: One sentence for people.
        case: The case's id, where it is known.
    """

    path: Path
    reason: str
    message: str
    case: str | None = None


@dataclass(frozen=True)
class Cohort:
    """What was found in a folder.

    Attributes:
        root: The folder.
        layout: Name of the layout that was recognised, such as "brats-2018".
        cases: Cases in the order of their ids.
        regions: Region name to the label values that make it, such as
            "WT" to (1, 2, 4); empty where there are no label maps.
        problems: What was found and is not used, with reasons.
    """

    root: Path
    layout: str
    cases: tuple[Case, ...]
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
