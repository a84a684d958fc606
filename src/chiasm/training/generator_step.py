"""One step of the generator: it learns from the target and from the discriminators, weighted by the attention.

The counterpart of `discriminator_step`, with the same draw and the same losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from chiasm.networks.discriminators import LocalLogits
from chiasm.prediction.passes import refine
from chiasm.recipe import Loss
from chiasm.training import attention, losses, ranks
from chiasm.training.batches import Batch
from chiasm.training.players import only_expects_error
from chiasm.training.sampler import gate_is_open, note_lesions, remember
from chiasm.training.setting import Draw, Setting, StepOutcome, beside_source, send, shown_locally
from chiasm.training.state import TrainingState, exact, running

GENERATOR_LOSS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "bce": losses.adversarial_generator_loss,
    "lsgan": losses.least_squares_generator_loss,
    "hinge": losses.wasserstein_generator_loss,
    "wgan": losses.wasserstein_generator_loss,
    "wgan-gp": losses.wasserstein_generator_loss,
}


class Weighed(NamedTuple):
    """Weights of the voxels, the next state, and values for the log."""

    weight: Tensor
    state: TrainingState
    values: Mapping[str, Tensor]


def step_generator(setting: Setting, state: TrainingState, drawn: Draw) -> StepOutcome:
    """Train the generator on one draw, and the refiner on the generator's image."""
    trainables, settings = setting.trainables, setting.recipe.loss
    batch, made = drawn.batch, drawn.made
    values: Mapping[str, Tensor] = {}
    with trainables.frozen_discriminators():
        adversarial = _global_term(setting, drawn)
        weight, logits = torch.ones_like(made), _local_logits(setting, drawn)
        if logits is not None:
            state = note_lesions(setting, state, drawn, logits)
            adversarial = adversarial + _local_term(setting, drawn, logits)
            weight, state, values = attention_weights(setting, state, drawn, logits)
        weight = weight * control_weights(settings, batch, made, len(drawn.places))
        reconstruction = losses.reconstruction_loss(made, batch.target, batch.mask, weight, _power(settings))
        loss = reconstruction + drawn.phase.adversarial * adversarial
        if settings.gradient_difference > 0:
            difference = losses.gradient_difference_loss(made, batch.target, batch.mask, setting.plan.dims)
            loss = loss + settings.gradient_difference * difference
        trainables.descend("generator", loss, drawn.share)
    trainables.move_average("generator", drawn.step)
    if logits is not None and trainables.average_refiner is not None:
        values = {**values, **step_refiner(setting, drawn.detached(), logits.structured.detach())}
    values = {
        **values,
        "loss": loss.detach(),
        "reconstruction": reconstruction.detach(),
        "adversarial": drawn.phase.adversarial * adversarial.detach(),
    }
    return StepOutcome(state, values)


def step_refiner(setting: Setting, drawn: Draw, structured: Tensor) -> dict[str, Tensor]:
    """Train the second stage on the target, with the first stage's image and difficulties, both without gradient.

    Args:
        setting: What stays the same.
        drawn: Its `made` without gradient.
        structured: Logits of the structured head, shape (N, 1, *spatial), likewise.
    """
    trainables, batch = setting.trainables, drawn.batch
    refined = refine(trainables.modules["refiner"].train(), batch.source, drawn.made, structured, batch.mask)
    loss = losses.reconstruction_loss(refined, batch.target, batch.mask, p=_power(setting.recipe.loss))
    trainables.descend("refiner", loss, drawn.share)
    age = drawn.step - setting.recipe.schedule.ends["discriminators"]
    trainables.move_average("refiner", age)
    return {"refinement": loss.detach()}


