"""placeholder"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import gaussian_filter

Array = NDArray[Any]
Progress = Callable[[int, int, str], None]


class _State(NamedTuple):
    sparse: Array
    dual: Array


def spectrum(filters, shape):
    size = filters.shape[1:]
    placed = np.zeros((len(filters), *shape), filters.dtype)
    placed[(slice(None), *(slice(0, n) for n in size))] = filters
    placed = np.roll(placed, [-(n // 2) for n in size], tuple(range(1, placed.ndim)))
    return fft.rfftn(placed, axes=tuple(range(1, placed.ndim)))


def code(image, filters_hat, sparsity, steps, rho, coupling=None, pull=None, start=None, tolerance=0.0):
    axes = tuple(range(1, image.ndim + 1))
    K = len(filters_hat)
    shape = image.shape
    if start is None:
        start = _State(np.zeros((K, *shape), image.dtype), np.zeros((K, *shape), image.dtype))
    z, u = start
    Q = np.zeros((K, K), image.dtype) if coupling is None else coupling
    P = np.linalg.inv(Q.astype(float) + rho * np.eye(K)).astype(image.dtype)
    d = filters_hat.reshape(K, -1)
    g = P @ d.conj()  # K, F
    denom = 1 + (d * g).sum(0).real
    img = fft.rfftn(image).reshape(-1)
    const = d.conj() * img
    if pull is not None:
        const = const + fft.rfftn(pull, axes=axes).reshape(K, -1)
    n = np.prod(image.shape)
    for k in range(steps):
        r = const + rho * fft.rfftn(z - u, axes=axes).reshape(K, -1)
        pr = P @ r
        smooth_hat = pr - g * ((d * pr).sum(0) / denom)
        smooth = fft.irfftn(smooth_hat.reshape(filters_hat.shape), shape, axes=axes)
        relaxed = 1.8 * smooth - 0.8 * z
        old = z
        t = relaxed + u
        z = np.sign(t) * np.maximum(np.abs(t) - sparsity / rho, 0)
        u = t - z
        if tolerance:
            primal = np.linalg.norm(smooth - z) / max(np.linalg.norm(z), np.linalg.norm(smooth), 1e-12)
            dual = np.linalg.norm(z - old) / max(np.linalg.norm(u), 1e-12)
            if max(primal, dual) < tolerance:
                break
    return _State(z, u), k + 1
