from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from chiasm.simulation.signals import (
    CHANNELS,
    MATERIALS,
    SITES,
    Site,
    acquire_ct,
    acquire_mr,
    hounsfield,
    occupied,
    signal,
)

PLAIN = Site("plain", 1, (600, 10), (5000, 95), (3000, 15), (9000, 2500, 120), 1000, 0.02, 0.0)


def pure(contrast: str, site: Site) -> dict[str, float]:
    """Signal of each material alone, without texture."""
    size = len(CHANNELS)
    voxels = occupied(
        np.eye(size, dtype=np.float32),
        np.zeros(size, np.float32),
        np.zeros(size, np.float32),
        list(MATERIALS.values()),
        [(0.1, 0.1)] * size,
    )
    return dict(zip(CHANNELS, signal(contrast, site, voxels, (size,)).tolist()))


def test_signals_equal_the_equations_worked_by_hand() -> None:
    # White matter at 3 T: T1 850, T2 75, PD 0.70.
    assert pure("t1", PLAIN)["wm"] == pytest.approx(0.70 * (1 - np.exp(-600 / 850)) * np.exp(-10 / 75), rel=1e-5)
    assert pure("t2", PLAIN)["wm"] == pytest.approx(0.70 * 0.99721 * 0.28178, rel=1e-3)
    null = 1 - 2 * np.exp(-2500 / 4000) + np.exp(-9000 / 4000)
    assert pure("flair", PLAIN)["csf"] == pytest.approx(abs(null) * np.exp(-120 / 1800), rel=1e-4)
    enhanced = 1 / (1 / 1500 + 4.5 * 0.45 / 1000)
    assert pure("t1ce", PLAIN)["rim"] == pytest.approx(
        0.86 * (1 - np.exp(-600 / enhanced)) * np.exp(-10 / 115), rel=1e-5
    )
    assert pure("t1", PLAIN)["air"] == 0


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)
def test_tissues_are_ordered_as_radiologists_know_them_at_every_site(site: Site) -> None:
    def falls(contrast: str, *names: str) -> bool:
        values = [pure(contrast, site)[name] for name in names]
        return values == sorted(values, reverse=True)

    assert falls("t1", "wm", "dgm", "gm", "csf")
    assert falls("t2", "csf", "oedema", "gm", "wm")
    assert falls("flair", "oedema", "gm", "wm", "csf")
    assert falls("t1ce", "rim", "wm")
    assert falls("t1", "wm", "rim")
    assert pure("t1ce", site)["rim"] > 1.15 * pure("t1", site)["rim"]


def test_hounsfield_units_rise_from_air_to_bone_and_mix_by_share() -> None:
    order = ["air", "skin_fat", "csf", "wm", "gm", "bone_cort"]
    shares = np.zeros((7, len(CHANNELS)), np.float32)
    for row, name in enumerate(order):
        shares[row, CHANNELS.index(name)] = 1
    shares[6, [CHANNELS.index("air"), CHANNELS.index("csf")]] = 0.5
    image = hounsfield(shares, np.zeros(7, np.float32), list(MATERIALS.values()))
    assert image[:6].tolist() == sorted(image[:6].tolist())
    assert image[6] == pytest.approx((-1000 + 8) / 2)


def test_texture_that_t1_shares_moves_t1_and_t2_apart_and_the_rest_moves_t2_alone() -> None:
    shares = np.zeros((2, len(CHANNELS)), np.float32)
    shares[:, CHANNELS.index("gm")] = 1

    def images(shared: float, alone: float, **options: bool) -> list[float]:
        field = np.float32([0, 1])
        voxels = occupied(
            shares, field * shared, field * alone, list(MATERIALS.values()), [(0.05, 0.05)] * len(CHANNELS)
        )
        return [float(np.diff(signal(name, PLAIN, voxels, (2,), **options))[0]) for name in ("t1", "t2")]

    darker, brighter = images(1, 0)
    assert darker < 0 < brighter
    t1, t2 = images(0, 1)
    assert abs(t1) < 0.1 * t2  # T1-weighted echoes are short, not absent
    assert images(0, 1, with_own=False)[1] == 0


def test_noise_in_air_is_rayleigh_and_intensities_are_whole_numbers() -> None:
    image = np.zeros((40, 40, 40), np.float32)
    image[20:] = 0.5
    raw = acquire_mr(image, np.zeros_like(image), PLAIN, np.random.default_rng(0), 2.0, gamma=1.0, thick_mm=0)
    assert raw.dtype == np.float32
    assert (raw == np.rint(raw)).all()
    assert raw.min() >= 0
    air = raw[:20].ravel()
    # Of a Rayleigh distribution the mean is 1.913 standard deviations.
    assert air.mean() / air.std() == pytest.approx(1.913, rel=0.02)
    sigma = air.std() / np.sqrt(2 - np.pi / 2)
    assert raw[20:].std() == pytest.approx(sigma, rel=0.05)
    assert (
        stats.kstest(air[::7] + np.random.default_rng(1).uniform(-0.5, 0.5, len(air[::7])), "rayleigh", (0, sigma))[0]
        < 0.03
    )


def test_thick_slices_blur_along_the_third_axis_alone() -> None:
    image = np.full((21, 21, 21), 0.1, np.float32)
    image[10, 10, 10] = 5.0
    quiet = Site("quiet", 1, (600, 10), (5000, 95), (3000, 15), (9000, 2500, 120), 1000, 0.0, 0.0)
    raw = acquire_mr(image, np.zeros_like(image), quiet, np.random.default_rng(0), 1.0, gamma=1.0, thick_mm=5)
    assert raw[10, 10, 12] > 2 * raw[0, 0, 0]
    assert raw[12, 10, 10] == raw[10, 12, 10] == raw[0, 0, 0]


def test_ct_stays_within_its_scale_and_keeps_the_mean_of_water() -> None:
    image = np.zeros((30, 30, 30), np.float32)
    image[:5] = -1000
    image[25:] = 4000
    raw = acquire_ct(image, np.zeros_like(image), np.random.default_rng(0), 2.0)
    assert raw.min() >= -1024
    assert raw.max() == 3071
    assert abs(raw[8:22].mean()) < 0.5
    assert 3 < raw[8:22].std() < 7
