"""What we write as DICOM: checked by the programs of others, and by what the source says."""

from __future__ import annotations

import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import pydicom
import pytest

from chiasm.errors import ChiasmError, VolumeError
from chiasm.prediction.dicom_case import EXPECTED_ERROR, MAPS
from chiasm.volumes import Geometry, Reading, Volume, canonical, read_volume
from chiasm.volumes.dicom_attributes import Derivation, ModelMark
from chiasm.volumes.dicom_choice import pick_series
from chiasm.volumes.dicom_write import WrittenSeries, grey_scale, write_map, write_series
from chiasm.volumes.geometry import reordered, reordered_like, same_grid
from conftest import REAL
from dicom_patients import (
    PLANES,
    TELLTALE,
    Archive,
    faults,
    in_order,
    made_of,
    reserved_port,
    rewrite,
    run_tool,
    scan,
    tool,
    wait_for,
    write_enhanced,
    write_source,
)

MARK = ModelMark("A7, t1 to t2", "0123456789abcdef" * 4)
SAME = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientAge", "AccessionNumber", "StudyInstanceUID",
    "StudyDate", "ReferringPhysicianName", "FrameOfReferenceUID", "PatientPosition", "BodyPartExamined",
)  # fmt: skip
BIT_FOR_BIT = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")


def words_of(header: pydicom.Dataset, name: str) -> list[str]:
    """The characters of a decimal string, not the number."""
    value = header[name].value
    return [one.original_string for one in (value if header[name].VM > 1 else [value])]


def derived(
    folder: Path, image: Volume, *sources: list[Path], modality: Literal["MR", "CT"] = "MR", **options: Any
) -> WrittenSeries:
    series = [pick_series(files[0]) for files in sources]
    return write_series(folder, image, series, Derivation(modality, "t2", MARK, **options))


def mapped(path: Path, expected_error: Volume, made: WrittenSeries, unit: Literal["HU", "a.u."] = "a.u.") -> Path:
    write_map(path, expected_error, pick_series(made.files[0]), kind=MAPS[EXPECTED_ERROR], unit=unit, model=MARK)
    return path


def test_a_map_is_read_back_as_it_was_written_and_never_taken_for_a_scan(tmp_path: Path) -> None:
    files = write_source(tmp_path / "source", plane="oblique")
    made = derived(tmp_path / "made", made_of(files), files)
    expected = made_of(files, 0, 90)
    path = mapped(tmp_path / "made" / "map.dcm", expected, made)
    found = read_volume(path)
    assert found.array.dtype == np.float32 and np.array_equal(found.array, expected.array)
    np.testing.assert_allclose(found.geometry.affine, expected.geometry.affine, atol=1e-5)
    assert read_volume(tmp_path / "made").array.max() > 90  # the series beside it

    def double(dataset: pydicom.Dataset) -> None:
        dataset.DoubleFloatPixelData = np.frombuffer(dataset.FloatPixelData, "<f4").astype("<f8").tobytes()
        del dataset.FloatPixelData
        dataset.BitsAllocated = 64
        for mapping in dataset.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence:
            mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept = 0.5, 3.0

    rewrite(path, double)
    np.testing.assert_allclose(read_volume(path).array, expected.array * 0.5 + 3, rtol=1e-6)
    rewrite(path, lambda dataset: setattr(dataset, "BitsAllocated", 32))
    with pytest.raises(VolumeError, match="floating-point pixels in a way that cannot be"):
        read_volume(path)


@pytest.mark.parametrize("target", ["MR", "CT"])
@pytest.mark.parametrize("source", ["MR", "CT"])
def test_a_series_of_either_kind_from_either_kind_has_no_fault(
    source: Literal["MR", "CT"], target: Literal["MR", "CT"], tmp_path: Path
) -> None:
    files = write_source(tmp_path / "source", modality=source, implicit=source == "MR")
    image = made_of(files, -1000, 3000)
    made = derived(tmp_path / "made", image, files, modality=target, remarks=["a remark"])
    mapped(tmp_path / "trust.dcm", made_of(files, 0, 90), made, "HU")
    for path in (*made.files, tmp_path / "trust.dcm"):
        assert faults(path) == []
    study = run_tool("dcentvfy", *files, *made.files, tmp_path / "trust.dcm")
    assert study.returncode == 0 and study.stdout + study.stderr == ""
    dumped = run_tool("dcmdump", "+P", "0008,001c", "+P", "Modality", made.files[0])
    assert dumped.stderr == "" and "[YES]" in dumped.stdout and f"[{target}]" in dumped.stdout


