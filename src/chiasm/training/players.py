"""The networks of a method, built from the fields of a recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple

import torch
from torch import nn

from chiasm.errors import RecipeError
from chiasm.methods import METHODS, TASKS, Method, make_recipe
from chiasm.networks.catalogue import GENERATORS, OWN, make_discriminator, make_network, needs_of
from chiasm.networks.discriminators import GlobalDiscriminator, LocalDiscriminator
from chiasm.networks.foreign import is_own_class
from chiasm.networks.generator import Dims, ResidualGenerator
from chiasm.networks.shapes import has_shapes_alone, without_memory
from chiasm.prediction.baselines import NAMES
from chiasm.prediction.model import (
    input_statistics,
    make_generator,
    make_local_discriminator,
    make_refiner,
    untaught_local,
)
from chiasm.preparation.patches import PatchNeeds
from chiasm.preparation.plan import Plan
from chiasm.recipe import LEAST_PATCH, Recipe
from chiasm.training.painted_lesions import CONTRASTS, is_paintable
from chiasm.training.pretrained import find_pretrained, read_pretrained

AUTO_SHARE = 0.5  # of the patches, where "auto" varies them: docs/results.md
AUTO_SIMULATED = 0.25  # likewise of simulated patients


@dataclass(frozen=True)
class Players:
    """The networks of a method; None for one that it does not need.

    Attributes:
        generator: Source to target.
        global_discriminator: One logit a sample, or None.
        second_discriminator: A second global one in the place of the local adversarial term (control C5), or None.
        local_discriminator: Logits a voxel: realness, magnitude, structured; or None.
        refiner: The second stage, which corrects where confidence is low; or None.
    """

    generator: nn.Module
    global_discriminator: nn.Module | None
    second_discriminator: nn.Module | None
    local_discriminator: LocalDiscriminator | None
    refiner: ResidualGenerator | None


def make_players(recipe: Recipe, plan: Plan, seed: int) -> Players:
    """Build the networks with weights that ship, or that depend only on `seed`, not on which networks exist.

    Raises:
        RecipeError: As `check_players`.
        RunError: If weights that ship are damaged.
    """
    check_players(recipe)
    loss = recipe.loss
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = make_generator(recipe, plan)
        start = find_pretrained(recipe, plan)
        if start.name is not None and not has_shapes_alone(generator):
            generator.load_state_dict(read_pretrained(start.name), strict=False)  # the look-up table stays its own
        torch.manual_seed(seed + 1)
        local_discriminator = make_local_discriminator(recipe, plan) if needs_local_discriminator(recipe) else None
        torch.manual_seed(seed + 2)
        global_discriminator = _make_global(recipe, plan) if loss.global_weight > 0 else None
        torch.manual_seed(seed + 3)
        second = recipe.discriminators.second_global and loss.local_weight > 0
        second_discriminator = _make_global(recipe, plan) if second else None
        torch.manual_seed(seed + 4)
        refiner = make_refiner(recipe, plan) if recipe.generator.refiner else None
    return Players(generator, global_discriminator, second_discriminator, local_discriminator, refiner)


def check_players(recipe: Recipe) -> None:
    """Refuse a recipe that its networks cannot follow.

    Raises:
        RecipeError: If it asks for a refiner or for difficult transplants without
            a local discriminator, for rounds of ADMM with other networks than a
            sparse coder or in stages, to paint lesions in other contrasts than those of a brain, or sets what a
            network of the literature has not.
    """
    _check_borrowed(recipe)
    _check_painted(recipe)
    if recipe.optimiser.kind == "admm":
        _check_coding(recipe)
    guided = {
        "generator.refiner": bool(recipe.generator.refiner),
        "training.transplant = difficulty": recipe.training.transplant == "difficulty",
    }
    if any(guided.values()) and not needs_local_discriminator(recipe):
        raise RecipeError(
            f"{' and '.join(compress(guided, guided.values()))} needs the confidence of a local discriminator, but "
            f"method {recipe.method} with these settings has none",
            reason="no-local-discriminator",
            found=f"attention.head {recipe.attention.head}, loss.local_weight {recipe.loss.local_weight:g}",
            hint="Set attention.head or a loss.local_weight above 0, or leave it out.",
        )


class Shares(NamedTuple):
    """Shares of the patches that are varied, and why.

    Attributes:
        classes: In which each class of tissue is shifted in the source.
        painted: Into which a simulated lesion is painted.
        simulated: That are of simulated patients.
        shaded: Whose source is shaded, as by a coil.
        reason: In words; empty where the recipe gives numbers.
    """

    classes: float
    painted: float
    simulated: float
    shaded: float
    reason: str


def varied_shares(recipe: Recipe, plan: Plan) -> Shares:
    """Return what the shares of varied patches come to where they are "auto".

    A half, a half, a quarter and a half where all images are MR contrasts of a brain that was cut out, for which they
    were measured, and none elsewhere.
    """
    training = recipe.training
    asked = (training.class_share, training.painted_share, training.simulated_share, training.shaded_share)
    why_not = _why_not(recipe, plan)
    usual = (0.0,) * len(asked) if why_not else (AUTO_SHARE, AUTO_SHARE, AUTO_SIMULATED, AUTO_SHARE)
    classes, painted, simulated, shaded = (auto if share == "auto" else share for share, auto in zip(asked, usual))
    why = why_not or f"sources and target are all among {', '.join(CONTRASTS)}, and the brain was cut out"
    return Shares(classes, painted, simulated, shaded, why if "auto" in asked else "")


def _why_not(recipe: Recipe, plan: Plan) -> str:
    """Say why patches are not varied by default; empty if they are."""
    if recipe.data.task == "super-resolution":
        return "source and target are one contrast"
    if recipe.data.histogram:
        return "ranks of the source would not change"
    if recipe.generator.network != OWN:
        return "networks of others are trained as their papers say"
    if not is_paintable((*plan.sources, plan.target)):
        return f"this was measured for {', '.join(CONTRASTS)} alone"
    return "" if plan.mask_rule == "nonzero" else "this was measured for brains that were cut out"


def _check_painted(recipe: Recipe) -> None:
    """Refuse to paint lesions in a modality whose lesions are not known."""
    contrasts = (*recipe.data.sources, recipe.data.target)
    for name in ("painted_share", "simulated_share"):
        if getattr(recipe.training, name) not in (0, "auto") and not is_paintable(contrasts):
            raise RecipeError(
                f"training.{name} shows lesions of a brain, and not in every modality",
                reason="contrast",
                found=", ".join(contrasts),
                expected=", ".join(CONTRASTS),
                hint=f"Set training.{name} to 0.",
            )


def _check_coding(recipe: Recipe) -> None:
    """Refuse rounds of ADMM for all recipes except a single sparse coder in one stage."""
    settings = recipe.generator
    players = (settings.refiner, recipe.loss.global_weight > 0, needs_local_discriminator(recipe))
    if settings.network != "jcsc" or any(players):
        raise RecipeError(
            "optimiser.kind = admm learns a sparse coder, alone",
            reason="admm",
            found=f"network {settings.network}, method {recipe.method}",
            expected="network jcsc without discriminators or second stage",
            hint="Use chiasm train --method jcsc, or optimiser.kind=adam.",
        )
    if settings.stages > 1:
        raise RecipeError(
            "a sparse coder has no stages: pairs are too few to be assigned to inner folds",
            reason="admm",
            found=f"generator.stages {settings.stages}",
            hint="Set generator.stages=1.",
        )


def _check_borrowed(recipe: Recipe) -> None:
    """Refuse settings of this project's own networks for networks of the literature, which do not have them."""
    generator, discriminators = recipe.generator, recipe.discriminators
    asked = {}
    if generator.network != OWN and generator.dropout > 0:
        asked["generator.dropout"] = generator.network, "A network with dropout takes generator.options={dropout=0.3}."
    if discriminators.global_network != OWN and discriminators.global_spectral_norm:
        asked["discriminators.global_spectral_norm"] = (
            discriminators.global_network,
            "Its discriminator normalises as published.",
        )
    for setting, (network, hint) in asked.items():
        raise RecipeError(
            f"{setting} is of this project's own network, not of {network}", reason="no-effect", hint=hint
        )


