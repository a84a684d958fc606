"""`chiasm explain`: what was chosen and why, what happened in training, where the model is weak, what to try next.

All numbers come from files: the plan, the split, the training's log and times,
the scores and the manifest of predictions.  The same words open the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from chiasm.cohorts.cases import grouped
from chiasm.evaluation.claims import WORDS
from chiasm.methods import title_of
from chiasm.names import amount, three_digits
from chiasm.prediction.manifest import warn_of_seen
from chiasm.preparation.plan import FITTED, Plan
from chiasm.reports.advice import advise, errors_by_site
from chiasm.reports.curves import Point, describe_health, logged_warnings
from chiasm.reports.drawing import with_unit
from chiasm.reports.evidence import Evidence, is_size, read_evidence
from chiasm.reports.naive_comparison import BaselineComparison
from chiasm.reports.tables import name_some

SIZES = ("small", "medium", "large")  # of lesions
CALLED = {
    "mask_rule": "Mask",
    "spacing_mm": "Voxels in mm",
    "dims": "Dimensions",
    "slices": "Slices",
    "plane": "Plane of the slices",
    "patch": "Patch in voxels",
    "source_kinds": "Intensities of the source",
    "target_kind": "Intensities of the target",
    "lookup": "Look-up",
}  # choices of a plan, for people; others keep their names
NOT_NAMED = ("trained_on", "target_range")  # of the plan's reasons: counted above, or no choice
NAMED = 4  # cases that are named
REGIONS_NAMED = 3
LOSSES = {"reconstruction": "reconstruction loss", "loss": "loss"}  # of the log; the first that it holds is quoted


class Part(NamedTuple):
    """A part of an explanation.

    Attributes:
        heading: What it is about.
        sentences: In an order to be read in.
    """

    heading: str
    sentences: tuple[str, ...]


def explain(place: Path) -> tuple[Part, ...]:
    """Explain in words what was chosen and why, how the training went, where the model is weak, and what to try next.

    Args:
        place: What `chiasm run`, `train` or `evaluate` wrote, or a model folder.

    Raises:
        RunError: If it is none of these, or a file is damaged.
    """
    return explain_evidence(read_evidence(Path(place)))


def explain_evidence(found: Evidence) -> tuple[Part, ...]:
    """Explain evidence that was gathered already."""
    comparisons = found.comparisons
    parts = (
        Part("In short", tuple(_in_short(found, comparisons))),
        Part("Chosen", tuple(_chosen(found))),
        Part("In training", tuple(_in_training(found))),
        Part("Where it is weak", tuple(_weak(found, comparisons))),
    )
    return tuple(part for part in parts if part.sentences)


def _in_short(found: Evidence, comparisons: Sequence[BaselineComparison]) -> Iterator[str]:
    """Say what was made, how good it is, where it is weakest, and what to try next."""
    yield _made(found)
    yield from (f"{said}." for said in warn_of_seen(found.seen, len(found.entries)))
    yield from (_against(one) for one in comparisons if one.region == "mask")
    if comparisons:
        yield _weakest(comparisons)
    yield advise(found)


def _made(found: Evidence) -> str:
    plan, recipe = found.plan, found.recipe
    several = f"Each of {recipe.split.models} models, " if recipe.split.models != 1 else ""
    several = f"{found.averaged}, the first of them " if found.averaged else several
    return (
        f"{several}{title_of(recipe.method)} of size {recipe.size}, {recipe.schedule.steps} steps, "
        f"makes {plan.target} of {' + '.join(plan.sources)}."
    )


def _weakest(comparisons: Sequence[BaselineComparison]) -> str:
    """Name the part in which the method's error is largest beside that of the best baseline."""
    parts = [one for one in comparisons if _is_part(one.region) and one.claim != "better"]
    if not parts:
        return "No part of the image is weak: in each, the method is better than the best baseline."
    weakest = max(parts, key=_lag)
    return f"Weakest part: {_against(weakest)}"


def _chosen(found: Evidence) -> Iterator[str]:
    plan, split = found.plan, found.recipe.split
    if found.roles_in_words:
        fold = f"{split.described}, by {split.by}"
        yield f"Cases: {found.roles_in_words} ({fold})."
    if found.planes:
        yield f"{CALLED['plane']}: {found.planes}; models that see different planes err less alike."
    for name in plan.reasons:
        if name not in NOT_NAMED and not (name == "plane" and found.planes):
            yield _choice(plan, name)


def _choice(plan: Plan, name: str) -> str:
    """Describe a choice with its reason; of a fitted table, only the reason."""
    value = "" if name in FITTED else f"{_plain(getattr(plan, name, None))}; "
    return f"{CALLED.get(name, name)}: {value}{plan.reasons[name]}."


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return " x ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _in_training(found: Evidence) -> Iterator[str]:
    for label, model in found.models.items():
        yield from (f"{label}{sentence}" for sentence in _learning(model))
    if found.seconds:
        stages = ", ".join(f"{stage} {_duration(seconds)}" for stage, seconds in found.seconds.items())
        yield f"Time{' of all models' if found.others else ''}: {stages}.{_pace(found)}"


