from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from torch import nn

from chiasm.methods import METHODS, make_recipe
from chiasm.networks.discriminators import GlobalDiscriminator, LocalDiscriminator
from chiasm.networks.generator import ResidualGenerator
from chiasm.networks.unet import UNet
from chiasm.preparation.plan import Estimate
from chiasm.preparation.planning import has_gpu
from chiasm.recipe import Recipe
from chiasm.training import cost
from chiasm.training.cost import (
    BASE_MB,
    BESIDE_CONVOLUTIONS,
    Device,
    Layer,
    estimate_cost,
    estimate_players,
    list_layers,
    phase_costs,
    time_convolution,
)
from chiasm.training.players import make_players
from synthetic_cohort import plan_of

NANOSECOND = 1e-9


@pytest.fixture
def even_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that takes one nanosecond for each multiplication of a forward and backward pass."""

    def timed(dims: int, width: int, size: tuple[int, ...], on: Device) -> float:
        return NANOSECOND * width**2 * 3**dims * math.prod(size)

    monkeypatch.setattr(cost, "time_convolution", timed)


@pytest.fixture
def processor_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Convolutions are timed by this process's own time, which other programs on the machine do not lengthen."""
    time_convolution.cache_clear()
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=time.process_time))
    yield
    time_convolution.cache_clear()


def ask(method: str = "A7", **changes: object) -> Recipe:
    return make_recipe(method, "tiny", {name.replace("__", "."): value for name, value in changes.items()})


def forecast(recipe: Recipe | None = None, side: int = 64, dims: Literal[2, 3] = 2, channels: int = 3) -> Estimate:
    slices = channels if dims == 2 else 1
    return estimate_cost(recipe or ask(), plan_of(dims=dims, patch=(side,) * dims, slices=slices))


def kernels(network: nn.Module) -> int:
    convolutions = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
    return sum(part.weight.numel() for part in network.modules() if isinstance(part, convolutions))


def counted(layers: Sequence[Layer]) -> int:
    return sum(layer.inputs * layer.outputs * layer.kernel for layer in layers)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("widths", [(4, 8, 16), (3, 5, 7, 11)])
def test_the_layers_counted_are_those_of_the_networks(dims: Literal[2, 3], widths: tuple[int, ...]) -> None:
    image = torch.zeros(1, 4, *(32,) * dims)
    for network in (
        ResidualGenerator(in_channels=4, widths=widths, dims=dims),
        LocalDiscriminator(in_channels=4, widths=widths, dims=dims),
        GlobalDiscriminator(in_channels=4, widths=widths, dims=dims),
    ):
        before = network.training
        assert counted(list_layers(network, image)) == kernels(network)
        assert network.training == before and not any(part._forward_hooks for part in network.modules())


def test_transposed_convolutions_are_counted_on_the_grid_that_they_multiply() -> None:
    layers = list_layers(UNet(in_channels=1, dims=2, scale=1 / 16), torch.zeros(1, 1, 32, 32))
    assert Layer(32, 64, 4, (2, 2)) in layers  # 64 channels of 2 x 2 become 32 of 4 x 4
    assert counted(layers) == kernels(UNet(in_channels=1, dims=2, scale=1 / 16))


def test_the_generator_alone_costs_its_multiplications(even_speed: None) -> None:
    recipe = ask("A1", generator__widths=(4, 8), training__batch=2)
    by_hand = 64**2 * (3 * 4 * 9 + 4 * 4 * 9 + 3 * 4) + 32**2 * (4 * 8 * 9 + 8 * 8 * 9 + 4 * 8)
    by_hand += 32**2 * 8 * 4 + 64**2 * (8 * 4 * 9 + 4 * 4 * 9) + 64**2 * 4
    found = forecast(recipe)
    assert found.seconds_per_step == pytest.approx(BESIDE_CONVOLUTIONS * NANOSECOND * 2 * by_hand)
    assert found.minutes == pytest.approx(found.seconds_per_step * recipe.schedule.steps / 60)


def test_all_steps_of_all_phases_are_what_the_training_costs(even_speed: None) -> None:
    recipe = ask(schedule__steps=1000)
    costs = phase_costs(recipe, plan_of(patch=(64, 64), slices=3))
    assert costs is not None
    assert costs.work(recipe.schedule, 1000) == pytest.approx(1000 * forecast(recipe).seconds_per_step)
    assert costs.work(recipe.schedule, 400) == pytest.approx(400 * costs.alone)  # the generator's
    assert costs.together > 2 * costs.alone
    assert phase_costs(ask("A1"), plan_of()) is None  # no discriminator: all steps are alike


def test_time_follows_steps_patch_width_batch_and_dims(even_speed: None) -> None:
    base = forecast()
    assert forecast(ask(schedule__steps=800)).minutes == pytest.approx(2 * base.minutes)
    assert forecast(side=128).seconds_per_step == pytest.approx(4 * base.seconds_per_step)
    assert forecast(ask(training__batch=16)).seconds_per_step == pytest.approx(2 * base.seconds_per_step)
    wide = forecast(ask(generator__widths=(16, 32, 64)))
    assert 1.5 * base.seconds_per_step < wide.seconds_per_step < 4 * base.seconds_per_step
    assert forecast(dims=3).seconds_per_step > 64 * base.seconds_per_step
    assert forecast(channels=9).seconds_per_step > base.seconds_per_step


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_training_for_another_machine_is_planned_here() -> None:
    elsewhere = (ask(training__accelerator="cuda"), ask(training__precision="16-mixed"))
    assert all(forecast(recipe).seconds_per_step > 0 for recipe in elsewhere)