def patch_needs(recipe: Recipe) -> PatchNeeds | None:
    """Return the sizes of patches that networks of the literature and discriminators need; None if all are ours.

    Raises:
        RecipeError: If there is no such network, or it cannot be built.
    """
    settings, discriminators = recipe.generator, recipe.discriminators
    dims = _dims(recipe)
    assessed = 1
    if recipe.loss.global_weight > 0:
        assessed = 2 ** len(discriminators.global_widths)
        if discriminators.global_network != OWN:
            with torch.device("meta"):
                critic = make_discriminator(
                    discriminators.global_network, in_channels=2, dims=dims, scale=discriminators.scale
                )
            assessed = int(critic.smallest)  # type: ignore[arg-type]
    local = discriminators.local_multiple if needs_local_discriminator(recipe) else 1
    if settings.network == OWN:
        return None if discriminators.global_network == OWN else PatchNeeds(1, assessed, own=True)
    with nullcontext() if is_own_class(settings.network) else without_memory(), torch.random.fork_rng(devices=[]):
        network = make_network(
            settings.network,
            in_channels=len(recipe.data.sources),
            dims=dims,
            scale=settings.scale,
            options=settings.options,
        )
    needs = needs_of(network)
    left = max(assessed, local, needs.multiple)
    multiple = math.lcm(needs.multiple, local)
    offset = 2 * needs.margin % multiple if local > 1 else 0
    return PatchNeeds(multiple, max(needs.smallest, 2 * needs.margin + left), offset)