def _learning(model: Evidence) -> Iterator[str]:
    """Describe how the training of one model went."""
    yield from _loss(model)
    if validation := model.points("validation", "mae"):
        yield _validation(validation)
    yield from (remark.text for remark in describe_health(model.history))
    yield from logged_warnings(model.history)


def _loss(found: Evidence) -> Iterator[str]:
    """Describe the course of the first loss in the log."""
    for name, called in LOSSES.items():
        if curve := found.points("step", name):
            yield _ends(called, curve)
            return


def _ends(called: str, curve: list[Point]) -> str:
    """Compare the first tenth of a curve with the last."""
    tenth = max(1, len(curve) // 10)
    first, last = (fmean(point.value for point in some) for some in (curve[:tenth], curve[-tenth:]))
    return f"The {called} went from {first:.3g} to {last:.3g} (means of the first and the last tenth of the log)."


def _validation(curve: list[Point]) -> str:
    best, first, last = min(curve, key=lambda point: point.value), curve[0], curve[-1]
    begun = "before training" if first.step == 0 else f"at step {first.step}"
    return (
        f"The error on validation cases (scaled units) was {first.value:.3g} {begun} and "
        f"{last.value:.3g} at step {last.step}; its lowest was {best.value:.3g} at step {best.step}."
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _pace(found: Evidence) -> str:
    """State the time of a step, if it is known."""
    seconds = found.seconds.get("training")
    models = found.models.values()
    if seconds is None or not all(one.is_finished for one in models):
        return ""
    steps = sum(one.recipe.schedule.steps for one in models)
    return f" A step took {seconds / steps:.2g} s, validations included."


def _weak(found: Evidence, comparisons: Sequence[BaselineComparison]) -> Iterator[str]:
    if not found.rows:
        return
    yield from _regions(comparisons)
    yield from _lesion_sizes(found)
    yield from _by_site(found)
    yield from _unusual_inputs(found)
    yield from _expected_error(found)


def _unusual_inputs(found: Evidence) -> Iterator[str]:
    """Name the inputs that are out of distribution, or state that none is."""
    if found.out_of_distribution:
        yield (
            f"{len(found.out_of_distribution)} of {len(found.entries)} inputs are out of distribution: "
            f"{name_some(found.out_of_distribution, NAMED)}."
        )
    elif found.entries:
        yield f"No input ({len(found.entries)}) is out of distribution."


def _regions(comparisons: Sequence[BaselineComparison]) -> Iterator[str]:
    """Compare the mask with the best baseline, and the parts in which the method is not better, the weakest first."""
    yield from (_against(one) for one in comparisons if one.region == "mask")
    parts = grouped((one for one in comparisons if _is_part(one.region)), lambda one: one.claim == "better")
    behind = sorted(parts.get(False, []), key=_lag, reverse=True)
    yield from map(_against, behind[:REGIONS_NAMED])
    if parts and not behind:
        yield "In every other region it is better than the best baseline."


def _lag(one: BaselineComparison) -> float:
    """Return how much larger the method's error is than the baseline's, percent; the largest where it is undefined."""
    return one.difference.mean if math.isfinite(one.difference.mean) else math.inf


def _is_part(region: str) -> bool:
    """Return whether a region is neither the whole nor the lesions of one size."""
    return region not in ("mask", "image") and not is_size(region)


def _against(one: BaselineComparison) -> str:
    ours, theirs = (with_unit(three_digits(value), one.unit) for value in (one.ours, one.theirs))
    people = amount(one.paired.subjects, "subject")
    return (
        f"{one.region}: mean absolute error {ours} in {people}, {one.difference} against the best baseline "
        f"({one.baseline}, {theirs}): {WORDS[one.claim]}."
    )


def _lesion_sizes(found: Evidence) -> Iterator[str]:
    """State how many lesions of each size are visible in the synthesis."""
    if parts := list(filter(None, (_visible(found, size) for size in SIZES))):
        yield f"Visible in the synthesis, by size of lesion: {', '.join(parts)} (means over cases)."
    if (made_up := found.scores("lesions", "false_lesions")) is not None:
        yield f"Lesions that are not there: {made_up.mean:.3g} for each case."


def _visible(found: Evidence, size: str) -> str:
    """State how many lesions of a size are visible; empty without such lesions."""
    recall = found.scores(f"lesions-{size}", "recall")
    if recall is None:
        return ""
    count = sum(found.of_cases(f"lesions-{size}", "lesions").values())
    return f"{100 * recall.mean:.0f} % of {count:.0f} {size}"


def _by_site(found: Evidence) -> Iterator[str]:
    by_site = errors_by_site(found)
    if len(by_site) > 1:
        sites = ", ".join(
            f"{site} {three_digits(fmean(by_site[site]))} ({len(by_site[site])})" for site in sorted(by_site)
        )
        yield f"Error in the mask by site (cases): {sites}."


def _expected_error(found: Evidence) -> Iterator[str]:
    ratio, rank = found.scores("mask", "calibration"), found.scores("mask", "spearman")
    if ratio is not None and rank is not None:
        yield (
            f"The expected error is {ratio.mean:.2f} times the true one in the mask, "
            f"and orders voxels with a rank correlation of {rank.mean:.2f}."
        )
    if (spread := found.scores("mask", "spread_spearman")) is not None:
        yield f"The spread of the models orders voxels by error with a rank correlation of {spread.mean:.2f}."
