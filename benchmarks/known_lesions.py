"""What the attention of a study's arms knows of lesions, over all tested cases.

AUROC of F for lesion voxels, and the mean F in lesions over that elsewhere:

    python benchmarks/known_lesions.py STUDY

F is that of the finished models (`chiasm.evaluation.weight_map`), inside the mask of each prediction; a training itself
measures M on at most four validation cases.  Means over the cases with a lesion, for each arm and seed.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import torch
from levers import read

from chiasm.cohorts.cases import Case
from chiasm.cohorts.discovery import find_cohort
from chiasm.cohorts.splits import read_splits
from chiasm.evaluation.weight_map import weight_map, why_no_weight
from chiasm.metrics.ranking import auroc
from chiasm.prediction.folders import Predictor, load
from chiasm.storage import read_json
from chiasm.volumes import read_volume


def known(predictor: Predictor, case: Case, mask: Path) -> tuple[float, float] | None:
    """Return AUROC and ratio of the weights of one case; None without a lesion."""
    if case.labels is None:
        return None
    inside = read(mask) > 0
    lesion = (read(case.labels) > 0) & inside
    if not lesion.any():
        return None
    sources = [read_volume(case.images[name]) for name in predictor.model.plan.sources]
    weight = weight_map(predictor.model, sources, read_volume(mask, labels=True), engine=predictor.engine)
    ratio = weight[lesion].mean() / weight[inside & ~lesion].mean()
    return auroc(weight[inside], lesion[inside]), float(ratio)


def known_by_job(study: Path) -> Iterator[tuple[str, int, list[tuple[float, float]]]]:
    """Yield arm, seed and values of each training with an attention."""
    cases = {case.id: case for case in find_cohort(study / "cohort").cases}
    for folder in sorted(path.parent for path in study.glob("jobs/*/model")):
        predictor = load(folder, accelerator="cpu", precision="32-true", engine="torch")
        recipe = predictor.model.recipe
        if why_no_weight(recipe.attention):
            continue
        masks = {name: folder / f"predictions/{name}_mask.nii.gz" for name in cases}
        tested = read_splits(folder / "splits.json").split.test
        found = (known(predictor, cases[name], masks[name]) for name in tested)
        yield recipe.method, recipe.training.seed, [one for one in found if one is not None]


def main() -> None:
    """Print a row for each arm and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for arm, seed, values in known_by_job(asked.study):
        if values:
            found[arm, seed] += values
    order = list(read_json(asked.study / "study.json")["study"]["arms"])
    print("| arm | seed | AUROC of lesions | F in lesions by elsewhere | n |\n|---|---|---|---|---|")
    for (arm, seed), values in sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        score, ratio = (mean(one) for one in zip(*values))
        print(f"| {arm} | {seed} | {score:.2f} | {ratio:.2f} | {len(values)} |")


if __name__ == "__main__":
    main()
