from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from chiasm.checksums import sha256_of
from chiasm.cohorts.cases import Case
from chiasm.errors import ChiasmError, VolumeError
from chiasm.preparation import arrays as preparation
from chiasm.preparation.arrays import MARGIN, PreparedCase, prepare_case, prepare_cohort, prepare_source
from chiasm.preparation.degradation import Axis, Degradation, degrade, interpolated, simulated, thick_mask
from chiasm.preparation.plan import Plan
from chiasm.volumes import Geometry, Reading, Volume, read_volume
from conftest import REAL
from synthetic_cohort import PLAN, SHAPE, SPACING, affine, body, plan_of, save, write_case, write_cohort


def changed(**fields: object) -> Plan:
    return plan_of(**fields)


def sources_of(case: Case) -> list[Volume]:
    return [read_volume(case.images["t1"])]


def rewrite(path: Path, array: NDArray[np.generic], matrix: NDArray[np.float64]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, matrix), path)  # sform alone: an oblique qform is rounded
    return path


def stored_as(case: Case, folder: Path, how: Callable[[nib.Nifti1Image], nib.Nifti1Image]) -> Case:
    """The same case with every file stored in another way."""

    def again(path: Path) -> Path:
        image = how(nib.load(path))
        return rewrite(folder / case.id / path.name, np.asarray(image.dataobj), image.affine)

    assert case.labels is not None
    images = {name: again(path) for name, path in case.images.items()}
    mask = None if case.mask is None else again(case.mask)
    return dataclasses.replace(case, images=images, mask=mask, labels=again(case.labels))


def same_arrays(a: PreparedCase, b: PreparedCase) -> None:
    for name in ("source", "target", "mask", "labels"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


PLANS = {
    "as scanned": PLAN,
    "resampled": changed(spacing_mm=(1.5, 1.5, 2.0)),
    "3d": changed(dims=3, slices=1, patch=(32, 32, 32)),
    "ranked": changed(source_kinds=("rank",), target_kind="rank"),
    "with ranks": changed(histogram=True),
    "with ranks, resampled": changed(histogram=True, spacing_mm=(1.5, 1.5, 2.0)),
    "with ranks, 3d": changed(histogram=True, dims=3, slices=1, patch=(32, 32, 32)),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("masked", [False, True])
def test_training_and_prediction_see_the_same_source_to_the_bit(tmp_path: Path, name: str, masked: bool) -> None:
    plan = PLANS[name]
    case = write_case(tmp_path, 1, gain=3.0, masked=masked)
    kept = prepare_case(case, plan, tmp_path / "cache")
    mask = None if case.mask is None else read_volume(case.mask, labels=True)
    shown = prepare_source(sources_of(case), plan, mask)
    np.testing.assert_array_equal(kept.source, shown.array)
    np.testing.assert_array_equal(kept.mask, shown.mask)
    np.testing.assert_array_equal(kept.grid.affine, shown.grid.affine)
    assert kept.grid.shape == shown.grid.shape == shown.mask.shape
    assert shown.array.dtype == kept.source.dtype == kept.target.dtype == np.float32


@pytest.mark.parametrize("name", PLANS)
def test_arrays_are_zero_outside_the_mask_and_scaled_inside(tmp_path: Path, name: str) -> None:
    case = prepare_case(write_case(tmp_path, 1, gain=20.0), PLANS[name], tmp_path / "cache")
    assert not case.source[:, ~case.mask].any()
    assert not case.target[~case.mask].any()
    for values in (case.source[0][case.mask], case.target[case.mask]):
        assert abs(np.median(values)) < 0.1
        assert np.ptp(np.percentile(values, (25, 75))) == pytest.approx(1.349, rel=0.2)


def test_the_box_is_that_of_the_mask_with_a_margin(tmp_path: Path) -> None:
    inside = body()
    shown = prepare_source(sources_of(write_case(tmp_path, 1)), PLAN)
    edges = [np.flatnonzero(inside.any(axis=(*{0, 1, 2} - {axis},))) for axis in range(3)]
    starts = [max(0, int(edge[0]) - MARGIN) for edge in edges]
    stops = [min(n, int(edge[-1]) + 1 + MARGIN) for edge, n in zip(edges, SHAPE)]
    cut = tuple(map(slice, starts, stops))
    np.testing.assert_array_equal(shown.mask, inside[cut])
    np.testing.assert_allclose(shown.grid.affine[:3, 3], (affine() @ [*starts, 1])[:3])
    assert shown.grid_mm == pytest.approx(SPACING)
    assert shown.body_mm == pytest.approx([(edge[-1] + 1 - edge[0]) * step for edge, step in zip(edges, SPACING)])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("spacing", [(2.0, 2.0, 3.0), (0.7, 0.8, 1.3), (1.0, 1.0, 3.02)])
def test_resampling_keeps_every_voxel_where_it_is_in_the_world(axis: int, spacing: tuple[float, float, float]) -> None:
    """The image holds its own world coordinate, which linear interpolation keeps exactly."""
    turn = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1.0]])
    matrix = affine()
    matrix[:3, :3] = turn @ matrix[:3, :3]
    voxels = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    world = voxels @ matrix[:3, :3].T + matrix[:3, 3]
    inside = body()
    image = Volume(world[..., axis].astype(np.float32), Geometry(SHAPE, matrix))
    mask = Volume(inside.astype(np.uint8), image.geometry)
    shown = prepare_source([image], changed(spacing_mm=spacing), mask)
    if spacing[2] != 3.02:  # less than a percent off stays as it was
        assert shown.grid.spacing_mm == pytest.approx(spacing)
    places = np.argwhere(shown.mask)
    there = places @ shown.grid.affine[:3, :3].T + shown.grid.affine[:3, 3]
    back = shown.maps[0].invert(shown.array[0][shown.mask])
    np.testing.assert_allclose(back, there[:, axis], atol=1e-3)
    home = np.rint((there - matrix[:3, 3]) @ np.linalg.inv(matrix[:3, :3]).T).astype(int)
    assert inside[tuple(home.T)].mean() > 0.97  # half a voxel may fall to either side
    assert shown.mask.sum() * np.prod(shown.grid.spacing_mm) == pytest.approx(inside.sum() * np.prod(SPACING), rel=0.05)


