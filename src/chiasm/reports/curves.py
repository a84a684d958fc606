"""Training curves, and sentences on both discriminators and the attention."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chiasm.reports.drawing import BAND, DASHES, INK, MUTED, SERIES, Points, draw_svg, show_number
from chiasm.reports.pages import Remark
from chiasm.storage import read_log

MOST_POINTS = 200  # of a drawn curve; longer ones are averaged in blocks
HEALTHY_ACCURACY = (0.55, 0.97)  # below, a discriminator knows nothing; above, everything
LEAST_USEFUL = 0.2  # rank correlation with the error, below which a map is of little use
FLAT_RATIO = 0.05  # a lesion:healthy weight ratio within 1 +- this is no attention
MOST_CLOSED = 0.1  # share of the steps with attention, above which a closed health gate is worth a remark

History = Sequence[Mapping[str, Any]]


class Curve(NamedTuple):
    """The place of a curve's values in `log.jsonl`: the kind of line, and the name in it."""

    kind: str
    name: str


class Panel(NamedTuple):
    """One plot of curves, by their labels."""

    title: str
    note: str
    curves: Mapping[str, Curve]
    limits: tuple[float, float] | None = None
    band: tuple[float, float] | None = None
    level: float | None = None


OF_ATTENTION = Panel(
    "What the attention does",
    "How many times more lesions weigh than healthy tissue (1: no attention), and the strength of the attention.",
    {"lesion : healthy": Curve("validation", "weight_ratio"), "strength": Curve("step", "attention_strength")},
    level=1.0,
)
PANELS = (
    Panel(
        "Validation error",
        "Mean absolute error on validation cases in normalised units.",
        {
            "mask": Curve("validation", "mae"),
            "lesions": Curve("validation", "lesion_mae"),
            "mask, look-up": Curve("validation", "lookup_mae"),
            "mask, before the refiner": Curve("validation", "first_mae"),
        },
    ),
    Panel(
        "Generator: loss",
        "On training patches: the difference from the target, and what the discriminators add. "
        "A refiner has its own loss.",
        {
            "reconstruction": Curve("step", "reconstruction"),
            "adversarial": Curve("step", "adversarial"),
            "refiner": Curve("step", "refinement"),
        },
    ),
    Panel(
        "Discriminators: accuracy",
        "Share of real and synthetic images that they recognise: 0.5 is guessing, 1 is perfect. "
        "The shaded band is the working range.",
        {"global": Curve("step", "accuracy_global"), "local": Curve("step", "accuracy_local")},
        limits=(0.4, 1.02),
        band=HEALTHY_ACCURACY,
    ),
    Panel(
        "Discriminators: loss",
        "Cross-entropy of recognising real and synthetic images; 1.39 is guessing.",
        {
            "global": Curve("step", "global_discriminator_loss"),
            "second global": Curve("step", "second_discriminator_loss"),
            "local": Curve("step", "local_discriminator_loss"),
        },
        level=2 * math.log(2),
    ),
    Panel(
        "Confidence heads: loss",
        "Cross-entropy of the local discriminator’s confidence heads with the true error, voxel by voxel and smoothed.",
        {"magnitude": Curve("step", "magnitude_loss"), "structured": Curve("step", "structured_loss")},
    ),
    Panel(
        "Does the difficulty know where the error is?",
        "Rank correlation of the difficulty with the true error (0: no relation), and AUROC (0.5: no relation).",
        {
            "correlation": Curve("validation", "spearman"),
            "with smoothed error": Curve("validation", "spearman_smoothed"),
            "AUROC worst tenth": Curve("validation", "auroc_worst"),
            "AUROC lesion": Curve("validation", "auroc_lesion"),
        },
        level=0.0,
    ),
    OF_ATTENTION,
)


def read_history(path: Path) -> list[dict[str, Any]]:
    """Read a training's `log.jsonl` without its damaged lines; empty where there is none.

    Version 0.1 called discriminators judges.

    Raises:
        RunError: If it cannot be read.
    """
    lines = read_log(path)[0]
    return [{name.replace("_judge_", "_discriminator_"): value for name, value in line.items()} for line in lines]


def logged_warnings(history: History) -> list[str]:
    """Return each logged warning once, with its last step."""
    last = {str(line["message"]): line["step"] for line in history if line["kind"] == "warning"}
    return [f"In training, last at step {step}: {message}." for message, step in last.items()]


class Point(NamedTuple):
    """A value of the training's log, and the step after which it was taken."""

    step: int
    value: float


def find_points(history: History, curve: Curve) -> list[Point]:
    """Find the finite values of a curve."""
    found = ((line["step"], find_value(line, curve.name)) for line in history if line["kind"] == curve.kind)
    return [Point(step, value) for step, value in found if value is not None]


def find_value(line: Mapping[str, Any], name: str) -> float | None:
    """Return a finite score of a line of the log, or None where the line has none of this name."""
    value = line.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None


# Curves


def draw_curves(history: History) -> list[dict[str, str]]:
    """Draw each panel that has at least one curve of two points; that of the attention only if there was attention."""
    attends = bool(_strengths(history))
    found = ((panel, _drawable(history, panel)) for panel in PANELS if attends or panel is not OF_ATTENTION)
    return [
        {"title": panel.title, "note": panel.note, "svg": _draw_panel(panel, curves)}
        for panel, curves in found
        if curves
    ]


def _drawable(history: History, panel: Panel) -> dict[str, Points]:
    """Collect the curves of a panel that have two points or more, by their labels; none of a loss that is not used."""
    found = {label: collect_points(history, curve) for label, curve in panel.curves.items()}
    return {
        label: points
        for label, points in found.items()
        if len(points) > 1 and (label != "adversarial" or points[:, 1].any())
    }


