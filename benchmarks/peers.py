"""chiasm beside MONAI, KonfAI and a look-up table, on the same cases and in an equal time of the processor.

    python benchmarks/peers.py DATA OUT --seconds 330 --seeds 0 1 2
    python benchmarks/peers.py DATA OUT --seconds 330 --seeds 0 1 2 --unseen FOLDER FOLDER

DATA is a folder in the layout of BraTS; its subjects are tested two at a time, in the order of their names, and each
tool learns from all others, for SECONDS of one thread.  "chiasm" is what `chiasm train` does by default, as one model
and with its steps counted beforehand; its images are judged as `chiasm predict` makes them, and of one pass.  Three
models share the steps and the cases, and each sees slices of another plane; "axial" lets all see axial ones, and "even"
takes the shading out of all images (`data.bias_correction=n4`; they are judged by the truth as scanned).  MONAI's
is a BasicUNet (2D, three slices in, L1, Adam with cosine decay, images scaled by mean and SD of the brain, flips);
KonfAI's is in `peers_konfai.py`; the look-up has 64 bins of the scaled source.  `levers.judge` scores all of them:
truth in SD of the brain, the prediction fitted to it by one affine map.  Patients of --unseen folders are predicted by
the models of all folds; of those without a map of lesions the brain alone is scored.  Rows go to OUT/peers.csv, and
`peers_tables.py` prints them.  The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import peers_konfai
import torch
from levers import fit, judge, read, steps_within, time_training, write_rows
from nibabel.orientations import io_orientation, ornt_transform
from numpy.typing import NDArray
from peers_tables import FIELDS, Row, print_tables
from torch import nn

from chiasm.cohorts.cases import Case, Cohort
from chiasm.cohorts.discovery import find_cohort
from chiasm.methods import make_recipe
from chiasm.prediction.folders import load
from chiasm.preparation.arrays import prepare_cohort
from chiasm.recipe import Recipe
from chiasm.training.cross_fitting import train as train_several
from chiasm.training.learner import Learner
from chiasm.training.loop import make_fabric
from chiasm.training.run import train
from chiasm.training.run_planning import plan_run

PATCH, BATCH, RATE, BINS = 128, 8, 1e-3, 64
PROBES = 10  # steps of chiasm that are timed, evenly over its schedule
Image = NDArray[np.float64]


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


def read_scan(case: Case) -> Scan:
    """Read T1, T2 and labels of a case; none is labelled where it has no labels."""
    source, truth = read(case.images["t1"]), read(case.images["t2"])
    lesion = np.zeros(source.shape, bool) if case.labels is None else read(case.labels) > 0
    return scan_of(source, truth, lesion)


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


class Task(NamedTuple):
    """One training of one tool.

    Attributes:
        learning: Cases to learn from.
        tested: The others of the cohort.
        seed: Of the training.
        seconds: Of one thread, which it may take.
        out: Where all trainings lie.
        folder: Where this one lies.
    """

    learning: Sequence[Case]
    tested: Sequence[Case]
    seed: int
    seconds: float
    out: Path
    folder: Path


ONE = ("split.folds=1", "split.validation=0")
THREE = ("split.folds=auto", "split.models=3")


def chiasm_recipe(seed: int, steps: int, asked: Sequence[str] = ONE) -> Recipe:
    """Return what `chiasm train --source t1 --target t2` takes by default, with the settings that are asked for."""
    fixed = ["data.sources=['t1']", "data.target=t2", f"training.seed={seed}"]
    fixed += ["training.accelerator=cpu", f"schedule.steps={steps}"]
    return make_recipe("l2-expected-error", "small", {}, [*fixed, *asked])


def count_steps(task: Task, cohort: Cohort) -> int:
    """Count the steps of chiasm that fit into the time; they are timed once for each seed."""
    path = task.out / f"cost-{task.seed}.json"
    if not path.exists():
        recipe = chiasm_recipe(0, PROBES * 100)
        plan = plan_run(cohort, recipe, task.folder / "probe", say=lambda _: None).plan
        prepared, _ = prepare_cohort(task.learning, plan, task.out / "cache", warn=lambda _: None)
        fabric = make_fabric(recipe)
        fabric.launch()
        probes = [100 * probe + 50 for probe in range(PROBES)]
        cost = time_training(lambda: Learner(recipe, plan, prepared, fabric), probes)
        path.write_text(json.dumps(cost))
    return steps_within(task.seconds, json.loads(path.read_text()))


def assign(task: Task) -> Cohort:
    """Return the cohort with all cases of a task in training but those that are tested."""
    roles = [replace(case, split="train") for case in task.learning]
    roles += [replace(case, split="test") for case in task.tested]
    return replace(find_cohort(task.learning[0].images["t1"].parents[1]), cases=tuple(roles))


def train_chiasm(task: Task, *asked: str) -> tuple[int, float]:
    """Train as the command does."""
    cohort = assign(task)
    steps = count_steps(task, cohort)
    start = peers_konfai.seconds_used()
    recipe = chiasm_recipe(task.seed, steps, [*ONE, *asked])
    train(cohort, recipe, task.folder / "run", say=lambda _: None, cache=task.out / "cache", threads=1)
    return steps, peers_konfai.seconds_used() - start


def train_three(task: Task, *asked: str) -> tuple[int, float]:
    """Train three models that share the cases to learn from and the steps, as the command does for few subjects."""
    cohort = assign(task)
    steps = count_steps(task, cohort)
    start = peers_konfai.seconds_used()
    recipe = chiasm_recipe(task.seed, steps, [*THREE, *asked])
    alone = replace(cohort, cases=tuple(task.learning))
    train_several(alone, recipe, task.folder / "run", say=lambda _: None, threads=1)
    return steps, peers_konfai.seconds_used() - start


def predict_chiasm(task: Task, cases: Sequence[Case], average: str = "auto") -> list[Image]:
    """Predict as the command does."""
    predictor = load(task.folder / "run", accelerator="cpu")
    return [predictor.predict(case.images["t1"], average=average).image.array.astype(float) for case in cases]


def learn_monai(task: Task) -> tuple[int, float]:
    """Train MONAI's network and keep its weights."""
    start = peers_konfai.seconds_used()
    net, steps = train_monai([read_scan(case) for case in task.learning], task.seconds, task.seed)
    torch.save(net.state_dict(), task.folder / "monai.pt")
    return steps, peers_konfai.seconds_used() - start


