"""The shading of MR images by coils, found and removed by N4 (Tustison 2010, in the form of SimpleITK).

The field is smooth, so it is estimated on a grid of about 8 mm and evaluated at
every voxel.  Its logarithm is 0 on average inside the mask: an image keeps its
scale, and only the shading goes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.errors import VolumeError
from chiasm.recipe import BiasCorrection
from chiasm.volumes.geometry import Volume

ESTIMATED_MM = 8.0
ITERATIONS = (30, 30, 30)  # one number for each time the spline's mesh is made finer
FEWEST_VOXELS = 200  # of the shrunken mask: fewer cannot separate a field from anatomy

#: Modalities whose intensities no receive coil has shaded: never corrected.
UNSHADED = ("ct", "cbct", "pet")


def bias_field(volume: Volume, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Estimate the factor by which each voxel is too bright, geometric mean 1 inside the mask.

    Args:
        volume: An MR image.
        mask: Where tissue is, shape (I, J, K); elsewhere the field goes on smoothly and means nothing.

    Returns:
        Factors above 0, shape (I, J, K).

    Raises:
        VolumeError: If the mask is too small, or no voxel in it is positive.
    """
    import SimpleITK as sitk

    inside = mask & (volume.array > 0)
    spacing = volume.geometry.spacing_mm
    shrink = [max(1, min(round(ESTIMATED_MM / step), side // 8)) for step, side in zip(spacing, mask.shape)]
    image, where = _itk(volume.array.astype(np.float32), spacing), _itk(inside.astype(np.uint8), spacing)
    small, small_mask = sitk.Shrink(image, shrink), sitk.Shrink(where, shrink)
    if (seen := int(sitk.GetArrayViewFromImage(small_mask).sum())) < FEWEST_VOXELS:
        raise VolumeError(
            "is too small for its bias field to be found",
            reason="bias-field",
            found=f"{seen} voxels of about {ESTIMATED_MM:g} mm",
            expected=f"{FEWEST_VOXELS} or more",
            hint="Train without data.bias_correction.",
        )
    method = sitk.N4BiasFieldCorrectionImageFilter()
    method.SetMaximumNumberOfIterations(ITERATIONS)
    method.SetNumberOfThreads(1)  # the same result on every machine, but for rounding
    method.Execute(small, small_mask)
    log_field = sitk.GetArrayFromImage(method.GetLogBiasFieldAsImage(image)).transpose()
    field: NDArray[np.float32] = np.exp(log_field - log_field[inside].mean(), dtype=np.float32)
    return field


def corrected(volume: Volume, mask: NDArray[np.bool_]) -> Volume:
    """Take the shading out of an MR image inside the mask; outside it stays as scanned.

    Raises:
        VolumeError: As `bias_field`.
    """
    image = volume.array.astype(np.float32)
    return Volume(np.where(mask, image / bias_field(volume, mask), image).astype(np.float32), volume.geometry)


def without_shading(volume: Volume, mask: NDArray[np.bool_], modality: str, correction: BiasCorrection) -> Volume:
    """Correct an image as a plan says, unless it is of a modality that no coil has shaded.

    Raises:
        VolumeError: As `bias_field`.
    """
    return corrected(volume, mask) if correction == "n4" and modality not in UNSHADED else volume


def _itk(array: NDArray[Any], spacing_mm: tuple[float, float, float]) -> Any:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose()))
    image.SetSpacing(spacing_mm)
    return image
