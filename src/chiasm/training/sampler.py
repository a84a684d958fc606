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
from chiasm.training.batches import Batch, Place, Sampling, draw_places
from chiasm.training.setting import Draw, Setting
from chiasm.training.state import Remembered, TrainingState

POOL = 256  # patches remembered for sampling by attention
SMALLEST_DIFFICULTY = 1e-6  # so that whatever can be drawn may be
KEPT_LESION = 0.9  # of a case's difficulty, which is seen only where a patch meets its lesion


def draw(setting: Setting, state: TrainingState, step: int, phase: Phase, turn: int = 0) -> list[Place]:
    """Draw the patches of a step on this process, from seed, step, process and turn alone.

    Args:
        setting: What stays the same.
        state: Knows which patches and lesions were found difficult.
        step: From 0.
        phase: Who plays.
        turn: From 1 on for a critic's own patches.
    """
    training, fabric = setting.recipe.training, setting.trainables.fabric
    count = max(1, training.batch // fabric.world_size)
    rng = np.random.default_rng((training.seed, step, fabric.global_rank, *([turn] if turn else [])))
    sampling = Sampling(
        training.body_share,
        training.lesion_share,
        training.augment,
        training.intensity_jitter,
        training.transplant_share,
        training.class_share,
    )
    difficulty = lesion_difficulty(setting, state)
    places = draw_places(setting.cases, setting.lesions, sampling, count=count, rng=rng, difficulty=difficulty)
    is_guided = setting.recipe.attention.use != "weight" and phase.attention > 0 and len(state.pool) >= POOL // 4
    if is_guided and gate_reason(setting, state) is None:
        return _drawn_again(places, state.pool, rng)
    return places


def gate_reason(setting: Setting, state: TrainingState) -> str | None:
    """Say why the attention must be off now; None while it is healthy."""
    return attention.gate_reason(
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


def remember(state: TrainingState, places: Sequence[Place], batch: Batch, confidence: Tensor) -> TrainingState:
    """Keep how much each patch was found difficult.

    Args:
        state: Before.
        places: Of the patches.
        batch: Likewise.
        confidence: M of the head that guides the attention, shape (N, 1, *spatial).
    """
    difficulty = ((1 - confidence) * batch.mask).flatten(1).sum(1) / batch.mask.flatten(1).sum(1).clamp(min=1)
    fresh = [
        Remembered(one.case, *one.centre, max(float(d), SMALLEST_DIFFICULTY)) for one, d in zip(places, difficulty)
    ]
    return replace(state, pool=(*state.pool, *fresh)[-POOL:])


def note_lesions(setting: Setting, state: TrainingState, drawn: Draw, logits: LocalLogits) -> TrainingState:
    """Follow how much each case's lesion is found difficult, where transplants go by it.

    A patch with a transplant says nothing: its lesion is of two cases.
    """
    if setting.recipe.training.transplant == "random":
        return state
    head = setting.recipe.attention.head
    confidence = torch.sigmoid(getattr(logits, "structured" if head == "none" else head).detach().float())
    known = dict(state.lesion_difficulty)
    for place, sample, lesion in zip(drawn.places, confidence, drawn.batch.lesion & drawn.batch.mask):
        if place.donor is None and lesion.any():
            name, difficulty = setting.cases[place.case].id, float(1 - sample[lesion].mean())
            known[name] = KEPT_LESION * known.get(name, difficulty) + (1 - KEPT_LESION) * difficulty
    return replace(state, lesion_difficulty=known)


def lesion_difficulty(setting: Setting, state: TrainingState) -> list[float] | None:
    """Say how hard each case's lesions are, unseen ones as the mean of the others; or None: all alike."""
    known = state.lesion_difficulty
    if not known or setting.recipe.training.transplant == "random":
        return None
    usual = float(np.mean(list(known.values())))
    return [max(known.get(case.id, usual), SMALLEST_DIFFICULTY) for case in setting.cases]
