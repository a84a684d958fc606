"""How the error grows as a scan gets worse: noise, shading, thick slices, another contrast, a patient who moved.

    chiasm run DATA --source t1 --target t2 -o WORK          # three models share the subjects
    python benchmarks/robustness.py WORK DATA OUT --seconds 300

DATA is a folder in the layout of BraTS.  Each subject is predicted by the model of WORK that never saw it, from sources
that this script makes worse inside the brain, step by step.  Beside it stand MONAI's BasicUNet (`peers.py`), trained
for SECONDS of one thread, and a look-up of 64 bins; each learns from the subjects from which that model could learn.
`levers.judge` scores all of them, in the voxels of the brain that still hold signal.  Rows go to OUT/robustness.csv,
the curves to OUT/robustness.svg; the same command goes on where it stopped.  Changes are from the scan as it is, with
95 % intervals over subjects (bootstrap, BCa); "expected" is the change of the mean expected error in the brain.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from levers import column, judge, read, write_rows
from matplotlib import pyplot
from monai.networks.nets import BasicUNet
from numpy.typing import NDArray
from peers import Scan, fit_lookup, predict_monai, read_scan, scan_of, train_monai
from scipy.ndimage import gaussian_filter, shift, uniform_filter1d
from scipy.stats import bootstrap

from chiasm.cohorts.cases import Case
from chiasm.cohorts.discovery import find_cohort
from chiasm.cohorts.splits import read_splits
from chiasm.prediction.folders import Predictor, load
from chiasm.prediction.model_files import list_parts
from chiasm.volumes import read_volume

FIELDS = ("tool", "harm", "level", "case", "brain", "WT", "kept", "expected")
TOOLS = ("chiasm", "MONAI BasicUNet", "look-up")
UNHARMED = ("none", 0.0)
SMALLEST = 1e-3  # of the brightest, inside the brain: 0 is the background
Image = NDArray[np.float64]
Brain = NDArray[np.bool_]
Row = Mapping[str, object]


def add_noise(source: Image, brain: Brain, level: float) -> Image:
    """Add white noise; `level` is its SD, in parts of the 95th percentile of the brain."""
    return source + level * np.percentile(source[brain], 95) * np.random.default_rng(0).normal(size=source.shape)


def shade(source: Image, brain: Brain, level: float) -> Image:
    """Multiply by a smooth field (40 voxels); `level` is the SD of its logarithm in the brain."""
    field = gaussian_filter(np.random.default_rng(0).normal(size=source.shape), 40, mode="wrap")
    field = (field - field[brain].mean()) / field[brain].std()
    return source * np.exp(level * field)


def thicken(source: Image, brain: Brain, level: float) -> Image:
    """Average `level` slices into one, and interpolate between their middles."""
    del brain
    thick = uniform_filter1d(source, int(level), axis=2, mode="nearest")
    middles = np.arange(int(level) // 2, source.shape[2], int(level))
    k = np.arange(source.shape[2])
    above = np.clip(np.searchsorted(middles, k), 1, len(middles) - 1)
    share = np.clip((k - middles[above - 1]) / level, 0, 1)
    return thick[..., middles[above - 1]] * (1 - share) + thick[..., middles[above]] * share


def bend(source: Image, brain: Brain, level: float) -> Image:
    """Raise to a power: another contrast of the same tissues."""
    most = np.percentile(source[brain], 99)
    return most * np.power(np.clip(source / most, 0, None), level)


def move(source: Image, brain: Brain, level: float) -> Image:
    """Move along J by `level` voxels, which are 1 mm here: source and truth no longer lie together."""
    del brain
    return shift(source, (0, level, 0), order=1)


HARMS: Mapping[str, tuple[Callable[[Image, Brain, float], Image], tuple[float, ...], str]] = {
    "noise": (add_noise, (0.03, 0.06, 0.12), "SD, parts of the 95th percentile"),
    "shading": (shade, (0.1, 0.2, 0.4), "SD of the logarithm"),
    "slices": (thicken, (3, 5, 7), "averaged slices of 1 mm"),
    "contrast": (bend, (0.6, 0.8, 1.25, 1.6), "power"),
    "movement": (move, (1, 2, 4), "mm"),
}


def harmed(source: Image, harm: str, level: float) -> Image:
    """Make a source worse inside its brain; the background stays 0."""
    brain = source > 0
    if harm == "none":
        return source
    make = HARMS[harm][0]
    worse = np.maximum(make(source, brain, level), SMALLEST * source.max())
    kept = shift(brain, (0, level, 0), order=0, output=bool) if harm == "movement" else brain
    return np.where(kept, worse, 0)


def cases_of(part: Path, data: Path) -> tuple[Sequence[Case], Sequence[Case]]:
    """Return the cases that a model learnt from, and those that it never saw."""
    split, cases = read_splits(part / "splits.json").split, {case.id: case for case in find_cohort(data).cases}
    return [cases[name] for name in split.train], [cases[name] for name in split.validation]


def monai_of(part: Path, data: Path, out: Path, seconds: float) -> torch.nn.Module:
    """Return MONAI's network for the cases of a part, trained now or before."""
    path = out / f"monai-{part.name}.pt"
    if not path.exists():
        net, steps = train_monai([read_scan(case) for case in cases_of(part, data)[0]], seconds, 0)
        torch.save({"net": net.state_dict(), "steps": steps}, path)
    net = BasicUNet(spatial_dims=2, in_channels=3, out_channels=1)
    net.load_state_dict(torch.load(path, weights_only=True)["net"])
    return net.eval()


