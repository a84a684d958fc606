"""Networks on OpenVINO and ONNX Runtime, which are faster than torch on a CPU.

A network is converted once and kept in the user's cache folder, under a name made of the model, its weights, the
engine's version and the CPU.  Compiled code is never read from a model folder, because that would run another person's
code.

Converters change results without a warning (OpenVINO 2026.4.1: average pooling
with `ceil_mode`, `interpolate` with `antialias`, Softplus with `beta`).  So
each network is compared with torch on one patch before it is used, also when
it comes from the cache.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from chiasm import __version__
from chiasm.errors import ChiasmError, RunError
from chiasm.prediction.engines import Engine, Precision
from chiasm.prediction.tiling import is_out_of_memory
from chiasm.storage import whole_file

#: Most that a converted network may differ from torch, both in float32, as a share of each output channel's range.
TOLERANCE = 1e-4
#: In bfloat16, how much farther from float32 it may be than torch itself is.
AS_CLOSE_AS_TORCH = 2.0
EXAMPLE, PATCH = 96, 64  # most voxels of a side: of what a network is exported with, and compared on
LOCK_SECONDS = 600.0

Program = Callable[[NDArray[np.float32]], NDArray[np.float32]]
Shape = tuple[int, ...]
ANY: Shape = ()  # the sizes of a program that takes all


class Converter(NamedTuple):
    """The functions that differ between engines.

    Attributes:
        convert: From an exported network and the shape of its input, with -1 for any size, to the engine's own model.
        compile: From that model and a precision to what is kept in the cache.
        load: From that, the precision and the number of threads to a function of one image (1, C, *S); its result
            holds until the next call.
    """

    convert: Callable[[ExportedProgram, Sequence[int]], Any]
    compile: Callable[[Any, Precision], bytes]
    load: Callable[[bytes, Precision, int], Program]


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which sends an event to Google at each import, unasked."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # it then takes its own stub
    import openvino

    return openvino


def _to_openvino(exported: ExportedProgram, shape: Sequence[int]) -> Any:
    model = import_openvino().convert_model(exported)
    model.reshape(list(shape))
    return model


def _hints(precision: Precision) -> dict[str, str]:
    """Fix the precision; OpenVINO would choose it by the CPU, even for a network that was compiled in another one."""
    return {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16-mixed" else "f32"}


def _compile_openvino(model: Any, precision: Precision) -> bytes:
    kept = BytesIO()
    import_openvino().Core().compile_model(model, "CPU", _hints(precision)).export_model(kept)
    return kept.getvalue()


def _load_openvino(kept: bytes, precision: Precision, threads: int) -> Program:
    # Pinned to cores, two processes could share one.
    hints = {**_hints(precision), "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
    request = import_openvino().Core().import_model(kept, "CPU", hints).create_infer_request()

    def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = request.infer([image], share_inputs=True, share_outputs=True)[0]
        return found

    return run


def _to_onnx(exported: ExportedProgram, shape: Sequence[int]) -> Any:  # noqa: ARG001  # it knows its shape
    program = torch.onnx.export(exported, (), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto


def _compile_onnx(model: Any, precision: Precision) -> bytes:  # noqa: ARG001  # it has float32 alone
    kept: bytes = model.SerializeToString()
    return kept


def _load_onnx(kept: bytes, precision: Precision, threads: int) -> Program:  # noqa: ARG001
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(kept, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = session.run(None, {name: image})[0]
        return found

    return run


CONVERTERS = {
    "openvino": Converter(_to_openvino, _compile_openvino, _load_openvino),
    "onnxruntime": Converter(_to_onnx, _compile_onnx, _load_onnx),
}


class Compiled:
    """A network on a compiled engine, with torch in reserve.

    Its programs take one image at a time: of any size if the network can be
    exported so, else of the one size that each was made for.

    Args:
        engine: Of the CPU, and not torch.
        network: In evaluation mode; maps (N, C, *S) to (N, C_out, *S).
        key: Identifies the network beside its weights: the model's sha256, and which of its outputs these are.
    """

    def __init__(self, engine: Engine, network: nn.Module, key: str) -> None:
        self.engine, self.network = engine, network
        self.converter = CONVERTERS[engine.name]
        self.plain = replace(engine, name="torch").wrap(network)
        self.exact = replace(engine, name="torch", precision="32-true").wrap(network)
        self.key = f"{key} {_hash_weights(network)}"
        self.programs: dict[Shape, Program] = {}
        self.failed = False

    def __call__(self, images: Tensor) -> Tensor:
        """Map (N, C, *S) to (N, C_out, *S), float32.

        Raises:
            RunError: If the engine was asked for by name and cannot compute the network as torch does.
        """
        if self.failed:
            return self.plain(images)
        try:
            return self._run(images.numpy())
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.failed = True
            reason = str(error).strip().partition("\n")[0]
            if self.engine.by_name:
                raise RunError(
                    f"{self.engine.name} cannot compute this model: {reason}",
                    reason="engine",
                    hint="Use the engine auto or torch.",
                ) from error
            self.engine.notes.append(f"{self.engine.name} cannot compute this model, so torch did: {reason}")
            return self.plain(images)

    def _run(self, images: NDArray[np.float32]) -> Tensor:
        shape = images.shape[1:]
        program = self._in_memory(shape) or self._in_cache(shape) or self._build(shape)
        outputs = np.stack([program(image[None])[0].copy() for image in images])
        return torch.from_numpy(outputs)

    def _in_memory(self, shape: Shape) -> Program | None:
        return self.programs.get(ANY) or self.programs.get(shape[1:])

    def _in_cache(self, shape: Shape) -> Program | None:
        """Load a program from the cache; a damaged or outdated one counts as missing."""
        for sizes in (ANY, shape[1:]):
            kept = _read(self._path(sizes))
            if kept is None:
                continue
            try:
                self.programs[sizes] = self._checked(kept, _patch(shape, sizes), self.engine.precision)
            except Exception as error:  # whatever is wrong with it, it is made anew
                if is_out_of_memory(error):
                    raise
            else:
                return self.programs[sizes]
        return None

    def _build(self, shape: Shape) -> Program:
        """Convert the network, unless another process just did: for images of any size if possible, else for one."""
        with _alone(self._path(ANY)):
            if (made := self._in_cache(shape)) is not None:
                return made
            with suppress(Exception):  # a network that asks for sizes cannot be followed, or its sizes not converted
                return self._convert(_export_any(self.network, shape), ANY, shape)
            return self._convert(_export(self.network, shape), shape[1:], shape)

    def _convert(self, exported: ExportedProgram, sizes: Shape, shape: Shape) -> Program:
        """Convert and keep an exported network; in bfloat16, it is compared in float32 first."""
        with _quiet():
            model = self.converter.convert(exported, [1, shape[0], *(sizes or [-1] * (len(shape) - 1))])
        for precision in sorted({"32-true", self.engine.precision}):
            kept = self.converter.compile(model, precision)
            program = self._checked(kept, _patch(shape, sizes), precision)
        _keep(self._path(sizes), kept)
        self.programs[sizes] = program
        return program

    def _checked(self, kept: bytes, shape: Shape, precision: Precision) -> Program:
        """Load a program and compare it with torch on noise of a shape (C, *S).

        Raises:
            ChiasmError: If it computes something else.
        """
        program = self.converter.load(kept, precision, self.engine.threads or torch.get_num_threads())
        patch = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        exact, most = self.exact(patch).numpy(), TOLERANCE
        if precision != "32-true":
            most = max(most, AS_CLOSE_AS_TORCH * deviation(self.plain(patch).numpy(), exact))
        found = deviation(program(patch.numpy()), exact)
        if not found <= most:
            raise ChiasmError(f"it differs from torch by {found:.2g} of the range, and {most:.2g} is allowed")
        return program

    def _path(self, sizes: Shape) -> Path:
        engine = self.engine
        parts = (__version__, torch.__version__, engine.describe(), *describe_cpu(), self.key, str(sizes))
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        return cache_folder() / f"{engine.name}-{digest[:40]}"


def export_network(network: nn.Module, shape: Shape) -> ExportedProgram:
    """Export a network for images (1, C, *S) of any size.

    Args:
        network: In evaluation mode.
        shape: Of an image that it takes, (C, *S).

    Raises:
        ValueError: If it accepts only one size.  Torch raises errors of many other kinds.
    """
    return _export_any(network, shape)


def convert_network(engine: str, exported: ExportedProgram, shape: Shape) -> Any:
    """Convert what `export_network` made to the model of an engine, for images of any size.

    Args:
        engine: "openvino" or "onnxruntime".
        exported: The network.
        shape: As for `export_network`.
    """
    with _quiet():
        return CONVERTERS[engine].convert(exported, [1, shape[0], *[-1] * (len(shape) - 1)])


def deviation(found: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    """Return the largest difference, as a share of the range of each channel with zero in it.

    Args:
        found: Shape (N, C, *S).
        exact: Same shape.

    >>> exact = np.array([[[0.0, 4.0]]], np.float32)
    >>> deviation(exact + 1, exact)
    0.25
    """
    if found.shape != exact.shape:
        return np.inf
    axes = (0, *range(2, exact.ndim))
    extent = np.maximum(exact.max(axes), 0) - np.minimum(exact.min(axes), 0)
    difference = np.abs(found - exact).max(axes)
    return float(np.max(difference / np.maximum(extent, np.finfo(np.float32).tiny)))


def _patch(shape: Shape, sizes: Shape, most: int = PATCH) -> Shape:
    """Return a shape (C, *S) that a program takes: its own sizes, or a cut of the image's."""
    return (shape[0], *(sizes or (min(size, most) for size in shape[1:])))


