"""Near-duplicates: a scan that was stored again is found, another patient's is not."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, gaussian_filter

from chiasm.cli import main
from chiasm.cohorts import duplicates
from chiasm.cohorts.duplicates import SIDE, find_near_duplicates, thumbnail
from chiasm.volumes import Volume, crop, grid_with_spacing, read_volume, resample
from chiasm.volumes.geometry import Geometry, reordered
from synthetic_cohort import SHAPE, affine, pair, save, write_brats
from test_cohorts_textures import DONE, head

DATA = Path(os.environ.get("CHIASM_DATA", Path(__file__).parents[2] / "shared" / "data"))
SHAPE_MM = (48, 56, 44)


@cache
def template() -> NDArray[np.float32]:
    """Five tissues in a head, the same for everyone."""
    axes = np.meshgrid(*(np.linspace(-1.3, 1.3, n) for n in SHAPE_MM), indexing="ij")
    head = sum(axis**2 for axis in axes) < 1
    folds = gaussian_filter(np.random.default_rng(7).normal(size=SHAPE_MM), 1.5)
    return np.where(head, 1 + np.digitize(folds, np.quantile(folds, (0.2, 0.4, 0.6, 0.8))), 0)


def patient(seed: int) -> Volume:
    """One of many on one atlas: the anatomy of all, with own contrast, shading, lesion and noise."""
    rng = np.random.default_rng(seed)
    tissue = template()
    values = np.array([0, 300, 420, 560, 700, 850]) * np.exp(rng.normal(0, 0.1, 6))
    image = values[tissue]
    place = np.argwhere(tissue)[rng.integers((tissue > 0).sum())]
    away = sum((index - middle) ** 2 for index, middle in zip(np.indices(SHAPE_MM), place))
    image = np.where((away < rng.uniform(3, 8) ** 2) & (tissue > 0), image * rng.uniform(0.6, 1.6), image)
    shading = gaussian_filter(rng.normal(size=SHAPE_MM), 14)
    noisy = image * np.exp(0.1 * shading / shading.std()) + rng.normal(0, 20, SHAPE_MM) * (tissue > 0)
    matrix = np.diag([3.0, 3.0, 3.0, 1.0])
    matrix[:3, 3] = -70, -80, -60
    return Volume(noisy.astype(np.float32), Geometry(SHAPE_MM, matrix))


@pytest.fixture(scope="module")
def patients() -> list[Volume]:
    return [patient(seed) for seed in range(8)]


def without_slice(axis: int, part: slice) -> Callable[[Volume], Volume]:
    return lambda volume: crop(volume, [part if place == axis else slice(None) for place in range(3)])


def with_one_voxel(volume: Volume) -> Volume:
    array = volume.array.copy()
    array[tuple(side // 2 for side in array.shape)] += 500
    return Volume(array, volume.geometry)


def with_noise(volume: Volume) -> Volume:
    noise = np.random.default_rng(0).normal(0, 0.02 * np.percentile(volume.array, 99), volume.array.shape)
    return Volume((volume.array + noise).astype(np.float32), volume.geometry)


STORED_AGAIN: dict[str, Callable[[Volume], Volume]] = {
    "as it was": lambda volume: volume,
    "gain": lambda volume: Volume(volume.array * np.float32(1.001), volume.geometry),
    "other units": lambda volume: Volume(volume.array * np.float32(1.46) - 1024, volume.geometry),
    "one voxel": with_one_voxel,
    "first slice cut": without_slice(2, slice(1, None)),
    "last slice cut": without_slice(2, slice(0, -1)),
    "first row cut": without_slice(0, slice(1, None)),
    "other axes": lambda volume: reordered(volume, (2, 0, 1), (False, False, False)),
    "flipped": lambda volume: reordered(volume, (0, 1, 2), (True, False, True)),
    "noise": with_noise,
}


@pytest.mark.parametrize("how", list(STORED_AGAIN))
def test_a_scan_that_was_stored_again_is_found_and_nothing_else(how: str, patients: list[Volume]) -> None:
    views = {f"p{number}": thumbnail(volume) for number, volume in enumerate(patients)}
    views["copy"] = thumbnail(STORED_AGAIN[how](patients[3]))
    assert [found[:2] for found in find_near_duplicates(views)] == [("copy", "p3")]


def test_patients_on_one_atlas_are_different_patients(patients: list[Volume]) -> None:
    views = {f"p{number}": thumbnail(volume) for number, volume in enumerate(patients)}
    plain = np.array([view.whole.ravel() for view in views.values()])
    assert np.triu(plain @ plain.T, 1).max() > 0.9, "they must be hard to tell apart"
    assert find_near_duplicates(views) == []


def test_five_copies_of_one_scan_among_six_are_found(patients: list[Volume]) -> None:
    ways = ("as it was", "gain", "one voxel", "last slice cut", "flipped")
    views = {"another": thumbnail(patients[0])}
    views |= {f"copy{number}": thumbnail(STORED_AGAIN[how](patients[1])) for number, how in enumerate(ways)}
    found = {likeness[:2] for likeness in find_near_duplicates(views)}
    assert found == {(f"copy{a}", f"copy{b}") for a in range(5) for b in range(a + 1, 5)}


def test_of_two_images_alone_a_copy_is_found_and_another_patient_is_not(patients: list[Volume]) -> None:
    first, second = thumbnail(patients[0]), thumbnail(patients[1])
    assert find_near_duplicates({"a": first, "b": second}) == []
    copy = thumbnail(STORED_AGAIN["other units"](patients[0]))
    assert [likeness[:2] for likeness in find_near_duplicates({"a": first, "b": copy})] == [("a", "b")]


def test_many_images_are_compared_in_the_same_way(patients: list[Volume]) -> None:
    views = {f"p{number:03d}": thumbnail(patient(number)) for number in range(34)}
    views["z"] = thumbnail(STORED_AGAIN["first slice cut"](patients[5]))
    assert [likeness[:2] for likeness in find_near_duplicates(views)] == [("p005", "z")]


def test_images_are_compared_in_blocks_as_they_are_all_at_once(
    patients: list[Volume], monkeypatch: pytest.MonkeyPatch
) -> None:
    views = {f"p{number:03d}": thumbnail(patient(number)) for number in range(34)}
    views |= {
        f"z{place}": thumbnail(STORED_AGAIN[how](patients[place]))
        for place, how in enumerate(STORED_AGAIN)
        if place < len(patients)
    }
    found = []
    for at_once in (1000, 7):
        monkeypatch.setattr(duplicates, "AT_ONCE", at_once)
        found.append(find_near_duplicates(views))
    assert [one[:2] for one in found[0]] == [one[:2] for one in found[1]]
    assert len(found[0]) >= 3
    apart = [one.correlation - other.correlation for one, other in zip(*found, strict=True)]
    assert np.abs(apart).max() < 1e-5


@pytest.mark.parametrize("what", list(DONE))
@pytest.mark.parametrize("others", [1, 5])
def test_a_copy_whose_values_or_edges_were_changed_is_found_among_other_heads(what: str, others: int) -> None:
    views = {f"p{number}": thumbnail(head(number)) for number in range(others + 1)}
    views["copy"] = thumbnail(DONE[what][0](head(0)))
    found = [likeness[:2] for likeness in find_near_duplicates(views)]
    assert found == [("copy", "p0")] or (others == 1 and DONE[what][1] < 0.98 and not found)


def test_sixty_patients_of_one_template_are_sixty() -> None:
    assert find_near_duplicates({f"p{number:02d}": thumbnail(patient(number)) for number in range(60)}) == []


def test_small_patients_of_the_other_tests_differ() -> None:
    geometry = Geometry(SHAPE, affine())
    for side in (0, 1):
        views = {str(seed): thumbnail(Volume(pair(seed)[side], geometry)) for seed in range(8)}
        assert find_near_duplicates(views) == []


def test_a_thumbnail_has_mean_0_and_length_1_and_a_constant_image_has_none() -> None:
    view = thumbnail(patient(0)).whole
    assert view.shape == (SIDE,) * 3
    assert float(view.mean()) == pytest.approx(0, abs=1e-6)
    assert float(np.linalg.norm(view)) == pytest.approx(1, abs=1e-5)
    flat = Volume(np.full((5, 5, 5), 3, np.float32), Geometry((5, 5, 5), np.eye(4)))
    point = Volume(np.pad(np.ones((1, 1, 1), np.float32), 2), Geometry((5, 5, 5), np.eye(4)))
    assert not thumbnail(flat).whole.any()
    assert not thumbnail(point).whole.any()
    assert find_near_duplicates({"a": thumbnail(flat), "b": thumbnail(flat)}) == []


@pytest.mark.parametrize("how", ["as it was", "gain", "one voxel", "flipped"])
def test_planning_refuses_a_target_that_two_patients_share(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort = write_brats(tmp_path / "cohort", 6)
    again = STORED_AGAIN[how](read_volume(cohort / "Toy_0001" / "Toy_0001_t2.nii.gz"))
    image = read_volume(cohort / "Toy_0005" / "Toy_0005_t1.nii.gz")
    if how == "flipped":
        image = STORED_AGAIN[how](image)
    for kind, volume in (("t1", image), ("t2", again)):
        save(cohort / "Toy_0005" / f"Toy_0005_{kind}.nii.gz", volume.array, volume.geometry.affine)
    arguments = ["plan", str(cohort), "-o", str(tmp_path / "run"), "--source", "t1", "--target", "t2"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "t2 of Toy_0001 and of Toy_0005" in said
    assert "t1 of" not in said
    (cohort / "cohort.json").write_text('{"cases": {"Toy_0005": {"subject": "Toy_0001"}}}')
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--folds", "3"])
    assert ended.value.code == 0


@pytest.mark.realdata
@pytest.mark.parametrize("modality", ["t1", "t2"])
def test_real_gliomas_differ_and_one_on_a_coarser_grid_is_found(modality: str) -> None:
    files = sorted((DATA / "tumour_tcga").rglob(f"*_{modality}.nii.gz"))
    volumes = {path.name: read_volume(path) for path in files}
    views = {name: thumbnail(volume) for name, volume in volumes.items()}
    assert len(views) == 6
    assert find_near_duplicates(views) == []
    first = next(iter(volumes))
    coarse = resample(volumes[first], grid_with_spacing(volumes[first].geometry, (2, 2, 2)), order=1)
    brain = volumes[first].array != 0
    values = volumes[first].array.astype(np.float32)
    ways = np.linspace(-1, 1, len(brain))[:, None, None]
    changed = {
        "standardised": np.where(brain, (values - values[brain].mean()) / values[brain].std(), 0),
        "bias field removed": values * np.exp(0.2 * ways),
        "gamma": values.max() * (values / values.max()) ** 1.6,
        "stripped": np.where(binary_erosion(brain, iterations=3), values, 0),
    }
    copies = {name: Volume(array.astype(np.float32), volumes[first].geometry) for name, array in changed.items()}
    copies["cropped"] = crop(volumes[first], [slice(None), slice(None), slice(None, -15)])
    for copy in (coarse, *copies.values()):
        found = find_near_duplicates({**views, "a copy": thumbnail(copy)})
        assert [set(likeness[:2]) for likeness in found] == [{"a copy", first}]
