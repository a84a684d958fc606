"""KonfAI's UNet, trained and run by KonfAI's own commands, for `peers.py`.

The configuration is that of KonfAI's examples: the UNet of its segmentation example (32 to 256 channels) with one
linear output, and the chain of its synthesis example (intensities clipped at the 99.5th percentile and standardised,
five slices in, one whole slice a step, L1, AdamW at 1e-3, flips, which are averaged over at prediction).  Three things
differ: both images are scaled inside the brain and the loss counts there alone, as for the other tools; convolutions
are followed by instance normalisation, without which it hardly learns in so few steps; and since the example's 100
epochs do not fit, the rate falls to 0 over the steps that do (`PolyLRScheduler`), at which KonfAI stops by itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel
import numpy as np
from levers import read
from numpy.typing import NDArray

from chiasm.cohorts.cases import Case

PROBES = (30, 130)  # steps of two short trainings, which show what a start and a step take
SLICES = 4  # beside the one that is predicted
OUTPUT = "UNetBlock_0:Head:Conv"
Config = Mapping[str, object]


def missing() -> str | None:
    """Say why KonfAI cannot run here, or return None."""
    found = importlib.util.find_spec("konfai") is not None
    return None if found else "konfai cannot be imported: pip install konfai SimpleITK"


def seconds_used() -> float:
    """Return what this process and those that it waited for have used of the processor."""
    return sum(os.times()[:4])


def lay_out(cases: Sequence[Case], folder: Path) -> None:
    """Write a dataset as KonfAI reads it: T1, T2 and MASK, the brain, of each case."""
    for case in cases:
        own = folder / case.id
        own.mkdir(parents=True, exist_ok=True)
        image = nibabel.load(case.images["t1"])
        brain = (np.asanyarray(image.dataobj) > 0).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(brain, image.affine), own / "MASK.nii.gz")
        for name in ("t1", "t2"):
            link = own / f"{name.upper()}.nii.gz"
            link.unlink(missing_ok=True)
            link.symlink_to(case.images[name].resolve())


def network(**learning: object) -> Config:
    """Return the section of the network."""
    block = {"kernel_size": 3, "stride": 1, "padding": 1, "bias": True, "activation": "ReLU", "norm_mode": "INSTANCE"}
    unet = {"dim": 2, "channels": [1 + SLICES, 32, 64, 128, 256], "nb_class": 1, "BlockConfig": block}
    unet |= {"nb_conv_per_stage": 2, "downsample_mode": "MAXPOOL", "upsample_mode": "CONV_TRANSPOSE"}
    return {
        "classpath": "segmentation.UNet.UNet",
        "UNet": {**unet, "attention": False, "block_type": "Conv"} | learning,
    }


def dataset(folder: Path, cases: Sequence[Case], groups: Sequence[str], **others: object) -> Config:
    """Return the section of the data: whole slices, whose sides are padded to multiples of 16."""
    shapes = [nibabel.load(case.images["t1"]).shape for case in cases]
    sides = [int(-(-max(shape[axis] for shape in shapes) // 16) * 16) for axis in (1, 0)]
    clip = {"min_value": "min", "max_value": "percentile:99.5", "mask": "MASK"}
    chain = {"Clip": clip, "Standardize": {"mask": "MASK", "inverse": False}}
    described = {
        name: {"groups_dest": {name: {"transforms": "None" if name == "MASK" else chain, "is_input": name == "T1"}}}
        for name in groups
    }
    patch = {"patch_size": [1, *sides], "overlap": "None", "pad_value": 0, "extend_slice": SLICES}
    return {"groups_src": described, "Patch": patch, "dataset_filenames": [f"{folder}:a:nii.gz"], **others}


def run(verb: str, folder: Path, config: Config, *others: str) -> None:
    """Run a command of KonfAI in a folder, with a configuration that is written there."""
    path = folder / f"{verb}.yml"
    path.write_text(json.dumps(config, indent=1))  # which is YAML, too
    command = [sys.executable, "-m", "konfai.main", verb, "-y", "-q", "--cpu", "1", "--config", path.name, *others]
    with (folder / f"{verb}.log").open("w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)


def train(cases: Sequence[Case], seed: int, steps: int, folder: Path) -> float:
    """Train for some steps; return the seconds of the processor."""
    start = seconds_used()
    lay_out(cases, folder / "Dataset")
    constant = {"Constant": {"nb_step": 0, "value": 1}}
    loss = {"MAE": {"is_loss": True, "schedulers": constant, "group": 0, "start": 0, "reduction": "mean"}}
    model = network(
        outputs_criterions={OUTPUT: {"targets_criterions": {"T2;MASK": {"criterions_loader": loss}}}},
        optimizer={"name": "AdamW", "lr": 1e-3, "weight_decay": 1e-3},
        schedulers={"PolyLRScheduler": {"nb_step": 0, "initial_lr": 1e-3, "max_steps": steps - 1}},  # 0 at the last
    )
    flips = {"Flip": {"f_prob": [0, 0.5, 0.5], "prob": 1}}
    augmented = {"DataAugmentation_0": {"data_augmentations": flips, "nb": 1}}
    shown = {"augmentations": augmented, "inline_augmentations": True, "shuffle": True}
    data = dataset(Path("Dataset"), cases, ("MASK", "T2", "T1"), batch_size=1, validation="None", **shown)
    trainer = {"Model": model, "Dataset": data, "train_name": "run", "manual_seed": seed, "epochs": 1000}
    trainer |= {"it_validation": steps, "it_lr_update": 1, "save_checkpoint_mode": "ALL", "EarlyStopping": "None"}
    run("TRAIN", folder, {"Trainer": trainer})
    return seconds_used() - start


def learn(cases: Sequence[Case], seed: int, seconds: float, folder: Path, known: Path) -> tuple[int, float]:
    """Train for as many steps as fit into the seconds; what a step takes is counted once and kept in a file."""
    if not known.exists():
        few, many = (train(cases, seed, steps, folder / f"probe-{steps}") for steps in PROBES)
        step = (many - few) / (PROBES[1] - PROBES[0])
        known.write_text(json.dumps({"set_up": few - PROBES[0] * step, "step": step}))
    cost = json.loads(known.read_text())
    steps = max(2, round((seconds - cost["set_up"]) / cost["step"]))
    return steps, train(cases, seed, steps, folder)


def predict(folder: Path, cases: Sequence[Case]) -> list[NDArray[np.float64]]:
    """Predict cases with the last checkpoint of a training."""
    lay_out(cases, folder / "Unseen")
    checkpoint = max((folder / "Checkpoints" / "run").glob("2*.pt"), key=lambda path: path.stat().st_mtime)
    flips = {
        f"DataAugmentation_{axis}": {"data_augmentations": {"Flip": {"f_prob": probability, "prob": 1}}, "nb": 1}
        for axis, probability in enumerate(([0, 0, 1], [0, 1, 0]))
    }
    written = {"name_class": "OutputDataset", "dataset_filename": "Dataset:nii.gz", "group": "MADE"}
    written |= {"same_as_group": "T1:T1", "reduction": "Mean", "Mean": {}}
    data = dataset(Path("Unseen"), cases, ("MASK", "T1"), augmentations=flips, batch_size=8)
    predictor = {"Model": network(outputs_criterions="None"), "Dataset": data, "train_name": "run", "combine": "Mean"}
    predictor |= {"outputs_dataset": {OUTPUT: {"OutputDataset": written}}}
    run("PREDICTION", folder, {"Predictor": predictor}, "--models", str(checkpoint.relative_to(folder)))
    return [read(next((folder / "Predictions").glob(f"**/{case.id}/MADE.nii.gz"))) for case in cases]
