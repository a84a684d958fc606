"""How many CPU threads a training uses: measured, since on a busy machine two can be ten times slower than one.

Threads wait for one another after every layer, so one that another program holds up holds up all.  The number is
noted in the run folder: another one would change the last bits of sums, and so a run that was resumed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from chiasm.prediction.engines import AUTOCAST, has_precision, pick_precision
from chiasm.prediction.model import source_channels
from chiasm.prediction.model_files import PARTS
from chiasm.preparation.arrays import Say
from chiasm.preparation.plan import Plan
from chiasm.preparation.planning import has_gpu
from chiasm.recipe import Recipe
from chiasm.storage import read_facts
from chiasm.training.players import make_players

ROUNDS = 2  # passes that are timed on each number of threads, in turn
WORTH = 0.9  # of the time of fewer threads that more of them may take
NOTED = "environment.json"
SAID_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class ThreadChoice(NamedTuple):
    """A number of threads, and the seconds of a pass on each number that was tried."""

    threads: int
    seconds: Mapping[int, float]

    @property
    def line(self) -> str:
        """What was chosen, why, and what decides otherwise, in one line."""
        times = ", ".join(f"{seconds:.2g} s on {threads}" for threads, seconds in self.seconds.items())
        return f"threads: {self.threads}, as a pass takes {times}; OMP_NUM_THREADS decides otherwise"


def choose_threads(
    work: Callable[[], object], numbers: Sequence[int], clock: Callable[[], float] = time.perf_counter
) -> ThreadChoice:
    """Time a piece of work on several numbers of torch's threads, in turn; more are taken where they are worth it.

    Args:
        work: What is timed; done once before.
        numbers: Of threads, rising.
        clock: Seconds so far.
    """
    before = torch.get_num_threads()
    seconds = dict.fromkeys(numbers, 0.0)
    try:
        work()
        for number in (*numbers,) * ROUNDS:
            torch.set_num_threads(number)
            start = clock()
            work()
            seconds[number] += (clock() - start) / ROUNDS
    finally:
        torch.set_num_threads(before)
    chosen = numbers[0]
    for number in numbers[1:]:
        if seconds[number] <= WORTH * seconds[chosen]:
            chosen = number
    return ThreadChoice(chosen, seconds)


def threads_for(recipe: Recipe, plan: Plan, folder: Path, say: Say, asked: int | None = None) -> int:
    """Return the threads of a training: as asked for, as noted in its folder, or as measured, which is said.

    Of several models that share a cohort, the first one is measured for all.

    Args:
        recipe: Networks and batch.
        plan: Says patch and dimensions.
        folder: The run folder.
        say: Called with a line for the user, where it is measured.
        asked: By whoever calls; None leaves it to the environment and to the measurement.
    """
    most = torch.get_num_threads()
    if asked is not None or not _is_free(recipe, most):
        return asked or most
    is_part = folder.parent.name == PARTS and (folder.parents[1] / "recipe.toml").is_file()
    places = [folder, folder.with_name("1")] if is_part else [folder]
    noted = (read_facts(place / NOTED).get("threads") for place in places)
    known = next((threads for threads in noted if isinstance(threads, int) and 1 <= threads <= most), None)
    if known is not None:
        return known
    numbers = sorted({1, max(1, most // 2), most})
    found = choose_threads(_passes(recipe, plan), numbers)
    say(found.line)
    return found.threads


def _is_free(recipe: Recipe, most: int) -> bool:
    """Return whether nobody has said how many threads there are, and it matters."""
    is_said = any(os.environ.get(name) for name in SAID_BY)
    settings = recipe.training
    on_cpu = not has_gpu(settings.accelerator) and has_precision(settings.precision, settings.accelerator)
    return most > 1 and settings.devices == 1 and on_cpu and not is_said and recipe.optimiser.kind != "admm"


def _passes(recipe: Recipe, plan: Plan) -> Callable[[], None]:
    """Return the generator's part of a step, of a generator that is thrown away: forward and back."""
    generator: nn.Module = make_players(recipe, plan, 0).generator.train()
    memory = torch.channels_last if plan.dims == 2 else torch.channels_last_3d
    shape = (recipe.training.batch, source_channels(plan), *plan.patch)
    batch = torch.zeros(shape).contiguous(memory_format=memory)
    narrow = AUTOCAST.get(pick_precision(recipe.training.precision, recipe.training.accelerator))

    def work() -> None:
        with torch.random.fork_rng(devices=[]), torch.autocast("cpu", narrow, enabled=narrow is not None):
            generator(batch).float().sum().backward()

    return work
