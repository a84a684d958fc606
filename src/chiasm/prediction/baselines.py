"""The naive baselines that stand in every table: predictions without a network.

All work in normalised units on a prepared grid and are fitted on training cases only.  A method that is not better than
the look-up has learnt no more than a table of 64 numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chiasm.checksums import check_checksum, sha256_of, with_checksum
from chiasm.errors import RunError, unknown
from chiasm.heap import give_back_mapped
from chiasm.preparation.intensity import fit_lookup
from chiasm.storage import read_json, whole_file, write_json
from chiasm.volumes import Geometry, Volume, resample

if TYPE_CHECKING:
    from chiasm.preparation.arrays import PreparedCase

TENSORS, CARD = "baselines.safetensors", "baselines.json"
FORMAT = 1
SAMPLE = 200_000  # voxels of a case that its quantiles, and at most the look-up, are taken over
LOOKUP_SAMPLE = 4_000_000  # of all cases together
QUANTILES = 257
BINS = 64
MOST_ATLAS_VOXELS = 2**27  # of the grid that the mean image lies on: further apart, cases share no space

#: The baselines, in the order of a table.  Super-resolution has "bicubic" in place of "identity".
NAMES = ("identity", "bicubic", "mean", "histogram", "lookup")

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Baselines:
    """The tables that were fitted on training cases, normalised units.

    Attributes:
        mean_image: Mean of the training targets, `mean_target` where no
            training mask reaches, shape (I, J, K).
        mean_grid: Where it lies.
        mean_target: Mean of all training voxels.
        target_quantiles: Of a typical training target at even shares from 0 to 1.
        lookup_source: Knots of the look-up, strictly rising.
        lookup_target: The target expected at each.
        fitted_on: Ids of the training cases.
        own: Which source is the target's own modality, interpolated from thick slices; None for synthesis.
    """

    mean_image: Array
    mean_grid: Geometry
    mean_target: float
    target_quantiles: NDArray[np.float64]
    lookup_source: NDArray[np.float64]
    lookup_target: NDArray[np.float64]
    fitted_on: tuple[str, ...]
    own: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The baselines that `predict` knows."""
        absent = "bicubic" if self.own is None else "identity"
        return tuple(name for name in NAMES if name != absent)

    def predict(self, name: str, source: Array, mask: Mask, grid: Geometry) -> Array:
        """Predict the target of one case.

        Args:
            name: "identity" (the source itself), "bicubic" (likewise, of the
                target's own modality: for super-resolution it is the cubic
                spline through the thick slices), "mean" (the mean of the
                training targets at this place of world space), "histogram"
                (the source's quantiles become the training targets'), or
                "lookup" (what training targets show at this source intensity).
            source: Normalised, shape (C, I, J, K); all but "mean" and "bicubic" see the first source only.
            mask: Valid voxels, shape (I, J, K).
            grid: Where they lie.

        Returns:
            Normalised target units, shape (I, J, K), 0 outside the mask.

        Raises:
            RecipeError: If the name is unknown.
            ValueError: If shapes do not fit.
        """
        guess = np.zeros(mask.shape, np.float32)
        guess[mask] = self.predict_inside([name], source, mask, grid)[name]
        return guess

    def predict_inside(
        self, names: Sequence[str], source: Array, mask: Mask, grid: Geometry
    ) -> dict[str, NDArray[np.floating]]:
        """Predict the target of one case in its mask, by several baselines.

        Args:
            names: As for `predict`.
            source: As for `predict`.
            mask: As for `predict`.
            grid: As for `predict`.

        Returns:
            Normalised target units of the mask's voxels, shape (n,) each.

        Raises:
            RecipeError: If a name is unknown.
            ValueError: If shapes do not fit.
        """
        if strange := next((name for name in names if name not in self.names), None):
            raise unknown("baseline", strange, self.names)
        if source.shape[1:] != mask.shape or mask.shape != tuple(grid.shape):
            raise ValueError(f"source {source.shape}, mask {mask.shape} and grid {grid.shape} do not fit")
        first = np.asarray(source[0])[mask]
        if not first.size:
            return dict.fromkeys(names, first)
        return {name: self._guess(name, first, source, mask, grid) for name in names}

    def _guess(
        self, name: str, first: NDArray[np.floating], source: Array, mask: Mask, grid: Geometry
    ) -> NDArray[np.floating]:
        """Predict the target inside the mask, shape (n,), where the first source has the values `first`."""
        if name == "identity":
            return first
        if name == "bicubic":
            assert self.own is not None
            return np.asarray(source[self.own])[mask]
        if name == "mean":
            atlas = Volume(self.mean_image, self.mean_grid)
            guess = resample(atlas, grid, order=1, fill=self.mean_target).array[mask]
            give_back_mapped(self.mean_image)
            return guess
        if name == "histogram":
            own, shares = np.unique(_quantiles(first), return_index=True)
            x, y = own, self.target_quantiles[shares]
        else:
            x, y = self.lookup_source, self.lookup_target
        interpolated: NDArray[np.float64] = np.interp(first, x, y)
        return interpolated


