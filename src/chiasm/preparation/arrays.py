"""From files to arrays that networks see: RAS order, plan spacing, cropped to the mask, normalised.

`prepare_source` is the only way to a network's input: prediction calls it, and
training cases pass through it too, so the two cannot drift.  It has no target
argument.  Training cases are kept as memory-mapped arrays under a name made of
what they depend on, so that they are reused and never stale.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chiasm.boxes import box_of
from chiasm.checksums import content_hash, has_valid_checksum, sha256_of, with_checksum
from chiasm.cohorts.cases import Case, Problem, Side, side_alone
from chiasm.cohorts.labels import read_label_map
from chiasm.errors import ChiasmError, RunError, VolumeError
from chiasm.on_demand import OnDemand
from chiasm.preparation.bias_field import without_shading
from chiasm.preparation.degradation import arranged
from chiasm.preparation.fingerprint import known_of, read_images, read_mask
from chiasm.preparation.intensity import IntensityMap, MapKind, fit_intensity
from chiasm.preparation.plan import Plan
from chiasm.preparation.side_by_side import in_threads
from chiasm.progress import Progress, counted
from chiasm.registration.cohort import hashes_of
from chiasm.storage import UNWRITABLE, read_json, whole_file, whole_folder, write_json
from chiasm.volumes import Geometry, Volume, check_pair, crop, grid_with_spacing, refuse_twice, resample
from chiasm.volumes.masks import Rule, find_mask

#: Raised by one whenever the same files and plan would give other arrays.
VERSION = 2

CARD = "grid.json"
MARGIN = 2  # voxels around the mask's box, so that resampling back has neighbours
SAME_SPACING = 0.01  # a grid this near to the plan's, relatively, is not resampled

MOST_OPEN = 64  # prepared cases whose files are mapped at once: systems allow some 1,000 open files

Say = Callable[[str], None]
Opener = Callable[[], "PreparedCase"]

RANK_SD = 12**-0.5  # of numbers spread evenly between 0 and 1

PLAN_FIELDS = (
    *("sources", "target", "spacing_mm", "dims", "mask_rule", "source_kinds", "target_kind", "window_hu"),
    *("histogram", "degradation", "bias_correction", "mask_files", "reading", "plane"),
)
#: Fields that came later, as plans of before have them: caches of before are still found.
BEFORE = {one.name: one.default for one in fields(Plan) if one.name in PLAN_FIELDS}


@dataclass(frozen=True, eq=False)
class PreparedSource:
    """The input of a network for one case.

    Attributes:
        array: Normalised sources and, where the plan's `histogram` says so,
            after them the rank of each (mean 0, SD 1); zero outside the mask,
            shape (C, I, J, K) or (2C, I, J, K).
        mask: Valid voxels, shape (I, J, K).
        grid: Where the array lies.
        maps: The intensity map of each source.
        mask_rule: How the mask was found.
        grid_mm: Spacing before resampling, mm, RAS order.
        body_mm: Size of the box around the mask, mm, RAS order.
    """

    array: NDArray[np.float32]
    mask: NDArray[np.bool_]
    grid: Geometry
    maps: tuple[IntensityMap, ...]
    mask_rule: Rule
    grid_mm: tuple[float, float, float]
    body_mm: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """One training or validation case, memory-mapped.

    Attributes:
        id: The case.
        subject: The person.
        site: Hospital or scanner, or None.
        source: As `PreparedSource.array`, shape (C, I, J, K) or (2C, I, J, K).
        target: Normalised target, zero outside the mask, shape (I, J, K).
        mask: Valid voxels, shape (I, J, K); for super-resolution those alone whose target is known.
        labels: Label map, of the smallest integer type that holds it, or None.
        grid: Where the arrays lie.
        histogram: Whether the second half of the source's channels are ranks of the first.
        context: Whether one more channel follows them: the target as an earlier stage predicted it.
        own: Which channel of the source is the target's own modality, on the target's scale; None for synthesis.
        alone: The side that is there ("source" or "target") if the other is not: its array is zero or repeats this one.
        sideways: The axis from one side of the body to the other.
    """

    id: str
    subject: str
    site: str | None
    source: NDArray[np.float32]
    target: NDArray[np.float32]
    mask: NDArray[np.bool_]
    labels: NDArray[np.integer[Any]] | None
    grid: Geometry
    histogram: bool = False
    context: bool = False
    own: int | None = None
    alone: Side | None = None
    sideways: int = 0

    @property
    def intensities(self) -> int:
        """Channels that hold the source's intensities: those before ranks and context."""
        channels: int = self.source.shape[0] - self.context
        return channels // 2 if self.histogram else channels


