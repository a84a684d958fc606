from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu

from chiasm.boxes import box_of
from chiasm.errors import VolumeError
from chiasm.volumes import Geometry, Volume, canonical, read_volume
from chiasm.volumes.masks import constant_background, find_mask, otsu_threshold, suggest_rule, with_holes_filled
from conftest import REAL
from synthetic_cohort import body

SHAPE = (40, 44, 36)


def ball(shape: tuple[int, int, int] = SHAPE, radius: float = 0.5) -> NDArray[np.bool_]:
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    return np.asarray(sum(axis**2 for axis in axes) < radius**2)


def volume(array: NDArray[np.generic], spacing: float = 2.0) -> Volume:
    i, j, k = array.shape
    return Volume(array.astype(np.float32), Geometry((i, j, k), np.diag([spacing, spacing, spacing, 1.0])))


def whole_head(seed: int = 0, inside: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """A bright body in noisy air."""
    rng = np.random.default_rng(seed)
    inside = ball(radius=0.7) if inside is None else inside
    return np.where(inside, 100 + 10 * rng.normal(size=SHAPE), np.abs(4 * rng.normal(size=SHAPE)))


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.parametrize("seed", range(4))
def test_the_threshold_is_that_of_scikit_image(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.gamma(2, 3, 5000), rng.normal(60, 9, 2000)]).astype(np.float32)
    assert otsu_threshold(values) == pytest.approx(threshold_otsu(values), rel=1e-6)


def test_the_threshold_of_one_single_value_is_that_value() -> None:
    assert otsu_threshold(np.full(9, 7.0)) == threshold_otsu(np.full(9, 7.0)) == 7


def test_only_what_most_face_voxels_share_is_a_background() -> None:
    array = np.full((6, 6, 6), 9.0)
    array[1:-1, 1:-1, 1:-1] = 3
    assert constant_background(array) == 9
    array[:2] = np.arange(72).reshape(2, 6, 6) / 7  # a third of the faces
    assert constant_background(array) == 9
    assert constant_background(np.random.default_rng(0).normal(size=(6, 6, 6))) is None


@pytest.mark.parametrize("background", [0.0, -1024.0, 300.0])
def test_a_cut_out_brain_is_found_exactly_whatever_its_background(background: float) -> None:
    brain = ball()
    texture = 100 + 30 * np.random.default_rng(1).normal(size=SHAPE)
    array = np.where(brain, texture, background)
    array[20, 22, 18] = background  # a hole inside
    array[0, 0, 0] = 5.0  # a stray voxel
    found, rule = find_mask(volume(array), "nonzero")
    assert rule == "nonzero"
    np.testing.assert_array_equal(found, brain)


def test_a_cut_out_brain_is_recognised_and_so_found() -> None:
    array = np.where(ball(), 100 + 10 * np.random.default_rng(1).normal(size=SHAPE), 0)
    assert suggest_rule(volume(array)) == "nonzero"
    np.testing.assert_array_equal(find_mask(volume(array), "given")[0], ball())


def test_a_body_in_noisy_air_is_found_without_its_air() -> None:
    found, rule = find_mask(volume(whole_head()), "given")
    assert rule == "body"
    assert dice(found, ball(radius=0.7)) > 0.95


def test_closed_cavities_of_a_body_belong_to_it() -> None:
    inside = ball(radius=0.7)
    inside[16:24, 18:26, 14:22] = False  # lungs, a sinus
    found, _ = find_mask(volume(whole_head(inside=inside)), "body")
    assert found[16:24, 18:26, 14:22].all()


def test_a_cavity_open_in_one_plane_is_filled_in_another() -> None:
    inside = ball(radius=0.8)
    inside[18:22, 22:, 16:20] = False  # open to the front: a nose
    found, _ = find_mask(volume(whole_head(inside=inside)), "body")
    assert found[18:22, 22:30, 16:20].mean() > 0.9


def test_only_the_largest_body_counts() -> None:
    inside = ball(radius=0.5)
    inside[:5, :5, :5] = True  # a bottle beside the head
    found, _ = find_mask(volume(whole_head(inside=inside)), "body")
    assert not found[:5, :5, :5].any()
    assert dice(found, ball(radius=0.5)) > 0.9