def test_a_fault_would_be_found_by_each_tool(tmp_path: Path) -> None:
    path, other = write_source(tmp_path / "source")[:2]
    rewrite(path, lambda d: d.__delitem__("PatientID"))
    assert faults(path)
    assert "Different PatientID" in run_tool("dcentvfy", path, other).stderr
    path.write_bytes(path.read_bytes()[:-100])
    assert run_tool("dcmdump", path).stderr != ""


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_another_converter_finds_the_grid_and_values_within_half_a_step(
    plane: str, scale: float, tmp_path: Path
) -> None:
    files = write_source(tmp_path / "source", plane=plane)
    image = made_of(files, 0, 300)
    derived(tmp_path / "made", image, files, scale=scale)
    (tmp_path / "nifti").mkdir()
    done = run_tool("dcm2niix", "-z", "n", "-f", "x", "-o", tmp_path / "nifti", tmp_path / "made")
    assert done.returncode == 0, done.stdout
    (converted,) = map(nib.load, sorted((tmp_path / "nifti").glob("*.nii")))
    found = reordered_like(Volume(converted.get_fdata(), Geometry(converted.shape, converted.affine)), image.geometry)
    assert np.abs(found.geometry.corners - image.geometry.corners).max() < 1e-3  # mm
    assert np.abs(found.array - image.array.astype(float) * scale).max() <= 0.5 + 1e-6


def test_every_slice_lies_where_its_source_lies_to_the_last_digit_and_names_it(tmp_path: Path) -> None:
    files = write_source(tmp_path / "source", plane="oblique")
    made = derived(tmp_path / "made", made_of(files), files, modality="CT")
    sources = {header.SOPInstanceUID: header for header in map(pydicom.dcmread, files)}
    headers = [pydicom.dcmread(path) for path in made.files]
    assert len({header.SOPInstanceUID for header in headers} - set(sources)) == len(files)
    for number, header in enumerate(headers, start=1):
        (reference,) = header.SourceImageSequence
        source = sources.pop(reference.ReferencedSOPInstanceUID)
        for name in BIT_FOR_BIT:
            assert words_of(header, name) == words_of(source, name)
        for name in SAME:
            assert header[name].value == source[name].value
        assert header.InstanceNumber == number and header.SeriesInstanceUID == made.series_uid
        assert reference.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
        assert header.ContributingEquipmentSequence[0].PurposeOfReferenceCodeSequence[0].CodeValue == "109102"
        assert header.SyntheticData == "YES" and list(header.ImageType[:2]) == ["DERIVED", "SECONDARY"]
        assert header.SeriesDescription == "SYNTHETIC t2" and MARK.sha256 in header.DerivationDescription
        assert header.SeriesInstanceUID != source.SeriesInstanceUID and "PatientIdentityRemoved" not in header
    assert not sources


def test_values_come_back_within_half_a_step_and_are_cut_not_wrapped(tmp_path: Path) -> None:
    files = write_source(tmp_path / "source")
    image = made_of(files, 0, 1)
    image.array[0, 0, :2] = (40, -40)
    made = derived(tmp_path / "made", image, files, scale=1000)
    headers = [pydicom.dcmread(path) for path in made.files]
    stored = np.stack([header.pixel_array.T for header in headers], axis=2)
    assert made.saturated == 2 and stored[0, 0, :2].tolist() == [32767, -32768]
    slope = headers[0].RealWorldValueMappingSequence[0].RealWorldValueSlope
    inside = np.abs(image.array) <= 1
    assert np.abs(stored * slope - image.array)[inside].max() <= 0.5 / 1000 + 1e-6
    assert "RescaleSlope" not in headers[0] and headers[0].PixelRepresentation == 1  # classic MR has no such thing
    assert "times 1000" in headers[0].DerivationDescription


