"""A synthesis as DICOM: a folder with the synthetic series and its expected-error map.

`chiasm predict --format dicom` and the DICOM node both use this module, so both give the same files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chiasm.errors import ChiasmError
from chiasm.prediction.ensemble import Named, name_of
from chiasm.prediction.model import Model
from chiasm.prediction.synthesis import Synthesis
from chiasm.storage import whole_folder
from chiasm.volumes.dicom_attributes import Derivation, ModelMark
from chiasm.volumes.dicom_choice import pick_series
from chiasm.volumes.dicom_series import Series
from chiasm.volumes.dicom_write import MapMeaning, grey_scale, write_map, write_series

SERIES, EXPECTED_ERROR, SPREAD = "synthetic", "expected-error", "spread"  # a folder, and maps in any format

MAPS = {
    EXPECTED_ERROR: MapMeaning(
        "EXPECTED_ERROR",
        "Expected absolute error of the image",
        "Expected absolute error of a synthetic image",
        "SYNTHETIC expected absolute error",
        1000,
    ),
    SPREAD: MapMeaning(
        "SPREAD",
        "Standard deviation over several models",
        "Standard deviation of the images of several models",
        "SYNTHETIC spread over models",
        2000,
    ),
}


@dataclass(frozen=True)
class DicomCase:
    """The files of `write_dicom_case`.

    Attributes:
        series: Files of the synthetic series, along the slices' normal.
        maps: Parametric maps: the expected error where the model has it, the spread of several models.
        warnings: What a reader of the image must know, one sentence each.
    """

    series: tuple[Path, ...]
    maps: tuple[Path, ...]
    warnings: tuple[str, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything."""
        return (*self.series, *self.maps)


def write_dicom_case(
    folder: Path, made: Synthesis, sources: Sequence[Series], model: Model, name: Named | None = None
) -> DicomCase:
    """Write a synthetic image as `synthetic/0001.dcm`, ... and its maps; all of it appears or nothing.

    Args:
        folder: Their place; files of an earlier prediction there are replaced.
        made: On the grid of the first source.
        sources: The series that went in, in the model's order.
        model: What made it, or the first of several.
        name: What several models are called together.

    Raises:
        ChiasmError: If the folder holds anything else or cannot be written.
        VolumeError: If the image does not lie on the slices of the first source.
    """
    plan = model.plan
    _check_replaceable(folder)
    name = name or name_of([model])
    mark = ModelMark(f"{name.method}, {' and '.join(plan.sources)} to {plan.target}", name.sha256)
    modality: Literal["MR", "CT"] = "CT" if plan.target_unit == "HU" else "MR"
    with whole_folder(folder) as fresh:
        derivation = Derivation(
            modality,
            f"{plan.target} from {' and '.join(plan.sources)}",
            mark,
            scale=1.0 if modality == "CT" else grey_scale(*plan.target_range),
            remarks=made.warnings,
        )
        written = write_series(fresh / SERIES, made.image, sources, derivation)
        maps = {EXPECTED_ERROR: made.expected_error, SPREAD: made.spread}
        given = {name: volume for name, volume in maps.items() if volume is not None}
        for file, volume in given.items():
            series, kind = pick_series(fresh / SERIES), MAPS[file]
            write_map(fresh / f"{file}.dcm", volume, series, kind=kind, unit=plan.target_unit, model=mark)
    cut = f"{written.saturated} voxels did not fit 16 bits and were cut to the nearest value that does"
    return DicomCase(
        tuple(folder / SERIES / path.name for path in written.files),
        tuple(folder / f"{file}.dcm" for file in given),
        (*made.warnings, *([cut] if written.saturated else [])),
    )


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace files that chiasm did not write, such as the source itself."""
    ours = re.compile(rf"{SERIES}(/\d{{4,}}\.dcm)?|(?:{EXPECTED_ERROR}|{SPREAD}|reliability)\.dcm")
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    is_file = folder.exists() and not folder.is_dir()
    if is_file or not all(ours.fullmatch(name) for name in names):
        raise ChiasmError(
            "holds something else than a synthetic series, and is not replaced",
            path=folder,
            reason="occupied",
            hint="Give another folder with -o.",
        )
