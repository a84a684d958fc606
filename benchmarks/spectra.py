"""How far the spectra of a study's predictions are from those of the real images, for each arm.

    python benchmarks/spectra.py STUDY

Of every axial slice with a tenth of its voxels in the mask: the power of the image, scaled to mean 0 and SD 1 in the
mask, in rings of equal spatial frequency, and |log10 predicted - log10 real| of it, averaged over all rings and over
those of the upper half of the frequencies (fine detail).  0 is the real image's spectrum; means over cases and seeds.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import mean

import numpy as np
from levers import read
from numpy.typing import NDArray

from chiasm.storage import read_json, read_toml

RINGS = 24


def ring_powers(image: NDArray[np.float64], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the mean power of a volume's axial slices in rings of frequency, shape (RINGS,)."""
    shown = mask.mean(axis=(0, 1)) >= 0.1
    scaled = np.where(mask, (image - image[mask].mean()) / image[mask].std(), 0.0)[:, :, shown]
    power = np.abs(np.fft.fft2(scaled, axes=(0, 1))) ** 2
    frequency = np.hypot(np.fft.fftfreq(image.shape[0])[:, None], np.fft.fftfreq(image.shape[1])[None])
    ring = np.minimum((frequency / 0.5 * RINGS).astype(int), RINGS)  # corners beyond 0.5 are one more ring
    return np.array([power[ring == one].mean() for one in range(RINGS)])


def distances(prediction: Path, real: Path, mask: Path) -> tuple[float, float]:
    """Return the distance of the upper half of the rings, and of all."""
    inside = read(mask) > 0
    apart = np.abs(np.log10(ring_powers(read(prediction), inside)) - np.log10(ring_powers(read(real), inside)))
    return float(apart[RINGS // 2 :].mean()), float(apart.mean())


def main() -> None:
    """Print a row for each arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    asked = parser.parse_args()
    study = read_json(asked.study / "study.json")["study"]
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for folder in sorted(path.parent for path in asked.study.glob("jobs/*/predictions")):
        for mask in sorted(folder.glob("predictions/*_mask.nii.gz")):
            case = mask.name.removesuffix("_mask.nii.gz")
            name = f"{case}_{study['target']}.nii.gz"
            pair = mask.with_name(name), asked.study / "cohort" / case / name
            found[read_toml(folder / "recipe.toml")["method"]].append(distances(*pair, mask))
    print("| arm | fine detail | all frequencies | n |\n|---|---|---|---|")
    for arm, apart in ((arm, found[arm]) for arm in study["arms"]):
        fine, whole = (mean(one) for one in zip(*apart))
        print(f"| {arm} | {fine:.3f} | {whole:.3f} | {len(apart)} |")


if __name__ == "__main__":
    main()