@pytest.mark.parametrize("axes", [[[2, -1], [0, 1], [1, -1]], [[1, 1], [2, 1], [0, -1]], [[0, -1], [1, 1], [2, 1]]])
@pytest.mark.parametrize("name", ["as scanned", "resampled"])
def test_storage_order_does_not_matter(tmp_path: Path, axes: list[list[int]], name: str) -> None:
    case = write_case(tmp_path, 1)
    other = stored_as(case, tmp_path / "other", lambda image: image.as_reoriented(np.array(axes)))
    plain, turned = (prepare_case(one, PLANS[name], tmp_path / "cache") for one in (case, other))
    same_arrays(plain, turned)
    np.testing.assert_allclose(plain.grid.affine, turned.grid.affine, atol=1e-5)
    np.testing.assert_array_equal(prepare_source(sources_of(other), PLANS[name]).array, plain.source)


def test_an_oblique_scan_is_prepared_along_its_own_axes(tmp_path: Path) -> None:
    angle = np.radians(25)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    case = write_case(tmp_path, 1)
    oblique = stored_as(case, tmp_path / "o", lambda image: nib.Nifti1Image(image.dataobj, turn @ image.affine))
    plain, turned = (prepare_case(one, PLAN, tmp_path / "cache") for one in (case, oblique))
    same_arrays(plain, turned)
    np.testing.assert_allclose(turned.grid.affine, turn @ plain.grid.affine, atol=1e-4)
    plain, turned = (prepare_case(one, changed(spacing_mm=(1.3, 1.3, 2.1)), tmp_path / "c") for one in (case, oblique))
    both = plain.mask & turned.mask
    assert both.sum() > 0.995 * plain.mask.sum()  # a voxel half-way between two may fall to either
    np.testing.assert_allclose(plain.source[:, both], turned.source[:, both], atol=1e-4)
    np.testing.assert_allclose(turned.grid.affine, turn @ plain.grid.affine, atol=1e-4)


