"""Rows about data for training: a batch of patches, beside MONAI and TorchIO on cases that they hold in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.bench.rows import BenchRow, BenchSetting, TimedPair
from chiasm.bench.subjects import CONTRAST, LEVEL, draw_pictures

PATCH, SLICES, COUNT = 64, 5, 8  # 2.5D; smaller where the volume is
GAIN, OFFSET = 1.1, 0.05


def _normalised(image: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    return np.where(mask, (image - LEVEL) / CONTRAST, 0).astype(np.float32)


class _Batch:
    """A drawn case that is held in memory, and the places of the patches that are cut from it."""

    def __init__(self, setting: BenchSetting) -> None:
        import torch

        from chiasm.preparation.arrays import PreparedCase
        from chiasm.training.batches import Place

        drawn = draw_pictures(setting.shape)
        labels = (drawn.source > LEVEL + 2 * CONTRAST).astype(np.uint8)
        source, target = (_normalised(image, drawn.mask) for image in (drawn.source, drawn.target))
        sliced = {
            name: np.moveaxis(np.ascontiguousarray(np.moveaxis(array, -1, 0)), 0, -1)
            for name, array in {"source": source, "target": target, "mask": drawn.mask, "labels": labels}.items()
        }
        self.case = PreparedCase(
            *("a", "a", None),
            sliced["source"][None],
            sliced["target"],
            sliced["mask"],
            sliced["labels"],
            drawn.geometry,
        )
        rng = np.random.default_rng(0)
        self.side = min(PATCH, *(size * 2 // 3 for size in setting.shape[:2]))
        margin = np.array([self.side, self.side, SLICES]) // 2 + 1
        self.centres = [tuple(map(int, rng.integers(margin, np.array(setting.shape) - margin))) for _ in range(COUNT)]
        self.places = [Place(0, (i, j, k), True, (GAIN,), (OFFSET,)) for i, j, k in self.centres]
        self.held = {name: torch.from_numpy(np.ascontiguousarray(array))[None] for name, array in sliced.items()}

    def cut(self) -> list[Any]:
        """Cut the patches by chiasm."""
        from chiasm.training.batches import take_batch

        return [*take_batch([self.case], self.places, patch=(self.side, self.side), slices=SLICES)]


def batch_beside_monai(setting: BenchSetting) -> TimedPair:
    """Cut eight patches with flips, jitter and labels at given places, beside MONAI's transforms at the same places."""
    import torch
    from monai.transforms.compose import Compose
    from monai.transforms.croppad.dictionary import SpatialCropd
    from monai.transforms.intensity.dictionary import ScaleIntensityd, ShiftIntensityd
    from monai.transforms.spatial.dictionary import Flipd

    batch = _Batch(setting)
    keys = [*batch.held]

    def peer() -> list[torch.Tensor]:
        made = []
        for centre in batch.centres:
            change = Compose(
                [
                    SpatialCropd(keys, roi_center=centre, roi_size=(batch.side, batch.side, SLICES)),
                    Flipd(keys, spatial_axis=0),
                    ScaleIntensityd("source", minv=None, maxv=None, factor=GAIN - 1),
                    ShiftIntensityd("source", offset=OFFSET),
                ]
            )
            patch: Any = change(batch.held)
            made.append(_as_slices(*(patch[name].as_tensor() for name in keys)))
        return [torch.stack(parts) for parts in zip(*made)]

    return TimedPair(batch.cut, peer, _largest_difference, 1e-5)


def batch_beside_torchio(setting: BenchSetting) -> TimedPair:
    """Cut the same patches beside TorchIO's sampler and transforms, on a subject that it holds in memory."""
    import torch
    import torchio

    batch = _Batch(setting)
    images = {name: torchio.ScalarImage(tensor=batch.held[name]) for name in ("source", "target")}
    maps = {name: torchio.LabelMap(tensor=batch.held[name]) for name in ("mask", "labels")}
    subject = torchio.Subject(**images, **maps)
    size = np.array([batch.side, batch.side, SLICES])
    sampler = torchio.UniformSampler(tuple(size.tolist()))
    change = torchio.Compose(
        [torchio.Flip(axes=0), torchio.Lambda(lambda image: image * GAIN + OFFSET, include=["source"])]
    )

    def peer() -> list[torch.Tensor]:
        made = []
        for centre in batch.centres:
            patch: Any = change(sampler.extract_patch(subject, tuple((np.array(centre) - size // 2).tolist())))
            made.append(_as_slices(*(patch[name].data for name in batch.held)))
        return [torch.stack(parts) for parts in zip(*made)]

    return TimedPair(batch.cut, peer, _largest_difference, 1e-5)


def _as_slices(source: Any, target: Any, mask: Any, labels: Any) -> list[Any]:
    """Make channels of slices, and blank what lies outside the mask, as each row of a batch has it."""
    middle = SLICES // 2
    inside = mask[0].movedim(-1, 0)
    return [
        source[0].movedim(-1, 0) * inside,
        target[..., middle],
        mask[..., middle],
        labels[..., middle] > 0,
    ]


def _largest_difference(ours: list[Any], peer: list[Any]) -> float:
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(ours, peer, strict=True))


ROWS = (
    BenchRow(
        "batch-monai",
        f"cut {COUNT} patches of {SLICES} x {PATCH} x {PATCH} with flips, jitter and labels",
        "MONAI dictionary transforms on cases in memory",
        25.0,
        25.0,
        batch_beside_monai,
        needs=("monai",),
        equal="largest difference, normalised units",
    ),
    BenchRow(
        "batch-torchio",
        f"cut {COUNT} patches of {SLICES} x {PATCH} x {PATCH} with flips, jitter and labels",
        "TorchIO sampler and transforms on a subject in memory",
        25.0,
        25.0,
        batch_beside_torchio,
        needs=("torchio",),
        equal="largest difference, normalised units",
    ),
)
