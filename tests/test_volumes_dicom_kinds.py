"""A DICOM stack holds one kind of image: others of the same series are told apart, and chosen by words."""

from __future__ import annotations

import math
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from chiasm.errors import VolumeError
from chiasm.volumes import read_volume
from chiasm.volumes.dicom_kinds import ImageKind, parse_kind, split_kinds
from chiasm.volumes.dicom_scan import find_series, place_inside
from conftest import REAL
from dicom_patients import (
    in_order,
    rewrite,
    scan,
    tool,
    write_enhanced,
    write_enhanced_mixed,
    write_mixed,
    write_source,
)

SMALL = (6, 7, 4)


def image_type(*words: str) -> dict[str, Any]:
    return {"ImageType": ["ORIGINAL", "PRIMARY", *words]}


def frame_type(component: str, *words: str) -> dict[str, Any]:
    values: dict[str, Any] = {"FrameType": ["ORIGINAL", "PRIMARY", *(words or ("VOLUME", "NONE"))]}
    return {"MRImageFrameTypeSequence": values | ({"ComplexImageComponent": component} if component else {})}


M, P = image_type("M", "ND"), image_type("P", "ND")

#: Attributes of the images of each kind, and what tells the kinds apart.
CLASSIC: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "magnitude and phase": ([M, P], ["magnitude", "phase"]),
    "phase first": ([P, M], ["phase", "magnitude"]),
    "M_FFE and PHASE MAP": ([image_type("M_FFE", "M"), image_type("PHASE MAP", "P")], ["magnitude", "phase"]),
    "a letter that comes late": ([image_type("OTHER", "M"), image_type("OTHER", "R")], ["magnitude", "real"]),
    "REAL and IMAGINARY": ([image_type("REAL"), image_type("IMAGINARY")], ["real", "imaginary"]),
    "ComplexImageComponent": (
        [{"ComplexImageComponent": "MAGNITUDE"}, {"ComplexImageComponent": "PHASE"}], ["magnitude", "phase"],
    ),
    "magnitude and a map": ([M, image_type("T1 MAP")], ["magnitude", "other"]),
    "two echoes": ([{"EchoTime": "30"}, {"EchoTime": "10"}], ["TE=30", "TE=10"]),
    "two echoes, 2 % apart": ([{"EchoTime": "10"}, {"EchoTime": "10.2"}], ["TE=10", "TE=10.2"]),
    "two echoes with EchoNumbers": (
        [{"EchoTime": "4.9", "EchoNumbers": 1}, {"EchoTime": "7.4", "EchoNumbers": 2}], ["TE=4.9", "TE=7.4"],
    ),
    "two inversion times": ([{"InversionTime": "800"}, {"InversionTime": "2500"}], ["TI=800", "TI=2500"]),
    "two b-values": ([{"DiffusionBValue": 0.0}, {"DiffusionBValue": 1000.0}], ["b=0", "b=1000"]),
    "a b-value and none": ([{}, {"DiffusionBValue": 800.0}], ["b unknown", "b=800"]),
    "a trace and its ADC map": (
        [image_type("DIFFUSION", "TRACEW") | {"DiffusionBValue": 1000.0}, image_type("DIFFUSION", "ADC", "ND")],
        ["other b=1000", "adc b unknown"],
    ),
    "magnitude and ADC": ([M, image_type("ADC")], ["magnitude", "adc"]),
    "inversion times and none": (
        [{"InversionTime": "700"}, {"InversionTime": "2500"}, {"InversionTime": None}],
        ["TI=700", "TI=2500", "TI unknown"],
    ),
    "components and none": ([M, P, image_type()], ["magnitude", "phase", "component unknown"]),
    "all at once": (
        [M | {"EchoTime": "10"}, P | {"EchoTime": "10"}, M | {"EchoTime": "30"}],
        ["magnitude TE=10", "phase TE=10", "magnitude TE=30"],
    ),
}  # fmt: skip
ENHANCED: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "ComplexImageComponent": ([frame_type("MAGNITUDE"), frame_type("PHASE")], ["magnitude", "phase"]),
    "FrameType": ([frame_type("", "M_SE", "M"), frame_type("", "PHASE MAP", "P")], ["magnitude", "phase"]),
    "two echoes": (
        [{"MREchoSequence": {"EffectiveEchoTime": 10.0}}, {"MREchoSequence": {"EffectiveEchoTime": 30.0}}],
        ["TE=10", "TE=30"],
    ),
    "two inversion times": (
        [{"MRModifierSequence": {"InversionTimes": [ti]}} for ti in (800.0, 2500.0)], ["TI=800", "TI=2500"],
    ),
    "two b-values": (
        [{"MRDiffusionSequence": {"DiffusionDirectionality": "NONE"}},
         {"MRDiffusionSequence": {"DiffusionDirectionality": "ISOTROPIC", "DiffusionBValue": 1000.0}}],
        ["b=0", "b=1000"],
    ),
    "all at once": (
        [frame_type(name) | {"MREchoSequence": {"EffectiveEchoTime": te}}
         for te in (10.0, 30.0) for name in ("MAGNITUDE", "PHASE")],
        ["magnitude TE=10", "phase TE=10", "magnitude TE=30", "phase TE=30"],
    ),
}  # fmt: skip
#: What differs within a series that is one volume.
ALIKE: dict[str, list[dict[str, Any]]] = {
    "echo times that jitter": [{"EchoTime": "10.00"}, {"EchoTime": "10.06"}, {"EchoTime": "9.95"}],
    "times of acquisition": [{"AcquisitionTime": f"1200{k:02d}", "ContentTime": f"1201{k:02d}"} for k in range(3)],
    "trigger times": [{"TriggerTime": f"{100 * k}"} for k in range(1, 4)],
    "acquisition numbers": [{"AcquisitionNumber": k} for k in range(1, 4)],
    "later words of ImageType": [image_type("M", "ND"), image_type("M", "NORM"), image_type("M", "ND", "DIS2D")],
    "echo times that are not there": [{"EchoTime": "10"}, {"EchoTime": None}, {"EchoTime": "0"}],
    "an ImageType that is not there": [M, {"ImageType": ["ORIGINAL", "PRIMARY"]}, M],
}