def test_labels_are_never_mixed_and_large_ones_survive(tmp_path: Path) -> None:
    case = write_case(tmp_path, 1)
    assert case.labels is not None
    values = np.random.default_rng(0).choice([0, 3, 40_000, 65_536], SHAPE).astype(np.int32)
    save(case.labels, values, affine())
    kept = prepare_case(case, PLANS["resampled"], tmp_path / "cache")
    assert kept.labels is not None
    assert set(np.unique(kept.labels)) == {0, 3, 40_000, 65_536}
    assert prepare_case(dataclasses.replace(case, labels=None), PLAN, tmp_path / "cache").labels is None


def test_every_axial_slice_lies_in_one_piece_on_disk_in_2d(tmp_path: Path) -> None:
    case = write_case(tmp_path, 1)
    flat, deep = (prepare_case(case, PLANS[name], tmp_path / "cache") for name in ("as scanned", "3d"))
    for array in (flat.target, flat.mask, flat.labels, flat.source[0]):
        assert array is not None
        assert array[..., 3].flags.c_contiguous
        base = array
        while not isinstance(base, np.memmap) and base is not None:
            base = base.base  # type: ignore[assignment]
        assert isinstance(base, np.memmap) and not array.flags.writeable
    assert deep.source[0].flags.c_contiguous and deep.target.flags.c_contiguous
    same_arrays(flat, deep)


def test_ct_keeps_its_unit_and_is_clipped_to_the_window(tmp_path: Path) -> None:
    case = write_case(tmp_path, 1, masked=True)
    rng = np.random.default_rng(0)
    soft = rng.normal(size=SHAPE) * 60 + 30
    hounsfield = np.where(rng.random(SHAPE) < 0.9, soft, soft * 40).astype(np.float32)
    hounsfield[0] = -3000
    case = dataclasses.replace(
        case, images={"t1": case.images["t1"], "ct": save(tmp_path / "ct.nii", hounsfield, affine())}
    )
    window = (-500.0, 1500.0)
    plan = changed(target="ct", target_kind="hu", window_hu=window)
    kept = prepare_case(case, plan, tmp_path / "cache")
    assert kept.target.min() == -1 and kept.target.max() == 1
    inside, cut = body(), prepare_source(sources_of(case), plan).mask
    np.testing.assert_array_equal(cut, kept.mask)
    back = kept.target[kept.mask] * 1000 + 500
    np.testing.assert_allclose(np.sort(back), np.sort(np.clip(hounsfield[inside], *window)), atol=1e-3)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    read: list[Path] = []

    def counted(path: Path, labels: bool = False, *, reading: Reading, narrow: bool = False) -> Volume:
        read.append(path)
        return read_volume(path, labels=labels, reading=reading, narrow=narrow)

    monkeypatch.setattr("chiasm.cohorts.images.read_volume", counted)
    return read


