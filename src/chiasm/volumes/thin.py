from __future__ import annotations

from pathlib import Path

import numpy as np

from chiasm.errors import VolumeError
from chiasm.storage import whole_file
from chiasm.volumes.geometry import Geometry, Volume


def read_volume(path, labels=False):
    import nibabel as nib

    path = Path(path)
    if not path.exists():
        raise VolumeError("does not exist", path=path, reason="not-found")
    image = nib.load(path)
    array = np.asanyarray(image.dataobj)
    array = array.astype(np.int16) if labels else array.astype(np.float32)
    return Volume(array, Geometry(array.shape, image.affine, image.header.binaryblock, "nifti"))


def write_volume(path, array, geometry, labels=False):
    import nibabel as nib

    header = None
    if geometry.header is not None:
        header = nib.Nifti1Header(geometry.header)
        header.set_data_dtype(array.dtype)
        header.set_slope_inter(1, 0)
    with whole_file(Path(path)) as temporary:
        target = temporary.with_name(temporary.name + ".nii.gz")
        nib.save(nib.Nifti1Image(array, geometry.affine, header), target)
        target.rename(temporary)


def check_pair(a, b, *, a_name="source", b_name="target", labels=False):
    if not np.allclose(a.geometry.affine, b.geometry.affine, atol=1e-3):
        c = canonical(b)
        if np.allclose(a.geometry.affine, c.geometry.affine, atol=1e-3):
            b = c
    if a.geometry.shape != b.geometry.shape or not np.allclose(a.geometry.affine, b.geometry.affine, atol=1e-3):
        raise VolumeError(f"{b_name} differs from {a_name}", reason="grid")
    return b


def canonical(v):
    import nibabel as nib

    o = nib.io_orientation(v.geometry.affine)
    a = nib.apply_orientation(v.array, o)
    return Volume(a, Geometry(a.shape, v.geometry.affine @ nib.orientations.inv_ornt_aff(o, v.array.shape), None))


def crop(v, s):
    A = v.geometry.affine.copy()
    A[:3, 3] += A[:3, :3] @ [x.start or 0 for x in s]
    a = v.array[tuple(s)]
    return Volume(a, Geometry(a.shape, A))


def grid_with_spacing(g, spacing):
    old = np.array(g.spacing_mm)
    n = np.maximum(1, np.round(np.array(g.shape) * old / spacing)).astype(int)
    A = g.affine.copy()
    A[:3, :3] = A[:3, :3] / old * spacing
    A[:3, 3] += g.affine[:3, :3] @ (np.array(spacing) / old - 1) / 2
    return Geometry(tuple(n.tolist()), A)


def same_grid(a, b, tolerance_voxels=0.01):
    return a.shape == b.shape and np.allclose(a.affine, b.affine, atol=1e-3)


def resample(v, g, order=1, fill=0.0):
    from scipy.ndimage import affine_transform

    if same_grid(v.geometry, g):
        return Volume(v.array, g)
    M = np.linalg.inv(v.geometry.affine) @ g.affine
    out = affine_transform(
        v.array,
        M[:3, :3],
        M[:3, 3],
        output_shape=g.shape,
        order=order,
        mode="grid-constant" if False else "constant",
        cval=fill,
    )
    return Volume(out, g)