def collect_points(history: History, curve: Curve) -> Points:
    """Collect a curve's (step, value) pairs, averaged in blocks when they are many, shape (points, 2)."""
    points = np.array(find_points(history, curve), dtype=np.float64).reshape(-1, 2)
    if len(points) <= MOST_POINTS:
        return points
    return np.array([block.mean(axis=0) for block in np.array_split(points, MOST_POINTS)])


def _draw_panel(panel: Panel, found: Mapping[str, Points]) -> str:
    def draw(axes: Any) -> None:
        if panel.band:
            axes.axhspan(*panel.band, color=BAND, linewidth=0)
        if panel.level is not None:
            axes.axhline(panel.level, color=MUTED, linewidth=0.8)
        _plot_curves(axes, found)
        axes.set_xlabel("step")
        _set_limits(axes, panel, found)
        axes.margins(x=0.02)
        _name_curves(axes, list(found))

    ends = (f"{label}: from {show_number(y[0, 1])} to {show_number(y[-1, 1])}." for label, y in found.items())
    return draw_svg(draw, f"{panel.title} over training steps. {' '.join(ends)}", (4.4, 3.0), panel.title)


def _plot_curves(axes: Any, found: Mapping[str, Points]) -> None:
    for (label, points), colour, dash in zip(found.items(), SERIES, DASHES):
        marker = "o" if len(points) <= 20 else None
        axes.plot(*points.T, color=colour, linestyle=dash, linewidth=1.7, marker=marker, markersize=3.5, label=label)


def _set_limits(axes: Any, panel: Panel, found: Mapping[str, Points]) -> None:
    """Take the panel's limits; without any, begin at 0 unless a value lies below it."""
    if panel.limits:
        axes.set_ylim(*panel.limits)
    elif min(points[:, 1].min() for points in found.values()) >= 0:
        axes.set_ylim(bottom=0)


def _name_curves(axes: Any, labels: Sequence[str]) -> None:
    """Name a single curve above the plot, several in a legend."""
    if len(labels) > 1:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, labelcolor=INK, handlelength=2.6)
    else:
        axes.set_title(labels[0], loc="left", color=INK, fontsize=9)


# Health, in words


def describe_health(history: History) -> list[Remark]:
    """Describe the discriminators and, of a training with attention, the attention in sentences with a tone."""
    described = (*HEALTH, *ATTENTION) if _strengths(history) else HEALTH
    last = [(describe, _last(history, *names)) for names, describe in described]
    return [*(describe(value) for describe, value in last if value is not None), *_describe_gate(history)]


def _describe_discriminator(name: str, accuracy: float) -> Remark:
    lowest, highest = HEALTHY_ACCURACY
    shown = f"(accuracy {accuracy:.2f})"
    if accuracy < lowest:
        return Remark(
            "mixed", f"The {name} discriminator ended near guessing {shown}: the generator learnt little from it."
        )
    if accuracy > highest:
        return Remark("mixed", f"The {name} discriminator ended saturated {shown}: it recognised nearly every image.")
    return Remark("good", f"The {name} discriminator ended in its working range {shown}.")


def _describe_difficulty(rho: float) -> Remark:
    shown = f"(rank correlation of its difficulty map and the error: {rho:.2f})"
    if rho <= 0:
        return Remark(
            "bad", f"The local discriminator does not find the errors, so the attention weighs wrong voxels {shown}."
        )
    if rho < LEAST_USEFUL:
        return Remark("mixed", f"The local discriminator hardly finds the errors {shown}.")
    return Remark("good", f"The local discriminator finds the errors: its difficulty map is higher there {shown}.")


def _describe_weights(ratio: float) -> Remark:
    if abs(ratio - 1) <= FLAT_RATIO:
        return Remark("bad", f"The attention does not favour lesions: they weigh {ratio:.2f} times healthy tissue.")
    if ratio < 1:
        return Remark("bad", f"The attention neglects lesions: they weigh {ratio:.2f} times healthy tissue.")
    return Remark("good", f"The attention gives lesions {ratio:.2f} times the weight of healthy tissue.")


def _describe_gate(history: History) -> list[Remark]:
    """Describe in how many steps a check of the local discriminator switched the attention off, if in some."""
    strengths = _strengths(history)
    closed = strengths.count(0) / max(1, len(strengths))
    why = "a check found that the local discriminator could not be trusted"
    if closed == 1:
        return [Remark("bad", f"The attention was never used: {why}.")]
    if closed > MOST_CLOSED:
        return [Remark("mixed", f"The attention was off in {100 * closed:.0f} % of its logged steps: {why}.")]
    return []


def _strengths(history: History) -> list[float]:
    """Return the strength of the attention in each logged step with attention; none of a method without attention."""
    return [value for line in history if (value := find_value(line, "attention_strength")) is not None]


#: Names in the log, and the function that describes the last finite value of the first name that has one.
HEALTH: tuple[tuple[tuple[str, ...], Callable[[float], Remark]], ...] = (
    (("accuracy_global",), partial(_describe_discriminator, "global")),
    (("accuracy_local",), partial(_describe_discriminator, "local")),
)
ATTENTION: tuple[tuple[tuple[str, ...], Callable[[float], Remark]], ...] = (
    (("spearman_smoothed", "spearman"), _describe_difficulty),
    (("weight_ratio",), _describe_weights),
)


def _last(history: History, *names: str) -> float | None:
    """Find the last finite value under any of `names`, in the order of preference."""
    values = (find_value(line, name) for name in names for line in reversed(history))
    return next((value for value in values if value is not None), None)