@dataclass(frozen=True, eq=False)
class _Resampling:
    """How a case gets to its prepared grid: the box around the mask, the mask in it as scanned, the grid there."""

    mask: NDArray[np.bool_]
    box: tuple[slice, slice, slice]
    grid: Geometry

    def whole_mask(self, shape: Sequence[int]) -> NDArray[np.bool_]:
        """Lay the mask out on the grid of the scan."""
        whole = np.zeros(shape, bool)
        whole[self.box] = self.mask
        return whole

    def move(self, volume: Volume, *, order: Literal[0, 1]) -> NDArray[Any]:
        """Crop a volume and resample it on the grid; without interpolation where it lies there already."""
        part = crop(volume, self.box)
        there = part.geometry.shape == self.grid.shape and np.array_equal(part.geometry.affine, self.grid.affine)
        moved: NDArray[Any] = part.array if there else resample(part, self.grid, order=order).array
        return moved


def prepare_source(volumes: Sequence[Volume], plan: Plan, mask: Volume | None = None) -> PreparedSource:
    """Prepare the sources of one case for a network.

    Each volume is normalised by a map fitted to its own voxels inside the mask.

    Args:
        volumes: One for each of the plan's sources, in its order, on one grid;
            for super-resolution interpolated to thin slices.
        plan: Says spacing, mask rule and kinds of intensity maps.
        mask: Valid voxels (above 0) on the same grid; found as the plan says where None or where it uses no files.

    Raises:
        VolumeError: If the number of volumes is wrong, grids differ, the mask
            is empty, an image is constant inside it, or one image stands for two sources.
    """
    if len(volumes) != len(plan.sources):
        raise VolumeError(
            "the number of source volumes is wrong",
            reason="sources",
            found=len(volumes),
            expected=f"one for each of {', '.join(plan.sources)}",
        )
    others = [
        check_pair(volumes[0], volume, a_name=plan.sources[0], b_name=name)
        for volume, name in zip(volumes[1:], plan.sources[1:])
    ]
    refuse_twice(dict(zip(plan.sources, (volumes[0], *others))))
    used = mask if plan.mask_files else None
    given = None if used is None else check_pair(volumes[0], used, b_name="mask", labels=True)
    in_ras = [arranged(volume, plan.degradation) for volume in (volumes[0], *others)]
    return _prepare(in_ras, plan, None if given is None else arranged(given, plan.degradation))[0]


def _silence(line: str) -> None:
    del line


def prepare_case(case: Case, plan: Plan, cache: Path, warn: Say = _silence) -> PreparedCase:
    """Prepare a case for training or validation, or take it from the cache.

    Args:
        case: Has the plan's sources and its target, or one of both alone.
        plan: Says how.
        cache: Folder of prepared cases; made if missing.
        warn: Called with a sentence where the cache holds damaged arrays, which are made anew.

    Raises:
        VolumeError: If a file cannot be read, grids differ, the mask is empty
            or an image is constant inside it.
        ChiasmError: If the cache cannot be written.
    """
    return _ready(case, plan, cache, warn)()


def _ready(case: Case, plan: Plan, cache: Path, warn: Say) -> Opener:
    """Put a case into the cache if it is not there, and return the function that opens it."""
    if side_alone(case, plan.sources, plan.target) == "target":
        return partial(_open_target, _ready(case, _swapped(plan), cache, warn))
    folder = cache / f"{case.id}-{cache_key(case, plan)}"
    opener = partial(_load, folder, case, plan)
    if folder.is_dir():
        try:
            opener()
            return opener
        except RunError as error:
            warn(f"case {case.id}: its prepared arrays are made anew: {error}")
            shutil.rmtree(folder, ignore_errors=True)  # another process may be doing the same
    _store(folder, case, plan)
    _load(folder, case, plan, just_written=True)
    return opener