def show_monai(task: Task, cases: Sequence[Case]) -> list[Image]:
    """Predict with the weights that were kept."""
    from monai.networks.nets import BasicUNet

    net = BasicUNet(spatial_dims=2, in_channels=3, out_channels=1)
    net.load_state_dict(torch.load(task.folder / "monai.pt", weights_only=True))
    return [predict_monai(net.eval(), read_scan(case)) for case in cases]


def learn_konfai(task: Task) -> tuple[int, float]:
    """Train KonfAI's network with its own command."""
    known = task.out / f"cost-konfai-{task.seed}.json"
    return peers_konfai.learn(task.learning, task.seed, task.seconds, task.folder, known)


def look_up(task: Task, cases: Sequence[Case]) -> list[Image]:
    """Fit a look-up, which takes a moment, and predict."""
    table = fit_lookup([read_scan(case) for case in task.learning])
    return [table(read_scan(case)) for case in cases]


class Tool(NamedTuple):
    """How a tool learns and predicts; `folder` is shared by two that differ in the prediction alone."""

    folder: str
    learn: Callable[[Task], tuple[int, float]]
    predict: Callable[[Task, Sequence[Case]], list[Image]]


EVEN = "data.bias_correction=n4"
TOOLS: Mapping[str, Tool] = {
    "chiasm": Tool("chiasm", train_chiasm, predict_chiasm),
    "chiasm, one pass": Tool("chiasm", train_chiasm, lambda task, cases: predict_chiasm(task, cases, "none")),
    "chiasm, three models": Tool("chiasm-three", train_three, predict_chiasm),
    "chiasm, three axial": Tool("chiasm-axial", lambda task: train_three(task, "data.plane=axial"), predict_chiasm),
    "chiasm, even": Tool("chiasm-even", lambda task: train_chiasm(task, EVEN), predict_chiasm),
    "chiasm, three models, even": Tool("chiasm-three-even", lambda task: train_three(task, EVEN), predict_chiasm),
    "MONAI BasicUNet": Tool("monai", learn_monai, show_monai),
    "KonfAI UNet": Tool("konfai", learn_konfai, lambda task, cases: peers_konfai.predict(task.folder, cases)),
    "look-up": Tool("look-up", lambda _: (0, 0.0), look_up),
}


