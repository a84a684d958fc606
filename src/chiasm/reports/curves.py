"""Training curves, and how both discriminators and the attention fared, in words."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.reports.drawing import BAND, DASHES, INK, MUTED, SERIES, draw_svg, show_figure
from chiasm.storage import read_log

MOST_POINTS = 200  # of a drawn curve; longer ones are averaged in blocks
HEALTHY_ACCURACY = (0.55, 0.97)  # below, a discriminator knows nothing; above, everything
FLAT_RATIO = 0.05  # a lesion:healthy weight ratio within 1 +- this is no attention


class Panel(NamedTuple):
    """One figure of curves: series are label -> (kind of line, names under which the figure may stand)."""

    title: str
    note: str
    series: Mapping[str, tuple[str, tuple[str, ...]]]
    limits: tuple[float, float] | None = None
    band: tuple[float, float] | None = None
    level: float | None = None


PANELS = (
    Panel(
        "Validation error",
        "Mean absolute error on validation cases in normalised units; the network must come below the look-up.",
        {
            "mask": ("validation", ("mae",)),
            "lesions": ("validation", ("lesion_mae",)),
            "look-up (naive)": ("validation", ("lookup_mae",)),
        },
    ),
    Panel(
        "What the generator is asked for",
        "Its loss on training patches: fidelity to the target, and what the discriminators add.",
        {
            "reconstruction": ("step", ("reconstruction",)),
            "adversarial": ("step", ("adversarial",)),
            "adversarial, global": ("step", ("adversarial_global",)),
            "adversarial, local": ("step", ("adversarial_local",)),
        },
    ),
    Panel(
        "Discriminators: accuracy",
        "Share of real and synthetic told apart: 0.5 is guessing, 1 is knowing all; in the band they teach.",
        {"global": ("step", ("accuracy_global",)), "local": ("step", ("accuracy_local",))},
        limits=(0.4, 1.02),
        band=HEALTHY_ACCURACY,
    ),
    Panel(
        "Discriminators: loss",
        "Of telling real from synthetic; 1.39 is guessing.",
        {
            "global": ("step", ("discriminator_global", "global_judge_loss")),
            "local": ("step", ("discriminator_local", "local_judge_loss")),
        },
        level=2 * math.log(2),
    ),
    Panel(
        "Does the doubt know where the error is?",
        "Rank correlation of the doubt with the true error (0 is no knowledge), and AUROC (0.5 is no knowledge).",
        {
            "correlation": ("validation", ("spearman",)),
            "with smoothed error": ("validation", ("spearman_smoothed",)),
            "AUROC worst tenth": ("validation", ("auroc_worst",)),
            "AUROC lesion": ("validation", ("auroc_lesion",)),
        },
        level=0.0,
    ),
    Panel(
        "What the attention does",
        "How much more lesions weigh than healthy tissue (1 is no attention), and how far it is switched on.",
        {
            "lesion : healthy": ("validation", ("weight_ratio",)),
            "strength": ("step", ("attention_strength",)),
        },
        level=1.0,
    ),
)


def read_history(path: Path) -> list[dict[str, Any]]:
    """Read a training's `log.jsonl` without its damaged lines; empty where there is none.

    Raises:
        RunError: If it cannot be read.
    """
    return read_log(path)[0]


def draw_curves(history: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Draw each panel that has at least one curve of two points."""
    drawn = []
    for panel in PANELS:
        series = {label: _series(history, kind, names) for label, (kind, names) in panel.series.items()}
        series = {label: points for label, points in series.items() if len(points) > 1}
        if series:
            alt = f"{panel.title} over training steps. " + " ".join(
                f"{label}: from {show_figure(points[0, 1])} to {show_figure(points[-1, 1])}."
                for label, points in series.items()
            )
            drawn.append({"title": panel.title, "note": panel.note, "svg": _draw_curves(panel, series, alt)})
    return drawn