def _open_target(opener: Opener) -> PreparedCase:
    """Open a target without a source, which is prepared as sources are."""
    only = opener()
    return replace(only, target=only.source[0], alone="target")


def prepare_cohort(
    cases: Sequence[Case], plan: Plan, cache: Path, progress: Progress | None = None, warn: Say = _silence
) -> tuple[OnDemand[PreparedCase], list[Problem]]:
    """Prepare cases, several side by side; a bad one is named and the others go on.

    Arrays are mapped from their files where a case is looked at, those of the latest `MOST_OPEN` cases at once.

    Args:
        cases: Training and validation cases.
        plan: Says how.
        cache: Folder of prepared cases.
        progress: Called with cases done, all cases, the next case's id.
        warn: As in `prepare_case`.

    Returns:
        The prepared cases in order, and a problem for each that is missing among them.

    Raises:
        ChiasmError: If the cache cannot be written.
    """
    prepared: dict[str, Opener] = {}
    problems: list[Problem] = []
    with closing(in_threads(cases, partial(_try_ready, plan=plan, cache=cache))) as found:
        for case in counted(cases, attrgetter("id"), progress):
            opener, warnings = next(found)
            for line in warnings:
                warn(line)
            if isinstance(opener, Problem):
                problems.append(opener)
            else:
                prepared[case.id] = opener
    return OnDemand(prepared, MOST_OPEN), problems


def _try_ready(case: Case, plan: Plan, cache: Path) -> tuple[Opener | Problem, list[str]]:
    """As `_ready`, or return what is wrong with the case; return the warnings too, which belong into its turn."""
    warnings: list[str] = []
    try:
        return _ready(case, plan, cache, warnings.append), warnings
    except ChiasmError as error:
        if error.reason == UNWRITABLE:
            raise
        path = error.path or next(iter(case.images.values()))
        return Problem(path, error.reason, f"case {case.id}: {error}", case.id), warnings


def write_context(case: PreparedCase, context: NDArray[np.float32], path: Path, plan: Plan) -> None:
    """Keep a case's source with an earlier stage's prediction behind it, laid out as the cache is, and a card.

    Args:
        case: Without a context.
        context: Prediction in normalised units, zero outside the mask, shape (I, J, K).
        path: The file that is written.
        plan: The case's.

    Raises:
        ChiasmError: If the file cannot be written.
    """
    source = np.concatenate([case.source, context[None]])
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.ascontiguousarray(_slices_first(source, plan)))
    write_json(path.with_suffix(".json"), with_checksum({"arrays": {path.name: sha256_of(path)}}))


def read_context(case: PreparedCase, path: Path, plan: Plan) -> PreparedCase | None:
    """Return a case with the source that `write_context` kept, memory-mapped; None where it is missing or damaged."""
    try:
        source = _arrays(path.with_suffix(".json"), plan)[0][path.stem]
    except (RunError, KeyError):
        return None
    channels, *size = case.source.shape
    return replace(case, source=source, context=True) if source.shape == (channels + 1, *size) else None


def _prepare(volumes: Sequence[Volume], plan: Plan, given: Volume | None) -> tuple[PreparedSource, _Resampling]:
    """Do the work of `prepare_source` on volumes that are known to lie on one grid, in RAS order."""
    mask, rule = _mask_of(volumes[0], plan, given)
    place, inside = _place(mask, volumes[0], plan)
    volumes = [without_shading(volume, mask, name, plan.bias_correction) for volume, name in zip(volumes, plan.sources)]
    spacing = volumes[0].geometry.spacing_mm
    i, j, k = ((part.stop - part.start) * step for part, step in zip(box_of(mask), spacing))
    del mask  # as large as the scan
    channels, maps = zip(
        *(_normalised(volume, kind, place, inside, plan) for volume, kind in zip(volumes, plan.source_kinds)),
        strict=True,
    )
    if plan.histogram:
        channels += tuple(_ranked(volume, place, inside) for volume in volumes)
    array = channels[0][None] if len(channels) == 1 else np.stack(channels)
    return PreparedSource(array, inside, place.grid, maps, rule, spacing, (i, j, k)), place


