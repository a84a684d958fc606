"""What averages are worth on patients that no training saw: mirror images, several models, and averaged weights.

    python benchmarks/averaging.py DATA OUT --models 4 --steps 1200 --folds 0
    python benchmarks/averaging.py DATA OUT --models 4 --steps 1200 --folds 0 --shared
    python benchmarks/averaging.py DATA OUT --models 1 --steps 4800 --folds 0 1
    python benchmarks/averaging.py DATA OUT --models 2 --steps 2400 --folds 1 2
    python benchmarks/averaging.py DATA OUT --models 3 --steps 1894 --planes

Folds, data, recipe and scores are those of `coarse_levers.py`, arm "pretrained", with --fine.  Each model of a fold has
a seed of its own and learns from all training cases; with --shared from all but one of them, each from others; with
--planes the second sees coronal slices, and the third sagittal ones.  Judged are each model, the mean of their
predictions, and (of one plane) one network with the mean of their weights; each in one pass, and as the mean over
mirror images.  Rows go to OUT/averages.csv; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import coarse_levers as levers
import numpy as np
import torch
from levers import judge, print_timed, write_rows
from numpy.typing import NDArray
from torch import Tensor

from chiasm.prediction.engines import Engine, pick_precision
from chiasm.prediction.passes import Networks, synthesise_prepared
from chiasm.preparation.arrays import PreparedCase
from chiasm.preparation.plan import AXES
from chiasm.recipe import Average, Plane
from chiasm.training.learner import Learner
from chiasm.training.loop import make_fabric

FIELDS = ("models", "steps", "shared", "planes", "fold", "case", "what", "average", "seconds", "brain", "WT", "kept")
Weights = Mapping[str, Tensor]


def mean_weights(states: Sequence[Weights]) -> Weights:
    """Average weights, and running means and variances with them."""
    return {
        name: (sum(state[name].double() for state in states) / len(states)).to(first.dtype)
        for name, first in states[0].items()
    }


class Trained(NamedTuple):
    """The weights of a model, and the plane whose slices it sees."""

    weights: Weights
    plane: Plane


def predicted(learner: Learner, model: Trained, case: PreparedCase, average: Average) -> NDArray[np.float64]:
    """Predict a case with a model."""
    network = learner.trainables.average
    network.load_state_dict(model.weights)
    made = synthesise_prepared(
        Networks(network.eval(), None, None, average=average),
        np.asarray(case.source),
        np.asarray(case.mask),
        plan=replace(learner.plan, plane=model.plane),
        conditional=True,
        error_scale=0.0,
        engine=Engine(learner.fabric.device, pick_precision("auto", "cpu")),
    )
    return made.prediction.astype(float)


def judged(learner: Learner, models: Sequence[Trained], case: PreparedCase) -> Iterator[dict[str, object]]:
    """Judge each model, their mean, and their mean weights where they see one plane."""
    mask, truth = np.asarray(case.mask), np.asarray(case.target).astype(float)
    averages: tuple[Average, ...] = ("none", "flip")
    for average in averages:
        made = [predicted(learner, model, case, average) for model in models]
        images = {f"model {number}": image for number, image in enumerate(made, 1)}
        if len(models) > 1:
            images["mean of models"] = np.mean(made, axis=0)
        if len(models) > 1 and len({model.plane for model in models}) == 1:
            joined = Trained(mean_weights([model.weights for model in models]), models[0].plane)
            images["mean of weights"] = predicted(learner, joined, case, average)
        for what, image in images.items():
            scores = judge(image, truth, mask, np.asarray(case.labels) > 0)
            yield {"case": case.id, "what": what, "average": average, **{k: float(v) for k, v in scores.items()}}


def run_fold(
    fold: int, models: int, steps: int, folders: levers.Folders, *, shared: bool, planes: bool
) -> list[dict[str, object]]:
    """Train the models of a fold, and judge them on its two test cases."""
    kind = f"{'-shared' if shared else ''}{'-planes' if planes else ''}"
    kept = folders.out / f"averages-{fold}-{steps}x{models}{kind}.json"
    if not kept.exists():
        plan, cohort = levers.plan_fold(fold, folders)
        training, tested = (
            list(levers.prepare([case for case in cohort.cases if case.split == role], plan, folders.out))
            for role in ("train", "test")
        )
        trained, start = list[Trained](), time.process_time()
        for number in range(models):
            own = [case for place, case in enumerate(training) if not shared or place != number % len(training)]
            recipe = levers.recipe_of("pretrained", number, steps, folders)
            fabric = make_fabric(recipe)
            fabric.launch()
            plane = [*AXES][number % len(AXES)] if planes else "axial"
            learner = Learner(recipe, replace(plan, plane=plane), own, fabric)
            for step in range(steps):
                learner.step(step)
            weights = {name: value.clone() for name, value in learner.trainables.average.state_dict().items()}
            trained.append(Trained(weights, plane))
        named = {"models": models, "steps": steps, "shared": shared, "planes": planes, "fold": fold}
        named["seconds"] = round(time.process_time() - start)
        rows = [{**named, **row} for case in tested for row in judged(learner, trained, case)]
        kept.write_text(json.dumps(rows))
    found: list[dict[str, object]] = json.loads(kept.read_text())
    return found


def main() -> None:
    """Run the folds, and print a row of a table for each kind of average."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--folds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--planes", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    folders = levers.Folders(asked.data, asked.out, None, fine=True)
    rows = [
        row
        for fold in asked.folds
        for row in run_fold(fold, asked.models, asked.steps, folders, shared=asked.shared, planes=asked.planes)
    ]
    write_rows(asked.out / "averages.csv", FIELDS, rows)
    print_timed({"what": "what", "average": "mirror images"}, rows)


if __name__ == "__main__":
    main()