def _series(history: Sequence[Mapping[str, Any]], kind: str, names: Sequence[str]) -> NDArray[np.float64]:
    """Collect (step, value) pairs, averaged in blocks when they are many, shape (points, 2)."""
    found = [
        (float(line["step"]), value)
        for line in history
        if line["kind"] == kind
        for name in names
        if (value := _figure(line, name)) is not None
    ]
    points = np.array(found, dtype=np.float64).reshape(-1, 2)
    blocks = np.array_split(points, MOST_POINTS) if len(points) > MOST_POINTS else points[:, None]
    return np.array([block.mean(axis=0) for block in blocks]).reshape(-1, 2)


def _draw_curves(panel: Panel, series: Mapping[str, NDArray[np.float64]], alt: str) -> str:
    def draw(axes: Any) -> None:
        if panel.band:
            axes.axhspan(*panel.band, color=BAND, linewidth=0)
        if panel.level is not None:
            axes.axhline(panel.level, color=MUTED, linewidth=0.8)
        for (label, points), colour, dash in zip(series.items(), SERIES, DASHES):
            marker = "o" if len(points) <= 20 else None
            axes.plot(
                *points.T, color=colour, linestyle=dash, linewidth=1.7, marker=marker, markersize=3.5, label=label
            )
        axes.set_xlabel("step")
        if panel.limits:
            axes.set_ylim(*panel.limits)
        elif min(points[:, 1].min() for points in series.values()) >= 0:
            axes.set_ylim(bottom=0)
        axes.margins(x=0.02)
        if len(series) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, labelcolor=INK, handlelength=2.6)
        else:
            axes.set_title(next(iter(series)), loc="left", color=INK, fontsize=9)

    return draw_svg(draw, alt, (4.4, 3.0), panel.title)


def describe_health(history: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Say how the discriminators and the attention fared, as sentences with a tone."""
    told: list[dict[str, str]] = []

    def say(tone: str, text: str) -> None:
        told.append({"tone": tone, "text": text})

    for name in ("global", "local"):
        accuracy = _last(history, f"accuracy_{name}")
        if accuracy is None:
            continue
        lowest, highest = HEALTHY_ACCURACY
        if accuracy < lowest:
            say("mixed", f"The {name} discriminator ended near guessing (accuracy {accuracy:.2f}): it taught little.")
        elif accuracy > highest:
            say("mixed", f"The {name} discriminator ended saturated (accuracy {accuracy:.2f}): it was never fooled.")
        else:
            say("good", f"The {name} discriminator ended in its working range (accuracy {accuracy:.2f}).")
    rho, ratio = _last(history, "spearman_smoothed", "spearman"), _last(history, "weight_ratio")
    if rho is not None and rho <= 0:
        say("bad", f"The attention is inverted: its doubt does not rise with the error (rank correlation {rho:.2f}).")
    elif rho is not None:
        say(
            "good",
            f"The local discriminator’s doubt rises with the error (rank correlation {rho:.2f}).",
        )
    if ratio is not None and abs(ratio - 1) <= FLAT_RATIO:
        say("bad", f"The attention is inactive on lesions: they weigh {ratio:.2f} times as much as healthy tissue.")
    elif ratio is not None and ratio < 1:
        say("bad", f"The attention is inverted on lesions: they weigh {ratio:.2f} times as much as healthy tissue.")
    elif ratio is not None:
        say("good", f"By the doubt, lesions weigh {ratio:.2f} times as much as healthy tissue.")
    strength = [value for line in history if (value := _figure(line, "attention_strength")) is not None]
    if strength and not any(strength):
        say("bad", "The attention was never switched on: its health gate stayed closed.")
    elif strength and (closed := strength.count(0) / len(strength)) > 0.1:
        say("mixed", f"The health gate kept the attention off in {100 * closed:.0f} % of its logged steps.")
    return told


def _last(history: Sequence[Mapping[str, Any]], *names: str) -> float | None:
    """Find the last finite figure under any of `names`, in the order of preference."""
    for name in names:
        for line in reversed(history):
            if (value := _figure(line, name)) is not None:
                return value
    return None


def _figure(line: Mapping[str, Any], name: str) -> float | None:
    """Return a finite figure of a line, or None where the line has none of this name."""
    value = line.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None


def logged_warnings(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say each logged warning once, with the last step at which it was given."""
    last = {str(line["message"]): line["step"] for line in history if line["kind"] == "warning"}
    return [f"In training, last at step {step}: {message}." for message, step in last.items()]
