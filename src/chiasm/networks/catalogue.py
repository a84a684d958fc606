"""The literature's networks by name, and those of other packages.

A generator here is a module that maps (N, C, *S) to (N, 1, *S - 2 margin) and
says what it needs: `size_multiple`, `smallest`, `margin` and `receptive_field`.
To add one: a file beside this one, a line in `GENERATORS`, a test, and a row in
`methods.METHODS` if it is to be a method of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from chiasm.errors import RecipeError, unknown
from chiasm.networks.context_gan import ContextDiscriminator, ContextFcn
from chiasm.networks.dcgan import DcganDiscriminator, DcganGenerator
from chiasm.networks.fcn3d import fcn3d
from chiasm.networks.fcn8 import Fcn8
from chiasm.networks.foreign import FOREIGN, check_options, make_foreign
from chiasm.networks.generator import Dims, Norm
from chiasm.networks.han import Han
from chiasm.networks.li_cnn import li_cnn
from chiasm.networks.pix2pix import PatchDiscriminator, Pix2PixGenerator
from chiasm.networks.sparse_coding import SparseCoder
from chiasm.networks.srcnn import srcnn
from chiasm.networks.strainet import Strainet, StrainetDiscriminator
from chiasm.networks.unet import UNet

OWN = "chiasm"  # this project's own networks, which other settings shape
Maker = Callable[..., nn.Module]


class CataloguedNetwork(NamedTuple):
    """A network of the literature.

    Attributes:
        make: Called with in_channels, dims and scale.
        paper: Where it was published.
        dims: Spatial axes it can have.
        normalised: Whether it is a discriminator with batch normalisation, which `norm="none"` leaves out.
    """

    make: Maker
    paper: str
    dims: tuple[Dims, ...] = (2, 3)
    normalised: bool = False


def _srcnn_955(*, in_channels: int, dims: Dims, scale: float) -> nn.Module:
    return srcnn(in_channels=in_channels, dims=dims, scale=scale, variant="9-5-5")


def _pix2pix_32(*, in_channels: int, dims: Dims, scale: float) -> nn.Module:
    return Pix2PixGenerator(in_channels=in_channels, dims=dims, scale=scale, depth=5)


GENERATORS: Mapping[str, CataloguedNetwork] = {
    "srcnn": CataloguedNetwork(srcnn, "Dong et al., arXiv:1501.00092 (9-1-5)"),
    "srcnn-955": CataloguedNetwork(_srcnn_955, "Dong et al., arXiv:1501.00092 (9-5-5)"),
    "fcn8": CataloguedNetwork(Fcn8, "Long et al., arXiv:1411.4038", (2,)),
    "unet": CataloguedNetwork(UNet, "Ronneberger et al., arXiv:1505.04597"),
    "fcn3d": CataloguedNetwork(fcn3d, "Nie et al., LABELS 2016"),
    "han": CataloguedNetwork(Han, "Han, Medical Physics 2017", (2,)),
    "li-cnn": CataloguedNetwork(li_cnn, "Li et al., MICCAI 2014"),
    "context-fcn": CataloguedNetwork(ContextFcn, "Nie et al., arXiv:1612.05362"),
    "strainet": CataloguedNetwork(Strainet, "Nie et al., IEEE TNNLS 2019"),
    "dcgan": CataloguedNetwork(DcganGenerator, "Radford et al., arXiv:1511.06434"),
    "pix2pix": CataloguedNetwork(Pix2PixGenerator, "Isola et al., arXiv:1611.07004"),
    "pix2pix-32": CataloguedNetwork(_pix2pix_32, "Isola et al., arXiv:1611.07004, 5 halvings in place of 8"),
    "jcsc": CataloguedNetwork(SparseCoder, "Huang et al., arXiv:1705.02596"),
}

DISCRIMINATORS: Mapping[str, CataloguedNetwork] = {
    "dcgan": CataloguedNetwork(DcganDiscriminator, "Radford et al., arXiv:1511.06434", normalised=True),
    "patch": CataloguedNetwork(PatchDiscriminator, "Isola et al., arXiv:1611.07004", normalised=True),
    "context": CataloguedNetwork(ContextDiscriminator, "Nie et al., arXiv:1612.05362", normalised=True),
    "strainet": CataloguedNetwork(StrainetDiscriminator, "Nie et al., IEEE TNNLS 2019"),
}


class Needs(NamedTuple):
    """The sizes that a network accepts.

    Attributes:
        multiple: Every side is a multiple of it.
        smallest: No side is shorter.
        margin: Voxels that its valid convolutions lose on each side.
    """

    multiple: int
    smallest: int
    margin: int


def needs_of(network: nn.Module) -> Needs:
    """Read a network's needs."""
    return Needs(*(int(getattr(network, name)) for name in ("size_multiple", "smallest", "margin")))


