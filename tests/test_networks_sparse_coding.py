"""The sparse coder: its solvers against dense ones, its objective by hand, what it recovers, and what it refuses."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import Lasso
from torch import Tensor
from torch.nn import functional

import network_checks
from chiasm.networks.sparse_coding import (
    SPARSITY,
    SparseCoder,
    blurred,
    decode,
    encode,
    largest_curvature,
    split,
    unit_filters,
)
from chiasm.training.admm import TIE, Code, Solver, admm, fit_filters
from chiasm.training.joint_coding import RIDGE, Examples, JointCoding, align_unpaired, as_analysis, fit

FEW = 8 / 800  # filters, as a share of the published


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def contrasts(count: int, side: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three tissues of random shape in two contrasts, the target's darker where the source's is brighter."""
    field = functional.conv2d(noise(count, 1, side, side, seed=seed), torch.ones(1, 1, 5, 5) / 5, padding=2)
    tissue = (field > 0.6).float() - (field < -0.6).float()
    jitter = 0.05 * noise(2, *tissue.shape, seed=seed + 1000)
    return 2 + tissue + jitter[0], 3 - 1.5 * tissue + jitter[1]


def blobs(count: int, side: int, seed: int) -> Tensor:
    """Three tissues with smooth outlines and sharp edges."""
    offsets = torch.arange(-9, 10) / 3
    field = 12 * blurred(noise(count, 1, side, side, seed=seed), torch.exp(-offsets.square() / 2))
    tissue = (field > 0.5).float() - (field < -0.5).float()
    return 3 - 1.5 * tissue + 0.05 * noise(*tissue.shape, seed=seed + 1000)


def examples(pairs: int = 4, others: int = 2, side: int = 24) -> Examples:
    source, target = contrasts(pairs, side)
    return Examples(source, target, contrasts(others, side, 1)[0], contrasts(others, side, 2)[1])


def coder(scale: float = FEW, channels: int = 1) -> SparseCoder:
    torch.manual_seed(0)
    return SparseCoder(in_channels=channels, dims=2, scale=scale)