def _export(network: nn.Module, shape: Shape) -> ExportedProgram:
    """Export a network for images of a shape (C, *S)."""
    with _quiet(), torch.no_grad():
        return torch.export.export(network, (torch.zeros(1, *shape),))


def _export_any(network: nn.Module, shape: Shape) -> ExportedProgram:
    """Export a network for images (1, C, *S) of any size, with an example of at most this one.

    Raises:
        ValueError: If its result depends on a size, so that it takes one alone.
    """
    axes = range(2, len(shape) + 1)
    with _quiet(), torch.no_grad():
        example = torch.zeros(1, *_patch(shape, ANY, EXAMPLE))
        exported = torch.export.export(network, (example,), dynamic_shapes=(dict.fromkeys(axes, Dim.AUTO),))
    name = exported.graph_signature.user_inputs[0]
    (node,) = (node for node in exported.graph.nodes if node.name == name)
    if any(isinstance(size, int) for size in node.meta["val"].shape[2:]):
        raise ValueError("it accepts only one size")
    return exported


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide a converter's warnings and remarks, because the comparison with torch decides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# --- the cache ---------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the folder of compiled networks: `$CHIASM_CACHE`, or `chiasm/engines` in the system's cache folder."""
    if given := os.environ.get("CHIASM_CACHE"):
        return Path(given)
    home = Path.home()
    usual = {"darwin": home / "Library" / "Caches", "win32": Path(os.environ.get("LOCALAPPDATA", home))}
    base = os.environ.get("XDG_CACHE_HOME") or usual.get(sys.platform, home / ".cache")
    return Path(base) / "chiasm" / "engines"


def _hash_weights(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def describe_cpu() -> list[str]:
    """List what compiled code depends on: the machine, the CPU's name and its instructions."""
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.10
    features = sorted(name for name, value in known.items() if value is True)
    return [platform.system(), platform.machine(), str(known.get("cpu_name")), *features]


def _read(path: Path) -> bytes | None:
    """Read a compiled network; None if this user has none."""
    try:
        with path.open("rb") as file:
            is_own = os.name == "nt" or os.fstat(file.fileno()).st_uid == os.getuid()
            return file.read() if is_own else None
    except OSError:
        return None


def _keep(path: Path, kept: bytes) -> None:
    """Write a compiled network, whole or not at all; if that fails, the next process compiles again."""
    with suppress(ChiasmError, OSError), whole_file(path) as temporary:
        temporary.write_bytes(kept)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process compile at a time; if the folder cannot be locked, let all compile."""
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_suffix(".lock"), timeout=LOCK_SECONDS)
    with suppress(OSError, Timeout):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