def _mask_of(first: Volume, plan: Plan, given: Volume | None) -> tuple[NDArray[np.bool_], Rule]:
    """Take a mask that is given, or find one in the first source as the plan says; return how it was found too."""
    if given is None:
        window = plan.window_hu if plan.source_kinds[0] == "hu" else None
        return find_mask(first, plan.mask_rule, strictly=not plan.mask_files, window_hu=window)
    mask: NDArray[np.bool_] = given.array > 0
    if not mask.any():
        raise VolumeError("the mask is empty", reason="empty-mask")
    return mask, "given"


def _place(mask: NDArray[np.bool_], first: Volume, plan: Plan) -> tuple[_Resampling, NDArray[np.bool_]]:
    """Lay the prepared grid around a mask, and return the mask there too."""
    i, j, k = (
        slice(max(0, part.start - MARGIN), min(n, part.stop + MARGIN)) for part, n in zip(box_of(mask), mask.shape)
    )
    part = crop(Volume(mask.view(np.uint8), first.geometry), (i, j, k))
    grid = part.geometry
    have, want = np.array(first.geometry.spacing_mm), np.array(plan.spacing_mm)
    if (np.abs(have / want - 1) > SAME_SPACING).any():
        grid = grid_with_spacing(grid, plan.spacing_mm)
    place = _Resampling(part.array > 0, (i, j, k), grid)
    inside = place.move(Volume(mask.view(np.uint8), first.geometry), order=0) > 0
    if not inside.any():
        raise VolumeError(
            "the mask is too small for the grid of the plan", reason="empty-mask", found=f"{mask.sum()} voxels"
        )
    return place, inside


def _normalised(
    volume: Volume,
    kind: MapKind,
    place: _Resampling,
    inside: NDArray[np.bool_],
    plan: Plan,
    fitted: IntensityMap | None = None,
) -> tuple[NDArray[np.float32], IntensityMap]:
    """Fit a map to the voxels in the mask as they were scanned, unless one is given; resample, map, blank the rest."""
    used = fitted or fit_intensity(volume.array[place.box], place.mask, kind, plan.window_hu)

    def normalise(raw: NDArray[Any]) -> NDArray[np.float32]:
        return used.apply(np.clip(raw, *plan.window_hu) if kind == "hu" else raw)

    return _inside_alone(place.move(volume, order=1), inside, normalise), used


def _inside_alone(
    raw: NDArray[Any], inside: NDArray[np.bool_], work: Callable[[NDArray[Any]], NDArray[np.floating]]
) -> NDArray[np.float32]:
    """Compute voxels inside a mask, slice by slice and laid out so, and leave 0 elsewhere."""
    i, j, k = inside.shape
    made = np.zeros((k, i, j), np.float32)
    for place, plane in enumerate(made):
        where = inside[..., place]
        plane[where] = work(raw[..., place][where])
    return np.moveaxis(made, 0, -1)