def attention_weights(setting: Setting, state: TrainingState, drawn: Draw, logits: LocalLogits) -> Weighed:
    """Turn the confidence of the chosen head into weights, unless the health gate is closed."""
    settings, batch = setting.recipe.attention, drawn.batch
    ones = torch.ones_like(batch.target)
    if settings.head == "none" or drawn.phase.attention <= 0:
        return Weighed(ones, state, {})
    confidence = torch.sigmoid(getattr(logits, settings.head).float())
    sd = masked_sd(confidence.detach(), batch.mask)
    state = replace(state, confidence_sd=running(state.confidence_sd, sd))
    strength = torch.full_like(sd, drawn.phase.attention * settings.strength)
    if settings.gate:
        is_open = gate_is_open(setting, state)
        strength = torch.where(is_open, strength, 0)
        state = replace(state, closed_steps=state.closed_steps + ~is_open)
    state = replace(state, attention_steps=state.attention_steps + 1)
    values = {"attention_strength": strength}
    if settings.use != "weight":
        state = remember(state, drawn, confidence.detach())
    if settings.use == "sample":
        return Weighed(ones, state, values)
    weight = attention.attention_weight(
        confidence,
        batch.mask,
        beta=settings.beta,
        norm=settings.norm,
        cap=settings.cap,
        strength=strength,
        detach=settings.detach,
    )
    if settings.shuffle:
        whole = torch.rand(len(drawn.places), *weight.shape[1:], generator=setting.numbers(drawn.step, 2))
        keys = send(whole[ranks.rank() :: ranks.count()], weight.device)
        weight = attention.shuffle_weight(weight, batch.mask, keys)
    return Weighed(weight, state, {**values, **_weight_ratio(weight, batch)})


def masked_sd(a: Tensor, mask: Tensor) -> Tensor:
    """Return the standard deviation inside the masks of all processes, one number; 0 where there is none."""
    voxels, sums = ranks.total(torch.stack([exact(mask.sum()), exact(torch.where(mask, a, 0).sum())]))
    off = exact(torch.where(mask, a - sums / voxels.clamp(min=1), 0).square().sum())
    return torch.sqrt(ranks.total(off) / (voxels - 1).clamp(min=1))


def _weight_ratio(weight: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Compare the weights of lesion and healthy voxels; not a number where the batch has not both."""
    parts = (batch.lesion & batch.mask, ~batch.lesion & batch.mask)
    weight = weight.detach()
    sums = [number for part in parts for number in (torch.where(part, weight, 0).sum(), part.sum())]
    lesion, lesion_voxels, healthy, healthy_voxels = ranks.total(torch.stack([exact(one) for one in sums]))
    return {"weight_ratio": (lesion / lesion_voxels) / (healthy / healthy_voxels)}


def control_weights(settings: Loss, batch: Batch, made: Tensor, samples: int) -> Tensor:
    """Return the weights of the controls: focal (C1), top-k (C2) and the lesion oracle (C3); ones otherwise."""
    error = (made - batch.target).detach()
    weight = torch.ones_like(error)
    if settings.focal > 0:
        weight = weight * losses.focal_weight(error, batch.mask, settings.focal)
    if settings.top_k < 1:
        weight = weight * losses.top_k_weight(error, batch.mask, settings.top_k, samples)
    if settings.lesion > 1:
        weight = weight * attention.lesion_weight(batch.lesion, settings.lesion, batch.mask)
    return weight


def _global_term(setting: Setting, drawn: Draw) -> Tensor:
    """Return the weighted adversarial loss of the discriminators of whole images; 0 if they do not take part."""
    settings, trainables = setting.recipe.loss, setting.trainables
    term = torch.zeros((), device=drawn.made.device)
    if drawn.phase.adversarial <= 0:
        return term
    for name, factor in (
        ("global_discriminator", settings.global_weight),
        ("second_discriminator", settings.local_weight),
    ):
        if name in trainables.modules:
            with trainables.fabric.autocast():
                logits = trainables.bare(name)(beside_source(drawn.batch, drawn.made)).float()
            term = term + factor * GENERATOR_LOSS[settings.adversarial](logits)
    return term


def _local_logits(setting: Setting, drawn: Draw) -> LocalLogits | None:
    """Return the local discriminator's logits of the prediction; None if it does not take part."""
    trainables, phase = setting.trainables, drawn.phase
    is_absent = "local_discriminator" not in trainables.modules or only_expects_error(setting.recipe)
    if is_absent or (phase.adversarial <= 0 and phase.attention <= 0):
        return None
    with trainables.fabric.autocast():
        logits: LocalLogits = trainables.bare("local_discriminator")(
            shown_locally(setting.recipe, drawn.batch, drawn.made)
        )
    return logits


def _local_term(setting: Setting, drawn: Draw, logits: LocalLogits) -> Tensor | float:
    """Return the weighted adversarial loss of the local discriminator; 0 if a second global one takes its place."""
    weight = setting.recipe.loss.local_weight
    if weight <= 0 or setting.recipe.discriminators.second_global:
        return 0.0
    return weight * losses.adversarial_generator_loss(logits.realness.float(), mask=drawn.batch.mask)


def _power(settings: Loss) -> int:
    return 1 if settings.norm == "l1" else 2
