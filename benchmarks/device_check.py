"""Check without a card that every tensor of every method lies on the engine's device, and count what a card waits for.

    python benchmarks/device_check.py [METHOD ...]

The build of torch for CPUs has no CUDA device, so this script makes believe: `PretendCard` sits between the code and
torch, remembers which memory is the card's, answers `.device` with `cuda:0` for it, and notes

- a fault where an operation mixes the card's tensors with others that have a dimension, as a card would refuse;
- a fault where `numpy` is called on a tensor of the card;
- a read where a number goes from the card to the host, for which the host would wait.

A method is trained for a step of each phase, validated, and predicts a volume.  Each step but one that is logged must
do without a read.  The script ends with 1 if there is a fault or such a read.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

CARD = torch.device("cuda", 0)
READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "masked_select")
MOVING = ("_parse_to", "_has_compatible_shallow_copy_type", "__set__")  # how a module puts its weights elsewhere
SOURCE = str(Path(__file__).parents[1] / "src")


class PretendCard(TorchFunctionMode):
    """Makes believe that there is a card, and notes what a card would refuse or wait for.

    Attributes:
        faults: Operation and line of the code, with how often.
        reads: Likewise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.faults: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = (resolve_name(func) or getattr(func, "__name__", "")).removesuffix(".__get__").split(".")[-1]
        tensors = [one for one in _flat((args, kwargs)) if isinstance(one, Tensor)]
        placed = [one for one in tensors if _is_on_card(one)]
        if (answer := _facts(name, func, placed)) is not None:
            return answer
        if name in MOVING:
            return func(*args, **kwargs)
        if name in ("to", "cpu", "cuda", "pin_memory"):
            return self._move(name, func, args, kwargs)
        args, kwargs, asked = _without_card((args, kwargs))
        self._note(name, args, tensors, placed)
        found = func(*args, **kwargs)
        if placed or asked:
            for one in _flat(found):
                _place(one)
        return found

    def _note(self, name: str, args: Sequence[Any], tensors: Sequence[Tensor], placed: Sequence[Tensor]) -> None:
        if not placed:
            return
        if name in READS or (name in ("__getitem__", "__setitem__") and _has_mask(args[1])):
            self.reads[f"{name} at {_line()}"] += 1
        if name == "numpy" or any(one.ndim and not _is_on_card(one) for one in tensors):
            self.faults[f"{name} at {_line()}"] += 1

    def _move(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Move a tensor to the card, by a copy, or from it, which is a read."""
        own, was_there = args[0], _is_on_card(args[0])
        plain, plain_kwargs, to_card = _without_card((args, kwargs))
        other = next((one for one in (*args[1:], kwargs.get("other")) if isinstance(one, Tensor)), None)
        to_card = to_card or name == "cuda" or (other is not None and _is_on_card(other))
        to_host = name == "cpu" or any(_is_host(one) for one in _flat((args[1:], kwargs)))
        if name == "pin_memory":
            return own
        moved = own if name in ("cpu", "cuda") else func(*plain, **plain_kwargs)
        if to_card or (was_there and not to_host):
            return _place(
                moved.clone() if moved.untyped_storage() is own.untyped_storage() and not was_there else moved
            )
        if was_there:
            self.reads[f"{name} at {_line()}"] += 1
            return moved.clone()
        return moved


def _facts(name: str, func: Any, placed: Sequence[Tensor]) -> Any:
    """Answer what a tensor of the card says of itself; None where the call is another one."""
    if not placed or getattr(func, "__name__", "") != "__get__":
        return None
    return {"device": CARD, "is_cuda": True, "is_cpu": False}.get(name)


def _is_on_card(tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return getattr(tensor.untyped_storage(), "is_on_card", False)


def _place(one: Any) -> Any:
    if isinstance(one, Tensor):
        with torch._C.DisableTorchFunction():
            one.untyped_storage().is_on_card = True  # type: ignore[attr-defined]
    return one


def _without_card(given: Any) -> tuple[Any, Any, bool]:
    """Replace the card by the host in arguments; say whether it was asked for."""
    asked = any(_is_card(one) for one in _flat(given))

    def swapped(one: Any) -> Any:
        if isinstance(one, list | tuple) and not hasattr(one, "_fields") and not isinstance(one, torch.Size):
            return type(one)(map(swapped, one))
        if isinstance(one, dict):
            return {key: swapped(value) for key, value in one.items()}
        return torch.device("cpu") if _is_card(one) else one

    args, kwargs = given
    return (*map(swapped, args),), swapped(kwargs), asked


def _is_card(one: Any) -> bool:
    return (isinstance(one, torch.device) and one.type == "cuda") or (isinstance(one, str) and one.startswith("cuda"))


def _is_host(one: Any) -> bool:
    return (isinstance(one, torch.device) and one.type == "cpu") or one == "cpu"


def _has_mask(index: Any) -> bool:
    return any(isinstance(one, Tensor) and one.dtype == torch.bool for one in _flat(index))


def _flat(given: Any) -> Iterator[Any]:
    if isinstance(given, Mapping):
        given = given.values()
    elif not isinstance(given, list | tuple):
        yield given
        return
    for one in given:
        yield from _flat(one)


def _line() -> str:
    """Name the line of the code that is being done, of chiasm's where there is one."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    own = [frame for frame in frames if frame.filename.startswith(SOURCE)] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}"


class CardFabric:
    """What `Trainables` asks of Fabric, on the card that is not there."""

    device, global_rank = CARD, 0

    def setup(self, module: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Leave both as they are."""
        return module, optimiser

    def backward(self, loss: Tensor) -> None:
        """Find gradients."""
        loss.backward()

    def autocast(self) -> Any:
        """Stay in 32 bits."""
        return nullcontext()


class Checked(NamedTuple):
    """What was found of one method.

    Attributes:
        faults: Operations that a card would refuse, with their lines.
        reads: For which a step that is not logged would wait.
        later: Reads of a validation and a prediction, which do wait.
    """

    faults: Mapping[str, int]
    reads: Mapping[str, int]
    later: Mapping[str, int]


def check_method(method: str, cohort: Path, folder: Path, make: Callable[..., Any]) -> Checked:
    """Train a method for a step of each phase, validate, and predict, on a card that is not there.

    Args:
        method: Its name.
        cohort: A small one.
        folder: For plan and prepared cases.
        make: `learning.make_learner`, which makes a learner on a given fabric.
    """
    from chiasm.prediction.engines import Engine
    from chiasm.training.loop import validate
    from chiasm.training.reading import is_reading_step
    from learning import small

    steps = 2000
    asked = small(method, {"schedule.steps": steps})
    with PretendCard() as card:
        one = make(asked, cohort, folder, CardFabric())
        before = Counter(card.reads)
        for step in (1, asked.schedule.ends["generator"] + 1, steps - 1):
            assert not is_reading_step(asked, step)
            values = one.step(step)
        reads = card.reads - before
        one.read(values)
        one.step(steps - 4)
        engine = Engine(CARD, "32-true")
        validate(one, one.setting.cases[:1], engine)
        model = one.model()
        one.maps(one.setting.cases[-1], engine)
        del model
    return Checked(card.faults, reads, card.reads - reads)


def main() -> int:
    """Check methods, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="by name; all but jcsc, which has no steps, by default")
    asked = parser.parse_args()

    from chiasm.methods import METHODS
    from learning import make_learner
    from synthetic_cohort import write_brats

    bad = 0
    with TemporaryDirectory() as place:
        cohort = write_brats(Path(place) / "cohort", 6)
        for method in asked.methods or [name for name in METHODS if name != "jcsc"]:
            found = check_method(method, cohort, Path(place) / method, make_learner)
            wrong = {**found.faults, **found.reads}
            bad += bool(wrong)
            print(f"{method}: {'; '.join(wrong) if wrong else 'ok'} ({sum(found.later.values())} reads beside steps)")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
