from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from chiasm.errors import CohortError
from chiasm.simulation.anatomy import (
    AIR,
    BONE_CORT,
    GM,
    SKIN_FAT,
    TISSUES,
    WM,
    brain_mask,
    embedded_head,
    find_heads,
    given_head,
    head_mask,
    stripped_mask,
)
from chiasm.simulation.deformation import (
    control_grid,
    deform,
    exponential,
    grid_points,
    pull,
    random_affine,
    random_velocity,
    rotation,
    smooth_noise,
)


def test_smooth_noise_has_mean_0_and_variance_1_in_every_voxel_at_the_border_too() -> None:
    rng = np.random.default_rng(0)
    fields = np.stack([smooth_noise(rng, (9, 8, 7), 2.5) for _ in range(3000)])
    assert np.abs(fields.mean(axis=0)).max() < 0.1
    assert np.abs(fields.std(axis=0) - 1).max() < 0.1


def test_smooth_noise_correlates_as_a_gaussian_of_its_width() -> None:
    rng = np.random.default_rng(1)
    fields = np.stack([smooth_noise(rng, (40, 1, 1), 4.0).ravel() for _ in range(4000)])
    # White noise spread by a Gaussian of width s correlates as a Gaussian of width s * sqrt(2).
    measured = [np.corrcoef(fields[:, 16], fields[:, 16 + lag])[0, 1] for lag in (2, 4, 8)]
    assert measured == pytest.approx([np.exp(-(lag**2) / 64) for lag in (2, 4, 8)], abs=0.05)


def test_a_part_of_smooth_noise_is_that_of_the_whole() -> None:
    part, nothing = (slice(3, 6), slice(0, 4), slice(2, 7)), (slice(0),) * 3
    whole, cut, empty = (smooth_noise(np.random.default_rng(0), (9, 8, 7), 2.5, box) for box in (None, part, nothing))
    np.testing.assert_allclose(cut, whole[part], atol=1e-6)
    assert empty.size == 0


def test_pull_agrees_with_scipy_inside_and_beyond_the_border() -> None:
    rng = np.random.default_rng(2)
    stack = rng.random((7, 6, 5, 3)).astype(np.float32)
    points = rng.uniform(-2, 8, (500, 3)).astype(np.float32)
    ours = pull(stack, points)
    for channel in range(3):
        reference = ndimage.map_coordinates(stack[..., channel], points.T, order=1, mode="nearest")
        np.testing.assert_allclose(ours[:, channel], reference, atol=1e-5)


def test_the_exponential_of_a_constant_field_is_a_shift_and_of_a_linear_one_the_matrix_exponential() -> None:
    constant = np.broadcast_to(np.float32([0.5, -0.25, 0]), (12, 12, 12, 3)).copy()
    np.testing.assert_allclose(exponential(constant, 2.0), constant, atol=1e-5)
    nodes = grid_points((21, 21, 21)).reshape(21, 21, 21, 3) - 10
    scaled = exponential(-0.2 * nodes, 1.0)
    np.testing.assert_allclose(scaled[4:-4, 4:-4, 4:-4], ((np.exp(-0.2) - 1) * nodes)[4:-4, 4:-4, 4:-4], atol=0.02)


def test_a_deformation_never_folds_even_where_the_field_is_far_too_strong() -> None:
    rng = np.random.default_rng(3)
    for peak_mm in (7, 60):
        velocity = random_velocity(rng, (40, 40, 40), 2.0, 12, peak_mm)
        assert np.linalg.norm(velocity, axis=-1).max() == pytest.approx(peak_mm / 2, rel=1e-4)
        made = deform((40, 40, 40), 2.0, velocity, matrix=random_affine(rng))
        assert made.least_jacobian() > 0.2


def test_a_deformation_without_a_field_is_its_affine_about_the_centre() -> None:
    coarse, _ = control_grid((11, 11, 11), 2.0)
    turned = deform((11, 11, 11), 2.0, np.zeros((*coarse, 3), np.float32), matrix=rotation((0, 0, 90)))
    np.testing.assert_allclose(turned(np.float32([[5, 5, 5], [7, 5, 5]])), [[5, 5, 5], [5, 7, 5]], atol=1e-5)
    assert turned.least_jacobian() == pytest.approx(1, abs=1e-6)


