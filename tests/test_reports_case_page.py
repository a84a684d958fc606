"""The page of one case: what stands in it, how large it is, and what it says where something is missing."""

from __future__ import annotations

import base64
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from chiasm.evaluation.rows import Row
from chiasm.reports import case_page as case_pages
from chiasm.reports.case_page import MOST_BYTES, CasePage, pack_page, write_case_page
from chiasm.reports.case_scores import CaseScore, against_cohort
from chiasm.reports.case_volumes import nifti_start
from chiasm.reports.gallery import show_gallery
from chiasm.volumes import Geometry

SHAPE = (40, 36, 20)


def affine_of(spacing: tuple[float, float, float]) -> np.ndarray:
    """Axes run left, back and up, tilted a little."""
    turn = np.deg2rad(11)
    about_z = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ np.diag((-1.0, -1.0, 1.0)) * spacing
    affine[:3, 3] = (50, 70, -20)
    return affine


def a_case(**changes: Any) -> CasePage:
    rng = np.random.default_rng(0)
    i, j, k = np.indices(SHAPE)
    mask = (abs(i - 18) < 9) & (abs(j - 20) < 8) & (abs(k - 9) < 5)
    real = np.where(mask, rng.normal(2, 0.5, SHAPE), 0).astype(np.float32)
    synthetic = np.where(mask, real + rng.normal(0, 0.1, SHAPE), 0).astype(np.float32)
    synthetic[15, 22, 8] = real[15, 22, 8] + 2.5
    lesion = np.zeros(SHAPE, bool)
    lesion[20:23, 18:22, 7:9] = True
    lesion[11:13, 15:18, 10:12] = True
    expected_error = np.where(mask, 0.1, 0).astype(np.float32)
    expected_error[24:26, 25:27, 11:13] = 0.7
    page = CasePage(
        case="case-1",
        title="case-1",
        source=(100 + i + 2 * j).astype(np.float32),
        real=real,
        synthetic=synthetic,
        expected_error=expected_error,
        mask=mask,
        lesion=lesion,
        affine=affine_of((2.0, 2.0, 3.0)),
        unit="SD",
        window=(0.0, 4.0),
    )
    return replace(page, **changes)


needs_viewer = pytest.mark.skipif(
    not case_pages.viewer_script()[0], reason="NiiVue's script was not fetched at install"
)


def volumes_in(text: str) -> dict[str, Any]:
    found = re.findall(r'<script type="text/plain" id="volume-(\w+)">([^<]+)<', text)
    return {
        name: nib.Nifti1Image.from_bytes(whole(gzip.decompress(base64.b64decode(content)))) for name, content in found
    }


def whole(content: bytes) -> bytes:
    """Put the bytes of 16-bit values together, as the page's script does."""
    head, body = content[:352], np.frombuffer(content[352:], np.uint8)
    if nib.Nifti1Header(head[:348])["bitpix"] != 16:
        return content
    return head + np.ascontiguousarray(body.reshape(2, -1).T).tobytes()


