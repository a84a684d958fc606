"""How networks run at inference: engine, device, precision, memory layout, threads.

Measured on the CPU: convolutions are fastest on channels-last tensors.  bfloat16 is faster only if the processor has
instructions for it; on other processors it is slower than float32.  So chiasm asks the processor and chooses.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode

from chiasm.errors import RecipeError, unknown

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
EngineName = Literal["torch", "openvino", "onnxruntime"]
Module = TypeVar("Module", bound=nn.Module)

ACCELERATORS = ("auto", "cpu", "cuda")
WORTH_COMPILING = 2_000_000  # voxels of an image for which compiling (about 5 s of CPU, once a model) pays
ONE_PASS = 4_000_000  # voxels that a compiled 3D network takes at once: about 2 GiB for one of 16 channels
FASTEST = "the fastest on a CPU, and installed; torch computes images below 2 million voxels"
EXTRAS = {"openvino": "fast", "onnxruntime": "onnx"}  # what installs an engine: pip install 'chiasm[fast]'
_LAYOUT = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of axes
_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)
_FOLDED = (nn.Conv2d, nn.Conv3d)  # into which a normalisation can be folded
_CONVOLUTIONS = (torch.conv2d, torch.conv3d)
_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def pick_device(accelerator: str) -> torch.device:
    """Turn "auto", "cpu" or "cuda" into a device; "auto" takes CUDA where there is one.

    Raises:
        RecipeError: If the name is unknown, or CUDA is asked for where there is none.
    """
    if accelerator not in ACCELERATORS:
        raise unknown("accelerator", accelerator, ACCELERATORS)
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            "CUDA is asked for, but torch finds no CUDA device",
            reason="no-cuda",
            hint="Use the accelerator auto or cpu, or install a torch built for CUDA and its driver.",
        )
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def pick_precision(precision: str, accelerator: str) -> Precision:
    """Choose the number format of convolutions: the fastest that this machine computes natively.

    Args:
        precision: "auto", or the name of a precision, which is then checked and returned.
        accelerator: "auto", "cpu" or "cuda".

    Returns:
        "bf16-mixed" where the CPU has avx512_bf16 or AMX or the GPU has bfloat16,
        "16-mixed" on an older GPU, else "32-true".

    Raises:
        RecipeError: If a name is unknown, CUDA is asked for where there is none,
            or "16-mixed" is asked for on a CPU.
    """
    on_cuda = pick_device(accelerator).type == "cuda"
    if precision == "auto":
        return _fastest_precision(on_cuda)
    if precision not in get_args(Precision):
        raise unknown("precision", precision, ("auto", *get_args(Precision)))
    if precision == "16-mixed" and not on_cuda:
        raise RecipeError(
            "the precision 16-mixed needs CUDA",
            reason="precision",
            found=f"accelerator {accelerator}",
            hint="Use the precision auto.",
        )
    return cast(Precision, precision)


def has_precision(precision: str, accelerator: str) -> bool:
    """Return whether this machine computes so; see `pick_precision`."""
    try:
        pick_precision(precision, accelerator)
    except RecipeError:
        return False
    return True


def _fastest_precision(on_cuda: bool) -> Precision:
    if on_cuda:
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    return "bf16-mixed" if cpu_multiplies_bfloat16() else "32-true"


def cpu_multiplies_bfloat16() -> bool:
    """Return whether the processor has instructions for bfloat16."""
    # torch before 2.11 cannot be asked: float32 is then right everywhere, only slower.
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@lru_cache
def installed_version(package: str) -> str | None:
    """Return the version of an engine's package, without importing it; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def pick_engine(name: str, device: torch.device, precision: str) -> tuple[EngineName, str]:
    """Choose what computes networks.

    Args:
        name: "auto", "torch", "openvino" or "onnxruntime".  "auto" is OpenVINO for networks on a CPU where it is
            installed (`Engine.for_image` may then take torch), or what the environment variable CHIASM_ENGINE names.
        device: Where networks are placed.
        precision: As a user gives it.

    Returns:
        The engine's name, and why it was chosen.

    Raises:
        RecipeError: If the name is unknown, the engine is not installed, or it has not this device or precision.
    """
    if name == "auto" and (named := os.environ.get("CHIASM_ENGINE", "auto")) != "auto":
        return pick_engine(named, device, precision)[0], "named by CHIASM_ENGINE"
    if name == "auto":
        return _fastest_engine(device, precision)
    if name not in get_args(EngineName):
        raise unknown("engine", name, ("auto", *get_args(EngineName)))
    if name != "torch" and installed_version(name) is None:
        raise RecipeError(
            f"the engine {name} is not installed", reason="not-installed", hint=f"pip install 'chiasm[{EXTRAS[name]}]'."
        )
    if name != "torch" and (obstacle := _obstacle(name, device, precision)):
        raise RecipeError(f"the engine {name} {obstacle}", reason="engine", hint="Use the engine auto or torch.")
    return cast(EngineName, name), "named"