def test_an_image_in_another_axis_order_gives_the_same_slices(tmp_path: Path) -> None:
    files = write_source(tmp_path / "source", plane="sagittal")
    image = made_of(files)
    for name, volume in {"plain": image, "turned": reordered(image, (2, 0, 1), (True, False, True))}.items():
        derived(tmp_path / name, volume, files)
    for path in sorted((tmp_path / "plain").iterdir()):
        plain, turned = (pydicom.dcmread(p) for p in (path, tmp_path / "turned" / path.name))
        assert plain.PixelData == turned.PixelData
        assert plain.ImagePositionPatient == turned.ImagePositionPatient


def test_a_multi_frame_source_gives_a_classic_series_that_names_its_frames(tmp_path: Path) -> None:
    order = [3, 0, 5, 1, 4, 2]  # of frames in the file
    files = [write_enhanced(tmp_path / "source" / "one.dcm", scan(), "oblique", order=order)]
    source = pick_series(files[0])
    assert source.stack is not None
    grid = source.stack.geometry
    image = Volume(np.random.default_rng(1).uniform(0, 900, grid.shape).astype(np.float32), grid)
    made = derived(tmp_path / "made", image, files)
    mapped(tmp_path / "trust.dcm", image, made)
    assert [fault for path in (*made.files, tmp_path / "trust.dcm") for fault in faults(path)] == []
    headers = [pydicom.dcmread(path) for path in made.files]
    assert [header.SourceImageSequence[0].ReferencedFrameNumber for header in headers] == [
        order.index(k) + 1 for k in range(6)
    ]
    assert {header.SourceImageSequence[0].ReferencedSOPInstanceUID for header in headers} == {
        "1.2.826.0.1.3680043.10.98.3"
    }
    back = read_volume(tmp_path / "made")
    assert same_grid(back.geometry, grid, 1e-4) and np.abs(back.array - image.array).max() <= 0.5
    assert headers[0].PatientID == TELLTALE["PatientID"] and headers[0].StudyInstanceUID == source.study_uid


def test_slices_of_a_tilted_gantry_come_back_on_the_straight_grid_that_was_read(tmp_path: Path) -> None:
    files = in_order(write_source(tmp_path / "source", modality="CT"))
    for k, path in enumerate(files):
        rewrite(path, lambda d, k=k: setattr(d, "ImagePositionPatient", [-31.25, -47.5 + 0.8 * k, 12.125 + 2.5 * k]))
    straight = read_volume(tmp_path / "source", reading=Reading(resample_tilt=True))
    made = derived(tmp_path / "made", straight, files, modality="CT")
    back = read_volume(tmp_path / "made")
    assert np.abs(back.geometry.corners - straight.geometry.corners).max() < 1e-3
    assert np.abs(back.array - straight.array).max() <= 0.5 + 1e-3
    named = [[one.ReferencedSOPInstanceUID for one in pydicom.dcmread(p).SourceImageSequence] for p in made.files]
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in files]
    assert all(uids[k] in names and len(names) <= 3 for k, names in enumerate(named))


def test_every_source_is_named_slice_by_slice(tmp_path: Path) -> None:
    t1, flair = (write_source(tmp_path / name, plane="sagittal") for name in ("t1", "flair"))
    made = derived(tmp_path / "made", made_of(t1), t1, flair)
    places = {}
    for path in (*t1, *flair):
        header = pydicom.dcmread(path)
        places[header.SOPInstanceUID] = (header.SeriesInstanceUID, header.ImagePositionPatient)
    for header in map(pydicom.dcmread, made.files):
        named = [places[one.ReferencedSOPInstanceUID] for one in header.SourceImageSequence]
        assert len({series for series, _ in named}) == 2
        assert [place for _, place in named] == [header.ImagePositionPatient] * 2


def test_only_a_true_claim_of_anonymity_is_carried_on(tmp_path: Path) -> None:
    claim = {"PatientIdentityRemoved": "YES", "DeidentificationMethod": "by hand"}
    claims = {}
    for name, changes in {"yes": claim, "no": {**claim, "PatientIdentityRemoved": "NO"}}.items():
        files = write_source(tmp_path / name, **changes)
        made = derived(tmp_path / f"{name}-made", made_of(files), files)
        claims[name] = pydicom.dcmread(made.files[0]).get("PatientIdentityRemoved")
    assert claims == {"yes": "YES", "no": None}


