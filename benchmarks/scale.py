"""How the time to the first training step and the memory of `train` grow with the number of cases.

    python benchmarks/scale.py --work /tmp/scale --cases 50 200 1250 --shape 48 56 40
    python benchmarks/scale.py --work /tmp/scale --cases 50 --before ../before/src
    python benchmarks/scale.py --work /tmp/scale --cases 1250 --shape 240 240 155 --threads 2

Writes cohorts whose cases are copies of four drawn pairs, each warped and shown with tones and a texture of its own,
so that no two count as one scan (`chiasm train` would refuse them).  Then `chiasm train` does a few steps of the
smallest method on the CPU, with one thread unless more are asked for.  Printed are, for each number of cases: the
processor's seconds to the first step, a case's share of that, and the peak of memory; and what one case more takes of
both.  `--profile` says in which functions the time goes instead.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BASES = 4  # pairs that are drawn; all others are copies
WARP_SHARE = 0.04  # of the longest side: how far a copy is moved, standard deviation
NOISE_SD = 0.6  # of the contrast of a copy's own texture, by that of its base
STEPS = 3
HERE = Path(__file__).resolve().parents[1] / "src"
QUICK = {
    "schedule.steps": STEPS,
    "training.batch": 1,
    "training.validations": 1,
    "training.accelerator": "cpu",
    "data.patch": 16,
}


class Cost(NamedTuple):
    """What a training took.

    Attributes:
        first_step: Seconds of the processor until the first step is done.
        whole: Seconds of the processor in all.
        peak_first: MiB at most until then.
        peak: MiB at most in all.
        wall: Seconds of a clock until the first step is done.
    """

    first_step: float
    whole: float
    peak_first: float
    peak: float
    wall: float


# --- the cohort --------------------------------------------------------------------------------------------------


def write_cohort(folder: Path, shape: tuple[int, int, int], cases: int) -> None:
    """Write so many pairs, T1 and T2, in the layout of BraTS; those that are there already stay."""
    from chiasm.bench.subjects import draw_pictures
    from chiasm.volumes import write_volume

    bases = [draw_pictures(shape, seed) for seed in range(BASES)]
    for number in range(cases):
        place = folder / f"BraTS-GLI-{number:05d}-000"
        if (place / "complete").exists():
            continue
        place.mkdir(parents=True, exist_ok=True)
        for name, array in zip(("t1n", "t2w"), copy_pair(bases[number % BASES], shape, number), strict=True):
            path = place / f"{place.name}-{name}.nii.gz"
            write_volume(path, array, bases[0].geometry, labels=True)  # whole numbers stay int16, as scanners store
        (place / "complete").touch()


def copy_pair(base: Any, shape: tuple[int, int, int], seed: int) -> list[NDArray[np.int16]]:
    """Return a pair's source and target, warped alike, with a texture that both share and tones of their own."""
    import torch
    from torch.nn.functional import grid_sample

    rng = np.random.default_rng(seed)
    texture = smooth_field(rng, shape, 12)
    where = torch.empty(1, *shape, 3)  # from -1 to 1, the last axis first
    for axis, side in enumerate(shape):
        centres = torch.arange(side) * 2 / side - (1 - 1 / side)
        moved = smooth_field(rng, shape, 5) * (2 * WARP_SHARE * max(shape) / side)
        where[0, ..., 2 - axis] = moved + centres.view([-1 if axis == other else 1 for other in range(3)])
    mask, source, target = (torch.as_tensor(one, dtype=torch.float32) for one in (base.mask, base.source, base.target))
    inside = grid_sample(mask[None, None], where, mode="nearest", align_corners=False)[0, 0] > 0.5
    there = where[:, inside][:, :, None, None]
    own = grid_sample(torch.stack([source, target])[None], there, align_corners=False)[0, :, :, 0, 0].numpy()
    shared = texture[inside].numpy()
    return [retoned(values, inside.numpy(), sign * shared, rng) for values, sign in zip(own, (1, -1), strict=True)]


def smooth_field(rng: np.random.Generator, shape: tuple[int, int, int], knots: int) -> Any:
    """Return a random field, a tensor of standard deviation 1, that bends at so many knots along each axis."""
    import torch

    coarse = torch.as_tensor(rng.normal(size=(1, 1, knots, knots, knots)), dtype=torch.float32)
    field = torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0, 0]
    return field / field.std()


