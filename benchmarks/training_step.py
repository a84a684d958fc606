"""A training step beside a plain loop, and what its patches cost, with one thread for the networks.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py [step] [bf16] [data] --rounds 7

step, bf16: dual-attention beside the loop that a user would write after the paper: float32, one pass of the generator
    for the discriminators and another for itself, default memory format, default Adam, convolutions for Gaussians.  It
    gives the same weights as our step (printed).  Both make their batch by our data path.  Processor time, in turns.
data: patches of 5 x 160 x 160 with jitter, flips and labels, and batches as size small varies them, by processor time.
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
from chiasm.training.batches import Batch, Place, Sampling, draw_places, lesion_voxels, take_batch
from chiasm.training.learner import Learner
from chiasm.training.loop import make_fabric
from chiasm.training.players import make_players
from chiasm.training.sampler import draw
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
        times: Times = ([], [])
        for step in range(LATE + 3, LATE + 3 + rounds):
            times[0].append(_seconds(lambda step=step: ours.step(step)))
            times[1].append(_seconds(lambda step=step: plain.step(_batch(ours, step), step)))
    return times


def _batch(ours: Learner, step: int) -> Batch:
    places, plan, variation = _places(ours, step), ours.plan, ours.setting.variation
    return take_batch(ours.setting.cases, places, patch=plan.patch, slices=plan.slices, variation=variation)


def _places(ours: Learner, step: int) -> list[Place]:
    return draw(ours.setting, ours.state, step, ours.phase(step))


def _compare(ours: Learner, plain: PlainLoop, steps: int) -> float:
    """Do the same steps by both; return the largest difference of a weight of the generator."""
    for step in range(LATE, LATE + steps):
        ours.step(step)
        plain.step(_batch(ours, step), step)
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


def describe_step(rounds: int, precision: str = "32-true") -> str:
    """Compare a step with one of the plain loop."""
    return describe(precision, step_times(rounds, precision))


def describe_data(rounds: int) -> str:
    """Count patches for each second of processor time, and time batches of the default recipe."""
    with tempfile.TemporaryDirectory() as folder:
        cases = make_cases(Path(folder))
        asked = make_asked()
        ours = Learner(asked, make_plan(), cases, make_fabric(asked))
        lesions, rng, plain = lesion_voxels(cases), np.random.default_rng(0), Sampling(0.6, 0.2, True, 0.1)
        places = [draw_places(cases, lesions, plain, count=BATCH, rng=rng) for _ in range(20 * rounds)]
        rates = [
            BATCH / _seconds(lambda some=some: take_batch(cases, some, patch=(160, 160), slices=5)) for some in places
        ]
        varied = [_seconds(lambda step=step: _batch(ours, step)) for step in range(10 * rounds)]
    return (
        f"data: {statistics.median(rates):.0f} patches of 5 x 160 x 160 a second of one core; "
        f"a batch of 8 x 5 x 128 x 128 as size small varies it {1e3 * statistics.mean(varied):.1f} ms"
    )


PARTS: dict[str, Callable[[int], str]] = {
    "step": describe_step,
    "bf16": partial(describe_step, precision="bf16-mixed"),
    "data": describe_data,
}


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["step"])
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for part in asked.parts:
        print(PARTS[part](asked.rounds))


if __name__ == "__main__":
    main()
