"""`chiasm predict`: files, folders and whole cohorts in; images, reliability maps and a manifest out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from chiasm.cohorts.cases import Case, Cohort, Problem, unsafe_name
from chiasm.cohorts.dicom_patients import WARNINGS, Selection, marks_on, parse_rules
from chiasm.cohorts.discovery import find_cohort, select_cases, selection_of, volumes_below
from chiasm.cohorts.gathering import LOST, tell_notes, with_account
from chiasm.cohorts.images import read_case_image, read_case_labels, read_image
from chiasm.cohorts.known_layouts import Find, Finds
from chiasm.cohorts.manifests import MARKS
from chiasm.cohorts.splits import read_splits
from chiasm.errors import ChiasmError, CohortError, RecipeError, RunError, VolumeError
from chiasm.locks import locked
from chiasm.prediction.dicom_case import MAP, SERIES, write_dicom_case
from chiasm.prediction.engines import Engine, freeze_for_inference
from chiasm.prediction.manifest import (
    Container,
    Entry,
    Failure,
    Manifest,
    Role,
    digests,
    relative,
    write_manifest,
)
from chiasm.prediction.model import Model, load_model
from chiasm.prediction.model_files import find_model, named_classes, read_card
from chiasm.prediction.resuming import Earlier, hash_inputs, take_over
from chiasm.prediction.synthesis import Synthesis, synthesise
from chiasm.preparation.plan import Plan
from chiasm.runners import Lost, Ray, Slurm, find_runner
from chiasm.storage import UNWRITABLE
from chiasm.volumes import Reading, Volume, check_pair, write_volume
from chiasm.volumes.dicom_choice import pick_series
from chiasm.volumes.dicom_series import is_dicom
from chiasm.volumes.screening import STRICT

SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd")


@dataclass(frozen=True)
class Predicted:
    """What a prediction left behind.

    Attributes:
        folder: Where the files lie.
        manifest: What `predictions.json` says of them.
        problems: Cases that failed, with file and reason.
        done: Cases that were predicted by this call.
        kept: Cases that an earlier call had predicted from the same files, and that are left as they were.
        remade: Cases that were predicted again, because their files had changed or were gone.
        notes: Which of several scans of a modality were taken, in words.
    """

    folder: Path
    manifest: Manifest
    problems: tuple[Problem, ...]
    done: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    remade: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """What an image depends on beside model and files."""

    accelerator: str
    precision: str
    reading: Reading
    degrade: bool
    container: Container
    trust: tuple[str, ...]

    @property
    def options(self) -> dict[str, bool | str]:
        """What the manifest has no field of its own for."""
        reading = {name.replace("_", "-"): value or False for name, value in asdict(self.reading).items()}
        return {**reading, "accelerator": self.accelerator, "precision": self.precision}


class Predictor:
    """A loaded model, ready for volumes; keeps frozen copies of the networks.

    Args:
        model: From `load_model`.
        accelerator: "auto", "cpu" or "cuda".
        precision: "auto", "32-true", "bf16-mixed" or "16-mixed".
        reading: What to assume of files whose headers leave a question open, beside what the model's plan says.
    """

    def __init__(
        self, model: Model, *, accelerator: str = "auto", precision: str = "auto", reading: Reading = STRICT
    ) -> None:
        self.reading = reading | model.plan.reading
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
        names = self.model.plan.sources
        volumes = [
            one if isinstance(one, Volume) else read_image(Path(one), names[min(place, len(names) - 1)], self.reading)
            for place, one in enumerate(sources)
        ]
        return synthesise(self.model, volumes, mask=mask, engine=self.engine, degrade=degrade)


def load(
    path: Path | str,
    *,
    accelerator: str = "auto",
    precision: str = "auto",
    reading: Reading = STRICT,
    trust: str | Collection[str] = (),
) -> Predictor:
    """Load a run or its model folder for prediction.

    Args:
        path: The folder.
        accelerator: "auto", "cpu" or "cuda".
        precision: "auto", "32-true", "bf16-mixed" or "16-mixed".
        reading: As for `Predictor`.
        trust: Classes of others that a model may consist of, as ``package.module:Class``; their code is run.

    Raises:
        RunError: If there is no model, it is damaged, or its network is code that `trust` does not name.
    """
    return Predictor(load_model(Path(path), trust=trust), accelerator=accelerator, precision=precision, reading=reading)


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
    select: Sequence[str] = (),
    reading: Reading = STRICT,
    container: Container = "volume",
    runner: str = "serial",
    degrade: bool = False,
    overwrite: bool = False,
    trust: str | Collection[str] = (),
    progress: Callable[[int, int, str], None] | None = None,
) -> Predicted:
    """Predict every case found in `inputs`; a case that fails is named and the others go on.

    Each case gives `<case>_<target>`, `<case>_reliability` (where the model has
    a local discriminator) and `<case>_mask` on the source's grid, in its format
    (NIfTI for DICOM), for super-resolution with each of its slices cut into thin
    ones; as DICOM, the folder `<case>` of `write_dicom_case`.  The manifest is
    written as cases are done: the same call again goes on, and keeps what the
    folder holds of the same model, files and options.

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
        select: Words of the names of files that are taken where a case has several for one source; by default as
            in training.
        reading: What to assume of files whose headers leave a question open, beside what the model's plan says.
        container: "volume" for NIfTI or MetaImage, "dicom" for DICOM, which needs DICOM sources.
        runner: A name of `runners.RUNNERS`: where cases are predicted.
        degrade: For super-resolution: whether slices are thin and are made thick first, to test the model.
        overwrite: Whether to replace predictions in `out` of another model, of other files or with other options.
        trust: As for `load`.
        progress: Called with cases done, all cases, the last case's id.

    Raises:
        RunError: If there is no model, it is damaged, its network is code that `trust` does not name, a role is asked
            for and the split is unknown, another process writes to `out`, or `out` holds what does not belong to this
            prediction and `overwrite` is False.
        ChiasmError: If `out` cannot be written, as when the disk is full.
        RecipeError: If `degrade` is asked of a model that is not for super-resolution.
        CohortError: If an input holds no case.
        RecipeError: If `series` names no source.
        VolumeError: If DICOM is asked for and a source is none.
    """
    gpus = int(accelerator == "cuda")
    spread = find_runner(runner, {"slurm": Slurm(gpus_per_node=gpus), "ray": Ray(num_gpus=gpus)})
    settings = Settings(accelerator, precision, reading, degrade, container, named_classes(trust))
    with locked(out):
        model = load_model(run, trust=trust)
        if degrade and model.plan.degradation is None:
            raise RecipeError("only a model for super-resolution can degrade its input", path=run, reason="task")
        roles = _roles(run)
        chosen = Selection(series=parse_rules(series, model.plan.sources), select=select, reading=reading)
        cases, problems, notes = _find_cases(inputs, model, layout, chosen)
        if only == "all":  # another role's cases are not asked for
            problems += [note for note in notes if note.reason in LOST]
        if only != "all":
            cases = _of_role(cases, only, roles, run, inputs)
        if container == "dicom":
            _check_dicom(cases)
        asked = {case.id: case for case in cases}
        fresh = _manifest(out, run, model, settings, tuple(asked))
        names = {case.id: (case, _outputs(case, model.plan, container)) for case in cases}
        earlier = take_over(out, fresh, names, overwrite=overwrite)
        progressing = _Progressing(out, fresh, earlier, problems)
        due = [case for case in cases if case.id not in earlier.entries]
        do = partial(_work, run=run.resolve(), sha256=model.sha256, out=out.resolve(), roles=roles, settings=settings)
        number = 0
        for report in spread(due, do, out):
            if isinstance(report, Lost) and report.again:
                continue
            outcome = _lost_for_good(report, model.plan.sources[0]) if isinstance(report, Lost) else report
            if isinstance(outcome, Problem) and outcome.reason == UNWRITABLE:  # no other case would fare better
                raise ChiasmError(outcome.message.rstrip("."), reason=UNWRITABLE)
            progressing.note(outcome)
            number += 1
            if progress is not None:
                progress(number, len(due), outcome.case or "")
        kept = tuple(name for name in asked if name in earlier.entries)
        done = tuple(case.id for case in due if case.id in progressing.entries)
        told = tuple(tell_notes(notes, ("several", *(() if only == "all" else LOST))))
        return Predicted(out, progressing.manifest, tuple(problems), done, kept, earlier.damaged, told)


class Inputs(NamedTuple):
    """What inputs hold: cases, what is wrong with others, and what is worth a note."""

    cases: list[Case]
    problems: list[Problem]
    notes: list[Problem]


def _find_cases(inputs: Sequence[Path | Case], model: Model, layout: str | None, chosen: Selection) -> Inputs:
    sources = model.plan.sources
    selection = replace(
        selection_of(model.recipe, chosen, remember=True),
        alone=sources[0] if len(sources) == 1 else None,
        allow=MARKS,  # who predicts is warned of them
        reading=chosen.reading | model.plan.reading,
        subject_pattern="",  # whose a case is does not matter
    )
    places = [one.absolute() for one in inputs if isinstance(one, Path)]
    found = find_inputs(places, sources, layout=layout, selection=selection)
    cases = found.cases + [one for one in inputs if isinstance(one, Case)]
    return found._replace(cases=[replace(case, reading=selection.reading | case.reading) for case in cases])


def _of_role(
    cases: Sequence[Case], only: str, roles: Mapping[str, Role], run: Path, inputs: Sequence[Path | Case]
) -> list[Case]:
    if not roles:
        raise RunError("does not say who was trained on", path=run, reason="no-split", hint="Predict all cases.")
    chosen = [case for case in cases if roles.get(case.id) == only]
    if not chosen:
        place = next((one for one in inputs if isinstance(one, Path)), run)
        raise CohortError(f"holds no {only} case of this run", path=place, reason="no-cases")
    return chosen


def _check_dicom(cases: Sequence[Case]) -> None:
    for path in (path for case in cases for path in case.images.values() if not is_dicom(path)):
        raise VolumeError(
            "is no DICOM, so there is no patient, study or frame of reference for a DICOM image to belong to",
            path=path,
            reason="no-dicom",
            hint="Predict from the series, or run chiasm predict without --format dicom to get NIfTI or MetaImage.",
        )


def _manifest(out: Path, run: Path, model: Model, settings: Settings, cases: tuple[str, ...]) -> Manifest:
    """Describe a prediction of which no case is done yet."""
    return Manifest(
        model=relative(find_model(run), out),
        sha256=model.sha256,
        method=model.recipe.method,
        seed=model.recipe.training.seed,
        fold=model.recipe.split.fold,
        sources=model.plan.sources,
        target=model.plan.target,
        unit=model.plan.target_unit,
        cases=(),
        failed=(),
        container=settings.container,
        degraded=settings.degrade,
        options=settings.options,
        pending=cases,
        written_in=str(out.resolve()),
    )


class _Progressing:
    """The manifest of a prediction, written anew with every case that is done."""

    def __init__(self, out: Path, fresh: Manifest, earlier: Earlier, problems: list[Problem]) -> None:
        self.out, self.fresh, self.earlier, self.problems = out, fresh, earlier, problems
        self.entries = dict(earlier.entries)
        self.write()

    def note(self, outcome: Entry | Problem) -> None:
        """Take in what came of a case."""
        if isinstance(outcome, Problem):
            self.problems.append(outcome)
        else:
            self.entries[outcome.case] = outcome
        self.write()

    def write(self) -> None:
        """Write `predictions.json`: the cases asked for in their order, then those that were there before."""
        asked = self.fresh.pending
        done = [name for name in asked if name in self.entries] + [name for name in self.entries if name not in asked]
        over = {*done, *(problem.case for problem in self.problems)}
        failed = tuple(Failure(p.case, str(p.path), p.reason, p.message) for p in self.problems)
        self.manifest = replace(
            self.fresh,
            cases=tuple(self.entries[name] for name in done),
            failed=(*self.earlier.failed, *failed),
            pending=tuple(name for name in asked if name not in over),
        )
        write_manifest(self.out, self.manifest)


def _lost_for_good(lost: Lost[Case], source: str) -> Problem:
    case, hint = lost.job, " A machine with more memory may do." if lost.may_lack_memory else ""
    return Problem(case.images[source], "lost", f"case {case.id}: {lost}.{hint}", case.id)


def find_inputs(
    inputs: Sequence[Path],
    sources: Sequence[str],
    *,
    layout: str | None = None,
    selection: Selection | None = None,
) -> Inputs:
    """Turn files, folders of files and cohorts into cases with unique ids.

    In a folder that fits no layout, each file is a case of a model with one source.

    Raises:
        CohortError: If an input is missing, holds no case, or files do not come in groups of as many as sources.
    """
    files = [path for path in inputs if path.is_file() and path.name.lower().endswith(SUFFIXES)]
    cases: list[Case] = []
    problems: list[Problem] = []
    notes: list[Problem] = []
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
        except CohortError as error:
            if error.reason != "unknown-layout" or len(sources) > 1:
                raise
            cohort = _each_a_case(path, sources[0])
            if not cohort.cases:
                raise
        cases += cohort.cases
        problems += cohort.problems
        notes += cohort.notes
    unsafe = {id(case): problem for case in cases if (problem := unsafe_name(case))}
    problems += unsafe.values()
    seen: dict[str, int] = {}
    unique = []
    for case in (case for case in cases if id(case) not in unsafe):
        seen[case.id] = seen.get(case.id, 0) + 1
        unique.append(case if seen[case.id] == 1 else replace(case, id=f"{case.id}-{seen[case.id]}"))
    return Inputs(unique, problems, notes)


def _each_a_case(folder: Path, source: str) -> Cohort:
    """Take each volume of a folder for a case, and note those that lie deeper or are of another format."""
    files = volumes_below(folder)
    here = [file for file in files if "/" not in file.stem]
    cases = tuple(Case(_stem(file.path), _stem(file.path), {source: file.path}) for file in here)
    finds = [Find(case.id, case.id, case.id, source, case.images[source]) for case in cases]
    return with_account(Cohort(folder, "", cases), Finds(finds), files)


def _work(
    case: Case, *, run: Path, sha256: str, out: Path, roles: Mapping[str, Role], settings: Settings
) -> Entry | Problem:
    """Predict one case in whatever process this is; the model is loaded once in each."""
    predictor = _loaded(run, sha256, settings.accelerator, settings.precision, settings.trust)
    try:
        entry = _predict_case(predictor, case, out, roles.get(case.id, "new"), settings)
        inputs = hash_inputs(case, predictor.model.plan.sources)
        return replace(entry, sha256=digests(out, entry), inputs=inputs)
    except ChiasmError as error:
        path = error.path or case.images[predictor.model.plan.sources[0]]
        return Problem(path, error.reason, f"case {case.id}: {error}", case.id)


@lru_cache(maxsize=1)
def _loaded(run: Path, sha256: str, accelerator: str, precision: str, trust: tuple[str, ...]) -> Predictor:
    predictor = load(run, accelerator=accelerator, precision=precision, trust=trust)
    if predictor.model.sha256 != sha256:
        raise RunError("changed while cases were predicted", path=run, reason="changed")
    return predictor


def _predict_case(predictor: Predictor, case: Case, out: Path, role: Role, settings: Settings) -> Entry:
    plan = predictor.model.plan
    paths = [case.images[name] for name in plan.sources]
    volumes = [read_case_image(case, name) for name in plan.sources]
    marks = dict.fromkeys(mark for name in plan.sources for mark in marks_on(case, name))
    mask = None if case.mask is None else check_pair(volumes[0], read_case_labels(case, case.mask), labels=True)
    made = predictor.predict(*volumes, mask=mask, degrade=settings.degrade)
    warnings = (*(WARNINGS[mark] for mark in marks), *made.warnings)
    if settings.container == "dicom":
        sources = [pick_series(path) for path in paths]
        written = write_dicom_case(out / case.id, replace(made, warnings=warnings), sources, predictor.model)
        warnings, image = written.warnings, f"{case.id}/{SERIES}"
        inside, reliability = None, None if written.reliability is None else f"{case.id}/{MAP}"
    else:

        def write(name: str, volume: Volume, labels: bool = False) -> str:
            file = _called(case, name, plan)
            write_volume(out / file, volume.array, volume.geometry, labels=labels)
            return file

        image = write(plan.target, made.image)
        inside = write("mask", Volume(made.mask.array.astype("uint8"), made.mask.geometry), labels=True)
        reliability = None if made.reliability is None else write("reliability", made.reliability)
    sources_from = tuple(relative(path, out) for path in paths)
    return Entry(case.id, role, sources_from, image, inside, reliability, warnings, mask_rule=made.mask_rule)


def _called(case: Case, name: str, plan: Plan) -> str:
    """Say what an output is called: as the case, and in the format of its first source."""
    first = case.images[plan.sources[0]].name.lower()
    return f"{case.id}_{name}{'.mha' if first.endswith(('.mha', '.mhd')) else '.nii.gz'}"


def _outputs(case: Case, plan: Plan, container: Container) -> tuple[str, ...]:
    """List what a case's prediction may write in the folder."""
    if container == "dicom":
        return (f"{case.id}/{SERIES}",)
    return tuple(_called(case, name, plan) for name in (plan.target, "mask", "reliability"))


def _roles(run: Path) -> dict[str, Role]:
    """Map case id to its role, from the split that the model carries; empty where it carries none."""
    folder = find_model(run)
    if "splits.json" not in read_card(folder).sha256:
        return {}
    split = read_splits(folder / "splits.json").split
    roles: tuple[Role, ...] = ("train", "validation", "test", "sealed")
    return {name: role for role in roles for name in getattr(split, role)}


def _stem(path: Path) -> str:
    name = path.name
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return path.stem
