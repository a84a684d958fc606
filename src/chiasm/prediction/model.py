"""The model folder of a run, which predicts on another machine, without the training data.

`model/` holds the weights of the generator (of each stage), the local discriminator and the refiner,
the recipe, the plan (with the intensity maps), the calibration, the naive
baselines' tables where given, and `model.toml` with the sha256 of each and of
itself.  A folder whose files do not match is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from chiasm.checksums import sha256_of, with_checksum
from chiasm.errors import RecipeError, RunError
from chiasm.networks.catalogue import OWN, check_contract, make_network
from chiasm.networks.discriminators import LocalDiscriminator
from chiasm.networks.foreign import is_own_class
from chiasm.networks.generator import KNOTS, Dims, ResidualGenerator, Skip
from chiasm.networks.shapes import Shapes, shapes_of, without_memory
from chiasm.prediction.calibration import Calibration, read_calibration, write_calibration
from chiasm.prediction.model_files import (
    CALIBRATION,
    CARD,
    FORMAT,
    WEIGHTS,
    check_header,
    check_sums,
    check_trusted,
    find_model,
    read_card,
)
from chiasm.preparation.plan import Plan, read_plan, write_plan
from chiasm.recipe import Discriminators, Recipe, read_recipe, write_recipe
from chiasm.storage import copy_file, whole_file, whole_folder, write_toml


@dataclass(frozen=True)
class Model:
    """Networks, with all that is needed to apply them to a new volume.

    Attributes:
        recipe: What was asked for.
        plan: Grid, intensity maps and ranges.
        generator: Source to target, normalised units.
        local_discriminator: The local discriminator behind the expected-error map, or None.
        error_scale: s of the soft targets, normalised units.
        calibration: From the map's raw score to the expected absolute error, or None.
        sha256: Of the card, which names every file of the folder with its own; empty before it is saved.
        refiner: The second stage, which corrects the generator where the local
            discriminator is not convinced, or None.
        earlier: Generators of the stages before this one, first to last, whose
            prediction the next one sees beside the source; none without stages.
    """

    recipe: Recipe
    plan: Plan
    generator: nn.Module
    local_discriminator: nn.Module | None
    error_scale: float
    calibration: Calibration | None = None
    sha256: str = ""
    refiner: nn.Module | None = None
    earlier: tuple[nn.Module, ...] = ()


def source_channels(plan: Plan) -> int:
    """Count the generator's input channels: sources, their ranks and a context, times slices in 2D and 2.5D."""
    return (plan.images + plan.context) * (plan.slices if plan.dims == 2 else 1)


def input_statistics(plan: Plan) -> tuple[Tensor, Tensor]:
    """Return mean and SD of each channel of concat(source, image): the plan's for each image, 0 and 1 for ranks.

    A context is an image of the target, and has its values.
    """
    repeats = [plan.slices if plan.dims == 2 else 1] * (plan.images + plan.context) + [1]
    ranks = plan.images - len(plan.sources)

    def of_channels(values: Sequence[float], of_ranks: float) -> Tensor:
        of_images = [*values[:-1], *[of_ranks] * ranks, *[values[-1]] * plan.context, values[-1]]
        return torch.tensor([one for one, count in zip(of_images, repeats, strict=True) for _ in range(count)])

    return of_channels(plan.input_mean, 0.0), of_channels(plan.input_sd, 1.0)


def make_generator(recipe: Recipe, plan: Plan) -> nn.Module:
    """Build the generator of a recipe; the "lookup" skip of this project's own gets the plan's table.

    Raises:
        RecipeError: As `make_network` and `check_contract`.
    """
    generator = _untaught_generator(recipe, plan)
    if not isinstance(generator, ResidualGenerator):
        check_contract(generator, recipe.generator.network, source_channels(plan), plan.patch)
    elif generator.skip.kind == "lookup":
        x, y = (torch.tensor(knots, dtype=torch.float64) for knots in plan.lookup)
        even = torch.linspace(0, len(x) - 1, KNOTS, dtype=torch.float64)
        left = even.long().clamp(max=len(x) - 2)
        share = even - left
        generator.set_lookup(*(torch.lerp(k[left], k[left + 1], share).float() for k in (x, y)))
    return generator


