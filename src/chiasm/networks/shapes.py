"""Find the number and shapes of a network's weights without taking memory for them.

Networks are built on torch's meta device, where tensors have shapes and no
numbers.  Widths that no machine could hold are seen here in milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from chiasm.errors import RecipeError

MOST_TENSORS = 5_000  # of all networks of a model together: the largest known here have 1,500
MOST_WEIGHTS = 2**33  # 32 GiB in float32

Shapes = Mapping[str, tuple[int, ...]]


class _NoNumbers(TorchFunctionMode):
    """Answer 0, or yes, where a network asks for the number in a tensor that has none, as for drop-out rates.

    Normal numbers and even steps are not computed: on the meta device torch would import its compiler for them, 0.4 s.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.item, Tensor.__bool__) and args[0].is_meta:
            return func is Tensor.__bool__ or 0.0
        if func is nn.init.normal_ and kwargs["tensor"].is_meta:
            return kwargs["tensor"]
        if func is torch.linspace and len(args) == 3:
            return torch.empty(args[2], **kwargs)
        return func(*args, **kwargs)


@contextmanager
def without_memory() -> Iterator[None]:
    """Build networks on the meta device inside this block, and stop at the first impossible number or size of tensors.

    Raises:
        RecipeError: If a network has more tensors or weights than any machine would hold.
    """
    tensors = weights = 0

    def count(_: nn.Module, __: str, parameter: nn.Parameter | None) -> None:
        nonlocal tensors, weights
        if parameter is None:
            return
        tensors, weights = tensors + 1, weights + parameter.numel()
        if tensors > MOST_TENSORS or weights > MOST_WEIGHTS:
            raise too_large(weights, tensors)

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"), _NoNumbers():
            yield
    finally:
        hook.remove()


def has_shapes_alone(network: nn.Module) -> bool:
    """Return whether a network was built without memory, so that no weights can be loaded into it."""
    return any(parameter.is_meta for parameter in network.parameters())


def too_large(weights: int, tensors: int = 0) -> RecipeError:
    """Return the error of networks that are larger than the memory of any machine."""
    return RecipeError(
        "the networks are too large to be built",
        reason="too-large",
        found=f"more than {weights * 4 / 2**30:.0f} GiB of weights in {tensors} tensors",
        expected=f"at most {MOST_WEIGHTS * 4 / 2**30:.0f} GiB in {MOST_TENSORS} tensors",
        hint="Lower the widths, the depth or the scale of the generator and the discriminators.",
    )


def shapes_of(networks: Iterable[tuple[str, nn.Module]]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that networks keep in a file, by its name with the network's prefix."""
    return {
        f"{prefix}.{name}": tuple(value.shape)
        for prefix, network in networks
        for name, value in network.state_dict().items()
    }
