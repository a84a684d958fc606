"""How fast prediction is, and how much memory it takes, beside an earlier build and the loops that people write.

    python benchmarks/predicting.py --work /tmp/predicting --before ../before/src --rounds 3
    python benchmarks/predicting.py --work /tmp/predicting --dims 3d
    python benchmarks/predicting.py --work /tmp/predicting --memory 512

Draws patients of 240 x 240 x 155 voxels and trains the default method at size small for a few steps.  Every turn is a
process of its own with one thread: it loads the model, predicts a file once, and is timed when it predicts it three
times more, of which the median counts (reading, mask, normalisation, networks, return to the source's grid; not
writing).  Ways take turns.  One pass is taken, except by the ways "mirrored": these average a volume and its mirror
image, the default of size small.  Printed are
seconds of the processor (median, least and most), the share that is not spent in networks, ratios of medians, and how
far results are apart.  The peer of 2.5D is a loop over all slices of the volume, one at a time, by the generator alone;
that of 3D is MONAI's sliding window (96 voxels, overlap 0.5), likewise.  `--memory SIDE` runs the command on a cube of
that many voxels a side, int16 in .nii.gz, and prints the peak of its memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SHAPE = (240, 240, 155)
SUBJECTS = 6
TIMED = 3  # predictions of a turn, of which the median counts
HERE = Path(__file__).resolve().parents[1] / "src"
#: Settings of a training that ends soon, by the dimensions of its networks.
QUICK = {
    "2.5d": {"data.patch": 64, "schedule.steps": 12},
    "3d": {"data.patch": 32, "data.dims": "3d", "schedule.steps": 6},
}
SHARED = {"split.folds": 3, "training.batch": 2, "training.validations": 1, "training.accelerator": "cpu"}


class Way(NamedTuple):
    """One way to predict.

    Attributes:
        build: Folder of the package.
        engine: Of networks; None for an earlier build.
        with_map: Whether the expected error is predicted too.
        peer: Whether the loop of others is timed instead.
        is_mirrored: Whether volume and mirror image are averaged, as size small does by default: two passes.
    """

    build: Path
    engine: str | None
    with_map: bool = True
    peer: bool = False
    is_mirrored: bool = False


# --- one turn, in a process of its own ---------------------------------------------------------------------------


def take_turn(run: Path, image: Path, way: Way, precision: str, out: Path) -> dict[str, float]:
    """Predict an image; return seconds of predicting it again and how many of them networks took."""
    import torch

    import chiasm

    torch.set_num_threads(1)
    if way.peer:
        return _time(_peer(run, image), lambda: 0.0)
    chosen = {} if way.engine is None else {"engine": way.engine}
    predictor = chiasm.load(run, precision=precision, **chosen)
    if not way.with_map:
        judge = "local_discriminator" if hasattr(predictor.model, "local_discriminator") else "local_judge"
        predictor.model = replace(predictor.model, **{judge: None})
    averaged = {} if way.engine is None else {"average": "flip" if way.is_mirrored else "none"}
    made = predictor.predict(image, **averaged)
    np.save(out, made.image.array)
    if way.with_map:
        np.save(out.with_suffix(".map.npy"), made.reliability.array)
    return _time(lambda: predictor.predict(image, **averaged), _count_networks())


def _time(work: Callable[[], Any], networks: Callable[[], float]) -> dict[str, float]:
    turns = []
    for _ in range(TIMED):
        before, begun = networks(), time.process_time()
        work()
        turns.append({"seconds": time.process_time() - begun, "networks": networks() - before})
    return sorted(turns, key=lambda turn: turn["seconds"])[TIMED // 2]


def _count_networks() -> Callable[[], float]:
    """Count the processor's seconds in passes of networks from here on."""
    from chiasm.prediction import tiling

    name = "run_network" if hasattr(tiling, "run_network") else "_passed"
    plain, spent = getattr(tiling, name), [0.0]

    def counted(*given: Any) -> Any:
        begun = time.process_time()
        made = plain(*given)
        spent[0] += time.process_time() - begun
        return made

    setattr(tiling, name, counted)
    return lambda: spent[0]


