"""Pages of cases that wait, packed, in a folder for the scores of all cases; nothing in the files is run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from chiasm.errors import RunError
from chiasm.reports.case_page import PackedPage
from chiasm.reports.gallery import CutCase, CutPlane, PictureColumn
from chiasm.storage import writing

VOLUMES, SLICES, ERRORS = "volumes", "slices", "errors"  # folders of the names of arrays
WORDS = "words"


def save_page(path: Path, page: PackedPage) -> None:
    """Write a packed page.

    Args:
        path: Ends in .safetensors; its folder is there.
        page: From `pack_page`.

    Raises:
        ChiasmError: If the file cannot be written.
    """
    from safetensors.numpy import save

    cut = page.cut
    words = {
        "facts": page.facts,
        "volumes": list(page.volumes),  # in this order they stand in the page
        "cut": [cut.case, cut.unit, cut.caption, cut.looks, cut.planes, cut.error_range, cut.missing],
    }
    volumes = {name: np.frombuffer(file, np.uint8) for name, file in page.volumes.items()}
    arrays = {
        f"{folder}/{name}": np.ascontiguousarray(array)
        for folder, named in ((VOLUMES, volumes), (SLICES, cut.slices), (ERRORS, cut.errors))
        for name, array in named.items()
    }
    with writing(path):
        path.write_bytes(save(arrays, {WORDS: json.dumps(words)}))  # `save_file` raises no OSError on a full disk


def load_page(path: Path) -> PackedPage:
    """Read a packed page.

    Raises:
        RunError: If the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            words = json.loads(file.metadata()[WORDS])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise RunError("cannot be read", path=path, reason="damaged", found=error) from error
    named = {
        folder: {name.removeprefix(f"{folder}/"): array for name, array in arrays.items() if name.startswith(folder)}
        for folder in (VOLUMES, SLICES, ERRORS)
    }
    case, unit, caption, looks, planes, error_range, missing = words["cut"]
    cut = CutCase(
        case,
        unit,
        caption,
        tuple(PictureColumn(label, window and tuple(window), *rest) for label, window, *rest in looks),
        tuple(CutPlane(name, place, depth, tuple(size), tuple(mm)) for name, place, depth, size, mm in planes),
        error_range,
        tuple(missing),
        named[SLICES],
        named[ERRORS],
    )
    volumes = {name: named[VOLUMES][name].tobytes() for name in words["volumes"]}
    return PackedPage(words["facts"], volumes, cut)