def settings_in(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="settings">(.*?)</script>', text)
    assert found
    settings: dict[str, Any] = json.loads(found[1])
    return settings


@needs_viewer
def test_volumes_in_the_page_are_the_originals_cropped_each_voxel_at_its_place(tmp_path: Path) -> None:
    page = a_case()
    text = write_case_page(tmp_path / "case.html", page).read_text()
    settings = settings_in(text)
    to_voxel = np.linalg.inv(page.affine)
    found = volumes_in(text)
    assert set(found) == {"source", "real", "synthetic", "expected_error", "regions"}
    for name in ("source", "real", "synthetic", "expected_error"):
        image, original = found[name], getattr(page, name)
        assert np.prod(image.shape) < np.prod(SHAPE) / 2
        assert image.dataobj.get_unscaled().dtype == np.int16
        indices = np.indices(image.shape).reshape(3, -1)
        places = np.rint(nib.affines.apply_affine(to_voxel @ image.affine, indices.T)).astype(int)
        there = original[tuple(places.T)]
        shown = np.asarray(image.dataobj)[tuple(indices)]
        assert np.abs(shown - there).max() <= settings["steps"][name] / 2 * 1.001, name
    regions = np.asarray(found["regions"].dataobj)
    assert np.count_nonzero(regions & 1) == np.count_nonzero(page.mask)  # nothing of the mask is cut off
    assert np.count_nonzero(regions & 2) == np.count_nonzero(page.lesion)


@needs_viewer
def test_jumps_lead_to_the_worst_voxel_the_largest_expected_cluster_and_each_lesion(tmp_path: Path) -> None:
    page = a_case()
    text = write_case_page(tmp_path / "case.html", page).read_text()
    image = volumes_in(text)["source"]
    places = {}
    for jump in settings_in(text)["jumps"]:
        world = image.affine @ (*jump["voxel"], 1)
        places[jump["label"]] = tuple(np.rint(np.linalg.inv(page.affine) @ world)[:3].astype(int))
    assert list(places) == ["Largest difference", "Largest expected error", "Lesion 1", "Lesion 2"]
    assert places["Largest difference"] == (15, 22, 8)
    assert page.expected_error is not None and page.expected_error[places["Largest expected error"]] == np.float32(0.7)
    assert 20 <= places["Lesion 1"][0] < 23 and 11 <= places["Lesion 2"][0] < 13  # the larger is the first


@needs_viewer
def test_a_noisy_volume_too_large_for_a_page_is_rounded_then_thinned_until_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(case_pages, "MOST_BYTES", 1_620_000)  # some of it for the viewer
    rng = np.random.default_rng(1)
    big = {name: rng.normal(2, 1, (80, 80, 40)).astype(np.float32) for name in ("source", "real", "synthetic")}
    page = a_case(**big, expected_error=None, lesion=None, mask=np.ones((80, 80, 40), bool))
    made = write_case_page(tmp_path / "case.html", page)
    assert made.stat().st_size < 1_620_000
    text = made.read_text()
    found = volumes_in(text)["source"]
    strides = re.search(r"one voxel in (\d) × (\d) × (\d) is kept", settings_in(text)["packing"])
    assert strides and [int(by) for by in strides.groups()] == [2, 2, 1]  # 2 mm, 2 mm and 3 mm apart
    assert found.shape == (40, 40, 40)
    places = np.rint(np.linalg.inv(page.affine) @ found.affine @ (3, 5, 7, 1))[:3].astype(int)
    step = settings_in(text)["steps"]["source"]
    assert np.asarray(found.dataobj)[3, 5, 7] == pytest.approx(page.source[tuple(places)], abs=step / 2 * 1.001)
    whole = write_case_page(tmp_path / "whole.html", replace(page, whole=True))
    assert volumes_in(whole.read_text())["source"].shape == (80, 80, 40)


@needs_viewer
@pytest.mark.slow
def test_a_head_at_one_millimetre_stays_below_ten_megabytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    shape = (160, 190, 150)
    i, j, k = np.ogrid[:160, :190, :150]
    mask = ((i - 80) / 70) ** 2 + ((j - 95) / 85) ** 2 + ((k - 75) / 65) ** 2 < 1
    head = np.where(mask, rng.normal(2, 0.6, shape), 0).astype(np.float32)
    page = a_case(source=head, real=head, synthetic=head * 0.9, expected_error=head / 9, mask=mask, lesion=None)
    assert write_case_page(tmp_path / "case.html", page).stat().st_size < MOST_BYTES < 10_000_000


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_case_page(tmp_path / name, a_case()).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_without_the_viewers_script_the_page_shows_still_slices_and_says_how_to_get_the_panes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(case_pages, "SCRIPT", "reports/static/not-fetched.js")
    text = write_case_page(tmp_path / "case.html", a_case()).read_text()
    assert "3D panes are missing" in text and "pip install" in text
    assert text.count("data:image/png") >= 10 and "<canvas" not in text and "volume-source" not in text
    assert "not for diagnostic use" in text


@needs_viewer
def test_what_a_case_lacks_is_absent_from_its_page(tmp_path: Path) -> None:
    text = write_case_page(tmp_path / "case.html", a_case(real=None, expected_error=None, lesion=None)).read_text()
    for absent in (
        "pane-real",
        "pane-difference",
        "pane-expected_error",
        'id="flicker"',
        'id="outline"',
        '<button type="button" data-level',
    ):
        assert absent not in text
    assert "This case has no real image" in text
    assert 'data-level="40"' in write_case_page(tmp_path / "ct.html", a_case(unit="HU")).read_text()


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    nasty = '</script><b onmouseover="x">'
    page = a_case(case=nasty, title=nasty, source_name=nasty, warnings=(nasty,), following=("next.html", nasty))
    text = write_case_page(tmp_path / "case.html", page).read_text()
    assert "<b onmouseover" not in text and text.count("<script") == text.count("</script>")


def row(case: str, region: str, value: float, *, method: str = "ours", metric: str = "mae", seed: int = 0) -> Row:
    return Row(case, 0, seed, method, region, metric, value, "SD", "chiasm")


def test_a_case_stands_beside_every_case_of_the_method_and_single_lesions_do_not(tmp_path: Path) -> None:
    rows = [row(case, "mask", value) for case, value in (("a", 1.0), ("b", 3.0), ("c", 5.0))]
    rows += [row("b", "mask", 4.0, seed=1), row("b", "lesion-1", 9.0), row("b", "mask", 0.1, method="naive")]
    rows += [row("b", "lesion-edge", 2.0), row("c", "mask", float("nan"), seed=1)]
    figures = against_cohort(rows, "b", "ours")
    assert figures == (
        CaseScore("mask", "mae", 3.5, "SD", (1.0, 3.5, 5.0)),
        CaseScore("lesion-edge", "mae", 2.0, "SD", (2.0,)),
    )
    text = write_case_page(tmp_path / "case.html", a_case(scores=figures)).read_text()
    assert "rank 2 of 3" in text and "range 1.00 to 5.00, median 3.50, this case 3.50" in text


def test_volumes_of_two_shapes_or_a_window_that_does_not_rise_are_refused() -> None:
    with pytest.raises(ValueError, match="share one shape"):
        a_case(real=np.zeros((3, 3, 3), np.float32))
    with pytest.raises(ValueError, match="must rise"):
        a_case(window=(2.0, 2.0))
    with pytest.raises(ValueError, match="4 x 4"):
        a_case(affine=np.eye(3))


@needs_viewer
def test_a_spread_of_several_models_has_a_pane_and_a_range_of_its_own(tmp_path: Path) -> None:
    page = a_case()
    spread = np.where(page.mask, 0.02, 0).astype(np.float32)
    text = write_case_page(tmp_path / "case.html", replace(page, spread=spread)).read_text()
    settings = settings_in(text)
    assert settings["names"]["spread"] == "Spread of the models" and settings["spreadRange"] == 0.02 < settings["range"]
    shown = np.asarray(volumes_in(text)["spread"].dataobj)
    assert shown.max() == pytest.approx(0.02, rel=0.01) and 'id="pane-spread"' in text
    assert "pane-spread" not in write_case_page(tmp_path / "without.html", page).read_text()


def test_the_start_of_a_volume_of_a_page_is_what_nibabel_writes() -> None:
    for dtype, slope in ((np.int16, 0.05), (np.uint8, 1.0), (np.float32, 1.0)):
        geometry = Geometry((5, 6, 7), affine_of((0.9, 1.1, 2.5)))
        header = nib.Nifti1Header()
        header.set_data_dtype(dtype)
        header.set_data_shape(geometry.shape)
        header.set_xyzt_units("mm")
        header.set_sform(geometry.affine, code=1)
        header.set_qform(None, code=0)
        header["pixdim"][1:4] = geometry.spacing_mm
        header.set_data_offset(352)
        header["scl_slope"], header["scl_inter"], header["magic"] = slope, 0.0, b"n+1"
        assert nifti_start(geometry, np.dtype(dtype), slope) == header.binaryblock + bytes(4)


def test_the_outline_of_a_lesion_is_the_contour_that_matplotlib_draws() -> None:
    from matplotlib.figure import Figure
    from scipy.ndimage import gaussian_filter

    for seed in range(8):
        noise = gaussian_filter(np.random.default_rng(seed).standard_normal((40, 50)), 2)
        page = a_case()
        lesion = np.zeros(SHAPE, bool)
        lesion[..., 9] = (noise > 0.05)[:40, :36]
        cut = pack_page(replace(page, lesion=lesion)).cut
        plane = show_gallery([cut], None)["cases"][0]["planes"][0]
        assert re.fullmatch(r"axial, slice \d+ of \d+ from below", plane["place"])
        shown = plane["outline"]
        drawn = cut.slices["axial lesion"]
        contour = Figure().subplots().contour(np.pad(drawn, 1).astype(np.float32), levels=[0.5])
        polygons = [polygon for path in contour.get_paths() for polygon in path.to_polygons(closed_only=False)]
        expected = ("M" + " ".join(f"{x - 0.5:.1f},{y - 0.5:.1f}" for x, y in polygon) for polygon in polygons)
        assert drawn.any() and shown == "".join(expected)