def retoned(
    values: NDArray[np.float32], inside: NDArray[np.bool_], texture: NDArray[np.float32], rng: np.random.Generator
) -> NDArray[np.int16]:
    """Show the values inside with another texture, gain and gamma; 0 outside."""
    shown = values + NOISE_SD * values.std() * texture
    low, high = shown.min(), shown.max()
    made = np.zeros(inside.shape, np.int16)
    made[inside] = ((shown - low) / (high - low)) ** rng.uniform(0.7, 1.4) * rng.uniform(300, 1500) + 20
    return made


# --- the training ------------------------------------------------------------------------------------------------


def measure(source: Path, data: Path, run: Path, threads: int) -> Cost:
    """Train with a build in a process of its own, and return what that took."""
    shutil.rmtree(run, ignore_errors=True)
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, "PYTHONPATH": str(source), **dict.fromkeys(names, str(threads))}
    words = [sys.executable, __file__, "--turn", str(data), str(run)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def take_turn(data: Path, run: Path) -> Cost:
    """Train in this process."""
    begun = time.monotonic()
    from chiasm.methods import make_recipe
    from chiasm.training.run import train

    recipe = make_recipe("l2", "tiny", {"data.sources": ("t1",), "data.target": "t2", **QUICK})
    first: list[tuple[float, float, float]] = []

    def note(*_: Any) -> None:
        if not first:
            first.append((time.process_time(), peak_mib(), time.monotonic() - begun))

    train(data, recipe, run, say=lambda line: print(line, file=sys.stderr), progress=note)
    return Cost(first[0][0], time.process_time(), first[0][1], peak_mib(), first[0][2])


def peak_mib() -> float:
    """Return the most memory that this process held so far, in MiB, pages of the files that it maps among it."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def profile(data: Path, run: Path) -> None:
    """Print the functions in which a training's time goes."""
    import cProfile
    import pstats

    shutil.rmtree(run, ignore_errors=True)
    profiler = cProfile.Profile()
    profiler.runcall(take_turn, data, run)
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(70)


# --- all of them -------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure each number of cases that is asked for."""
    if sys.argv[1:2] == ["--turn"]:
        print(json.dumps(take_turn(Path(sys.argv[2]), Path(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps the cohorts")
    parser.add_argument("--cases", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--shape", type=int, nargs=3, default=[48, 56, 40])
    parser.add_argument("--threads", type=int, default=1, help="cases that are examined and prepared side by side")
    parser.add_argument("--before", type=Path, help="src folder of an earlier build, which takes turns with this one")
    parser.add_argument("--profile", action="store_true", help="say in which functions the time goes")
    asked = parser.parse_args()
    i, j, k = asked.shape
    builds = {"now": HERE} | ({} if asked.before is None else {"before": asked.before})
    taken: dict[str, list[tuple[int, Cost]]] = {name: [] for name in builds}
    for cases in asked.cases:
        data = asked.work / f"cohort-{i}x{j}x{k}-{cases}"
        write_cohort(data, (i, j, k), cases)
        run = asked.work / "run"
        if asked.profile:
            profile(data, run)
            continue
        for name, source in builds.items():
            cost = measure(source, data, run, asked.threads)
            taken[name].append((cases, cost))
            print(
                f"{name:6} {cases:6} cases of {i}x{j}x{k}: first step after {cost.first_step:.1f} s of the processor "
                f"({cost.first_step / cases:.3f} s a case; {cost.wall:.1f} s by the clock), peak {cost.peak_first:.0f} "
                f"MiB until then and {cost.peak:.0f} MiB in all",
                flush=True,
            )
        shutil.rmtree(run, ignore_errors=True)
    for name, rows in taken.items():
        for (few, cheap), (many, dear) in pairwise(rows):
            each = (dear.first_step - cheap.first_step) / (many - few)
            grown = (dear.peak - cheap.peak) / (many - few)
            print(f"{name:6} from {few} to {many}: a case more takes {each:.3f} s and {1024 * grown:.0f} KiB")


if __name__ == "__main__":
    main()
