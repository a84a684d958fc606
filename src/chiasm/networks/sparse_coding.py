"""Joint convolutional sparse coding: a few registered pairs, and unpaired images beside them.

Huang, Shao and Frangi, "Simultaneous Super-Resolution and Cross-Modality Synthesis
of 3D Medical Images using Weakly-Supervised Joint Convolutional Sparse Coding"
(WEENIE), CVPR 2017, 5787-5796, doi:10.1109/CVPR.2017.613, arXiv:1705.02596.

With x and y the images of source and target, F and G their dictionaries of
filters, u and v their codes, one map a filter, and W a mapping between codes:

    J = sum |x - F * u|^2 / 2 + sum |y - G * v|^2 / 2 + s (|u|_1 + |v|_1)       (1)
      + b / 2 sum over pairs |v - W u|^2 + c / 2 |W|^2                          (2)
      + m / 2 sum over unpaired n |W mean(u) - mean(v')|^2                      (3)
    with |F_k| <= 1 and |G_k| <= 1

(1) convolutional sparse coding, (2) the pairs' coupling, (3) the discrepancy of
means (MMD with a linear kernel) between an unpaired source, of n voxels, and the
unpaired target v' that looks most like it.  J falls in turns: codes by ADMM in the
Fourier domain (Bristow, Eriksson and Lucey 2013; Wohlberg 2014), filters by
projected gradients, W by ridge regression.  A new source is coded with F alone,
its codes go through W, and G makes the image.

The numbers (1) to (3) are ours: the paper's text was not at hand.  Its terms, their
order, ADMM and ridge regression are known from its abstract and a published
summary, the 800 filters from memory.  Departures, ours unless said otherwise:
    - 2D slices of 7 x 7 filters: a round on volumes would cost their third side more.
      A 3D form of 5 x 5 x 5 is there (`dims=3`).  The method's own row has 32
      filters, not 800;
    - a Gaussian mean, taken inside the mask, is off both images before coding; the
      target's is predicted from the source's by a straight line;
    - the paper learns how to match unpaired images from the pairs' high frequencies
      and adds what matches to the pairs.  Here patches are matched by how much
      gradient and Laplacian they hold where (`align_unpaired`), and only the means
      of matched patches are compared: voxels of different people do not correspond;
    - a linear kernel sees only codes whose mean is not zero;
    - W mixes all codes of one voxel (our reading);
    - when all is learnt, pairs are coded alone, as new sources will be, and W, then G,
      are fitted once more to that: codes that have seen their target are not what
      prediction has, and sparsity shrinks them;
    - a new source is coded by accelerated soft thresholding with convolutions (FISTA),
      not by ADMM: it is local, and differentiable, so that the same module can also be
      trained by Adam, as Gregor and LeCun (ICML 2010) unrolled it;
    - super-resolution by interpolating first: source and target lie on one grid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from chiasm.networks.generator import CONVOLUTION, Dims, check_sizes
from chiasm.networks.layers import TRANSPOSED, check_numbers

FILTERS = 800  # of each modality at scale 1
SIZES: dict[int, int] = {2: 7, 3: 5}  # voxels of a filter along each axis, by number of axes
SMOOTH_VOXELS = 6.0  # SD of the Gaussian mean, which reaches three of them
SPARSITY = 0.3  # s, for images whose detail has an RMS of 1
COUPLING = 1.0  # b
DISCREPANCY = 1.0  # m
RIDGE = 1e-3  # c, for each voxel of the pairs
STIFFNESS = 10.0  # ADMM's penalty over the sparsity
RELAXATION = 1.8
STEPS_LEARNING = 5  # of ADMM in each round; the next goes on where they end
STEPS_ALONE = 30  # of FISTA for a new source
STEPS_FILTERS = 10
STEPS_FREE = 30  # of conjugate gradients for G, when all is learnt
TIE = 10.0  # what then holds G to what it was, over the mean energy of a code
COARSE = 4  # cells along each axis of a descriptor for matching

Progress = Callable[[int, int, float], None]


class SparseCoder(nn.Module):
    """Code the source's detail sparsely, map the codes, and make the target's detail of them.

    Args:
        in_channels: Source channels; a filter has as many.
        dims: Spatial axes.
        scale: Share of the published number of filters.

    Attributes:
        size_multiple: 1, any size.
        smallest: Voxels of a filter.
        margin: 0.
        receptive_field: Voxels seen on each side of an output voxel, through all steps.
        analysis: Holds F: its weights, shape (K, C, *size).
        mapping: Holds W, shape (K, K, 1...).
        synthesis: Holds G, shape (K, 1, *size).
        line: Offset, then slope of each source channel, from smooth parts to the target's, shape (1 + C,).
        spread: RMS of the detail of each source channel and of the target, shape (C + 1,).

    Raises:
        ValueError: If a number is out of range.
    """

    line: Tensor
    spread: Tensor
    gaussian: Tensor

    def __init__(self, *, in_channels: int, dims: Dims = 2, scale: float = 1.0) -> None:
        super().__init__()
        check_numbers(in_channels, dims, scale)
        size, count = SIZES[dims], max(1, round(FILTERS * scale))
        radius = math.ceil(3 * SMOOTH_VOXELS)
        self.dims, self.size_multiple, self.smallest, self.margin = dims, 1, size, 0
        self.receptive_field = radius + (2 * STEPS_ALONE) * (size // 2)
        self.analysis = CONVOLUTION[dims](in_channels, count, size, padding=size // 2, bias=False)
        self.mapping = CONVOLUTION[dims](count, count, 1, bias=False)
        self.synthesis = TRANSPOSED[dims](count, 1, size, padding=size // 2, bias=False)
        self.line = nn.Parameter(torch.cat([torch.zeros(1), torch.ones(in_channels) / in_channels]))
        self.register_buffer("spread", torch.ones(in_channels + 1))
        offsets = torch.arange(-radius, radius + 1) / SMOOTH_VOXELS
        self.register_buffer("gaussian", torch.exp(-offsets.square() / 2), persistent=False)
        with torch.no_grad():
            for layer in (self.analysis, self.synthesis):
                layer.weight.copy_(_unit(torch.randn_like(layer.weight)))
            self.mapping.weight.copy_(torch.eye(count).view_as(self.mapping.weight))

    def forward(self, source: Tensor) -> Tensor:
        """Map the source (N, in_channels, *S), zero outside the mask, to (N, 1, *S), normalised units.

        Raises:
            ValueError: If a size is below `smallest`.
        """
        check_sizes(source.shape[2:], self.dims, self.size_multiple)
        if min(source.shape[2:]) < self.smallest:
            raise ValueError(f"spatial sizes must be at least {self.smallest}, not {tuple(source.shape[2:])}")
        place = "cpu" if source.is_meta else source.device.type
        with torch.autocast(place, enabled=False):  # a search for codes needs all digits
            return self._map(source.float()).to(source.dtype)

    def _map(self, source: Tensor) -> Tensor:
        mask = (source != 0).any(1, keepdim=True)
        smooth, detail = split(source, mask, self.gaussian)
        codes = self.encode(detail / _channels(self.spread[:-1], detail))
        made = self.spread[-1] * self.synthesis(self.mapping(codes))
        trend = self.line[0] + (_channels(self.line[1:], smooth) * smooth).sum(1, keepdim=True)
        prediction: Tensor = (trend + made) * mask
        return prediction

    def encode(self, detail: Tensor, steps: int = STEPS_ALONE) -> Tensor:
        """Code detail (N, C, *S) of RMS 1 with F: shape (N, K, *S)."""
        return encode(detail, self.analysis, SPARSITY, steps)


def encode(detail: Tensor, analysis: nn.Module, sparsity: float, steps: int) -> Tensor:
    """Lower ``|x - F * u|^2 / 2 + s |u|_1`` in u, zeros beyond the image, by FISTA.

    Args:
        detail: x, shape (N, C, *S).
        analysis: A convolution whose weights are F; it correlates with them.
        sparsity: s.
        steps: Each lets a code see a filter farther.

    Returns:
        u, exact zeros where a filter is absent, shape (N, K, *S).

    Reference:
        Beck and Teboulle, SIAM Journal on Imaging Sciences 2(1), 2009, equations 4.1 to 4.3.
    """
    filters = analysis.weight
    assert isinstance(filters, Tensor)
    step = 1 / largest_curvature(filters)
    codes = ahead = _shrunk(step * analysis(detail), step * sparsity)
    weight = 1.0
    for _ in range(steps - 1):
        moved = _shrunk(ahead + step * analysis(detail - decode(ahead, filters)), step * sparsity)
        heavier = (1 + (1 + 4 * weight**2) ** 0.5) / 2
        ahead, codes, weight = moved + (weight - 1) / heavier * (moved - codes), moved, heavier
    return codes


def decode(codes: Tensor, filters: Tensor) -> Tensor:
    """Convolve each code with its filter and add them up: (N, K, *S) and (K, C, *size) to (N, C, *S)."""
    transposed = functional.conv_transpose2d if filters.ndim == 4 else functional.conv_transpose3d
    made: Tensor = transposed(codes, filters, padding=filters.shape[-1] // 2)
    return made


@torch.no_grad()
def largest_curvature(filters: Tensor) -> Tensor:
    """Bound the largest eigenvalue of F'F from above, whatever the image's size.

    It is at most the largest value of ``sum_k |F_k|^2`` over all frequencies, a
    trigonometric polynomial of degree n = size - 1; between N samples along an
    axis it exceeds the largest of them by 1 / cos(pi n / N) at most.

    Reference:
        Ehlich and Zeller, Mathematische Zeitschrift 86, 1964.
    """
    size, axes = filters.shape[-1], tuple(range(2, filters.ndim))
    samples = 6 * size
    power = torch.fft.rfftn(filters.float(), s=(samples,) * len(axes), dim=axes).abs().square().sum((0, 1))
    bound: Tensor = (power.max() / math.cos(math.pi * (size - 1) / samples) ** len(axes)).clamp(min=1e-12)
    return bound


def split(image: Tensor, mask: Tensor, gaussian: Tensor) -> tuple[Tensor, Tensor]:
    """Split an image into its Gaussian mean, taken inside the mask only, and the rest; both are zero outside.

    Args:
        image: Shape (N, C, *S).
        mask: Shape (N, 1, *S).
        gaussian: Samples, of odd number, of any scale.
    """
    inside = mask.to(image.dtype)
    cover = _blurred(inside, gaussian).clamp(min=1e-6)
    smooth = _blurred(image * inside, gaussian) / cover * inside
    return smooth, image * inside - smooth


class Examples(NamedTuple):
    """What is learnt from: patches of one size, normalised, zero outside the mask.

    Attributes:
        source: Of pairs, shape (P, C, *S).
        target: Of the same pairs, shape (P, 1, *S).
        other_source: Of anybody, shape (M, C, *S), M from 0 up.
        other_target: Of anybody else, shape (L, 1, *S), L from 0 up.
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
        scale_x, scale_y = _channels(coder.spread[:-1], detail_x), coder.spread[-1]
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
            total += _misfit(layer.weight, images, codes) + SPARSITY * codes.abs().sum()
        for u, v in zip(self.source_codes[: self.pairs], self.target_codes[: self.pairs]):
            total += self.coupling / 2 * (v - _mapped(mapping, u)).square().sum()
        means_u, means_v = self._means(self.source_codes, self.target_codes)
        gaps = means_u @ mapping.T - means_v[self.matches]
        total += self.discrepancy / 2 * (self.voxels[self.pairs :][: len(gaps)] * gaps.square().sum(1)).sum()
        return float(total)

    @torch.no_grad()
    def finished(self, coder: SparseCoder) -> SparseCoder:
        """Return a coder whose W and G fit pairs that are coded alone, as new sources will be; this one stays as it is.

        What is left of a filter's norm above or below 1 goes into W.
        """
        done = deepcopy(coder)
        inner = tuple(slice(0, side) for side in self.examples.source.shape[2:])
        whole = (slice(None), slice(None), *inner)
        backwards = _as_analysis(coder.synthesis.weight)
        codes_u = torch.cat([coder.encode(image[None]) for image in self.source[whole]])
        codes_v = torch.cat([encode(image[None], backwards, SPARSITY, STEPS_ALONE) for image in self.target[whole]])
        mapping = self._fit_mapping(codes_u, codes_v)
        done.mapping.weight.copy_(mapping.view_as(done.mapping.weight))
        size = coder.smallest
        mapped = torch.cat([_padded(done.mapping(u[None]), size) for u in codes_u[: self.pairs]])
        filters = fit_filters(coder.synthesis.weight, self.target[: self.pairs], mapped)
        norms = _norms(filters).clamp(min=1e-12)
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
        alone, joined = (_Solver.of(coder.analysis.weight, self.source.shape[2:], a) for a in (None, bend))
        for i, image in enumerate(self.source):
            energy = partial(self._source_energy, i, mapping, means_v)
            old = _Code(self.source_codes[i], self.source_duals[i])
            if i < self.pairs:
                found = _admm(image, joined, old, self.coupling * _mapped(mapping.T, self.target_codes[i]))
            else:
                found = _admm(image, alone, old, _slope(energy, old.codes))
            found = _better(old, found, image, coder.analysis.weight, energy)
            self.source_codes[i], self.source_duals[i] = found

    def _code_targets(self, coder: SparseCoder) -> None:
        mapping = coder.mapping.weight.flatten(1)
        means_u = self._means(self.source_codes, self.target_codes)[0]
        bend = self.coupling * torch.eye(len(mapping), device=mapping.device)
        alone, joined = (_Solver.of(coder.synthesis.weight, self.target.shape[2:], a) for a in (None, bend))
        for i, image in enumerate(self.target):
            energy = partial(self._target_energy, i, mapping, means_u)
            old = _Code(self.target_codes[i], self.target_duals[i])
            if i < self.pairs:
                found = _admm(image, joined, old, self.coupling * _mapped(mapping, self.source_codes[i]))
            else:
                found = _admm(image, alone, old, _slope(energy, old.codes))
            found = _better(old, found, image, coder.synthesis.weight, energy)
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
    coupling: float = COUPLING,
    discrepancy: float = DISCREPANCY,
    tolerance: float = 1e-3,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> tuple[SparseCoder, list[float]]:
    """Learn a coder from patches; `chiasm train` does the same round by round, with checkpoints between.

    Args:
        coder: Changed in place while it is learnt.
        examples: Pairs, and unpaired patches if there are any.
        rounds: At most; codes, filters and mapping each have a turn in one.
        seed: Of the patches that filters start from; the same seed gives the same coder.
        coupling: b of (2).
        discrepancy: m of (3).
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
    coding = JointCoding(coder, examples, seed=seed, coupling=coupling, discrepancy=discrepancy)
    for done in range(rounds):
        history.append(coding.round(coder))
        if progress is not None:
            progress(done + 1, rounds, history[-1])
        late = seconds is not None and time.monotonic() - began > seconds
        if late or settled(history[-2] if done else math.inf, history[-1], tolerance):
            break
    return coding.finished(coder), history


def settled(before: float, after: float, tolerance: float) -> bool:
    """Tell whether a round lowered J by less than a share of it."""
    return math.isfinite(before) and before - after < tolerance * before


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
    step, least = 1 / largest, _misfit(filters, images, codes)
    for _ in range(STEPS_FILTERS):
        moved = _in_ball(filters + step * (towards - normal(filters)))
        misfit = _misfit(moved, images, codes)
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


def spectra_of(filters: Tensor, shape: Sequence[int]) -> Tensor:
    """Transform filters, centred on the domain's origin: (K, C, *size) to (K, C, *frequencies)."""
    axes = tuple(range(2, filters.ndim))
    missing = [full - side for full, side in zip(shape, filters.shape[2:])]
    wide = functional.pad(filters, [end for more in reversed(missing) for end in (0, more)])
    centred = wide.roll([-(side // 2) for side in filters.shape[2:]], axes)
    spectra: Tensor = torch.fft.rfftn(centred, dim=axes)
    return spectra


class _Code(NamedTuple):
    """Codes of one patch and ADMM's scaled multipliers, (K, *D) each."""

    codes: Tensor
    duals: Tensor


class _Solver(NamedTuple):
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
    def of(cls, filters: Tensor, shape: Sequence[int], bend: Tensor | None, sparsity: float = SPARSITY) -> _Solver:
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


def _admm(
    image: Tensor,
    solver: _Solver,
    start: _Code,
    pull: Tensor,
    *,
    sparsity: float = SPARSITY,
    steps: int = STEPS_LEARNING,
) -> _Code:
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
        codes = _shrunk(reached, threshold)
        duals = reached - codes
    return _Code(codes, duals)


def _slope(energy: Callable[[Tensor], Tensor], codes: Tensor) -> Tensor:
    """Return the downward slope of a patch's energy where its codes are."""
    with torch.enable_grad():
        here = codes.detach().requires_grad_()
        (upward,) = torch.autograd.grad(energy(here), here)
    return -upward


def _better(old: _Code, found: _Code, image: Tensor, filters: Tensor, energy: Callable[[Tensor], Tensor]) -> _Code:
    """Take the codes that ADMM found if they lower a patch's part of J; its multipliers in any case."""

    def value(codes: Tensor) -> float:
        return float(_misfit(filters, image[None], codes[None]) + SPARSITY * codes.abs().sum() + energy(codes))

    return found if value(found.codes) < value(old.codes) else _Code(old.codes, found.duals)


def _misfit(filters: Tensor, images: Tensor, codes: Tensor) -> Tensor:
    """``sum |x - F * u|^2 / 2``, periodic."""
    axes = tuple(range(2, images.ndim))
    maps, spectra = torch.fft.rfftn(codes, dim=axes), spectra_of(filters, images.shape[2:])
    made: Tensor = torch.fft.irfftn(torch.einsum("nk...,kc...->nc...", maps, spectra), s=images.shape[2:], dim=axes)
    return (images - made).square().sum() / 2


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
    coder.analysis.weight.copy_(_unit(coder.analysis.weight))
    coder.synthesis.weight.copy_(_unit(coder.synthesis.weight))
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
        told = pooled.flatten(1)
        told = told - told.mean(1, keepdim=True)
        cells.append(told / told.norm(dim=1, keepdim=True).clamp(min=1e-12))
    return torch.cat(cells, 1)


def _as_analysis(filters: Tensor) -> nn.Module:
    """Wrap filters (K, C, *size) as the convolution that `encode` takes."""
    layer = CONVOLUTION[filters.ndim - 2](filters.shape[1], len(filters), filters.shape[-1], bias=False)
    layer.padding = (filters.shape[-1] // 2,) * (filters.ndim - 2)
    layer.weight = nn.Parameter(filters.detach(), requires_grad=False)
    return layer


def _blurred(image: Tensor, gaussian: Tensor) -> Tensor:
    """Convolve along each axis, zeros beyond the image."""
    count, dims = image.shape[1], image.ndim - 2
    convolve = functional.conv2d if dims == 2 else functional.conv3d
    for axis in range(dims):
        shape = [1] * dims
        shape[axis] = len(gaussian)
        kernel = (gaussian / gaussian.sum()).view(1, 1, *shape).expand(count, 1, *shape)
        image = convolve(image, kernel, padding=[side // 2 for side in shape], groups=count)
    return image


def _mapped(mapping: Tensor, codes: Tensor) -> Tensor:
    return (mapping @ codes.flatten(1)).view_as(codes)


def _channels(numbers: Tensor, like: Tensor) -> Tensor:
    """Shape one number a channel so that it broadcasts over (N, C, *S)."""
    return numbers.view(1, -1, *[1] * (like.ndim - 2))


def _padded(images: Tensor, size: int) -> Tensor:
    """Add a filter's reach of zeros, so that a periodic domain does not wrap one end onto the other."""
    return functional.pad(images, [0, size - 1] * (images.ndim - 2))


def _rms(detail: Tensor, mask: Tensor) -> Tensor:
    """RMS of each channel inside the mask, shape (C,)."""
    squares = detail.square().transpose(0, 1).flatten(1).sum(1) / mask.sum().clamp(min=1)
    return squares.sqrt().clamp(min=1e-6)


def _norms(filters: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(filters.flatten(1), dim=1)
    return lengths.view(-1, *[1] * (filters.ndim - 1))


def _unit(filters: Tensor) -> Tensor:
    return filters / _norms(filters).clamp(min=1e-12)


def _in_ball(filters: Tensor) -> Tensor:
    return filters / _norms(filters).clamp(min=1)


def _shrunk(values: Tensor, by: Tensor) -> Tensor:
    return values - values.clamp(-by, by)


def _check_examples(examples: Examples, coder: SparseCoder) -> None:
    if not len(examples.source) or not (examples.source != 0).any():
        raise ValueError("joint sparse coding needs at least one pair that is not empty")
    channels, sides = examples.source.shape[1], examples.source.shape[2:]
    wanted = {"target": 1, "other_source": channels, "other_target": 1}
    for name, count in wanted.items():
        images: Tensor = getattr(examples, name)
        if images.shape[1:] != (count, *sides):
            raise ValueError(f"{name} has shape {tuple(images.shape)}, not (N, {count}, {', '.join(map(str, sides))})")
    if len(examples.target) != len(examples.source):
        raise ValueError(f"{len(examples.source)} sources and {len(examples.target)} targets are no pairs")
    if coder.analysis.weight.shape[1] != channels or min(sides) < coder.smallest:
        raise ValueError(f"patches of {channels} channels and sides {tuple(sides)} do not fit this coder")
    if not all(torch.isfinite(images).all() for images in examples):
        raise ValueError("a patch holds values that are not finite")
