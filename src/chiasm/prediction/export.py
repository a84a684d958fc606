"""`chiasm export`: a model as one file of ONNX, OpenVINO or torch, a description in JSON, a script that needs both.

A MONAI bundle holds the same three, in the folders of a bundle.

The network is all that follows the normalised sources and the mask, of one model or of several as one: from a slice (or
a volume) of any size to the image, the expected error and the spread in the target's unit.  Models that see slices of
different planes are one network for each plane.  `model.json` says what a network includes, what comes before, and how
several are combined; `predict.py` does that with numpy and nibabel.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from importlib.util import find_spec
from io import BytesIO
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
from chiasm.prediction.exported_network import ExportedNetwork, outputs_of
from chiasm.prediction.folders import load_models
from chiasm.prediction.model import Model, source_channels
from chiasm.prediction.model_files import single_runs
from chiasm.prediction.monai_bundle import FILES, write_bundle
from chiasm.prediction.passes import is_blended, networks_of
from chiasm.preparation.arrays import MARGIN, RANK_SD, SAME_SPACING
from chiasm.preparation.plan import AXES
from chiasm.recipe import Average, Plane
from chiasm.storage import copy_file, read_json, temporary_beside, write_json, write_text, writing

Form = Literal["onnx", "openvino", "torch", "monai-bundle"]

#: Of the card.  Programs that read the first know no other plane and no second network, so they must refuse the second.
FORMAT, FORMAT_OF_PLANES = 2, 3
CARD, SCRIPT = "model.json", "predict.py"
#: Kinds of a network's files; the first one is loaded.
NETWORK: Mapping[Form, tuple[str, ...]] = {
    "onnx": ("onnx",),
    "openvino": ("xml", "bin"),
    "torch": ("pt2",),
    "monai-bundle": ("pt2",),
}
#: Folders of the network and of card and script, from the folder of the results.
FOLDERS: Mapping[Form, tuple[str, str]] = {"monai-bundle": ("models", "scripts")}
PACKAGES: Mapping[Form, tuple[str, str]] = {"onnx": ("onnxruntime", "onnx"), "openvino": ("openvino", "fast")}
SAME_SIZE = 1e-3  # relative difference of voxel sizes up to which networks of several models take one input
#: What networks must share to take one input, in words, and the fields of their plans.
INPUTS: Mapping[str, str] = {"dimensions": "dims", "neighbouring slices": "slices", "use of ranks": "histogram"}
PATCH = {2: 64, 3: 32}  # most voxels of a side of what is compared, by dimensions

#: How the images of several networks are combined, for people who write their own program.
COMBINATION: Mapping[str, str] = {
    "n": "number of a network's models",
    "N": "sum of n over all networks",
    "image": "sum of n * image over all networks, divided by N",
    "expected-error": "sum of n * expected-error over all networks, divided by N; only where `outputs` names it",
    "spread": "square root of (the sum of (n - 1) * spread^2 + n * (image - combined image)^2 over all networks, "
    "divided by N - 1); a network of one model has no spread: take 0",
}


class Exported(NamedTuple):
    """The files of an export.

    Attributes:
        folder: Of the results.
        networks: The file of each network: one, or of models that see different planes one for each plane.
        card: `model.json`.
        script: `predict.py`.
        deviation: Largest difference of a network from torch on noise, as a share of each output's range.
    """

    folder: Path
    networks: tuple[Path, ...]
    card: Path
    script: Path
    deviation: float

    @property
    def network(self) -> Path:
        """The file of the network, of several the first one."""
        return self.networks[0]


def export(
    run: Path | Sequence[Path],
    out: Path,
    to: str,
    *,
    average: str = "auto",
    trust: str | Collection[str] = (),
    say: Callable[[str], None] = print,
) -> Exported:
    """Export a model, or several as one, to a folder that predicts without chiasm.

    Args:
        run: A run folder or its model folder; of several, or of a run of several models, the mean is exported, as
            `predict` averages them.
        out: Where the networks, `model.json` and `predict.py` go.
        to: "onnx", "openvino", "torch" (a `.pt2` of `torch.export`), or "monai-bundle" (the same as a MONAI bundle).
        average: As for `predict`: whether the network makes the mean over image and mirror image.
        trust: As for `load_model`.
        say: Called with a line before each network is written, which takes a while.

    Raises:
        RecipeError: If there is no such form or average, its package is missing, or a model has what is not exported:
            stages, super-resolution, corrected shading, or a network that is blended from windows.
        RunError: If there is no model, several cannot be averaged, `out` holds files of somebody else, or the exported
            network computes other values than torch.
        ChiasmError: If the files cannot be written.
    """
    form = _check_form(to)
    runs = single_runs([run] if isinstance(run, Path) else run)
    with locked(out):
        models = load_models(runs, trust)
        for model in models:
            _check_model(model)
        _check_inputs(models, runs)
        averaged, parts = common_average(average, models), _by_plane(models, form)
        places = _places(form, out, parts)
        if not places.card.is_file():
            others = FILES if form == "monai-bundle" else ()
            own = [path.relative_to(out).as_posix() for path in (*places.files, places.card, places.script)]
            refuse_foreign(out, [*own, *others])
        seen = [[models[number] for number in part.models] for part in parts]
        networks = [(ExportedNetwork(some, averaged, models), _shapes(some)) for some in seen]
        older = _networks_of_before(places)
        found = _write(form, networks, places, out, say)
        write_json(places.card, describe_export(models, form, parts, averaged))
        write_text(places.script, (files("chiasm.prediction") / "exported" / "predict.py.txt").read_text("utf-8"))
        if form == "monai-bundle":
            write_bundle(out, models, [path.relative_to(out).as_posix() for path in places.firsts], seen)
        with writing(out):
            for path in older.difference(places.files):
                path.unlink(missing_ok=True)
    return Exported(out, places.firsts, places.card, places.script, found)


class NetworkOfPlane(NamedTuple):
    """A network of an export, and its place.

    Attributes:
        plane: Of the slices that it sees; of a network in 3D "axial", as in its plan.
        models: The numbers of its models among those that are exported, from 0.
        outputs: Names of its output channels.
        files: Names of its files; the first one is loaded.
    """

    plane: Plane
    models: tuple[int, ...]
    outputs: tuple[str, ...]
    files: tuple[str, ...]


def _by_plane(models: Sequence[Model], form: Form) -> list[NetworkOfPlane]:
    """Put models that see slices of one plane into one network, in the order in which the planes occur."""
    planes = tuple(dict.fromkeys(model.plan.plane for model in models))
    parts = []
    for plane in planes:
        numbers = tuple(number for number, model in enumerate(models) if model.plan.plane == plane)
        outputs = outputs_of([models[number] for number in numbers], models)
        stem = "model" if len(planes) == 1 else f"model-{plane}"
        parts.append(NetworkOfPlane(plane, numbers, tuple(outputs), tuple(f"{stem}.{kind}" for kind in NETWORK[form])))
    return parts


class _Places(NamedTuple):
    """The places of an export: files of each network, card, script."""

    networks: tuple[tuple[Path, ...], ...]
    card: Path
    script: Path

    @property
    def files(self) -> list[Path]:
        """The files of all networks."""
        return [path for network in self.networks for path in network]

    @property
    def firsts(self) -> tuple[Path, ...]:
        """The file of each network that is loaded."""
        return tuple(network[0] for network in self.networks)


def _places(form: Form, out: Path, parts: Iterable[NetworkOfPlane]) -> _Places:
    models, scripts = (out / folder for folder in FOLDERS.get(form, ("", "")))
    networks = tuple(tuple(models / name for name in part.files) for part in parts)
    return _Places(networks, scripts / CARD, scripts / SCRIPT)


def _networks_of_before(places: _Places) -> set[Path]:
    """Return the files that the card of an earlier export into the same folder names: the new card will not."""
    try:
        card = read_json(places.card) if places.card.is_file() else {}
        named = [card["network"]] if "network" in card else []
        named += [one["file"] for one in card.get("networks", ())]
        names = {Path(name).name for name in named if card["format"] in (FORMAT, FORMAT_OF_PLANES)}
    except (RunError, KeyError, TypeError, AttributeError):
        return set()  # no card of this program
    names |= {Path(name).with_suffix(".bin").name for name in names if name.endswith(".xml")}
    return {places.firsts[0].with_name(name) for name in names}


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


#: A network, and two shapes of its input (see `_shapes`).
Shaped = tuple[nn.Module, Sequence[tuple[int, ...]]]


def _write(form: Form, networks: Iterable[Shaped], places: _Places, out: Path, say: Callable[[str], None]) -> float:
    """Write networks and compare each with torch before a file gets its name; return the largest difference."""
    trial, found = temporary_beside(out / "trial"), 0.0
    with writing(out):
        trial.mkdir()  # beside the results: what a killed export leaves there is removed by the next one
    try:
        for number, (network, place) in enumerate(zip(networks, places.firsts, strict=True), 1):
            say(f"network {number} of {len(places.firsts)}: writing {place.name}, and comparing it with torch")
            with writing(place):
                difference = _write_one(form, network, trial / place.name)
            if not difference <= TOLERANCE:
                raise RunError(
                    f"{form} computes other values than torch",
                    path=place,
                    reason="engine",
                    found=f"{difference:.2g} of the range",
                    expected=f"at most {TOLERANCE:g}",
                    hint="Export to another form.",
                )
            found = max(found, difference)
        for target in places.files:
            copy_file(trial / target.name, target)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return found


def _write_one(form: Form, network: Shaped, path: Path) -> float:
    """Write a network; return its largest difference from torch on noise of two sizes."""
    module, shapes = network
    with _refusing():
        exported = export_network(module, shapes[0])
    program, differences = _WRITERS[form](exported, shapes[0], path), []
    for shape in shapes:
        noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        with _refusing():
            made = program(noise)
        differences.append(deviation(made, module(noise).detach().numpy()))
    return float(np.max(differences))  # not a number, if one is


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
    network = convert_network("openvino", exported, shape)
    try:
        openvino.save_model(network, path, compress_to_fp16=False)
    except RuntimeError as error:  # OpenVINO does not say why it wrote less: `writing` takes that for a full disk
        raise OSError from error
    program = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda image: np.array(program(image.numpy())[0])


def _write_torch(exported: ExportedProgram, shape: tuple[int, ...], path: Path) -> Program:  # noqa: ARG001
    content = BytesIO()
    torch.export.save(exported, content)
    path.write_bytes(content.getbuffer())  # on a full disk, torch's own writing ends the whole process
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


def describe_export(
    models: Sequence[Model], form: Form, parts: Sequence[NetworkOfPlane], average: Average
) -> dict[str, Any]:
    """Describe what the networks do, and the steps before and after them, in plain numbers and texts.

    Args:
        models: That are exported as one.
        form: Of the networks' files.
        parts: The networks.
        average: "flip" for the mean over image and mirror image.
    """
    plan, name = models[0].plan, name_of(models)
    return {
        **_describe_networks(models, form, parts),
        "form": "torch" if form == "monai-bundle" else form,
        "model": {"method": name.titles, "count": len(models), "sha256": name.sha256},
        "notice": "Synthetic images for research; not for diagnostic use.",
        "dims": plan.dims,
        "slices": plan.slices if plan.dims == 2 else 1,
        "spacing_mm": list(plan.spacing_mm),
        "spacing_tolerance": SAME_SPACING,
        "mask": {"rule": plan.mask_rule, "margin_voxels": MARGIN},
        "sources": [{"name": name, "kind": kind} for name, kind in zip(plan.sources, plan.source_kinds, strict=True)],
        "window_hu": list(plan.window_hu),
        "ranks": {"used": plan.histogram, "sd": RANK_SD},
        "target": {"name": plan.target, "unit": plan.target_unit, "background": plan.target_background},
        "outputs": outputs_of(models, models),
        "network_includes": {
            "padding_to_multiples_of": max(networks_of(model).multiple for model in models),
            "target_unit": True,
            **({"mean_of_models": len(models)} if len(parts) == 1 else {}),
            "mean_with_mirror_image": average == "flip",
            "calibration_of_expected_error": [model.calibration is not None for model in models],
        },
        "models": [_describe_model(model) for model in models],
    }


def _describe_networks(models: Sequence[Model], form: Form, parts: Sequence[NetworkOfPlane]) -> dict[str, Any]:
    """Describe where the networks lie, which slices each one sees, which models it contains, how they are combined."""
    folder, is_flat = "../models/" if form == "monai-bundle" else "", models[0].plan.dims == 2
    networks = [
        {
            "file": folder + part.files[0],
            "plane": part.plane if is_flat else None,
            "axes": list(AXES[part.plane]),  # 0, 1, 2 of the volume: those of a slice, then the one across slices
            "models": list(part.models),
            "outputs": list(part.outputs),
        }
        for part in parts
    ]
    ras = "RAS: from left to right, back to front, feet to head"
    if len(parts) == 1 and parts[0].plane == "axial":
        seen = "the network sees slices of the first two"
        return {"format": FORMAT, "network": networks[0]["file"], "networks": networks, "axes": f"{ras}; {seen}"}
    seen = "`networks` says by numbers from 0 which two are those of the slices that each one sees; the third is across"
    combination = {"combination": COMBINATION} if len(parts) > 1 else {}
    return {"format": FORMAT_OF_PLANES, "networks": networks, **combination, "axes": f"{ras}; {seen}"}


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
