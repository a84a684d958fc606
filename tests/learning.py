"""Learners on a small cohort, for tests of a training step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from lightning_fabric import Fabric
from scipy.ndimage import gaussian_filter

from chiasm.cohorts.discovery import find_cohort
from chiasm.methods import make_recipe
from chiasm.preparation.arrays import PreparedCase, prepare_case
from chiasm.recipe import Recipe
from chiasm.training.learner import Learner
from chiasm.training.loop import make_fabric
from chiasm.training.run_planning import plan_run
from chiasm.volumes import Geometry
from conftest import QUICK
from synthetic_cohort import affine

LITERATURE = {"data.patch": "auto", "generator.scale": 1 / 16, "discriminators.scale": 1 / 16}
CASES = 2


def small(method: str, changes: Mapping[str, object] | None = None) -> Recipe:
    """A method with the smallest networks, in 32 bits."""
    literature = {} if make_recipe(method).generator.network == "chiasm" else LITERATURE
    return make_recipe(method, "tiny", {**QUICK, **literature, "training.precision": "32-true", **(changes or {})})


def make_learner(recipe: Recipe, cohort: Path, folder: Path, fabric: Fabric | None = None) -> Learner:
    """Plan and prepare in `folder`, and let a learner begin."""
    run = plan_run(cohort, recipe, folder, say=lambda _: None)
    cases = {case.id: case for case in find_cohort(cohort).cases}
    prepared = [prepare_case(cases[name], run.plan, folder / "cache") for name in run.split.train[:CASES]]
    return Learner(recipe, run.plan, prepared, fabric or make_fabric(recipe))


def textured_case(seed: int, shape: tuple[int, int, int] = (40, 44, 24)) -> PreparedCase:
    """Smooth noise without a background: where many voxels are alike, all cross a rectifier's kink at once."""
    source, target, lesion = gaussian_filter(np.random.default_rng(seed).normal(size=(3, *shape)), (0, 1, 1, 1)) * 5
    mask, labels = np.ones(shape, np.bool_), (lesion > 1).astype(np.uint8)
    source, target = source.astype(np.float32), (target - source).astype(np.float32)
    return PreparedCase(
        f"case{seed}", f"case{seed}", None, source[None], target, mask, labels, Geometry(shape, affine())
    )