def test_embedded_heads_sum_to_one_differ_and_are_layered_like_heads() -> None:
    heads = [embedded_head(np.random.default_rng(seed), 4.0) for seed in (0, 0, 1)]
    for head in heads:
        assert np.abs(head.fractions.sum(axis=-1) - 1).max() < 1e-5
        assert head.fractions.min() > -1e-6
    np.testing.assert_array_equal(heads[0].fractions, heads[1].fractions)
    brains = [brain_mask(head.fractions, 4.0) for head in heads]
    inside = brains[0] & brains[2]
    assert np.abs(heads[0].fractions - heads[2].fractions)[inside].mean() > 0.01
    assert 1.0e6 < brains[0].sum() * 64 < 2.2e6  # a brain has 1 to 2 litres
    distance = ndimage.distance_transform_edt(~brains[0])
    shells = [distance[heads[0].fractions[..., tissue] > 0.4].mean() for tissue in (BONE_CORT, SKIN_FAT, AIR)]
    assert shells == sorted(shells)
    assert (head_mask(heads[0].fractions) & brains[0]).sum() > 0.99 * brains[0].sum()


@pytest.mark.parametrize(("seed", "spacing_mm"), [(0, 2.0), (3, 4.0), (24, 4.0)])  # the last two had islands once
def test_a_stripped_mask_is_wrong_at_the_border_alone(seed: int, spacing_mm: float) -> None:
    ball = np.linalg.norm(np.indices((50, 50, 50)) - 25, axis=0) < 36 / spacing_mm
    spoiled = stripped_mask(ball, np.random.default_rng(seed), spacing_mm)
    wrong = spoiled != ball
    assert 0 < wrong.sum() < 0.4 * ball.sum()
    assert not wrong[ndimage.binary_erosion(ball, iterations=round(8 / spacing_mm))].any()
    assert (ndimage.distance_transform_edt(~ball)[spoiled] * spacing_mm).max() < 12


def label_map(folder: Path, name: str, spacing_mm: float, values: tuple[int, ...] = (0, 3, 2)) -> None:
    labels = np.full((24, 24, 24), values[0], np.uint8)
    labels[4:20, 4:20, 4:20] = values[2]
    labels[7:17, 7:17, 7:17] = values[1]
    image = nib.Nifti1Image(labels, np.diag([spacing_mm] * 3 + [1.0]))
    nib.save(image, folder / f"{name}_tissue_{spacing_mm:g}mm.nii.gz")


def named(folder: Path, extra: dict[str, str] | None = None) -> None:
    table = {str(value): name for value, name in enumerate(TISSUES)} | {"12": "lesion_wm"} | (extra or {})
    (folder / "tissue_labels.json").write_text(json.dumps(table))


def test_given_heads_are_found_by_name_at_the_spacing_wanted(tmp_path: Path) -> None:
    named(tmp_path)
    for name in ("b02", "a01"):
        for mm in (1, 2):
            label_map(tmp_path, name, mm)
    assert {name: path.name for name, path in find_heads(tmp_path, 2.0).items()} == {
        "a01": "a01_tissue_2mm.nii.gz",
        "b02": "b02_tissue_2mm.nii.gz",
    }
    assert find_heads(tmp_path, 1.5)["a01"].name == "a01_tissue_1mm.nii.gz"


def test_a_given_head_keeps_its_volumes_when_resampled(tmp_path: Path) -> None:
    named(tmp_path)
    label_map(tmp_path, "a", 1.0, (0, 12, 2))  # 12 counts as white matter
    path = tmp_path / "a_tissue_1mm.nii.gz"
    for spacing_mm in (1.0, 2.0):
        head = given_head("a", path, spacing_mm)
        assert np.abs(head.fractions.sum(axis=-1) - 1).max() < 1e-5
        assert head.fractions[..., WM].sum() * spacing_mm**3 == pytest.approx(1000, rel=0.05)
        assert head.fractions[..., GM].sum() * spacing_mm**3 == pytest.approx(3096, rel=0.08)


def test_folders_without_heads_and_labels_without_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CohortError) as caught:
        find_heads(tmp_path, 2.0)
    assert caught.value.reason == "no-heads"
    named(tmp_path)
    label_map(tmp_path, "a", 2.0, (0, 99, 2))
    with pytest.raises(CohortError) as caught:
        given_head("a", tmp_path / "a_tissue_2mm.nii.gz", 2.0)
    assert (caught.value.reason, caught.value.found) == ("labels", [99])
    named(tmp_path, {"5": "feathers"})
    with pytest.raises(CohortError, match="feathers"):
        given_head("a", tmp_path / "a_tissue_2mm.nii.gz", 3.0)