def needs_local_discriminator(recipe: Recipe) -> bool:
    """Return whether the method has a local discriminator: for its loss, its attention, or its expected error."""
    return _guides_generator(recipe) or recipe.discriminators.confidence


def only_expects_error(recipe: Recipe) -> bool:
    """Return whether the local discriminator learns to expect the error, and nothing goes by what it says."""
    guided = bool(recipe.generator.refiner) or recipe.training.transplant == "difficulty"
    return recipe.discriminators.confidence and not (_guides_generator(recipe) or guided)


def _guides_generator(recipe: Recipe) -> bool:
    adversarial = recipe.loss.local_weight > 0 and not recipe.discriminators.second_global
    return adversarial or recipe.attention.head != "none"


def _make_global(recipe: Recipe, plan: Plan) -> nn.Module:
    mean, sd = input_statistics(plan)
    discriminator = _untaught_global(recipe, len(mean), plan.dims)
    discriminator.get_submodule("standardise").set_input_statistics(mean, sd)  # type: ignore[operator]
    return discriminator


def _untaught_global(recipe: Recipe, channels: int, dims: Dims) -> nn.Module:
    """Build the global discriminator for a number of channels."""
    settings = recipe.discriminators
    if settings.global_network == OWN:
        return GlobalDiscriminator(
            in_channels=channels,
            widths=settings.global_widths,
            dims=dims,
            spectral_norm=settings.global_spectral_norm,
        )
    return make_discriminator(
        settings.global_network,
        in_channels=channels,
        dims=dims,
        scale=settings.scale,
        norm="none" if recipe.loss.adversarial == "wgan-gp" else "batch",
    )


#: What is no method of the table: tasks, other commands, networks of anybody's.
BESIDE: Mapping[str, str] = {
    **{f"chiasm train --task {task}": words for task, words in TASKS.items()},
    "chiasm register": "rigid, affine or diffeomorphic Demons (Vercauteren 2009)",
    "chiasm complete": "missing modalities of a cohort, by any method (Li 2014)",
    "chiasm mumap": "attenuation at 511 keV from CT (Kinahan 1998)",
    "chiasm train --set generator.network=monai:CLASS": "a network of MONAI, or your own: package.module:Class",
    "naive": f"{', '.join(NAMES)}: beside every method, in every table",
}


class MethodRow(NamedTuple):
    """The row of a method in `chiasm methods`.

    Attributes:
        name: For `--method` and for the arms of a study.
        words: What it is.
        paper: Whose network or objective it is.
        weights: Of the generators of all stages, and of a refiner, at the size asked for: one source in, and 2D unless
            it has 3D only.
        published: Of the generators likewise, at the published size; 0 where none was published.
        needs: What it asks of data and patch.
        discriminators: Weights of the discriminators of all stages, at the size asked for.
    """

    name: str
    words: str
    paper: str
    weights: int
    published: int
    needs: str
    discriminators: int


def describe_methods(size: str = "small") -> list[MethodRow]:
    """Describe every method of the table, in its order.

    Raises:
        RecipeError: If the size is unknown.
    """
    with torch.device("meta"):
        return [_describe(method, make_recipe(key, size)) for key, method in METHODS.items()]


