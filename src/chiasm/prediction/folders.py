"""`chiasm predict`: from files, folders and whole cohorts to images, expected-error maps and a manifest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from chiasm.attempts import Lost
from chiasm.cohorts.cases import Case, Problem
from chiasm.cohorts.dicom_patients import Selection, parse_rules
from chiasm.cohorts.gathering import LOST, notes_in_lines
from chiasm.cohorts.images import read_case_image, read_case_labels
from chiasm.errors import ChiasmError, RecipeError, RunError
from chiasm.locks import locked
from chiasm.outputs import refuse_data_folder
from chiasm.prediction.case_files import places_of, warn_of_marks, write_dicom, write_volumes
from chiasm.prediction.engines import Engine, Hardware, freeze_for_inference
from chiasm.prediction.ensemble import (
    EXPECTED,
    average_models,
    check_agreement,
    common_average,
    common_roles,
    name_of,
)
from chiasm.prediction.inputs import as_volume, check_dicom, choose_role, find_cases, paths_among, read_roles
from chiasm.prediction.manifest import (
    Container,
    Entry,
    Failure,
    Manifest,
    Member,
    Role,
    container_named,
    digests,
    relative,
    write_manifest,
)
from chiasm.prediction.model import Model, load_model
from chiasm.prediction.model_files import find_model, named_classes, single_runs
from chiasm.prediction.resuming import Earlier, hash_inputs, take_over
from chiasm.prediction.synthesis import CompactSynthesis, Synthesis, synthesise_compactly
from chiasm.progress import Progress
from chiasm.recipe import Average
from chiasm.runners import Ray, Slurm, find_runner
from chiasm.storage import UNWRITABLE
from chiasm.volumes import Reading, Volume
from chiasm.volumes.screening import STRICT


@dataclass(frozen=True)
class Predicted:
    """The result of a prediction.

    Attributes:
        folder: Where the files lie.
        manifest: What `predictions.json` says of them.
        problems: Cases that failed, with file and reason.
        done: Cases that were predicted by this call.
        kept: Cases that an earlier call had predicted from the same files; they are not changed.
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
    """The options that change an image, beside model and files."""

    accelerator: str
    precision: str
    engine: str
    reading: Reading
    degrade: bool
    average: Average
    container: Container
    trust: tuple[str, ...]

    @property
    def options(self) -> dict[str, bool | str]:
        """The options without a field of their own in the manifest."""
        reading = {name.replace("_", "-"): value or False for name, value in asdict(self.reading).items()}
        return {
            **reading,
            "accelerator": self.accelerator,
            "precision": self.precision,
            "engine": self.engine,
            "average": self.average,
        }


