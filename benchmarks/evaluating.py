"""How fast `chiasm evaluate` is, and how much memory it takes, beside an earlier build and MONAI's SSIM.

    python benchmarks/evaluating.py --before ../before/src --work /tmp/evaluating --rounds 3

Simulates patients of 1 mm on a grid of 240 x 240 x 155, trains the smallest networks for a few steps, predicts and
evaluates. Each command runs in a process of its own with one thread; the builds take turns. Printed are seconds of the
processor (user and system, median, least and most), the peak of the memory, and the largest difference of a score
between the builds. `--task` chooses what is evaluated; `--ssim` times one SSIM of a pair against MONAI's SSIMMetric.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chiasm.boxes import box_of
from chiasm.evaluation.rows import read_evaluation
from chiasm.simulation.phantom import write_cohort
from chiasm.volumes import Geometry, Volume, read_volume, write_volume

SHAPE = (240, 240, 155)
SUBJECTS = 6
TOLERANCE = 1e-4  # relative, of scores of two builds: SSIM is computed in single precision
#: Task: layout of the cohort, and the settings that differ.
TASKS = {
    "mr": ("brats", {"data.sources": ["t1"], "data.target": "t2"}),
    "registered": ("brats", {"data.sources": ["t1"], "data.target": "t2", "data.registration": "rigid"}),
    "ct": ("synthrad", {"data.sources": ["t2"], "data.target": "ct"}),
}
QUICK = {
    "split.folds": 3,
    "data.patch": 32,
    "generator.widths": [4, 8],
    "discriminators.global_widths": [4, 8],
    "discriminators.local_widths": [4, 4, 4],
    "schedule.steps": 24,
    "training.batch": 2,
    "training.validations": 3,
    "training.accelerator": "cpu",
}


class Cost(NamedTuple):
    """What a command took: seconds of the processor, and its peak of memory in MiB."""

    seconds: float
    peak: float


def on_one_grid(folder: Path) -> None:
    """Cut and pad simulated patients around the mask's middle to the grid of `SHAPE`; nothing is interpolated."""
    for mask in sorted(folder.rglob("*mask.nii.gz")):
        volume = read_volume(mask, labels=True)
        middle = [(side.start + side.stop) // 2 for side in box_of(volume.array > 0)]
        for path in sorted(mask.parent.glob("*.nii.gz")):
            labels = path.name.endswith(("mask.nii.gz", "seg.nii.gz"))
            cut = _recut(read_volume(path, labels=labels, allow_constant=True), middle)
            write_volume(path, cut.array, cut.geometry, labels=labels)


def _recut(volume: Volume, middle: Sequence[int]) -> Volume:
    """Lay a volume on a grid of `SHAPE` around a voxel; beyond its border lies its least value."""
    array = np.full(SHAPE, volume.array.min(), volume.array.dtype)
    starts = [at - side // 2 for at, side in zip(middle, SHAPE)]
    here = tuple(slice(max(0, s), min(n, s + side)) for s, n, side in zip(starts, volume.array.shape, SHAPE))
    there = tuple(slice(part.start - s, part.stop - s) for part, s in zip(here, starts))
    array[there] = volume.array[here]
    affine = volume.geometry.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ starts
    return Volume(array, Geometry(SHAPE, affine))


def prepare(work: Path, task: str, source: Path) -> tuple[Path, Path]:
    """Return a cohort and a folder of predictions on it, made once."""
    layout, settings = TASKS[task]
    data, run, made = work / layout, work / f"{task}-run", work / f"{task}-predictions"
    if not (data / "recut").exists():
        write_cohort(data, SUBJECTS, 1, spacing_mm=1.0, layout=layout)
        on_one_grid(data)
        (data / "recut").touch()
    if not (made / "predictions.json").exists():
        choices = [f"{name}={json.dumps(value)}" for name, value in {**QUICK, **settings}.items()]
        names = [settings["data.sources"][0], settings["data.target"]]
        chiasm(
            source,
            "train",
            data,
            "--source",
            names[0],
            "--target",
            names[1],
            "-o",
            run,
            "--size",
            "tiny",
            *_each("--set", choices),
        )
        chiasm(source, "predict", run, data, "-o", made)
    return data, made


def _each(option: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


def environment_of(source: Path) -> dict[str, str]:
    """Let a process use the build at `source` and one thread."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {**os.environ, "PYTHONPATH": str(source), **dict.fromkeys(names, "1")}


def chiasm(source: Path, *words: Any) -> Cost:
    """Run a command of the build at `source` with one thread."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from chiasm.cli import main; main()", *map(str, words)],
        env=environment_of(source),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    told = process.stdout.read().decode()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(told)
    return Cost(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def compare_scores(now: Path, before: Path) -> str:
    """Describe how far the scores that two evaluations share are apart, and name those that only one of them has.

    Raises:
        SystemExit: If a score is further apart than `TOLERANCE`, or the earlier build has scores that are gone.
    """
    ours, theirs = ({row[:6]: row.value for row in read_evaluation(folder)} for folder in (now, before))
    if gone := sorted(theirs.keys() - ours.keys()):
        raise SystemExit(f"{len(gone)} scores are gone: {gone[:5]}")
    apart = {key: _apart(ours[key], value) for key, value in theirs.items()}
    worst = max(apart, key=lambda key: apart[key])
    told = f"{len(apart)} shared scores, at most {apart[worst]:.2g} apart ({worst}: {ours[worst]!r}, {theirs[worst]!r})"
    if apart[worst] > TOLERANCE:
        raise SystemExit(f"{told}: more than {TOLERANCE:g}")
    new = sorted({f"{method} {region} {metric}" for _, _, _, method, region, metric in ours.keys() - theirs.keys()})
    return f"{told}; only the new build has {len(new)}: {', '.join(new)}"


def _apart(a: float, b: float) -> float:
    if a == b or (np.isnan(a) and np.isnan(b)):
        return 0.0
    return float(abs(a - b) / max(abs(a), abs(b), 1.0))


def compare(work: Path, task: str, before: Path | None, rounds: int, cases: Sequence[int]) -> None:
    """Print what evaluating so many cases took, by build, and what one case more takes."""
    here = Path(__file__).resolve().parents[1] / "src"
    builds = {"now": here} | ({} if before is None else {"before": before})
    data, made = prepare(work, task, before or here)
    costs: dict[tuple[str, int], list[Cost]] = {}
    for _ in range(rounds):
        for many in cases:
            for name, source in builds.items():
                out = work / f"{task}-{name}-{many}"
                part = first_cases(made, many)
                shutil.rmtree(out, ignore_errors=True)
                words = ("evaluate", part, data, "-o", out, "--model", made.parent / f"{task}-run")
                costs.setdefault((name, many), []).append(chiasm(source, *words))
    for (name, many), taken in costs.items():
        seconds = sorted(one.seconds for one in taken)
        peak = max(one.peak for one in taken)
        print(
            f"{task} {name:7} {many} cases: {statistics.median(seconds):7.2f} s "
            f"({seconds[0]:.2f} to {seconds[-1]:.2f}), {peak:5.0f} MiB"
        )
    middle = {key: statistics.median(one.seconds for one in taken) for key, taken in costs.items()}
    few, most = min(cases), max(cases)
    each = {name: (middle[name, most] - middle[name, few]) / (most - few) for name in builds} if most > few else {}
    for name, seconds in each.items():
        print(f"{task} {name:7} a case more: {seconds:.2f} s")
    if before is not None:
        ratios = [f"{many} cases {middle['before', many] / middle['now', many]:.1f}" for many in cases]
        ratios += [f"a case more {each['before'] / each['now']:.1f}"] if each else []
        print(f"{task} before / now: {', '.join(ratios)}")
        print(task, compare_scores(work / f"{task}-now-{most}", work / f"{task}-before-{most}"))


def first_cases(made: Path, many: int) -> Path:
    """Return a folder with the first so many predictions, as links."""
    folder = made.with_name(f"{made.name}-{many}")
    folder.mkdir(exist_ok=True)
    told = json.loads((made / "predictions.json").read_text())
    told["cases"] = told["cases"][:many]
    (folder / "predictions.json").write_text(json.dumps(told))
    kinds = ("image", "mask", "expected_error", "reliability")  # the last in predictions of earlier versions
    for name in filter(None, (case.get(kind) for case in told["cases"] for kind in kinds)):
        if not (folder / name).exists():
            os.link(made / name, folder / name)
    return folder


def compare_ssim(work: Path, before: Path | None, rounds: int) -> None:
    """Print the seconds of one SSIM inside a mask beside MONAI's of the whole volume, and how far they are apart."""
    import torch
    from monai.metrics.regression import SSIMMetric, compute_ssim_and_cs

    from chiasm.metrics.ssim import ssim_map

    torch.set_num_threads(1)
    data, made = prepare(work, "mr", before or Path(__file__).resolve().parents[1] / "src")
    told = json.loads((made / "predictions.json").read_text())["cases"][0]
    x = read_volume(made / told["image"], allow_constant=True).array
    y = read_volume(data / told["case"] / f"{told['case']}_t2.nii.gz").array
    mask = read_volume(made / told["mask"], labels=True).array > 0
    width = float(np.ptp(y))
    tensors = [torch.from_numpy(image)[None, None] for image in (x, y)]
    metric = SSIMMetric(3, data_range=width)
    seconds: dict[str, list[float]] = {"chiasm": [], "monai": []}
    for _ in range(rounds):
        for name, do in (("chiasm", lambda: ssim_map(x, y, mask, width)), ("monai", lambda: metric(*tensors))):
            start = time.process_time()
            do()
            seconds[name].append(time.process_time() - start)
    middle = {name: statistics.median(taken) for name, taken in seconds.items()}
    whole = compute_ssim_and_cs(*tensors, 3, (11,) * 3, (1.5,) * 3, width, "gaussian")[0][0, 0].numpy()
    inner = mask[5:-5, 5:-5, 5:-5]
    apart = float(np.abs(whole - ssim_map(x, y, mask, width)[5:-5, 5:-5, 5:-5])[inner].max())
    ours, theirs = middle["chiasm"], middle["monai"]
    print(f"SSIM: {ours:.3f} s against {theirs:.2f} s of MONAI: {theirs / ours:.0f} times")
    print(
        f"SSIM: at most {apart:.2g} apart in {int(inner.sum())} voxels; {mask.mean():.0%} of the volume are in the mask"
    )


def main() -> None:
    """Compare what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps cohorts and predictions")
    parser.add_argument("--before", type=Path, help="src folder of an earlier build")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--task", nargs="*", choices=TASKS, default=["mr"])
    parser.add_argument("--cases", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--ssim", action="store_true", help="time SSIM against MONAI")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    if asked.ssim:
        compare_ssim(asked.work, asked.before, asked.rounds)
    for task in asked.task:
        compare(asked.work, task, asked.before, asked.rounds, asked.cases)


if __name__ == "__main__":
    main()
