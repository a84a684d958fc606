"""The training of a sparse coder: each step is a round of codes, filters and mapping, from pairs and unpaired images.

It stands in the loop where `Learner` does, with the same checkpoints, validations
and model at the end.  Patches are drawn once, so a step goes over all of them.
The plan's own training cases are the pairs.  Of every other training case one
image is shown and the other never looked at: sources and targets by turns, or the
one that there is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from chiasm.errors import CohortError
from chiasm.networks.sparse_coding import SparseCoder
from chiasm.prediction.engines import Engine
from chiasm.prediction.model import Model
from chiasm.prediction.passes import Maps, Networks, synthesise_prepared
from chiasm.preparation.arrays import PreparedCase
from chiasm.preparation.plan import Plan
from chiasm.preparation.planes import seen_by_networks
from chiasm.recipe import Recipe
from chiasm.training.attention import Phase
from chiasm.training.batches import Batch, Sampling, draw_places, take_batch
from chiasm.training.joint_coding import Examples, JointCoding, settled
from chiasm.training.players import make_players
from chiasm.training.reading import read_values
from chiasm.training.state import exact

INSIDE = Sampling(body_share=1.0, lesion_share=0.0, augment=False, intensity_jitter=0.0)
PAIRS_TO_OTHERS = 2  # patches of pairs for each unpaired source, and for each unpaired target


class Roles(NamedTuple):
    """The role of each training case.

    Attributes:
        pairs: Both images are seen.
        sources: Only the source is.
        targets: Only the target is.
    """

    pairs: tuple[PreparedCase, ...]
    sources: tuple[PreparedCase, ...]
    targets: tuple[PreparedCase, ...]


def assign_roles(cases: Sequence[PreparedCase], paired: Sequence[str]) -> Roles:
    """Assign roles to training cases: the named ones are pairs; the others alternate between source and target.

    A case with only one image has the role of that image.

    Raises:
        CohortError: If none of the pairs is there.
    """
    pairs = tuple(case for case in cases if case.id in paired)
    others = [case for case in cases if case.id not in paired]
    sides = defaultdict[str | None, list[PreparedCase]](list)
    for case in others:
        sides[case.alone].append(case)
    if not pairs:
        raise CohortError(
            "joint sparse coding needs at least one pair, and none could be prepared",
            reason="too-few-pairs",
            found=f"{len(others)} cases beside the pairs",
            hint="Set training.pairs to a larger number, or to 0 for all training cases.",
        )
    both = sides[None]
    return Roles(pairs, (*both[::2], *sides["source"]), (*both[1::2], *sides["target"]))


def draw_examples(roles: Roles, plan: Plan, *, count: int, seed: int) -> Examples:
    """Draw `count` unpaired patches of either side, and twice as many of pairs.

    Without unpaired cases there are no unpaired patches.  If only one side has unpaired cases, the pairs' images are
    used for the other side.
    """

    def drawn(cases: Sequence[PreparedCase], number: int, purpose: int) -> Batch:
        rng = np.random.default_rng((seed, purpose))
        places = draw_places(cases, [], INSIDE, count=number, rng=rng)
        return take_batch(cases, places, patch=plan.patch, slices=plan.slices)

    pairs = drawn(roles.pairs, PAIRS_TO_OTHERS * count, 0)
    sources, targets = pairs.source[:0], pairs.target[:0]
    if roles.sources or roles.targets:
        sources = drawn(roles.sources or roles.pairs, count, 1).source
        others = drawn(roles.targets or roles.pairs, count, 2)
        targets = others.target * others.mask
    return Examples(pairs.source, pairs.target * pairs.mask, sources, targets)


@dataclass(frozen=True)
class CodingState:
    """The state after a round.

    Attributes:
        objective: Of the last round; -1 before the first.
        settled: Whether a round lowered it by less than the tolerance.
    """

    objective: float = -1.0
    settled: bool = False
    closed_share = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the state in plain numbers."""
        return asdict(self)


class CodingLearner:
    """A sparse coder with the codes of its training patches.

    Args:
        recipe: Resolved settings.
        plan: What follows from the data; its `trained_on` are the pairs.
        training: Prepared training cases, pairs and others.
        fabric: Device, launched.

    Raises:
        CohortError: If there is no pair.
    """

    has_refiner = False

    def __init__(self, recipe: Recipe, plan: Plan, training: Sequence[PreparedCase], fabric: Fabric) -> None:
        self.recipe, self.plan, self.fabric = recipe, plan, fabric
        self.roles = assign_roles(seen_by_networks(training, plan), plan.trained_on)
        seed = recipe.training.seed
        examples = draw_examples(self.roles, plan, count=recipe.training.batch, seed=seed)
        coder = make_players(recipe, plan, seed).generator.to(fabric.device)
        assert isinstance(coder, SparseCoder)
        self.coder = coder.eval().requires_grad_(False)
        on_device = Examples(*(part.to(fabric.device) for part in examples))
        self.coding = JointCoding(self.coder, on_device, seed=seed, discrepancy=recipe.optimiser.discrepancy)
        self.coding.to(fabric.device)
        self._finished: SparseCoder | None = None
        self.state = CodingState()

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Everything with tensors that a checkpoint holds, by name."""
        return {"generator": self.coder, "coding": self.coding}

    def restore(self, content: Mapping[str, Any]) -> None:
        """Go on from the state of a checkpoint."""
        if content:
            self.state = CodingState(float(content["objective"]), bool(content["settled"]))

    def adopt(self, model: Model) -> None:
        """Refuse to go on from a model: its codes are of its own patches.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"a sparse coder does not go on from {model.recipe.method}")

    def note_validation(self, rho: float) -> None:
        """Do nothing: there is no attention with a health gate."""

    def phase(self, step: int) -> Phase:
        """Return that only the generator learns, at every step."""
        del step
        return Phase(generator=True, discriminators=False, adversarial=0.0, attention=0.0)

    def step(self, step: int) -> dict[str, Tensor]:
        """Do one round; do nothing after a round lowered the objective by less than the tolerance.

        Returns:
            The objective for each voxel of the patches.
        """
        del step
        if not self.state.settled:
            before, self._finished = self.state.objective, None
            after = self.coding.round(self.coder)
            done = before >= 0 and settled(before, after, self.recipe.optimiser.tolerance)
            self.state = CodingState(after, done)
        voxels = self.coding.voxels.sum() + self.coding.other_voxels.sum()
        return {"loss": self.state.objective / exact(voxels)}

    def check(self) -> None:
        """Check nothing: a round that does not lower the objective changes nothing."""

    def read(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Read the values of a round."""
        return read_values(values, self.recipe.training.batch)

    def maps(self, case: PreparedCase, engine: Engine, *, mirrored: bool = True) -> Maps:
        """Predict a prepared case as the run would ship it; always in one pass."""
        del mirrored
        return synthesise_prepared(
            Networks(self._shipped()),
            np.asarray(case.source),
            np.asarray(case.mask),
            plan=self.plan,
            conditional=False,
            error_scale=0.0,
            engine=engine,
        )

    def first_maps(self, case: PreparedCase, engine: Engine) -> Maps:
        """Predict a prepared case: there is no second stage."""
        return self.maps(case, engine)

    def model(self) -> Model:
        """Return what the run would ship now."""
        return Model(self.recipe, self.plan, self._shipped(), None, 0.0)

    def _shipped(self) -> SparseCoder:
        if self._finished is None:
            with torch.no_grad():
                self._finished = self.coding.finished(self.coder).eval()
        return self._finished