def arrays(count: int) -> list[Any]:
    return [scan(SMALL, seed=seed) for seed in range(count)]


def refusal(place: Path, series: str | None = None) -> VolumeError:
    with pytest.raises(VolumeError) as refused:
        read_volume(place, series=series)
    return refused.value


@pytest.mark.parametrize("name", CLASSIC)
def test_kinds_of_images_in_one_series_are_listed_and_chosen(name: str, tmp_path: Path) -> None:
    kinds, words = CLASSIC[name]
    truth = arrays(len(kinds))
    place = write_mixed(tmp_path / "s", kinds, truth)
    error = refusal(place)
    assert error.reason == "several-series" and "--series" in str(error)
    assert all(f", axial, {word}" in str(error) for word in words)
    for word, array in zip(words, truth, strict=True):
        np.testing.assert_array_equal(read_volume(place, series=word).array, array)
    series = find_series(place)
    assert [one.choice for one in series] == list(range(1, len(kinds) + 1))
    for one in series:  # by number, and by any of its files
        expected = truth[words.index(one.apart)]
        np.testing.assert_array_equal(read_volume(one.files[one.choice]).array, expected)
    np.testing.assert_array_equal(read_volume(place, series=1).array, truth[words.index(series[0].apart)])


@pytest.mark.parametrize("name", ENHANCED)
def test_kinds_of_images_in_one_file_are_listed_and_chosen(name: str, tmp_path: Path) -> None:
    kinds, words = ENHANCED[name]
    truth = arrays(len(kinds))
    path = write_enhanced_mixed(tmp_path / "enhanced.dcm", kinds, truth)
    assert refusal(path).reason == "several-series"
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(path, "in/enhanced.dcm")
    for word, array in zip(words, truth, strict=True):
        np.testing.assert_array_equal(read_volume(path, series=word).array, array)
        for inside in (path / word, tmp_path / "a.zip" / "in" / "enhanced.dcm" / word):
            np.testing.assert_array_equal(read_volume(inside).array, array)
    assert place_inside(path / words[0]) == words[0] and place_inside(path) == ""
    error = refusal(path / "nothing")
    assert error.reason == "no-series" and words[0] in str(error)


