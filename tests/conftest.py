"""What several test modules share: a small cohort on disk and one finished training run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from synthetic_cohort import write_brats

REAL = Path(os.environ.get("CHIASM_DATA", Path(__file__).parents[2] / "shared" / "data"))

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


@pytest.fixture(scope="session")
def toy_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_brats(tmp_path_factory.mktemp("toys") / "cohort", 6)


@pytest.fixture(scope="session")
def finished_run(toy_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from chiasm.recipe import make_recipe
    from chiasm.training.run import train

    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(toy_cohort, make_recipe("A7", "tiny", QUICK), folder, say=lambda _: None)
    return folder


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Small networks run fastest on one thread, and then two test processes do not fight."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = pytest.mark.skip(reason=f"the real scans are not at {REAL}; set CHIASM_DATA to their folder")
    for item in items:
        if "realdata" in item.keywords and not REAL.is_dir():
            item.add_marker(absent)