def _describe(method: Method, recipe: Recipe) -> MethodRow:
    settings, entry = recipe.generator, GENERATORS.get(recipe.generator.network)
    needs = [*_list_dims(recipe), *_needs_in_words(recipe), *_list_asked(recipe)]
    weights = sum(map(_count, _stages(recipe, settings.scale)))
    if settings.refiner:  # sees confidence and image beside what the last stage sees
        seen = _channels(recipe, settings.stages) + 2
        weights += _count(
            ResidualGenerator(in_channels=seen, widths=settings.refiner, dims=_dims(recipe), norm=settings.norm)
        )
    published = sum(map(_count, _stages(recipe, 1.0))) if entry else 0
    listed = "; ".join(needs)
    return MethodRow(
        recipe.method, method.words, _paper(method, recipe), weights, published, listed, _count_discriminators(recipe)
    )


def _count_discriminators(recipe: Recipe) -> int:
    """Count the weights of the discriminators of each stage, for one source."""
    settings, dims = recipe.discriminators, _dims(recipe)
    count = 0
    for stage in range(1, recipe.generator.stages + 1):
        channels = _channels(recipe, stage) + 1
        if recipe.loss.global_weight > 0:
            count += _count(_untaught_global(recipe, channels, dims))
        if settings.second_global and recipe.loss.local_weight > 0:
            count += _count(_untaught_global(recipe, channels, dims))
        if needs_local_discriminator(recipe):
            count += _count(untaught_local(settings, channels, dims, spectral_norm=False))
    return count


def _paper(method: Method, recipe: Recipe) -> str:
    """Name the paper of the network, or of the objective if the network is ours."""
    network = recipe.generator.network
    if network == OWN:
        return f"{method.credit} (networks: ours)"
    return GENERATORS[network].paper if network in GENERATORS else network


def _list_dims(recipe: Recipe) -> list[str]:
    """Name the dimensions if there is only one choice."""
    if recipe.data.dims == "3d":
        return ["3D"]
    entry = GENERATORS.get(recipe.generator.network)
    return ["2D"] if entry and entry.dims == (2,) else []


def _list_asked(recipe: Recipe) -> list[str]:
    """Name discriminators, pairs and labels that the method needs."""
    training, needs_in_words = recipe.training, []
    discriminators = {"global": recipe.loss.global_weight > 0, "local": needs_local_discriminator(recipe)}
    if asked := list(compress(discriminators, discriminators.values())):
        needs_in_words.append(f"{' and '.join(asked)} discriminator{'s' if len(asked) > 1 else ''}")
    if recipe.optimiser.kind == "admm":
        needs_in_words.append("one pair or more (training.pairs); other cases, and lone images, serve unpaired")
    if any((recipe.loss.lesion > 1, training.transplant_share > 0, training.lesion_share > 0.25)):
        needs_in_words.append("lesion labels of training cases")
    return needs_in_words


def _needs_in_words(recipe: Recipe) -> list[str]:
    needs = patch_needs(recipe)
    if needs is None or needs.own:
        return []
    least = max(LEAST_PATCH, needs.smallest)
    least += (needs.offset - least) % needs.multiple
    needs_in_words = [f"patches of {least} or more"]
    if needs.multiple > 1:
        needs_in_words.append(f"{f'{needs.offset} voxels and ' if needs.offset else ''}multiples of {needs.multiple}")
    margin = needs_of(_stages(recipe, recipe.generator.scale)[0]).margin
    return [*needs_in_words, f"loses {margin} voxels on each side"] if margin else needs_in_words


def _stages(recipe: Recipe, scale: float) -> list[nn.Module]:
    """Build the generator of each stage, for one source."""
    settings, dims = recipe.generator, _dims(recipe)
    inputs = [_channels(recipe, stage) for stage in range(1, settings.stages + 1)]
    if settings.network == OWN:
        return [
            ResidualGenerator(in_channels=n, widths=settings.widths, dims=dims, norm=settings.norm, fold=settings.fold)
            for n in inputs
        ]
    return [
        make_network(settings.network, in_channels=n, dims=dims, scale=scale, options=settings.options) for n in inputs
    ]


def _channels(recipe: Recipe, stage: int) -> int:
    """Count the channels of a stage for one source: the image, its ranks, the image of the stage before."""
    return 1 + recipe.data.histogram + (stage > 1)


def _dims(recipe: Recipe) -> Dims:
    return 3 if recipe.data.dims == "3d" else 2


def _count(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())