class Tools(NamedTuple):
    """What predicts the subjects that a part never saw.

    Attributes:
        predictor: chiasm's model.
        net: MONAI's network.
        table: The look-up.
    """

    predictor: Predictor
    net: torch.nn.Module
    table: Callable[[Scan], Image]

    def images(self, source: Image, path: Path, scan: Scan) -> Iterator[tuple[Image, Image | None]]:
        """Predict a harmed source with each tool, in the order of `TOOLS`; chiasm's with its expected error."""
        made = self.predictor.predict(replace(read_volume(path), array=source.astype(np.float32)))
        assert made.expected_error is not None
        yield made.image.array.astype(float), made.expected_error.array.astype(float)
        worse = scan_of(source, scan.truth, scan.lesion)
        yield predict_monai(self.net, worse), None
        yield self.table(worse), None


def rows_of(part: Path, data: Path, out: Path, seconds: float) -> Iterator[Row]:
    """Predict and judge the subjects that a part never saw, with every tool and every harm."""
    learnt, unseen = cases_of(part, data)
    table = fit_lookup([read_scan(case) for case in learnt])
    tools = Tools(load(part, accelerator="cpu"), monai_of(part, data, out, seconds), table)
    levels = [UNHARMED, *((harm, level) for harm, (_, some, _) in HARMS.items() for level in some)]
    for case in unseen:
        path, scan = case.images["t1"], read_scan(case)
        plain = read(path)
        for harm, level in levels:
            source = harmed(plain, harm, level)
            inside = scan.brain & (source > 0)  # which still holds signal
            for tool, (made, expected) in zip(TOOLS, tools.images(source, path, scan), strict=True):
                scores = judge(made, scan.truth, inside, scan.lesion)
                row = {"tool": tool, "harm": harm, "level": level, "case": case.id}
                told = "" if expected is None else float(expected[inside].mean())
                yield row | {name: float(score) for name, score in scores.items()} | {"expected": told}


def errors_of(rows: Sequence[Row], tool: str, harm: str, level: float, score: str) -> NDArray[np.float64]:
    """Return a score of each subject, in the order of their names."""
    own = [row for row in rows if (row["tool"], row["harm"], row["level"]) == (tool, harm, level)]
    return np.array(column(sorted(own, key=lambda row: str(row["case"])), score))


def change(rows: Sequence[Row], tool: str, harm: str, level: float, score: str = "brain") -> tuple[float, float, float]:
    """Return how much a score grows, in percent, with a 95 % interval over subjects."""
    before, after = (errors_of(rows, tool, *place, score) for place in (UNHARMED, (harm, level)))
    grown = 100 * (after / before - 1)
    low, high = bootstrap((grown,), np.mean, method="BCa", rng=np.random.default_rng(0)).confidence_interval
    return float(grown.mean()), float(low), float(high)


def print_tables(rows: Sequence[Row]) -> None:
    """Print a row for each harm and level."""
    print("| harm | level | chiasm | change, % | expected, % | MONAI | change, % | look-up | change, % |")
    print("|---" * 9 + "|")
    for harm, level in dict.fromkeys((str(row["harm"]), float(str(row["level"]))) for row in rows):
        is_harmed = harm != "none"
        cells = []
        for tool in TOOLS:
            cells.append(f"{errors_of(rows, tool, harm, level, 'brain').mean():.3f}")
            scores = ("brain", "expected") if tool == "chiasm" else ("brain",)
            cells += [told(change(rows, tool, harm, level, score)) if is_harmed else "" for score in scores]
        print(f"| {harm} | {f'{level:g}' if is_harmed else ''} | {' | '.join(cells)} |")


def told(grown: tuple[float, float, float]) -> str:
    """Write a change with its interval."""
    return f"{grown[0]:+.1f} ({grown[1]:+.1f} to {grown[2]:+.1f})"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the brain's error of each tool against the level of each harm."""
    pyplot.rcParams["svg.hashsalt"] = "chiasm"
    figure, axes = pyplot.subplots(1, len(HARMS), figsize=(14, 3.2), sharey=True, layout="constrained")
    for axis, (harm, (_, levels, unit)) in zip(axes, HARMS.items(), strict=True):
        none = 1.0 if harm in ("contrast", "slices") else 0.0
        for tool in TOOLS:
            start = errors_of(rows, tool, *UNHARMED, "brain").mean()
            points = [(none, start, start, start)]
            for level in levels:
                _, low, high = change(rows, tool, harm, level)
                value = errors_of(rows, tool, harm, level, "brain").mean()
                points.append((level, value, start * (1 + low / 100), start * (1 + high / 100)))
            x, y, low_y, high_y = zip(*sorted(points), strict=True)
            axis.plot(x, y, marker="o", markersize=3, label=tool)
            axis.fill_between(x, low_y, high_y, alpha=0.15)
        axis.set_title(harm)
        axis.set_xlabel(unit)
    axes[0].set_ylabel("error in the brain, SD")
    axes[0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Predict, judge, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="what chiasm run or chiasm train --models wrote")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for part in list_parts(asked.work):
        path = asked.out / f"rows-{part.name}.json"
        if not path.exists():
            path.write_text(json.dumps([*rows_of(part, asked.data, asked.out, asked.seconds)]))
        rows += json.loads(path.read_text())
    write_rows(asked.out / "robustness.csv", FIELDS, rows)
    print_tables(rows)
    draw(rows, asked.out / "robustness.svg")


if __name__ == "__main__":
    main()
