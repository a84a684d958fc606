"""How near registration brings simulated patients whose movement is known, in millimetres.

    python benchmarks/registration.py --subjects 3 --seed 201

Patients are drawn with each kind and level of movement between T1-weighted and T2-weighted scans (docs/phantom.md).
The residual is how far each voxel of the brain ends from where it belongs, averaged over the brain, then over patients;
before it, the distance of an unregistered pair. Prints the tables of docs/registration.md. `--speed` registers one pair
on a grid of 240 x 240 x 155 and tells the seconds of wall clock and of the processor.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from chiasm.boxes import box_of
from chiasm.registration.alignment import Alignment, AlignmentKind, align
from chiasm.simulation.patient import DIFFICULTIES, Subject, draw_subject
from chiasm.volumes import Geometry, Volume, resample

LEVELS_MM = (0.0, 1.0, 2.0, 4.0)
MOVEMENTS = ("rigid", "elastic")
PAIRS = ("T1-T2, whole heads", "T1-T2, skull-stripped", "CT-T2, whole heads")


def pair(subject: Subject, name: str) -> tuple[Volume, Volume]:
    """Return the fixed and the moving volume of a pair; each is stripped by its own mask's outline, as scanned."""
    grid = Geometry(subject.labels.shape, subject.affine)
    images = subject.images
    if name == "T1-T2, skull-stripped":
        moved = map_coordinates(subject.stripped.astype(np.float32), _places(subject), order=1) > 0.5
        return Volume(images["t1"] * subject.stripped, grid), Volume(images["t2"] * moved, grid)
    return Volume(images["ct" if name.startswith("CT") else "t1"], grid), Volume(images["t2"], grid)


def _places(subject: Subject) -> NDArray[Any]:
    spacing = np.linalg.norm(subject.affine[:3, :3], axis=0)
    places: NDArray[Any] = np.indices(subject.labels.shape) + np.moveaxis(subject.moved_mm, -1, 0) / spacing.reshape(
        3, 1, 1, 1
    )
    return places


def residual_mm(made: Alignment | None, subject: Subject) -> float:
    """Return how far voxels of the brain end from where they belong, on average.

    The moved scan shows at x what belongs at x + r(x); a registration says that what belongs at y is shown at T(y).
    So T(y) + r(T(y)) should be y.
    """
    points = np.argwhere(subject.brain) @ subject.affine[:3, :3].T + subject.affine[:3, 3]
    there = points if made is None else made.places(points)
    inverse = np.linalg.inv(subject.affine)
    at = inverse[:3, :3] @ there.T + inverse[:3, 3:]
    axes = subject.affine[:3, :3] / np.linalg.norm(subject.affine[:3, :3], axis=0)
    moved = np.stack([map_coordinates(subject.moved_mm[..., axis], at, order=1) for axis in range(3)], 1) @ axes.T
    return float(np.linalg.norm(there + moved - points, axis=1).mean())


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=3)
    parser.add_argument("--seed", type=int, default=201)
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS_MM)
    parser.add_argument("--movements", nargs="+", default=MOVEMENTS)
    parser.add_argument("--kinds", nargs="+", default=get_args(AlignmentKind))
    parser.add_argument("--speed", action="store_true")
    asked = parser.parse_args()
    if asked.speed:
        speed(asked.seed)
        return
    print("| movement | pair | before | " + " | ".join(asked.kinds) + " | least Jacobian |")
    print("|---|---|---|" + "---|" * (len(asked.kinds) + 1))
    for movement in asked.movements:
        for level in asked.levels:
            difficulty = replace(DIFFICULTIES["standard"], misregistration_mm=level, movement=movement)
            subjects = [
                draw_subject(number, asked.seed, heads=None, spacing_mm=2.0, difficulty=difficulty)
                for number in range(1, asked.subjects + 1)
            ]
            for name in PAIRS:
                before = np.mean([residual_mm(None, subject) for subject in subjects])
                cells, least = [], 1.0
                for kind in asked.kinds:
                    made = [align(*pair(subject, name), kind) for subject in subjects]
                    left = [residual_mm(one, subject) for one, subject in zip(made, subjects)]
                    cells.append(f"{np.mean(left):.2f} ({min(left):.2f} to {max(left):.2f})")
                    least = min(least, *(one.least_jacobian for one in made))
                print(
                    f"| {movement}, {level:g} mm | {name} | {before:.2f} | " + " | ".join(cells) + f" | {least:.2f} |",
                    flush=True,
                )


def speed(seed: int) -> None:
    """Register one pair of the size of a BraTS case."""
    difficulty = replace(DIFFICULTIES["standard"], misregistration_mm=4.0)
    subject = draw_subject(1, seed, heads=None, spacing_mm=2.0, difficulty=difficulty)
    spacing = np.linalg.norm(subject.affine[:3, :3], axis=0)
    affine = subject.affine.copy()
    affine[:3, :3] /= spacing  # 1 mm
    middle = subject.affine @ [*(part.start + (part.stop - part.start - 1) / 2 for part in box_of(subject.stripped)), 1]
    affine[:3, 3] = middle[:3] - affine[:3, :3] @ (np.array((240, 240, 155)) - 1) / 2
    fixed, moving = (resample(one, Geometry((240, 240, 155), affine)) for one in pair(subject, PAIRS[1]))
    wall, cpu = time.perf_counter(), time.process_time()
    made = align(fixed, moving)
    print(f"{time.perf_counter() - wall:.0f} s, {time.process_time() - cpu:.0f} s of the processor; ", end="")
    print(f"{residual_mm(None, subject):.2f} mm before, {residual_mm(made, subject):.2f} mm after")


if __name__ == "__main__":
    main()
