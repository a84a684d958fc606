"""A step never waits for a number from the device, but where values are read for the log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from chiasm.errors import RunError
from chiasm.methods import METHODS
from chiasm.storage import read_log
from chiasm.training.learner import Learner
from chiasm.training.loop import learn, make_fabric
from chiasm.training.reading import is_reading_step
from chiasm.training.sampler import draw
from chiasm.training.session import LearningCases, Session
from learning import make_learner, small, textured_case
from synthetic_cohort import plan_of

SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "bincount")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
STEPS = 2000  # of which every fourth is read


class Waits(TorchDispatchMode):
    """Counts the operations for which a GPU would have to be waited for: a number read, or a size that data decide."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in SYNCHRONISING or (name in INDEXING and any(map(is_mask, flat(args)))):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def flat(args: Any) -> Iterable[Any]:
    for one in args:
        yield from flat(one) if isinstance(one, list | tuple) else [one]


def is_mask(one: Any) -> bool:
    return isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8)


def waits_of(one: Learner, step: int) -> dict[str, int]:
    with Waits() as waits:
        one.step(step)
    return dict(waits.found)


def test_the_counter_counts() -> None:
    a = torch.arange(4.0)
    with Waits() as waits:
        float(a.sum()), a[a > 1], bool(a.any()), a[a > 1].sum()
        a[a > 1] = 0
    assert waits.found == {"_local_scalar_dense": 2, "index": 2, "index_put_": 1}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "jcsc"])  # which has no steps but rounds
def test_no_step_of_any_method_waits_for_the_device(method: str, toy_cohort: Path, tmp_path: Path) -> None:
    asked = small(method, {"schedule.steps": STEPS})
    one = make_learner(asked, toy_cohort, tmp_path)
    alone = asked.schedule.ends["generator"]
    for step in (1, alone + 1, STEPS - 1):  # the generator alone, the discriminators alone, all with attention
        assert not is_reading_step(asked, step)
        assert waits_of(one, step) == {}
    assert one.state.attention_steps == (asked.attention.head != "none")


@pytest.mark.parametrize("use", ["weight", "sample", "both"])
def test_what_was_difficult_is_read_at_steps_that_are_logged(use: str, toy_cohort: Path, tmp_path: Path) -> None:
    one = make_learner(small("A7", {"schedule.steps": STEPS, "attention.use": use}), toy_cohort, tmp_path)
    one.step(STEPS - 1)
    assert len(one.state.unread_patches) == (use != "weight") and not one.state.pool
    one.step(STEPS - 4)
    assert not one.state.unread_patches and len(one.state.pool) == (use != "weight") * 4


@pytest.mark.parametrize("bad", [0, 1, 5])
def test_a_step_that_is_not_finite_is_found_by_doing_those_since_the_checkpoint_again(bad: int, tmp_path: Path) -> None:
    asked = small("A1", {"schedule.steps": STEPS, "training.batch": 1})
    cases = [textured_case(seed) for seed in range(30)]
    learner = Learner(asked, plan_of(), cases, make_fabric(asked))
    drawn = [draw(learner.setting, learner.state, step, learner.phase(step))[0].case for step in range(bad + 1)]
    assert drawn.index(drawn[bad]) == bad
    cases[drawn[bad]] = replace(cases[drawn[bad]], target=cases[drawn[bad]].target * np.float32(np.nan))
    said: list[str] = []
    session = Session(make_fabric(asked), said.append)
    with pytest.raises(RunError, match=rf"^loss is not a finite number at step {bad} \(cases case{drawn[bad]}\)"):
        learn(asked, plan_of(), LearningCases(cases, []), tmp_path, session, until=20)
    assert ["done again" in line for line in said] == [True]
    steps = [line["step"] for line in read_log(tmp_path / "log.jsonl")[0]]
    assert steps == [step for step in range(1, bad + 1) if is_reading_step(asked, step - 1)]


def test_checks_after_each_step_change_no_weight(tmp_path: Path) -> None:
    learners = []
    for careful in (False, True):
        asked = small("A7", {"schedule.steps": STEPS, "schedule.generator_alone": 0.0})
        learners.append(Learner(asked, plan_of(), [textured_case(0)], make_fabric(asked)))
        for step in range(3):
            learners[-1].step(step)
            if careful:
                learners[-1].check()
    for name in learners[0].trainables.modules:
        states = [one.trainables.bare(name).state_dict() for one in learners]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