def fit_baselines(cases: Sequence[PreparedCase]) -> Baselines:
    """Fit the naive baselines on prepared training cases, one case in memory at a time.

    Raises:
        ValueError: If there are no cases, or no voxel inside their masks.
    """
    if not any(np.asarray(case.mask).any() for case in cases):
        raise ValueError("baselines need training cases with voxels inside their masks")
    sources, targets, quantiles = [], [], []
    for case in cases:
        mask = np.asarray(case.mask)
        if not mask.any():
            continue
        x, y = np.asarray(case.source[0])[mask], np.asarray(case.target)[mask]
        step = max(1, len(x) * len(cases) // LOOKUP_SAMPLE, len(x) // SAMPLE)
        sources.append(x[::step].copy())  # a view would keep all of x
        targets.append(y[::step].copy())
        quantiles.append(_quantiles(y))
    knots, values = fit_lookup(np.concatenate(sources), np.concatenate(targets), BINS)
    mean_image, mean_grid, mean_target = _mean_image(cases)
    ids = tuple(case.id for case in cases)
    return Baselines(mean_image, mean_grid, mean_target, np.mean(quantiles, axis=0), knots, values, ids, cases[0].own)


def save_baselines(folder: Path, baselines: Baselines) -> None:
    """Write `baselines.safetensors` and `baselines.json`, which holds the sha256 of the former.

    Raises:
        ChiasmError: If the folder cannot be written.
    """
    from safetensors.numpy import save

    tensors = {
        "mean_image": np.ascontiguousarray(baselines.mean_image),
        "target_quantiles": baselines.target_quantiles,
        "lookup_source": baselines.lookup_source,
        "lookup_target": baselines.lookup_target,
    }
    with whole_file(folder / TENSORS) as temporary:
        temporary.write_bytes(save(tensors))  # safetensors' own writing hides a full disk from `whole_file`
    card = {
        "format": FORMAT,
        "sha256": sha256_of(folder / TENSORS),
        "affine": baselines.mean_grid.affine.tolist(),
        "mean_target": baselines.mean_target,
        "fitted_on": list(baselines.fitted_on),
    } | ({} if baselines.own is None else {"own": baselines.own})
    write_json(folder / CARD, with_checksum(card))


def load_baselines(folder: Path) -> Baselines:
    """Read what `save_baselines` wrote; nothing in the files is run, and the mean image is mapped, not read.

    Raises:
        RunError: If a file is missing, was changed, or is of another format.
    """
    from safetensors import SafetensorError, safe_open

    remedy = "Copy the model folder again, or run the same train command to write it anew."
    card = _read_card(folder / CARD, remedy)
    file = folder / TENSORS
    if not file.is_file() or sha256_of(file) != card.get("sha256"):
        raise RunError("is missing or was changed since it was written", path=file, reason="damaged", hint=remedy)
    try:
        with safe_open(file, "np") as content:
            tensors = {
                name: content.get_tensor(name) for name in ("target_quantiles", "lookup_source", "lookup_target")
            }
        mean_image = _mapped(file, "mean_image")
        i, j, k = mean_image.shape
        return Baselines(
            mean_image,
            Geometry((i, j, k), np.array(card["affine"], dtype=np.float64).reshape(4, 4)),
            float(card["mean_target"]),
            tensors["target_quantiles"],
            tensors["lookup_source"],
            tensors["lookup_target"],
            tuple(card["fitted_on"]),
            card.get("own"),
        )
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise RunError("is damaged", path=file, reason="damaged", found=error) from error


def _mapped(file: Path, name: str) -> Array:
    """Map a tensor of single precision from a safetensors file, which may be large and is needed for a moment only.

    Raises:
        KeyError, ValueError: If the file holds no such tensor.
    """
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        its = json.loads(stream.read(size))[name]
    if its["dtype"] != "F32":
        raise ValueError(f"{name} is of type {its['dtype']}, not F32")
    mapped: Array = np.memmap(file, "<f4", "r", offset=8 + size + its["data_offsets"][0], shape=tuple(its["shape"]))
    return mapped


def _read_card(path: Path, remedy: str) -> dict[str, Any]:
    card: dict[str, Any] = read_json(path)
    found = card.get("format") if isinstance(card, dict) else type(card).__name__
    if found != FORMAT:
        raise RunError(
            "is of a format this chiasm does not know", path=path, reason="format", found=found, expected=FORMAT
        )
    check_checksum(card, path, remedy)
    return card


def _quantiles(values: Array) -> NDArray[np.float64]:
    return np.quantile(values[:: -(-len(values) // SAMPLE)], np.linspace(0, 1, QUANTILES)).astype(np.float64)


def _mean_image(cases: Sequence[PreparedCase]) -> tuple[Array, Geometry, float]:
    """Average the targets in world space: image, where it lies, and the mean of all their voxels."""
    grid = _common_grid([case.grid for case in cases])
    total, cover = np.zeros(grid.shape, np.float32), np.zeros(grid.shape, np.float32)
    voxels, amount = 0, 0.0
    for case in cases:
        mask, target = np.asarray(case.mask), np.asarray(case.target)
        inside = mask.astype(np.float32)
        total += resample(Volume(target * inside, case.grid), grid, order=1).array
        cover += resample(Volume(inside, case.grid), grid, order=1).array
        voxels += int(mask.sum())
        amount += float(target[mask].sum(dtype=np.float64))
    mean = amount / voxels
    seen = cover > 0.01
    image = np.full(grid.shape, mean, np.float32)
    image[seen] = total[seen] / cover[seen]
    return image, grid, mean


def _common_grid(grids: Sequence[Geometry]) -> Geometry:
    """Return a grid along the world's axes, as fine as the first, that holds all `grids`."""
    corners = np.concatenate([_corners(grid) for grid in grids])
    low, high = corners.min(axis=0), corners.max(axis=0)
    spacing = np.full(3, min(grids[0].spacing_mm))
    size = np.floor((high - low) / spacing + 1e-3).astype(int) + 1
    if np.prod(size, dtype=np.float64) > MOST_ATLAS_VOXELS:  # coarser, never more
        spacing *= float((np.prod(size, dtype=np.float64) / MOST_ATLAS_VOXELS) ** (1 / 3)) * 1.01
        size = np.floor((high - low) / spacing + 1e-3).astype(int) + 1
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = low
    i, j, k = size.tolist()
    return Geometry((i, j, k), affine)


def _corners(grid: Geometry) -> NDArray[np.float64]:
    """Return the world positions of the centres of the eight corner voxels, shape (8, 3)."""
    ends = np.array(np.meshgrid(*((0, side - 1) for side in grid.shape))).reshape(3, 8)
    corners: NDArray[np.float64] = (grid.affine[:3, :3] @ ends).T + grid.affine[:3, 3]
    return corners