def _peer(run: Path, image: Path) -> Callable[[], Any]:
    """Return the loop that people write: the generator alone, eagerly, over the whole normalised volume."""
    import torch

    from chiasm.prediction.model import load_model
    from chiasm.preparation.arrays import prepare_source
    from chiasm.volumes import read_volume

    model = load_model(run)
    generator, plan = model.generator.eval(), model.plan
    volume = read_volume(image)
    source = np.zeros(SHAPE, np.float32)
    source[...] = prepare_source([volume], plan).maps[0].apply(volume.array)

    def slices() -> None:
        around = np.pad(source, ((0, 0), (0, 0), (plan.slices // 2,) * 2), mode="edge")
        with torch.inference_mode():
            for k in range(SHAPE[2]):
                stack = np.ascontiguousarray(np.moveaxis(around[..., k : k + plan.slices], -1, 0))
                generator(torch.from_numpy(stack)[None])

    def windows() -> None:
        from monai.inferers import SlidingWindowInferer

        with torch.inference_mode():
            SlidingWindowInferer((96, 96, 96), overlap=0.5)(torch.from_numpy(source)[None, None], generator)

    return slices if plan.dims == 2 else windows


# --- all turns ---------------------------------------------------------------------------------------------------


def prepare(work: Path, dims: str, build: Path) -> tuple[Path, Path]:
    """Return a run and an image, made once; the earlier build trains, so that both can read the model."""
    from evaluating import _each, chiasm

    data, run = work / "cohort", work / f"run-{dims}"
    if not (data / "complete").exists():
        for number in range(1, SUBJECTS + 1):
            write_case(data / f"Toy_{number:04d}", SHAPE, number)
        (data / "complete").touch()
    if not (run / "model").exists():
        choices = [f"{name}={json.dumps(value)}" for name, value in {**SHARED, **QUICK[dims]}.items()]
        words = ("--source", "t1", "--target", "t2", "-o", run, "--size", "small")
        chiasm(build, "train", data, *words, *_each("--set", choices))
    return run, data / "Toy_0001" / "Toy_0001_t1.nii.gz"


def write_case(folder: Path, shape: tuple[int, int, int], seed: int) -> None:
    """Draw a T1 and a T2."""
    from chiasm.bench.subjects import draw_pictures
    from chiasm.volumes import write_volume

    drawn = draw_pictures(shape, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("t1", drawn.source), ("t2", drawn.target)):
        # images become float32, which scanners do not store; as labels, whole numbers stay int16
        write_volume(folder / f"{folder.name}_{name}.nii.gz", array, drawn.geometry, labels=True)


def compare(work: Path, dims: str, before: Path | None, precision: str, rounds: int, only: list[str]) -> None:
    """Print what each way took, or some of them, and how it stands beside the earlier build and the peer."""
    ways = {
        "now, torch": Way(HERE, "torch"),
        "now, torch, image alone": Way(HERE, "torch", with_map=False),
        "now, openvino": Way(HERE, "openvino"),
        "now, openvino, image alone": Way(HERE, "openvino", with_map=False),
        "now, torch, mirrored": Way(HERE, "torch", is_mirrored=True),
        "now, torch, mirrored, image alone": Way(HERE, "torch", with_map=False, is_mirrored=True),
        "now, openvino, mirrored": Way(HERE, "openvino", is_mirrored=True),
        "now, openvino, mirrored, image alone": Way(HERE, "openvino", with_map=False, is_mirrored=True),
        "peer, image alone": Way(HERE, None, with_map=False, peer=True),
    }
    ways |= {} if before is None else {"before": Way(before, None)}
    ways = {name: way for name, way in ways.items() if not only or name in only}
    run, image = prepare(work, dims, before or HERE)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            taken[name].append(_in_process(run, image, way, precision, work / f"{dims}-{name}.npy"))
    middle = {}
    for name, turns in taken.items():
        seconds = sorted(turn["seconds"] for turn in turns)
        middle[name] = statistics.median(seconds)
        rest = statistics.median(1 - turn["networks"] / turn["seconds"] for turn in turns)
        share = "" if "peer" in name else f", {rest:.0%} of it not in networks"
        print(f"{dims} {name:36} {middle[name]:6.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f}){share}")
    for name in ways:
        ratios = {other: middle[other] / middle[name] for other in ("before", "peer, image alone") if other in middle}
        print(
            f"{dims} {name:36} " + ", ".join(f"{ratio:.2f} times as fast as {other}" for other, ratio in ratios.items())
        )
    for name in ("now, torch", "now, openvino", "now, torch, mirrored", "now, openvino, mirrored"):
        if name in middle and (alone := f"{name}, image alone") in middle:
            costs = [one["seconds"] / other["seconds"] - 1 for one, other in zip(taken[name], taken[alone])]
            each = " ".join(f"{cost:.0%}" for cost in costs)
            print(f"{dims} {name}: the map costs {middle[name] / middle[alone] - 1:.0%} on top of the image ({each})")
    for name in ("now, torch", "now, openvino") if "before" in middle else ():
        for suffix in (".npy", ".map.npy"):
            one, other = (np.load((work / f"{dims}-{which}.npy").with_suffix(suffix)) for which in (name, "before"))
            apart = float(np.abs(one - other).max() / np.ptp(other))
            print(f"{dims} {name}, {'map' if 'map' in suffix else 'image'}: {apart:.2g} of the range from before")


def _in_process(run: Path, image: Path, way: Way, precision: str, out: Path) -> dict[str, float]:
    from evaluating import environment_of

    words = [str(run), str(image), json.dumps([str(way.build), *way[1:]]), precision, str(out)]
    done = subprocess.run(
        [sys.executable, __file__, "--turn", *words], env=environment_of(way.build), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def measure_memory(work: Path, dims: str, before: Path | None, side: int) -> None:
    """Print the peak of the command's memory on a cube, by build and engine."""
    from evaluating import chiasm

    run, _ = prepare(work, dims, before or HERE)
    case = work / f"cube{side}"
    if not case.exists():
        write_case(case, (side, side, side), 0)
    ways = {"torch": (HERE, ("--engine", "torch")), "openvino": (HERE, ("--engine", "openvino"))}
    ways |= {} if before is None else {"before": (before, ())}
    for name, (build, engine) in ways.items():
        out = work / f"made-{side}-{dims}-{name}"
        shutil.rmtree(out, ignore_errors=True)
        words = (run, case / f"{case.name}_t1.nii.gz", "-o", out)
        cost = chiasm(build, "predict", *words, *engine)
        each = cost.peak * 2**20 / side**3
        print(
            f"{dims} {name}: {side}^3 voxels, peak {cost.peak:.0f} MiB ({each:.0f} bytes a voxel), {cost.seconds:.1f} s"
        )


def main() -> None:
    """Compare what is asked for."""
    if sys.argv[1:2] == ["--turn"]:
        run, image, way, precision, out = sys.argv[2:]
        build, *rest = json.loads(way)
        print(json.dumps(take_turn(Path(run), Path(image), Way(Path(build), *rest), precision, Path(out))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps cohort, models and results")
    parser.add_argument("--before", type=Path, help="src folder of an earlier build")
    parser.add_argument("--dims", choices=QUICK, default="2.5d")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="*", default=[], metavar="NAME", help="only these, as they are printed")
    parser.add_argument("--memory", type=int, metavar="SIDE", help="measure memory on a cube of this side instead")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    if asked.memory:
        measure_memory(asked.work, asked.dims, asked.before, asked.memory)
    else:
        compare(asked.work, asked.dims, asked.before, asked.precision, asked.rounds, asked.ways)


if __name__ == "__main__":
    main()
