"""Packed pages that wait in a folder: what comes back is what went in, and damage is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chiasm.errors import ChiasmError, RunError
from chiasm.reports.case_page import CasePage, finish_page, pack_page
from chiasm.reports.packed_pages import load_page, save_page
from chiasm.reports.pictures import HEAD, OUTLINE, WIDTH, write_picture
from full_disk import no_file_above


def a_page() -> CasePage:
    rng = np.random.default_rng(0)
    mask = np.zeros((24, 20, 16), bool)
    mask[4:20, 3:17, 2:14] = True
    real, noise = rng.normal(3, 1, (2, *mask.shape)).astype(np.float32)
    lesion = np.zeros_like(mask)
    lesion[8:12, 8:12, 6:9] = True
    return CasePage(
        case="P1",
        title="P1: t1 to t2",
        source=real * 100,
        real=real,
        synthetic=real + noise / 10,
        expected_error=np.abs(noise) / 10,
        mask=mask,
        lesion=lesion,
        affine=np.diag([-1.0, -1.0, 2.0, 1.0]),
        unit="SD",
        window=(0.0, 6.0),
    )


def test_a_page_that_waited_is_the_page(tmp_path: Path) -> None:
    packed = pack_page(a_page())
    save_page(tmp_path / "P1.safetensors", packed)
    back = load_page(tmp_path / "P1.safetensors")
    assert finish_page(back, (), None, ("P2.html", "P2")) == finish_page(packed, (), None, ("P2.html", "P2"))
    assert back.cut.looks == packed.cut.looks and back.cut.planes == packed.cut.planes
    assert back.cut.errors.keys() == {
        f"{where} {kind}" for where in ("lesions", "outside lesions") for kind in ("expected", "true")
    }
    for name, errors in packed.cut.errors.items():
        np.testing.assert_array_equal(back.cut.errors[name], errors)


def test_images_in_another_unit_make_the_same_page(tmp_path: Path) -> None:
    page = a_page()
    assert page.real is not None and page.expected_error is not None
    scaled = replace(
        page, real=page.real * 4, synthetic=page.synthetic * 4, expected_error=page.expected_error * 4, scale=4.0
    )
    one, other = (finish_page(pack_page(each), (), None, None) for each in (page, scaled))
    assert one == other


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    path = tmp_path / "P1.safetensors"
    save_page(path, pack_page(a_page()))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"P1\.safetensors") as caught:
        load_page(path)
    assert caught.value.reason == "damaged"
    with pytest.raises(RunError, match="cannot be read"):
        load_page(tmp_path / "gone.safetensors")


def test_a_picture_shows_each_column_beside_the_other_with_lesions_outlined(tmp_path: Path) -> None:
    cut = pack_page(a_page()).cut
    path = write_picture(tmp_path / "P1.png", cut)
    with Image.open(path) as image:
        drawn = np.asarray(image)
    plane = next(plane for plane in cut.planes if plane.name == "axial")
    height = round(WIDTH * plane.size[1] / plane.size[0])
    assert drawn.shape == (HEAD + height, WIDTH * len(cut.looks), 3)
    outlined = (drawn == OUTLINE).all(axis=-1)[HEAD:].reshape(height, len(cut.looks), WIDTH)
    lesion = cut.slices["axial lesion"]
    for column in range(len(cut.looks)):
        rows, columns = np.nonzero(outlined[:, column])
        places = rows * lesion.shape[0] // height, columns * lesion.shape[1] // WIDTH
        assert len(rows) > 50 and lesion[places].all() and not outlined[:, column].all()
    assert write_picture(tmp_path / "again.png", cut).read_bytes() == path.read_bytes()


def test_a_disk_that_takes_no_more_is_named(tmp_path: Path) -> None:
    packed = pack_page(a_page())
    with no_file_above(1000), pytest.raises(ChiasmError, match="cannot be written: File too large"):
        save_page(tmp_path / "P1.safetensors", packed)
