"""The first patch network for missing modalities: two hidden layers of ten volumes.

Li, Zhang, Suk, Wang, Li, Shen and Ji, "Deep Learning Based Imaging Data Completion
for Improved Brain Disease Diagnosis", MICCAI 2014, LNCS 8675, 305-312,
doi:10.1007/978-3-319-10443-0_39, figure of the network (PET from MR).

    source 15^3 -> 7^3, 10 -> 9^3 -> 7^3, 10 -> 3^3 -> 1^3, 1 -> 3^3

All convolutions are valid.  The table has 343 * 10 + 10 + 343 * 100 + 10 + 10 + 1
= 37,761 weights, which is also the count that we remember from the paper; we had
only its abstract at hand.

Departures:
    - the hidden layers are rectified; we could not check the paper's nonlinearity
      (our choice);
    - weights start from He et al. 2015 (our choice);
    - any size above the margin in one pass, where the paper averages overlapping
      patches: for a valid network both are the same numbers;
    - a 2D form, and several source channels.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from chiasm.networks.generator import CONVOLUTION, Dims, check_sizes
from chiasm.networks.layers import check_numbers, draw_he, scaled

#: Channels and kernel of every convolution.
LAYERS = ((10, 7), (10, 7), (1, 1))


class LiCnn(nn.Module):
    """Three valid convolutions, from a neighbourhood of 13 to its centre.

    Args:
        in_channels: Source channels.
        dims: Spatial axes of a convolution: 3 as published, or 2.
        scale: Share of the published channels.

    Attributes:
        size_multiple: 1, any size.
        margin: Voxels that the convolutions lose on each side.
        receptive_field: Voxels seen on each side of an output voxel, the same.
        smallest: Least spatial size, which gives one output voxel.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, *, in_channels: int, dims: Dims = 3, scale: float = 1.0) -> None:
        super().__init__()
        check_numbers(in_channels, dims, scale)
        self.dims, self.size_multiple = dims, 1
        self.margin = self.receptive_field = sum(size // 2 for _, size in LAYERS)
        self.smallest = 2 * self.margin + 1

        outputs = [*scaled((channels for channels, _ in LAYERS[:-1]), scale), 1]
        inputs = [in_channels, *outputs]
        self.convolutions = nn.ModuleList(
            CONVOLUTION[dims](a, b, size) for a, b, (_, size) in zip(inputs, outputs, LAYERS)
        )
        draw_he(self)

    def forward(self, source: Tensor) -> Tensor:
        """Map the source (N, in_channels, *S) to the prediction (N, 1, *(S - 12)), normalised units.

        Raises:
            ValueError: If a size is below `smallest`.
        """
        check_sizes(source.shape[2:], self.dims, self.size_multiple)
        if min(source.shape[2:]) < self.smallest:
            raise ValueError(f"spatial sizes must be at least {self.smallest}, not {tuple(source.shape[2:])}")
        features = source
        for convolution in self.convolutions[:-1]:
            features = functional.relu(convolution(features), inplace=True)
        prediction: Tensor = self.convolutions[-1](features).to(source.dtype)
        return prediction
