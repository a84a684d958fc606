"""Weights and multiply-adds of the literature's networks at their published size, as docs/methods.md tells them.

    python benchmarks/network_costs.py

One source channel (critics: source and image).  Nothing is computed: layers are counted on a device without memory.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from chiasm.networks.catalogue import DISCRIMINATORS, GENERATORS, CataloguedNetwork, needs_of
from chiasm.training.cost import list_layers

SIDE = {2: 1024, 3: 256}


def told(entry: CataloguedNetwork, dims: int, channels: int) -> str:
    """Return weights and multiply-adds a voxel: of the output, for a critic of the input."""
    with torch.device("meta"):
        network = entry.make(in_channels=channels, dims=dims, scale=1.0)
        side = SIDE[dims]
        layers = list_layers(network, torch.zeros(1, channels, *(side,) * dims))
    work = sum(one.inputs * one.outputs * one.kernel * math.prod(one.size or (1,)) for one in layers)
    weights = sum(weight.numel() for weight in network.parameters())
    lost = 2 * needs_of(network).margin if channels == 1 else 0
    return f"{weights:>12,} weights {work / (side - lost) ** dims:>12,.0f} multiply-adds a voxel{_sizes(network)}"


def _sizes(network: nn.Module) -> str:
    if not hasattr(network, "receptive_field"):
        return ""
    needs = needs_of(network)
    least = f"from {needs.smallest} in multiples of {needs.multiple}"
    return f", sees {network.receptive_field}, loses {needs.margin}, {least}"


def main() -> None:
    """Print a line for each network and number of dimensions."""
    for kind, table, channels in (("generator", GENERATORS, 1), ("critic", DISCRIMINATORS, 2)):
        for name, entry in table.items():
            for dims in entry.dims:
                print(f"{kind:9} {name:12} {dims}D {told(entry, dims, channels)}")


if __name__ == "__main__":
    main()