def _ranked(volume: Volume, place: _Resampling, inside: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Give each voxel the share of the mask that is darker, ties halved: what no change of gain or contrast moves.

    The share is taken among voxels as they were scanned, linear between their
    intensities, and scaled to mean 0 and SD 1.
    """
    values, counts = np.unique(volume.array[place.box][place.mask], return_counts=True)
    shares = (np.cumsum(counts) - counts / 2) / counts.sum()
    return _inside_alone(
        place.move(volume, order=1), inside, lambda raw: (np.interp(raw, values, shares) - 0.5) / RANK_SD
    )


def _swapped(plan: Plan) -> Plan:
    """Swap source and target of a plan, so that a target without a source is prepared as sources are."""
    return replace(
        plan,
        sources=(plan.target,),
        target=plan.sources[0],
        source_kinds=(plan.target_kind,),
        target_kind=plan.source_kinds[0],
        source_ranges=plan.source_ranges[:1],
        source_histograms=plan.source_histograms[:1],
        source_limits=plan.source_limits[:1],
        input_mean=plan.input_mean[-2:],
        input_sd=plan.input_sd[-2:],
        histogram=False,
    )


def _store(folder: Path, case: Case, plan: Plan) -> None:
    paired = plan.target in case.images
    volumes = read_images(case, [*plan.sources, plan.target] if paired else plan.sources, plan.degradation)
    given = read_mask(case, volumes[0], plan.degradation) if plan.mask_files else None
    source, place = _prepare(volumes[: len(plan.sources)], plan, given)
    arrays: dict[str, NDArray[Any]] = {"source": source.array, "mask": source.mask}
    if paired:
        shared = None if plan.own is None else source.maps[plan.own]
        known = known_of(case, np.ones(volumes[-1].array.shape, bool), volumes[-1], plan.degradation)
        inside = place.whole_mask(known.shape)
        even = without_shading(volumes[-1], inside & known, plan.target, plan.bias_correction)
        target, _ = _normalised(even, plan.target_kind, place, source.mask, plan, shared)
        mask = source.mask & (place.move(Volume(known.astype(np.uint8), volumes[-1].geometry), order=0) > 0)
        arrays |= {"target": np.where(mask, target, 0), "mask": mask}
    if case.labels is not None:
        labels = check_pair(volumes[0], read_label_map(case, {}), b_name="labels", labels=True)
        arrays["labels"] = place.move(labels, order=0)
    with whole_folder(folder, shared=True) as fresh:
        for name, array in arrays.items():
            np.save(fresh / f"{name}.npy", np.ascontiguousarray(_slices_first(array, plan)))
        sums = {f"{name}.npy": sha256_of(fresh / f"{name}.npy") for name in arrays}
        grid = {"shape": source.grid.shape, "affine": source.grid.affine.tolist()}
        write_json(fresh / CARD, with_checksum({**grid, "arrays": sums}))


def _arrays(path: Path, plan: Plan, *, just_written: bool = False) -> tuple[dict[str, NDArray[Any]], Mapping[str, Any]]:
    """Memory-map the arrays that a card names, and return the card too; those `just_written` are not hashed again.

    Raises:
        RunError: If the card or an array is missing or not what was written.
    """
    card = read_json(path)
    if not has_valid_checksum(card):
        raise RunError("is damaged, or from a chiasm that kept no checksums", path=path, reason="damaged")
    arrays = {}
    for name, expected in card["arrays"].items():
        file = path.with_name(name)
        try:
            if not just_written and content_hash(file) != expected:
                raise RunError("was changed since it was written", path=file, reason="damaged")
            arrays[file.stem] = _slices_last(np.load(file, mmap_mode="r"), plan)
        except OSError as error:
            raise RunError("cannot be read", path=file, reason="unreadable", found=error.strerror) from error
    return arrays, card


def _load(folder: Path, case: Case, plan: Plan, *, just_written: bool = False) -> PreparedCase:
    arrays, grid = _arrays(folder / CARD, plan, just_written=just_written)
    i, j, k = grid["shape"]
    if plan.target not in case.images:
        arrays["target"] = np.broadcast_to(np.float32(0), (i, j, k))
    return PreparedCase(
        case.id,
        case.subject,
        case.site,
        arrays["source"],
        arrays["target"],
        arrays["mask"],
        None if case.labels is None else arrays["labels"],
        Geometry((i, j, k), np.array(grid["affine"])),
        plan.histogram,
        own=plan.own,
        alone=side_alone(case, plan.sources, plan.target),
    )


def _slices_first(array: NDArray[Any], plan: Plan) -> NDArray[Any]:
    """Move the axis across slices in front of the others, where a 2D network reads slice by slice."""
    return np.moveaxis(array, plan.axes[-1] - 3, -3) if plan.dims == 2 else array


def _slices_last(array: NDArray[Any], plan: Plan) -> NDArray[Any]:
    return np.moveaxis(array, -3, plan.axes[-1] - 3) if plan.dims == 2 else array


def cache_key(case: Case, plan: Plan) -> str:
    """Hash everything that prepared arrays depend on: contents of files, fields of the plan, this code.

    Args:
        case: Names the files.
        plan: Says how they are prepared.
    """
    contents = hashes_of(case, [name for name in (*plan.sources, plan.target) if name in case.images])
    settings = {name: getattr(plan, name) for name in PLAN_FIELDS}
    settings = {name: value for name, value in settings.items() if name not in BEFORE or value != BEFORE[name]}
    if case.label_threshold is not None:
        settings["label_threshold"] = case.label_threshold
    text = json.dumps({"version": VERSION, "files": contents, "plan": settings}, sort_keys=True, default=asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
