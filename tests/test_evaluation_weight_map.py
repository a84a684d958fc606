"""The weight F of a case, made by networks whose confidence is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from chiasm.errors import RunError
from chiasm.evaluation.weight_map import describe_weight, weight_map, why_no_weight
from chiasm.methods import make_recipe
from chiasm.networks.discriminators import LocalLogits
from chiasm.prediction.engines import Engine
from chiasm.prediction.model import Model
from chiasm.volumes import Geometry, Volume
from conftest import QUICK
from synthetic_cohort import affine, pair, plan_of

ENGINE = Engine(torch.device("cpu"), "32-true")


class Copies(nn.Module):
    """A generator that returns its source."""

    def forward(self, source: Tensor) -> Tensor:
        return source[:, :1]


class Believes(nn.Module):
    """A local discriminator that takes bright voxels for real: the logit of each head is a multiple of the image."""

    def forward(self, images: Tensor) -> LocalLogits:
        image = images[:, -1:]
        return LocalLogits(realness=-image, magnitude=3 * image, structured=image)


def model_of(**changes: object) -> Model:
    plan = plan_of(slices=1)
    return Model(make_recipe("A7", "tiny", QUICK | changes), plan, Copies(), Believes(), 1.0)


def case(*, is_rotated: bool = False) -> Volume:
    array, matrix = pair(3)[0], affine()
    if is_rotated:  # the same voxels in another order of axes and from the other end
        array, matrix = np.ascontiguousarray(array[::-1].transpose(2, 0, 1)), matrix.copy()
        matrix[:3, 3] += matrix[:3, 0] * (array.shape[1] - 1)
        matrix[:3, :3] = np.stack([matrix[:3, 2], -matrix[:3, 0], matrix[:3, 1]], axis=1)
    i, j, k = array.shape
    return Volume(array, Geometry((i, j, k), matrix))


def known_weight(beta: float) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """F of the case by hand: the image is the normalised source, and M its logistic function; and the mask."""
    source = case().array.astype(float)
    mask = source > 0
    low, middle, high = np.quantile(source[mask], (0.25, 0.5, 0.75))
    return (1 + np.exp(1.349 * (source - middle) / (high - low))) ** -beta, mask


def test_the_weight_without_scaling_is_a_power_of_one_minus_the_confidence() -> None:
    changes = {"attention.norm": "none", "attention.beta": 2.0}
    known, mask = known_weight(2.0)
    made = weight_map(model_of(**changes), [case()], engine=ENGINE)
    assert np.abs(made - known)[mask].max() < 1e-5
    rotated = weight_map(model_of(**changes), [case(is_rotated=True)], engine=ENGINE)
    assert np.array_equal(rotated, made[::-1].transpose(2, 0, 1))  # it lies where its source lies


def test_the_scaled_weight_has_a_mean_of_one_over_the_case_and_stays_below_its_cap() -> None:
    known, mask = known_weight(1.0)
    made = weight_map(model_of(), [case()], engine=ENGINE)
    assert made[mask].mean() == pytest.approx(1, abs=1e-4)
    assert np.abs(made[mask] - known[mask] / known[mask].mean()).max() < 1e-3
    capped = weight_map(model_of(**{"attention.beta": 4.0, "attention.cap": 2.0}), [case()], engine=ENGINE)[mask]
    assert capped.max() == pytest.approx(2, abs=1e-2) and capped.mean() == pytest.approx(1, abs=1e-2)


def test_a_training_without_weights_is_refused_with_the_reason() -> None:
    reasons = {code: why_no_weight(make_recipe(code, "tiny").attention) for code in ("A1", "A7", "A13", "C4")}
    assert reasons["A7"] == "" and "no attention" in reasons["A1"]
    assert "chooses patches" in reasons["A13"] and "shuffles" in reasons["C4"]
    with pytest.raises(RunError, match="has no attention"):
        weight_map(model_of(**{"attention.head": "none"}), [case()], engine=ENGINE)


def test_the_weight_is_described_with_its_own_numbers() -> None:
    literal = describe_weight(make_recipe("literal", "tiny").attention)
    assert literal == "F = (1 − M)^2, with M from the realness head of the local discriminator, not scaled"
    assert "F = 1 − M, with M from the structured head" in describe_weight(make_recipe("A7", "tiny").attention)
