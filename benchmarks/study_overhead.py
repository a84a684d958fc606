"""Tell what a finished study costs beside its trainings: the same command again, with nothing left to train.

    python benchmarks/study_overhead.py STUDY.toml OUT

Listing the jobs, hashing the cohort, gathering the figures, statistics and all pages are done again and timed; what the
jobs took, each of them has left in its `done.json`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from chiasm.storage import read_json
from chiasm.studies.study import run_study


def main() -> None:
    """Print the ratio of both times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    told = [read_json(file) for file in asked.out.glob("jobs/*/done.json")]
    jobs = sum(one["training_seconds"] + one["scoring_seconds"] for one in told)
    start = time.perf_counter()
    run_study(asked.study, asked.out)
    seconds = time.perf_counter() - start
    print(f"{len(told)} jobs took {jobs:.0f} s; the study around them {seconds:.1f} s: {100 * seconds / jobs:.2f} %")


if __name__ == "__main__":
    main()
