"""What every network of the literature is asked for: how far it sees, whether tiles agree, whether it learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

NORMS = nn.BatchNorm2d | nn.BatchNorm3d


def count(network: nn.Module) -> int:
    return sum(value.numel() for value in network.parameters())


def weights(make: Callable[..., nn.Module], **numbers: float) -> int:
    """Count the trainable numbers of a network without drawing them."""
    with torch.device("meta"):
        return count(make(**numbers))


def weights_of(
    layers: Sequence[tuple[int, ...]], dims: int, *, norms: Sequence[int] = (), biases: Sequence[int] = ()
) -> int:
    """Count by hand: (inputs, outputs, kernel) of each convolution, two per normalised channel, one per bias."""
    return sum(a * b * size**dims for a, b, size in layers) + 2 * sum(norms) + sum(biases)


def convolutions_of(network: nn.Module) -> list[nn.Module]:
    kinds = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d
    return [module for module in network.modules() if isinstance(module, kinds)]


def kernels_of(network: nn.Module) -> list[tuple[int, int, int, int]]:
    """Inputs, outputs, kernel and stride of every convolution, in the order of the pass."""
    return [
        (module.in_channels, module.out_channels, module.kernel_size[0], module.stride[0])  # type: ignore[union-attr,misc,index]
        for module in convolutions_of(network)
    ]


def kernels(network: nn.Module) -> list[tuple[int, int, int]]:
    """Inputs, outputs and kernel of every convolution, where no stride matters."""
    return [found[:3] for found in kernels_of(network)]


def positive(network: nn.Module) -> nn.Module:
    """Make every weight positive and every bias zero: rectifiers let all through, and no two paths cancel."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(weight := getattr(module, "weight", None), Tensor):
                fill = 0.5 + torch.rand(weight.shape, generator=generator)
                weight.copy_(torch.ones(()) if weight.ndim == 1 else fill / weight[0].numel())
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                bias.zero_()
    return network.double().eval()


def lively(network: nn.Module) -> nn.Module:
    """Give every parameter and running statistic a random value, so that nothing is zero by initialisation."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                noise = torch.rand(value.shape, generator=generator)
                if isinstance(module, NORMS):
                    value.copy_(noise + 0.5 if name in ("weight", "running_var") else noise - 0.5)
                elif value.ndim > 1:
                    value.copy_((noise - 0.5) * (24 / value[0].numel()) ** 0.5)
                elif name == "bias":
                    value.copy_(noise - 0.5)
    return network.eval()


def reached(network: nn.Module, shape: Sequence[int], places: Sequence[int]) -> list[tuple[int, int]]:
    """First and last input voxel along the first axis on which the output at each of `places` depends.

    By gradients.  A maximum hands its gradient to one voxel alone: on an image
    that falls along the axis always to the first of a window, on one that rises
    to the last, so each end is looked for on the image that shows it.

    Args:
        network: Positive, see `positive`.
        shape: Channels and spatial sizes of the input.
        places: Output voxels along the first axis; in the middle of the others.
    """
    ends: list[list[int]] = []
    for slope, end in ((-1.0, 0), (1.0, -1)):
        ramp = 2 + slope * torch.linspace(0, 1, shape[1], dtype=torch.float64)
        image = ramp.view(1, 1, -1, *[1] * (len(shape) - 2)).expand(1, *shape).clone().requires_grad_()
        output = network(image)
        middle = tuple(size // 2 for size in output.shape[3:])
        ends.append([])
        for place in places:
            (gradient,) = torch.autograd.grad(output[(0, 0, place, *middle)], image, retain_graph=True)
            touched = gradient.abs().sum(dim=(0, 1, *range(3, gradient.ndim))).nonzero().flatten()
            ends[-1].append(int(touched[end]))
    return list(zip(*ends))


def measured_field(network: nn.Module, channels: int, dims: int, others: int) -> int:
    """Farthest input voxel that any place on the coarsest grid sees, along the first axis, by gradients.

    Args:
        network: With `size_multiple`, `receptive_field` and `margin`; made positive here.
        channels: Of the input.
        dims: Spatial axes.
        others: Size along the other axes.
    """
    field, multiple, margin = network.receptive_field, network.size_multiple, network.margin  # type: ignore[misc]
    # a grid cell more than the network claims on each side: it could see farther
    start = -(-(field + multiple + 1) // multiple) * multiple
    shape = (channels, 2 * start + multiple, *[others] * (dims - 1))
    places = range(start, start + multiple)
    spans = reached(positive(network), shape, [place - margin for place in places])
    return max(max(place - first, last - place) for place, (first, last) in zip(places, spans))


def tile_differs_by(network: nn.Module, channels: int, dims: int, others: int, *, short: int = 0) -> float:
    """Largest difference between the whole's prediction and that of tiles with their halo, left and right.

    Args:
        network: As in `measured_field`; made lively here.
        channels: Of the input.
        dims: Spatial axes.
        others: Size along the other axes.
        short: Voxels by which the halo is shorter than the field calls for.
    """
    torch.manual_seed(0)
    field, multiple, margin = network.receptive_field, network.size_multiple, network.margin  # type: ignore[misc]
    halo = -(-(field - short) // multiple) * multiple
    tile = max(2 * multiple, 2 * margin + 1)
    whole_source = torch.randn(1, channels, 2 * halo + 2 * tile, *[others] * (dims - 1))
    differences = []
    with torch.no_grad():
        whole = lively(network)(whole_source)
        for start in (0, halo + tile // multiple // 2 * multiple, whole_source.shape[2] - tile):
            low, high = max(0, start - halo), min(whole_source.shape[2], start + tile + halo)
            part = network(whole_source[:, :, low:high])
            # output voxel i of a part is voxel i + margin + low of the source
            left, right = max(start, low + margin), min(start + tile, high - margin)
            found = part[:, :, left - low - margin : right - low - margin]
            expected = whole[:, :, left - margin : right - margin]
            assert found.shape[2] > 0 and found.shape == expected.shape
            differences.append(float((found - expected).abs().max() / expected.std()))
    return max(differences)


def share_left(network: nn.Module, source: Tensor, target: Tensor, *, steps: int, rate: float) -> float:
    """Train on one patch by Adam; the last loss as a share of the first.  Every parameter must have moved."""
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    optimiser = torch.optim.Adam(network.train().parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        loss = (network(source) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    still = [name for name, value in network.named_parameters() if torch.equal(value, before[name])]
    assert not still, still
    return losses[-1] / losses[0]


def share_left_of_blur(network: nn.Module, size: int, dims: int, *, steps: int, rate: float) -> float:
    """As `share_left`, for two random patches and what a blur and a hyperbolic tangent make of their middle."""
    torch.manual_seed(0)
    source, margin = torch.randn(2, 1, *[size] * dims), int(network.margin)  # type: ignore[arg-type]
    blurred = torch.stack([source.roll(shift, dims=2) for shift in (-1, 0, 1)]).sum(0)
    middle = (..., *[slice(margin, size - margin)] * dims)
    return share_left(network, source, blurred.tanh()[middle], steps=steps, rate=rate)