def test_ranks_are_channels_and_a_second_stage_costs(even_speed: None) -> None:
    ranked = estimate_cost(ask(), plan_of(patch=(64, 64), histogram=True, input_mean=(0.0, 0.0), input_sd=(1.0, 1.0)))
    assert ranked.seconds_per_step > forecast().seconds_per_step
    assert forecast(ask("A15")).seconds_per_step > 1.05 * forecast().seconds_per_step
    assert forecast(ask("A15")).memory_mb > forecast().memory_mb


def test_memory_follows_patch_width_and_batch_but_not_steps(even_speed: None) -> None:
    base = forecast().memory_mb - BASE_MB
    assert forecast(ask(schedule__steps=800)).memory_mb - BASE_MB == base
    for dearer in (forecast(side=128), forecast(ask(training__batch=32))):
        assert 3 * base < dearer.memory_mb - BASE_MB < 4 * base  # the weights do not grow
    assert forecast(ask(generator__widths=(16, 32, 64))).memory_mb - BASE_MB > 1.2 * base


@cache
def forecast_plain(network: str, side: int) -> Estimate:
    return forecast(ask("A1", generator__network=network), side)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "jcsc"])  # which is timed as it is learnt
def test_no_arm_costs_less_than_nothing_and_discriminators_cost_more_than_none(even_speed: None, method: str) -> None:
    network = make_recipe(method).generator.network
    side = 256 if network == "pix2pix" else 64
    found, plain = forecast(ask(method), side), forecast_plain(network, side)
    assert found.seconds_per_step > 0 and found.minutes > 0
    assert found.seconds_per_step >= plain.seconds_per_step * 0.85  # while critics learn alone, no generator pass back
    assert found.memory_mb >= plain.memory_mb > BASE_MB
    for alone, critics in ((1.0, 0.0), (0.0, 0.9), (0.0, 0.0)):
        shares = {"schedule__generator_alone": alone, "schedule__discriminators_alone": critics, "schedule__ramp": 0.05}
        if alone + critics <= 0.9:
            assert forecast(ask(method, **shares), side).seconds_per_step > 0


def test_a_later_start_of_the_discriminators_is_cheaper(even_speed: None) -> None:
    late, early = (
        forecast(ask(schedule__generator_alone=alone, schedule__discriminators_alone=0.0)).seconds_per_step
        for alone in (0.9, 0.0)
    )
    assert early > 1.5 * late


def test_without_a_gpu_asked_for_there_is_none() -> None:
    assert not has_gpu("cpu")


def test_a_machine_is_timed_and_sixteen_times_the_voxels_take_longer(processor_time: None) -> None:
    small, large = forecast(side=32), forecast(side=128)
    assert 0 < small.seconds_per_step < large.seconds_per_step
    assert large.seconds_per_step < 10  # tiny networks


MEASURE = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
time.perf_counter = time.process_time  # which other programs on the machine do not lengthen
from synthetic_cohort import write_cohort
from chiasm.methods import make_recipe
from chiasm.preparation.planning import make_plan
from chiasm.preparation.arrays import prepare_case
from chiasm.training.cost import estimate_cost
from chiasm.training.learner import Learner
from chiasm.training.loop import make_fabric
import torch
torch.set_num_threads(1)
folder = Path(sys.argv[2])
cohort = write_cohort(folder, 3)
patch, batch = int(sys.argv[3]), int(sys.argv[4])
recipe = make_recipe("A7", "tiny", {
    "data.patch": patch, "training.batch": batch, "training.precision": "32-true", "training.accelerator": "cpu",
    "schedule.generator_alone": 0.0, "schedule.discriminators_alone": 0.0, "attention.gate": False,
})
plan = make_plan(recipe, cohort, [case.id for case in cohort.cases])
cases = [prepare_case(case, plan, folder / "cache") for case in cohort.cases]
learner = Learner(recipe, plan, cases, make_fabric(recipe))
learner.step(200)
start = time.perf_counter()
for step in range(201, 204):
    learner.step(step)
seconds = (time.perf_counter() - start) / 3
expected = estimate_cost(recipe, plan)
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) / 1024, expected.memory_mb, seconds, expected.seconds_per_step)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("patch", "batch"), [(32, 2), (128, 8)])
def test_memory_is_that_of_a_training_step_within_a_factor_of_three(patch: int, batch: int, tmp_path: Path) -> None:
    words = map(str, (Path(__file__).parent, tmp_path, patch, batch))
    command = [sys.executable, "-X", "faulthandler", "-c", MEASURE, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    measured, expected, seconds, forecast_seconds = map(float, done.stdout.split())
    print(
        f"memory {measured:.0f} MB measured, {expected:.0f} forecast; {seconds:.3g} s, {forecast_seconds:.3g} forecast"
    )
    assert 1 / 3 < expected / measured < 3
    assert 1 / 10 < forecast_seconds / seconds < 10  # a factor of ten is a bug


@pytest.mark.usefixtures("even_speed")
def test_a_critics_further_turns_are_paid_for_and_a_patch_is_assessed_at_its_own_size() -> None:
    one, five = (forecast(ask("wgan", loss__discriminator_steps=turns)).seconds_per_step for turns in (1, 5))
    three = forecast(ask("wgan", loss__discriminator_steps=3)).seconds_per_step
    assert five > one and five - three == pytest.approx(three - one)
    assert forecast(ask("A1", loss__discriminator_steps=5)) == forecast(ask("A1"))  # nobody takes them
    sizes: list[tuple[int, ...]] = []
    players = make_players(ask("dcgan"), plan_of(patch=(64, 64)), 0)
    assert players.global_discriminator is not None
    players.global_discriminator.register_forward_hook(lambda _, given, __: sizes.append(tuple(given[0].shape[2:])))
    estimate_players(players, ask("dcgan"), plan_of(patch=(64, 64)))
    assert sizes == [(64, 64)]
