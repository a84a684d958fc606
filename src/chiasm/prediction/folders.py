"""`chiasm predict`: files, folders and whole cohorts in; images, reliability maps and a manifest out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from chiasm.cohorts.cases import Case, Problem
from chiasm.cohorts.dicom_folders import WARNINGS, Selection, marks_on, parse_rules
from chiasm.cohorts.layouts import find_cohort, select_cases
from chiasm.cohorts.manifests import MARKS
from chiasm.errors import ChiasmError, CohortError, RecipeError, RunError, VolumeError
from chiasm.prediction.dicom_case import MAP, SERIES, write_dicom_case
from chiasm.prediction.engines import Engine, freeze_for_inference
from chiasm.prediction.manifest import Container, Entry, Failure, Manifest, Role, write_manifest
from chiasm.prediction.model import Model, find_model, load_model
from chiasm.prediction.synthesis import Synthesis, synthesise
from chiasm.runners import Lost, Ray, Slurm, find_runner
from chiasm.storage import read_json
from chiasm.volumes import Volume, check_pair, read_volume, write_volume
from chiasm.volumes.dicom_series import is_dicom, pick_series

SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd")


@dataclass(frozen=True)
class Predicted:
    """What a prediction left behind.

    Attributes:
        folder: Where the files lie.
        manifest: What `predictions.json` says of them.
        problems: Cases that failed, with file and reason.
    """

    folder: Path
    manifest: Manifest
    problems: tuple[Problem, ...]


class Predictor:
    """A loaded model, ready for volumes; keeps frozen copies of the networks.

    Args:
        model: From `load_model`.
        accelerator: "auto", "cpu" or "cuda".
        precision: "auto", "32-true", "bf16-mixed" or "16-mixed".
    """

    def __init__(self, model: Model, *, accelerator: str = "auto", precision: str = "auto") -> None:
        self.engine = Engine.pick(accelerator, precision)
        generator, local, refiner, *earlier = (
            None if network is None else self.engine.place(freeze_for_inference(network))
            for network in (model.generator, model.local_judge, model.refiner, *model.earlier)
        )
        assert generator is not None
        self.model = replace(
            model,
            generator=generator,
            local_judge=local,
            refiner=refiner,
            earlier=tuple(network for network in earlier if network is not None),
        )

    def predict(self, *sources: Volume | Path | str, mask: Volume | None = None, degrade: bool = False) -> Synthesis:
        """Synthesise the target of one case.

        Args:
            *sources: One volume or file for each source of the model, in its order, on one grid.
            mask: Valid voxels on that grid; by default found as the plan says.
            degrade: For super-resolution: whether slices are thin and must be made thick first.

        Raises:
            VolumeError: If a file cannot be read, the grids differ, or the number of sources is wrong.
        """
        volumes = [source if isinstance(source, Volume) else read_volume(Path(source)) for source in sources]
        return synthesise(self.model, volumes, mask=mask, engine=self.engine, degrade=degrade)


def load(path: Path | str, *, accelerator: str = "auto", precision: str = "auto") -> Predictor:
    """Load a run or its model folder for prediction.

    Raises:
        RunError: If there is no model, or it is damaged.
    """
    return Predictor(load_model(Path(path)), accelerator=accelerator, precision=precision)


def predict(
    run: Path,
    inputs: Sequence[Path | Case],
    out: Path,
    *,
    only: str = "all",
    accelerator: str = "auto",
    precision: str = "auto",
    layout: str | None = None,
    series: Sequence[str] = (),
    resample_tilt: bool = False,
    container: Container = "volume",
    runner: str = "serial",
    degrade: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Predicted:
    """Predict every case found in `inputs`; a case that fails is named and the others go on.

    Each case gives `<case>_<target>`, `<case>_reliability` (where the model has
    a local discriminator) and `<case>_mask` on the source's grid, in its format
    (NIfTI for DICOM), for super-resolution with each of its slices cut into thin
    ones; as DICOM, the folder `<case>` of `write_dicom_case`.

    Args:
        run: A run folder or its model folder.
        inputs: Files (one case for each group of as many files as the model
            has sources), folders of files, or cohorts; folders, archives and files of DICOM series; single cases.
        out: Where the results go.
        only: "all", or the cases of a role in the run's split: "train", "validation", "test" or "sealed".
        accelerator: "auto", "cpu" or "cuda".
        precision: "auto", "32-true", "bf16-mixed" or "16-mixed".
        layout: Name of a layout, where a folder fits several.
        series: Which DICOM series is which source, as ``t1=WORDS``, or ``WORDS`` for the only source.
        resample_tilt: Whether to resample DICOM slices that are tilted or uneven, rather than refuse them.
        container: "volume" for NIfTI or MetaImage, "dicom" for DICOM, which needs DICOM sources.
        runner: A name of `runners.RUNNERS`: where cases are predicted.
        degrade: For super-resolution: whether slices are thin and are made thick first, to test the model.
        progress: Called with cases done, all cases, the last case's id.

    Raises:
        RunError: If there is no model, it is damaged, or a role is asked for and the split is unknown.
        RecipeError: If `degrade` is asked of a model that is not for super-resolution.
        CohortError: If an input holds no case.
        RecipeError: If `series` names no source.
        VolumeError: If DICOM is asked for and a source is none.
    """
    gpus = int(accelerator == "cuda")
    spread = find_runner(runner, {"slurm": Slurm(gpus_per_node=gpus), "ray": Ray(num_gpus=gpus)})
    model = load_model(run)
    plan = model.plan
    if degrade and plan.degradation is None:
        raise RecipeError("only a model for super-resolution can degrade its input", path=run, reason="task")
    roles = _roles(run)
    selection = Selection(
        series=parse_rules(series, plan.sources),
        alone=plan.sources[0] if len(plan.sources) == 1 else None,
        allow=MARKS,  # who predicts is warned of them
        tilted=resample_tilt,
    )
    places = [one.absolute() for one in inputs if isinstance(one, Path)]
    cases, problems = find_inputs(places, plan.sources, layout=layout, selection=selection)
    cases += [one for one in inputs if isinstance(one, Case)]
    if only != "all":
        if not roles:
            raise RunError("does not say who was trained on", path=run, reason="no-split", hint="Predict all cases.")
        cases = [case for case in cases if roles.get(case.id) == only]
        if not cases:
            raise CohortError(f"holds no {only} case of this run", path=places[0] if places else run, reason="no-cases")
    if container == "dicom":
        for path in (path for case in cases for path in case.images.values() if not is_dicom(path)):
            raise VolumeError(
                "is no DICOM, so there is no patient, study or frame of reference for a DICOM image to belong to",
                path=path,
                reason="no-dicom",
                hint="Predict from the DICOM series, or leave --format dicom out to get NIfTI or MetaImage.",
            )
    asked = run.resolve(), model.sha256, accelerator, precision
    do = partial(
        _work,
        asked=asked,
        out=out.resolve(),
        roles=roles,
        degrade=degrade,
        resample_tilt=resample_tilt,
        as_dicom=container == "dicom",
    )
    found: dict[str, Entry] = {}
    number = 0
    for report in spread(cases, do, out):
        if isinstance(report, Lost) and report.again:
            continue
        outcome = _lost_for_good(report, plan.sources[0]) if isinstance(report, Lost) else report
        number, name = number + 1, outcome.case or ""
        if isinstance(outcome, Problem):
            problems.append(outcome)
        else:
            found[name] = outcome
        if progress is not None:
            progress(number, len(cases), name)
    manifest = Manifest(
        model=str(find_model(run).resolve()),
        sha256=model.sha256,
        method=model.recipe.method,
        seed=model.recipe.training.seed,
        fold=model.recipe.split.fold,
        sources=plan.sources,
        target=plan.target,
        unit=plan.target_unit,
        cases=tuple(found[case.id] for case in cases if case.id in found),
        failed=tuple(Failure(p.case, str(p.path), p.reason, p.message) for p in problems),
        container=container,
        degraded=degrade,
    )
    write_manifest(out, manifest)
    return Predicted(out, manifest, tuple(problems))


def _lost_for_good(lost: Lost[Case], source: str) -> Problem:
    case = lost.job
    return Problem(case.images[source], "lost", f"case {case.id}: {lost}. A machine with more memory may do.", case.id)


def find_inputs(
    inputs: Sequence[Path],
    sources: Sequence[str],
    *,
    layout: str | None = None,
    selection: Selection | None = None,
) -> tuple[list[Case], list[Problem]]:
    """Turn files, folders of files and cohorts into cases with unique ids.

    Raises:
        CohortError: If an input is missing, holds no case, or files do not come in groups of as many as sources.
    """
    files = [path for path in inputs if path.is_file() and path.name.lower().endswith(SUFFIXES)]
    cases: list[Case] = []
    problems: list[Problem] = []
    if len(files) % len(sources):
        raise CohortError(
            "the files do not come in groups of one per source",
            reason="sources",
            found=f"{len(files)} files",
            expected=f"{', '.join(sources)} for each case",
        )
    for start in range(0, len(files), len(sources)):
        group = files[start : start + len(sources)]
        cases.append(Case(_stem(group[0]), _stem(group[0]), dict(zip(sources, group, strict=True))))
    for path in inputs:
        if path in files:
            continue
        if not path.exists():
            raise CohortError("does not exist", path=path, reason="not-found")
        try:
            cohort = select_cases(find_cohort(path, layout=layout, selection=selection), sources, None)
            cases += cohort.cases
            problems += [problem for problem in cohort.problems if problem.case]
        except CohortError:
            inside = sorted(f for f in path.iterdir() if f.name.lower().endswith(SUFFIXES)) if path.is_dir() else []
            if not inside or len(sources) > 1:
                raise
            cases += [Case(_stem(file), _stem(file), {sources[0]: file}) for file in inside]
    seen: dict[str, int] = {}
    unique = []
    for case in cases:
        seen[case.id] = seen.get(case.id, 0) + 1
        unique.append(case if seen[case.id] == 1 else replace(case, id=f"{case.id}-{seen[case.id]}"))
    return unique, problems


def _work(
    case: Case,
    *,
    asked: tuple[Path, str, str, str],
    out: Path,
    roles: Mapping[str, Role],
    degrade: bool,
    resample_tilt: bool,
    as_dicom: bool,
) -> Entry | Problem:
    """Predict one case in whatever process this is; the model is loaded once in each."""
    predictor = _loaded(*asked)
    try:
        role = roles.get(case.id, "new")
        return _predict_case(
            predictor, case, out, role, degrade=degrade, resample_tilt=resample_tilt, as_dicom=as_dicom
        )
    except ChiasmError as error:
        path = error.path or case.images[predictor.model.plan.sources[0]]
        return Problem(path, error.reason, f"case {case.id}: {error}", case.id)


@lru_cache(maxsize=1)
def _loaded(run: Path, sha256: str, accelerator: str, precision: str) -> Predictor:
    predictor = load(run, accelerator=accelerator, precision=precision)
    if predictor.model.sha256 != sha256:
        raise RunError("changed while cases were predicted", path=run, reason="changed")
    return predictor


def _predict_case(
    predictor: Predictor, case: Case, out: Path, role: Role, *, degrade: bool, resample_tilt: bool, as_dicom: bool
) -> Entry:
    plan = predictor.model.plan
    paths = [case.images[name] for name in plan.sources]
    volumes = [read_volume(path, resample_tilt=resample_tilt) for path in paths]
    marks = dict.fromkeys(mark for name in plan.sources for mark in marks_on(case, name))
    mask = None if case.mask is None else check_pair(volumes[0], read_volume(case.mask, labels=True), labels=True)
    made = predictor.predict(*volumes, mask=mask, degrade=degrade)
    warnings = (*(WARNINGS[mark] for mark in marks), *made.warnings)
    if as_dicom:
        sources = [pick_series(path) for path in paths]
        written = write_dicom_case(out / case.id, replace(made, warnings=warnings), sources, predictor.model)
        warnings, image = written.warnings, f"{case.id}/{SERIES}"
        inside, reliability = None, None if written.reliability is None else f"{case.id}/{MAP}"
    else:
        suffix = ".mha" if paths[0].name.lower().endswith((".mha", ".mhd")) else ".nii.gz"

        def write(name: str, volume: Volume, labels: bool = False) -> str:
            file = f"{case.id}_{name}{suffix}"
            write_volume(out / file, volume.array, volume.geometry, labels=labels)
            return file

        image = write(plan.target, made.image)
        inside = write("mask", Volume(made.mask.array.astype("uint8"), made.mask.geometry), labels=True)
        reliability = None if made.reliability is None else write("reliability", made.reliability)
    return Entry(case.id, role, tuple(map(str, paths)), image, inside, reliability, warnings)


def _roles(run: Path) -> dict[str, Role]:
    """Map case id to its role, from the split that the model carries; empty where it carries none."""
    path = find_model(run) / "splits.json"
    if not path.exists():
        return {}
    content = read_json(path)
    roles: tuple[Role, ...] = ("train", "validation", "test", "sealed")
    return {name: role for role in roles for name in content.get(role, [])}


def _stem(path: Path) -> str:
    name = path.name
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return path.stem
