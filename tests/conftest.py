"""What several test modules share: a small cohort on disk and one finished training run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from dicom_patients import Archive, archive
from synthetic_cohort import write_brats

REAL = Path(os.environ.get("CHIASM_DATA", Path(__file__).parents[2] / "shared" / "data"))

# What the engine `auto` is in tests and their processes: compiling costs tiny networks more than it saves.
os.environ.setdefault("CHIASM_ENGINE", "torch")

# No test outlives a power cut: what is written need not reach the disk.  Tests of this replace it themselves.
os.fsync = lambda _: None

CHROMIUM = Path("/usr/bin/chromium")
SOFTWARE_GL = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")

#: Seconds, not minutes: a few steps of the smallest networks, every phase among them.
QUICK = {
    "data.sources": ("t1",),
    "data.target": "t2",
    "data.patch": 32,
    "split.folds": 3,
    "generator.widths": (4, 8),
    "discriminators.global_widths": (4, 8),
    "discriminators.local_widths": (4, 4, 4),
    "schedule.steps": 24,
    "training.batch": 2,
    "training.validations": 3,
    "training.accelerator": "cpu",
}


Sibling = Callable[..., Path]

#: Test modules that train, predict, score, serve or start processes, for seconds.  `make fast` leaves them out, and all
#: tests that need a trained model.
SLOW_MODULES = frozenset(
    """
    bad_cases bench benchmarks_scale bids cohorts_labels docs_notebook evaluation_doses evaluation_predictions
    faults_in_runs faults_on_disks networks_sparse_coding pipeline prediction_compiled prediction_dicom_case
    prediction_export prediction_hostile prediction_monai_bundle preparation_bias_field preparation_planes reading_once
    reading_options reports_progress_page runners serving_dicom_gate serving_dicom_node serving_dicomweb
    simulation_phantom site studies_completion studies_study training_cascade training_coding training_cost
    training_cross_fitting training_ranks training_registered training_run training_waiting volumes_corpus
    """.split()  # noqa: SIM905
)


@pytest.fixture(scope="session")
def toy_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_brats(tmp_path_factory.mktemp("toys") / "cohort", 6)


@pytest.fixture(scope="session")
def finished_run(toy_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from chiasm.methods import make_recipe
    from chiasm.training.run import train

    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(toy_cohort, make_recipe("A7", "tiny", QUICK), folder, say=lambda _: None)
    return folder


@pytest.fixture(scope="session")
def sibling(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Sibling:
    """Write a model that differs from the finished run's in some weights, and in fields of its plan."""

    import torch

    from chiasm.prediction.model import load_model, save_model

    def written(name: str, shift: float = 0.02, splits: Path | None = None, **plan: object) -> Path:
        model = load_model(finished_run)
        with torch.no_grad():
            for weight in model.generator.parameters():
                weight.add_(shift)
        folder = tmp_path_factory.mktemp(name)
        names = ("splits.json", "baselines.json", "baselines.safetensors")
        extras = {one: finished_run / "model" / one for one in names} | ({"splits.json": splits} if splits else {})
        save_model(folder / "model", replace(model, plan=replace(model.plan, **plan)), extras)  # type: ignore[arg-type]
        return folder

    return written


@dataclass(frozen=True)
class Opened:
    """A page in a browser, the addresses that it asked for, and its complaints."""

    page: Any
    requests: list[str]
    errors: list[str]


@pytest.fixture(scope="module")
def open_page() -> Iterator[Callable[..., Opened]]:
    """Open a file as a double click would, or an address, in a browser without a screen."""
    if not CHROMIUM.exists():
        pytest.skip(f"there is no browser at {CHROMIUM}")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:

        def opened(path: Path | str, *flags: str, first: str = "") -> Opened:
            """Open a page; `first` is a script that runs before the page's own."""
            args = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *(flags or SOFTWARE_GL)]
            page = playwright.chromium.launch(executable_path=str(CHROMIUM), args=args).new_page(
                viewport={"width": 1200, "height": 1400}
            )
            page.set_default_timeout(120_000)  # a busy machine draws slowly
            requests: list[str] = []
            errors: list[str] = []
            page.add_init_script(first)
            page.on("request", lambda request: requests.append(request.url))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
            page.goto(path if isinstance(path, str) else path.as_uri())
            return Opened(page, requests, errors)

        yield opened


@pytest.fixture(scope="session")
def running_archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archive]:
    with archive(tmp_path_factory.mktemp("archive")) as running:
        yield running


@pytest.fixture
def pacs(running_archive: Archive) -> Archive:
    """Orthanc on loopback, empty."""
    running_archive.clear()
    return running_archive


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Small networks run fastest on one thread, and then two test processes do not fight."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(tryfirst=True)  # before fixtures draw
def pytest_runtest_setup() -> None:
    """Let what a test draws without a seed not depend on the tests before it."""
    import torch

    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what -m does not name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW_MODULES or "finished_run" in item.fixturenames:  # type: ignore[attr-defined]
            item.add_marker("slow")
    absent = pytest.mark.skip(reason=f"the real scans are not at {REAL}; set CHIASM_DATA to their folder")
    for item in items:
        if "realdata" in item.keywords and not REAL.is_dir():
            item.add_marker(absent)
