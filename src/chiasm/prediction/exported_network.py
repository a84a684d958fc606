"""The networks that are exported: of one model or several, from sources and mask to images in the target's unit.

Models that see slices of one plane are one network, as they take the same stack; those of another plane are another.
It pads what it gets to the sizes that its models take, averages mirror images where that is asked for, assesses the
image, and converts to the unit of the first model, as `synthesise` and `average_models` do.  Every step is written so
that ONNX and OpenVINO can follow it for images of any size: no remainder of a size, no branch on one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from chiasm.prediction.engines import freeze_for_inference
from chiasm.prediction.ensemble import target_unit_of
from chiasm.prediction.model import Model, source_channels
from chiasm.prediction.passes import Assessment, Chain, Networks, networks_of
from chiasm.recipe import Average

AT_ONCE = 16  # steps of a map, each of which takes the memory of an image
FARTHEST = 1e30  # beyond every value


class PiecewiseLinear(nn.Module):
    """A rising, piecewise linear map; a sum of clamped steps, all of one sign, so that float32 loses nothing.

    Args:
        x: Knots, strictly rising.
        y: What each becomes, never falling.
        constant: Whether it is constant beyond its knots; otherwise its first and last slopes go on.

    >>> PiecewiseLinear((0.0, 1.0, 2.0), (0.0, 10.0, 11.0))(torch.tensor([[[-1.0, 0.5, 3.0]]])).tolist()
    [[[-10.0, 5.0, 12.0]]]
    """

    def __init__(self, x: Sequence[float], y: Sequence[float], *, constant: bool = False) -> None:
        super().__init__()
        self.start = float(y[0])
        ends, values = np.asarray(x, np.float64), np.asarray(y, np.float64)
        low, high = np.zeros(len(ends) - 1), np.diff(ends)
        slopes = np.diff(values) / high
        if not constant:
            low[0], high[-1] = -FARTHEST, FARTHEST
        table = torch.from_numpy(np.stack([ends[:-1], low, high, slopes]).astype(np.float32))
        self.table = nn.Parameter(table, requires_grad=False)

    def forward(self, values: Tensor) -> Tensor:
        """Map values, shape (N, 1, *S)."""
        made = torch.full_like(values, self.start)
        for group in torch.split(self.table, AT_ONCE, dim=1):  # few operations, which converters follow quickly
            begin, low, high, slope = (row.reshape(1, -1, *[1] * (values.ndim - 2)) for row in group)
            steps = torch.minimum(torch.maximum(values - begin, low), high)
            made = made + (steps * slope).sum(dim=1, keepdim=True)
        return made


class ExportedMember(nn.Module):
    """One model: its networks, and what follows them.

    Args:
        model: From `load_model`.
        first: The model in whose unit the image is made.
        is_mirrored: Whether the mean over image and mirror image is made.
    """

    def __init__(self, model: Model, first: Model, *, is_mirrored: bool) -> None:
        super().__init__()
        networks, plan = networks_of(model), model.plan
        parts = (networks.generator, networks.local_discriminator, networks.refiner)
        generator, local_discriminator, refiner = (None if one is None else freeze_for_inference(one) for one in parts)
        assert generator is not None
        frozen = Networks(generator, local_discriminator, refiner, difficulties=False).of_any_size
        conditional = model.recipe.discriminators.conditional
        self.channels, self.multiple, self.is_mirrored = source_channels(plan), networks.multiple, is_mirrored
        self.slices, self.is_sideways = plan.slices, plan.axes.index(0) >= plan.dims  # left and right lie across slices
        alone = frozen._replace(local_discriminator=None) if is_mirrored and refiner is None else frozen
        self.chain = Chain(alone, channels=self.channels, conditional=conditional)
        self.assessment: Assessment | None = None  # of the mean of two images
        if is_mirrored and local_discriminator is not None:
            self.assessment = Assessment(frozen, channels=self.channels, conditional=conditional)
        unit = target_unit_of(plan, first.plan)
        self.image = PiecewiseLinear(unit.reference.normalised, unit.reference.values)
        self.range = plan.target_range if plan.target_unit == "HU" else None
        table = model.calibration
        self.calibration = None if table is None else PiecewiseLinear(table.x, table.y, constant=True)
        self.error_scale, self.size_of_one = float(model.error_scale), unit.size_of_one

    def forward(self, stack: Tensor) -> Tensor:
        """Map sources and mask, (1, channels + slices, *S), to image and, where there is one, expected error."""
        made = self._padded(self.chain, stack)
        if self.is_mirrored:
            made = (made[:, :1] + self._of_mirror_image(stack)) / 2
        if self.assessment is not None:
            source, masks = stack[:, : self.channels], stack[:, self.channels :]
            middle = masks.shape[1] // 2
            seen = torch.cat([source, made * masks[:, middle : middle + 1]], dim=1)
            made = torch.cat([made, self._padded(self.assessment, seen)], dim=1)
        image: Tensor = self.image(made[:, :1])
        if self.range is not None:
            image = torch.clamp(image, *self.range)
        if made.shape[1] == 1:
            return image
        error = self.error_scale * functional.softplus(-made[:, 1:2])
        if self.calibration is not None:
            error = self.calibration(error)
        return torch.cat([image, error * self.size_of_one], dim=1)

    def _of_mirror_image(self, stack: Tensor) -> Tensor:
        """Return the image that is made of the mirror image, mirrored back, (1, 1, *S).

        Where slices lie across left and right, the mirror image holds the same slices in the opposite order.
        """
        if not self.is_sideways:
            return self._padded(self.chain, stack.flip(2))[:, :1].flip(2)
        reversed_slices = torch.unflatten(stack, 1, (-1, self.slices)).flip(2).flatten(1, 2)
        return self._padded(self.chain, reversed_slices)[:, :1]

    def _padded(self, network: nn.Module, stack: Tensor) -> Tensor:
        """Run a network on images of any size, (1, C, *S) to (1, C_out, *S)."""
        sizes = stack.shape[2:]
        if self.multiple > 1:
            ends = ((size + self.multiple - 1) // self.multiple * self.multiple - size for size in reversed(sizes))
            stack = functional.pad(stack, [one for end in ends for one in (0, end)])
        made: Tensor = network(stack)
        if self.multiple > 1:
            for axis, size in enumerate(sizes, start=2):  # a slice would ask whether there is anything to cut
                made = made.index_select(axis, torch.arange(size, device=made.device))
        return made


def outputs_of(models: Sequence[Model], among: Sequence[Model]) -> list[str]:
    """Name the images of some models among all that are averaged: a spread needs two, the expected error all."""
    has_error = all(model.local_discriminator is not None for model in among)
    return ["image", *(["expected-error"] if has_error else []), *(["spread"] if len(models) > 1 else [])]


class ExportedNetwork(nn.Module):
    """One model or the mean of several.

    Args:
        models: With networks that take the same input.
        average: "flip" for the mean over image and mirror image.
        among: All models that are averaged, which `check_agreement` accepts, these among them.  The unit is that of
            the first; there is an expected error if all have one.
    """

    def __init__(self, models: Sequence[Model], average: Average, among: Sequence[Model]) -> None:
        super().__init__()
        self.members = nn.ModuleList(ExportedMember(model, among[0], is_mirrored=average == "flip") for model in models)
        self.outputs = outputs_of(models, among)  # names of the output's channels
        self.eval()
        for tensor in (*self.parameters(), *self.buffers()):  # each with a storage of its own, as it is written
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)

    def forward(self, stack: Tensor) -> Tensor:
        """Map sources and mask, (1, channels + slices, *S), to `outputs` in the target's unit, (1, outputs, *S)."""
        made = [member(stack) for member in self.members]
        images = [one[:, :1] for one in made]
        count = len(images)
        mean = sum(images[1:], images[0]) / count
        found = [mean]
        if "expected-error" in self.outputs:
            found.append(sum((one[:, 1:2] for one in made[1:]), made[0][:, 1:2]) / count)
        if count > 1:
            squares = [(image - mean) ** 2 for image in images]
            found.append(torch.sqrt(sum(squares[1:], squares[0]) / (count - 1)))
        return torch.cat(found, dim=1)
