"""What makes a step cheaper leaves its results alone: each faster way beside the plain one."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from chiasm.networks.generator import join_channels
from chiasm.training.batches import Place, take_batch
from chiasm.training.learner import Learner
from chiasm.training.loop import make_fabric
from chiasm.training.losses import masked_gaussian
from chiasm.training.sampler import draw
from chiasm.training.setting import beside_source, make_draw
from learning import small, textured_case
from synthetic_cohort import plan_of

AT_ONCE = {"schedule.generator_alone": 0.0, "schedule.discriminators_alone": 0.0, "schedule.ramp": 0.01}


def make(method: str = "A7", changes: dict[str, object] | None = None) -> Learner:
    asked = small(method, {**AT_ONCE, "attention.gate": False, "schedule.steps": 1000, **(changes or {})})
    return Learner(asked, plan_of(), [textured_case(seed) for seed in range(2)], make_fabric(asked))


def smoothed_by_convolution(a: Tensor, mask: Tensor, sigmas: tuple[float, ...]) -> Tensor:
    values, cover = torch.where(mask, a, 0), mask.to(a.dtype)
    convolve = functional.conv2d if a.ndim == 4 else functional.conv3d
    for axis, sigma in enumerate(sigmas, start=2):
        radius = math.floor(4 * sigma + 0.5)
        kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=a.dtype) / sigma) ** 2)
        shape, padding = [1] * a.ndim, [0] * (a.ndim - 2)
        shape[axis], padding[axis - 2] = len(kernel), radius
        kernel = (kernel / kernel.sum()).view(shape)
        values, cover = (convolve(one, kernel, padding=padding) for one in (values, cover))
    return torch.where(mask, values / torch.where(mask, cover, 1), 0)


@pytest.mark.parametrize("sigmas", [(2.0, 4.0), (0.7, 30.0), (1.0, 2.5, 4.0)])
def test_a_gaussian_by_a_band_matrix_equals_one_by_convolution(sigmas: tuple[float, ...]) -> None:
    numbers = torch.Generator().manual_seed(0)
    shape = (3, 1, *(24, 33, 17)[: len(sigmas)])
    a = torch.randn(shape, generator=numbers, dtype=torch.float64)
    mask = torch.rand(shape, generator=numbers) < 0.6
    torch.testing.assert_close(masked_gaussian(a, mask, sigmas), smoothed_by_convolution(a, mask, sigmas))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("is_last", [True, False])
def test_channels_are_joined_as_torch_does_with_gradients_to_the_bit(dims: int, is_last: bool) -> None:
    memory = (torch.channels_last, torch.channels_last_3d)[dims - 2] if is_last else torch.contiguous_format
    sides = (8, 6, 4)[:dims]
    found = []
    for join in (join_channels, lambda a, b: torch.cat([a, b], 1)):
        torch.manual_seed(0)
        parts = [torch.randn(2, n, *sides).contiguous(memory_format=memory).requires_grad_() for n in (3, 5)]
        joined = join(*parts)
        (joined * torch.randn(joined.shape)).sum().backward()
        found.append([joined.detach(), *(part.grad for part in parts)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_discriminator_is_normalised_once_a_step_and_sees_both_images_by_the_same_weights() -> None:
    """Miyato et al., arXiv:1802.05957, algorithm 1: one power iteration, then one step."""
    one = make()
    local = one.trainables.bare("local_discriminator")
    once = deepcopy(local)
    drawn = make_draw(one.setting, 999, one.phase(999), draw(one.setting, one.state, 999, one.phase(999)))
    once.train()(beside_source(drawn.batch, drawn.batch.target))
    one.step(999)
    found, wanted = ({k: v for k, v in part.named_buffers() if k.endswith(("_u", "_v"))} for part in (local, once))
    assert found and all(torch.equal(found[name], wanted[name]) for name in found)


def test_a_fused_adam_steps_as_a_plain_one_does() -> None:
    weights = []
    for fused in (True, False):
        torch.manual_seed(0)
        layer = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
        adam = torch.optim.Adam(layer.parameters(), lr=1e-3, betas=(0.5, 0.99), fused=fused)
        for _ in range(20):
            adam.zero_grad()
            layer(torch.randn(2, 4, 9, 9)).square().mean().backward()
            adam.step()
        weights.append(layer.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-7)


def test_the_average_follows_as_a_loop_over_all_weights_would_to_the_bit() -> None:
    one = make("A1")
    for step in range(3):
        before = {name: value.clone() for name, value in one.trainables.average.state_dict().items()}
        one.step(step)
        keep = min(one.recipe.optimiser.average, (1 + step) / (10 + step))
        current = one.trainables.bare("generator").state_dict()
        for name, value in one.trainables.average.state_dict().items():
            moves = value.is_floating_point()
            assert torch.equal(value, torch.lerp(before[name], current[name], 1 - keep) if moves else current[name])


def test_moments_that_were_loaded_lie_as_their_weights_do(tmp_path: Path) -> None:
    """Else a fused Adam pairs them with other weights."""
    from chiasm.training.checkpoints import load_checkpoint, save_checkpoint

    one = make("A1")
    one.step(0)
    save_checkpoint(tmp_path, 1, one.parts, one.state.to_dict())
    load_checkpoint(tmp_path, one.parts)
    for weight, moments in one.trainables.optimisers["generator"].state.items():
        assert moments["exp_avg"].stride() == weight.stride() == moments["exp_avg_sq"].stride()


@pytest.mark.parametrize("k", [0, 1, 11, 22, 23])
@pytest.mark.parametrize("flip", [True, False])
def test_a_patch_that_is_cropped_before_its_slices_are_stacked_equals_one_cropped_after(k: int, flip: bool) -> None:
    case = textured_case(0)
    case = replace(case, mask=np.random.default_rng(1).random(case.mask.shape) < 0.7)
    place = Place(0, (20, 22, k), flip, (1.25,), (-0.5,))
    source, target, mask, lesion = (part[0].numpy() for part in take_batch([case], [place], patch=(16, 24), slices=5))
    around = np.clip(np.arange(k - 2, k + 3), 0, 23)
    whole = case.source[0] * np.float32(1.25) + np.float32(-0.5) * case.mask
    assert case.labels is not None
    wanted = (whole[..., around], case.target[..., [k]], case.mask[..., [k]], case.labels[..., [k]] > 0)
    for found, image in zip((source, target, mask, lesion), wanted, strict=True):
        cut = np.moveaxis(image, -1, 0)[:, 12:28, 10:34]
        assert np.array_equal(found, cut[:, ::-1] if flip else cut) and found.dtype == cut.dtype