def test_a_padded_scan_is_not_mistaken_for_a_cut_out_brain() -> None:
    array = np.zeros((80, 80, 60))
    array[20:60, 18:62, 12:48] = whole_head()
    assert constant_background(array) == 0
    expected = np.zeros(array.shape, bool)
    expected[20:60, 18:62, 12:48] = ball(radius=0.7)
    for asked in ("given", "nonzero"):
        found, rule = find_mask(volume(array), asked)  # type: ignore[arg-type]
        assert rule == "body"
        assert dice(found, expected) > 0.95


def test_a_volume_without_constant_background_gets_a_body_even_where_nonzero_was_asked_for() -> None:
    found, rule = find_mask(volume(whole_head()), "nonzero")
    assert rule == "body"
    np.testing.assert_array_equal(found, find_mask(volume(whole_head()), "body")[0])


def test_one_glaring_voxel_does_not_hide_the_body() -> None:
    array = whole_head()
    plain, _ = find_mask(volume(array), "body")
    array[20, 22, 18] = 1e7
    assert dice(find_mask(volume(array), "body")[0], plain) > 0.99


def test_an_offset_or_a_gain_moves_no_voxel_of_the_mask() -> None:
    array = whole_head().round()
    plain, _ = find_mask(volume(array), "body")
    assert dice(find_mask(volume(array * 16 - 1024), "body")[0], plain) > 0.999


@pytest.mark.parametrize("rule", ["body", "nonzero", "given"])
def test_a_volume_without_any_body_is_refused(rule: str) -> None:
    with pytest.raises(VolumeError, match="no brain or body") as refusal:
        find_mask(volume(np.full(SHAPE, 5.0)), rule)  # type: ignore[arg-type]
    assert refusal.value.reason == "empty-mask"


def test_the_box_is_the_smallest_around_a_mask() -> None:
    mask = np.zeros((5, 6, 7), bool)
    mask[1, 2, 3] = mask[3, 2, 6] = True
    assert box_of(mask) == (slice(1, 4), slice(2, 3), slice(3, 7))
    with pytest.raises(ValueError, match="empty mask"):
        box_of(np.zeros((3, 3, 3), bool))


def test_the_array_is_left_as_it_was() -> None:
    for array in (whole_head(), np.where(body(SHAPE), 50.0 + np.arange(SHAPE[2]), 0.0)):
        one = volume(array)
        before = one.array.copy()
        find_mask(one, "given")
        np.testing.assert_array_equal(one.array, before)


def standardised(array: NDArray[np.floating], inside: NDArray[np.bool_] | None = None) -> NDArray[np.floating]:
    values = array if inside is None else array[inside]
    return np.asarray((array - values.mean()) / values.std())


def brain_and_texture(seed: int = 3) -> tuple[NDArray[np.bool_], NDArray[np.floating]]:
    """A cut-out shape, and tissue that varies over a few voxels as tissue does."""
    texture = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 2)
    return ball(radius=0.7), 100 + 30 * standardised(texture)


@pytest.mark.parametrize("name", ["z-scored", "-1 to 1", "inverted", "z-scored on -5", "bright background"])
def test_a_normalised_brain_is_cut_out_whatever_lies_on_either_side_of_its_background(name: str) -> None:
    brain, tissue = brain_and_texture()
    inside, background = {
        "z-scored": (standardised(tissue, brain), 0.0),
        "-1 to 1": (2 * tissue / tissue.max() - 1, 0.0),
        "inverted": (tissue.max() + 1 - tissue, 0.0),
        "z-scored on -5": (standardised(tissue, brain), -5.0),
        "bright background": (tissue, 4000.0),
    }[name]
    found, rule = find_mask(volume(np.where(brain, inside, background)), "given")
    assert rule == "nonzero"
    np.testing.assert_array_equal(found, brain)


def padded(array: NDArray[np.generic], value: float, around: tuple[int, int] = (12, 12)) -> NDArray[np.generic]:
    return np.pad(array, around, constant_values=value)


