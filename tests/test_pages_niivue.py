"""The case page in a real browser: panes that draw, cursors that are linked, values that are those of the files."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from chiasm.reports.case_page import SCRIPT, CasePage, write_case_page
from chiasm.reports.case_scores import CaseScore
from conftest import Opened

STEP = 1.0  # the page rounds these volumes to whole numbers
NAMES = ("source", "real", "synthetic", "difference", "expected_error")

#: Notes what the panes say when they are first visible, of which the page itself keeps nothing.
WATCH = """
const look = setInterval(() => {
  const visible = [...document.querySelectorAll(".pane .loading")].filter(one => one.checkVisibility());
  if (!visible.length) return;
  window.loadingSeen = visible.map(one => `${one.closest(".pane").dataset.pane}: ${one.textContent}`);
  clearInterval(look);
}, 5);
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (files("chiasm") / SCRIPT).is_file(), reason="NiiVue's script was not fetched at install"),
]


def tilted() -> np.ndarray:
    """An oblique, anisotropic affine whose first axis runs to the left and whose last two are swapped."""
    turn, tip = np.deg2rad(14), np.deg2rad(-9)
    about_z = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(tip), -np.sin(tip)], [0, np.sin(tip), np.cos(tip)]])
    storage = np.array([[-1, 0, 0], [0, 0, 1], [0, 1, 0]])  # (I, J, K) runs left, up, front
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ storage * (1.5, 4.0, 2.0)
    affine[:3, 3] = (61.0, -48.0, -37.5)
    return affine


