"""`chiasm evaluate`: a folder of predictions against a cohort, beside the naive baselines.

Nothing here loads torch: scores need arrays, the plan's fixed figures and the
baselines' tables only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chiasm.cohorts.cases import Case, Cohort, Problem
from chiasm.cohorts.layouts import find_cohort
from chiasm.cohorts.planning import Plan, read_plan
from chiasm.cohorts.preparation import prepare_source
from chiasm.errors import ChiasmError, CohortError, RunError, unknown
from chiasm.evidence.curves import read_history
from chiasm.evidence.evaluation import Row, evaluate_case, format_table, harmonise, reporting_unit, write_evaluation
from chiasm.evidence.gallery import GalleryCase
from chiasm.evidence.pictures import write_picture
from chiasm.evidence.report import write_report
from chiasm.metrics import CONVENTIONS
from chiasm.prediction.baselines import Baselines, load_baselines
from chiasm.prediction.manifest import Entry, Manifest, read_manifest
from chiasm.storage import read_json, read_toml
from chiasm.volumes import Volume, canonical, check_pair, read_volume, resample

GALLERY = 6  # cases with pictures in the report
FEWEST_TO_TEST = 6


@dataclass(frozen=True)
class Scored:
    """What an evaluation left behind.

    Attributes:
        rows: One for each figure.
        table: The summary, lines of text.
        report: The page.
        problems: Cases that could not be scored.
    """

    rows: tuple[Row, ...]
    table: tuple[str, ...]
    report: Path
    problems: tuple[Problem, ...]


@dataclass(frozen=True, eq=False)
class Loaded:
    """Everything of one case on the source's grid, in target units.

    Attributes:
        case: The cohort's case.
        entry: What the manifest says of its prediction.
        images: Method name to predicted image; the model's own comes first.
        target: The real image, harmonised where units are arbitrary.
        reliability: The map in target units, or None.
        mask: Voxels that are scored.
        labels: Label map, or None.
        source: The first source.
    """

    case: Case
    entry: Entry
    images: Mapping[str, NDArray[np.float32]]
    target: NDArray[np.float32]
    reliability: NDArray[np.float32] | None
    mask: NDArray[np.bool_]
    labels: NDArray[np.integer] | None
    source: Volume


@dataclass(frozen=True, eq=False)
class Judged:
    """One folder of predictions with what is needed to judge it.

    Attributes:
        folder: That `chiasm predict` wrote.
        manifest: What it says of itself.
        model: Folder of the model that made it.
        plan: Of that model.
        baselines: Fitted on the same training cases.
    """

    folder: Path
    manifest: Manifest
    model: Path
    plan: Plan
    baselines: Baselines


def evaluate(
    predictions: Path | Sequence[Path],
    reference: Path,
    out: Path,
    *,
    regions: str = "seg",
    convention: str = "chiasm",
    model: Path | None = None,
    layout: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Scored:
    """Score every predicted case that has a real target; write CSV, JSON and a report.

    Args:
        predictions: Folder written by `chiasm predict`; several, one for each fold, are scored together.
        reference: The cohort with the real targets.
        out: Where `evaluation.csv`, `evaluation.json`, `report.html` and `pictures/` go.
        regions: "seg" for the cohort's label maps, "none" to score the mask alone.
        convention: A name of `CONVENTIONS`.
        model: Run or model folder of a single folder of predictions, where it no longer stands where it stood.
        layout: Name of a layout, where the folder fits several.
        progress: Called with cases done, all cases, the next case's id.

    Raises:
        ChiasmError: If a folder is not what it should be, the folders are of
            several methods or modalities, or no case can be scored.
    """
    if convention not in CONVENTIONS:
        raise unknown("convention", convention, list(CONVENTIONS))
    if regions not in ("seg", "none"):
        raise unknown("choice of regions", regions, ["seg", "none"])
    judged = [_judged(folder, model) for folder in ([predictions] if isinstance(predictions, Path) else predictions)]
    if len({(one.manifest.method, one.plan.sources, one.plan.target) for one in judged}) != 1:
        raise RunError(
            "folders that are scored together must be of one method, source and target",
            path=judged[1].folder,
            reason="other-method",
            hint="Evaluate them one by one; chiasm study compares methods.",
        )
    cohort = find_cohort(reference, layout=layout)
    rows: list[Row] = []
    problems: list[Problem] = []
    gallery: list[GalleryCase] = []
    work = [(one, entry) for one in judged for entry in one.manifest.cases]
    for index, (one, entry) in enumerate(work):
        if progress is not None:
            progress(index, len(work), entry.case)
        try:
            loaded = load_case(one, entry, cohort, with_labels=regions == "seg")
            rows += _score(loaded, one, cohort, convention)
        except ChiasmError as error:
            path = error.path or one.folder / entry.image
            problems.append(Problem(path, error.reason, f"case {entry.case}: {error}", entry.case))
            continue
        if len(gallery) < GALLERY:
            gallery.append(_picture(loaded, one.plan))
    if progress is not None:
        progress(len(work), len(work), "")
    if not rows:
        detail = f"; the first: {problems[0].message}" if problems else ""
        raise CohortError(f"no predicted case could be scored{detail}", path=judged[0].folder, reason="no-cases")
    write_evaluation(out, rows)
    subjects = {case.id: case.subject for case in cohort.cases}
    first = judged[0]
    for shown in gallery:
        write_picture(out / "pictures" / f"{shown.case}.png", shown)
    report = write_report(
        out / "report.html",
        title=f"{' + '.join(first.plan.sources)} to {first.plan.target}",
        rows=rows,
        history=read_history(first.model.parent / "log.jsonl") if len(judged) == 1 else [],
        gallery=gallery,
        facts=_facts(judged, cohort),
        warnings=_warnings(judged, rows, problems),
        method=first.manifest.method,
        naive=first.baselines.names,
    )
    return Scored(tuple(rows), tuple(format_table(rows, subjects=subjects)), report, tuple(problems))


def _judged(folder: Path, model: Path | None) -> Judged:
    manifest = read_manifest(folder)
    place = _model_folder(manifest, model)
    return Judged(folder, manifest, place, read_plan(place / "plan.toml"), load_baselines(place))


def score_folder(
    predictions: Path, reference: Path, *, layout: str | None = None, convention: str = "chiasm", naive: bool = True
) -> tuple[list[Row], list[Problem]]:
    """Score a folder of predictions and write nothing: the rows, and the cases that could not be scored.

    Args:
        predictions: Folder written by `chiasm predict`.
        reference: The cohort with the real targets.
        layout: Name of a layout, where the folder fits several.
        convention: A name of `CONVENTIONS`.
        naive: Whether to score the naive baselines too.

    Raises:
        ChiasmError: If a folder is not what it should be.
    """
    judged, cohort = _judged(predictions, None), find_cohort(reference, layout=layout)
    rows: list[Row] = []
    problems: list[Problem] = []
    for entry in judged.manifest.cases:
        try:
            rows += _score(load_case(judged, entry, cohort, with_labels=True, naive=naive), judged, cohort, convention)
        except ChiasmError as error:
            path = error.path or predictions / entry.image
            problems.append(Problem(path, error.reason, f"case {entry.case}: {error}", entry.case))
    return rows, problems


def load_case(judged: Judged, entry: Entry, cohort: Cohort, *, with_labels: bool, naive: bool = True) -> Loaded:
    """Read one case's prediction, target, mask and labels, and make the naive baselines if asked for.

    Raises:
        CohortError: If the cohort has no such case or it has no target.
        VolumeError: If a file cannot be read or a grid does not fit.
    """
    name, plan, folder = entry.case, judged.plan, judged.folder
    case = next((case for case in cohort.cases if case.id == name), None)
    if case is None or plan.target not in case.images:
        raise CohortError(
            f"case {name} has no {plan.target} to compare with" if case else f"has no case {name}",
            path=cohort.root,
            reason="no-target",
        )
    source = read_volume(case.images[plan.sources[0]])
    others = [
        check_pair(source, read_volume(case.images[other]), a_name=plan.sources[0], b_name=other)
        for other in plan.sources[1:]
    ]

    def fitting(path: Path, what: str, labels: bool = False) -> Volume:
        return check_pair(source, read_volume(path, labels=labels), b_name=what, labels=labels)

    def made(name: str, what: str) -> Volume:  # a network may well make the same everywhere
        return check_pair(source, read_volume(folder / name, allow_constant=True), b_name=what, labels=True)

    prediction = made(entry.image, "prediction")
    target = fitting(case.images[plan.target], plan.target)
    mask = fitting(case.mask or folder / entry.mask, "mask", labels=True)
    inside = mask.array > 0
    labels = fitting(case.labels, "labels", labels=True).array if with_labels and case.labels else None
    reliability = None if entry.reliability is None else made(entry.reliability, "reliability")
    prepared = prepare_source([source, *others], plan, mask)
    images = {judged.manifest.method: prediction.array}
    for baseline in judged.baselines.names if naive else ():
        guess = judged.baselines.predict(baseline, prepared.array, prepared.mask, prepared.grid)
        raw = plan.target_reference.invert(guess)
        on_grid = resample(Volume(raw.astype(np.float32), prepared.grid), source.geometry, order=1)
        images[baseline] = np.where(inside, on_grid.array, plan.target_background).astype(np.float32)
    real = harmonise(target.array, inside, plan)
    trust = None if reliability is None else reliability.array
    return Loaded(case, entry, images, real, trust, inside, labels, source)


def _score(loaded: Loaded, judged: Judged, cohort: Cohort, convention: str) -> list[Row]:
    plan, manifest = judged.plan, judged.manifest
    unit, scale = reporting_unit(plan)
    rows: list[Row] = []
    for method, image in loaded.images.items():
        rows += evaluate_case(
            image,
            loaded.target,
            loaded.mask,
            loaded.labels,
            cohort.regions,
            loaded.source.geometry.spacing_mm,
            data_range=plan.target_range,
            unit=unit,
            unit_scale=scale,
            convention=convention,
            reliability=loaded.reliability if method == manifest.method else None,
            case=loaded.case.id,
            fold=manifest.fold,
            seed=manifest.seed,
            method=method,
        )
    return rows


def _picture(loaded: Loaded, plan: Plan) -> GalleryCase:
    grid = loaded.source.geometry
    unit, scale = reporting_unit(plan)
    low, high = plan.target_range

    def upright(array: NDArray[Any]) -> NDArray[Any]:
        turned: NDArray[Any] = canonical(Volume(array, grid)).array
        return turned

    return GalleryCase(
        case=loaded.case.id,
        source=upright(loaded.source.array),
        real=upright(loaded.target / scale),
        synthetic=upright(next(iter(loaded.images.values())) / scale),
        reliability=None if loaded.reliability is None else upright(loaded.reliability / scale),
        mask=upright(loaded.mask),
        lesion=None if loaded.labels is None else upright(loaded.labels > 0),
        spacing_mm=canonical(loaded.source).geometry.spacing_mm,
        unit=unit,
        window=(low / scale, high / scale),
        caption=f"{loaded.entry.role} case",
    )


def _model_folder(manifest: Manifest, given: Path | None) -> Path:
    told = Path(manifest.model)
    for folder in (told,) if given is None else (given, given / "model"):
        if (folder / "plan.toml").is_file() and (folder / "model.toml").is_file():
            return folder
    raise RunError(
        "holds no model", path=given or told, reason="no-model", hint="Say where the model is now with --model RUN."
    )


def _warnings(judged: Sequence[Judged], rows: Sequence[Row], problems: Sequence[Problem]) -> list[str]:
    entries = [entry for one in judged for entry in one.manifest.cases]
    scored = {row.case for row in rows}
    warnings = []
    if seen := [entry.case for entry in entries if entry.role in ("train", "validation")]:
        warnings.append(f"{len(seen)} of {len(entries)} cases were used in training: {', '.join(seen)}")
    if len(scored) < FEWEST_TO_TEST:
        warnings.append(f"only {len(scored)} cases: no difference between methods can be called significant")
    warnings += [f"case {entry.case}: {sentence}" for entry in entries for sentence in entry.warnings]
    return warnings + [f"not scored: {problem.message}" for problem in problems]


def _facts(judged: Sequence[Judged], cohort: Cohort) -> dict[str, dict[str, str]]:
    """Collect the data sheet: what was asked, on what, with what; of several folds, plan and recipe of the first."""
    first = judged[0]
    recipe = read_toml(first.model / "recipe.toml")
    facts = {
        "Cohort": {
            "layout": cohort.layout,
            "cases in the folder": str(len(cohort.cases)),
            "subjects": str(len({case.subject for case in cohort.cases})),
            "cases predicted": str(sum(len(one.manifest.cases) for one in judged)),
            "sites": ", ".join(sorted({case.site for case in cohort.cases if case.site})) or "not known",
        },
        "Plan": {name: str(reason) for name, reason in read_toml(first.model / "plan.toml").get("reasons", {}).items()},
        "Model": {
            "method": first.manifest.method,
            "sha256 of the weights": ", ".join(one.manifest.sha256 for one in judged),
        },
        "Recipe": {
            f"{section}.{name}": str(value)
            for section, fields in recipe.items()
            if isinstance(fields, dict)
            for name, value in fields.items()
        },
    }
    environment = first.model.parent / "environment.json"
    if environment.exists():
        facts["Environment"] = {name: str(value) for name, value in read_json(environment).items()}
    return facts
