"""Which networks make an arm: the recipe's fields turned into players."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from chiasm.cohorts.planning import Plan
from chiasm.errors import RecipeError
from chiasm.networks.discriminators import GlobalDiscriminator, LocalDiscriminator
from chiasm.networks.generator import Generator
from chiasm.prediction.model import input_statistics, make_generator, make_local_discriminator, make_refiner
from chiasm.recipe import Recipe


@dataclass(frozen=True)
class Players:
    """The networks of an arm; one that the arm does not need is absent.

    Attributes:
        generator: Source to target.
        global_judge: One logit a sample, or None.
        second_judge: A second global one in the place of the local adversarial term (control C5), or None.
        local_judge: Logits a voxel: realness, magnitude, structured; or None.
        refiner: The second stage, which corrects where confidence is low; or None.
    """

    generator: nn.Module
    global_judge: GlobalDiscriminator | None
    second_judge: GlobalDiscriminator | None
    local_judge: LocalDiscriminator | None
    refiner: Generator | None


def make_players(recipe: Recipe, plan: Plan, seed: int) -> Players:
    """Build the networks with weights that depend on `seed` alone, not on which of them exist.

    Raises:
        RecipeError: As `check_players`.
    """
    check_players(recipe)
    loss = recipe.loss
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = make_generator(recipe, plan)
        torch.manual_seed(seed + 1)
        local_judge = make_local_discriminator(recipe, plan) if needs_local_judge(recipe) else None
        torch.manual_seed(seed + 2)
        global_judge = _make_global(recipe, plan) if loss.global_weight > 0 else None
        torch.manual_seed(seed + 3)
        second = recipe.discriminators.second_global and loss.local_weight > 0
        second_judge = _make_global(recipe, plan) if second else None
        torch.manual_seed(seed + 4)
        refiner = make_refiner(recipe, plan) if recipe.generator.refiner else None
    return Players(generator, global_judge, second_judge, local_judge, refiner)


def check_players(recipe: Recipe) -> None:
    """Refuse a recipe that needs the confidence of a local discriminator it does not have.

    Raises:
        RecipeError: If it asks for a refiner or for difficult transplants without one.
    """
    needing = {"generator.refiner": bool(recipe.generator.refiner)}
    needing["training.transplant = difficulty"] = recipe.training.transplant == "difficulty"
    asked = [name for name, needed in needing.items() if needed]
    if asked and not needs_local_judge(recipe):
        raise RecipeError(
            f"{' and '.join(asked)} goes by the confidence of a local discriminator, and method {recipe.method} "
            "as it is set has none",
            reason="no-local-judge",
            found=f"attention.target {recipe.attention.target}, loss.local_weight {recipe.loss.local_weight:g}",
            hint="Set attention.target or a loss.local_weight above 0, or leave it out.",
        )


def needs_local_judge(recipe: Recipe) -> bool:
    """Tell whether the arm's loss or attention asks the local discriminator."""
    adversarial = recipe.loss.local_weight > 0 and not recipe.discriminators.second_global
    return adversarial or recipe.attention.target != "none"


def _make_global(recipe: Recipe, plan: Plan) -> GlobalDiscriminator:
    mean, sd = input_statistics(plan)
    judge = GlobalDiscriminator(in_channels=len(mean), widths=recipe.discriminators.global_widths, dims=plan.dims)
    judge.standardise.set_input_statistics(mean, sd)
    return judge
