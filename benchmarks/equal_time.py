"""Steps that each method of a finished study could have done in an equal time, as variants for another study file.

    python benchmarks/equal_time.py STUDY --seconds 40

Each job of a study writes down what its training took, set-up, validations and discriminators included. The median
over an arm's jobs is its cost; the steps are what that cost buys, rounded to tens. Jobs that ran beside others shared
the machine with them, all arms alike.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import median


def seconds_a_step(study: Path) -> dict[str, float]:
    """Read the median seconds that a step of each arm took, wall clock."""
    costs: dict[str, list[float]] = defaultdict(list)
    for path in sorted(study.glob("jobs/*/done.json")):
        done = json.loads(path.read_text(encoding="utf-8"))
        costs[done["name"].rsplit(" fold ", 1)[0]].append(done["training_seconds"] / done["steps"])
    return {arm: median(spent) for arm, spent in costs.items()}


def main() -> None:
    """Print a variant for each arm of the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--seconds", type=float, default=40.0)
    asked = parser.parse_args()
    for arm, cost in seconds_a_step(asked.study).items():
        steps = max(10, round(asked.seconds / cost, -1))
        print(f'"{arm}, timed" = ["{arm}", "schedule.steps={steps:.0f}"]  # {1000 * cost:.0f} ms a step')


if __name__ == "__main__":
    main()