def _fastest_engine(device: torch.device, precision: str) -> tuple[EngineName, str]:
    if obstacle := _obstacle("openvino", device, precision):
        return "torch", f"openvino {obstacle}"
    if installed_version("openvino") is None:
        return "torch", "openvino is faster on a CPU, but not installed: pip install 'chiasm[fast]'"
    return "openvino", FASTEST


def _obstacle(name: str, device: torch.device, precision: str) -> str:
    """Say why an engine cannot compute with a device or precision; empty if it can."""
    if device.type != "cpu":
        return "is for networks on a CPU"
    if precision == "bf16-mixed" and not (name == "openvino" and cpu_multiplies_bfloat16()):
        return "does not compute in bfloat16 on this CPU"
    return ""


@dataclass(frozen=True)
class Hardware:
    """The user's choice of hardware and engine.

    Attributes:
        accelerator: "auto", "cpu" or "cuda".
        precision: "auto", "32-true", "bf16-mixed" or "16-mixed".
        engine: "auto", "torch", "openvino" or "onnxruntime".
        threads: CPU threads of a pass; None leaves torch's number.
    """

    accelerator: str = "auto"
    precision: str = "auto"
    engine: str = "auto"
    threads: int | None = None


ANY_HARDWARE = Hardware()


@dataclass(frozen=True)
class Engine:
    """The engine of a network at inference, with its device, precision and threads.

    Attributes:
        device: Where networks and tensors are placed.
        precision: Of convolutions; the rest, and all results, stay float32.
        threads: CPU threads of one pass; None leaves torch's number.
        name: "torch", or an engine of `compiled.CONVERTERS`.
        reason: Why this engine was chosen.
        by_name: Whether the user named it: then torch does not replace it if it fails.
        least_voxels: Of an image that it is worth compiling for; torch computes smaller ones.
        notes: What it could not do, one sentence each; filled as networks run.
    """

    device: torch.device
    precision: Precision
    threads: int | None = None
    name: EngineName = "torch"
    reason: str = ""
    by_name: bool = False
    least_voxels: int = 0
    notes: list[str] = field(default_factory=list, compare=False)

    @classmethod
    def pick(cls, hardware: Hardware = ANY_HARDWARE) -> Engine:
        """Choose engine, device and precision; see `pick_engine`, `pick_device` and `pick_precision`."""
        device = pick_device(hardware.accelerator)
        precision = pick_precision(hardware.precision, hardware.accelerator)
        name, reason = pick_engine(hardware.engine, device, hardware.precision)
        if name == "onnxruntime":
            precision = "32-true"
        least = WORTH_COMPILING if reason == FASTEST else 0
        return cls(device, precision, hardware.threads, name, reason, hardware.engine != "auto", least)

    def for_image(self, voxels: int, dims: Literal[2, 3] = 2) -> Engine:
        """Return the faster engine for an image of this number of voxels: this engine, or torch.

        torch is faster if compiling would take longer, and in 3D if the image is too large for one pass.
        """
        if self.by_name or (self.least_voxels <= voxels and (dims == 2 or voxels <= ONE_PASS)):
            return self
        return replace(self, name="torch", notes=[])

    def describe(self) -> str:
        """Name engine, version and precision."""
        return f"{self.name} {installed_version(self.name)}, {self.precision}"

    def announce(self) -> str:
        """Name the engine in a line, and why it was chosen."""
        return f"engine: {self.describe()} ({self.reason})"

    @property
    def used(self) -> str:
        """Name the engine that computed: this one, or torch if it replaced it."""
        return replace(self, name="torch").describe() if self.notes else self.describe()

    def place(self, module: Module) -> Module:
        """Move a network to the device, channels last, in evaluation mode; changes and returns `module`."""
        return _channels_last(module.to(self.device).eval())

    def wrap(self, network_fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Make a function of tensors run on this engine, without gradients.

        Args:
            network_fn: One or several networks, in evaluation mode on the engine's device.

        Returns:
            A function that takes a tensor (N, C, *S) on any device and returns
            float32 on the engine's.
        """

        def run(images: Tensor) -> Tensor:
            with self.inference():
                return network_fn(self.lay_out(images)).float()

        return run

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Compute without gradients, in this engine's precision and on its threads, while the block lasts."""
        narrow = AUTOCAST.get(self.precision)
        with (
            on_threads(self.threads),
            torch.inference_mode(),
            torch.autocast(self.device.type, dtype=narrow, enabled=narrow is not None),
            _ByOneDnn() if self.device.type == "cpu" and _HAS_ONEDNN else nullcontext(),
        ):
            yield

    def lay_out(self, images: Tensor) -> Tensor:
        """Move images (N, C, *S) to the device, channels last."""
        on_device = images.to(self.device)
        return on_device.contiguous(memory_format=_LAYOUT[images.ndim]) if images.ndim in _LAYOUT else on_device


class _ByOneDnn(TorchFunctionMode):
    """Sends convolutions to oneDNN.

    torch 2.13 takes loops of its own, up to ten times as slow: on one thread for kernels of one voxel, and for one
    volume whose channels times its first two sides are 20480 or less (`findings/torch_conv3d_forgets_the_width.sh`).
    """

    def __torch_function__(
        self, function: Any, types: Any, given: tuple[Any, ...] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        """Call oneDNN in place of a convolution of tensors, and whatever else is called as it is."""
        del types
        if function in _CONVOLUTIONS and not named and type(given[0]) is Tensor and not isinstance(given[4], str):
            return convolve(*given)
        return function(*given, **(named or {}))


def convolve(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolve as `torch.conv2d` and `torch.conv3d` do, by oneDNN and in the type of autocast."""
    narrow = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    if narrow is not None:  # which reaches convolutions that torch knows
        images, weight, bias = images.to(narrow), weight.to(narrow), None if bias is None else bias.to(narrow)
    made: Tensor = torch.mkldnn_convolution(images, weight, bias, padding, stride, dilation, groups)
    return made


def freeze_for_inference(module: Module) -> Module:
    """Copy a network for inference: same results, fewer operations.

    The copy is in evaluation mode, needs no gradients and lies channels last;
    spectral normalisation is baked into the weights and batch normalisation
    into the convolution before it, where one directly follows the other.
    `module` itself, in training perhaps, stays as it is.
    """
    frozen = copy.deepcopy(module).eval().requires_grad_(False)
    for part in list(frozen.modules()):
        if parametrize.is_parametrized(part):
            _own_class(part)
            for name in list(part.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(part, name, leave_parametrized=True)
    with torch.no_grad():
        _fold_batch_norms(frozen)
    return _channels_last(frozen)


def _own_class(module: nn.Module) -> None:
    """Give a copied module its own class: torch keeps parametrisations in a class that copies share."""
    shared = type(module)
    content = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, content)


class _Shallow(fx.Tracer):
    """Traces a module's own forward without looking into its children."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002  # torch asks by name
        """Look into no child."""
        return True


class _Foldable(NamedTuple):
    """A batch normalisation, its name, and the convolution that is its only input."""

    name: str
    norm: nn.BatchNorm2d | nn.BatchNorm3d
    convolution: nn.Conv2d | nn.Conv3d


def _fold_batch_norms(module: nn.Module) -> None:
    """Replace each batch normalisation whose only input is a convolution, both used once."""
    places = Counter(id(part) for _, part in module.named_modules(remove_duplicate=False))
    for parent in list(module.modules()):
        for name, norm, convolution in _list_foldable(parent, places):
            convolution.weight, convolution.bias = fuse_conv_bn_weights(
                convolution.weight,
                convolution.bias,
                cast(Tensor, norm.running_mean),
                cast(Tensor, norm.running_var),
                norm.eps,
                norm.weight,
                norm.bias,
            )
            parent.set_submodule(name, nn.Identity())


def _list_foldable(parent: nn.Module, places: Mapping[int, int]) -> list[_Foldable]:
    """List the batch normalisations that a module's own forward calls right after a convolution.

    Args:
        parent: Whose children are looked at.
        places: How often each module, by its id, stands in the whole network.
    """
    calls = _list_calls(parent)
    uses = Counter(id(parent.get_submodule(str(node.target))) for node in calls)
    found = []
    for node, before in _consecutive(calls):
        norm, convolution = (parent.get_submodule(str(one.target)) for one in (node, before))
        if not all(places[id(one)] == uses[id(one)] == 1 for one in (norm, convolution)):
            continue
        if isinstance(norm, _NORMS) and isinstance(convolution, _FOLDED) and norm.running_mean is not None:
            found.append(_Foldable(str(node.target), norm, convolution))
    return found


def _list_calls(parent: nn.Module) -> list[fx.Node]:
    """List the calls of children in the forward of a module that holds normalisations.

    None of one that asks for sizes or values, which cannot be followed.
    """
    if not any(isinstance(child, _NORMS) for child in parent.children()):
        return []
    try:
        graph = _Shallow().trace(parent)
    except (RuntimeError, TypeError, ValueError):
        return []
    return [node for node in graph.nodes if node.op == "call_module"]


def _consecutive(calls: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Pair each call with the only call that uses its result."""
    for node in calls:
        before = node.args[0] if node.args else None
        if isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1:
            yield node, before


def _channels_last(module: Module) -> Module:
    """Lay out the weights of convolutions, 2D and 3D, with the channels last in memory."""
    for parameter in module.parameters():
        if parameter.ndim in _LAYOUT:
            parameter.data = parameter.data.contiguous(memory_format=_LAYOUT[parameter.ndim])
    return module


@contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """Let torch use this number of CPU threads inside the block; None leaves its number."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