@pytest.fixture(scope="module")
def page_of_a_case(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two originals as files, uncropped, and the page made of them."""
    folder = tmp_path_factory.mktemp("case")
    rng = np.random.default_rng(4)
    shape, affine = (60, 18, 52), tilted()
    i, j, k = np.indices(shape)
    mask = ((i - 28) / 20) ** 2 + ((j - 9) / 6) ** 2 + ((k - 27) / 18) ** 2 < 1
    real = np.where(mask, 40 + i + 3 * j - k + rng.integers(-9, 9, shape), -1000).astype(np.float32)
    synthetic = np.where(mask, real + rng.integers(-20, 20, shape), -1000).astype(np.float32)
    synthetic[20:23, 8:11, 28:31] = 300
    lesion = mask & (abs(i - 34) < 4) & (abs(j - 9) < 2) & (abs(k - 22) < 4)
    volumes = {
        "source": (1000 - 2 * i + 5 * j + k).astype(np.float32),
        "real": real,
        "synthetic": synthetic,
        "expected_error": np.where(mask, 5 + abs(k - 27), 0).astype(np.float32),
    }
    for name, array in volumes.items():
        nib.save(nib.Nifti1Image(array, affine), folder / f"{name}.nii.gz")
    made = write_case_page(
        folder / "cases" / "case.html",
        CasePage(
            case="tilted",
            title="tilted",
            **volumes,
            mask=mask,
            lesion=lesion,
            affine=affine,
            unit="HU",
            window=(-100.0, 300.0),
            scores=(CaseScore("mask", "mae", 10.0, "HU", (8.0, 10.0, 12.0)),),
            report="../report.html",
        ),
    )
    files_of = {name: nib.load(folder / f"{name}.nii.gz") for name in volumes}
    return {"path": made, "files": files_of, "affine": affine, "mask": mask, "lesion": lesion}


@pytest.fixture(scope="module")
def shown(page_of_a_case: dict[str, Any], open_page: Callable[..., Opened]) -> dict[str, Any]:
    opened = open_page(page_of_a_case["path"], first=WATCH)
    opened.page.wait_for_selector("html[data-ready]", timeout=120_000)
    return page_of_a_case | vars(opened)


def test_panes_say_that_they_load_until_their_volumes_are_there(shown: dict[str, Any]) -> None:
    page = shown["page"]
    assert page.evaluate("window.loadingSeen") == [f"{name}: loading …" for name in NAMES]
    assert page.locator(".loading").count() == 0


def number(text: str) -> float:
    return float(re.sub(r"[^\d.+-]", "", text.replace("−", "-")))


def values_shown(page: Any) -> dict[str, float]:
    return {name: number(page.inner_text(f"#value-{name}")) for name in NAMES}


def world_shown(page: Any) -> np.ndarray:
    found = re.findall(r"([LRPAIS]) ([\d.]+)", page.inner_text("#world"))
    return np.array([float(size) * (-1 if side in "LPI" else 1) for side, size in found])


def cursor_of(page: Any, name: str) -> list[float]:
    found: list[float] = page.evaluate(f"Array.from(chiasm.panes.{name}.scene.crosshairPos)")
    return found


def pixels(page: Any, name: str) -> np.ndarray:
    """Draw a pane anew and read its canvas, shape (rows, columns, 4)."""
    from matplotlib.image import imread

    address = page.evaluate(
        f"(pane => {{ pane.drawScene(); return pane.canvas.toDataURL('image/png'); }})(chiasm.panes.{name})"
    )
    return np.asarray(imread(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def click(page: Any, name: str, across: float, down: float) -> None:
    box = page.locator(f"#pane-{name}").bounding_box()
    page.mouse.click(box["x"] + across * box["width"], box["y"] + down * box["height"])


def test_every_pane_draws_something_of_its_own(shown: dict[str, Any]) -> None:
    drawn = {name: pixels(shown["page"], name)[..., :3] for name in NAMES}
    for name, image in drawn.items():
        coloured = float((np.ptp(image, axis=2) > 0.3).mean())  # crosshair, outline and letters are little
        assert (coloured > 0.05) == (name in ("difference", "expected_error")), (name, coloured)


def test_values_under_the_cursor_are_those_of_the_uncropped_files_at_that_world_point(shown: dict[str, Any]) -> None:
    page = shown["page"]
    to_voxel = np.linalg.inv(shown["affine"])
    seen = set()
    for name, across, down in (
        ("source", 0.48, 0.5),
        ("real", 0.4, 0.6),
        ("difference", 0.6, 0.45),
        ("source", 0.55, 0.4),
    ):
        click(page, name, across, down)
        page.keyboard.press("PageUp")
        mm = world_shown(page)
        index = to_voxel @ (*mm, 1)
        voxel = tuple(np.rint(index[:3]).astype(int))
        assert np.abs(index[:3] - voxel).max() < 0.06  # the cursor stands on a voxel's centre; mm are shown to 0.1
        seen.add(voxel)
        true = {key: float(file.dataobj[voxel]) for key, file in shown["files"].items()}
        found = values_shown(page)
        for key in ("source", "real", "synthetic", "expected_error"):
            assert found[key] == pytest.approx(true[key], abs=STEP / 2), (key, voxel)
        assert found["difference"] == pytest.approx(true["synthetic"] - true["real"], abs=STEP)
    assert len(seen) == 4


def test_difference_and_expected_error_share_one_range(shown: dict[str, Any]) -> None:
    ranges = {
        name: shown["page"].evaluate(
            f"[chiasm.panes.{name}.volumes[0].cal_min, chiasm.panes.{name}.volumes[0].cal_max]"
        )
        for name in NAMES
    }
    mask, volumes = shown["mask"], {name: file.get_fdata()[shown["mask"]] for name, file in shown["files"].items()}
    most = max(
        np.quantile(abs(volumes["synthetic"] - volumes["real"]), 0.995), np.quantile(volumes["expected_error"], 0.995)
    )
    assert mask.any() and ranges["difference"] == [-ranges["expected_error"][1], ranges["expected_error"][1]]
    assert ranges["expected_error"][0] == 0 and most <= ranges["expected_error"][1] <= 1.1 * most
    assert ranges["real"] == ranges["synthetic"] == [-100, 300]


def test_a_click_in_one_pane_moves_the_cursor_of_all(shown: dict[str, Any]) -> None:
    page = shown["page"]
    before = cursor_of(page, "expected_error")
    click(page, "real", 0.45, 0.55)
    assert cursor_of(page, "expected_error") != before
    for name in NAMES:
        assert cursor_of(page, name) == pytest.approx(cursor_of(page, "real"), abs=1e-5)


def test_a_zoom_keeps_the_cursor_where_it_is_on_the_screen(shown: dict[str, Any]) -> None:
    page = shown["page"]
    click(page, "real", 0.4, 0.45)
    places = "Object.values(chiasm.panes).map(one => Array.from(one.frac2canvasPos(one.scene.crosshairPos)))"
    before = np.array(page.evaluate(places))
    for key in ("+", "+", "+"):
        page.keyboard.press(key)
    assert page.evaluate("chiasm.panes.real.scene.pan2Dxyzmm[3]") == pytest.approx(1.25**3)
    np.testing.assert_allclose(np.array(page.evaluate(places)), before, atol=2)
    for key in ("-", "-", "-"):
        page.keyboard.press(key)
    np.testing.assert_allclose(page.evaluate("Array.from(chiasm.panes.real.scene.pan2Dxyzmm)"), [0, 0, 0, 1], atol=1e-6)


def test_a_jump_moves_the_cursor_of_all_to_the_place_it_names(shown: dict[str, Any]) -> None:
    page = shown["page"]
    for label, where in (("Lesion 1", shown["lesion"]), ("Largest difference", None)):
        page.get_by_role("button", name=label).click()
        voxel = tuple(np.rint(np.linalg.inv(shown["affine"]) @ (*world_shown(page), 1))[:3].astype(int))
        if where is None:
            difference = np.where(
                shown["mask"], abs(shown["files"]["synthetic"].get_fdata() - shown["files"]["real"].get_fdata()), -1
            )
            assert voxel == np.unravel_index(difference.argmax(), difference.shape)
        else:
            assert where[voxel]
        for name in NAMES:
            assert cursor_of(page, name) == pytest.approx(cursor_of(page, "source"), abs=1e-6)


def test_the_patients_right_is_on_the_left_until_the_convention_is_switched_and_so_is_the_front(
    shown: dict[str, Any],
) -> None:
    page = shown["page"]
    page.get_by_role("button", name="Largest difference").click()  # inside the bright block, on the patient's right
    page.click("[data-level='35']")  # a narrow window: only the block is white
    page.keyboard.press("l")  # no outline in the picture

    def place_of_the_block() -> float:
        image = pixels(page, "synthetic")[..., :3]
        minus = pixels(page, "real")[..., :3]
        columns = np.flatnonzero((np.abs(image - minus).sum(axis=2) > 0.5).sum(axis=0) > 4)
        return float(columns.mean()) / image.shape[1]

    assert world_shown(page)[0] > (shown["affine"] @ (28, 9, 27, 1))[0]  # right of the mask's middle
    left_on_screen = place_of_the_block() < 0.5
    page.keyboard.press("s")
    in_front = place_of_the_block()  # the block lies in front of the middle
    page.keyboard.press("a")
    page.keyboard.press("r")
    assert page.get_attribute("#radiological", "aria-pressed") == "false"
    after = place_of_the_block() < 0.5
    page.keyboard.press("r")
    page.keyboard.press("l")
    page.keyboard.press("w")
    assert left_on_screen and not after and in_front < 0.48


def test_flicker_swaps_the_picture_of_one_pane_and_back_and_never_the_value(shown: dict[str, Any]) -> None:
    page = shown["page"]
    values = values_shown(page)
    real, synthetic = pixels(page, "real"), pixels(page, "synthetic")
    assert np.abs(real - synthetic).mean() > 0.002
    page.keyboard.press("f")
    assert np.abs(pixels(page, "synthetic") - real).mean() < 1e-6
    assert "Real" in page.inner_text("[data-pane=synthetic] strong")
    assert values_shown(page) == values
    page.keyboard.press("f")
    assert np.abs(pixels(page, "synthetic") - synthetic).mean() < 1e-6


def test_the_outline_can_be_taken_away(shown: dict[str, Any]) -> None:
    page = shown["page"]
    page.get_by_role("button", name="Lesion 1").click()

    def yellow() -> int:
        red, green, blue = np.moveaxis(pixels(page, "real")[..., :3], -1, 0)
        return int(((red > 0.8) & (green > 0.6) & (blue < 0.4)).sum())

    assert yellow() > 30
    page.click("#outline")
    assert yellow() == 0
    page.click("#outline")
    assert yellow() > 30


def test_one_window_holds_for_real_and_synthetic_and_presets_set_it(shown: dict[str, Any]) -> None:
    page = shown["page"]
    before = pixels(page, "source")
    page.get_by_role("button", name="Subdural").click()
    for name in ("real", "synthetic"):
        image = f"chiasm.panes.{name}.volumes[0]"
        assert page.evaluate(f"[{image}.cal_min, {image}.cal_max]") == [-32.5, 182.5]
    assert page.input_value("#level") == "75" and np.array_equal(pixels(page, "source"), before)
    page.keyboard.press("w")
    assert page.evaluate("chiasm.panes.real.volumes[0].cal_max") == 300


def test_arrow_keys_move_by_one_voxel_in_the_direction_pressed(shown: dict[str, Any]) -> None:
    page = shown["page"]
    page.get_by_role("button", name="Lesion 1").click()
    page.focus("#pane-real")
    start = world_shown(page)
    for key, size in (("ArrowUp", 2.0), ("ArrowLeft", 1.5), ("PageUp", 4.0)):
        page.keyboard.press(key)
        moved = world_shown(page) - start
        assert np.linalg.norm(moved) == pytest.approx(size, abs=0.15), key
        axis = {"ArrowUp": 1, "ArrowLeft": 0, "PageUp": 2}[key]
        assert np.abs(moved).argmax() == axis and moved[axis] > 0  # front; patient's right, radiological; head
        start = world_shown(page)
    page.keyboard.press("s")
    page.keyboard.press("ArrowLeft")
    assert (world_shown(page) - start)[1] == pytest.approx(2.0, abs=0.15)  # the front is on the left
    page.keyboard.press("a")


def test_the_page_asks_for_nothing_and_complains_of_nothing(shown: dict[str, Any]) -> None:
    shown["page"].keyboard.press("m")
    shown["page"].keyboard.press("a")
    assert shown["errors"] == []
    assert [url for url in shown["requests"] if not url.startswith(("blob:", "data:"))] == [shown["path"].as_uri()]


def test_the_page_is_no_wider_than_a_phone(shown: dict[str, Any]) -> None:
    page = shown["page"]
    before = page.viewport_size
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.set_viewport_size(before)


def test_without_webgl_the_page_says_so_and_keeps_its_still_slices(
    page_of_a_case: dict[str, Any], open_page: Callable[..., Opened]
) -> None:
    page = open_page(page_of_a_case["path"], "--disable-3d-apis").page
    assert "no WebGL 2" in page.inner_text("#without")
    assert not page.is_visible("#viewer") and page.locator("#slices .slice img").first.is_visible()