def learn(tool: Tool, task: Task) -> dict[str, float]:
    """Return steps and seconds of a training, which is done now or was done before."""
    path = task.folder / "learnt.json"
    if not path.exists():
        task.folder.mkdir(parents=True, exist_ok=True)
        steps, seconds = tool.learn(task)
        path.write_text(json.dumps({"steps": steps, "seconds": seconds}))
    found: dict[str, float] = json.loads(path.read_text())
    return found


def scores_of(image: Image, case: Case) -> dict[str, float]:
    """Judge an image; its lesions where the case has labels."""
    scan = read_scan(case)
    if case.labels is not None:
        return {name: float(score) for name, score in judge(image, scan.truth, scan.brain, scan.lesion).items()}
    fitted, true = fit(image, scan.truth, scan.brain)
    return {"brain": float(np.abs(fitted - true)[scan.brain].mean()), "WT": math.nan, "kept": math.nan}


def run_task(name: str, task: Task, unseen: Sequence[Case], fold: int) -> list[Row]:
    """Train a tool, or take the training of before, and judge it on cases that it did not see."""
    notes, rows = learn(TOOLS[name], task), []
    for cohort, cases in (("tested", task.tested), ("unseen", unseen)):
        path = task.folder / f"{name.replace(' ', '-')}-{cohort}.json"
        if cases and not path.exists():
            images = TOOLS[name].predict(task, cases)
            path.write_text(json.dumps([scores_of(image, case) for case, image in zip(cases, images, strict=True)]))
        scored = json.loads(path.read_text()) if cases else []
        for case, scores in zip(cases, scored, strict=True):
            named = {"tool": name, "fold": fold, "seed": task.seed, "cohort": cohort, "case": case.id}
            rows.append({**named, "site": case.site or "", **notes, **scores})
    return rows


def lay_alike(case: Case, like: Case, folder: Path) -> Case:
    """Copy a case with its axes in the order and direction of another, as plain tools expect them."""

    def copied(path: Path) -> Path:
        image = nibabel.load(path)
        axes = io_orientation(nibabel.load(like.images["t1"]).affine)
        nibabel.save(image.as_reoriented(ornt_transform(io_orientation(image.affine), axes)), folder / path.name)
        return folder / path.name

    folder.mkdir(parents=True, exist_ok=True)
    images = {name: copied(case.images[name]) for name in ("t1", "t2")}
    return replace(case, images=images, labels=None if case.labels is None else copied(case.labels))


def main() -> None:
    """Train and judge all tools on all folds, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tools", nargs="*", default=list(TOOLS), choices=list(TOOLS), metavar="TOOL")
    parser.add_argument("--seconds", type=float, default=330.0)
    parser.add_argument("--folds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--unseen", type=Path, nargs="*", default=[])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cases = sorted(find_cohort(asked.data).cases, key=lambda case: case.id)
    others = [case for folder in asked.unseen for case in find_cohort(folder).cases]
    unseen = [lay_alike(case, cases[0], asked.out / "unseen" / case.id) for case in others]
    why = peers_konfai.missing()
    absent = {} if why is None else {"KonfAI UNet": why}
    rows: list[Row] = []
    for seed in asked.seeds:
        for name in (tool for tool in asked.tools if tool not in absent):
            for fold in asked.folds:
                tested = cases[2 * fold : 2 * fold + 2]
                learning = [case for case in cases if case not in tested]
                folder = asked.out / f"{TOOLS[name].folder}-{fold}-{seed}"
                task = Task(learning, tested, seed, asked.seconds, asked.out, folder)
                rows += run_task(name, task, unseen, fold)
    write_rows(asked.out / "peers.csv", FIELDS, rows)
    print_tables(rows, absent)


if __name__ == "__main__":
    main()