def make_network(
    name: str, *, in_channels: int, dims: Dims, scale: float = 1.0, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build a generator of the literature, of MONAI ("monai:SwinUNETR") or of a user ("package.module:Class").

    Args:
        name: A name of `GENERATORS`, or of a class elsewhere.
        in_channels: Source channels.
        dims: Spatial axes of a convolution.
        scale: Share of the published channels; 1 is the paper's network.
        options: Further keyword arguments of its class.

    Raises:
        RecipeError: If there is no such network, it does not come in these
            dimensions, or it cannot be built so.
    """
    if all(name.partition(":")):
        return make_foreign(name, in_channels, dims, options or {})
    if name not in GENERATORS:
        raise unknown("network", name, [OWN, *GENERATORS, "monai:CLASS", "package.module:CLASS"])
    return _made(name, GENERATORS[name], in_channels, dims, scale, options)


def make_discriminator(
    name: str, *, in_channels: int, dims: Dims, scale: float = 1.0, norm: Norm = "batch"
) -> nn.Module:
    """Build a global discriminator of the literature.

    Args:
        name: A name of `DISCRIMINATORS`.
        in_channels: Channels of source and image together.
        dims: Spatial axes of a convolution.
        scale: Share of the published channels.
        norm: "batch" as published; "none" under a gradient penalty, which is on
            each sample's own slope.  A discriminator that normalises nothing stays as it is.

    Raises:
        RecipeError: If there is none of that name.
    """
    if name not in DISCRIMINATORS:
        raise unknown("global discriminator", name, [OWN, *DISCRIMINATORS])
    entry = DISCRIMINATORS[name]
    bare = entry.normalised and norm == "none"
    return _made(
        name, entry._replace(make=partial(entry.make, norm="none")) if bare else entry, in_channels, dims, scale
    )


def _made(
    name: str,
    entry: CataloguedNetwork,
    in_channels: int,
    dims: Dims,
    scale: float,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    if dims not in entry.dims:
        raise RecipeError(
            f"the network {name} has no {dims}D form",
            reason="dims",
            expected=" or ".join(f"{d}D" for d in entry.dims),
            hint="Set data.dims=2.5d." if 2 in entry.dims else "Set data.dims=3d.",
        )
    check_options(name, entry.make, options or {})
    try:
        return entry.make(in_channels=in_channels, dims=dims, scale=scale, **(options or {}))
    except (TypeError, ValueError) as error:
        if not options:
            raise
        raise RecipeError(
            f"the network {name} cannot be built with generator.options={dict(options)}", reason="network", found=error
        ) from error


def check_contract(network: nn.Module, name: str, in_channels: int, patch: tuple[int, ...]) -> None:
    """Try a network on one empty patch.

    Raises:
        RecipeError: If it fails, or its output is not one channel of the patch's size less its margins.
    """
    needs = needs_of(network)
    _check_patch(needs, name, patch)
    wanted = (1, 1, *(side - 2 * needs.margin for side in patch))
    found = _try(network, name, torch.zeros(1, in_channels, *patch))
    if not isinstance(found, Tensor) or found.shape != wanted:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise RecipeError(
            f"the network {name} does not keep the contract of a generator",
            reason="network",
            found=shape,
            expected=f"{wanted} from (1, {in_channels}, {', '.join(map(str, patch))})",
        )


def _check_patch(needs: Needs, name: str, patch: tuple[int, ...]) -> None:
    """Refuse a patch that a network cannot take.

    Raises:
        RecipeError: If a side is too small or no multiple.
    """
    least = max(needs.smallest, needs.multiple)
    if any(side % needs.multiple or side < max(needs.smallest, 2 * needs.margin + 1) for side in patch):
        raise RecipeError(
            f"the network {name} cannot take the patch",
            reason="patch",
            found=" x ".join(map(str, patch)),
            expected=f"multiples of {needs.multiple}, at least {least}" if needs.multiple > 1 else f"at least {least}",
            hint=f"Set data.patch={least}, or take another network.",
        )


def _try(network: nn.Module, name: str, images: Tensor) -> object:
    """Return the output of a network for images.

    Raises:
        RecipeError: If it fails.
    """
    was_training = network.training
    try:
        with torch.inference_mode():
            return network.eval()(images)
    except ImportError as error:  # MONAI looks for what a network needs only when it runs
        raise RecipeError(
            f"the network {name} needs a package that is not installed",
            reason="no-package",
            found=str(error).strip().splitlines()[0],
            hint='For MONAI\'s: pip install "chiasm[monai]".',
        ) from error
    except Exception as error:  # another's code may raise anything
        raise RecipeError(
            f"the network {name} fails on a patch",
            reason="network",
            found=(str(error).strip() or type(error).__name__).splitlines()[0],
            hint="Another data.patch, or other generator.options, may suit it.",
        ) from error
    finally:
        network.train(was_training)


class SameSize(nn.Module):
    """Let a network take images of any size: pad them with zeros, as outside the mask, and crop the result.

    Args:
        network: With the attributes of `needs_of`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.needs = network, needs_of(network)
        self.receptive_field = int(getattr(network, "receptive_field", FOREIGN["receptive_field"]))
        self.size_multiple = self.needs.multiple  # so that tiles begin where its coarse grids do

    def forward(self, source: Tensor) -> Tensor:
        """Map (N, C, *S) to (N, 1, *S)."""
        multiple, smallest, margin = self.needs
        sizes = source.shape[2:]
        wanted = [max(smallest, -(-(size + 2 * margin) // multiple) * multiple) for size in sizes]
        wanted = [-(-size // multiple) * multiple for size in wanted]
        padding = [(margin, full - size - margin) for size, full in zip(sizes, wanted)]
        filled = functional.pad(source, [end for pair in reversed(padding) for end in pair])
        made: Tensor = self.network(filled)
        return made[(slice(None), slice(None), *(slice(size) for size in sizes))]