HEADS = {
    "negative noise": lambda head: head - np.where(head < 40, 2 * head, 0),
    "noise of both signs": lambda head: np.where(head < 40, np.random.default_rng(5).normal(0, 4, SHAPE), head),
    "z-scored": standardised,
    "z-scored by its brain": lambda head: standardised(head, ball(radius=0.5)),
    "inverted": lambda head: 200 - head,
}


@pytest.mark.parametrize("background", [None, 0.0])
@pytest.mark.parametrize("name", HEADS)
def test_a_whole_head_is_found_in_its_air_whatever_pads_it(name: str, background: float | None) -> None:
    array, expected = HEADS[name](whole_head()), ball(radius=0.7)
    if background is not None:
        array, expected = padded(array, background), padded(expected, False).astype(bool)
    found, rule = find_mask(volume(array), "given")
    assert rule == "body"
    assert dice(found, expected) > 0.95


@pytest.mark.parametrize("offset", [0.0, 5.0, -3000.0])
def test_a_head_that_was_cut_out_keeps_its_dark_uniform_skin_and_its_scan_does_not_keep_its_air(offset: float) -> None:
    rng = np.random.default_rng(4)
    inside, brain = ball(radius=0.8), ball(radius=0.6)
    signal = np.where(brain, 90 + 30 * rng.normal(size=SHAPE), np.where(inside, 10.0, 0.0))
    scan = np.hypot(signal + rng.normal(0, 3, SHAPE), rng.normal(0, 3, SHAPE))
    mask, rule = find_mask(volume(np.where(inside, scan + offset, offset)), "given")
    assert rule == "nonzero" and (mask == inside).all()
    scan[:3], scan[-3:], scan[:, :3], scan[:, -3:] = 0, 0, 0, 0
    assert suggest_rule(volume(scan)) == "body"


def test_a_head_that_is_padded_at_two_faces_is_found_as_if_it_were_not() -> None:
    sides = ((0, 0), (0, 0), (6, 4))
    array = np.pad(standardised(whole_head()), sides)
    assert constant_background(array) is None
    found, rule = find_mask(volume(array), "given")
    assert rule == "body"
    assert dice(found, np.pad(ball(radius=0.7), sides)) > 0.95


def scanned_ct(padding: float, noise: float = 20.0) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    """A body in air inside the circle that a CT reconstructs."""
    body_part = ball(radius=0.6)
    air = np.random.default_rng(2).normal(-1000, noise, SHAPE)
    i, j, _ = np.indices(SHAPE)
    circle = (i - 19.5) ** 2 + (j - 21.5) ** 2 < 19.5**2
    return np.where(circle, np.where(body_part, 40 + (air + 1000) / 2, air), padding), body_part


@pytest.mark.parametrize("window", [None, (-1024.0, 3071.0)])
@pytest.mark.parametrize("padding", [-3024.0, -2000.0, -1024.0, -1000.0, 0.0])
def test_the_air_inside_a_scanners_circle_is_no_body(padding: float, window: tuple[float, float] | None) -> None:
    array, expected = scanned_ct(padding)
    assert suggest_rule(volume(array), window) == "body"
    assert dice(find_mask(volume(array), "given", window_hu=window)[0], expected) > 0.95


@pytest.mark.parametrize("background", [-3024.0, -1000.0, 0.0])
def test_ct_that_was_cut_out_is_kept_as_it_was_cut(background: float) -> None:
    body_part, tissue = brain_and_texture()
    hu = np.where(ball(radius=0.72) & ~ball(radius=0.62), 900.0, (tissue - 100) / 3 + 30)
    found, rule = find_mask(volume(np.where(body_part, hu, background)), "given", window_hu=(-1024.0, 3071.0))
    assert rule == "nonzero"
    np.testing.assert_array_equal(found, body_part)


