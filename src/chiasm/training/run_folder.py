"""A run folder: the files that a training writes there, and the checks of their places."""

from __future__ import annotations

import re
from pathlib import Path

from chiasm import times
from chiasm.outputs import refuse_data_folder, refuse_foreign, refuse_inputs, refuse_links, remove_files
from chiasm.prediction import baselines, model_files

#: Files that a training writes over; `plan.toml` and `splits.json` are read where they are there, and never replaced.
FILES = ("environment.json", "log.jsonl", "finished.json", times.FILE, "progress.html")
FOLDERS = ("checkpoints", "baselines", "model", "stages", "progress")
BASELINES = (baselines.TENSORS, baselines.CARD)
#: As `save_model` writes them.
MODEL_FILES = frozenset((*model_files.NEEDED, model_files.CARD, model_files.CALIBRATION, "splits.json", *BASELINES))


def check_run_folder(folder: Path, data: Path) -> None:
    """Refuse a folder in which a training would replace or remove other files, before data are read.

    Args:
        folder: The run folder; it may be missing.
        data: The folder or manifest of the data.

    Raises:
        RunError: If it is the data's own folder, holds the data where a training writes, or holds other files there.
    """
    refuse_data_folder(folder, [data])
    refuse_inputs((folder / name for name in (*FILES, *FOLDERS)), [data], what="the training")
    if not (folder / "recipe.toml").exists():  # which is written first: all else is this run's
        refuse_foreign(folder, (*FILES, *(f"{name}/*" for name in FOLDERS)))


def check_model_place(folder: Path) -> None:
    """Refuse a run whose model cannot be replaced as a whole, before it is trained.

    Raises:
        RunError: If `model` or another of the run's own places is a link, or `model` holds other files.
    """
    refuse_links(folder, ("log.jsonl", "baselines", "model"))
    names = {path.name for path in (folder / "model").glob("*") if not path.name.startswith(".chiasm-")}
    refuse_foreign(folder, (f"model/{name}" for name in sorted(names - MODEL_FILES)))


def remove_baselines(folder: Path) -> None:
    """Remove the baselines of a run folder that are not in the model yet, and half-written files of them.

    Raises:
        ChiasmError: If a file cannot be removed.
    """
    own = re.compile(rf"(\.\S*\.)?({'|'.join(map(re.escape, BASELINES))})")
    there = (folder / "baselines").glob("*")
    remove_files(folder, [f"baselines/{path.name}" for path in there if own.fullmatch(path.name)])
