"""Where patches are taken: at random, on lesions, and where the local discriminator was not convinced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from chiasm.networks.discriminators import LocalLogits
from chiasm.training import attention
from chiasm.training.attention import Phase
from chiasm.training.batches import Place, Sampling, draw_places
from chiasm.training.players import varied_shares
from chiasm.training.setting import Draw, Setting
from chiasm.training.state import POOL, SMALLEST_DIFFICULTY, UNSEEN, Remembered, Seen, TrainingState


def draw(setting: Setting, state: TrainingState, step: int, phase: Phase, turn: int = 0) -> list[Place]:
    """Draw the patches of a step for all processes, from seed, step, turn and what was found difficult.

    Args:
        setting: What stays the same.
        state: Knows which patches and lesions were found difficult.
        step: From 0.
        phase: Who plays.
        turn: From 1 on for a critic's own patches.
    """
    training, shares = setting.recipe.training, varied_shares(setting.recipe, setting.plan)
    rng = np.random.default_rng((training.seed, step, 0, *([turn] if turn else [])))  # 0: a rank once, now of all
    sampling = Sampling(
        training.body_share,
        training.lesion_share,
        training.augment,
        training.intensity_jitter,
        training.transplant_share,
        shares.classes,
        shares.painted,
        shares.simulated,
        shares.shaded,
        setting.plan.varied,
    )
    difficulty = lesion_difficulty(setting, state)
    places = draw_places(
        setting.cases,
        setting.lesions,
        sampling,
        count=training.batch,
        rng=rng,
        difficulty=difficulty,
        grown=setting.variation.grown,
    )
    is_guided = setting.recipe.attention.use != "weight" and phase.attention > 0 and state.is_guiding
    if is_guided and len(state.pool) >= POOL // 4:
        return _drawn_again(places, state.pool, rng)
    return places


def gate_is_open(setting: Setting, state: TrainingState) -> Tensor:
    """Find, on the device, whether the attention is healthy."""
    return attention.gate_is_open(
        target=setting.recipe.attention.head,
        realness_accuracy=state.accuracy,
        confidence_sd=state.confidence_sd,
        spearman=state.rho,
    )


def _drawn_again(places: Sequence[Place], pool: Sequence[Remembered], rng: np.random.Generator) -> list[Place]:
    """Move half of the patches back to where the confidence was low."""
    difficulty = np.array([entry.difficulty for entry in pool])
    chosen = rng.choice(len(pool), size=len(places) // 2, p=difficulty / difficulty.sum())
    again = [pool[index] for index in chosen]
    moved = [replace(place, case=one.case, centre=(one.i, one.j, one.k)) for place, one in zip(places, again)]
    return [*moved, *places[len(moved) :]]


def remember(state: TrainingState, drawn: Draw, confidence: Tensor) -> TrainingState:
    """Keep how much each patch was found difficult, to be read later.

    Args:
        state: Before.
        drawn: The patches.
        confidence: M of the head that guides the attention, shape (N, 1, *spatial).
    """
    difficulty = 1 - _mean_in(confidence, drawn.batch.mask)
    seen = Seen(tuple((one.case, *one.centre) for one in drawn.places), difficulty)
    return replace(state, unread_patches=(*state.unread_patches, seen)[-POOL:])


def note_lesions(setting: Setting, state: TrainingState, drawn: Draw, logits: LocalLogits) -> TrainingState:
    """Follow how much each case's lesion is found difficult, where transplants go by it; to be read later.

    A patch with a transplant says nothing: its lesion is of two cases.
    """
    if setting.recipe.training.transplant == "random":
        return state
    head = setting.recipe.attention.head
    confidence = torch.sigmoid(getattr(logits, "structured" if head == "none" else head).detach().float())
    lesion = drawn.batch.lesion & drawn.batch.mask
    difficulty = torch.where(lesion.flatten(1).any(1), 1 - _mean_in(confidence, lesion), UNSEEN)
    names = tuple("" if place.donor else setting.cases[place.case].id for place in drawn.places)
    return replace(state, unread_lesions=(*state.unread_lesions, Seen(names, difficulty)))


def _mean_in(confidence: Tensor, where: Tensor) -> Tensor:
    """Average the confidence of each sample where it counts, shape (N,)."""
    inside = torch.where(where, confidence, 0).flatten(1).sum(1)
    return inside / where.flatten(1).sum(1).clamp(min=1)


def lesion_difficulty(setting: Setting, state: TrainingState) -> list[float] | None:
    """Say how hard each case's lesions are, unseen ones as the mean of the others; or None: all alike."""
    known = state.lesion_difficulty
    if not known or setting.recipe.training.transplant == "random":
        return None
    usual = float(np.mean(list(known.values())))
    return [max(known.get(name, usual), SMALLEST_DIFFICULTY) for name in setting.names]
