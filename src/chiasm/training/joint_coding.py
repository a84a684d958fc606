"""The training of joint convolutional sparse coding by ADMM: filters of both modalities, and the map between codes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from chiasm.networks.generator import CONVOLUTION
from chiasm.networks.sparse_coding import (
    SPARSITY,
    STEPS_ALONE,
    SparseCoder,
    encode,
    filter_norms,
    single_channel,
    split,
    unit_filters,
)
from chiasm.training.admm import Code, Solver, admm, better, fit_filters, slope_of, squared_misfit, update_filters

COUPLING = 1.0  # b
DISCREPANCY = 1.0  # m
RIDGE = 1e-3  # c, for each voxel of the pairs

COARSE = 4  # cells along each axis of a descriptor for matching

Progress = Callable[[int, int, float], None]


class Examples(NamedTuple):
    """The training patches: of one size, normalised, zero outside the mask.

    Attributes:
        source: Of pairs, shape (P, C, *S).
        target: Of the same pairs, shape (P, 1, *S).
        other_source: Unpaired, shape (M, C, *S), M from 0 up.
        other_target: Unpaired, of other cases, shape (L, 1, *S), L from 0 up.
    """

    source: Tensor
    target: Tensor
    other_source: Tensor
    other_target: Tensor


class JointCoding(nn.Module):
    """The learning of a `SparseCoder`: codes and ADMM's multipliers of all patches, and one round of it.

    Everything that a round changes is a buffer of this module or a parameter of
    the coder, so that both together can be stored and gone on from.

    Args:
        coder: Changed in place: filters start from patches of the pairs.
        examples: What is learnt from.
        seed: Of the patches that filters start from.
        coupling: b.
        discrepancy: m; where there are no unpaired patches of both kinds, (3) is absent.

    Attributes:
        source_codes: u of pairs, then of the others, shape (P + M, K, *D): D is S and a filter more.
        target_codes: v likewise, shape (P + L, K, *D).
        source_duals: ADMM's scaled multipliers of u.
        target_duals: ADMM's scaled multipliers of v.

    Raises:
        ValueError: If there is no pair with anything in it, or numbers or shapes do not fit.
    """

    source_codes: Tensor
    target_codes: Tensor
    source_duals: Tensor
    target_duals: Tensor

    def __init__(
        self,
        coder: SparseCoder,
        examples: Examples,
        *,
        seed: int = 0,
        coupling: float = COUPLING,
        discrepancy: float = DISCREPANCY,
    ) -> None:
        super().__init__()
        _check_examples(examples, coder)
        if coupling <= 0 or discrepancy < 0:
            raise ValueError(f"coupling ({coupling}) is above 0, discrepancy ({discrepancy}) at least 0")
        self.examples, self.coupling, self.discrepancy = examples, coupling, discrepancy
        self.pairs, size = len(examples.source), coder.smallest
        mask = (examples.source != 0).any(1, keepdim=True)
        masks = [mask, (examples.other_source != 0).any(1, keepdim=True), examples.other_target != 0]
        smooth_x, detail_x = split(examples.source, mask, coder.gaussian)
        smooth_y, detail_y = split(examples.target, mask, coder.gaussian)
        others_x = split(examples.other_source, masks[1], coder.gaussian)[1]
        others_y = split(examples.other_target, masks[2], coder.gaussian)[1]
        with torch.no_grad():
            coder.spread.copy_(torch.cat([_rms(detail_x, mask), _rms(detail_y, mask)]))
            coder.line.copy_(_fit_line(smooth_x, smooth_y, mask))
        scale_x, scale_y = single_channel(coder.spread[:-1], detail_x), coder.spread[-1]
        self.source = _padded(torch.cat([detail_x, others_x]) / scale_x, size)
        self.target = _padded(torch.cat([detail_y, others_y]) / scale_y, size)
        self.voxels = torch.cat(masks[:2]).flatten(1).sum(1).clamp(min=1).to(detail_x)
        self.other_voxels = masks[2].flatten(1).sum(1).clamp(min=1).to(detail_x)
        self.matches = align_unpaired(self.source[self.pairs :], self.target[self.pairs :])
        self.paired_voxels = float(self.voxels[: self.pairs].sum())
        with torch.no_grad():
            _start_filters(coder, self.source[: self.pairs], self.target[: self.pairs], seed)
        count = len(coder.analysis.weight)
        for name, images in (("source", self.source), ("target", self.target)):
            zeros = torch.zeros(len(images), count, *images.shape[2:], device=images.device)
            self.register_buffer(f"{name}_codes", zeros)
            self.register_buffer(f"{name}_duals", zeros.clone())

    @torch.no_grad()
    def round(self, coder: SparseCoder) -> float:
        """Lower J in the codes of both, in the filters of both, and in W, in this order.

        No turn raises J: what ADMM finds for a patch is taken only if it is better.

        Returns:
            J.
        """
        self._code_sources(coder)
        self._code_targets(coder)
        for layer, images, codes in (
            (coder.analysis, self.source, self.source_codes),
            (coder.synthesis, self.target, self.target_codes),
        ):
            layer.weight.copy_(update_filters(layer.weight, images, codes))
        mapping = self._fit_mapping(self.source_codes, self.target_codes)
        coder.mapping.weight.copy_(mapping.view_as(coder.mapping.weight))
        return self.objective(coder)

    @torch.no_grad()
    def objective(self, coder: SparseCoder) -> float:
        """J as it is now."""
        mapping = coder.mapping.weight.flatten(1)
        total = RIDGE * self.paired_voxels / 2 * mapping.square().sum()
        for layer, images, codes in (
            (coder.analysis, self.source, self.source_codes),
            (coder.synthesis, self.target, self.target_codes),
        ):
            total += squared_misfit(layer.weight, images, codes) + SPARSITY * codes.abs().sum()
        for u, v in zip(self.source_codes[: self.pairs], self.target_codes[: self.pairs]):
            total += self.coupling / 2 * (v - _mapped(mapping, u)).square().sum()
        means_u, means_v = self._means(self.source_codes, self.target_codes)
        gaps = means_u @ mapping.T - means_v[self.matches]
        total += self.discrepancy / 2 * (self.voxels[self.pairs :][: len(gaps)] * gaps.square().sum(1)).sum()
        return float(total)

    @torch.no_grad()
    def finished(self, coder: SparseCoder) -> SparseCoder:
        """Return a coder whose W and G fit pairs that are coded without their targets, as new sources are.

        This coder is not changed.

            What is left of a filter's norm above or below 1 goes into W.
        """
        done = deepcopy(coder)
        inner = tuple(slice(0, side) for side in self.examples.source.shape[2:])
        whole = (slice(None), slice(None), *inner)
        backwards = as_analysis(coder.synthesis.weight)
        codes_u = torch.cat([coder.encode(image[None]) for image in self.source[whole]])
        codes_v = torch.cat([encode(image[None], backwards, SPARSITY, STEPS_ALONE) for image in self.target[whole]])
        mapping = self._fit_mapping(codes_u, codes_v)
        done.mapping.weight.copy_(mapping.view_as(done.mapping.weight))
        size = coder.smallest
        mapped = torch.cat([_padded(done.mapping(u[None]), size) for u in codes_u[: self.pairs]])
        filters = fit_filters(coder.synthesis.weight, self.target[: self.pairs], mapped)
        norms = filter_norms(filters).clamp(min=1e-12)
        done.synthesis.weight.copy_(filters / norms)
        done.mapping.weight.mul_(norms.view(-1, *[1] * (coder.dims + 1)))
        return done

    def _means(self, codes_u: Tensor, codes_v: Tensor) -> tuple[Tensor, Tensor]:
        """Mean code in the mask of each unpaired patch, (M, K) and (L, K); none where there are not both kinds."""
        means_u = codes_u[self.pairs :].flatten(2).sum(2) / self.voxels[self.pairs :, None]
        means_v = codes_v[self.pairs :].flatten(2).sum(2) / self.other_voxels[:, None]
        return means_u[: len(self.matches)], means_v

    def _code_sources(self, coder: SparseCoder) -> None:
        mapping = coder.mapping.weight.flatten(1)
        means_v = self._means(self.source_codes, self.target_codes)[1]
        bend = self.coupling * mapping.T @ mapping
        alone, joined = (Solver.of(coder.analysis.weight, self.source.shape[2:], a) for a in (None, bend))
        for i, image in enumerate(self.source):
            energy = partial(self._source_energy, i, mapping, means_v)
            old = Code(self.source_codes[i], self.source_duals[i])
            if i < self.pairs:
                found = admm(image, joined, old, self.coupling * _mapped(mapping.T, self.target_codes[i]))
            else:
                found = admm(image, alone, old, slope_of(energy, old.codes))
            found = better(old, found, image, coder.analysis.weight, energy)
            self.source_codes[i], self.source_duals[i] = found

    def _code_targets(self, coder: SparseCoder) -> None:
        mapping = coder.mapping.weight.flatten(1)
        means_u = self._means(self.source_codes, self.target_codes)[0]
        bend = self.coupling * torch.eye(len(mapping), device=mapping.device)
        alone, joined = (Solver.of(coder.synthesis.weight, self.target.shape[2:], a) for a in (None, bend))
        for i, image in enumerate(self.target):
            energy = partial(self._target_energy, i, mapping, means_u)
            old = Code(self.target_codes[i], self.target_duals[i])
            if i < self.pairs:
                found = admm(image, joined, old, self.coupling * _mapped(mapping, self.source_codes[i]))
            else:
                found = admm(image, alone, old, slope_of(energy, old.codes))
            found = better(old, found, image, coder.synthesis.weight, energy)
            self.target_codes[i], self.target_duals[i] = found

    def _source_energy(self, i: int, mapping: Tensor, means_v: Tensor, u: Tensor) -> Tensor:
        """(2) or (3) of source patch i."""
        if i < self.pairs:
            return self.coupling / 2 * (self.target_codes[i] - _mapped(mapping, u)).square().sum()
        if not len(self.matches):
            return 0 * u.sum()
        n, wanted = self.voxels[i], means_v[self.matches[i - self.pairs]]
        return self.discrepancy / 2 * n * (mapping @ u.flatten(1).sum(1) / n - wanted).square().sum()

    def _target_energy(self, i: int, mapping: Tensor, means_u: Tensor, v: Tensor) -> Tensor:
        """(2) of target patch i, or (3) of all the sources that are matched with it."""
        if i < self.pairs:
            return self.coupling / 2 * (v - _mapped(mapping, self.source_codes[i])).square().sum()
        matched = self.matches == i - self.pairs
        mean = v.flatten(1).sum(1) / self.other_voxels[i - self.pairs]
        gaps = means_u[matched] @ mapping.T - mean
        shares = self.voxels[self.pairs :][: len(matched)][matched]
        return self.discrepancy / 2 * (shares * gaps.square().sum(1)).sum() + 0 * v.sum()

    def _fit_mapping(self, codes_u: Tensor, codes_v: Tensor) -> Tensor:
        """Lower (2) and (3) in W: ridge regression, shape (K, K)."""
        u, v = (codes[: self.pairs].transpose(0, 1).flatten(1) for codes in (codes_u, codes_v))
        within, across = self.coupling * (u @ u.T).double(), self.coupling * (v @ u.T).double()
        within += RIDGE * self.paired_voxels * torch.eye(len(within), device=u.device)
        means_u, means_v = (means.double() for means in self._means(codes_u, codes_v))
        weighted = means_u * (self.discrepancy * self.voxels[self.pairs :][: len(means_u), None])
        within += weighted.T @ means_u
        across += means_v[self.matches].T @ weighted
        fitted: Tensor = torch.linalg.solve(within, across.T).T.float()
        return fitted


def fit(
    coder: SparseCoder,
    examples: Examples,
    *,
    rounds: int = 30,
    seed: int = 0,
    tolerance: float = 1e-3,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> tuple[SparseCoder, list[float]]:
    """Learn a coder from patches; `chiasm train` does the same round by round, with checkpoints between.

    Args:
        coder: Changed in place while it is learnt.
        examples: Pairs, and unpaired patches if there are any.
        rounds: Most rounds; each one updates codes, filters and mapping.
        seed: Of the patches that filters start from; the same seed gives the same coder.
        tolerance: Stop when a round lowers J by a smaller share.
        seconds: Start no round after as many; then the result depends on the machine.
        progress: Called after each round with rounds done, all rounds, J.

    Returns:
        The coder to predict with, and J after each round.

    Raises:
        ValueError: As `JointCoding`, or if there is no round to do.
    """
    if rounds < 1:
        raise ValueError(f"rounds is at least 1, not {rounds}")
    began, history = time.monotonic(), list[float]()
    coding = JointCoding(coder, examples, seed=seed)
    for done in range(rounds):
        history.append(coding.round(coder))
        if progress is not None:
            progress(done + 1, rounds, history[-1])
        late = seconds is not None and time.monotonic() - began > seconds
        if late or settled(history[-2] if done else math.inf, history[-1], tolerance):
            break
    return coding.finished(coder), history


def settled(before: float, after: float, tolerance: float) -> bool:
    """Return whether a round lowered J by less than a share of it."""
    return math.isfinite(before) and before - after < tolerance * before


def align_unpaired(source: Tensor, target: Tensor) -> Tensor:
    """Find for each unpaired source patch the unpaired target patch that looks most like it.

    Contrasts differ, so what is compared is where detail lies: gradient magnitude
    and Laplacian of either, averaged over coarse cells, each cell against the
    mean of its kind, by cosine.

    Args:
        source: Detail, shape (M, C, *S).
        target: Detail, shape (L, 1, *S).

    Returns:
        Index of a target for each source, shape (M,); empty where there is no target.
    """
    if not len(source) or not len(target):
        return torch.zeros(0, dtype=torch.long, device=source.device)
    likeness = _descriptor(source) @ _descriptor(target).T
    return likeness.argmax(1)


def _start_filters(coder: SparseCoder, source: Tensor, target: Tensor, seed: int) -> None:
    """Start filters from patches of pairs where there is detail, at one place of both, W from the identity."""
    size, axes = coder.smallest, source.ndim - 2
    rng = torch.Generator().manual_seed(seed)
    energy = torch.cat([source, target], 1).square().sum(1, keepdim=True)
    pool = functional.avg_pool2d if axes == 2 else functional.avg_pool3d
    around = pool(energy, size, stride=1)  # of whole patches
    share = around.flatten().cpu().double().square() + 1e-12
    chosen = torch.multinomial(share, len(coder.analysis.weight), replacement=True, generator=rng)
    for k, place in enumerate(torch.stack(torch.unravel_index(chosen, around.shape), 1).tolist()):
        box = (place[0], slice(None), *(slice(n, n + size) for n in place[2:]))
        coder.analysis.weight[k], coder.synthesis.weight[k] = source[box], target[box]
    coder.analysis.weight.copy_(unit_filters(coder.analysis.weight))
    coder.synthesis.weight.copy_(unit_filters(coder.synthesis.weight))
    coder.mapping.weight.copy_(torch.eye(len(chosen)).view_as(coder.mapping.weight))


def _fit_line(smooth_x: Tensor, smooth_y: Tensor, mask: Tensor) -> Tensor:
    """Fit the target's smooth part to the source's by least squares: offset, then slopes, shape (1 + C,)."""
    inside = mask[:, 0]
    x = smooth_x.movedim(1, -1)[inside].double()
    y = smooth_y[:, 0][inside].double()
    centred = x - x.mean(0)
    within = centred.T @ centred + 1e-9 * len(x) * torch.eye(x.shape[1], device=x.device)
    slopes = torch.linalg.solve(within, centred.T @ (y - y.mean()))
    return torch.cat([(y.mean() - x.mean(0) @ slopes)[None], slopes]).float()


def _descriptor(detail: Tensor) -> Tensor:
    axes = tuple(range(2, detail.ndim))
    gradients = torch.stack(torch.gradient(detail, dim=axes))
    magnitude = gradients.square().sum((0, 2)).sqrt()
    second = sum(torch.gradient(g, dim=axis)[0] for g, axis in zip(gradients, axes))
    assert isinstance(second, Tensor)
    cells = []
    for kind in (magnitude[:, None], second.abs().sum(1, keepdim=True)):
        pooled = (
            functional.adaptive_avg_pool2d(kind, COARSE)
            if len(axes) == 2
            else functional.adaptive_avg_pool3d(kind, COARSE)
        )
        centred = pooled.flatten(1)
        centred = centred - centred.mean(1, keepdim=True)
        cells.append(centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-12))
    return torch.cat(cells, 1)


def as_analysis(filters: Tensor) -> nn.Module:
    """Wrap filters (K, C, *size) as the convolution that `encode` takes."""
    layer = CONVOLUTION[filters.ndim - 2](filters.shape[1], len(filters), filters.shape[-1], bias=False)
    layer.padding = (filters.shape[-1] // 2,) * (filters.ndim - 2)
    layer.weight = nn.Parameter(filters.detach(), requires_grad=False)
    return layer


def _mapped(mapping: Tensor, codes: Tensor) -> Tensor:
    return (mapping @ codes.flatten(1)).view_as(codes)


def _padded(images: Tensor, size: int) -> Tensor:
    """Add a filter's reach of zeros, so that a periodic domain does not wrap one end onto the other."""
    return functional.pad(images, [0, size - 1] * (images.ndim - 2))


