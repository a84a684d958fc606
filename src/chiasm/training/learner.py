"""One training step of generator and discriminators, and the model that they make.

A step follows the method: draw patches, one shared forward pass, then train the discriminators, the generator, and the
refiner if there is one.  The refiner sends no gradient to the other networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from chiasm.prediction.engines import Engine
from chiasm.prediction.model import Model
from chiasm.prediction.passes import Maps, Networks, synthesise_prepared
from chiasm.preparation.arrays import PreparedCase
from chiasm.preparation.plan import Plan
from chiasm.preparation.planes import seen_by_networks
from chiasm.recipe import Average, Recipe
from chiasm.training import attention, ranks
from chiasm.training.batches import Variation, lesion_voxels
from chiasm.training.classes import find_classes
from chiasm.training.discriminator_step import step_discriminators, step_global
from chiasm.training.generator_step import step_generator
from chiasm.training.grown_lesions import grow_lesions
from chiasm.training.painted_lesions import make_painter
from chiasm.training.players import varied_shares
from chiasm.training.reading import PendingValues, check, is_reading_step, read_values, watch, with_values
from chiasm.training.sampler import draw, gate_is_open
from chiasm.training.setting import Draw, Setting, make_draw
from chiasm.training.state import KEPT, TrainingState
from chiasm.training.trainables import Trainables


class Learner:
    """A training between its steps: networks and their state.

    Args:
        recipe: Resolved settings.
        plan: What follows from the data.
        training: Prepared training cases.
        fabric: Devices and precision, launched.
    """

    def __init__(self, recipe: Recipe, plan: Plan, training: Sequence[PreparedCase], fabric: Fabric) -> None:
        self.recipe, self.plan, self.fabric = recipe, plan, fabric
        self.trainables = Trainables(recipe, plan, fabric)
        variation = _make_variation(recipe, plan, training)
        training = seen_by_networks(training, plan)
        self.setting = Setting(recipe, plan, training, lesion_voxels(training), self.trainables, variation)
        self.state = TrainingState().to(fabric.device)
        self._watch: PendingValues | None = None

    @property
    def parts(self) -> dict[str, Any]:
        """Everything with tensors that a checkpoint holds, by name."""
        return self.trainables.parts

    @property
    def has_refiner(self) -> bool:
        """Whether a second stage corrects what the generator made."""
        return self.trainables.average_refiner is not None

    def restore(self, content: Mapping[str, Any]) -> None:
        """Go on from the state of a checkpoint."""
        self.state = TrainingState.from_dict({**self.state.to_dict(), **content}, self.fabric.device)
        self._watch = None

    def adopt(self, model: Model) -> None:
        """Start with the weights of a model of this recipe, and with the scale of its errors."""
        self.trainables.adopt(model)
        self.state = replace(self.state, error_scale=torch.full_like(self.state.error_scale, model.error_scale))

    def note_validation(self, rho: float) -> None:
        """Pass the relation of difficulty and error on validation cases to the health gate."""
        self.state = replace(self.state, rho=rho)

    def phase(self, step: int) -> attention.Phase:
        """Return who learns at a step, and how strong the terms are; the same for all arms."""
        schedule = self.recipe.schedule
        return attention.phase(
            step,
            steps=schedule.steps,
            generator_alone=schedule.generator_alone,
            discriminators_alone=schedule.discriminators_alone,
            ramp=schedule.ramp,
        )

    def step(self, step: int) -> dict[str, Tensor]:
        """Do one step: draw a batch, one forward pass of the generator, discriminators, generator.

        Nothing here waits for the device, except reading the difficulty of lesions every few steps.

        Returns:
            Values for the log, one number each, on the device; of this process's samples where there are several.
        """
        self.trainables.set_rates(step)
        now = self.phase(step)
        if not now.generator and len(self.trainables.modules) == 1:
            return {}  # the discriminators' turn, and there are none
        values: dict[str, Tensor] = {}
        for turn in range(1, self.recipe.loss.discriminator_steps if now.generator and now.discriminators else 1):
            self.state, more = step_global(self.setting, self.state, self._draw(step, now, turn))
            values |= more
        drawn = self._draw(step, now)
        error, mask = drawn.made.detach() - drawn.batch.target, drawn.batch.mask
        scale = attention.update_error_scale(self.state.error_scale, error, mask, KEPT, len(drawn.places))
        self.state = replace(self.state, error_scale=scale)
        if now.discriminators:
            self.state, more = step_discriminators(self.setting, self.state, drawn.detached())
            values |= more
        if now.generator:
            self.state, more = step_generator(self.setting, self.state, drawn)
            values |= more
        self._watch = watch(self._watch, values, drawn)
        if is_reading_step(self.recipe, step):
            self.state = self.state.read(gate_is_open(self.setting, self.state))
        return values

    def _draw(self, step: int, phase: attention.Phase, turn: int = 0) -> Draw:
        places = draw(self.setting, self.state, step, phase, turn)
        return make_draw(self.setting, step, phase, places, turn)

    def check(self) -> None:
        """Wait for the device, and stop if a value was not a finite number since the last check, or a weight is not.

        Raises:
            NotFinite: Then; the message names value, step and cases of the last step.
        """
        if self._watch is not None:
            weights = {f"a weight of {name}": size for name, size in self.trainables.largest_weights().items()}
            check(with_values(self._watch, weights), self.setting.names)
        self._watch = None

    def read(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Check, and read the values of the last step: averages over the samples of all processes."""
        self.check()
        return read_values(values, len(ranks.share(range(self.recipe.training.batch))))

    def maps(self, case: PreparedCase, engine: Engine, *, mirrored: bool = True) -> Maps:
        """Predict a prepared case with the model of this moment: averaged weights, local discriminator, refiner.

        Args:
            case: Of any role.
            engine: What predicts.
            mirrored: Whether to average over mirror images, if the recipe does so.
        """
        average = self.recipe.generator.average if mirrored else "none"
        return self._maps(case, engine, self.trainables.average_refiner, average)

    def first_maps(self, case: PreparedCase, engine: Engine) -> Maps:
        """Predict a prepared case in one pass without the refiner, as the attention and its health gate see it."""
        return self._maps(case, engine, None, "none")

    def _maps(self, case: PreparedCase, engine: Engine, refiner: nn.Module | None, average: Average) -> Maps:
        local = self._local()
        local_discriminator = None if local is None else local.eval()
        found = synthesise_prepared(
            Networks(self.trainables.average, local_discriminator, refiner, average=average),
            np.asarray(case.source),
            np.asarray(case.mask),
            plan=self.plan,
            conditional=self.recipe.discriminators.conditional,
            error_scale=float(self.state.error_scale),
            engine=engine,
        )
        if local is not None:
            local.train()
        return found

    def model(self) -> Model:
        """Return the model of this moment."""
        average, refiner = self.trainables.average, self.trainables.average_refiner
        return Model(self.recipe, self.plan, average, self._local(), float(self.state.error_scale), refiner=refiner)

    def _local(self) -> nn.Module | None:
        return self.trainables.bare("local_discriminator") if "local_discriminator" in self.trainables.modules else None


def _make_variation(recipe: Recipe, plan: Plan, training: Sequence[PreparedCase]) -> Variation:
    """Fit the tables that varied patches of training cases need, if the recipe has such patches.

    Tumours grow in cases in RAS order, because they know up from down.
    """
    shares, contrasts = varied_shares(recipe, plan), (*plan.sources, plan.target)
    classes = find_classes(training, recipe.training.seed) if shares.classes or shares.simulated else None
    painter = make_painter(training, contrasts, plan.spacing_mm) if shares.painted or shares.simulated else None
    grown = grow_lesions(training, painter, recipe.training.seed) if painter and shares.simulated else ()
    seen = [[lesion.reordered(plan.axes) for lesion in lesions] for lesions in grown]
    return Variation(classes, None if painter is None else replace(painter, spacing_mm=plan.seen_mm), seen)