class Predictor:
    """One loaded model or several, ready for volumes; keeps frozen copies of the networks.

    Args:
        model: From `load_model`.
        others: More of them, whose images are averaged with its own; see `check_agreement`.
        accelerator: "auto", "cpu" or "cuda".
        precision: "auto", "32-true", "bf16-mixed" or "16-mixed".
        engine: "auto", "torch", "openvino" or "onnxruntime".
        reading: What to assume of files whose headers leave a question open, beside what the model's plan says.
        average: "flip" for means over a volume and its mirror image, "none" for one pass, "auto" for what the recipes
            say.

    Raises:
        RunError: If "auto" means different averages for several models.
        RecipeError: If the average or the engine is unknown, or the engine has not this device or precision.
    """

    def __init__(
        self,
        model: Model,
        *others: Model,
        accelerator: str = "auto",
        precision: str = "auto",
        engine: str = "auto",
        reading: Reading = STRICT,
        average: str = "auto",
    ) -> None:
        self.average = common_average(average, (model, *others))
        self.reading = reading | model.plan.reading
        self.engine = Engine.pick(Hardware(accelerator, precision, engine))
        self.models = tuple(_frozen(one, self.engine) for one in (model, *others))
        self.model = self.models[0]

    def predict(
        self,
        *sources: Volume | Path | str,
        mask: Volume | None = None,
        degrade: bool = False,
        average: str = "auto",
    ) -> Synthesis:
        """Synthesise the target of one case; of several models the mean, with its spread.

        Args:
            *sources: One volume or file for each source of the model, in its order, on one grid.
            mask: Valid voxels on that grid; by default found as the plan says.
            degrade: For super-resolution: whether slices are thin and must be made thick first.
            average: "flip" for the mean over the volume and its mirror image, "none" for one pass, "auto" for
                what the predictor was made with.

        Raises:
            VolumeError: If a file cannot be read, a value is not finite, the grids differ, or the number of sources is
                wrong.
            CohortError: If the name of a file says that it is another modality.
            RecipeError: If `average` is unknown.
            TypeError: If a source is neither volume nor file, or the mask is no volume.
        """
        names = self.model.plan.sources
        volumes = (as_volume(one, names[min(place, len(names) - 1)], self.reading) for place, one in enumerate(sources))
        if not isinstance(mask, Volume | None):
            raise TypeError(f"a mask is a Volume, such as read_volume(FILE, labels=True), not {type(mask).__name__}")
        made = self.predict_compactly(volumes, mask=mask, degrade=degrade, average=average)
        return made if isinstance(made, Synthesis) else made.whole()

    def predict_compactly(
        self, volumes: Iterable[Volume], *, mask: Volume | None = None, degrade: bool = False, average: str = "auto"
    ) -> Synthesis | CompactSynthesis:
        """Synthesise as `predict` does; for one model, a volume is laid out only when it is used.

        Args:
            volumes: One for each source of the model, in its order, on one grid.
            mask: As for `predict`.
            degrade: Likewise.
            average: Likewise.

        Raises:
            VolumeError: As `predict`.
            RecipeError: Likewise.
        """
        chosen = self.average if average == "auto" else common_average(average, self.models)
        if len(self.models) > 1:
            return average_models(
                self.models, [*volumes], mask=mask, engine=self.engine, degrade=degrade, average=chosen
            )
        return synthesise_compactly(self.model, volumes, mask=mask, engine=self.engine, degrade=degrade, average=chosen)

    @property
    def takes_integers(self) -> bool:
        """Whether a source may keep its stored integers: no step needs float32 for all its voxels."""
        plans = [model.plan for model in self.models]
        return all(len(plan.sources) == 1 and plan.degradation is None for plan in plans)


def _frozen(model: Model, engine: Engine) -> Model:
    """Copy a model with networks that are ready for an engine."""
    generator, local, refiner, *earlier = (
        None if network is None else engine.place(freeze_for_inference(network))
        for network in (model.generator, model.local_discriminator, model.refiner, *model.earlier)
    )
    assert generator is not None
    kept = tuple(network for network in earlier if network is not None)
    return replace(model, generator=generator, local_discriminator=local, refiner=refiner, earlier=kept)


def load(
    path: Path | str | Sequence[Path | str],
    *,
    accelerator: str = "auto",
    precision: str = "auto",
    engine: str = "auto",
    reading: Reading = STRICT,
    average: str = "auto",
    trust: str | Collection[str] = (),
) -> Predictor:
    """Load a run or its model folder for prediction, or several whose images are averaged.

    Args:
        path: The folder, or a list of folders; the unit of the images is that of the first.
        accelerator: "auto", "cpu" or "cuda".
        precision: "auto", "32-true", "bf16-mixed" or "16-mixed".
        engine: "auto", "torch", "openvino" or "onnxruntime".
        reading: As for `Predictor`.
        average: Likewise.
        trust: Classes of others that a model may consist of, as ``package.module:Class``; their code is run.

    Raises:
        RunError: If there is no model, it is damaged, its network is code that `trust` does not name, or several do
            not agree, in their averages of mirror images too.
        RecipeError: If an average or an engine is unknown, or the engine is not installed, or has not this device or
            precision.
    """
    Engine.pick(Hardware(accelerator, precision, engine))  # a refusal comes before the work
    models = load_models([path] if isinstance(path, (Path, str)) else path, trust)
    return Predictor(
        *models, accelerator=accelerator, precision=precision, engine=engine, reading=reading, average=average
    )


