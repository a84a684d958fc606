"""Time the statistics and the page of a large evaluation: how long, and how much memory at its peak?

    python benchmarks/report_of_many.py --cases 1000

The figures are drawn at random, in the shape in which a study writes them: every case has every arm, region and
metric, and two lesions of its own.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from chiasm.evaluation.metric_table import METRICS
from chiasm.evaluation.rows import Row, write_evaluation
from chiasm.storage import write_json
from chiasm.studies.study_report import report

REGIONS = ("mask", "image", "healthy", "WT", "TC", "ET", "edges", "lesion-edge", "lesion-1", "lesion-2")
SHOWN = ("mae", "rmse", "nmae", "psnr", "ssim", "ncc", "gradient_error", "sharpness")


def write_study(folder: Path, cases: int, arms: list[str], seeds: int) -> int:
    """Write `evaluation.csv` and `study.json` as a study leaves them; return the number of rows."""
    rng = np.random.default_rng(0)
    names = [f"case-{index:04d}" for index in range(cases)]
    hard = {name: rng.gamma(4, 0.25) for name in names}
    rows = [
        Row(name, index % 5, seed, arm, region, metric, hard[name] * rng.uniform(0.9, 1.1), METRICS[metric].unit, "")
        for index, name in enumerate(names)
        for seed in range(seeds)
        for arm in arms
        for region in REGIONS
        for metric in SHOWN
    ]
    write_evaluation(folder, rows)
    primary = {"arm": arms[-1], "against": arms[0], "metric": "mae", "region": "WT"}
    study = {"data": str(folder / "none"), "source": ["t1"], "target": "t2", "arms": arms, "seeds": list(range(seeds))}
    job = {"name": arms[-1], "arm": arms[-1], "fold": 0, "seed": 0, "folder": "jobs/none"}
    notes = {
        "study": {**study, "primary": primary},
        "cases": {name: {"subject": name, "site": None} for name in names},
        "regions": ["WT", "TC", "ET"],
        "jobs": [job],
        "hours": 0.0,
        "failed": [],
    }
    write_json(folder / "study.json", notes)
    return len(rows)


def main() -> None:
    """Write such a study into a temporary folder, make its page, and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--arms", nargs="+", default=["A0", "A1", "A3", "A6b", "C1", "A7"])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        print(f"{asked.cases} cases, {write_study(folder, asked.cases, asked.arms, asked.seeds)} rows")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # its peak is the page's own
            seconds, peak, size = pool.submit(time_report, folder).result()
    print(f"statistics and page: {seconds:.1f} s, peak memory {peak:.2f} GiB, page {size:.1f} MB")


def time_report(folder: Path) -> tuple[float, float, float]:
    """Return seconds, peak memory of this process in GiB, and the page's size in MB."""
    start = time.perf_counter()
    page = report(folder)
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, page.stat().st_size / 1e6


if __name__ == "__main__":
    main()
