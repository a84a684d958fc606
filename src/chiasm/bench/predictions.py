"""Rows about prediction: whole volumes through the default networks, beside the loops that people write."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.bench.rows import BenchRow, BenchSetting, TimedPair
from chiasm.bench.subjects import CONTRAST, LEVEL, draw_pictures
from chiasm.boxes import box_of

if TYPE_CHECKING:
    import torch

SLICES = 5  # of the 2.5D network
WINDOW = 96  # of MONAI's sliding window; smaller where the volume is
WIDTHS = (16, 32, 64, 128)


class _Subject:
    """A normalised source, its mask, and a generator with the widths of `size = "small"`, unfolded.

    Its weights are random, and normalisation has the statistics of noise, so that values stay of the size of one.
    """

    def __init__(self, setting: BenchSetting, dims: Literal[2, 3]) -> None:
        import torch

        from chiasm.networks.generator import ResidualGenerator
        from chiasm.prediction.engines import Engine, Hardware, freeze_for_inference

        pictures = draw_pictures(setting.shape)
        self.mask = pictures.mask
        self.source = np.where(self.mask, (pictures.source - LEVEL) / CONTRAST, 0).astype(np.float32)
        torch.manual_seed(0)
        channels = SLICES if dims == 2 else 1
        plain = ResidualGenerator(in_channels=channels, widths=WIDTHS, dims=dims)
        plain.train()(torch.randn(2, channels, *[32] * dims))
        self.plain = plain.eval().requires_grad_(False)
        self.engine = Engine.pick(Hardware("cpu", "32-true", "torch"))
        self.frozen = self.engine.place(freeze_for_inference(self.plain))

    def boxed(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return source (1, I, J, K) and mask in the box of the mask."""
        box = box_of(self.mask)
        return self.source[box][None], self.mask[box]


