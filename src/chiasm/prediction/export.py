"""`chiasm export`: a model as one file of ONNX, OpenVINO or torch, a description in JSON, a script that needs both.

A MONAI bundle holds the same three, in the folders of a bundle.

The network is generator, local discriminator and refiner in one, from a slice
(or a volume) of normalised sources and mask to the image and the expected error
before calibration.  `model.json` says what comes before and after; `predict.py`
does it with numpy and nibabel.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional

from chiasm.errors import RecipeError, RunError, unknown
from chiasm.locks import locked
from chiasm.methods import title_of
from chiasm.outputs import refuse_foreign
from chiasm.prediction.compiled import TOLERANCE, convert_network, deviation, export_network, import_openvino
from chiasm.prediction.engines import freeze_for_inference
from chiasm.prediction.model import Model, load_model, source_channels
from chiasm.prediction.monai_bundle import FILES, write_bundle
from chiasm.prediction.passes import Chain, Networks, is_blended, networks_of
from chiasm.preparation.arrays import MARGIN, RANK_SD, SAME_SPACING
from chiasm.storage import copy_file, write_json, write_text

Form = Literal["onnx", "openvino", "torch", "monai-bundle"]

FORMAT = 1
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
PATCH = 64  # most voxels of a side, of what is compared


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


class ExportedNetwork(nn.Module):
    """The exported network: `Chain`, with the raw expected error in place of its logits.

    Args:
        chain: Generator, local discriminator and refiner.
        error_scale: s of the soft targets, normalised units.
    """

    def __init__(self, chain: Chain, error_scale: float) -> None:
        super().__init__()
        self.chain, self.error_scale = chain, error_scale

    def forward(self, stack: Tensor) -> Tensor:
        """Map source and mask, (1, channels + slices, *S), to the image, and the raw error where there is one."""
        made: Tensor = self.chain(stack)
        if made.shape[1] == 1:
            return made
        return torch.cat([made[:, :1], self.error_scale * functional.softplus(-made[:, 1:2])], dim=1)


def export(run: Path, out: Path, to: str, *, trust: str | Collection[str] = ()) -> Exported:
    """Export a model to a folder that predicts without chiasm.

    Args:
        run: A run folder or its model folder.
        out: Where network, `model.json` and `predict.py` go.
        to: "onnx", "openvino", "torch" (a `.pt2` of `torch.export`), or "monai-bundle" (the same as a MONAI bundle).
        trust: As for `load_model`.

    Raises:
        RecipeError: If there is no such form, its package is missing, or the model has parts that are not exported:
            stages, super-resolution, corrected shading, or a network that is blended from windows.
        RunError: If there is no model, `out` holds files of somebody else, or the exported network computes other
        values than torch.
    """
    form = _check_form(to)
    with locked(out):
        model = load_model(run, trust=trust)
        _check_model(model)
        places = _places(form, out)
        if not places.card.is_file():
            others = FILES if form == "monai-bundle" else ()
            own = [path.relative_to(out).as_posix() for path in (*places.networks, places.card, places.script)]
            refuse_foreign(out, [*own, *others])
        found = _write(form, _network(model), _shape(model), places.networks)
        write_json(places.card, describe_export(model, form))
        write_text(places.script, (files("chiasm.prediction") / "exported" / "predict.py.txt").read_text("utf-8"))
        if form == "monai-bundle":
            write_bundle(out, model, places.networks[0].relative_to(out).as_posix(), networks_of(model).multiple)
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


def _network(model: Model) -> ExportedNetwork:
    networks = networks_of(model)
    parts = (networks.generator, networks.local_discriminator, networks.refiner)
    generator, local_discriminator, refiner = (None if one is None else freeze_for_inference(one) for one in parts)
    assert generator is not None
    frozen = Networks(generator, local_discriminator, refiner).of_any_size
    conditional = model.recipe.discriminators.conditional
    chain = Chain(frozen, channels=source_channels(model.plan), conditional=conditional)
    network = ExportedNetwork(chain, float(model.error_scale)).eval()
    for tensor in (*network.parameters(), *network.buffers()):  # each with a storage of its own, as it is written
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return network


def _shape(model: Model) -> tuple[int, ...]:
    """Return the shape (C, *S) of the network's input."""
    plan = model.plan
    channels = source_channels(plan) + (plan.slices if plan.dims == 2 else 1)
    multiple = networks_of(model).multiple
    side = max(multiple, PATCH // multiple * multiple)
    return (channels, *(side,) * plan.dims)


def _write(form: Form, network: nn.Module, shape: tuple[int, ...], places: Sequence[Path]) -> float:
    """Write a network and compare the file with torch before it gets its name; return the largest difference."""
    try:
        exported = export_network(network, shape)
    except Exception as error:  # torch raises anything
        raise RecipeError(
            "the network cannot be exported for images of any size",
            reason="not-exported",
            found=(str(error).strip() or type(error).__name__).splitlines()[0],
        ) from error
    with tempfile.TemporaryDirectory(prefix="chiasm-") as place:
        path = Path(place) / NETWORK[form][0]
        noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        found = deviation(_WRITERS[form](exported, shape, path, noise), network(noise).detach().numpy())
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
    return found


def _write_onnx(exported: ExportedProgram, shape: tuple[int, ...], path: Path, noise: Tensor) -> NDArray[np.float32]:
    import onnxruntime

    path.write_bytes(convert_network("onnxruntime", exported, shape).SerializeToString())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: noise.numpy()})[0]
    return found


