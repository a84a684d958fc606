"""A training step beside a plain loop, and the data path beside TorchIO and MONAI, in processor time of one thread.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py [step] [bf16] [networks] [data] [rate] --rounds 7

`plain_loop_times` is the loop that a user would write after the paper: float32, one pass of the generator for the
discriminators and another for itself, default memory format, default Adam, convolutions for Gaussians.  It gives the
same weights as our step (printed).  Every function returns seconds of ours and of the peer, measured in turns.
TorchIO is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn import functional

from chiasm.methods import make_recipe
from chiasm.preparation.arrays import PreparedCase
from chiasm.preparation.intensity import IntensityMap
from chiasm.preparation.plan import Plan
from chiasm.recipe import Recipe
from chiasm.training.batches import Batch, Place
from chiasm.training.learner import Learner
from chiasm.training.loop import make_fabric
from chiasm.training.players import make_players
from chiasm.training.sampler import draw
from chiasm.training.setting import make_draw
from chiasm.volumes import Geometry

Times = tuple[list[float], list[float]]

SHAPE = (192, 224, 96)
PATCH, SLICES, BATCH = (128, 128), 5, 8
SPACING = (1.0, 1.0, 1.5)


def make_plan(patch: tuple[int, ...] = PATCH, slices: int = SLICES) -> Plan:
    """Return a plan of a T1 and a T2, without a cohort."""
    grid = (SPACING, SPACING)
    return Plan(
        sources=("t1",),
        target="t2",
        spacing_mm=SPACING,
        dims=len(patch),
        slices=slices,
        patch=patch,
        mask_rule="nonzero",
        source_kinds=("median_iqr",),
        target_kind="median_iqr",
        target_reference=IntensityMap("median_iqr", (0.0, 1.0), (0.0, 1.0)),
        target_unit="a.u.",
        target_range=(0.0, 1.0),
        target_background=0.0,
        target_sd=1.0,
        window_hu=(-1024.0, 3071.0),
        lookup=((-2.0, 2.0), (1.0, -1.0)),
        input_mean=(0.0, 0.0),
        input_sd=(1.0, 1.0),
        source_ranges=((-3.0, 3.0),),
        source_histograms=((1 / 32,) * 32,),
        source_limits=(1.0,),
        grid_mm=grid,
        body_mm=grid,
        trained_on=("case0",),
        expected=None,
        reasons={},
    )


def make_cases(folder: Path, count: int = 4, shape: tuple[int, int, int] = SHAPE) -> list[PreparedCase]:
    """Write cases of smooth noise in an ellipsoid as preparation does: memory-maps with the slices first."""
    axes = np.meshgrid(*(np.linspace(-1.1, 1.1, n) for n in shape), indexing="ij")
    mask = sum(axis**2 for axis in axes) < 1
    cases = []
    for index in range(count):
        texture = gaussian_filter(np.random.default_rng(index).normal(size=shape), 2)
        texture = np.where(mask, texture / texture.std(), 0).astype(np.float32)
        arrays = {
            "source": texture[None],
            "target": -np.tanh(texture) * mask,
            "mask": mask,
            "labels": (texture > 2).astype(np.uint8),
        }
        for name, array in arrays.items():
            np.save(folder / f"{index}-{name}.npy", np.ascontiguousarray(np.moveaxis(array, -1, -3)))
        maps = {name: np.moveaxis(np.load(folder / f"{index}-{name}.npy", mmap_mode="r"), -3, -1) for name in arrays}
        cases.append(
            PreparedCase(f"case{index}", f"case{index}", None, **maps, grid=Geometry(shape, np.diag([*SPACING, 1.0])))
        )
    return cases


def make_asked(precision: str = "32-true", method: str = "dual-attention") -> Recipe:
    """Return the recipe of a step in which all play at full strength."""
    changes = {
        "data.slices": SLICES,
        "schedule.generator_alone": 0.0,
        "schedule.discriminators_alone": 0.0,
        "attention.gate": False,
        "training.batch": BATCH,
        "training.precision": precision,
        "training.accelerator": "cpu",
    }
    return make_recipe(method, "small", changes)


LATE = 2000  # a step at which every ramp is over


class PlainLoop:
    """The same training as a user would write it after the paper, for two discriminators and attention.

    Args:
        recipe: Ours; its numbers are used.
        plan: Ours.
    """

    def __init__(self, recipe: Recipe, plan: Plan) -> None:
        self.recipe, self.plan = recipe, plan
        players, averages = (make_players(recipe, plan, recipe.training.seed) for _ in range(2))
        assert players.global_discriminator is not None and players.local_discriminator is not None
        self.generator, self.average = players.generator, averages.generator
        self.whole, self.local = players.global_discriminator, players.local_discriminator
        rates, betas = recipe.optimiser, recipe.optimiser.betas
        share = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * LATE / recipe.schedule.steps))
        self.optimisers = [
            torch.optim.Adam(network.parameters(), lr=rate * share, betas=betas)
            for network, rate in (
                (self.generator, rates.generator_rate),
                (self.whole, rates.discriminator_rate),
                (self.local, rates.discriminator_rate),
            )
        ]
        self.scale = 0.0

    def step(self, batch: Batch, age: int) -> None:
        """Train both discriminators, then the generator."""
        source, target, mask, _ = batch
        generator_optimiser, whole_optimiser, local_optimiser = self.optimisers
        with torch.no_grad():
            fake = self.generator(source) * mask
        fresh = 2 * float((fake - target)[mask].abs().median())
        self.scale = fresh if self.scale == 0 else 0.98 * self.scale + 0.02 * fresh
        real_pair, fake_pair = torch.cat([source, target], 1), torch.cat([source, fake], 1)

        real, synthetic = self.whole(real_pair), self.whole(fake_pair)
        smoothing = self.recipe.loss.smoothing
        loss = _bce(real, torch.full_like(real, 1 - smoothing)).mean()
        loss = loss + _bce(synthetic, torch.zeros_like(synthetic)).mean()
        _descend(whole_optimiser, loss)

        seen = self.local.train()(real_pair)
        made = self.local.eval()(fake_pair)  # power iterations go on once a step
        error, attention = fake - target, self.recipe.attention
        magnitude = torch.exp(-self._smoothed(error.abs(), mask, attention.magnitude_mm) / self.scale)
        structured = torch.exp(-self._smoothed(error, mask, attention.structured_mm).abs() / self.scale)
        voxels = _bce(seen.realness, torch.ones_like(target)) + _bce(made.realness, torch.zeros_like(target))
        voxels = voxels + _bce(made.magnitude, magnitude) + _bce(made.structured, structured)
        _descend(local_optimiser, _mean_inside(voxels, mask))

        fake = self.generator(source) * mask
        pair = torch.cat([source, fake], 1)
        critic, opinion = self.whole(pair), self.local(pair)
        adversarial = self.recipe.loss.global_weight * _bce(critic, torch.ones_like(critic)).mean()
        convinced = _mean_inside(_bce(opinion.realness, torch.ones_like(target)), mask)
        adversarial = adversarial + self.recipe.loss.local_weight * convinced
        weight = self._weight(1 - torch.sigmoid(opinion.structured.detach()), mask)
        _descend(generator_optimiser, _mean_inside(weight * (fake - target) ** 2, mask) + adversarial)
        self._follow(age)

    def _smoothed(self, a: Tensor, mask: Tensor, millimetres: float) -> Tensor:
        values, cover = torch.where(mask, a, 0), mask.to(a.dtype)
        for axis in (2, 3):
            sigma = millimetres / self.plan.spacing_mm[axis - 2]
            place = torch.arange(-math.floor(4 * sigma + 0.5), math.floor(4 * sigma + 0.5) + 1)
            kernel = torch.exp(-0.5 * (place / sigma) ** 2)
            shape, padding = [1, 1, 1, 1], [0, 0]
            shape[axis], padding[axis - 2] = len(place), len(place) // 2
            kernel = (kernel / kernel.sum()).view(shape)
            values, cover = (functional.conv2d(one, kernel, padding=padding) for one in (values, cover))
        return torch.where(mask, values / torch.where(mask, cover, 1), 0)

    def _weight(self, difficulty: Tensor, mask: Tensor) -> Tensor:
        cap = self.recipe.attention.cap
        weight = torch.where(mask, difficulty / _mean_inside(difficulty, mask), 1)
        while weight.amax() > 1.001 * cap:
            weight = weight.clamp(max=cap)
            weight = torch.where(mask, weight / _mean_inside(weight, mask), 1)
        towards = ((cap - 1) / (weight.amax() - 1)).clamp(max=1)
        return 1 + towards * (weight - 1)

    @torch.no_grad()
    def _follow(self, age: int) -> None:
        keep = min(self.recipe.optimiser.average, (1 + age) / (10 + age))
        for slow, fast in zip(self.average.parameters(), self.generator.parameters()):
            slow.mul_(keep).add_(fast, alpha=1 - keep)


def _bce(logits: Tensor, truth: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")


def _mean_inside(a: Tensor, mask: Tensor) -> Tensor:
    return ((a * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)).mean()


def _descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def step_times(rounds: int, precision: str = "32-true") -> Times:
    """Time a step of ours and of the plain loop on the same batches, in turns, after comparing the weights of both."""
    asked, plan = make_asked(precision), make_plan()
    with tempfile.TemporaryDirectory() as folder:
        cases = make_cases(Path(folder))
        ours, plain = Learner(asked, plan, cases, make_fabric(asked)), PlainLoop(asked, plan)
        difference = _compare(ours, plain, steps=3)
        print(f"weights after 3 steps differ by at most {difference:.1e}")
        batches = [make_draw(ours.setting, step, ours.phase(step), _places(ours, step)).batch for step in range(rounds)]
        times: Times = ([], [])
        for step, batch in enumerate(batches):
            times[0].append(_seconds(lambda step=step: ours.step(LATE + step)))
            times[1].append(_seconds(lambda batch=batch, step=step: plain.step(batch, LATE + step)))
    return times


def _places(ours: Learner, step: int) -> list[Place]:
    return draw(ours.setting, ours.state, step, ours.phase(step))


def _compare(ours: Learner, plain: PlainLoop, steps: int) -> float:
    """Do the same steps by both; return the largest difference of a weight of the generator."""
    for step in range(LATE, LATE + steps):
        batch = make_draw(ours.setting, step, ours.phase(step), _places(ours, step)).batch
        ours.step(step)
        plain.step(batch, step)
    pairs = zip(ours.trainables.bare("generator").parameters(), plain.generator.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def _seconds(do: Callable[[], object]) -> float:
    start = time.process_time()
    do()
    return time.process_time() - start


def describe(name: str, times: Times) -> str:
    """Put both medians, their ratio and its range in one line."""
    ratios = sorted(theirs / ours for ours, theirs in zip(*times, strict=True))
    ours, theirs = (statistics.median(some) for some in times)
    spread = f"{ratios[0]:.2f} / {statistics.median(ratios):.2f} / {ratios[-1]:.2f}"
    return f"{name}: ours {1e3 * ours:.1f} ms, peer {1e3 * theirs:.1f} ms, ratio {spread} (n = {len(ratios)})"


PARTS: dict[str, Callable[[int], Times]] = {"step": step_times, "bf16": partial(step_times, precision="bf16-mixed")}


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["step"])
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for part in asked.parts:
        print(describe(part, PARTS[part](asked.rounds)))


if __name__ == "__main__":
    main()
