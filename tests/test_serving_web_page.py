"""The page in a real browser: a scan goes in, the panes come up with the values of the files, the job goes away."""

from __future__ import annotations

import gzip
import re
import warnings
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import nibabel as nib
import pytest

from chiasm.prediction.folders import load
from chiasm.reports.case_page import SCRIPT
from chiasm.serving.web_limits import Page
from conftest import Opened

pytest.importorskip("fastapi", reason="fastapi is not installed (pip install 'chiasm[serve]')")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (pip install 'chiasm[serve]')")

from web_client import served, write_scan

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

TOKEN = "correct-horse-battery-staple"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (files("chiasm") / SCRIPT).is_file(), reason="NiiVue's script was not fetched at install"),
]


def _below_a_path(page: playwright.Page, root: str) -> str:
    """Let the browser reach the server below a path, as a proxy does, and return where."""
    place = f"{root}/scans/chiasm/"
    page.route(place[:-1], lambda route: route.continue_(url=f"{root}/"))  # not every proxy adds the last "/"
    page.route(f"{place}**", lambda route: route.continue_(url=route.request.url.replace(place, f"{root}/")))
    return place


def _hand_in(page: playwright.Page, scan: Path) -> None:
    page.fill("#token", TOKEN)
    page.set_input_files("#file-t1", str(scan))
    page.click("#send")
    page.wait_for_selector("[data-state=done]")
    page.frame_locator("#view").locator("html[data-ready]").wait_for(timeout=60_000)


@pytest.mark.filterwarnings("default:a browser did not draw")  # once in some hundred runs, nobody knows why
def test_a_scan_goes_in_and_its_panes_show_the_values_of_the_files(
    finished_run: Path, tmp_path: Path, open_page: Callable[..., Opened]
) -> None:
    scan = write_scan(tmp_path, name="Miller.nii.gz")
    with served(load(finished_run), tmp_path / "jobs", Page(0, token=TOKEN)) as client:
        opened = open_page(client.root)
        page, place = opened.page, _below_a_path(opened.page, client.root)
        page.goto(place[:-1])
        page.wait_for_url(place)
        assert f"{place}api/jobs/ID" in page.text_content("body")
        page.route(f"{place}api/jobs", lambda route: route.fulfill(status=413, body="<html>too large</html>"), times=1)
        page.fill("#token", "wrong-but-long-enough")
        page.set_input_files("#file-t1", str(scan))
        page.click("#send")
        page.wait_for_selector("#refused:has-text('client_max_body_size')")
        rules = page.evaluate("['2', 't1=2'].map(value => ruleOf({ dataset: { series: 't1' }, value }))")
        assert rules == ["t1=2"] * 2  # the second as messages of the API write it
        page.set_input_files("#file-t1", str(scan))
        page.click("#send")
        page.wait_for_selector("#refused:not([hidden])")
        assert "The token is wrong" in page.text_content("#refused").capitalize()
        try:
            _hand_in(page, scan)
        except playwright.TimeoutError:
            seen = [page.text_content("#refused"), page.text_content(".where"), page.frames[-1].url, opened.errors]
            warnings.warn(f"a browser did not draw the panes, so another one is asked: {seen}", stacklevel=2)
            client.ask("DELETE", f"/api/jobs/{page.get_attribute('[data-job]', 'data-job')}")
            page = open_page(client.root).page
            _hand_in(page, scan)
        name = page.get_attribute("[data-job]", "data-job")
        assert page.text_content("[data-job] h3") == "Miller.nii.gz" and "Miller" not in "".join(client.log)

        shown = next(one for one in page.frames if one != page.main_frame)
        place = shown.evaluate("chiasm.panes.synthetic.frac2mm(chiasm.panes.synthetic.vox2frac(voxel), 0, true)")[:3]
        for pane, file in (
            ("source", None),
            ("synthetic", "scan_t2.nii.gz"),
            ("expected_error", "scan_expected-error.nii.gz"),
        ):
            content = scan.read_bytes() if file is None else client.ask("GET", f"/api/jobs/{name}/files/{file}").content
            image = nib.Nifti1Image.from_bytes(gzip.decompress(content))
            index = tuple(
                nib.affines.apply_affine(__import__("numpy").linalg.inv(image.affine), place).round().astype(int)
            )
            text = shown.text_content(f"#value-{pane}").replace("−", "-").split()[0]
            step = shown.evaluate(f"settings.steps[{pane!r}]")
            assert float(text) == pytest.approx(float(image.get_fdata()[index]), abs=2 * step)
        shown.evaluate("moveTo([3, 3, 3])")
        linked = shown.evaluate("Object.values(chiasm.panes).map(pane => [...pane.scene.crosshairPos].join())")
        assert len(linked) == 3 and len(set(linked)) == 1

        with page.expect_download() as download:
            page.click("text=Download: Synthetic t2 (NIfTI)")
        assert download.value.suggested_filename == "Miller_t2.nii.gz"  # beside those of other scans
        assert page.text_content("#result h2") == "Result: Miller.nii.gz"
        fetched = Path(download.value.path()).read_bytes()
        assert fetched == client.ask("GET", f"/api/jobs/{name}/files/scan_t2.nii.gz").content
        page.click(".does button:text-is('Delete')")
        page.wait_for_selector("#none:not([hidden])")
        assert client.ask("GET", f"/api/jobs/{name}").status_code == 404 and client.stored() == []
        assert page.is_hidden("#view") and "A finished job" in page.text_content("#nothing")
        page.evaluate("sessionStorage.setItem(KEPT, JSON.stringify([['gone', ['Miller.nii.gz']]]))")
        page.reload()
        page.fill("#token", TOKEN)
        page.press("#token", "Tab")
        page.wait_for_selector("#refused:has-text('Miller.nii.gz: the server no longer has this job')")
        others = [one for one in opened.requests if not one.startswith((client.root, "blob:"))]
        assert others == [] and [one for one in opened.errors if not re.search("401|404|413", one)] == []
