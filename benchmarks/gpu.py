"""What a card makes of chiasm, in at most eight minutes: throughput, memory, and the share of a measured peak.

    python benchmarks/gpu.py [--device cuda|cpu] [--seconds 45]

Rows: training of 2.5D small, 2.5D large and 3D small in bfloat16 (float32 on a CPU), and prediction of a volume.
The peak is what products of large matrices reach on the same device.  Not run on a card yet: there was none.
MONAI's loop and several cards are not measured here; chiasm train --devices N starts several.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lightning_fabric import Fabric
from training_step import make_cases, make_plan

from chiasm.methods import make_recipe
from chiasm.prediction.engines import Engine
from chiasm.training.cost import list_layers
from chiasm.training.learner import Learner

ROWS = {"2.5D small": ("small", 2), "2.5D large": ("large", 2), "3D small": ("small", 3)}
AT_ONCE = {"schedule.generator_alone": 0.0, "schedule.discriminators_alone": 0.0, "attention.gate": False}
LATE = 2001  # a step at which all play, and nothing is read


def wait(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def rate(do: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return how often something is done in a second, after two times that do not count."""
    for _ in range(2):
        do()
    wait(device)
    start, times = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        do()
        wait(device)
        times += 1
    return times / (time.perf_counter() - start)


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure multiplications with additions a second of a product of large matrices."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    return rate(lambda: a @ a, device, 2.0) * side**3


def measure_training(name: str, device: torch.device, seconds: float, most: float) -> str:
    """Train one row; return its line."""
    size, dims = ROWS[name]
    patch = (128, 128) if dims == 2 else (64, 64, 64)
    precision = "bf16-mixed" if device.type == "cuda" else "32-true"
    asked = make_recipe("dual-attention", size, {**AT_ONCE, "training.precision": precision})
    plan = make_plan(patch, 5 if dims == 2 else 1)
    fabric = Fabric(accelerator=device.type, devices=1, precision=precision)
    with tempfile.TemporaryDirectory() as folder:
        learner = Learner(asked, plan, make_cases(Path(folder)), fabric)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        steps = rate(lambda: learner.step(LATE), device, seconds)
        memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        generator = learner.trainables.bare("generator")
        channels = len(plan.sources) * plan.slices
        layers = list_layers(generator, torch.zeros(1, channels, *patch, device=device))
        work = (
            3 * asked.training.batch * sum(one.inputs * one.outputs * one.kernel * _voxels(one.size) for one in layers)
        )
        case = learner.setting.cases[0]
        start = time.perf_counter()
        learner.maps(case, Engine(device, precision))
        wait(device)
        predicted = time.perf_counter() - start
    patches, share = steps * asked.training.batch, 100 * steps * work / most
    return (
        f"{name}: {steps:.2f} steps/s, {patches:.1f} patches/s, the generator alone {share:.0f} % of the peak, "
        f"{memory:.1f} GiB; a volume of 192 x 224 x 96 with its map in {predicted:.2f} s"
    )


def _voxels(size: tuple[int, ...]) -> int:
    voxels = 1
    for side in size:
        voxels *= side
    return voxels


def main() -> None:
    """Measure all rows within the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=45.0, help="for each row of training")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("not run: there is no card")
        return
    device = torch.device(asked.device)
    most = peak(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}: peak {2 * most / 1e9:.0f} GFLOP/s")
    for row in ROWS:
        print(measure_training(row, device, asked.seconds, most))


if __name__ == "__main__":
    main()
