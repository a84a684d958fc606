"""Networks of other packages: a fixed table of MONAI's classes, and other classes that a user named.

A name never leads to a call of anything other than a class of networks.  MONAI's
classes are those of `MONAI` alone.  Any other class is imported, which runs
its module, so callers decide first whether the user named it: `is_own_class`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

from chiasm.errors import RecipeError
from chiasm.names import name_first
from chiasm.networks.generator import Dims

#: MONAI's classes that make one image of several channels, and what each asks of a patch is its own matter.
MONAI = (
    "AHNet",
    "AttentionUnet",
    "AutoEncoder",
    "BasicUNet",
    "DynUNet",
    "FlexibleUNet",
    "HighResNet",
    "LocalNet",
    "MedNeXt",
    "RegUNet",
    "SegResNet",
    "SegResNetDS",
    "SwinUNETR",
    "UNETR",
    "UNet",
    "VNet",
)
#: What is taken of a network that does not say: that it is a U-Net of five halvings or fewer.
#: Whether it sees no farther is measured before its results are joined from tiles (`tiles_are_exact`).
FOREIGN = {"size_multiple": 32, "smallest": 32, "margin": 0, "receptive_field": 32}
LISTED = 16  # classes of a package in one message
GIVEN = ("spatial_dims", "dims", "in_channels", "out_channels", "scale")  # options that the data decide
DOWNLOADING = ("pretrained", "progress")  # options that fetch weights from elsewhere


def is_own_class(name: str) -> bool:
    """Return whether a name is `package.module:Class`: code outside chiasm and outside the table of MONAI's classes.

    >>> is_own_class("unet"), is_own_class("monai:UNet"), is_own_class("lab.nets:Mine")
    (False, False, True)
    """
    return ":" in name and not name.startswith("monai:")


def make_foreign(name: str, in_channels: int, dims: Dims, options: Mapping[str, Any]) -> nn.Module:
    """Build a network of MONAI or a user's own.

    Args:
        name: ``monai:Class``, or ``package.module:Class``, which is imported.
        in_channels: Source channels.
        dims: Spatial axes of a convolution.
        options: Further keyword arguments of its class.

    Raises:
        RecipeError: If there is no such class, it is no class of networks of that
            package, an option does not fit, or it cannot be built.
    """
    own = is_own_class(name)
    maker = _own_class(name) if own else _monai_class(name)
    check_options(name, maker, options)
    shape = {"in_channels": in_channels, "dims": dims}
    try:
        network = maker(**(shape if own else monai_shape(in_channels, dims)), **options)
    except ImportError as error:
        raise _not_importable(name, error) from error
    except RecipeError:
        raise
    except Exception as error:  # another's code may raise anything
        raise RecipeError(
            f"the network {name} cannot be built",
            reason="network",
            found=_first_line(error),
            hint="Give what it wants: chiasm train --set 'generator.options={feature_size=24}', for example.",
        ) from error
    for attribute, usual in FOREIGN.items():
        if not hasattr(network, attribute):
            setattr(network, attribute, usual)
    return network


def monai_shape(in_channels: int, dims: Dims) -> dict[str, int]:
    """Return the arguments of MONAI's classes that describe the data."""
    return {"spatial_dims": dims, "in_channels": in_channels, "out_channels": 1}


def check_options(name: str, maker: Callable[..., nn.Module], options: Mapping[str, Any]) -> None:
    """Refuse an option that a class does not have, of another type, or that would fetch weights.

    Raises:
        RecipeError: If there is one.
    """
    taken = [option for option in inspect.signature(maker).parameters if option not in (*GIVEN, *DOWNLOADING)]
    if strange := [option for option in options if option not in taken]:
        raise RecipeError(
            f"the network {name} cannot be built with the option {strange[0]!r}",
            reason="network",
            found=f"generator.options = {dict(options)}",
            expected=", ".join(taken) or "no options: it has none",
        )
    hints = _type_hints(maker)
    for option, value in options.items():
        try:
            TypeAdapter(hints.get(option, Any), config=_ANY).validate_python(value)
        except ValidationError as error:
            raise RecipeError(
                f"the network {name} cannot be built with the option {option!r}",
                reason="network",
                found=repr(value),
                expected=error.errors(include_url=False)[0]["msg"].removeprefix("Input should be "),
            ) from error


_ANY = ConfigDict(arbitrary_types_allowed=True)


def _type_hints(maker: Callable[..., nn.Module]) -> Mapping[str, Any]:
    """Return the types of a class' arguments; empty if a type cannot be found."""
    try:
        hints = get_type_hints(maker.__init__ if isinstance(maker, type) else maker)  # type: ignore[misc]
    except (NameError, TypeError, AttributeError):
        return {}
    return {name: _as_meant(hint) for name, hint in hints.items()}


def _as_meant(hint: Any) -> Any:
    """Read ``tuple[int]`` as any number of integers, which MONAI means by it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is tuple and len(inner) == 1:
        return tuple[inner[0], ...]  # type: ignore[valid-type]
    if origin in (Union, UnionType):
        return Union[tuple(_as_meant(one) for one in inner)]  # noqa: UP007
    return hint


def _monai_class(name: str) -> type[nn.Module]:
    class_name = name.partition(":")[2]
    if class_name not in MONAI:
        raise _no_class(class_name, "monai", {known.lower(): known for known in MONAI})
    try:
        found: type[nn.Module] = getattr(importlib.import_module("monai.networks.nets"), class_name)
    except (ImportError, AttributeError) as error:  # an older MONAI has not all of them
        raise _not_importable(name, error) from error
    return found


def _own_class(name: str) -> type[nn.Module]:
    """Import a class by name; nothing is called before it is known to be a class of networks."""
    place, _, class_name = name.partition(":")
    if not all(part.isidentifier() for part in (*place.split("."), class_name)):
        raise RecipeError(
            "the name of the network has a wrong form", reason="no-network", found=name, expected="package.module:Class"
        )
    try:
        module = importlib.import_module(place)
    except Exception as error:  # whatever the module does while it is imported
        raise _not_importable(name, error) from error
    members = vars(module)
    package = place.partition(".")[0]
    known = {key.lower(): key for key, kind in members.items() if _is_network(kind, package) and _is_generator(kind)}
    if class_name not in members:
        raise _no_class(class_name, place, known)
    found = members[class_name]
    if not _is_network(found, package):
        raise RecipeError(
            f"{name} is no class of networks of the package {package}",
            reason="no-network",
            expected=f"a subclass of torch.nn.Module that is defined in {package}",
        )
    return found  # type: ignore[no-any-return]


def _is_network(kind: object, package: str) -> bool:
    return isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__.partition(".")[0] == package


def _is_generator(kind: type[nn.Module]) -> bool:
    return {"in_channels", "dims"} <= set(inspect.signature(kind).parameters)


def _no_class(class_name: str, place: str, known: Mapping[str, str]) -> RecipeError:
    ordered = sorted(known, key=lambda name: ("unet" not in name, name))
    alike = get_close_matches(class_name.lower(), ordered, 5) or ordered
    return RecipeError(
        f"there is no class {class_name} in {place}",
        reason="no-network",
        expected=f"one of {name_first([known[key] for key in alike], LISTED)}" if alike else None,
    )


def _not_importable(name: str, error: Exception) -> RecipeError:
    hint = "Install it, or name the folder above its package: PYTHONPATH=FOLDER chiasm ..."
    if not is_own_class(name):
        hint = 'Install it: pip install "chiasm[monai]".'
    return RecipeError(
        f"the network {name} cannot be imported", reason="no-network", found=_first_line(error), hint=hint
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
