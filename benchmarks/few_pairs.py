"""How low an error a few pairs buy: joint sparse coding, a U-Net (A1) and the look-up, on simulated patients.

    python benchmarks/few_pairs.py OUT --pairs 1 2 4 --subjects 12 --seed 31

One fold.  Every method sees the same pairs; jcsc also one image of each other training case.  "jcsc alone" is jcsc
without the unpaired images' term, "look-up" the table of the same pairs.  Prints the mean absolute error over the
test cases, in the brain and in lesions, and minutes of training on this machine.  The unit is the SD of the pairs'
targets, so rows of one number of pairs compare.  OUT keeps all runs; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import mean

import torch

from chiasm.evaluation.predictions import score_folder
from chiasm.methods import make_recipe
from chiasm.prediction.folders import predict
from chiasm.simulation.phantom import write_cohort
from chiasm.training.run import train

METHODS = {"A1": ["A1"], "jcsc": ["jcsc"], "jcsc alone": ["jcsc", "optimiser.discrepancy=0"]}
REGIONS = ("mask", "WT")


def measure(folder: Path, data: Path, method: list[str], pairs: int, seed: int, steps: int) -> dict[str, float]:
    """Train, predict the test cases and score them: seconds, and errors by method and region."""
    told = folder / "told.json"
    if told.exists():
        return dict(json.loads(told.read_text()))
    arm, *settings = method
    shared = [f"training.pairs={pairs}", f"training.seed={seed}", "split.folds=3", "training.accelerator=cpu"]
    recipe = make_recipe(arm, "tiny", {"schedule.steps": steps} if arm == "A1" else {}, [*shared, *settings])
    start = time.monotonic()
    train(data, recipe, folder, say=lambda _: None)
    seconds = time.monotonic() - start
    predict(folder, [data], folder / "predictions", only="test")
    rows, *_ = score_folder(folder / "predictions", data)
    found = {"seconds": seconds}
    for name in (arm, "lookup"):
        for region in REGIONS:
            values = [r.value for r in rows if (r.method, r.region, r.metric) == (name, region, "mae")]
            found[f"{'own' if name == arm else name} {region}"] = mean(v for v in values if v == v)
    told.write_text(json.dumps(found))
    return found


def main() -> None:
    """Print a table row for each method and number of pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--subjects", type=int, default=12)
    parser.add_argument("--seed", type=int, default=31)
    parser.add_argument("--steps", type=int, default=600, help="of A1")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data = write_cohort(asked.out / "cohort", asked.subjects, asked.seed, spacing_mm=3.0)
    print("| pairs | method | brain | lesions | minutes |\n|---|---|---|---|---|", flush=True)
    for pairs in asked.pairs:
        for name in asked.methods:
            found = measure(asked.out / f"{name} {pairs}".replace(" ", "-"), data, METHODS[name], pairs, 0, asked.steps)
            if name == "A1":
                print(f"| {pairs} | look-up | {found['lookup mask']:.4f} | {found['lookup WT']:.4f} | 0 |", flush=True)
            errors = f"{found['own mask']:.4f} | {found['own WT']:.4f}"
            print(f"| {pairs} | {name} | {errors} | {found['seconds'] / 60:.1f} |", flush=True)


if __name__ == "__main__":
    main()