@pytest.mark.parametrize("name", ["magnitude and phase", "two echoes", "two b-values", "two inversion times"])
def test_slices_that_alternate_between_kinds_make_no_volume(name: str, tmp_path: Path) -> None:
    """Each place is taken once, so that nothing but the kind tells that two scans are mixed."""
    kinds, words = CLASSIC[name]
    truth = [scan((6, 7, 6), seed=seed) for seed in range(2)]
    classic = write_mixed(tmp_path / "s", kinds, truth, alternate=True)
    assert refusal(classic).reason == "several-series"
    np.testing.assert_array_equal(read_volume(classic, series=words[1]).array, truth[1][:, :, 1::2])
    groups = ENHANCED.get(name, ENHANCED["ComplexImageComponent"])[0]
    assert refusal(write_enhanced_mixed(tmp_path / "e", groups, truth, alternate=True)).reason == "several-series"


@pytest.mark.parametrize("name", ALIKE)
def test_what_makes_no_kind_stays_one_volume(name: str, tmp_path: Path) -> None:
    files = in_order(write_source(tmp_path / "s", scan(SMALL)))
    for k, path in enumerate(files):
        rewrite(path, lambda d, k=k: d.update(ALIKE[name][k % 3]))
    np.testing.assert_array_equal(read_volume(tmp_path / "s").array, scan(SMALL))
    assert [one.apart for one in find_series(tmp_path / "s")] == [""]


def test_kinds_are_of_mr_alone(tmp_path: Path) -> None:
    files = in_order(write_source(tmp_path / "ct", scan(SMALL), modality="CT"))
    for k, path in enumerate(files):  # words of dual energy
        rewrite(path, lambda d, k=k: d.update(image_type("AXIAL", "CT_SOM5 SPI", "M_060" if k % 2 else "P")))
    np.testing.assert_array_equal(read_volume(tmp_path / "ct").array, scan(SMALL))


def test_a_kind_and_words_choose_among_series(tmp_path: Path) -> None:
    for number, name in enumerate(("t1 se", "t2 tse")):
        truth = [scan(SMALL, seed=10 * number), scan(SMALL, seed=10 * number + 1)]
        write_mixed(tmp_path / "p" / name[:2], [M, P], truth, SeriesDescription=name, SeriesNumber=number)
    write_source(tmp_path / "p" / "x", scan(SMALL, 7), SeriesNumber=9, EchoTime="90", SeriesDescription="pd")
    place = tmp_path / "p"
    for words, seed in (("t2 tse phase", 11), ("magnitude t1", 0), ("T1, Phase", 1), ("TE=90", 7), ("te = 90.4 ms", 7)):
        np.testing.assert_array_equal(read_volume(place, series=words).array, scan(SMALL, seed))
    assert refusal(place, "phase").reason == "several-series"
    assert refusal(place, "TE=91.5").reason == "no-series"
    assert refusal(place, "pd phase").reason == "no-series"


def test_a_whole_series_of_phase_is_listed_as_such(tmp_path: Path) -> None:
    write_source(tmp_path / "p" / "a", scan(SMALL, 1), SeriesNumber=1, SeriesDescription="ax t1", **M)
    write_source(tmp_path / "p" / "b", scan(SMALL, 2), SeriesNumber=2, SeriesDescription="ax t1", **P)
    one, other = find_series(tmp_path / "p")
    assert (one.kind_words, other.kind_words) == ("", "phase")
    assert other.described().endswith(", phase") and not one.described().endswith(", phase")
    assert refusal(tmp_path / "p", "TI unknown").reason == "no-series", "the listing says it of none"


def test_words_of_a_description_count_before_kinds(tmp_path: Path) -> None:
    write_source(tmp_path / "p" / "a", scan(SMALL, 1), SeriesNumber=1, SeriesDescription="phase of breathing", **M)
    write_source(tmp_path / "p" / "b", scan(SMALL, 2), SeriesNumber=2, SeriesDescription="field", **P)
    np.testing.assert_array_equal(read_volume(tmp_path / "p", series="phase").array, scan(SMALL, 1))


def test_a_fault_of_one_kind_leaves_the_other(tmp_path: Path) -> None:
    place = write_mixed(tmp_path / "s", [M, P], arrays(2))
    phase = next(one for one in find_series(place) if one.apart == "phase")
    phase.files[2].unlink()
    np.testing.assert_array_equal(read_volume(place, series="magnitude").array, scan(SMALL, 0))
    assert refusal(place, "phase").reason == "missing-slice"