def test_names_in_other_scripts_and_odd_values_are_carried_on_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    odd = {"SpecificCharacterSet": "ISO_IR 192", "PatientName": "Müller^Zoë=山田^太郎"}
    files = write_source(tmp_path / "source", **odd)
    for path in files:  # an age, a date and a sex that the standard forbids, as scanners write them
        header = pydicom.dcmread(path)
        with pydicom.config.disable_value_validation():
            header.PatientAge, header.PatientBirthDate, header.PatientSex = (
                "ninety-one years",
                "17 April 1933",
                "unknown",
            )
            header.save_as(path)
    caplog.set_level("DEBUG")
    made = derived(tmp_path / "made", made_of(files), files)
    mapped(tmp_path / "trust.dcm", made_of(files, 0, 9), made)
    for path in (made.files[0], tmp_path / "trust.dcm"):
        with pydicom.config.disable_value_validation():
            assert pydicom.dcmread(path).PatientName == odd["PatientName"]
            assert pydicom.dcmread(path).PatientSex == "unknown"
    said = "".join(capfd.readouterr()) + caplog.text
    assert not [word for word in (*TELLTALE.values(), "ninety", "April", "山田") if word in said]


def test_a_series_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_source(tmp_path / "source")
    first = derived(tmp_path / "made", made_of(files), files)
    before = {path.name: path.read_bytes() for path in first.files}
    save, written = pydicom.Dataset.save_as, []

    def full(self: pydicom.Dataset, path: Path, **options: object) -> None:
        written.append(path)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        save(self, path, **options)

    monkeypatch.setattr(pydicom.Dataset, "save_as", full)
    with pytest.raises(ChiasmError, match="No space left"):
        derived(tmp_path / "made", made_of(files), files)
    assert {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()} == before
    monkeypatch.undo()
    second = derived(tmp_path / "made", made_of(files), files)
    assert second.series_uid != first.series_uid and len(list((tmp_path / "made").iterdir())) == len(files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "source"]


def test_what_does_not_lie_on_the_slices_is_refused(tmp_path: Path) -> None:
    files = write_source(tmp_path / "source")
    image = made_of(files)
    moved = Geometry(image.geometry.shape, image.geometry.affine + np.eye(4)[:, [3, 3, 3, 0]] * 0.3)
    bad = image.array.copy()
    bad[0, 0, 0] = np.nan
    for volume, reason in (
        (Volume(image.array, moved), "grid"),
        (Volume(image.array[1:], Geometry(image.array[1:].shape, image.geometry.affine)), "grid"),
        (Volume(bad, image.geometry), "not-finite"),
    ):
        with pytest.raises(VolumeError) as caught:
            derived(tmp_path / "made", volume, files)
        assert caught.value.reason == reason and "QX-7781" not in str(caught.value)
    (tmp_path / "source" / files[2].name).unlink()
    with pytest.raises(VolumeError, match="lacks a slice"):
        derived(tmp_path / "made", image, files)
    assert not (tmp_path / "made").exists()
    with pytest.raises(ValueError, match="its scale is 1"):
        write_series(tmp_path / "made", image, [], Derivation("CT", "", MARK, scale=10))
    with pytest.raises(ValueError, match="needs its source"):
        derived(tmp_path / "made", image)


def test_an_expected_error_map_comes_back_and_names_its_slices(tmp_path: Path) -> None:
    from highdicom.pm import ParametricMap

    files = write_source(tmp_path / "source", plane="oblique")
    trust = made_of(files, 0, 0.05)
    made = derived(tmp_path / "made", made_of(files), files)
    header = pydicom.dcmread(mapped(tmp_path / "trust.dcm", trust, made))
    volume = ParametricMap.from_dataset(header).get_volume()
    affine = np.diag([-1.0, -1, 1, 1]) @ volume.affine[:, [2, 1, 0, 3]]
    back = reordered_like(Volume(volume.array.transpose(2, 1, 0), Geometry(trust.array.shape, affine)), trust.geometry)
    assert same_grid(trust.geometry, back.geometry, 1e-4)
    np.testing.assert_array_equal(back.array.astype(np.float32), trust.array)
    assert header.ContentQualification == "RESEARCH" and header.SyntheticData == "YES"
    assert header.PatientID == TELLTALE["PatientID"]
    named = [
        item.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        for item in header.PerFrameFunctionalGroupsSequence
    ]
    assert sorted(named) == sorted(pydicom.dcmread(path).SOPInstanceUID for path in made.files)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 30), (-5, 200), (0, 1500), (0, 60_000), (0, 1e-4)])