def _untaught_generator(recipe: Recipe, plan: Plan) -> nn.Module:
    """Build the generator of a recipe without a trial, and without the plan's table."""
    settings, channels = recipe.generator, source_channels(plan)
    if settings.network != OWN:
        return make_network(
            settings.network, in_channels=channels, dims=plan.dims, scale=settings.scale, options=settings.options
        )
    slices = plan.slices if plan.dims == 2 else 1
    return ResidualGenerator(
        in_channels=channels,
        widths=settings.widths,
        dims=plan.dims,
        norm=settings.norm,
        skip=Skip(settings.skip, slices // 2),
        dropout=settings.dropout,
        fold=settings.fold,
    )


def make_local_discriminator(recipe: Recipe, plan: Plan) -> LocalDiscriminator:
    """Build the local discriminator of a recipe; an unconditional one sees only the image."""
    settings = recipe.discriminators
    mean, sd = input_statistics(plan)
    discriminator = untaught_local(settings, len(mean), plan.dims, spectral_norm=settings.spectral_norm)
    if not settings.conditional:
        mean, sd = mean[-1:], sd[-1:]
    discriminator.standardise.set_input_statistics(mean, sd)
    return discriminator


def untaught_local(settings: Discriminators, channels: int, dims: Dims, *, spectral_norm: bool) -> LocalDiscriminator:
    """Build a local discriminator that knows nothing of the images.

    Args:
        settings: Of the recipe.
        channels: Of source and image together; an unconditional one sees only the last.
        dims: Spatial axes of a convolution.
        spectral_norm: Whether its trunk is spectrally normalised; one that only takes weights is set up faster without.
    """
    return LocalDiscriminator(
        in_channels=channels if settings.conditional else 1,
        widths=settings.local_widths,
        dims=dims,
        spectral_norm=spectral_norm,
        fold=settings.local_fold,
    )


def make_refiner(recipe: Recipe, plan: Plan) -> ResidualGenerator:
    """Build the second stage of a recipe: it sees source, prediction and confidence, and at first corrects nothing."""
    settings = recipe.generator
    refiner = ResidualGenerator(
        in_channels=source_channels(plan) + 2, widths=settings.refiner, dims=plan.dims, norm=settings.norm
    )
    for parameter in refiner.last.parameters():
        nn.init.zeros_(parameter)
    return refiner


def save_model(folder: Path, model: Model, extras: Mapping[str, Path] | None = None) -> None:
    """Write a model folder, whole or not at all.

    Args:
        folder: Its place; an older model there is replaced.
        model: What to write.
        extras: Files to copy in, by the name they get.

    Raises:
        RunError: If a weight is not a finite number.
        ChiasmError: If the folder cannot be written.
    """
    weights = _weights_of(model)
    try:
        _check_numbers(weights)
    except ValueError as error:
        raise RunError(
            "is not written: a weight is not a number", path=folder, reason="not-finite", found=str(error)
        ) from error
    with whole_folder(folder) as fresh:
        _write(fresh, model, weights, extras or {})


def _write(folder: Path, model: Model, weights: Mapping[str, Tensor], extras: Mapping[str, Path]) -> None:
    with whole_file(folder / WEIGHTS) as temporary:  # safetensors' own writing hides a full disk from `whole_file`
        temporary.write_bytes(save(dict(weights)))
    write_recipe(folder / "recipe.toml", model.recipe)
    write_plan(folder / "plan.toml", replace(model.plan, expected=None))  # what training costs is no part of a model
    if model.calibration is not None:
        write_calibration(folder / CALIBRATION, model.calibration)
    for name, path in extras.items():
        copy_file(path, folder / name)
    _write_card(folder, float(model.error_scale), model.recipe.training.parent)


def _write_card(folder: Path, error_scale: float, parent: str) -> None:
    """Write the card of a model folder that is complete otherwise."""
    sums = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    named = {"parent": parent} if parent else {}
    write_toml(folder / CARD, with_checksum({"format": FORMAT, "error_scale": error_scale, **named, "sha256": sums}))


def replace_calibration(folder: Path, calibration: Calibration) -> None:
    """Write a model folder anew with another calibration of its expected error, whole or not at all.

    Args:
        folder: The model folder.
        calibration: The new one.

    Raises:
        RunError: If a file of the model is missing or was changed.
        ChiasmError: If the folder cannot be written.
    """
    card = read_card(folder)
    check_sums(folder, card, card.sha256)
    with whole_folder(folder) as fresh:
        for name in card.sha256.keys() - {CALIBRATION}:
            copy_file(folder / name, fresh / name)
        write_calibration(fresh / CALIBRATION, calibration)
        _write_card(fresh, card.error_scale, card.parent)


def _weights_of(model: Model) -> dict[str, Tensor]:
    """Return all weights by their names in the file, on the CPU."""
    return {
        f"{prefix}.{name}": value.detach().cpu().contiguous()
        for prefix, network in _parts(model)
        for name, value in network.state_dict().items()
    }


def load_model(path: Path, *, trust: str | Collection[str] = ()) -> Model:
    """Load a model from its folder, or from the run folder that holds it; nothing in it runs code.

    Networks are chiasm's own and those of MONAI's table.  Their shapes are
    compared with the file of weights before any memory is taken for them.

    Args:
        path: The folder.
        trust: Classes of others, as ``package.module:Class``, that the user names:
            a model of such a class imports that code.

    Raises:
        RunError: If there is none, a file is missing or was changed, it was
            written by a newer chiasm, or its network is code that `trust` does not name.
        RecipeError: If a network cannot be built.
    """
    folder = find_model(path)
    card = read_card(folder)
    check_sums(folder, card, card.sha256.keys() - {WEIGHTS})
    recipe, plan = read_recipe(folder / "recipe.toml"), read_plan(folder / "plan.toml")
    if is_own_class(recipe.generator.network):
        check_trusted(recipe.generator.network, trust, folder)
    try:
        check_header(folder / WEIGHTS)
        found = _shapes_in(folder / WEIGHTS)
        with_discriminator = any(name.startswith("local.") for name in found)
        _check_shapes(recipe, plan, found, with_discriminator=with_discriminator)
        check_sums(folder, card, [WEIGHTS])
        model = _made(recipe, plan, with_discriminator=with_discriminator)
        weights = load_file(folder / WEIGHTS)
        _check_numbers(weights)
        for prefix, network in _parts(model):
            network.load_state_dict(_part(weights, f"{prefix}."))
            network.eval()
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise RunError(
            "holds no weights of this model's networks",
            path=folder / WEIGHTS,
            reason="damaged",
            found=str(error).strip().partition("\n")[0],
        ) from error
    calibrated = CALIBRATION in card.sha256
    return replace(
        model,
        error_scale=card.error_scale,
        calibration=read_calibration(folder / CALIBRATION) if calibrated else None,
        sha256=sha256_of(folder / CARD),
    )


def _made(recipe: Recipe, plan: Plan, *, with_discriminator: bool) -> Model:
    """Build a model's networks with weights that are still to be loaded."""
    return Model(
        recipe,
        plan,
        make_generator(recipe, plan),
        make_local_discriminator(recipe, plan) if with_discriminator else None,
        0.0,
        refiner=make_refiner(recipe, plan) if recipe.generator.refiner else None,
        earlier=tuple(make_generator(recipe, one) for one in _earlier_plans(recipe, plan)),
    )


def _earlier_plans(recipe: Recipe, plan: Plan) -> list[Plan]:
    """Return the plan of each stage before the last one."""
    return [replace(plan, context=stage > 0) for stage in range(recipe.generator.stages - 1)]


def _parts(model: Model) -> Iterator[tuple[str, nn.Module]]:
    """List a model's networks by the prefix that their weights have in the file."""
    named = {"generator": model.generator, "local": model.local_discriminator, "refiner": model.refiner}
    yield from ((name, network) for name, network in named.items() if network is not None)
    yield from ((f"stage{stage}", network) for stage, network in enumerate(model.earlier, start=1))


def _check_shapes(recipe: Recipe, plan: Plan, found: Shapes, *, with_discriminator: bool) -> None:
    """Compare what networks would hold with what a file has, without memory for either.

    Raises:
        ValueError: If they differ.
        RecipeError: If a network cannot be built.
    """
    try:
        with without_memory():
            expected = _unnormalised(
                shapes_of(_parts(_untaught_model(recipe, plan, with_discriminator=with_discriminator)))
            )
    except RecipeError as error:
        if is_own_class(recipe.generator.network) and error.reason == "network":
            return  # a class that the user trusts may need numbers to be built
        raise
    _compare_shapes(expected, found)


def _compare_shapes(expected: Shapes, found: Shapes) -> None:
    if strange := sorted(expected.keys() ^ found.keys()):
        raise ValueError(
            f"{strange[0]} is {'missing' if strange[0] in expected else 'not part of a network of the model'}"
        )
    if other := next((name for name in expected if expected[name] != found[name]), None):
        raise ValueError(f"{other} has the shape {found[other]}, and the network has {expected[other]}")


def _untaught_model(recipe: Recipe, plan: Plan, *, with_discriminator: bool) -> Model:
    seen = source_channels(plan) + 1
    return Model(
        recipe,
        plan,
        _untaught_generator(recipe, plan),
        untaught_local(recipe.discriminators, seen, plan.dims, spectral_norm=False) if with_discriminator else None,
        0.0,
        refiner=make_refiner(recipe, plan) if recipe.generator.refiner else None,
        earlier=tuple(_untaught_generator(recipe, one) for one in _earlier_plans(recipe, plan)),
    )


def _shapes_in(path: Path) -> Shapes:
    """Read the tensors' shapes in a file of weights, only from its header."""
    with safe_open(path, "pt") as file:
        return _unnormalised({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118


def _check_numbers(weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not real, finite numbers, except the whole-number counts of batches.

    Raises:
        ValueError: If there are such weights.
    """
    for name, value in weights.items():
        is_count = name.endswith("num_batches_tracked")
        if not (value.is_floating_point() or (is_count and not value.is_complex())):
            raise ValueError(f"{name} holds {value.dtype}, and weights are floating-point numbers")
        if not is_count and not torch.isfinite(value).all():
            raise ValueError(f"{name} holds NaN or infinite values")


def _unnormalised(shapes: Shapes) -> Shapes:
    """Return the names of weights without the suffixes of spectral normalisation."""
    return {
        name.replace(".parametrizations.weight.original", ".weight"): shape
        for name, shape in shapes.items()
        if not name.endswith(("._u", "._v"))
    }


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