def slices_beside_a_loop(setting: BenchSetting) -> TimedPair:
    """Predict the voxels of the mask in 2.5D, beside an eager loop over all slices, one at a time."""
    import torch

    from chiasm.prediction.tiling import apply_inside

    subject = _Subject(setting, 2)
    multiple = subject.frozen.size_multiple

    def ours() -> NDArray[np.float32]:
        source, mask = subject.boxed()
        run = subject.engine.wrap(subject.frozen)
        made = apply_inside(run, [source], mask, slices=SLICES, batch=8, multiple=multiple)
        return np.asarray(made[0])

    def peer() -> NDArray[np.float32]:
        i, j, depth = subject.source.shape
        padding = ((0, -i % multiple), (0, -j % multiple), (SLICES // 2,) * 2)
        around = np.pad(subject.source, padding, mode="edge")
        made = []
        with torch.inference_mode():
            for k in range(depth):
                stack = np.ascontiguousarray(np.moveaxis(around[..., k : k + SLICES], -1, 0))
                made.append(subject.plain(torch.from_numpy(stack)[None])[0, 0, :i, :j].numpy())
        return np.stack(made)[np.moveaxis(subject.mask, -1, 0)]

    return TimedPair(ours, peer, _share_of_sd, TOLERANCE)


def volume_beside_monai(setting: BenchSetting) -> TimedPair:
    """Predict a volume in 3D, beside MONAI's sliding window at its usual overlap of a half."""
    from chiasm.prediction.slabs import apply_in_slabs

    subject = _Subject(setting, 3)

    def ours() -> NDArray[np.float32]:
        source, mask = subject.boxed()
        with subject.engine.inference():
            made = apply_in_slabs(subject.engine.wrap(subject.frozen), source, multiple=subject.frozen.size_multiple)
        return np.asarray(made[0][mask])

    return TimedPair(ours, _monai(subject, setting), _share_of_sd, TOLERANCE)


def compiled_beside_monai(setting: BenchSetting) -> TimedPair:
    """Do the same with the fastest engine on a CPU, in one pass; the compiled network is kept in the user's cache."""
    import torch

    from chiasm.prediction.compiled import Compiled
    from chiasm.prediction.engines import Engine, Hardware

    subject = _Subject(setting, 3)
    run = Compiled(Engine.pick(Hardware("cpu", "32-true", "openvino")), subject.frozen, "bench")

    def ours() -> NDArray[np.float32]:
        source, mask = subject.boxed()
        beyond = [(0, -size % subject.frozen.size_multiple) for size in mask.shape]
        made = run(torch.from_numpy(np.pad(source[0], beyond)[None, None]))
        return np.asarray(made[0, 0].numpy()[tuple(map(slice, mask.shape))][mask])

    return TimedPair(ours, _monai(subject, setting), _share_of_sd, TOLERANCE)


def _monai(subject: _Subject, setting: BenchSetting) -> Callable[[], NDArray[np.float32]]:
    """Return MONAI's sliding window over the whole volume."""
    import torch
    from monai.inferers.inferer import SlidingWindowInferer

    window = [min(WINDOW, size * 2 // 3 // 8 * 8) for size in setting.shape]

    def peer() -> NDArray[np.float32]:
        infer = SlidingWindowInferer(window, overlap=0.5, mode="gaussian")
        with torch.inference_mode():
            made: Any = infer(torch.from_numpy(subject.source)[None, None], subject.plain)
        return np.asarray(made[0, 0].numpy()[subject.mask])

    return peer


def slabs_beside_one_pass(setting: BenchSetting) -> TimedPair:
    """Predict a volume in slabs, whose memory does not grow with its length, beside one pass over all of it."""
    import torch

    from chiasm.prediction.slabs import apply_in_slabs

    subject = _Subject(setting, 3)
    source, _ = subject.boxed()
    multiple = subject.frozen.size_multiple
    padded = np.pad(source[0], [(0, -size % multiple) for size in source.shape[1:]])[None, None]

    def ours() -> NDArray[np.float32]:
        with subject.engine.inference():
            return np.asarray(apply_in_slabs(subject.engine.wrap(subject.frozen), source, multiple=multiple)[0])

    def peer() -> NDArray[np.float32]:
        made: torch.Tensor = subject.engine.wrap(subject.frozen)(torch.from_numpy(padded))
        return np.asarray(made[0, 0].numpy()[tuple(map(slice, source.shape[1:]))])

    return TimedPair(ours, peer, lambda a, b: float(np.abs(a - b).max() / b.std()), 1e-4)


TOLERANCE = 0.05  # what lies beyond a box or a window decides a little at its border


def _share_of_sd(ours: NDArray[np.float32], peer: NDArray[np.float32]) -> float:
    return float(np.abs(ours - peer).mean() / peer.std()) if ours.shape == peer.shape else np.inf


ROWS = (
    BenchRow(
        "predict-2.5d",
        "predict the voxels of the mask in 2.5D, the image alone, float32, torch",
        "eager loop over all slices, one at a time",
        3.0,
        3.0,
        slices_beside_a_loop,
        equal="mean difference in the mask by the SD",
    ),
    BenchRow(
        "predict-3d",
        "predict the voxels of the mask in 3D, the image alone, float32, torch",
        "MONAI SlidingWindowInferer, overlap 0.5",
        6.0,
        6.0,
        volume_beside_monai,
        needs=("monai",),
        equal="mean difference in the mask by the SD",
    ),
    BenchRow(
        "predict-3d-best",
        "predict the voxels of the mask in 3D, the image alone, float32, OpenVINO",
        "MONAI SlidingWindowInferer, overlap 0.5",
        10.0,
        10.0,
        compiled_beside_monai,
        needs=("monai", "openvino"),
        equal="mean difference in the mask by the SD",
    ),
    BenchRow(
        "slabs-3d",
        "a 3D network over the mask's box slab by slab",
        "the same in one pass",
        0.85,  # planes between slabs are copied: what slabs are for is memory
        0.85,
        slabs_beside_one_pass,
        equal="largest difference by the SD",
    ),
)
