"""Offer `chiasm predict` model folders that are made to harm, and count those that do.

    python benchmarks/faults/hostile_models.py [--model FOLDER --scan FILE]

Each folder is a good model with one part replaced, and signed again as
anybody could.  A *canary* is a file that appears if any code of the folder
runs: a planted module, a hub and a pickle write it.  A folder is refused if the
command ends with exit 2 and one sentence, in a few seconds, without much memory
and without the canary.  Without --model a small model is trained first.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from chiasm.checksums import sha256_of, with_checksum
from chiasm.cli import main
from chiasm.storage import read_toml, write_json, write_toml

CANARY = "canary"
PLANTED = "planted_network"  # a module beside the folders, on the path of imports
MOST_SECONDS, MOST_MIB = 5.0, 300.0

Change = Callable[[Path], None]


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.canary),)


class Answer(NamedTuple):
    """How the command answered to one folder.

    Attributes:
        name: What is hostile in it.
        code: Exit code.
        sentence: What it printed.
        seconds: How long it worked: another process' work does not count.
        mib: By how much the process grew.
        ran: Whether the canary appeared.
    """

    name: str
    code: int
    sentence: str
    seconds: float
    mib: float
    ran: bool

    @property
    def is_refused(self) -> bool:
        """Whether it was refused in one sentence, soon, without memory, and nothing ran."""
        plain = self.sentence.startswith("chiasm: ") and "\n" not in self.sentence
        return self.code == 2 and plain and not self.ran and self.seconds < MOST_SECONDS and self.mib < MOST_MIB


def sign(folder: Path, **changes: object) -> None:
    """Renew every checksum, as whoever changes a folder can."""
    card = {name: value for name, value in read_toml(folder / "model.toml").items() if name != "checksum"}
    card["sha256"] = {name: sha256_of(folder / name) for name in card["sha256"] if (folder / name).is_file()}
    write_toml(folder / "model.toml", with_checksum(card | changes))


def edit(name: str, changes: Mapping[str, Any]) -> Change:
    """Change entries of a TOML file, named as ``section.field``."""

    def change(folder: Path) -> None:
        content = read_toml(folder / name)
        for place, value in changes.items():
            *sections, field = place.split(".")
            part = content
            for section in sections:
                part = part[section]
            part[field] = value
        content.pop("checksum", None)
        write_toml(folder / name, with_checksum(content) if name == "plan.toml" else content)
        sign(folder)

    return change


def network(name: str, **options: object) -> Change:
    """Name another network, with options."""
    return edit("recipe.toml", {"generator.network": name, "generator.options": options})


def put(name: str, content: bytes) -> Change:
    """Replace a file."""

    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)
        sign(folder)

    return change


def weights(change_one: Callable[[Any], Any]) -> Change:
    """Change every tensor of the weights."""

    def change(folder: Path) -> None:
        file = folder / "weights.safetensors"
        save_file({name: change_one(value).contiguous() for name, value in load_file(file).items()}, file)
        sign(folder)

    return change


def entry(name: str, **changes: object) -> Change:
    """Change entries of a JSON file."""

    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **changes}))
        sign(folder)

    return change


def link(name: str) -> Change:
    """Move a file out of the folder and leave a link to it."""

    def change(folder: Path) -> None:
        outside = folder.parent / f"{folder.name}-outside-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return change


def card(**changes: object) -> Change:
    """Change entries of the card."""
    return lambda folder: sign(folder, **changes)


def name_outside(folder: Path) -> None:
    """Let the card name a file beside the folder."""
    outside = folder.parent / "outside.bin"
    outside.write_bytes(b"x")
    sums = {**read_toml(folder / "model.toml")["sha256"], "../outside.bin": sha256_of(outside)}
    sign(folder)
    content = {name: value for name, value in read_toml(folder / "model.toml").items() if name != "checksum"}
    write_toml(folder / "model.toml", with_checksum({**content, "sha256": sums}))


def hostile_changes(place: Path) -> dict[str, Change]:
    """List what is done to a good model, by name; `place` holds the planted code."""
    trap = pickle.dumps(Trap(place / CANARY))
    hub = {"repo_or_dir": str(place), "model": "run", "source": "local", "trust_repo": True}
    numbers = f"training.seed = {'9' * 5000}\n".encode()
    return {
        "torch.hub:load": network("torch.hub:load", **{**hub, "repo_or_dir": str(place)[:60]}),
        "monai.bundle:run": network("monai.bundle:run", config_file="bundle.json"),
        "a planted module": network(f"{PLANTED}:Net"),
        "a planted module behind monai": network(f"monai:{PLANTED}"),
        "a relative module": network(f".{PLANTED}:Net"),
        "os:system": network("os:system", command="true"),
        "builtins:exec": network("builtins:exec"),
        "torch.nn:Sequential": network("torch.nn:Sequential"),
        "MONAI's class of no images": network("monai:DenseNet121"),
        "weights from the network": network("monai:FlexibleUNet", backbone="resnet18", pretrained=True),
        "an option of another type": network("monai:SwinUNETR", norm_layer=f"{PLANTED}.Net"),
        "8 widths of 4096": edit("recipe.toml", {"generator.widths": [4096] * 8}),
        "8 widths of 4096 in the discriminator": edit("recipe.toml", {"discriminators.local_widths": [4096] * 8}),
        "layers without end": network("monai:AttentionUnet", channels=[65536] * 8, strides=[2] * 7),
        "a pickle as weights": put("weights.safetensors", trap),
        "a pickle as the baselines' card": put("calibration.json", trap),
        "a header of weights without end": put("weights.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
        "weights behind a link": link("weights.safetensors"),
        "a recipe behind a link": link("recipe.toml"),
        "weights of NaN": weights(lambda value: value * float("nan") if value.is_floating_point() else value),
        "infinite weights": weights(lambda value: value + float("inf") if value.is_floating_point() else value),
        "weights of whole numbers": weights(lambda value: value.to(torch.int8)),
        "complex weights": weights(lambda value: value * 1j),
        "a list of a million tensors": put("weights.safetensors", million_tensors()),
        "limits of 0": edit("plan.toml", {"fitted.source_limits": [0.0]}),
        "a reference of -1e300": edit("plan.toml", {"fitted.target_reference.values": [-1e300, 1.0, 2.0]}),
        "a calibration on infinitely many voxels": entry("calibration.json", voxels=float("inf")),
        "a calibration to -1e300": entry("calibration.json", x=[0.0, 1.0], y=[-1e300, 1.0]),
        "a card that names a file outside": name_outside,
        "a card that is another's": card(sha256=["weights.safetensors"]),
        "an infinite scale": card(error_scale=float("inf")),
        "a target that leaves the folder": edit("plan.toml", {"target": f"../../{CANARY}"}),
        "voxels of 1e-300 mm": edit("plan.toml", {"spacing_mm": [1e-300] * 3}),
        "a patch without end": edit("plan.toml", {"patch": [10**9, 10**9]}),
        "brackets without end": put("recipe.toml", b"method = " + b"[" * 100_000),
        "a number without end": put("recipe.toml", numbers),
        "a recipe of 100 MB": put("recipe.toml", b"#" * 100_000_000),
    }


def million_tensors() -> bytes:
    """Return a file of weights that lists a million empty tensors."""
    listed = {f"t{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(1_000_000)}
    header = json.dumps(listed).encode()
    return len(header).to_bytes(8, "little") + header


def plant(place: Path) -> None:
    """Write code that makes the canary when it is imported, called or unpickled."""
    act = f"import pathlib\npathlib.Path({str(place / CANARY)!r}).touch()\n"
    (place / f"{PLANTED}.py").write_text(act + "import torch\nclass Net(torch.nn.Module):\n    pass\n")
    (place / "hubconf.py").write_text(act + "def run(**_):\n    pass\n")
    write_json(place / "bundle.json", {"run": f"$__import__('{PLANTED}')"})


def offer(name: str, folder: Path, scan: Path, canary: Path) -> Answer:
    """Ask for a prediction with one folder."""
    printed, before, start = io.StringIO(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    code = 0
    out = folder.with_name(f"{folder.name}-out")
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(["predict", str(folder), str(scan), "-o", str(out)])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        except BaseException as error:  # noqa: BLE001  a traceback is what is counted here
            code, _ = 1, printed.write(f"Traceback: {type(error).__name__}: {error}")
    seconds = time.process_time() - start
    mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    ran = canary.exists() or PLANTED in sys.modules
    return Answer(name, code, printed.getvalue().strip(), seconds, mib, ran)


def offer_all(model: Path, scan: Path, place: Path) -> list[Answer]:
    """Make every hostile folder of a good model and offer it.

    Args:
        model: Folder of the good model.
        scan: What to predict from.
        place: Empty folder for all of them.
    """
    plant(place)
    sys.path.insert(0, str(place))
    with contextlib.suppress(ImportError):
        import_module("monai.networks.nets")
    offer("a good model", model, scan, place / CANARY)  # so that nothing is loaded for the first time below
    answers = []
    try:
        for number, (name, change) in enumerate(hostile_changes(place).items()):
            folder = place / f"model-{number:02d}"
            shutil.copytree(model, folder)
            change(folder)
            answers.append(offer(name, folder, scan, place / CANARY))
    finally:
        sys.path.remove(str(place))
    return answers


def train_small(place: Path) -> tuple[Path, Path]:
    """Train a small model on simulated patients; return its folder and a scan."""
    from chiasm.methods import make_recipe
    from chiasm.simulation.phantom import write_cohort
    from chiasm.training.run import train

    data = write_cohort(place / "data", subjects=4, seed=0, spacing_mm=4.0)
    changes = {"split.folds": 2, "schedule.steps": 24, "data.patch": 32, "training.accelerator": "cpu"}
    train(data, make_recipe("A7", "tiny", changes), place / "run", say=lambda _: None)
    return place / "run" / "model", next(iter(sorted(data.rglob("*_t1.nii.gz"))))


def report(answers: list[Answer]) -> str:
    """Say in one line what came of all folders."""
    refused, ran = sum(answer.is_refused for answer in answers), sum(answer.ran for answer in answers)
    longest, largest = max(answer.seconds for answer in answers), max(answer.mib for answer in answers)
    return (
        f"{refused} of {len(answers)} hostile folders refused in one sentence, {ran} ran code; "
        f"at most {longest:.1f} s and {largest:.0f} MiB each"
    )


def run() -> int:
    """Print one line a folder and a count at the end; exit 1 if one was not refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="A model folder to start from.")
    parser.add_argument("--scan", type=Path, help="A scan that it can predict from.")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model, scan = (asked.model, asked.scan) if asked.model and asked.scan else train_small(place / "good")
        (place / "hostile").mkdir()
        answers = offer_all(model, scan, place / "hostile")
        for answer in answers:
            told = answer.sentence.replace(folder, "").replace("\n", " | ")[:150]
            print(f"{'refused' if answer.is_refused else 'NOT REFUSED'}: {answer.name}: {answer.seconds:.1f} s: {told}")
        print(report(answers))
    return int(not all(answer.is_refused for answer in answers))


if __name__ == "__main__":
    sys.exit(run())