def test_a_table_is_no_part_of_a_body_in_ct() -> None:
    body_part = np.pad(ball(radius=0.9), ((6, 6), (14, 0), (0, 0)))
    lowest = int(np.flatnonzero(body_part.any((0, 2)))[0])
    table = np.zeros_like(body_part)
    table[2:-2, [lowest - 8, lowest - 7, lowest - 1, lowest]] = True  # a hollow slab that the body lies on
    air = np.random.default_rng(2).normal(-1000, 20, body_part.shape)
    ct = volume(np.where(body_part, 40.0, np.where(table, 0.0, air)))
    without, with_it = (find_mask(ct, "body", window_hu=window)[0] for window in ((-1024.0, 3071.0), None))
    beside = table & ~ndimage.binary_dilation(body_part, iterations=3)
    assert without[beside].mean() < 0.02 < 0.3 < with_it[beside].mean()
    assert dice(without, body_part) > 0.96


def test_a_body_that_is_asked_for_is_not_lost_in_a_normalised_brain() -> None:
    brain, tissue = brain_and_texture()
    found, rule = find_mask(volume(np.where(brain, 3 + standardised(tissue, brain), 0)), "body", strictly=True)
    assert rule == "body" and dice(found, brain) > 0.95


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.parametrize("kind", ["t1", "flair"])
def test_real_brains_that_were_z_scored_keep_every_voxel(kind: str) -> None:
    for path in sorted(REAL.glob(f"tumour_tcga/*/*_{kind}.nii*")):
        raw = canonical(read_volume(path))
        inside = raw.array != 0
        scored = np.where(inside, standardised(raw.array, inside), 0).astype(np.float32)
        found, rule = find_mask(Volume(scored, raw.geometry), "given")
        assert rule == "nonzero"
        np.testing.assert_array_equal(found, find_mask(raw, "given")[0])


@pytest.mark.realdata
def test_a_real_brain_that_others_stripped_is_found_again_after_noise_fills_its_air() -> None:
    stripped = canonical(read_volume(next(REAL.glob("tumour_tcga/*425_1/*_t1.nii*"))))
    brain, rule = find_mask(stripped, "given")
    assert rule == "nonzero"
    assert 0.8e6 < brain.sum() * np.prod(stripped.geometry.spacing_mm) < 2.2e6  # mm3: an adult's
    assert (brain >= (stripped.array != 0)).mean() > 0.999
    noise = np.abs(np.random.default_rng(0).normal(size=brain.shape)) * 0.03 * np.percentile(stripped.array, 99)
    noisy = Volume(np.where(brain, stripped.array, noise).astype(np.float32), stripped.geometry)
    found, rule = find_mask(noisy, "given")
    assert rule == "body"
    assert dice(found, brain) > 0.95


@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 1), (0, 2), (1, 2)])
def test_holes_are_those_that_scipy_fills_in_space_and_plane_by_plane(axes: tuple[int, ...]) -> None:
    solid = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((30, 31, 20)), 1.2) > 0
    found = with_holes_filled(solid, axes)
    if len(axes) == 3:
        wanted = ndimage.binary_fill_holes(solid)
    else:
        (across,) = {0, 1, 2} - set(axes)
        planes = [ndimage.binary_fill_holes(plane) for plane in np.moveaxis(solid, across, 0)]
        wanted = np.moveaxis(np.stack(planes), 0, across)
    assert np.array_equal(found, wanted) and found.sum() > solid.sum()
    assert with_holes_filled(np.ones((3, 4, 5), bool), axes).all()
    assert not with_holes_filled(np.zeros((3, 4, 5), bool), axes).any()


def test_more_parts_than_16_bits_can_number_are_told_apart() -> None:
    board = np.indices((56, 56, 56)).sum(0) % 2 == 0  # 87,808 parts of one voxel
    board[20:30, 20:30, 20:30] = True
    board = np.pad(board, 1)
    found = with_holes_filled(board, (0, 1, 2))
    np.testing.assert_array_equal(found, ndimage.binary_fill_holes(board))
    source = volume(np.where(board, 100, 0).astype(np.int16))
    mask, _ = find_mask(source, "nonzero", strictly=True)
    parts, count = ndimage.label(board)
    largest = parts == np.bincount(parts.ravel())[1:].argmax() + 1
    assert count > np.iinfo(np.uint16).max and largest.sum() >= 1000
    np.testing.assert_array_equal(mask, ndimage.binary_fill_holes(largest))
