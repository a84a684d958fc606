"""Twenty steps of several methods by one process or by several, with what each learns written to a file.

python tests/rank_steps.py FOLDER DEVICES METHOD...
"""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from chiasm.errors import ChiasmError, RecipeError
from chiasm.on_demand import OnDemand
from chiasm.training import ranks
from chiasm.training.learner import Learner
from chiasm.training.loop import make_fabric
from learning import small, textured_case
from synthetic_cohort import plan_of

STEPS, BATCH = 20, 5  # which two processes cannot share evenly
CHANGES = {
    "schedule.generator_alone": 0.0,
    "schedule.discriminators_alone": 0.0,
    "schedule.ramp": 0.01,
    "attention.gate": False,
    "training.batch": BATCH,
    "optimiser.generator_rate": 1e-4,
    "optimiser.discriminator_rate": 1e-4,
}


PLANS = {
    "fcn3d": plan_of(dims=3, slices=1, patch=(28, 32, 12)),
    "han": plan_of(slices=1),
    "pix2pix": plan_of(patch=(256, 256)),
}


def write_threads(folder: Path, devices: int) -> None:
    """Write the names of this process's threads."""
    names = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
    (folder / f"threads-{devices}-{os.environ.get('LOCAL_RANK', '0')}.txt").write_text("\n".join(names))


def refusal() -> str:
    """Name the error that this process hears of where the first one refuses a training."""

    def refuse() -> None:
        raise RecipeError("refused")

    try:
        ranks.from_first(refuse)
    except ChiasmError as error:
        return type(error).__name__
    return ""


def main(folder: Path, devices: int, methods: list[str]) -> None:
    """Write the gradients of the first step, the weights after all of them, and what the run knows then."""
    fabric = make_fabric(small(methods[0], {**CHANGES, "training.devices": devices}))
    ranks.launch(fabric)
    made_by = ranks.from_first(lambda: OnDemand({"first": partial(int, ranks.rank())}, most=1))
    (folder / f"made-by-{devices}-{ranks.rank()}.txt").write_text(str(made_by[0]))
    (folder / f"refusal-{devices}-{ranks.rank()}.txt").write_text(refusal())
    for method in methods:
        asked = small(method, {**CHANGES, "training.devices": devices})
        one = Learner(asked, PLANS.get(method, plan_of()), [textured_case(seed) for seed in range(2)], fabric)
        found = {}
        for step in range(STEPS):
            values = one.read(one.step(step))
            if step == 0:
                found["gradients"] = {
                    f"{name}.{key}": weight.grad.clone()
                    for name in one.trainables.modules
                    for key, weight in one.trainables.bare(name).named_parameters()
                    if weight.grad is not None
                }
        parts = {name: one.trainables.bare(name) for name in one.trainables.modules}
        parts["average"] = one.trainables.average
        found["weights"] = {
            f"{n}.{key}": value for n, part in parts.items() for key, value in part.state_dict().items()
        }
        found["state"], found["values"] = one.state.to_dict(), values
        torch.save(found, folder / f"{method}-{devices}-{ranks.rank()}.pt")
    if devices > 1 and not ranks.rank():  # waits for the other process, which ends
        with suppress(ranks.ProcessEnded), ranks.ending_together():
            fabric.barrier()
        (folder / "went-on.txt").touch()


if __name__ == "__main__":
    atexit.register(write_threads, Path(sys.argv[1]), int(sys.argv[2]))  # the first registered is the last called
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
