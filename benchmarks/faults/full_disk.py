"""Let the disk be full at 24 places: train, predict, evaluate and study on small disks in memory.

    python benchmarks/faults/full_disk.py        # needs root, to mount

Simulated patients and the smallest networks, on one thread.  Each command writes to a disk of `tmpfs` that holds six
shares of what it needs, from 2 to 90 %.  It must stop once, with exit 2 and one sentence that names the free space,
leave no temporary, and go on to the same files when the disk has grown.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from kills import SMALL, STUDY, TRAINING, contents, differences, finish, started

from chiasm.simulation.phantom import write_cohort

SHARES = (0.5, 0.02, 0.9, 0.2, 0.75, 0.35)


def main() -> None:
    """Print a line for each disk, and how many commands stopped once and went on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disks", type=int, default=len(SHARES), help="For each command.")
    shares = SHARES[: parser.parse_args().disks]
    with tempfile.TemporaryDirectory(prefix="full-") as name:
        root = Path(name)
        data = write_cohort(root / "cohort", 6, 0, spacing_mm=4.0)
        (root / "study.toml").write_text(STUDY.format(data=data, settings=", ".join(f'"{one}"' for one in SMALL)))
        run, predictions = root / "train", root / "predict"
        commands: dict[str, list[str]] = {
            "train": ["train", str(data), *TRAINING, "--steps", "24", "--set", *SMALL],
            "predict": ["predict", str(run), str(data), "--accelerator", "cpu"],
            "evaluate": ["evaluate", str(predictions), str(data)],
            "study": ["study", str(root / "study.toml")],
        }
        good = [try_disk(verb, command, root, share) for verb, command in commands.items() for share in shares]
        print(f"{sum(good)} of {len(good)} full disks stopped the command once, and it went on")


def try_disk(verb: str, command: Sequence[str], root: Path, share: float) -> bool:
    """Run a command on a disk that is too small, and again when it has grown; tell whether all was as it should be."""
    if not (root / verb).exists():
        finish(command, root / verb)
    whole = contents(root / verb)
    disk = root / f"disk-{verb}-{share}"
    disk.mkdir()
    needed = sum(-(-path.stat().st_size // 4096) * 4096 for path in (root / verb).rglob("*") if path.is_file())
    mount("-t", "tmpfs", "-o", f"size={max(8192, int(share * needed) // 4096 * 4096)}", "tmpfs", str(disk))
    try:
        process = started(command, disk / "out")
        told, code = process.communicate()[0], process.returncode
        last = told.strip().splitlines()[-1] if told.strip() else ""
        once = code == 2 and told.count("cannot be written") == 1 and "MiB free" in last
        left = [path.name for path in disk.rglob(".chiasm-*")]
        mount("-o", "remount,size=1g", str(disk))
        finish(command, disk / "out")
        wrong = differences(whole, contents(disk / "out"))
        good = once and not left and not wrong
        print(f"{verb} on {100 * share:.0f} %: exit {code}: {last[-160:]}", flush=True)
        if not good:
            print(f"  {left} {wrong}\n{told}", flush=True)
        return good
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def mount(*how: str) -> None:
    """Mount a disk, or change one.

    Raises:
        SystemExit: If that is not permitted.
    """
    if subprocess.run(["mount", *how], capture_output=True).returncode:
        raise SystemExit("no disk can be mounted here: that needs root")


if __name__ == "__main__":
    main()
