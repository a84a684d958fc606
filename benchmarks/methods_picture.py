"""One slice of one simulated patient as every arm of a finished study made it, beside source and target.

    python benchmarks/methods_picture.py STUDY PHANTOM_0003 docs/pictures/systems.png

The slice is the axial one that holds most of the lesion, which is outlined.  Each
panel shows 0.5 to 99.5 % of its own intensities in the head: predictions are on
the training cohort's scale, and the target on its scanner's.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chiasm.cohorts.discovery import find_cohort
from chiasm.prediction.manifest import read_manifest
from chiasm.storage import read_json, whole_file
from chiasm.volumes import read_volume

COLUMNS = 6
INCHES = 1.9


def predicted(study: Path, case: str) -> dict[str, Path]:
    """Find the image that each arm made of a case: the first seed's, of the fold that tests it."""
    images: dict[str, Path] = {}
    for job in read_json(study / "study.json")["jobs"]:
        folder = study / job["folder"] / "predictions"
        for entry in read_manifest(folder).cases:
            if entry.case == case:
                images.setdefault(job["arm"].split(",")[0], folder / entry.image)
    return images


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("case")
    parser.add_argument("picture", type=Path)
    asked = parser.parse_args()
    settings = read_json(asked.study / "study.json")["study"]
    [case] = [one for one in find_cohort(asked.study / "cohort").cases if one.id == asked.case]
    names = {"source": case.images[settings["source"][0]], "target": case.images[settings["target"]]}
    volumes = {name: read_volume(path).array for name, path in {**names, **predicted(asked.study, case.id)}.items()}
    lesion = np.zeros(volumes["target"].shape, bool)
    if case.labels is not None:
        lesion = read_volume(case.labels, labels=True).array > 0
    inside = volumes["target"] > 0
    place = int((lesion if lesion.any() else inside).sum(axis=(0, 1)).argmax())

    def turned(volume: NDArray[np.generic]) -> NDArray[np.generic]:
        return volume[::-1, :, place].T  # radiological view: the patient's right is on the left

    rows = math.ceil(len(volumes) / COLUMNS)
    figure = Figure(figsize=(INCHES * COLUMNS, (INCHES * 1.15 + 0.2) * rows), facecolor="black")
    FigureCanvasAgg(figure)
    for number, (name, volume) in enumerate(volumes.items()):
        axes = figure.add_subplot(rows, COLUMNS, number + 1)
        low, high = np.quantile(volume[inside], (0.005, 0.995))
        axes.imshow(turned(volume), cmap="gray", vmin=low, vmax=high, origin="lower")
        if lesion[:, :, place].any():
            axes.contour(turned(lesion).astype(float), levels=[0.5], colors="#f2c14e", linewidths=0.6)
        axes.set_title(name, color="white", fontsize=8)
        axes.set_axis_off()
    figure.subplots_adjust(0, 0, 1, 0.96, 0.01, 0.12)
    with whole_file(asked.picture) as temporary:
        figure.savefig(temporary, dpi=90, format="png", metadata={"Software": None})


if __name__ == "__main__":
    main()
