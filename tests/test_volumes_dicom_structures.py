"""Structure sets drawn on their scans: what lies inside a contour or on it, holes, geometry, and what is refused."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

from chiasm.cli import main
from chiasm.cohorts.discovery import find_cohort
from chiasm.cohorts.labels import usable_labels
from chiasm.errors import CohortError, VolumeError
from chiasm.volumes import read_volume
from chiasm.volumes.dicom_structures import fill_polygons
from dicom_patients import grid_of, in_order, rewrite, write_source

Points = NDArray[np.float64]
Drawn = Mapping[str, Sequence[tuple[int, Points]]]  # by name: slices and corners in voxels along I and J


def box(low: float, high: float) -> Points:
    return np.array([[low, low], [high, low], [high, high], [low, high]], float)


def circle(i: float, j: float, radius: float, corners: int = 40) -> Points:
    turns = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([i + radius * np.cos(turns), j + radius * np.sin(turns)], axis=1)


def write_structures(
    path: Path, files: Sequence[Path], drawn: Drawn, *, lift: float = 0.0, kind: str = "CLOSED_PLANAR", lost: int = 0
) -> Path:
    """Write a structure set on a series as PS3.3 A.19.3 describes it.

    `lift` moves contours by a part of a slice, `lost` numbers are missing at the end of each.
    """
    first = pydicom.dcmread(files[0], stop_before_pixels=True)
    affine = np.diag([-1.0, -1, 1, 1]) @ grid_of(list(files)).affine  # to LPS
    d = Dataset()
    d.SOPClassUID, d.SOPInstanceUID, d.Modality = RTStructureSetStorage, generate_uid(), "RTSTRUCT"
    d.PatientID, d.StudyInstanceUID, d.SeriesInstanceUID = first.PatientID, first.StudyInstanceUID, generate_uid()
    d.StructureSetLabel, d.SeriesNumber = "plan", 9
    series, study, frame = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID, study.RTReferencedSeriesSequence = first.SeriesInstanceUID, [series]
    frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = first.FrameOfReferenceUID, [study]
    d.ReferencedFrameOfReferenceSequence = [frame]
    d.StructureSetROISequence, d.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(drawn.items(), start=1):
        roi, areas = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, roi.ReferencedFrameOfReferenceUID = number, name, first.FrameOfReferenceUID
        areas.ReferencedROINumber, areas.ContourSequence = number, []
        for k, corners in contours:
            voxels = np.column_stack([corners, np.full(len(corners), k + lift)])
            contour = Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = kind, len(corners)
            numbers = (voxels @ affine[:3, :3].T + affine[:3, 3]).ravel()
            contour.ContourData = [f"{x:.5f}" for x in numbers[: len(numbers) - lost]]
            areas.ContourSequence.append(contour)
        d.StructureSetROISequence.append(roi)
        d.ROIContourSequence.append(areas)
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    path.parent.mkdir(parents=True, exist_ok=True)
    d.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("seed", range(6))
def test_polygons_hold_the_centres_that_scikit_image_finds_inside(seed: int) -> None:
    measure = pytest.importorskip("skimage.measure")
    rng = np.random.default_rng(seed)
    turns = np.sort(rng.uniform(0, 2 * np.pi, 17))
    corners = np.array([20.3, 14.1]) + rng.uniform(4, 15, (17, 1)) * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    grid = np.stack(np.meshgrid(np.arange(40), np.arange(28), indexing="ij"), axis=-1).reshape(-1, 2)
    expected = measure.points_in_poly(grid, corners).reshape(40, 28)
    np.testing.assert_array_equal(fill_polygons([corners], (40, 28)), expected)
    beyond = fill_polygons([corners - np.array([25, 0])], (40, 28))  # half of it outside the slice
    np.testing.assert_array_equal(beyond, measure.points_in_poly(grid + np.array([25, 0]), corners).reshape(40, 28))


def test_a_ring_whose_contours_run_through_its_outermost_voxels_is_whole() -> None:
    ring = np.zeros((12, 12), bool)
    ring[2:10, 2:10], ring[4:8, 4:8] = True, False
    np.testing.assert_array_equal(fill_polygons([box(3, 8), box(2, 9)], (12, 12)), ring)  # on its inner and outer rim
    np.testing.assert_array_equal(fill_polygons([box(2, 9), box(3, 8), box(5, 6)], (12, 12))[5:7, 5:7], True)  # island


def test_a_hole_may_be_cut_by_a_channel_of_no_width() -> None:
    inner = box(3.5, 7.5)[::-1]
    keyhole = np.concatenate([box(1.5, 9.5), [[1.5, 1.5]], [[3.5, 3.5]], np.roll(inner, 1, axis=0)[::1], [[3.5, 3.5]]])
    keyhole[6:10] = [[3.5, 7.5], [7.5, 7.5], [7.5, 3.5], [3.5, 3.5]]
    ring = np.zeros((12, 12), bool)
    ring[2:10, 2:10], ring[4:8, 4:8] = True, False
    np.testing.assert_array_equal(fill_polygons([keyhole], (12, 12)), ring)


def test_contours_that_overlap_or_repeat_are_joined() -> None:
    joined = fill_polygons([box(1.5, 6.5), box(4.5, 9.5)], (12, 12))
    assert joined.sum() == 25 + 25 - 4
    assert fill_polygons([box(1.5, 6.5), box(1.5, 6.5)], (12, 12)).sum() == 25


def test_what_exclusive_contours_share_is_outside(tmp_path: Path) -> None:
    squares = [box(1.5, 6.5), box(4.5, 9.5), box(5.2, 5.8)]
    apart = fill_polygons(squares[:2], (12, 12), is_exclusive=True)
    assert apart.sum() == 25 + 25 - 2 * 4 and not apart[5:7, 5:7].any()
    ring = fill_polygons([box(2, 9), box(3, 8), box(5, 6)], (12, 12), is_exclusive=True)
    np.testing.assert_array_equal(ring, fill_polygons([box(2, 9), box(3, 8), box(5, 6)], (12, 12)))
    files = in_order(write_source(tmp_path / "ct", modality="CT"))
    for kind, count in (("CLOSEDPLANAR_XOR", 42), ("CLOSED_PLANAR", 46)):
        drawn = {"GTV": [(2, square) for square in squares[:2]]}
        path = write_structures(tmp_path / "rt" / f"{kind}.dcm", files, drawn, kind=kind)
        assert np.count_nonzero(read_volume(path, labels=True).array) == count


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal", "oblique"])
def test_structures_lie_where_they_were_drawn(tmp_path: Path, plane: str) -> None:
    files = in_order(write_source(tmp_path / "ct", plane=plane, modality="CT"))
    drawn = {"GTV_1": [(2, box(3, 6)), (3, box(4, 5))], "BODY": [(k, box(1, 15)) for k in range(6)]}
    path = write_structures(tmp_path / "rt" / "rs.dcm", files, drawn)
    found = read_volume(path, labels=True)
    expected = np.zeros(grid_of(files).shape, np.uint8)
    expected[3:7, 3:7, 2], expected[4:6, 4:6, 3] = 1, 1
    np.testing.assert_array_equal(found.array, expected)
    np.testing.assert_allclose(found.geometry.affine, grid_of(files).affine, atol=1e-4)
    both = read_volume(path / "gtv*|BODY", labels=True).array
    expected[..., :][(expected == 0) & (np.indices(expected.shape)[:2] >= 1).all(0)] = 0
    assert (both[expected == 1] == 1).all() and (both == 2).sum() == 15 * 15 * 6 - (expected == 1).sum()


def test_a_set_in_an_archive_finds_its_scan_there(tmp_path: Path) -> None:
    files = in_order(write_source(tmp_path / "ct"))
    rs = write_structures(tmp_path / "rs.dcm", files, {"lesion": [(1, box(2, 4))]})
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for file in files:
            archive.write(file, f"ct/{file.name}")
        archive.write(rs, "rt/rs.dcm")
    assert read_volume(tmp_path / "p.zip" / "rt" / "rs.dcm", labels=True).array.sum() == 9


def test_of_two_sets_in_one_series_each_file_stands_for_itself(tmp_path: Path) -> None:
    files = in_order(write_source(tmp_path / "p" / "ct"))
    paths = [
        write_structures(tmp_path / "p" / "rt" / name, files, {"GTV": [(k, box(2, 4))]})
        for name, k in (("a.dcm", 1), ("b.dcm", 3))
    ]
    uid = pydicom.dcmread(paths[0]).SeriesInstanceUID
    rewrite(paths[1], lambda d: setattr(d, "SeriesInstanceUID", uid))
    for path, k in zip(paths, (1, 3), strict=True):
        assert np.flatnonzero(read_volume(path, labels=True).array.any((0, 1))).tolist() == [k]
    with pytest.raises(VolumeError, match="several structure sets") as caught:
        read_volume(tmp_path / "p" / "rt", labels=True)
    assert caught.value.reason == "several-series"


def test_what_cannot_be_drawn_is_refused_by_its_reason(tmp_path: Path) -> None:
    files = in_order(write_source(tmp_path / "p" / "ct"))
    corners = [(1, box(2, 4))]

    def reason(drawn: Drawn, words: str = "", **options: object) -> str:
        path = write_structures(tmp_path / "p" / "rs.dcm", files, drawn, **options)  # type: ignore[arg-type]
        with pytest.raises(VolumeError) as caught:
            read_volume(path / words if words else path, labels=True)
        assert str(path) in str(caught.value)
        return caught.value.reason

    assert reason({"Brain": corners, "Eye_L": corners}) == "no-structure"
    assert reason({"GTV": corners}, "Heart") == "no-structure"
    assert reason({"GTV": corners}, lift=0.4) == "off-slice"
    assert reason({"GTV": [(7, box(2, 4))]}) == "off-slice"
    assert reason({"GTV": corners}, lost=1) == "header"
    assert reason({"GTV": corners}, kind="POINT") == "no-structure"
    alone = write_structures(tmp_path / "q" / "rt" / "rs.dcm", files, {"GTV": corners})
    with pytest.raises(VolumeError, match="a scan that is not there") as caught:
        read_volume(alone, labels=True)
    assert caught.value.reason == "no-series"


def patient(root: Path, name: str, drawn: Drawn) -> None:
    files = in_order(write_source(root / name / "t2", SeriesDescription="t2"))
    frame = pydicom.dcmread(files[0], stop_before_pixels=True).FrameOfReferenceUID
    write_source(root / name / "t1", SeriesDescription="t1", FrameOfReferenceUID=frame, RescaleSlope=2)
    write_structures(root / name / "rt" / "rs.dcm", files, drawn)


def test_structures_are_the_regions_and_the_mask_of_a_patient(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tumour, body = [(2, circle(9, 9, 3))], [(k, box(1, 17)) for k in range(6)]
    patient(tmp_path, "p1", {"GTVp": tumour, "External": body, "Eye_L": [(1, box(2, 4))]})
    cohort = find_cohort(tmp_path)
    (case,) = cohort.cases
    assert cohort.regions["lesion"][0] == 1 and case.mask is None
    image = read_volume(case.images["t2"])
    labels, problem = usable_labels(case, cohort.regions, image, "t2")
    assert problem is None and labels is not None and np.unique(labels.array).tolist() == [0, 1]
    notes = {"structures": {"tumour": ["GTV*"], "eyes": ["Eye_?"], "mask": ["external"]}}
    (tmp_path / "cohort.json").write_text(json.dumps(notes))
    cohort = find_cohort(tmp_path)
    (case,) = cohort.cases
    assert cohort.regions == {"tumour": (1,), "eyes": (2,)}
    labels, problem = usable_labels(case, cohort.regions, image, "t2")
    assert problem is None and labels is not None and (labels.array == 2).sum() == 9
    assert case.mask is not None and read_volume(case.mask, labels=True).array.sum() == 17 * 17 * 6
    with pytest.raises(SystemExit) as done:
        main(["inspect", str(tmp_path)])
    assert done.value.code == 0
    assert "RTSTRUCT, 3 structures" in (told := capsys.readouterr().out) and "GTVp, External, Eye_L" in told


def test_a_set_without_a_tumour_is_used_only_where_structures_are_named(tmp_path: Path) -> None:
    patient(tmp_path, "p1", {"Brain": [(2, box(2, 9))], "Eye_L": [(1, box(2, 4))]})
    cohort = find_cohort(tmp_path)
    assert cohort.cases[0].labels is None and not cohort.regions and not cohort.problems
    (tmp_path / "cohort.json").write_text(json.dumps({"structures": {"brain": "Brain"}}))
    with pytest.raises(CohortError) as caught:
        find_cohort(tmp_path)
    assert '{"structures": {"lesion": ["GTV*"]' in str(caught.value)
