"""`chiasm export`: a model as one file of ONNX, OpenVINO or torch, a description in JSON, a script that needs both.

A MONAI bundle holds the same three, in the folders of a bundle.

The network is all that follows the normalised sources and the mask, of one model or of several as one: from a slice (or
a volume) of any size to the image, the expected error and the spread in the target's unit.  `model.json` says what it
includes and what comes before; `predict.py` does that with numpy and nibabel.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram

from chiasm.errors import RecipeError, RunError, unknown
from chiasm.locks import locked
from chiasm.methods import title_of
from chiasm.outputs import refuse_foreign
from chiasm.prediction.compiled import TOLERANCE, convert_network, deviation, export_network, import_openvino
from chiasm.prediction.ensemble import common_average, name_of
from chiasm.prediction.exported_network import ExportedNetwork
from chiasm.prediction.folders import load_models
from chiasm.prediction.model import Model, source_channels
from chiasm.prediction.model_files import single_runs
from chiasm.prediction.monai_bundle import FILES, write_bundle
from chiasm.prediction.passes import is_blended, networks_of
from chiasm.preparation.arrays import MARGIN, RANK_SD, SAME_SPACING
from chiasm.recipe import Average
from chiasm.storage import copy_file, temporary_beside, write_json, write_text, writing

Form = Literal["onnx", "openvino", "torch", "monai-bundle"]

FORMAT = 2
CARD, SCRIPT = "model.json", "predict.py"
NETWORK: Mapping[Form, tuple[str, ...]] = {
    "onnx": ("model.onnx",),
    "openvino": ("model.xml", "model.bin"),
    "torch": ("model.pt2",),
    "monai-bundle": ("model.pt2",),
}
#: Folders of the network and of card and script, from the folder of the results.
FOLDERS: Mapping[Form, tuple[str, str]] = {"monai-bundle": ("models", "scripts")}
PACKAGES: Mapping[Form, tuple[str, str]] = {"onnx": ("onnxruntime", "onnx"), "openvino": ("openvino", "fast")}
SAME_SIZE = 1e-3  # relative difference of voxel sizes up to which networks of several models take one input
#: What networks must share to take one input, in words, and the fields of their plans.
INPUTS: Mapping[str, str] = {"dimensions": "dims", "neighbouring slices": "slices", "use of ranks": "histogram"}
PATCH = {2: 64, 3: 32}  # most voxels of a side of what is compared, by dimensions


class Exported(NamedTuple):
    """The files of an export.

    Attributes:
        folder: Of the results.
        network: The file of the network.
        card: `model.json`.
        script: `predict.py`.
        deviation: Largest difference from torch on noise, as a share of each output's range.
    """

    folder: Path
    network: Path
    card: Path
    script: Path
    deviation: float


def export(
    run: Path | Sequence[Path], out: Path, to: str, *, average: str = "auto", trust: str | Collection[str] = ()
) -> Exported:
    """Export a model, or several as one, to a folder that predicts without chiasm.

    Args:
        run: A run folder or its model folder; of several, or of a run of several models, the mean is exported, as
            `predict` averages them.
        out: Where network, `model.json` and `predict.py` go.
        to: "onnx", "openvino", "torch" (a `.pt2` of `torch.export`), or "monai-bundle" (the same as a MONAI bundle).
        average: As for `predict`: whether the network makes the mean over image and mirror image.
        trust: As for `load_model`.

    Raises:
        RecipeError: If there is no such form or average, its package is missing, or a model has what is not exported:
            stages, super-resolution, corrected shading, or a network that is blended from windows.
        RunError: If there is no model, several cannot be averaged, `out` holds files of somebody else, or the exported
            network computes other values than torch.
    """
    form = _check_form(to)
    runs = single_runs([run] if isinstance(run, Path) else run)
    with locked(out):
        models = load_models(runs, trust)
        for model in models:
            _check_model(model)
        _check_inputs(models, runs)
        averaged = common_average(average, models)
        places = _places(form, out)
        if not places.card.is_file():
            others = FILES if form == "monai-bundle" else ()
            own = [path.relative_to(out).as_posix() for path in (*places.networks, places.card, places.script)]
            refuse_foreign(out, [*own, *others])
        network = ExportedNetwork(models, averaged)
        found = _write(form, network, _shapes(models), places.networks, out)
        write_json(places.card, describe_export(models, form, network.outputs, averaged))
        write_text(places.script, (files("chiasm.prediction") / "exported" / "predict.py.txt").read_text("utf-8"))
        if form == "monai-bundle":
            write_bundle(out, models, places.networks[0].relative_to(out).as_posix(), network.outputs)
    return Exported(out, places.networks[0], places.card, places.script, found)


class _Places(NamedTuple):
    """The places of an export: files of the network, card, script."""

    networks: list[Path]
    card: Path
    script: Path


def _places(form: Form, out: Path) -> _Places:
    models, scripts = (out / folder for folder in FOLDERS.get(form, ("", "")))
    return _Places([models / name for name in NETWORK[form]], scripts / CARD, scripts / SCRIPT)


def _check_form(to: str) -> Form:
    for form in get_args(Form):
        if form == to:
            package, extra = PACKAGES.get(form, ("torch", ""))
            if find_spec(package) is None:
                raise RecipeError(
                    f"the export to {form} needs a package that is not installed",
                    reason="no-package",
                    found=package,
                    hint=f"pip install 'chiasm[{extra}]'",
                )
            known: Form = form
            return known
    raise unknown("form of export", to, get_args(Form))


def _check_model(model: Model) -> None:
    """Refuse a model with parts that are not exported."""
    plan = model.plan
    lacking = {
        "stages": bool(model.earlier),
        "super-resolution": plan.degradation is not None,
        "corrected shading (data.bias_correction)": plan.bias_correction != "none",
        "registered sources": plan.registration != "none" and len(plan.sources) > 1,
    }
    for what, is_there in lacking.items():
        if is_there:
            raise RecipeError(
                f"a model with {what} is not exported", reason="not-exported", hint="Predict with chiasm predict."
            )
    if is_blended(model.generator, plan):
        raise RecipeError(
            "a network whose result depends on the size of its input is not exported",
            reason="not-exported",
            found=model.recipe.generator.network,
            hint="Predict with chiasm predict.",
        )


def _shapes(models: Sequence[Model]) -> list[tuple[int, ...]]:
    """Return two shapes (C, *S) of the network's input: one whose sides no model takes as they are, one that all do."""
    plan = models[0].plan
    channels = source_channels(plan) + (plan.slices if plan.dims == 2 else 1)
    multiple = max(networks_of(model).multiple for model in models)
    side = max(2 * multiple, PATCH[plan.dims] // multiple * multiple)
    return [(channels, *(side - 3 - 2 * axis for axis in range(plan.dims))), (channels, *(side,) * plan.dims)]


@contextmanager
def _refusing() -> Iterator[None]:
    """Refuse a network that cannot be recorded, or whose recording takes one size only."""
    try:
        yield
    except Exception as error:  # torch raises anything
        raise RecipeError(
            "the network cannot be exported for images of any size",
            reason="not-exported",
            found=(str(error).strip() or type(error).__name__).splitlines()[0],
        ) from error


def _write(
    form: Form, network: nn.Module, shapes: Sequence[tuple[int, ...]], places: Sequence[Path], out: Path
) -> float:
    """Write a network and compare the file with torch before it gets its name; return the largest difference."""
    with _refusing():
        exported = export_network(network, shapes[0])
    trial = temporary_beside(out / "trial")
    with writing(out):
        trial.mkdir()  # beside the results: what a killed export leaves there is removed by the next one
    try:
        path = trial / NETWORK[form][0]
        program, found = _WRITERS[form](exported, shapes[0], path), 0.0
        for shape in shapes:
            noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
            with _refusing():
                made = program(noise)
            found = max(found, deviation(made, network(noise).detach().numpy()))
        if not found <= TOLERANCE:
            raise RunError(
                f"{form} computes other values than torch",
                path=places[0],
                reason="engine",
                found=f"{found:.2g} of the range",
                expected=f"at most {TOLERANCE:g}",
                hint="Export to another form.",
            )
        for target in places:
            copy_file(path.with_name(target.name), target)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return found


#: Runs a network that was written on an image (1, C, *S).
Program = Callable[[Tensor], NDArray[np.float32]]


def _write_onnx(exported: ExportedProgram, shape: tuple[int, ...], path: Path) -> Program:
    import onnxruntime

    path.write_bytes(convert_network("onnxruntime", exported, shape).SerializeToString())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: np.asarray(session.run(None, {name: image.numpy()})[0])


def _write_openvino(exported: ExportedProgram, shape: tuple[int, ...], path: Path) -> Program:
    openvino = import_openvino()
    openvino.save_model(convert_network("openvino", exported, shape), path, compress_to_fp16=False)
    program = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda image: np.array(program(image.numpy())[0])


def _write_torch(exported: ExportedProgram, shape: tuple[int, ...], path: Path) -> Program:  # noqa: ARG001
    torch.export.save(exported, path)
    program = torch.export.load(path).module()
    return lambda image: np.asarray(program(image).detach().numpy())


_WRITERS: Mapping[Form, Callable[[ExportedProgram, tuple[int, ...], Path], Program]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "torch": _write_torch,
    "monai-bundle": _write_torch,
}


def _check_inputs(models: Sequence[Model], runs: Sequence[Path]) -> None:
    """Refuse several models whose networks take other inputs than the first one's.

    Raises:
        RecipeError: If there are such models.
    """
    first = models[0].plan
    for model, run in zip(models[1:], runs[1:]):
        plan = model.plan
        same = {name: getattr(plan, field) == getattr(first, field) for name, field in INPUTS.items()}
        same["voxel size"] = bool(np.allclose(plan.spacing_mm, first.spacing_mm, rtol=SAME_SIZE))
        for name, is_same in same.items():
            if not is_same:
                raise RecipeError(
                    f"cannot be exported as one with {runs[0]}: their networks differ in {name}",
                    path=run,
                    reason="not-exported",
                    hint="Export each alone, or predict with chiasm predict.",
                )


def describe_export(models: Sequence[Model], form: Form, outputs: Sequence[str], average: Average) -> dict[str, Any]:
    """Describe what the network does, and the steps before and after it, in plain numbers and texts.

    Args:
        models: That are exported as one.
        form: Of the network's file.
        outputs: Names of the network's output channels.
        average: "flip" for the mean over image and mirror image.
    """
    plan, name = models[0].plan, name_of(models)
    titles = " and ".join(dict.fromkeys(title_of(model.recipe.method) for model in models))
    return {
        "format": FORMAT,
        "network": "../models/model.pt2" if form == "monai-bundle" else NETWORK[form][0],
        "form": "torch" if form == "monai-bundle" else form,
        "model": {"method": titles, "count": len(models), "sha256": name.sha256},
        "notice": "Synthetic images for research; not for diagnostic use.",
        "axes": "RAS: from right to left, back to front, feet to head; the network sees slices of the first two",
        "dims": plan.dims,
        "slices": plan.slices if plan.dims == 2 else 1,
        "spacing_mm": list(plan.spacing_mm),
        "spacing_tolerance": SAME_SPACING,
        "mask": {"rule": plan.mask_rule, "margin_voxels": MARGIN},
        "sources": [{"name": name, "kind": kind} for name, kind in zip(plan.sources, plan.source_kinds, strict=True)],
        "window_hu": list(plan.window_hu),
        "ranks": {"used": plan.histogram, "sd": RANK_SD},
        "target": {"name": plan.target, "unit": plan.target_unit, "background": plan.target_background},
        "outputs": list(outputs),
        "network_includes": {
            "padding_to_multiples_of": max(networks_of(model).multiple for model in models),
            "target_unit": True,
            "mean_of_models": len(models),
            "mean_with_mirror_image": average == "flip",
            "calibration_of_expected_error": [model.calibration is not None for model in models],
        },
        "models": [_describe_model(model) for model in models],
    }


def _describe_model(model: Model) -> dict[str, Any]:
    """Describe what the network contains of one model."""
    plan, calibration = model.plan, model.calibration
    return {
        "method": title_of(model.recipe.method),
        "sha256": model.sha256,
        "target_map": plan.target_reference.to_dict(),
        "clip": list(plan.target_range) if plan.target_unit == "HU" else None,
        "expected_error": None
        if model.local_discriminator is None
        else {
            "calibration": None if calibration is None else {"x": list(calibration.x), "y": list(calibration.y)},
            "verdict": "not calibrated" if calibration is None else calibration.verdict,
        },
    }