def folders(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


def test_a_prepared_case_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = count_reads(monkeypatch)
    case, cache = write_case(tmp_path, 1, masked=True), tmp_path / "cache"
    first = prepare_case(case, PLAN, cache)
    assert len(read) == 4
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    second = prepare_case(case, PLAN, cache)
    assert len(read) == 4
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == times
    same_arrays(first, second)
    assert (second.id, second.subject) == (case.id, case.subject)
    moved = dataclasses.replace(case, subject="other", site="B")
    assert prepare_case(moved, PLAN, cache).site == "B" and len(read) == 4


@pytest.mark.parametrize(
    "plan",
    [
        changed(spacing_mm=(1.0, 1.0, 2.5)),
        changed(source_kinds=("percentile",)),
        changed(target_kind="zscore"),
        changed(mask_rule="body"),
        changed(dims=3, slices=1, patch=(32, 32, 32)),
        changed(window_hu=(-1000.0, 1000.0)),
    ],
)
def test_another_plan_is_prepared_anew(tmp_path: Path, plan: Plan) -> None:
    case, cache = write_case(tmp_path, 1), tmp_path / "cache"
    for one in (PLAN, plan):
        prepare_case(case, one, cache)
    assert len(folders(cache)) == 2


def test_what_does_not_touch_the_arrays_is_not_prepared_anew(tmp_path: Path) -> None:
    case, cache = write_case(tmp_path, 1), tmp_path / "cache"
    for plan in (PLAN, changed(patch=(64, 64), slices=5, target_sd=2.0)):
        prepare_case(case, plan, cache)
    assert len(folders(cache)) == 1


@pytest.mark.parametrize("name", ["t1", "t2", "mask", "seg"])
def test_one_changed_voxel_of_any_file_is_noticed(tmp_path: Path, name: str) -> None:
    case, cache = write_case(tmp_path, 1, masked=True), tmp_path / "cache"
    before = prepare_case(case, PLAN, cache)
    path = tmp_path / case.id / f"{name}.nii"
    array = np.asarray(nib.load(path).dataobj).copy()
    array[18, 20, 6] += 1
    stamp = path.stat()
    save(path, array, affine())
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # a copy may keep its date
    after = prepare_case(case, PLAN, cache)
    assert len(folders(cache)) == 2
    kind = {"t1": "source", "t2": "target", "seg": "labels"}.get(name)
    if kind is not None:
        assert (getattr(before, kind) != getattr(after, kind)).any()


def test_voxels_beside_a_metaimage_header_are_noticed_too(tmp_path: Path) -> None:
    case, cache = write_case(tmp_path, 1), tmp_path / "cache"
    images = {}
    for name, path in case.images.items():
        images[name] = tmp_path / f"{name}.mhd"
        sitk.WriteImage(sitk.ReadImage(path), images[name], useCompression=False)
    case = dataclasses.replace(case, images=images)
    header = images["t2"].read_bytes()
    before = prepare_case(case, PLAN, cache)
    raw = np.fromfile(tmp_path / "t2.raw", np.float32)
    (raw * np.linspace(1, 2, raw.size, dtype=np.float32)).tofile(tmp_path / "t2.raw")
    after = prepare_case(case, PLAN, cache)
    assert images["t2"].read_bytes() == header
    assert (np.asarray(before.target) != after.target).any()


@pytest.mark.parametrize("harm", ["empty folder", "cut", "emptied", "no target", "no labels", "no grid", "half a grid"])
def test_a_half_written_cache_folder_is_made_anew(tmp_path: Path, harm: str) -> None:
    case, cache = write_case(tmp_path, 1), tmp_path / "cache"
    whole = prepare_case(case, PLAN, cache)
    expected = {name: np.array(getattr(whole, name)) for name in ("source", "target", "mask", "labels")}
    (folder,) = folders(cache)
    del whole
    if harm == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
    elif harm in ("cut", "emptied"):
        content = (folder / "source.npy").read_bytes()
        (folder / "source.npy").write_bytes(content[: len(content) // 2 if harm == "cut" else 0])
    elif harm == "half a grid":
        (folder / "grid.json").write_text('{"shape": [1')
    else:
        (folder / {"no target": "target.npy", "no labels": "labels.npy", "no grid": "grid.json"}[harm]).unlink()
    again = prepare_case(case, PLAN, cache)
    for name, array in expected.items():
        np.testing.assert_array_equal(getattr(again, name), array)
    assert folders(cache) == [folder]


def test_arrays_are_hashed_as_they_are_written_and_then_once_for_each_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    content_hash = preparation.content_hash
    monkeypatch.setattr(preparation, "content_hash", lambda path: hashed.append(path.name) or content_hash(path))
    case = write_case(tmp_path, 0)
    prepare_case(case, PLAN, tmp_path / "cache")
    assert sorted(name for name in hashed if name.endswith(".npy")) == [
        "labels.npy",
        "mask.npy",
        "source.npy",
        "target.npy",
    ]


def test_a_failure_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, cache = write_case(tmp_path, 1), tmp_path / "cache"

    def full(path: Path, content: object) -> None:
        raise ChiasmError("the disk is full", path=path, reason="unwritable")

    monkeypatch.setattr(preparation, "write_json", full)
    with pytest.raises(ChiasmError, match="disk is full"):
        prepare_case(case, PLAN, cache)
    assert folders(cache) == []
    with pytest.raises(ChiasmError, match="disk is full"):  # no other case would fare better
        prepare_cohort([case], PLAN, cache)


def test_a_process_that_comes_second_takes_what_the_first_has_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, cache = write_case(tmp_path, 1), tmp_path / "cache"
    prepare_case(case, PLAN, tmp_path / "elsewhere")
    rename = Path.rename

    def overtaken(path: Path, target: Path) -> Path:
        shutil.copytree(tmp_path / "elsewhere", cache, dirs_exist_ok=True)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    kept = prepare_case(case, PLAN, cache)
    assert kept.mask.any()
    assert [folder.name for folder in folders(cache)] == [folder.name for folder in folders(tmp_path / "elsewhere")]


def _prepare_all(cases: list[Case], cache: Path, start: object) -> None:
    start.wait(120)  # type: ignore[attr-defined]
    for case in cases:
        prepare_case(case, PLAN, cache)


def test_processes_that_prepare_the_same_cases_at_once_do_no_harm(tmp_path: Path) -> None:
    cases, cache = list(write_cohort(tmp_path, 4).cases), tmp_path / "cache"
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    workers = [context.Process(target=_prepare_all, args=(cases, cache, start)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(folders(cache)) == 4
    for case in cases:
        same_arrays(prepare_case(case, PLAN, cache), prepare_case(case, PLAN, tmp_path / "alone"))


def test_a_bad_case_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    cases = list(write_cohort(tmp_path, 3).cases)
    cases[1].images["t2"].unlink()
    steps: list[tuple[int, int, str]] = []
    prepared, problems = prepare_cohort(cases, PLAN, tmp_path / "cache", lambda *step: steps.append(step))
    assert [case.id for case in prepared] == ["case00", "case02"]
    assert [problem.case for problem in problems] == ["case01"]
    assert "t2.nii" in problems[0].message
    assert steps == [(0, 3, "case00"), (1, 3, "case01"), (2, 3, "case02"), (3, 3, "")]


def test_few_files_are_open_however_many_cases_were_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "MOST_OPEN", 2)
    cases, cache = list(write_cohort(tmp_path, 6).cases), tmp_path / "cache"
    prepared, problems = prepare_cohort(cases, PLAN, cache)
    assert not problems and len(prepared) == 6

    def mapped() -> int:
        return len(
            {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(cache) in line}
        )

    for case, found in zip(cases, prepared, strict=True):
        same_arrays(found, prepare_case(case, PLAN, cache))
        del found
        assert mapped() <= 2 * 3 + 3  # of the case that the loop holds, too
    assert [case.id for case in prepared[4:]] == ["case04", "case05"]
    assert prepared.only(["case03", "nobody"])[0].id == "case03"


def test_a_given_mask_decides_what_is_valid(tmp_path: Path) -> None:
    case = write_case(tmp_path, 1, masked=True)
    small = np.zeros(SHAPE, np.uint8)
    small[12:20, 14:30, 4:7] = 1
    assert case.mask is not None
    save(case.mask, small, affine())
    kept = prepare_case(case, PLAN, tmp_path / "cache")
    assert kept.mask.sum() == small.sum()
    assert kept.mask.shape == (8 + 2 * MARGIN, 16 + 2 * MARGIN, 3 + 2 * MARGIN)
    shown = prepare_source(sources_of(case), PLAN, read_volume(case.mask, labels=True))
    assert shown.mask_rule == "given"
    assert shown.body_mm == pytest.approx((8, 16, 9))
    values = read_volume(case.images["t1"]).array[small > 0]
    assert shown.maps[0].invert(np.zeros(1)) == pytest.approx(np.median(values), rel=1e-5)


def test_an_empty_mask_is_refused(tmp_path: Path) -> None:
    (source,) = sources_of(write_case(tmp_path, 1))
    with pytest.raises(VolumeError, match="mask is empty") as refusal:
        prepare_source([source], PLAN, Volume(np.zeros(SHAPE, np.uint8), source.geometry))
    assert refusal.value.reason == "empty-mask"
    speck = np.zeros(SHAPE, np.uint8)
    speck[5, 5, 5] = speck[9, 9, 5] = 1
    with pytest.raises(VolumeError, match="too small for the grid"):
        prepare_source([source], changed(spacing_mm=(20.0, 20.0, 20.0)), Volume(speck, source.geometry))


def test_an_image_that_is_constant_in_its_mask_is_refused(tmp_path: Path) -> None:
    (source,) = sources_of(write_case(tmp_path, 1))
    flat = Volume(np.where(body(), np.float32(7), source.array), source.geometry)
    with pytest.raises(VolumeError, match="the same"):
        prepare_source([flat], PLAN, Volume(body().astype(np.uint8), source.geometry))


def test_a_wrong_number_of_sources_is_refused(tmp_path: Path) -> None:
    sources = sources_of(write_case(tmp_path, 1))
    for wrong in ([], sources * 2):
        with pytest.raises(VolumeError, match=r"number of source volumes is wrong.*one for each of t1"):
            prepare_source(wrong, PLAN)


def test_sources_on_two_grids_are_refused_and_two_on_one_are_stacked_in_order(tmp_path: Path) -> None:
    case = write_case(tmp_path, 1)
    one, two = (read_volume(case.images[name]) for name in ("t1", "t2"))
    plan = changed(
        sources=("t1", "flair"),
        source_kinds=("median_iqr", "zscore"),
        source_ranges=((-3.0, 3.0),) * 2,
        source_histograms=PLAN.source_histograms * 2,
        source_limits=(1.0, 1.0),
        input_mean=(0.0,) * 3,
        input_sd=(1.0,) * 3,
    )
    shown = prepare_source([one, two], plan)
    assert [fitted.kind for fitted in shown.maps] == ["median_iqr", "zscore"]
    np.testing.assert_array_equal(shown.array[0], prepare_source([one], PLAN).array[0])
    np.testing.assert_allclose(
        shown.array[1][shown.mask], shown.maps[1].apply(two.array[body()]), atol=1e-5
    )  # the second is cut by the mask of the first
    moved = affine()
    moved[0, 3] += 4
    with pytest.raises(VolumeError, match="flair's grid differs"):
        prepare_source([one, Volume(two.array, Geometry(SHAPE, moved))], plan)
    with pytest.raises(VolumeError, match="the flair is the same image as the t1"):
        prepare_source([one, one], plan)


@pytest.mark.realdata
def test_a_real_pair_keeps_its_intensities_and_its_lesions(tmp_path: Path) -> None:
    folder = REAL / "ms_lesjak" / "patient07"
    names = {"t1": "T1", "t2": "T2"}
    images = {name: folder / f"patient07_{word}.nii.gz" for name, word in names.items()}
    case = Case("p7", "p7", images, labels=folder / "patient07_lesions.nii.gz")
    spacing = read_volume(images["t1"]).geometry.spacing_mm
    plan = changed(spacing_mm=spacing, mask_rule="given")
    kept = prepare_case(case, plan, tmp_path)
    assert kept.labels is not None and case.labels is not None
    lesions = read_volume(case.labels, labels=True).array
    assert np.count_nonzero(kept.labels) > 0.98 * np.count_nonzero(lesions)
    assert np.median(kept.target[kept.labels > 0]) > 0.5  # lesions are bright in T2
    assert np.median(kept.source[0][kept.mask]) == pytest.approx(0, abs=1e-3)


def test_ranks_follow_the_sources_and_leave_them_as_they_are(tmp_path: Path) -> None:
    """Reference: scipy's average ranks of the voxels inside the mask."""
    from scipy.stats import rankdata

    images = sources_of(write_case(tmp_path, 1, gain=3.0))
    images[0] = Volume(np.round(images[0].array / 20) * 20, images[0].geometry)  # many ties
    plain, ranked = prepare_source(images, PLAN), prepare_source(images, changed(histogram=True))
    assert ranked.array.shape == (2, *plain.array.shape[1:]) and len(ranked.maps) == 1
    np.testing.assert_array_equal(ranked.array[:1], plain.array)
    inside = ranked.array[1][ranked.mask]
    expected = (rankdata(plain.array[0][plain.mask]) - 0.5) / plain.mask.sum()
    np.testing.assert_allclose(inside, (expected - 0.5) * np.sqrt(12), atol=1e-5)
    assert abs(inside.mean()) < 1e-5 and not ranked.array[1][~ranked.mask].any()


def test_ranks_do_not_move_under_any_rising_change_of_intensity(tmp_path: Path) -> None:
    image = sources_of(write_case(tmp_path, 1))[0]
    image = Volume(np.round(image.array), image.geometry)  # so that rounding ties nothing that was not tied
    plan = changed(histogram=True)
    before = prepare_source([image], plan).array
    for change in (lambda x: 7 * x, lambda x: x**1.7, lambda x: np.log1p(x)):
        other = prepare_source([Volume(change(image.array).astype(np.float32), image.geometry)], plan).array
        np.testing.assert_allclose(other[1], before[1], atol=1e-5)
    inside = before[1][prepare_source([image], plan).mask]
    assert (inside.mean(), inside.std()) == pytest.approx((0, 1), abs=1e-3)


def test_two_sources_come_in_order_and_their_ranks_after_them(tmp_path: Path) -> None:
    case = write_case(tmp_path, 1)
    images = [read_volume(case.images[name]) for name in ("t1", "t2")]
    twice = {name: getattr(PLAN, name) * 2 for name in ("source_kinds", "source_ranges", "source_histograms")}
    two = changed(sources=("t1", "t2"), target="pd", source_limits=(1.0, 1.0), **twice, histogram=True,
                  input_mean=(0.0,) * 3, input_sd=(1.0,) * 3)  # fmt: skip
    both = prepare_source(images, two).array
    for index, image in enumerate(images):
        alone = prepare_source([image], changed(histogram=True, mask_rule="nonzero")).array
        np.testing.assert_array_equal(both[index], alone[0])
        np.testing.assert_array_equal(both[2 + index], alone[1])


def test_a_cache_of_before_is_still_found_and_one_with_ranks_is_another(tmp_path: Path) -> None:
    """The name as it was made before plans knew of ranks."""
    case = write_case(tmp_path, 1)
    files = {name: [sha256_of(path)] for name, path in case.images.items()}
    assert case.labels is not None
    files["labels"] = [sha256_of(case.labels)]
    names = ("sources", "target", "spacing_mm", "dims", "mask_rule", "source_kinds", "target_kind", "window_hu")
    settings = {name: getattr(PLAN, name) for name in names}
    text = json.dumps({"version": 2, "files": files, "plan": settings}, sort_keys=True)
    prepare_case(case, PLAN, tmp_path / "cache")
    name = f"{case.id}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [name]
    ranked = prepare_case(case, changed(histogram=True), tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert (ranked.source.shape[0], ranked.intensities) == (2, 1)


# Super-resolution


def thin(axis: Axis, **fields: object) -> Plan:
    spacing = (1.0, 3.0, 1.0) if axis == "K" else SPACING  # arranged
    return changed(**{"target": "t1", "degradation": Degradation(4, axis), "spacing_mm": spacing, **fields})


@pytest.mark.parametrize("axis", ["I", "J", "K"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_training_case_and_a_thick_scan_of_it_are_shown_to_networks_alike(
    tmp_path: Path, axis: Axis, masked: bool
) -> None:
    plan, how = thin(axis), Degradation(4, axis)
    case = write_case(tmp_path, 1, gain=3.0, masked=masked)
    kept = prepare_case(case, plan, tmp_path / "cache")
    mask = None if case.mask is None else thick_mask(read_volume(case.mask, labels=True), how)
    shown = prepare_source(simulated(sources_of(case), how), plan, mask)
    np.testing.assert_array_equal(kept.source, shown.array)
    assert not (kept.mask & ~shown.mask).any()
    unknown = shown.mask & ~kept.mask  # the thick slices' rim beyond the thin ones'
    assert unknown.mean() < 0.1 and unknown.any()
    thick = degrade(sources_of(case), how)  # 36, 40 and 12 slices are multiples of 4
    scanned = prepare_source(interpolated(thick, how), plan, mask)
    np.testing.assert_allclose(scanned.array, shown.array, atol=1e-4)
    np.testing.assert_allclose(scanned.grid.affine, shown.grid.affine, atol=1e-9)


@pytest.mark.parametrize("kind", ["median_iqr", "rank"])
def test_target_and_source_of_super_resolution_share_one_scale(tmp_path: Path, kind: str) -> None:
    plan = thin("J", source_kinds=(kind,), target_kind=kind)
    case = write_case(tmp_path, 1, gain=3.0)
    kept = prepare_case(case, plan, tmp_path / "cache")
    scale = prepare_source(simulated(sources_of(case), Degradation(4, "J")), plan).maps[0]
    raw = read_volume(case.images["t1"])
    box = tuple(slice(*ends) for ends in _ends(raw.geometry.affine, kept.grid))
    np.testing.assert_allclose(kept.target, np.where(kept.mask, scale.apply(raw.array[box]), 0), atol=1e-5)
    assert kept.own == 0


def _ends(affine: np.ndarray, grid: Geometry) -> list[tuple[int, int]]:
    start = np.rint(np.linalg.inv(affine) @ grid.affine[:, 3])[:3].astype(int)
    return list(zip(start.tolist(), (start + grid.shape).tolist()))


def test_axial_slices_that_are_thick_are_shown_edge_on(tmp_path: Path) -> None:
    case = write_case(tmp_path, 1)
    upright, turned = (prepare_case(case, thin(axis), tmp_path / axis) for axis in ("J", "K"))
    assert np.argmin(upright.mask.shape) == 2 and np.argmin(turned.mask.shape) == 1  # of 36, 40 and 12 slices
    assert turned.labels is not None and upright.labels is not None
    both = np.minimum(turned.target.shape, np.array(upright.target.shape)[[0, 2, 1]])
    assert turned.labels.sum() == pytest.approx(upright.labels.sum(), rel=0.2) and (both > 8).all()


def test_other_thick_slices_are_another_entry_of_the_cache_and_synthesis_keeps_its_own(tmp_path: Path) -> None:
    case, cache = write_case(tmp_path, 1), tmp_path / "cache"
    plans = [PLAN, thin("J"), thin("I"), thin("J", degradation=Degradation(3, "J"))]
    for plan in plans:
        prepare_case(case, plan, cache)
    assert len(list(cache.iterdir())) == len(plans)
    # the name under which 0.1.0 kept it
    assert preparation.cache_key(case, PLAN) == preparation.cache_key(case, changed(degradation=None))


def test_slices_too_few_for_the_factor_are_named(tmp_path: Path) -> None:
    case = write_case(tmp_path, 1)
    prepared, problems = prepare_cohort([case], thin("K", degradation=Degradation(6, "K")), tmp_path / "cache")
    assert not prepared and problems[0].reason == "too-few-slices" and "case01" in problems[0].message