def test_a_scale_keeps_a_thousand_steps_and_fits_sixteen_bits(low: float, high: float) -> None:
    scale = grey_scale(low, high)
    assert 2 * high * scale <= 32767
    assert (high - low) * scale >= 1000 or scale * 10 * 2 * high > 32767
    assert np.log10(scale) == pytest.approx(round(np.log10(scale)))
    with pytest.raises(ValueError, match="empty"):
        grey_scale(high, high)


@pytest.mark.realdata
@pytest.mark.slow
def test_a_real_series_gives_a_derived_one_without_fault(tmp_path: Path) -> None:
    files = sorted((REAL / "dicom" / "remind022_T1c").glob("*.dcm"))
    image = made_of(files)
    made = derived(tmp_path / "made", image, files)
    mapped(tmp_path / "trust.dcm", image, made)
    for path in (*made.files[::35], tmp_path / "trust.dcm"):
        assert faults(path) == []
    study = run_tool("dcentvfy", *files, *made.files, tmp_path / "trust.dcm")
    assert study.returncode == 0 and study.stdout + study.stderr == ""
    header = pydicom.dcmread(made.files[0])
    assert header.PatientIdentityRemoved == "YES" and len(made.files) == 176
    run_tool("dcm2niix", "-z", "n", "-f", "x", "-o", tmp_path, tmp_path / "made")
    converted = nib.load(tmp_path / "x.nii")
    theirs = canonical(Volume(converted.get_fdata(), Geometry(converted.shape, converted.affine)))
    ours, wanted = canonical(read_volume(tmp_path / "made")), canonical(image)
    assert np.abs(ours.geometry.corners - wanted.geometry.corners).max() < 1e-3
    # dcm2niix takes the distance of the first two slices, whose positions are rounded, for all 176 (docs/log.md)
    assert np.abs(theirs.geometry.corners - wanted.geometry.corners).max() < 0.05
    for found in (ours, theirs):
        assert np.abs(found.array - wanted.array).max() <= 0.5 + 1e-6


@pytest.mark.slow
def test_a_store_takes_the_files_and_keeps_their_bytes(tmp_path: Path) -> None:
    sources = write_source(tmp_path / "source")
    made = derived(tmp_path / "made", made_of(sources), sources)
    mapped(tmp_path / "trust.dcm", made_of(sources, 0, 9), made)
    files, store = [*made.files, tmp_path / "trust.dcm"], tmp_path / "store"
    store.mkdir()
    with reserved_port() as port:
        server = subprocess.Popen([tool("storescp"), "+B", "-od", str(store), "+xa", str(port)])
        try:
            wait_for(port, server)
            sent = run_tool("storescu", "-R", "-xe", "127.0.0.1", str(port), *files)
            assert sent.returncode == 0, sent.stderr
        finally:
            server.terminate()
            server.wait(60)
    received = {header.SOPInstanceUID: header for header in map(pydicom.dcmread, store.iterdir())}
    assert len(received) == len(files)
    for header in map(pydicom.dcmread, files):
        assert received[header.SOPInstanceUID] == header


@pytest.mark.slow
@pytest.mark.parametrize("way", ["C-STORE", "STOW-RS"])
def test_an_archive_takes_the_files_and_gives_them_back(way: str, pacs: Archive, tmp_path: Path) -> None:
    sources = write_source(tmp_path / "source", plane="oblique")
    made = derived(tmp_path / "made", made_of(sources), sources, modality="CT")
    files = [*made.files, mapped(tmp_path / "trust.dcm", made_of(sources, 0, 9), made, "HU")]
    if way == "C-STORE":
        sent = run_tool("storescu", "-R", "-xe", "-aec", "ARCHIVE", "127.0.0.1", str(pacs.dicom_port), *files)
        assert sent.returncode == 0, sent.stderr
    else:
        pacs.stow(files)
    back = [pydicom.dcmread(BytesIO(content)) for content in pacs.files()]
    given = {header.SOPInstanceUID: header for header in map(pydicom.dcmread, files)}
    assert len(back) == len(given)
    for header in back:
        assert header == given[header.SOPInstanceUID]