def _write_openvino(
    exported: ExportedProgram, shape: tuple[int, ...], path: Path, noise: Tensor
) -> NDArray[np.float32]:
    openvino = import_openvino()
    openvino.save_model(convert_network("openvino", exported, shape), path, compress_to_fp16=False)
    program = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found: NDArray[np.float32] = program(noise.numpy())[0]
    return found


def _write_torch(exported: ExportedProgram, shape: tuple[int, ...], path: Path, noise: Tensor) -> NDArray[np.float32]:  # noqa: ARG001
    torch.export.save(exported, path)
    found: NDArray[np.float32] = torch.export.load(path).module()(noise).detach().numpy()
    return found


_WRITERS: Mapping[Form, Callable[[ExportedProgram, tuple[int, ...], Path, Tensor], NDArray[np.float32]]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "torch": _write_torch,
    "monai-bundle": _write_torch,
}


def describe_export(model: Model, form: Form) -> dict[str, Any]:
    """Describe the steps before and after the network, in plain numbers and texts.

    Args:
        model: That is exported.
        form: Of the network's file.
    """
    plan, calibration = model.plan, model.calibration
    ends = plan.target_reference.apply(np.array(plan.target_range))
    return {
        "format": FORMAT,
        "network": "../models/model.pt2" if form == "monai-bundle" else NETWORK[form][0],
        "form": "torch" if form == "monai-bundle" else form,
        "model": {"method": title_of(model.recipe.method), "sha256": model.sha256},
        "notice": "Synthetic images for research; not for diagnostic use.",
        "axes": "RAS: from right to left, back to front, feet to head; the network sees slices of the first two",
        "dims": plan.dims,
        "slices": plan.slices if plan.dims == 2 else 1,
        "multiple": networks_of(model).multiple,
        "average": model.recipe.generator.average,
        "spacing_mm": list(plan.spacing_mm),
        "spacing_tolerance": SAME_SPACING,
        "mask": {"rule": plan.mask_rule, "margin_voxels": MARGIN},
        "sources": [{"name": name, "kind": kind} for name, kind in zip(plan.sources, plan.source_kinds, strict=True)],
        "window_hu": list(plan.window_hu),
        "ranks": {"used": plan.histogram, "sd": RANK_SD},
        "target": {
            "name": plan.target,
            "unit": plan.target_unit,
            "map": plan.target_reference.to_dict(),
            "clip": list(plan.target_range) if plan.target_unit == "HU" else None,
            "background": plan.target_background,
        },
        "expected_error": None
        if model.local_discriminator is None
        else {
            "slope": float(np.ptp(plan.target_range) / np.ptp(ends)),
            "calibration": None if calibration is None else {"x": list(calibration.x), "y": list(calibration.y)},
            "verdict": "not calibrated" if calibration is None else calibration.verdict,
        },
    }
