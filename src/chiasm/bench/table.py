"""Measure the rows, and show them: as lines, as JSON, as a page in Markdown."""

from __future__ import annotations

import platform
import shlex
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from chiasm import __version__
from chiasm.bench import batches, files, predictions, scores, starting
from chiasm.bench.measuring import measure_peak, single_thread
from chiasm.bench.rows import FULL, QUICK, BenchRow, BenchSetting, Measured, measure_row

ROWS: tuple[BenchRow, ...] = (*predictions.ROWS, *batches.ROWS, *scores.ROWS, *files.ROWS, *starting.ROWS)
ROUNDS, QUICK_ROUNDS = 7, 5
SECONDS, QUICK_SECONDS = 60.0, 6.0  # of processor time, after which a row begins no further turn
PACKAGES = ("torch", "numpy", "scipy", "nibabel", "SimpleITK", "pydicom", "monai", "torchio", "scikit-image", "typer")

NOTES = "\n## Whole commands\n"  # where a page's part begins that no command writes

PAGE = """# Speed beside other tools

Made by `{words}`, chiasm {version}, on {processor}; one thread; Python {python}, {versions}.

Volumes of {shape} voxels, an ellipsoid of tissue in 18 % of them. chiasm and the peer run one after the
other, several times. The ratio is the median of the peer's processor time divided by chiasm's: above 1, chiasm takes
less. Ratios are valid on a busy machine, seconds are not. Times are least / median / most. Before a row is timed, its
results are compared with the peer's; if they differ by more than the last column, the row is wrong and has no ratio.

| row | what is done | peer | ratio | goal | | chiasm, CPU s | peer, CPU s | of the peak | equal within |
|---|---|---|---|---|---|---|---|---|---|
"""


def run_rows(rows: Sequence[BenchRow], *, quick: bool, progress: Callable[[Measured], None]) -> list[Measured]:
    """Measure rows one after the other on one thread.

    Args:
        rows: Which ones.
        quick: Whether on 96^3 voxels, with fewer turns.
        progress: Called with each row as it comes.
    """
    from chiasm.prediction.engines import pick_precision

    measured = []
    with single_thread(), tempfile.TemporaryDirectory(prefix="chiasm-bench-") as folder:
        peak = {precision: measure_peak(precision) for precision in ("32-true", "bf16-mixed")}
        setting = BenchSetting(QUICK if quick else FULL, Path(folder), pick_precision("auto", "cpu"), peak)
        for row in rows:
            rounds, seconds = (QUICK_ROUNDS, QUICK_SECONDS) if quick else (ROUNDS, SECONDS)
            measured.append(measure_row(row, setting, rounds=rounds, seconds=seconds))
            progress(measured[-1])
    return measured


def describe_row(one: Measured) -> str:
    """Describe the outcome of a row in one line."""
    goal = f"goal {one.goal:g}"
    if one.turns is None:
        return f"{one.row.name:18} {one.verdict}: {one.reason} ({goal})"
    ours, peer = one.turns.ours, one.turns.peer
    share = "" if one.fraction is None else f", {100 * one.fraction:.0f} % of the peak"
    times = f"{_seconds(ours.median)} against {_seconds(peer.median)}"
    return f"{one.row.name:18} {one.turns.ratio:7.2f}x  {one.verdict}, {goal}; {times} ({one.row.peer}){share}"


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def to_json(measured: Sequence[Measured]) -> list[dict[str, object]]:
    """Return the rows as JSON holds them: at least name, ratio, goal and peer of each."""
    return [one.to_dict() for one in measured]


def to_markdown(measured: Sequence[Measured], words: Sequence[str], shape: tuple[int, int, int]) -> str:
    """Return the page of a table.

    Args:
        measured: The rows.
        words: Of the command that made them.
        shape: Voxels of the volumes.
    """
    versions = ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name)))
    filled = PAGE.format(
        words=shlex.join(words),
        version=__version__,
        processor=processor(),
        python=platform.python_version(),
        versions=versions,
        shape="x".join(map(str, shape)),
    )
    return filled + "\n".join(_line(one) for one in measured) + "\n"


def keep_notes(page: str, path: Path) -> str:
    """Append to a new page the notes that a person wrote on the earlier page at `path`, from `NOTES` on."""
    earlier = path.read_text(encoding="utf-8") if path.is_file() else ""
    _, found, notes = earlier.partition(NOTES)
    return f"{page}{found}{notes}"


def _line(one: Measured) -> str:
    cells = [one.row.name, one.row.words, one.row.peer]
    if one.turns is None:
        cells += ["none", f"{one.goal:g}", f"{one.verdict}: {one.reason}", "", "", "", ""]
    else:
        times = [" / ".join(f"{second:.3g}" for second in way) for way in (one.turns.ours, one.turns.peer)]
        share = "" if one.fraction is None else f"{100 * one.fraction:.0f} %"
        equal = f"{one.tolerance:g} ({one.row.equal})"
        cells += [f"{one.turns.ratio:.3g}", f"{one.goal:g}", one.verdict, *times, share, equal]
    return f"| {' | '.join(cells)} |"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """Name the processor and those of its instructions that matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in facts.get("flags", "").split()]
    family = f"family {facts.get('cpu family', '?')} model {facts.get('model', '?')}"
    return f"{facts.get('model name', platform.machine())} ({family}; {', '.join(flags)})"
