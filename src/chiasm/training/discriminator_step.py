"""One step of the discriminators: they learn to separate real from synthetic images, and to predict the error.

The counterpart of `generator_step`, with the same draw and the same losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.parametrize import cached

from chiasm.networks.discriminators import LocalLogits
from chiasm.training import losses, ranks
from chiasm.training.players import only_expects_error
from chiasm.training.setting import Draw, Setting, StepOutcome, beside_source, shown_locally
from chiasm.training.state import TrainingState, running

CRITIC_LOSS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lsgan": losses.least_squares_discriminator_loss,
    "hinge": losses.hinge_discriminator_loss,
    "wgan": losses.wasserstein_discriminator_loss,
    "wgan-gp": losses.wasserstein_discriminator_loss,
}


def step_discriminators(setting: Setting, state: TrainingState, drawn: Draw) -> StepOutcome:
    """Train all discriminators on real images and on the generator's images of the same patches."""
    state, values = step_global(setting, state, drawn)
    if "local_discriminator" not in setting.trainables.modules:
        return StepOutcome(state, values)
    state, more = step_local(setting, state, drawn)
    return StepOutcome(state, {**values, **more})


def step_global(setting: Setting, state: TrainingState, drawn: Draw) -> StepOutcome:
    """Train the discriminators of whole images to separate real from synthetic."""
    trainables, values = setting.trainables, dict[str, Tensor]()
    pairs = beside_source(drawn.batch, drawn.batch.target), beside_source(drawn.batch, drawn.made)
    for name in ("global_discriminator", "second_discriminator"):
        if name not in trainables.modules:
            continue
        with cached():  # as in `step_local`
            real, synthetic = (trainables.modules[name](pair).float() for pair in pairs)
        loss = critic_loss(setting, real, synthetic) + _penalty(setting, drawn, name, pairs)
        trainables.descend(name, loss, drawn.share)
        if setting.recipe.loss.adversarial == "wgan":
            trainables.clip(name, setting.recipe.loss.clip)
        right = ((real > 0).float().mean() + (synthetic < 0).float().mean()) / 2
        state = replace(state, accuracy_global=running(state.accuracy_global, ranks.mean(right, len(real))))
        values |= {f"{name}_loss": loss.detach(), "accuracy_global": state.accuracy_global}
    return StepOutcome(state, values)


def critic_loss(setting: Setting, real: Tensor, synthetic: Tensor) -> Tensor:
    """Return the loss of a discriminator of whole images, without a penalty."""
    settings = setting.recipe.loss
    if settings.adversarial == "bce":
        return losses.adversarial_discriminator_loss(real, synthetic, smoothing=settings.smoothing)
    return CRITIC_LOSS[settings.adversarial](real, synthetic)


def _penalty(setting: Setting, drawn: Draw, name: str, pairs: tuple[Tensor, Tensor]) -> Tensor | float:
    """Return the gradient penalty of a Wasserstein critic, on every n-th of its steps; 0 otherwise."""
    settings, every = setting.recipe.loss, setting.recipe.loss.penalty_every
    joined = max(
        0, drawn.step - setting.recipe.schedule.ends["discriminators"]
    )  # steps with several turns: one while alone
    taken = drawn.step + (settings.discriminator_steps - 1) * joined + drawn.turn
    if settings.adversarial != "wgan-gp" or taken % every:
        return 0.0
    whole = torch.rand(len(drawn.places), generator=setting.numbers(drawn.step, 1, drawn.turn))
    factor = whole[ranks.rank() :: ranks.count()]
    critic = setting.trainables.bare(name)

    def score(pair: Tensor) -> Tensor:
        scores: Tensor = critic(pair).reshape(len(pair), -1).mean(1)
        return scores

    return every * settings.penalty * losses.gradient_penalty(score, *pairs, factor)


def step_local(setting: Setting, state: TrainingState, drawn: Draw) -> StepOutcome:
    """Train the local discriminator voxel by voxel, and its confidence heads to predict the error.

    Where nothing goes by it, real images are not shown: the confidence heads learn from synthetic ones alone.
    """
    recipe, (batch, fake) = setting.recipe, (drawn.batch, drawn.made)
    discriminator, mask = setting.trainables.modules["local_discriminator"].train(), batch.mask
    with cached():  # spectral norms, and their power iterations, once for both (Miyato 2018, algorithm 1)
        real = None if only_expects_error(recipe) else discriminator(shown_locally(recipe, batch, batch.target))
        synthetic = discriminator(shown_locally(recipe, batch, fake))
    loss, values = _expectation(setting, state, drawn, synthetic)
    if real is not None:
        realness, on_fake = real.realness.float(), synthetic.realness.float()
        separation = losses.adversarial_discriminator_loss(realness, on_fake, smoothing=0.0, mask=mask)
        loss = separation + loss
        hits = losses.masked_mean((realness > 0).float(), mask) + losses.masked_mean((on_fake < 0).float(), mask)
        state = replace(state, accuracy=running(state.accuracy, ranks.mean(hits / 2, len(fake))))
        values |= {"local_discriminator_loss": separation.detach(), "accuracy_local": state.accuracy}
    setting.trainables.descend("local_discriminator", loss, drawn.share)
    return StepOutcome(state, values)


def _expectation(
    setting: Setting, state: TrainingState, drawn: Draw, synthetic: LocalLogits
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of the confidence heads, and its two parts for the log."""
    mask, scale, attention = drawn.batch.mask, state.error_scale, setting.recipe.attention
    error = drawn.made - drawn.batch.target
    magnitude = losses.soft_target_magnitude(error, mask, scale, setting.sigma(attention.magnitude_mm))
    structured = losses.soft_target_structured(error, mask, scale, setting.sigma(attention.structured_mm))
    foreseen = losses.confidence_loss(synthetic.magnitude.float(), magnitude, mask)
    foreseen_structured = losses.confidence_loss(synthetic.structured.float(), structured, mask)
    parts = {"magnitude_loss": foreseen.detach(), "structured_loss": foreseen_structured.detach()}
    return foreseen + foreseen_structured, parts