def _rms(detail: Tensor, mask: Tensor) -> Tensor:
    """RMS of each channel inside the mask, shape (C,)."""
    squares = detail.square().transpose(0, 1).flatten(1).sum(1) / mask.sum().clamp(min=1)
    return squares.sqrt().clamp(min=1e-6)


def _check_examples(examples: Examples, coder: SparseCoder) -> None:
    if not len(examples.source) or not (examples.source != 0).any():
        raise ValueError("joint sparse coding needs at least one pair that is not empty")
    channels, sides = examples.source.shape[1], examples.source.shape[2:]
    for name, count in {"target": 1, "other_source": channels, "other_target": 1}.items():
        _check_shape(name, getattr(examples, name), (count, *sides))
    if len(examples.target) != len(examples.source):
        raise ValueError(f"{len(examples.source)} sources and {len(examples.target)} targets are no pairs")
    if coder.analysis.weight.shape[1] != channels or min(sides) < coder.smallest:
        raise ValueError(f"patches of {channels} channels and sides {tuple(sides)} do not fit this coder")
    if not all(torch.isfinite(images).all() for images in examples):
        raise ValueError("a patch holds values that are not finite")


def _check_shape(name: str, images: Tensor, shape: tuple[int, ...]) -> None:
    if images.shape[1:] != shape:
        raise ValueError(f"{name} has shape {tuple(images.shape)}, not (N, {', '.join(map(str, shape))})")