def dense(count: int, shape: tuple[int, ...], filters: Tensor, *, periodic: bool) -> Tensor:
    """The matrix of synthesis, a column for each code of each filter: built voxel by voxel with shifts alone."""
    columns = []
    for k in range(count):
        for place in np.ndindex(*shape):
            image = torch.zeros(filters.shape[1], *shape)
            for offset in np.ndindex(*filters.shape[2:]):
                where = [p + o - side // 2 for p, o, side in zip(place, offset, filters.shape[2:])]
                if periodic:
                    where = [w % side for w, side in zip(where, shape)]
                if all(0 <= w < side for w, side in zip(where, shape)):
                    image[(slice(None), *where)] += filters[(k, slice(None), *offset)]
            columns.append(image.flatten())
    return torch.stack(columns, 1)


def lasso(matrix: Tensor, image: Tensor, sparsity: float) -> tuple[Tensor, float]:
    """scikit-learn's codes and the objective there."""
    n = len(matrix)
    model = Lasso(alpha=sparsity / n, fit_intercept=False, tol=1e-12, max_iter=200_000)
    model.fit(matrix.double().numpy(), image.flatten().double().numpy())
    codes = torch.from_numpy(model.coef_)
    misfit = (image.flatten().double() - matrix.double() @ codes).square().sum() / 2
    return codes, float(misfit + sparsity * codes.abs().sum())


def test_soft_thresholding_finds_what_scikit_learns_lasso_finds() -> None:
    filters = unit_filters(noise(3, 2, 3, 3))  # two channels
    image, sparsity = noise(1, 2, 7, 6, seed=1), 0.4
    codes = encode(image, as_analysis(filters), sparsity, 1500)
    matrix = dense(3, (7, 6), filters, periodic=False)
    expected, least = lasso(matrix, image, sparsity)
    found = (image - decode(codes, filters)).square().sum() / 2 + sparsity * codes.abs().sum()
    assert float(found) == pytest.approx(least, rel=1e-5)
    torch.testing.assert_close(matrix @ codes.flatten(), (matrix.double() @ expected).float(), atol=2e-3, rtol=0)
    assert 0.2 < float((codes == 0).float().mean()) < 0.95


def test_admm_finds_what_scikit_learns_lasso_finds() -> None:
    filters = unit_filters(noise(3, 1, 3, 3))
    image, sparsity, shape = noise(1, 8, 6, seed=1), 0.4, (8, 6)
    solver = Solver.of(filters, shape, None, sparsity)
    zeros = torch.zeros(3, *shape)
    found = admm(image, solver, Code(zeros, zeros), zeros, sparsity=sparsity, steps=1500)
    matrix = dense(3, shape, filters, periodic=True)
    expected, least = lasso(matrix, image, sparsity)
    value = float((image.flatten() - matrix @ found.codes.flatten()).square().sum() / 2 + 0.4 * found.codes.abs().sum())
    assert value == pytest.approx(least, rel=1e-5)
    torch.testing.assert_close(matrix @ found.codes.flatten(), (matrix.double() @ expected).float(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("shape", [(6, 7), (5, 4, 4)])
@pytest.mark.parametrize("channels", [1, 2])
def test_the_fourier_solution_is_that_of_the_dense_linear_system(shape: tuple[int, ...], channels: int) -> None:
    filters = noise(4, channels, *(3,) * len(shape))
    root = noise(4, 4, seed=1)
    bend = root @ root.T
    solver = Solver.of(filters, shape, bend, 0.2)
    right = noise(4, *shape, seed=2)
    axes = tuple(range(1, len(shape) + 1))
    spectra = solver.solve(torch.fft.rfftn(right, dim=axes).flatten(1))
    found = torch.fft.irfftn(spectra.view(4, *shape[:-1], shape[-1] // 2 + 1), s=shape, dim=axes)
    matrix = dense(4, shape, filters, periodic=True)
    whole = torch.kron(bend + solver.stiffness * torch.eye(4), torch.eye(math.prod(shape))) + matrix.T @ matrix
    expected = torch.linalg.solve(whole.double(), right.flatten().double())
    torch.testing.assert_close(found.flatten(), expected.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_on_the_curvature_holds_and_is_tight(seed: int) -> None:
    filters = noise(3, 1, 3, 3, seed=seed)
    matrix = dense(3, (12, 12), filters, periodic=True)
    true = float(torch.linalg.matrix_norm(matrix, 2)) ** 2
    assert true <= float(largest_curvature(filters)) < 1.3 * true


def test_free_filters_are_those_of_ridge_regression() -> None:
    images, codes, start = noise(2, 1, 8, 9), noise(2, 3, 8, 9, seed=1), noise(3, 1, 3, 3, seed=2)
    found = fit_filters(start, images, codes)
    columns = []
    for place in range(27):
        unit = torch.zeros(27)
        unit[place] = 1
        matrix = dense(3, (8, 9), unit.view(3, 1, 3, 3), periodic=True)
        columns.append(torch.cat([matrix @ code.flatten() for code in codes]))
    design = torch.stack(columns, 1).double()
    wanted, first = images.flatten().double(), start.flatten().double()
    first = first * (design @ first @ wanted) / (design @ first).square().sum()
    tie = TIE * codes.double().square().sum() / 3
    expected = torch.linalg.solve(
        design.T @ design + tie * torch.eye(27, dtype=torch.float64), design.T @ wanted + tie * first
    )
    torch.testing.assert_close(found.flatten(), expected.float(), atol=1e-4, rtol=1e-4)


def test_synthesis_is_the_transpose_of_analysis() -> None:
    network = coder(channels=2)
    image, codes = noise(1, 2, 9, 11), noise(1, 8, 9, 11, seed=1)
    filters = network.analysis.weight
    torch.testing.assert_close((network.analysis(image) * codes).sum(), (image * decode(codes, filters)).sum())


def test_the_discrepancy_is_that_of_a_hand_computation() -> None:
    shown = examples(pairs=1, others=1)
    values = []
    for weight in (0.0, 3.0):
        network = coder(2 / 800)
        coding = JointCoding(network, shown, discrepancy=weight)
        network.mapping.weight.data = torch.tensor([[1.0, 2.0], [0.0, -1.0]]).view(2, 2, 1, 1)
        n = 24 * 24
        coding.source_codes[1, 0, 0, 0], coding.source_codes[1, 1, 2, 2] = 0.5 * n, 0.25 * n  # means 1/2, 1/4
        coding.target_codes[1, 0, 3, 3], coding.target_codes[1, 1, 4, 4] = 0.75 * n, -1.0 * n  # means 3/4, -1
        values.append(coding.objective(network))
    # W mean(u) = (1/2 + 2/4, -1/4) = (1, -1/4); less (3/4, -1) it is (1/4, 3/4), squared 10/16
    assert values[1] - values[0] == pytest.approx(3 / 2 * 24 * 24 * 10 / 16, rel=1e-3)


def test_the_objective_before_anything_is_learnt_is_the_images_energy() -> None:
    network = coder()
    coding = JointCoding(network, examples())
    ridge = RIDGE / 2 * coding.paired_voxels * 8
    energy = (coding.source.square().sum() + coding.target.square().sum()) / 2
    assert coding.objective(network) == pytest.approx(float(energy) + ridge, rel=1e-5)


def test_no_turn_raises_the_objective_and_filters_keep_their_norm() -> None:
    network = coder()
    coding = JointCoding(network, examples(), discrepancy=5.0)
    values = [coding.objective(network)]
    for _ in range(8):
        for turn in (coding._code_sources, coding._code_targets):
            with torch.no_grad():
                turn(network)
            values.append(coding.objective(network))
        values.append(coding.round(network))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(values)), values
    assert values[-1] < 0.5 * values[0]
    for layer in (network.analysis, network.synthesis):
        norms = layer.weight.flatten(1).norm(dim=1)
        assert norms.max() <= 1 + 1e-5 and norms.max() > 0.9


def test_the_mapping_is_where_the_objective_is_least() -> None:
    network = coder()
    coding = JointCoding(network, examples(), discrepancy=5.0)
    for seed, codes in enumerate((coding.source_codes, coding.target_codes)):
        codes.copy_(noise(*codes.shape, seed=seed).abs())  # means that weigh
    fitted = coding._fit_mapping(coding.source_codes, coding.target_codes).view_as(network.mapping.weight)
    network.mapping.weight.data = fitted
    least = coding.objective(network)
    for seed in range(4):
        for sign in (-0.05, 0.05):
            network.mapping.weight.data = fitted + sign * noise(*fitted.shape, seed=seed)
            assert coding.objective(network) > least


def test_a_planted_relation_of_dictionaries_is_recovered() -> None:
    def planted(count: int, seed: int) -> tuple[Tensor, Tensor]:
        rng = torch.Generator().manual_seed(seed)
        filters = [unit_filters(f - f.mean((1, 2, 3), keepdim=True)) for f in noise(2, 4, 1, 7, 7, seed=99)]
        codes = 4 * torch.randn(count, 4, 40, 40, generator=rng) * (torch.rand(count, 4, 40, 40, generator=rng) < 0.006)
        return 10 + decode(codes, filters[0]), 20 + decode(codes, filters[1])

    source, target = planted(6, 1)
    network, _ = fit(coder(), Examples(source, target, source[:0], target[:0]), rounds=15, tolerance=0)
    unseen, truth = planted(3, 2)
    with torch.no_grad():
        left = (network(unseen) - truth).square().mean() / truth.var()
    assert left < 0.25, left  # nothing but the mean: 1


def test_a_few_pairs_are_fitted_and_new_images_are_predicted_better_than_by_their_mean() -> None:
    shown = examples(4, 2, 32)
    network, history = fit(coder(16 / 800), shown, rounds=12)
    unseen, truth = contrasts(3, 32, seed=5)
    with torch.no_grad():
        for source, target in ((shown.source, shown.target), (unseen, truth)):
            error = (network(source) - target).abs().mean()
            assert error < 0.35 * (target - target.mean()).abs().mean()
    assert history[-1] < history[0]


def test_source_and_target_lie_on_one_grid_and_detail_lost_along_an_axis_comes_back() -> None:
    def degraded(sharp: Tensor) -> Tensor:
        thick = functional.avg_pool2d(sharp, (1, 4))
        return functional.interpolate(thick, size=sharp.shape[2:], mode="bilinear", align_corners=False)

    sharp, unseen = blobs(4, 36, seed=1), blobs(3, 36, seed=2)
    nobody = sharp[:0]
    network, _ = fit(coder(16 / 800), Examples(degraded(sharp), sharp, nobody, nobody), rounds=10)
    with torch.no_grad():
        made, interpolated = network(degraded(unseen)), degraded(unseen)
    assert made.shape == unseen.shape
    assert (made - unseen).square().mean() < 0.9 * (interpolated - unseen).square().mean()


def test_unpaired_patches_are_matched_by_where_their_detail_lies() -> None:
    images = torch.zeros(4, 1, 32, 32)
    for i, (row, column) in enumerate([(0, 0), (0, 16), (16, 0), (16, 16)]):
        images[i, :, row : row + 16, column : column + 16] = noise(1, 16, 16, seed=i)
    order = torch.tensor([2, 0, 3, 1])
    assert align_unpaired(images, -3 * images[order]).tolist() == [1, 3, 0, 2]
    assert len(align_unpaired(images, images[:0])) == 0 == len(align_unpaired(images[:0], images))


def test_the_two_parts_of_an_image_add_up_and_a_constant_has_no_detail() -> None:
    mask = torch.rand(1, 1, 30, 30, generator=torch.Generator().manual_seed(0)) < 0.7
    network = coder()
    smooth, detail = split(noise(1, 1, 30, 30) + 3, mask, network.gaussian)
    torch.testing.assert_close(smooth + detail, (noise(1, 1, 30, 30) + 3) * mask)
    assert split(torch.full((1, 1, 30, 30), 5.0), mask, network.gaussian)[1].abs().max() < 1e-5


def test_an_output_sees_no_farther_than_the_receptive_field_and_nothing_outside_the_mask_is_made() -> None:
    network = network_checks.lively(coder(4 / 800))
    reach = network.receptive_field
    image = noise(1, 1, 7, 2 * reach + 20) * 3
    image[..., 40:45] = 0
    changed = image.clone()
    changed[..., 0] += 1
    with torch.no_grad():
        one, two = network(image), network(changed)
    assert torch.equal(one[..., reach + 1 :], two[..., reach + 1 :]) and not torch.equal(one[..., :9], two[..., :9])
    assert not one[..., 40:45].any() and torch.isfinite(one).all()


def test_adam_trains_the_unrolled_coder_too() -> None:
    source, target = contrasts(1, 24)
    assert network_checks.share_left(coder(16 / 800), source, target, steps=40, rate=0.02) < 0.2


@pytest.mark.parametrize("dims", [2, 3])
def test_weights_are_counted_by_hand(dims: int) -> None:
    network = SparseCoder(in_channels=2, dims=dims, scale=1 / 100)  # type: ignore[arg-type]
    size = {2: 49, 3: 125}[dims]
    assert network_checks.count(network) == 8 * 2 * size + 8 * 8 + 8 * size + 3  # F, W, G and a line of two slopes


def test_volumes_are_coded_too() -> None:
    source = noise(1, 1, 12, 12, 12)
    network = SparseCoder(in_channels=1, dims=3, scale=4 / 800)
    made, history = fit(network, Examples(source, 2 * source, source[:0], source[:0]), rounds=4, tolerance=0)
    assert history == sorted(history, reverse=True)
    with torch.no_grad():
        assert (made(source) - 2 * source).square().mean() < (2 * source).var()


def test_the_same_seed_gives_the_same_coder_and_another_seed_another(tmp_path: Path) -> None:
    made = [fit(coder(), examples(), rounds=2, seed=seed)[0] for seed in (0, 0, 1)]
    weights = [network.state_dict() for network in made]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["analysis.weight"], weights[2]["analysis.weight"])
    save_file({name: value.contiguous() for name, value in weights[0].items()}, tmp_path / "weights.safetensors")
    other = coder()
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    with torch.no_grad():
        assert torch.equal(other(examples().source), made[0](examples().source))


def test_a_fit_stops_by_tolerance_by_rounds_and_by_time_and_tells_how_far_it_is() -> None:
    told: list[tuple[int, int]] = []
    _, all_rounds = fit(coder(), examples(), rounds=3, tolerance=0, progress=lambda *a: told.append(a[:2]))
    assert len(all_rounds) == 3 and told == [(1, 3), (2, 3), (3, 3)]
    assert len(fit(coder(), examples(), rounds=9, tolerance=0.9)[1]) == 2
    assert len(fit(coder(), examples(), rounds=9, seconds=0.0)[1]) == 1


def test_what_cannot_be_learnt_from_is_refused() -> None:
    good = examples()
    nothing = good.source[:0]
    cases = {
        "at least one pair": good._replace(source=nothing, target=nothing),
        "no pairs": good._replace(target=good.target[:2]),
        "other_source has shape": good._replace(other_source=good.other_source[..., :9]),
        "not finite": good._replace(target=good.target * math.nan),
    }
    for told, bad in cases.items():
        with pytest.raises(ValueError, match=told):
            JointCoding(coder(), bad)
    with pytest.raises(ValueError, match="do not fit this coder"):
        JointCoding(coder(channels=2), good)
    with pytest.raises(ValueError, match="coupling"):
        JointCoding(coder(), good, coupling=0.0)
    with pytest.raises(ValueError, match="rounds is at least 1"):
        fit(coder(), good, rounds=0)
    with pytest.raises(ValueError, match="at least 7"):
        coder()(torch.zeros(1, 1, 6, 9))


def test_unpaired_images_of_one_kind_alone_shape_filters_but_no_discrepancy() -> None:
    shown = examples()
    alone = shown._replace(other_target=shown.other_target[:0])
    network = coder()
    coding = JointCoding(network, alone)
    assert len(coding.matches) == 0 and len(coding.source_codes) == 6
    assert coding.round(network) > coding.round(network)
    assert SPARSITY * coding.source_codes[4:].abs().sum() > 0
