"""The page of `chiasm view` in a real browser: volumes of several grids show one place in the world."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from chiasm.reports.case_page import SCRIPT
from chiasm.reports.pages import render_page
from chiasm.reports.view import view
from conftest import Opened
from test_pages_niivue import WATCH, number, world_shown

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (files("chiasm") / SCRIPT).is_file(), reason="NiiVue's script was not fetched at install"),
]


def grid(spacing: tuple[float, float, float], degrees: float, origin: tuple[float, float, float]) -> np.ndarray:
    turn = np.deg2rad(degrees)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag((-1.0, 1.0, 1.0)) * spacing  # the first axis runs to the left
    affine[:3, 3] = origin
    return affine


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, open_page: Callable[..., Opened]) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("view")
    rng = np.random.default_rng(2)
    grids = {
        "wide": ((40, 44, 30), grid((2.0, 2.0, 2.0), 0, (38, -44, -30))),
        "tilted": ((26, 22, 16), grid((2.5, 3.0, 3.5), 24, (25, -38, -25))),
        "small": ((12, 12, 12), grid((1.0, 1.0, 1.0), 0, (6, -6, -6))),
    }
    paths = {}
    for name, (shape, affine) in grids.items():
        array = (rng.normal(100, 20, shape) + (200 if name == "tilted" else 0)).astype(np.float32)
        nib.save(nib.Nifti1Image(array, affine), folder / f"{name}.nii.gz")
        paths[name] = folder / f"{name}.nii.gz"
    page = view(list(paths.values()), folder / "view.html").page
    opened = open_page(page, first=WATCH)
    opened.page.wait_for_selector("html[data-ready]", timeout=200_000)
    return {"files": {name: nib.load(path) for name, path in paths.items()}, "path": page} | vars(opened)


def values_shown(page: Any) -> list[str]:
    return [page.inner_text(f'[data-pane="{pane}"] figcaption output') for pane in range(3)]


def click(page: Any, pane: int, across: float, down: float) -> None:
    box = page.locator(f"#pane-{pane}").bounding_box()
    page.mouse.click(box["x"] + across * box["width"], box["y"] + down * box["height"])


def nearest(file: Any, mm: np.ndarray) -> tuple[float | None, float]:
    """The value of a file at the voxel nearest to a place, and by how many voxels the next one is farther away."""
    place = (np.linalg.inv(file.affine) @ (*mm, 1))[:3]
    voxel = np.rint(place).astype(int)
    margin = float((0.5 - np.abs(place - voxel)).min())
    if (voxel < 0).any() or (voxel >= file.shape).any():
        return None, margin
    return float(file.dataobj[tuple(voxel)]), margin


def test_panes_say_that_they_load_and_are_called_as_the_files(shown: dict[str, Any]) -> None:
    page = shown["page"]
    assert page.evaluate("window.loadingSeen") == [f"{pane}: loading …" for pane in range(3)]
    assert page.locator(".loading").count() == 0
    titles = [page.inner_text(f'[data-pane="{pane}"] strong') for pane in range(3)]
    assert titles == ["wide.nii.gz", "tilted.nii.gz", "small.nii.gz"]


def test_each_pane_shows_the_value_of_its_file_at_one_place_of_the_world(shown: dict[str, Any]) -> None:
    page = shown["page"]
    checked = 0
    for pane, across, down in ((0, 0.5, 0.5), (1, 0.5, 0.45), (0, 0.42, 0.55), (2, 0.5, 0.4), (1, 0.56, 0.5)):
        click(page, pane, across, down)
        page.keyboard.press("PageUp")
        mm = world_shown(page)
        for file, text in zip(shown["files"].values(), values_shown(page), strict=True):
            value, margin = nearest(file, mm)
            if margin < 0.08:  # the place is shown to 0.1 mm, which may decide between two voxels
                continue
            checked += 1
            assert (text == "outside") == (value is None), (pane, mm)
            assert value is None or number(text) == pytest.approx(value, abs=0.06), (pane, mm)
    assert checked >= 9


def test_the_cursor_of_each_pane_that_reaches_the_place_stands_there(shown: dict[str, Any]) -> None:
    page = shown["page"]
    for pane in (2, 0):  # in the middle of the smallest volume, then moved by a voxel of the largest
        click(page, pane, 0.5, 0.5)
        for key in ("ArrowLeft", "PageDown", "PageDown"):
            page.keyboard.press(key)
        assert "outside" not in values_shown(page)
        mm = world_shown(page)
        for other in range(3):
            cursor = f"(one => Array.from(one.frac2mm(one.scene.crosshairPos, 0, true)))(chiasm.panes[{other}].viewer)"
            assert np.abs(np.array(page.evaluate(cursor)[:3]) - mm).max() < 0.06, (pane, other)


def test_a_pane_whose_volume_does_not_reach_the_place_says_outside(shown: dict[str, Any]) -> None:
    page = shown["page"]
    click(page, 0, 0.3, 0.3)
    values = values_shown(page)
    assert values[2] == "outside" and values[0] != "outside"


def cursors_on_screen(page: Any) -> np.ndarray:
    """Where the cursor of each pane stands on its canvas, in shares of breadth and height; NaN where it is not seen."""
    viewers = "chiasm.panes.map(({ viewer }) => [viewer.frac2canvasPos(viewer.scene.crosshairPos), viewer.canvas])"
    shares = "([at, canvas]) => at ? [at[0] / canvas.width, at[1] / canvas.height] : [NaN, NaN]"
    return np.array([[float(share) for share in one] for one in page.evaluate(f"{viewers}.map({shares})")])


def test_a_zoom_keeps_the_cursor_of_each_pane_where_it_is_however_large_its_volume(shown: dict[str, Any]) -> None:
    page = shown["page"]
    click(page, 2, 0.55, 0.4)  # which all three volumes reach
    before = cursors_on_screen(page)
    for _ in range(5):
        page.keyboard.press("+")
    np.testing.assert_allclose(cursors_on_screen(page), before, atol=0.01)
    click(page, 0, 0.53, 0.47)  # a place that a zoomed pane did not show
    page.keyboard.press("ArrowLeft")
    seen = cursors_on_screen(page)
    assert ((seen >= 0) & (seen <= 1)).all()
    for _ in range(5):
        page.keyboard.press("-")
    pans = page.evaluate("chiasm.panes.map(({ viewer }) => Array.from(viewer.scene.pan2Dxyzmm))")
    np.testing.assert_allclose(pans, [[0, 0, 0, 1]] * 3, atol=1e-6)


def test_each_pane_has_a_window_of_its_own_until_all_are_given_one(shown: dict[str, Any]) -> None:
    page = shown["page"]

    def windows() -> list[list[float]]:
        images = "chiasm.panes.map(pane => pane.viewer.volumes[0])"
        found: list[list[float]] = page.evaluate(f"{images}.map(image => [image.cal_min, image.cal_max])")
        return found

    before = windows()
    assert before[0] != before[1]
    page.locator('[data-pane="1"] .level').fill("250")
    page.locator('[data-pane="1"] .width').fill("100")
    page.keyboard.press("Tab")
    assert windows() == [before[0], [200, 300], before[2]]
    page.click("#same")
    assert windows() == [[200, 300]] * 3
    page.click("#reset")
    assert windows() == before


def test_the_page_asks_for_nothing_and_complains_of_nothing(shown: dict[str, Any]) -> None:
    page = shown["page"]
    for key in ("m", "c", "s", "a", "r", "r"):
        page.keyboard.press(key)
    assert page.get_attribute("#radiological", "aria-pressed") == "true"
    assert shown["errors"] == []
    assert [url for url in shown["requests"] if not url.startswith(("blob:", "data:"))] == [shown["path"].as_uri()]


@pytest.mark.parametrize(
    ("template", "content"),
    [
        ("registration.html", {"scores": {"mean displacement": "moved by 1.2 mm, " * 9}, "worse": False, "rows": []}),
        ("registered.html", {"rows": [{"case": "p1", "page": "", "cells": ["t2 on t1", *"123456"], "worse": False}]}),
    ],
)
def test_the_tables_of_registrations_keep_within_the_width_of_a_phone(
    template: str, content: dict[str, Any], tmp_path: Path, open_page: Callable[..., Opened]
) -> None:
    page = tmp_path / "page.html"
    page.write_text(render_page(template, {"kind": "registration", "title": "Aligned?", "asked": "Rigid.", **content}))
    opened = open_page(page)
    opened.page.set_viewport_size({"width": 390, "height": 800})
    assert opened.page.evaluate("document.querySelector('table').scrollWidth") > 390
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 390
