"""chiasm beside a plain MONAI network and a look-up table, on the same cases and in an equal time of the processor.

    python benchmarks/peers.py DATA OUT --seconds 120 --folds 0 1 2 3 4 5 --seeds 0
    python benchmarks/peers.py DATA OUT --seconds 330 --folds 0 1 2 --pairs --methods

DATA is a folder in the layout of BraTS.  Each fold tests one subject.  MONAI's BasicUNet (2D, three slices in, L1, Adam
with cosine decay, images scaled by mean and SD of the brain, flips) and the look-up (64 bins of the scaled source)
learn from all other subjects; chiasm keeps one of these for its validation.  Trainings take SECONDS of one thread.
With --pairs each fold tests two subjects, in the order of their names, as in `coarse_levers.py`, without chiasm.
`levers.judge` scores all of them: truth in SD of the brain, the prediction fitted to it by one affine map.  Rows go
to OUT/peers.csv; the same command goes on where it stopped.  KonfAI is not among them: it was not at hand.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from levers import judge, judge_folder, print_table, read, steps_within, time_training, write_rows
from numpy.typing import NDArray
from torch import nn

from chiasm.cohorts.discovery import find_cohort
from chiasm.cohorts.splits import make_split
from chiasm.methods import make_recipe
from chiasm.prediction.folders import predict
from chiasm.preparation.arrays import prepare_cohort
from chiasm.recipe import Recipe
from chiasm.training.learner import Learner
from chiasm.training.loop import make_fabric
from chiasm.training.run import train
from chiasm.training.run_planning import plan_run

PATCH, BATCH, RATE, BINS = 128, 8, 1e-3, 64
PROBES = 10  # steps of chiasm that are timed, evenly over its schedule
FIELDS = ("tool", "fold", "seed", "case", "steps", "brain", "WT", "kept")
Scores = dict[str, dict[str, float]]


class Scan(NamedTuple):
    """A case as a plain script reads it.

    Attributes:
        source: Mean 0 and SD 1 inside the brain, 0 outside, shape (I, J, K).
        target: Likewise.
        brain: Where the source is not 0.
        truth: The target as it is on disk.
        lesion: Labelled voxels.
    """

    source: NDArray[np.float32]
    target: NDArray[np.float32]
    brain: NDArray[np.bool_]
    truth: NDArray[np.float64]
    lesion: NDArray[np.bool_]


def read_scan(data: Path, case: str) -> Scan:
    """Read T1, T2 and labels of a case."""
    source, truth, labels = (read(data / case / f"{case}_{name}.nii.gz") for name in ("t1", "t2", "seg"))
    return scan_of(source, truth, labels > 0)


def scan_of(source: NDArray[np.float64], truth: NDArray[np.float64], lesion: NDArray[np.bool_]) -> Scan:
    """Scale a T1 and a T2 by mean and SD of the brain, which is where the T1 is not 0."""
    brain = source > 0
    scaled = [
        np.where(brain, (image - image[brain].mean()) / image[brain].std(), 0).astype(np.float32)
        for image in (source, truth)
    ]
    return Scan(scaled[0], scaled[1], brain, truth, lesion)


def slab(image: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """Return three neighbouring slices, shape (3, I, J); at the ends one twice."""
    return np.moveaxis(image[..., np.clip([k - 1, k, k + 1], 0, image.shape[2] - 1)], -1, 0)


def draw_batch(scans: Sequence[Scan], rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw patches around voxels of brains: source (N, 3, P, P), target and brain (N, 1, P, P)."""
    drawn = []
    for _ in range(BATCH):
        scan = scans[rng.integers(len(scans))]
        while not scan.brain[place := tuple(rng.integers(scan.brain.shape))]:
            pass
        start = [int(np.clip(c - PATCH // 2, 0, max(n - PATCH, 0))) for c, n in zip(place[:2], scan.brain.shape)]
        cut = (slice(None), *(slice(a, a + PATCH) for a in start))
        k = place[2]
        parts = [slab(scan.source, k)[cut], scan.target[None, ..., k][cut], scan.brain[None, ..., k][cut]]
        short = [(0, PATCH - n) for n in parts[2].shape[1:]]
        step = -1 if rng.random() < 0.5 else 1
        drawn.append([np.pad(part, ((0, 0), *short))[:, ::step].astype(np.float32) for part in parts])
    source, target, brain = (torch.from_numpy(np.stack(part)) for part in zip(*drawn))
    return source, target, brain


def train_monai(scans: Sequence[Scan], seconds: float, seed: int) -> tuple[nn.Module, int]:
    """Train a BasicUNet with L1 inside the brain for as many seconds of the processor; return it and its steps."""
    from monai.networks.nets import BasicUNet

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = BasicUNet(spatial_dims=2, in_channels=3, out_channels=1)
    optimiser = torch.optim.Adam(net.parameters(), RATE)
    start, steps = time.process_time(), 0
    while (done := (time.process_time() - start) / seconds) < 1:
        for group in optimiser.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * done))
        source, target, brain = draw_batch(scans, rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = net(source)
        loss = ((made.float() - target).abs() * brain).sum() / brain.sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        steps += 1
    return net.eval(), steps


def predict_monai(net: nn.Module, scan: Scan) -> NDArray[np.float64]:
    """Predict all slices of a scan, whole."""
    made = np.zeros(scan.brain.shape)
    i, j, depth = scan.brain.shape
    margins = ((0, 0), (0, -i % 16), (0, -j % 16))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        for k in range(depth):
            padded = torch.from_numpy(np.pad(slab(scan.source, k), margins))
            made[..., k] = net(padded[None])[0, 0, :i, :j].float().numpy()
    return made


def fit_lookup(scans: Sequence[Scan]) -> Callable[[Scan], NDArray[np.float64]]:
    """Fit the mean target of each of `BINS` equally filled bins of the source."""
    source = np.concatenate([scan.source[scan.brain] for scan in scans])
    target = np.concatenate([scan.target[scan.brain] for scan in scans])
    edges = np.quantile(source, np.linspace(0, 1, BINS + 1)[1:-1])
    row = np.digitize(source, edges)
    means = np.bincount(row, target, BINS) / np.maximum(np.bincount(row, minlength=BINS), 1)
    return lambda scan: means[np.digitize(scan.source, edges)]


def chiasm_recipe(method: str, fold: int, seed: int, steps: int) -> Recipe:
    """Return what `chiasm train` would take."""
    asked = ["data.sources=['t1']", "data.target=t2", "split.folds=auto", f"split.fold={fold}"]
    asked += [f"training.seed={seed}", "training.validations=1", "training.accelerator=cpu", f"schedule.steps={steps}"]
    return make_recipe(method, "small", {}, asked)


def count_steps(method: str, data: Path, out: Path, seconds: float) -> int:
    """Count the steps of chiasm that fit into the time, timed once."""
    path = out / f"cost-{method}.json"
    if not path.exists():
        recipe = chiasm_recipe(method, 0, 0, PROBES * 100)
        run = plan_run(data, recipe, out / f"probe-{method}", say=lambda _: None)
        cases = [case for case in find_cohort(data).cases if case.id in run.split.train]
        prepared, _ = prepare_cohort(cases, run.plan, out / "cache", warn=lambda _: None)
        fabric = make_fabric(recipe)
        fabric.launch()
        probes = [100 * probe + 50 for probe in range(PROBES)]
        path.write_text(json.dumps(time_training(partial(Learner, recipe, run.plan, prepared, fabric), probes)))
    return steps_within(seconds, json.loads(path.read_text()))


def by_chiasm(method: str, data: Path, out: Path, fold: int, seed: int, seconds: float) -> tuple[Scores, int]:
    """Train a method on a fold, predict its test case and judge it."""
    steps, folder = count_steps(method, data, out, seconds), out / f"{method}-{fold}-{seed}"
    train(data, chiasm_recipe(method, fold, seed, steps), folder / "run", say=lambda _: None, cache=out / "cache")
    predict(folder / "run", [data], folder / "test", only="test", accelerator="cpu")
    return judge_folder(folder / "test", data), steps


def by_monai(data: Path, others: Sequence[str], tested: Sequence[str], seed: int, seconds: float) -> tuple[Scores, int]:
    """Train MONAI's network on all other cases, and judge those that are tested."""
    net, steps = train_monai([read_scan(data, case) for case in others], seconds, seed)
    scans = {case: read_scan(data, case) for case in tested}
    made = {case: predict_monai(net, scan) for case, scan in scans.items()}
    return {case: judge(made[case], scan.truth, scan.brain, scan.lesion) for case, scan in scans.items()}, steps


def by_lookup(data: Path, others: Sequence[str], tested: Sequence[str]) -> tuple[Scores, int]:
    """Fit a look-up to all other cases, and judge those that are tested."""
    table = fit_lookup([read_scan(data, case) for case in others])
    scans = {case: read_scan(data, case) for case in tested}
    return {case: judge(table(scan), scan.truth, scan.brain, scan.lesion) for case, scan in scans.items()}, 0


def judged(path: Path, make: Callable[[], tuple[Scores, int]]) -> tuple[Scores, int]:
    """Return what was judged before, or judge it now."""
    if not path.exists():
        path.write_text(json.dumps(make()))
    scores, steps = json.loads(path.read_text())
    return scores, steps


class Fold(NamedTuple):
    """Which subject or pair is tested, the seed of all trainings, and the seconds that each may take."""

    fold: int
    seed: int
    seconds: float
    pairs: bool


def run_fold(data: Path, out: Path, methods: Sequence[str], asked: Fold) -> list[dict[str, object]]:
    """Train every tool on a fold, and judge it on the subject that is tested."""
    fold, seed, seconds, pairs = asked
    cases = find_cohort(data).cases
    if pairs:
        tested = tuple(sorted(case.id for case in cases)[2 * fold : 2 * fold + 2])
    else:
        tested = make_split(cases, folds="auto", fold=fold, validation=0.2, seed=0).test
    others = [case.id for case in cases if case.id not in tested]
    tools: dict[str, Callable[[], tuple[Scores, int]]] = {
        f"chiasm {name}": partial(by_chiasm, name, data, out, fold, seed, seconds) for name in methods
    }
    tools["MONAI BasicUNet"] = partial(by_monai, data, others, tested, seed, seconds)
    tools["look-up"] = partial(by_lookup, data, others, tested)
    rows: list[dict[str, object]] = []
    for tool, make in tools.items():
        scores, steps = judged(out / f"{tool.replace(' ', '-')}-{fold}-{seed}.json", make)
        named = {"tool": tool, "fold": fold, "seed": seed, "steps": steps}
        rows += [{**named, "case": case, **found} for case, found in scores.items()]
    return rows


def main() -> None:
    """Train and judge all tools on all folds, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", nargs="*", default=["l2"])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--folds", type=int, nargs="*", default=[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--pairs", action="store_true")
    asked = parser.parse_args()
    if asked.pairs and asked.methods:
        parser.error("--pairs leaves chiasm out: give --methods without a name")
    torch.set_num_threads(1)
    data, out = asked.data, asked.out
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        row
        for seed in asked.seeds
        for fold in asked.folds
        for row in run_fold(data, out, asked.methods, Fold(fold, seed, asked.seconds, asked.pairs))
    ]
    write_rows(out / "peers.csv", FIELDS, rows)
    print_table("tool", rows)


if __name__ == "__main__":
    main()