def test_two_frames_in_one_place_are_named_by_their_numbers(tmp_path: Path) -> None:
    path = write_enhanced_mixed(tmp_path / "enh.dcm", [{}, {}], arrays(2))
    error = refusal(path)
    assert error.reason == "duplicate-slice"
    assert "frames 1 and 2 of enh.dcm, 4 places in all" in str(error)
    assert "enh.dcm and enh.dcm" not in str(error)


def test_frames_around_a_gap_are_named_by_their_numbers(tmp_path: Path) -> None:
    path = write_enhanced(tmp_path / "enh.dcm", scan((6, 7, 6)), order=[5, 4, 2, 1, 0])
    error = refusal(path)
    assert error.reason == "missing-slice" and "frames 3 and 2 of enh.dcm" in str(error)


def test_a_localizer_among_images_is_named_and_one_alone_stands_aside(tmp_path: Path) -> None:
    files = in_order(write_source(tmp_path / "p" / "ct", scan(SMALL), modality="CT", SeriesNumber=1))
    rewrite(files[0], lambda d: d.update(image_type("LOCALIZER")))
    error = refusal(tmp_path / "p")
    assert error.reason == "localizer"
    assert f"1 of 4 images with ImageType LOCALIZER: {files[0].name}" in str(error)
    write_source(tmp_path / "p" / "scout", scan(SMALL), SeriesNumber=2, **image_type("LOCALIZER"))
    assert refusal(tmp_path / "p").reason == "localizer"
    files[0].unlink()
    np.testing.assert_array_equal(read_volume(tmp_path / "p").array, scan(SMALL)[:, :, 1:])


@pytest.mark.parametrize(
    ("words", "kind", "left"),
    [
        ("phase", ImageKind("phase"), ""),
        ("AX T2 te=90 MAGNITUDE", ImageKind("magnitude", te=90), "AX T2"),
        ("b=1000", ImageKind(b=1000), ""),
        ("TI = 800 ms", ImageKind(ti=800), ""),
        ("1.2.3.4", ImageKind(), "1.2.3.4"),
        ("phases, web=3, realist", ImageKind(), "phases web=3 realist"),
        ("other b unknown", ImageKind("other", b=math.inf), ""),
        ("ax TI unknown t1 ADC", ImageKind("adc", ti=math.inf), "ax t1"),
        ("component unknown", ImageKind("component unknown"), ""),
        ("unknown tie", ImageKind(), "unknown tie"),
    ],
)
def test_words_for_kinds_are_read(words: str, kind: ImageKind, left: str) -> None:
    assert parse_kind(words) == (kind, left)


def test_splitting_keeps_every_image_once() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        kinds = [
            ImageKind(
                str(rng.choice(["", "magnitude", "phase"])), *(float(rng.choice([0, 1, 1.005, 5])) for _ in range(3))
            )
            for _ in range(20)
        ]
        groups = split_kinds(kinds)
        assert sorted(place for group in groups for place in group.places) == list(range(20))
        assert len({group.words for group in groups}) == len(groups)


@pytest.mark.parametrize(
    "name", ["magnitude and phase", "M_FFE and PHASE MAP", "ComplexImageComponent", "two echoes", "all at once"]
)
def test_dcm2niix_splits_classic_series_alike(name: str, tmp_path: Path) -> None:
    program = tool("dcm2niix")
    kinds, _ = CLASSIC[name]
    place = write_mixed(tmp_path / "s", kinds, arrays(len(kinds)))
    (tmp_path / "out").mkdir()
    subprocess.run([program, "-o", tmp_path / "out", place], check=True, capture_output=True)
    shapes = [read_volume(path).array.shape for path in (tmp_path / "out").glob("*.nii")]
    assert shapes == [SMALL] * len(find_series(place))


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["remind022_T1c", "remind022_T2", "ge_ct_head_tilted"])
def test_real_series_stay_whole(name: str) -> None:
    (series,) = find_series(REAL / "dicom" / name)
    assert series.apart == "" and series.images == len(series.files)


def test_series_of_pydicom_stay_whole() -> None:
    series = find_series(Path(pydicom.__file__).parent / "data" / "test_files")
    assert len(series) > 20 and {one.apart for one in series} == {""}