def load_models(runs: Sequence[Path | str], trust: str | Collection[str] = ()) -> tuple[Model, ...]:
    """Load models whose images can be averaged.

    Raises:
        RunError: If one is missing or damaged, or they do not agree.
        ValueError: If there is none.
    """
    places = single_runs(map(Path, runs))
    if not places:
        raise ValueError("no model is given")
    models = tuple(load_model(place, trust=trust) for place in places)
    check_agreement(models, places)
    return models


def predict(
    run: Path | Sequence[Path],
    inputs: Sequence[Path | Case],
    out: Path,
    *,
    only: str = "all",
    accelerator: str = "auto",
    precision: str = "auto",
    engine: str = "auto",
    layout: str | None = None,
    series: Sequence[str] = (),
    select: Sequence[str] = (),
    reading: Reading = STRICT,
    container: Container = "volume",
    runner: str = "serial",
    degrade: bool = False,
    average: str = "auto",
    overwrite: bool = False,
    trust: str | Collection[str] = (),
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Predicted:
    """Predict every case found in `inputs`; a case that fails is reported, and the others are predicted.

    Each case gives `<case>_<target>`, `<case>_expected-error` (where the model has
    a local discriminator), `<case>_spread` (of several models) and `<case>_mask` on the source's grid, in its format
    (NIfTI for DICOM), for super-resolution with each of its slices cut into thin
    ones; as DICOM, the folder `<case>` of `write_dicom_case`.  The manifest is
    written as cases are done: the same call again goes on, and keeps what the
    folder holds of the same model, files and options.

    Args:
        run: A run folder or its model folder, or several whose images are averaged, as are those of a run of several
            models.
        inputs: Files (one case for each group of as many files as the model
            has sources), folders of files, or cohorts; folders, archives and files of DICOM series; single cases.
        out: Where the results go.
        only: "all", or the cases of a role in the run's split: "train", "validation", "out-of-fold", "test" or
            "locked".
        accelerator: "auto", "cpu" or "cuda".
        precision: "auto", "32-true", "bf16-mixed" or "16-mixed".
        engine: "auto", "torch", "openvino" or "onnxruntime".
        layout: Name of a layout, where a folder fits several.
        series: Which DICOM series is which source, as ``t1=WORDS``, or ``WORDS`` for the only source.
        select: Words of the names of files that are taken where a case has several for one source; by default as
            in training.
        reading: What to assume of files whose headers leave a question open, beside what the model's plan says.
        container: "volume" for the format of the source (NIfTI for DICOM), "nifti", "metaimage", "nrrd", "mgz", or
            "dicom", which needs DICOM sources.
        runner: A name of `runners.RUNNERS`: where cases are predicted.
        degrade: For super-resolution: whether slices are thin and are made thick first, to test the model.
        average: "flip" for the mean over each volume and its mirror image, "none" for one pass, "auto" for what the
            model's recipe says.
        overwrite: Whether to replace predictions in `out` of another model, of other files or with other options.
        trust: As for `load`.
        progress: Called with cases done, all cases, the last case's id.
        say: Called with a line that names the engine and why it was chosen.

    Raises:
        RunError: If there is no model, it is damaged, its network is code that `trust` does not name, several models
            do not agree, a role is asked for and the split is unknown, the runner cannot run here, another process
            writes to `out`, `out` is a folder of the data, or it holds what does not belong to this prediction and
            `overwrite` is False.
        ChiasmError: If `out` cannot be written, as when the disk is full.
        RecipeError: If a role, a format, a runner or `average` is unknown, `degrade` is asked of a model that is not
            for super-resolution, `series` names no source, or the engine is unknown, not installed, or has not this
            device or precision.
        CohortError: If there is no input, or one holds no case.
        VolumeError: If DICOM is asked for and a source is none.
    """
    container, gpus = container_named(container), int(accelerator == "cuda")
    spread = find_runner(runner, {"slurm": Slurm(gpus_per_node=gpus), "ray": Ray(num_gpus=gpus)})
    chosen = Engine.pick(Hardware(accelerator, precision, engine))
    if say is not None:
        say(chosen.announce())
    runs = single_runs([run] if isinstance(run, Path) else run)
    refuse_data_folder(out, paths_among(inputs))
    with locked(out):
        models = load_models(runs, trust)
        model = models[0]
        averaged = common_average(average, models)
        settings = Settings(accelerator, precision, engine, reading, degrade, averaged, container, named_classes(trust))
        _check_degrade(degrade, model, runs[0])
        roles = common_roles(map(read_roles, runs))
        selection = Selection(series=parse_rules(series, model.plan.sources), select=select, reading=reading)
        found = choose_role(find_cases(inputs, model, layout, selection), only, roles, runs[0], inputs)
        if container == "dicom":
            check_dicom(found.cases)
        fresh = _manifest(out, runs, models, settings, tuple(case.id for case in found.cases))
        earlier = take_over(out, fresh, places_of(found.cases, model.plan, container), overwrite=overwrite)
        progressing = _Progressing(out, fresh, earlier, found.problems)
        due = [case for case in found.cases if case.id not in earlier.entries]
        places = tuple(one.resolve() for one in runs)
        do = partial(_work, runs=places, sha256=fresh.sha256, out=out.resolve(), roles=roles, settings=settings)
        for number, outcome in enumerate(_outcomes(spread(due, do, out), model.plan.sources[0]), 1):
            progressing.note(outcome)
            if progress is not None:
                progress(number, len(due), outcome.case or "")
    return progressing.result(due, tuple(notes_in_lines(found.notes, ("several", *LOST))))


def _check_degrade(degrade: bool, model: Model, run: Path) -> None:
    if degrade and model.plan.degradation is None:
        raise RecipeError("only a model for super-resolution can degrade its input", path=run, reason="task")


def _manifest(
    out: Path, runs: Sequence[Path], models: Sequence[Model], settings: Settings, cases: tuple[str, ...]
) -> Manifest:
    """Return the manifest of a prediction before its first case."""
    members = [
        Member(
            relative(find_model(run), out),
            model.sha256,
            model.recipe.method,
            model.recipe.training.seed,
            model.recipe.split.fold,
        )
        for run, model in zip(runs, models, strict=True)
    ]
    first, model, several = members[0], models[0], len(models) > 1
    named = name_of(models)
    return Manifest(
        model=first.model,
        sha256=named.sha256,
        method=named.method,
        seed=first.seed,
        fold=first.fold,
        sources=model.plan.sources,
        target=model.plan.target,
        unit=model.plan.target_unit,
        cases=(),
        failed=(),
        container=settings.container,
        degraded=settings.degrade,
        options=settings.options | ({"expected-error": EXPECTED} if several else {}),
        pending=cases,
        written_in=str(out.resolve()),
        models=tuple(members) if several else (),
    )


class _Progressing:
    """The manifest of a prediction, written anew with every case that is done."""

    def __init__(self, out: Path, fresh: Manifest, earlier: Earlier, problems: list[Problem]) -> None:
        self.out, self.fresh, self.earlier, self.problems = out, fresh, earlier, problems
        self.entries = dict(earlier.entries)
        self.write()

    def note(self, outcome: Entry | Problem) -> None:
        """Add the outcome of a case."""
        if isinstance(outcome, Problem):
            self.problems.append(outcome)
        else:
            self.entries[outcome.case] = outcome
        self.write()

    def result(self, due: Sequence[Case], notes: tuple[str, ...]) -> Predicted:
        """Return the result: the cases predicted now, and the cases kept from before."""
        kept = tuple(name for name in self.fresh.pending if name in self.earlier.entries)
        done = tuple(case.id for case in due if case.id in self.entries)
        return Predicted(self.out, self.manifest, tuple(self.problems), done, kept, self.earlier.damaged, notes)

    def write(self) -> None:
        """Write `predictions.json`: the cases of this call in their order, then earlier ones."""
        asked = self.fresh.pending
        done = [name for name in dict.fromkeys((*asked, *self.entries)) if name in self.entries]
        failed = _failures(self.problems)
        over = {*done, *(failure.case for failure in failed)}
        self.manifest = replace(
            self.fresh,
            cases=tuple(self.entries[name] for name in done),
            failed=(*self.earlier.failed, *failed),
            pending=tuple(name for name in asked if name not in over),
        )
        write_manifest(self.out, self.manifest)


def _failures(problems: Iterable[Problem]) -> tuple[Failure, ...]:
    return tuple(Failure(one.case, str(one.path), one.reason, one.message) for one in problems)


def _outcomes(reports: Iterable[Entry | Problem | Lost[Case]], source: str) -> Iterator[Entry | Problem]:
    """Yield the outcome of each case; wait for a lost case that is tried again.

    Raises:
        ChiasmError: If a result could not be written, as no other case would fare better.
    """
    for report in reports:
        if not isinstance(report, Lost):
            if isinstance(report, Problem) and report.reason == UNWRITABLE:
                raise ChiasmError(report.message.rstrip("."), reason=UNWRITABLE)
            yield report
        elif not report.again:
            yield _lost_for_good(report, source)


def _lost_for_good(lost: Lost[Case], source: str) -> Problem:
    case, hint = lost.job, " Use a machine with more memory." if lost.may_lack_memory else ""
    return Problem(case.images[source], "lost", f"case {case.id}: {lost}.{hint}", case.id)


def _work(
    case: Case, *, runs: tuple[Path, ...], sha256: str, out: Path, roles: Mapping[str, Role], settings: Settings
) -> Entry | Problem:
    """Predict one case in this process; each process loads the model once."""
    predictor = _loaded(runs, sha256, settings)
    try:
        entry = _predict_case(predictor, case, out, roles.get(case.id, "new"), settings)
        inputs = hash_inputs(case, predictor.model.plan.sources)
        return replace(entry, sha256=digests(out, entry), inputs=inputs)
    except ChiasmError as error:
        path = error.path or case.images[predictor.model.plan.sources[0]]
        return Problem(path, error.reason, f"case {case.id}: {error}", case.id)


@lru_cache(maxsize=1)
def _loaded(runs: tuple[Path, ...], sha256: str, settings: Settings) -> Predictor:
    predictor = load(
        runs,
        accelerator=settings.accelerator,
        precision=settings.precision,
        engine=settings.engine,
        average=settings.average,
        trust=settings.trust,
    )
    if name_of(predictor.models).sha256 != sha256:
        raise RunError("changed while cases were predicted", path=runs[0], reason="changed")
    return predictor


def _predict_case(predictor: Predictor, case: Case, out: Path, role: Role, settings: Settings) -> Entry:
    plan = predictor.model.plan
    volumes = (read_case_image(case, name, narrow=predictor.takes_integers) for name in plan.sources)
    mask = None if case.mask is None else read_case_labels(case, case.mask)
    made = predictor.predict_compactly(volumes, mask=mask, degrade=settings.degrade)
    made = replace(made, warnings=(*warn_of_marks(case, plan.sources), *made.warnings))
    if settings.container == "dicom":
        whole = made if isinstance(made, Synthesis) else made.whole()
        written = write_dicom(whole, case, out, predictor.models)
    else:
        written = write_volumes(made, case, out, plan, settings.container)
    sources_from = tuple(relative(case.images[name], out) for name in plan.sources)
    return Entry(case.id, role, sources_from, **written._asdict(), mask_rule=made.mask_rule, engine=made.engine)
