"""What a user's own segmentation finds in the synthetic image, against what it finds in the real one.

Both segmentations come from the same tool, run by the user on both images; nothing is segmented here.  As the
organisers of SynthRAD2025 do, only structures that the real image has are scored, over the whole volume.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from chiasm.cohorts.cases import Problem
from chiasm.errors import RunError
from chiasm.evaluation.given_volumes import FolderPair, score_given
from chiasm.evaluation.loading import PredictionFolder
from chiasm.evaluation.rows import Row
from chiasm.metrics.structures import dice, hausdorff_95
from chiasm.names import is_plain
from chiasm.prediction.manifest import Entry
from chiasm.storage import read_json
from chiasm.volumes import Volume, check_pair, read_volume

NAMES = "labels.json"  # beside the real segmentations: structure to label value, or values
CONVENTION = "segmentations (structures that the real image has; whole volume; HD95 in mm)"
ALL = "structures"  # region of the means over structures
MOST_STRUCTURES = 512

Structures = Mapping[str, tuple[int, ...]]


def read_names(folder: Path) -> Structures:
    """Read which label values make a structure; empty where each value is one of its own.

    Args:
        folder: Of the real segmentations.

    Raises:
        RunError: If `labels.json` is damaged, or holds something other than names with positive whole numbers.
    """
    path = folder / NAMES
    if not path.is_file():
        return {}
    content = read_json(path)
    named = {name: tuple(_values(given)) for name, given in content.items()} if isinstance(content, Mapping) else {}
    for name, values in named.items():
        if not is_plain(name) or not values or min(values) < 1:
            named = {}
            break
    if not named or len(named) > MOST_STRUCTURES:
        raise RunError(
            "does not name structures",
            path=path,
            reason="labels",
            expected='names with label values above 0, such as {"liver": 5, "lungs": [10, 11]}',
        )
    return named


def _values(given: object) -> Iterator[int]:
    """Yield label values; 0, which is none, in the place of anything else."""
    for value in given if isinstance(given, list) else [given]:
        yield value if isinstance(value, int) and not isinstance(value, bool) else 0


def score_segmentations(
    given: FolderPair, work: Sequence[tuple[PredictionFolder, Entry]]
) -> tuple[list[Row], list[Problem]]:
    """Score the structures of each predicted case.

    Args:
        given: Folders of label maps; `labels.json` beside the real ones may name structures.
        work: Predicted cases, each with the folder that it lies in.

    Returns:
        Rows of Dice and HD95 for each structure, and their means over the case's structures; and problems.

    Raises:
        RunError: As `read_names`.
    """
    names, read = read_names(given.real), partial(read_volume, labels=True)
    return score_given(
        given,
        work,
        lambda synthetic, real: compare(read(synthetic), read(real), names),
        kind="segmentation",
        convention=CONVENTION,
    )


def compare(synthetic: Volume, real: Volume, names: Structures) -> dict[str, dict[str, float]]:
    """Score each structure that the real image has, and average over these.

    Args:
        synthetic: Label map of the synthetic image.
        real: Label map of the real image, on the same grid.
        names: Label values of each structure; empty makes each value above 0 a structure.

    Returns:
        Scores "dice" and "hd95" (mm) by region; `ALL` is their mean.  A structure that the synthetic image lacks has
        Dice 0 and no HD95 (NaN), and counts in the mean of Dice alone.  Empty where the real image has none.

    Raises:
        VolumeError: If the grids differ.
        RunError: If there are more structures than `MOST_STRUCTURES`.
    """
    made = check_pair(real, synthetic, a_name="real segmentation", b_name="synthetic segmentation", labels=True)
    present = [int(value) for value in np.unique(real.array) if value > 0]
    wanted = names or {str(value): (value,) for value in present[: MOST_STRUCTURES + 1]}
    if len(wanted) > MOST_STRUCTURES:
        raise RunError(
            "the real segmentation holds too many values for structures",
            reason="labels",
            found=len(present),
            expected=f"{MOST_STRUCTURES} or fewer",
        )
    found: dict[str, dict[str, float]] = {}
    for name, values in wanted.items():
        if set(values) & set(present):
            masks = [np.isin(volume.array, values) for volume in (made, real)]
            distance_mm = hausdorff_95(masks[0], masks[1], real.geometry.spacing_mm)
            found[f"structure {name}"] = {"dice": dice(masks[0], masks[1]), "hd95": distance_mm}
    if not found:
        return {}
    means = {metric: _mean([scores[metric] for scores in found.values()]) for metric in ("dice", "hd95")}
    return {ALL: means, **found}


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan
