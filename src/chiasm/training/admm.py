"""The convex problems of convolutional sparse coding: codes by ADMM in the Fourier domain, filters by projection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from chiasm.networks.sparse_coding import SPARSITY, filter_norms, soft_threshold

STIFFNESS = 10.0  # ADMM's penalty over the sparsity
RELAXATION = 1.8
STEPS_LEARNING = 5  # of ADMM in each round; the next goes on where they end
STEPS_FILTERS = 10
STEPS_FREE = 30  # of conjugate gradients for G, when all is learnt
TIE = 10.0  # what then holds G to what it was, over the mean energy of a code


def update_filters(filters: Tensor, images: Tensor, codes: Tensor) -> Tensor:
    """Lower ``sum |x - F * u|^2`` in F, of norm at most 1 each, by projected gradients.

    The gradient is taken in the Fourier domain and cut to the filters' support;
    the step comes from the power method and is halved whenever the sum rises.

    Args:
        filters: Where to start, shape (K, C, *size).
        images: Periodic, shape (N, C, *D).
        codes: Shape (N, K, *D).
    """
    normal, towards = _filter_equations(filters.shape[2:], images, codes)
    direction, largest = filters + 1e-3, 0.0
    for _ in range(10):
        direction = normal(direction / direction.norm())
        largest = float(direction.norm())
        if not largest:
            return filters  # no code anywhere
    step, least = 1 / largest, squared_misfit(filters, images, codes)
    for _ in range(STEPS_FILTERS):
        moved = _in_ball(filters + step * (towards - normal(filters)))
        misfit = squared_misfit(moved, images, codes)
        if misfit <= least:
            filters, least = moved, misfit
        else:
            step /= 2
    return filters


def fit_filters(filters: Tensor, images: Tensor, codes: Tensor) -> Tensor:
    """Lower ``sum |x - F * u|^2 + tie |F - F0|^2`` in F, of any norm, by conjugate gradients.

    Args:
        filters: F0 but for one factor, the best for all of them, shape (K, C, *size).
        images: Periodic, shape (N, C, *D).
        codes: Shape (N, K, *D); the tie is their mean energy.
    """
    normal, towards = _filter_equations(filters.shape[2:], images, codes)
    filters = filters * ((filters * towards).sum() / (filters * normal(filters)).sum().clamp(min=1e-12))
    tie = TIE * codes.square().sum() / len(filters)
    left = towards - normal(filters)
    direction, power = left, left.square().sum()
    for _ in range(STEPS_FREE):
        if not float(power):
            break  # solved, or no code anywhere
        bent = normal(direction) + tie * direction
        share = power / (direction * bent).sum()
        filters, left = filters + share * direction, left - share * bent
        before, power = power, left.square().sum()
        direction = left + power / before * direction
    return filters


def _filter_equations(size: Sequence[int], images: Tensor, codes: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return the matrix, as a function, and the right-hand side of the normal equations for filters."""
    shape, axes = images.shape[2:], tuple(range(2, images.ndim))
    maps = torch.fft.rfftn(codes, dim=axes)

    def back(spectra: Tensor) -> Tensor:
        correlated = torch.einsum("nk...,nc...->kc...", maps.conj(), spectra)
        spread: Tensor = torch.fft.irfftn(correlated, s=shape, dim=axes)
        rolled = spread.roll([side // 2 for side in size], axes)
        return rolled[(slice(None), slice(None), *(slice(side) for side in size))]

    def normal(filters: Tensor) -> Tensor:
        return back(torch.einsum("nk...,kc...->nc...", maps, spectra_of(filters, shape)))

    return normal, back(torch.fft.rfftn(images, dim=axes))


def spectra_of(filters: Tensor, shape: Sequence[int]) -> Tensor:
    """Transform filters, centred on the domain's origin: (K, C, *size) to (K, C, *frequencies)."""
    axes = tuple(range(2, filters.ndim))
    missing = [full - side for full, side in zip(shape, filters.shape[2:])]
    wide = functional.pad(filters, [end for more in reversed(missing) for end in (0, more)])
    centred = wide.roll([-(side // 2) for side in filters.shape[2:]], axes)
    spectra: Tensor = torch.fft.rfftn(centred, dim=axes)
    return spectra


class Code(NamedTuple):
    """Codes of one patch and ADMM's scaled multipliers, (K, *D) each."""

    codes: Tensor
    duals: Tensor


class Solver(NamedTuple):
    """Solves ``(D^H D + A) z = r`` at each frequency, D of shape (C, K), A one real matrix for all.

    By Woodbury's formula one inverse of A and one C x C inverse a frequency do;
    for one channel it is Sherman and Morrison's.
    """

    row: Tensor  # D, shape (K, C, frequencies)
    column: Tensor  # A^-1 D^H
    middle: Tensor  # (1 + D A^-1 D^H)^-1, shape (frequencies, C, C)
    inverse: Tensor  # A^-1, shape (K, K)
    stiffness: float

    @classmethod
    def of(cls, filters: Tensor, shape: Sequence[int], bend: Tensor | None, sparsity: float = SPARSITY) -> Solver:
        """Prepare the solver for filters of shape (K, C, *size) on images of `shape`."""
        row = spectra_of(filters, shape).flatten(2)
        count, channels = row.shape[:2]
        stiffness = STIFFNESS * sparsity
        matrix = stiffness * torch.eye(count, dtype=torch.float64, device=row.device)
        if bend is not None:
            matrix = matrix + bend
        inverse = torch.linalg.inv(matrix).to(row.dtype)
        column = (inverse @ row.conj().flatten(1)).view_as(row)
        inner = torch.einsum("kcf,kdf->fcd", row, column) + torch.eye(channels, device=row.device)
        return cls(row, column, torch.linalg.inv(inner), inverse, stiffness)

    def solve(self, right: Tensor) -> Tensor:
        """Solve for one right-hand side of shape (K, frequencies)."""
        first = self.inverse @ right
        through = torch.einsum("kcf,kf->cf", self.row, first)
        back = torch.einsum("fcd,df->cf", self.middle, through)
        return first - torch.einsum("kcf,cf->kf", self.column, back)


def admm(
    image: Tensor,
    solver: Solver,
    start: Code,
    pull: Tensor,
    *,
    sparsity: float = SPARSITY,
    steps: int = STEPS_LEARNING,
) -> Code:
    """Lower ``|x - F * u|^2 / 2 + s |u|_1 + u' bend u / 2 - pull' u``, periodic, from where an earlier call ended.

    Reference:
        Wohlberg, "Efficient Convolutional Sparse Coding", ICASSP 2014.
    """
    shape, axes = image.shape[1:], tuple(range(1, image.ndim))
    codes, duals = start
    steady = torch.einsum("kcf,cf->kf", solver.row.conj(), torch.fft.rfftn(image, dim=axes).flatten(1))
    steady = steady + torch.fft.rfftn(pull, dim=axes).flatten(1)
    threshold = image.new_tensor(sparsity / solver.stiffness)
    for _ in range(steps):
        right = steady + solver.stiffness * torch.fft.rfftn(codes - duals, dim=axes).flatten(1)
        spectra = solver.solve(right).view(len(codes), *shape[:-1], shape[-1] // 2 + 1)
        smooth = torch.fft.irfftn(spectra, s=shape, dim=axes)
        reached = RELAXATION * smooth + (1 - RELAXATION) * codes + duals
        codes = soft_threshold(reached, threshold)
        duals = reached - codes
    return Code(codes, duals)


def slope_of(energy: Callable[[Tensor], Tensor], codes: Tensor) -> Tensor:
    """Return the downward slope of a patch's energy where its codes are."""
    with torch.enable_grad():
        here = codes.detach().requires_grad_()
        (upward,) = torch.autograd.grad(energy(here), here)
    return -upward


def better(old: Code, found: Code, image: Tensor, filters: Tensor, energy: Callable[[Tensor], Tensor]) -> Code:
    """Use ADMM's codes if they lower a patch's part of J; use its multipliers in any case."""

    def value(codes: Tensor) -> float:
        return float(squared_misfit(filters, image[None], codes[None]) + SPARSITY * codes.abs().sum() + energy(codes))

    return found if value(found.codes) < value(old.codes) else Code(old.codes, found.duals)


def squared_misfit(filters: Tensor, images: Tensor, codes: Tensor) -> Tensor:
    """``sum |x - F * u|^2 / 2``, periodic."""
    axes = tuple(range(2, images.ndim))
    maps, spectra = torch.fft.rfftn(codes, dim=axes), spectra_of(filters, images.shape[2:])
    made: Tensor = torch.fft.irfftn(torch.einsum("nk...,kc...->nc...", maps, spectra), s=images.shape[2:], dim=axes)
    return (images - made).square().sum() / 2


def _in_ball(filters: Tensor) -> Tensor:
    return filters / filter_norms(filters).clamp(min=1)
