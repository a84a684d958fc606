"""The files of a MONAI bundle around exported networks: their inputs and outputs, and how to run them.

A bundle is a folder: `configs/metadata.json` describes it, `configs/inference.json` says in MONAI's language
of configurations what `python -m monai.bundle run` does, `models/` holds the network and `scripts/` the code
that both need.  Nothing in it needs chiasm.

MONAI's format describes one network.  Of several, which see slices of different planes, that is the first; the others
are loaded beside it.

Reference:
    MONAI Bundle Specification, docs.monai.io; its fields are written here from that description.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from chiasm import __version__
from chiasm.prediction.ensemble import name_of
from chiasm.prediction.exported_network import outputs_of
from chiasm.prediction.manifest import NOTICE
from chiasm.prediction.model import Model, source_channels
from chiasm.prediction.passes import networks_of
from chiasm.storage import write_json, write_text

METADATA, INFERENCE = "configs/metadata.json", "configs/inference.json"
NETWORK_SCRIPT, PACKAGE, README = "scripts/network.py", "scripts/__init__.py", "docs/README.md"
FILES = (METADATA, INFERENCE, NETWORK_SCRIPT, PACKAGE, README)
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
NEWEST_TESTED = "1.6.1"  # MONAI that bundles were run with, where none is installed here


def write_bundle(
    out: Path, models: Sequence[Model], networks: Sequence[str], members: Sequence[Sequence[Model]]
) -> None:
    """Write the other files of a bundle beside its networks.

    Args:
        out: Folder of the bundle.
        models: That are exported as one.
        networks: File of each network, from `out`.
        members: The models in each network.

    Raises:
        ChiasmError: If a file cannot be written.
    """
    write_json(out / METADATA, metadata(models, members))
    write_json(out / INFERENCE, inference(models[0], networks))
    source = files("chiasm.prediction") / "exported"
    write_text(out / NETWORK_SCRIPT, (source / "network.py.txt").read_text("utf-8"))
    write_text(out / PACKAGE, '"""Code of this bundle."""\n')
    write_text(out / README, _readme(models[0]))


def metadata(models: Sequence[Model], members: Sequence[Sequence[Model]]) -> dict[str, Any]:
    """Describe one model, or several that are exported as one, in the form of the bundle specification.

    Args:
        models: That are exported.
        members: The models in each network; the first network is the one whose data is described.
    """
    plan, name = models[0].plan, name_of(models)
    sources = " and ".join(plan.sources)
    mean = f"mean of {len(models)} models, " if len(models) > 1 else ""
    made = ", ".join(outputs_of(models, models))
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported by chiasm {__version__}"},
        "monai_version": _version("monai") or NEWEST_TESTED,
        "pytorch_version": (_version("torch") or "").partition("+")[0],
        "numpy_version": _version("numpy") or "",
        "required_packages_version": {name: _version(name) or "" for name in ("nibabel", "scipy")},
        "name": f"{sources} to {plan.target}",
        "task": f"Synthesis of {plan.target} from {sources}",
        "description": f"{mean}{name.titles}: {made}. Model with sha256 {name.sha256}.{_in_planes(members)}",
        "authors": "whoever trained the model",
        "copyright": "of whoever trained the model",
        "intended_use": NOTICE,
        "network_data_format": {
            "inputs": {"image": _tensor(members[0], _inputs(models[0]))},
            "outputs": {"pred": _tensor(members[0], outputs_of(members[0], models))},
        },
    }


def _in_planes(members: Sequence[Sequence[Model]]) -> str:
    """Say which planes the slices of the networks have, where not all are axial, as a further sentence."""
    planes = [models[0].plan.plane for models in members]
    if planes == ["axial"]:
        return ""
    if len(planes) == 1:
        return f" The network sees {planes[0]} slices."
    return (
        f" {len(planes)} networks see {', '.join(planes[:-1])} and {planes[-1]} slices, and scripts/predict.py averages"
        " them; network_data_format is that of the first network."
    )


def _tensor(models: Sequence[Model], channels: Sequence[str]) -> dict[str, Any]:
    """Describe a tensor of a network; it takes sides of any size from 2, which the format cannot say."""
    plan, multiple = models[0].plan, max(networks_of(model).multiple for model in models)
    return {
        "type": "image",
        "format": "magnitude",
        "modality": "CT" if plan.target_unit == "HU" else "MR",
        "num_channels": len(channels),
        "spatial_shape": [f"{multiple}*n" if multiple > 1 else "*"] * plan.dims,
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": False,
        "channel_def": {str(number): name for number, name in enumerate(channels)},
    }


def _inputs(model: Model) -> list[str]:
    """Name the input channels: sources and their ranks, normalised, then the mask, each with its slices."""
    plan = model.plan
    images = [*plan.sources, *(f"{name}, ranks" for name in plan.sources if plan.histogram)]
    slices = plan.slices if plan.dims == 2 else 1
    numbered = ((name, number) for name in (*images, "mask") for number in range(slices))
    names = [f"{name}, slice {number}" if slices > 1 else name for name, number in numbered]
    assert len(names) == source_channels(plan) + slices
    return names


def inference(model: Model, networks: Sequence[str]) -> Mapping[str, Any]:
    """Describe the steps of `monai.bundle run`: load the networks, predict one case from files, write the images."""
    ends = ["", *(f"_{number}" for number in range(2, len(networks) + 1))]  # network, network_2, network_3
    loaded: dict[str, Any] = {}
    for end, file in zip(ends, networks, strict=True):
        target = {"_target_": "scripts.network.ExportedNetwork", "path": f"$@bundle_root + '/{file}'"}
        loaded |= {f"network_def{end}": target, f"network{end}": f"$@network_def{end}.to(@device)"}
    functions = ", ".join(f"@network{end}.on_arrays" for end in ends)
    given = functions if len(networks) == 1 else f"[{functions}]"
    return {
        "imports": ["$import torch", "$from scripts.predict import save"],
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/eval'",
        "output_prefix": "$@output_dir + '/prediction'",
        "source_files": [f"{name}.nii.gz" for name in model.plan.sources],
        "mask_file": None,
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        **loaded,
        "run": [f"$save(@source_files, @output_prefix, @mask_file, {given})"],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _readme(model: Model) -> str:
    words = " ".join(f"'{name}.nii.gz'," for name in model.plan.sources).rstrip(",")
    return (
        f"# {' and '.join(model.plan.sources)} to {model.plan.target}\n\n{NOTICE}\n\n"
        "Run in the folder of the bundle, with `pip install 'monai[fire,nibabel]' scipy`:\n\n```\n"
        f'python -m monai.bundle run --config_file configs/inference.json --source_files "[{words}]" '
        "--output_prefix made/case\n```\n\n"
        f"It writes `made/case_{model.plan.target}.nii.gz`, the expected error where the method has it, and the "
        "spread of several models. Sources lie on one grid with the voxel size of training; "
        "`--mask_file` names a mask where the image is not cut out on "
        "a constant background. `scripts/model.json` says what is done before the network, and what it includes.\n"
    )
