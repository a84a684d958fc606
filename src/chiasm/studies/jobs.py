"""What a study consists of: independent jobs, each named by what it depends on.

A job is "run this recipe on this fold with this seed in this folder".  Its
folder is named by a hash of recipe, data and code version, so a job that was
done is recognised wherever the study file is edited or the study killed.  Arms
of one fold and seed branch from shared warm-ups, so that they meet the same
weights and batches and can be compared in pairs: first the generator alone,
then, where an arm has discriminators, those alone.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from chiasm import __version__
from chiasm.cohorts.cases import Cohort, reading_of, side_alone
from chiasm.cohorts.discovery import find_cohort, select_cases, selection_of
from chiasm.cohorts.splits import sites_of
from chiasm.errors import ChiasmError, CohortError, RecipeError
from chiasm.evaluation.predictions import score_folder
from chiasm.evaluation.reliability import judge_maps
from chiasm.evaluation.scoring import write_evaluation
from chiasm.networks.catalogue import OWN
from chiasm.prediction.baselines import NAMES
from chiasm.prediction.folders import predict
from chiasm.prediction.tiling import is_out_of_memory
from chiasm.preparation.planning import read_plan, write_plan
from chiasm.recipe import ALIASES, ARMS, Attention, Loss, Recipe, Section, arm_in_words, find_arm, make_recipe
from chiasm.runners import Ray, Slurm
from chiasm.simulation.lesions import REGIONS
from chiasm.simulation.phantom import Movement, write_cohort
from chiasm.storage import read_facts, read_toml, sha256_of, write_json
from chiasm.training.players import check_players, needs_local_judge
from chiasm.training.run import registered_in, train
from chiasm.volumes.dicom_series import is_dicom
from chiasm.volumes.screening import volume_files

#: Raised by one whenever the same recipe and data would give other figures.
REVISION = 2
#: What to do where jobs are killed for memory.
LESS_MEMORY = "A smaller size, or data.patch and training.batch in set, need less memory."
WARM_UP = "A1"  # the arm whose beginning all share: the generator alone
BATCHES = ("body_share", "lesion_share", "transplant_share", "transplant")  # its batches are the same for all arms

Kind = Literal["generator", "judges", "arm", "reliability"]
STAGES: tuple[Kind, ...] = ("generator", "judges", "arm", "reliability")
WHOLE = ("mask", "image", "healthy", "edges", "lesion-edge")  # regions that every cohort has


def _own_name(arm: str) -> str:
    """Call an arm of the table by its own name; what is none of them may be a variant."""
    return find_arm(arm) if arm.lower() in {name.lower() for name in (*ARMS, *ALIASES)} else arm


Arm = Annotated[str, AfterValidator(_own_name)]


class Primary(Section):
    """The one comparison that was declared before the study ran."""

    arm: Arm
    against: Arm
    metric: str = "mae"
    region: str = "mask"


class Phantom(Section):
    """A simulated cohort in the place of a folder."""

    subjects: Annotated[int, Field(ge=2)]
    seed: int = 0
    difficulty: str = "standard"
    spacing_mm: float = 2.0
    misregistration_mm: Annotated[float, Field(ge=0)] | None = None  # as the difficulty says
    movement: Movement = "elastic"


class Study(Section):
    """What a study file says."""

    data: Path | None = None
    phantom: Phantom | None = None
    reference: Literal["held"] | Path | None = None  # what is scored against, as it lies; held: had nobody moved
    sources: Annotated[tuple[str, ...], Field(min_length=1, alias="source")]
    target: str
    arms: Annotated[tuple[Arm, ...], Field(min_length=1)]
    variants: Mapping[str, Annotated[tuple[str, ...], Field(min_length=1)]] = {}  # name: an arm, then its own settings
    folds: Annotated[int, Field(ge=2)] | Literal["site"] = 5
    only_folds: tuple[int, ...] | None = None
    sealed: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    size: str = "small"
    steps: Annotated[int, Field(ge=1)] | None = None
    warmup: Literal["shared", "own"] = "shared"
    threads: Annotated[int, Field(ge=1)] = 1
    settings: Annotated[tuple[str, ...], Field(alias="set")] = ()
    primary: Primary | tuple[Primary, ...] = ()
    reliability: Arm | None = None
    layout: str | None = None
    slurm: Slurm | None = None  # what a job asks of a cluster
    ray: Ray | None = None

    @property
    def declared(self) -> tuple[Primary, ...]:
        """All primary comparisons."""
        return (self.primary,) if isinstance(self.primary, Primary) else self.primary

    def build(self, arm: str, changes: Mapping[str, object]) -> Recipe:
        """Resolve an arm or a variant.

        Raises:
            RecipeError: If it, its size or a setting is unknown or out of range.
        """
        if arm not in self.variants:
            return make_recipe(arm, self.size, changes, self.settings)
        base, *own = self.variants[arm]
        return make_recipe(base, self.size, {**changes, "method": arm}, [*self.settings, *own])

    @property
    def in_words(self) -> dict[str, str]:
        """What each arm is, by name."""
        told = {arm: arm_in_words(arm) for arm in self.arms if arm not in self.variants}
        for name, (base, *own) in self.variants.items():
            told[name] = f"{find_arm(base)} with {', '.join(own) or 'nothing changed'}"
        return {arm: told[arm] for arm in self.arms}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.data is None) == (self.phantom is None):
            raise ValueError("give either data, a folder, or phantom, a simulated cohort")
        if self.reference == "held" and (self.phantom is None or self.phantom.movement == "held"):
            raise ValueError("only simulated patients who moved are known as if they had not: reference is a folder")
        if self.reference is not None and self.reliability is not None:
            raise ValueError("reliability is judged on the cohort itself: leave out reference, or reliability")
        for listed in (self.arms, self.seeds):
            if len(set(listed)) != len(listed):
                raise ValueError(f"something stands twice: {', '.join(map(str, listed))}")
        for name in self.variants:
            if name in NAMES or name != _own_name(name) or name in ARMS:
                raise ValueError(f"the variant {name!r} is called like an arm or a baseline that is there already")
            if name not in self.arms:
                raise ValueError(f"the variant {name!r} is none of the arms")
        if self.reliability is not None and self.reliability not in self.arms:
            raise ValueError(f"the map of {self.reliability!r} is to be judged, which is none of the arms")
        for one in self.declared:
            for arm in (one.arm, one.against):
                if arm not in self.arms:
                    raise ValueError(f"the primary comparison names {arm!r}, which is none of the arms")
        return self


@dataclass(frozen=True)
class Job:
    """One training with its prediction and scores, one shared warm-up, or the judgement of a fold's reliability maps.

    Attributes:
        key: Hash of everything it depends on; the name of its folder.
        kind: What it does.
        arm: Of the method table, or what it warms up.
        fold: Which.
        seed: Of weights and batches.
        recipe: Resolved.
        folder: Where it works.
        warm: Folder of the warm-up that it branches from, or None.
        first: Whether it scores the naive baselines too.
        runs: Folders of the trainings, one a seed, whose maps it judges.
    """

    key: str
    kind: Kind
    arm: str
    fold: int
    seed: int
    recipe: Recipe
    folder: Path
    warm: Path | None = None
    first: bool = False
    runs: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """What to call it on the screen."""
        if self.kind == "reliability":
            return f"reliability of {self.arm} fold {self.fold}"
        return f"{self.arm if self.kind == 'arm' else f'warm-up ({self.kind})'} fold {self.fold} seed {self.seed}"

    @property
    def is_done(self) -> bool:
        """Whether it left its mark; a killed job did not, and one whose mark is damaged is looked at again."""
        return bool(self.spent)

    @property
    def spent(self) -> dict[str, float]:
        """Seconds of its training and of its scoring; empty before it is done."""
        marked = read_facts(self.folder / "done.json")
        names = ("training_seconds", "scoring_seconds")
        if not all(isinstance(marked.get(name), (int, float)) for name in names):
            return {}
        return {name: float(marked[name]) for name in names}

    @property
    def steps(self) -> int:
        """Steps that are its own: what its warm-ups did, it does not do again."""
        ends = self.recipe.schedule.ends
        if self.kind == "reliability":
            return 0
        if self.kind != "arm":
            return ends[self.kind] - (ends["generator"] if self.kind == "judges" else 0)
        warm = "judges" if has_judges(self.recipe) else "generator"
        return self.recipe.schedule.steps - (ends[warm] if self.warm is not None else 0)


@dataclass(frozen=True)
class Outcome:
    """What came of a job: its name, and what went wrong, or None; and the code of what went wrong, where it has one."""

    key: str
    name: str
    error: str | None
    reason: str | None = None


def read_study(path: Path) -> Study:
    """Read a study file; relative `data` and `reference` are looked up beside the file.

    Raises:
        RunError: If the file is missing or not TOML.
        RecipeError: If a setting is unknown, missing or impossible.
    """
    try:
        study = Study.model_validate(read_toml(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "study"
        raise RecipeError(
            f"{where}: {first['msg'].removeprefix('Value error, ')}", path=path, reason="study"
        ) from error
    named = {name: getattr(study, name) for name in ("data", "reference")}
    beside = {name: (path.parent / told).resolve() for name, told in named.items() if isinstance(told, Path)}
    return study.model_copy(update=beside)


def data_folder(study: Study, out: Path) -> Path:
    """Return the folder of a study's cases; a simulated cohort lies in the study's own."""
    return out / "cohort" if study.data is None else study.data


def reference_folder(study: Study, out: Path) -> Path | None:
    """Return the folder that predictions are held against as it lies; None for the cohort itself."""
    return out / "unmoved" if study.reference == "held" else study.reference


def find_cases(study: Study, out: Path) -> Cohort | None:
    """Find a study's cases; None where its cohort is not simulated yet.

    Raises:
        CohortError: If the folder holds no such cases.
    """
    folder = data_folder(study, out)
    if study.phantom is not None and not (folder / "cohort.json").exists():
        return None
    return select_cases(_find(study, folder), study.sources, study.target)


def _find(study: Study, folder: Path) -> Cohort:
    recipe = _recipe(study, study.arms[0], 1, 0, 0)
    selection = selection_of(recipe, remember=folder == study.reference)
    return find_cohort(folder, layout=study.layout, selection=selection)


def simulate(phantom: Phantom, folder: Path, *, movement: Movement | None = None) -> None:
    """Write a simulated cohort, or finish one.

    Args:
        phantom: What is asked for.
        folder: Where it goes.
        movement: In place of the phantom's own.

    Raises:
        RecipeError: If a setting is out of range.
    """
    write_cohort(
        folder,
        subjects=phantom.subjects,
        seed=phantom.seed,
        difficulty=phantom.difficulty,
        spacing_mm=phantom.spacing_mm,
        misregistration_mm=phantom.misregistration_mm,
        movement=movement or phantom.movement,
    )


def list_jobs(study: Study, out: Path, cohort: Cohort | None) -> list[Job]:
    """List a study's jobs, warm-ups first; everything that can be refused is refused here.

    Args:
        study: What is asked for.
        out: The study's folder.
        cohort: Its cases; None for a simulated cohort that is not written yet.

    Raises:
        RecipeError: If an arm, size or setting is unknown.
        CohortError: If there are fewer subjects than folds, a fold does not exist,
            sites are not known, or no case has the primary region.
    """
    folds = _count_folds(study, cohort)
    regions = set(WHOLE) | set(REGIONS if cohort is None else cohort.regions)
    for one in study.declared:
        if one.region not in regions:
            raise CohortError(
                f"has no region {one.region!r}, which the primary comparison is about",
                path=study.data,
                reason="no-region",
                expected=", ".join(sorted(regions)),
            )
    _check_reference(study, folds)
    content = _fingerprint(study, cohort)
    jobs: dict[str, Job] = {}
    for fold in range(folds) if study.only_folds is None else study.only_folds:
        for seed in study.seeds:
            for index, arm in enumerate(study.arms):
                recipe = _recipe(study, arm, folds, fold, seed)
                check_players(recipe)
                warm: Path | None = None
                if study.warmup == "shared" and recipe.generator.stages == 1:  # a cascade begins on fewer cases
                    base = _recipe(study, WARM_UP, folds, fold, seed)
                    for kind, beginning in _warm_ups(recipe, base):
                        warm_up = _job(out, kind, beginning, content, study.threads, warm, False)
                        jobs[warm_up.key], warm = warm_up, warm_up.folder
                # the naive baselines are scored once a fold and seed, with the first arm
                job = _job(out, "arm", recipe, content, study.threads, warm, index == 0)
                jobs[job.key] = job
    judging = _reliability_jobs(study, out, list(jobs.values()))
    return sorted([*jobs.values(), *judging], key=lambda job: STAGES.index(job.kind))


def _check_reference(study: Study, folds: int) -> None:
    """Refuse arms that would be scored against differently registered images: they could not be compared."""
    recipes = {arm: _recipe(study, arm, folds, 0, study.seeds[0]) for arm in study.arms}
    data = {arm: recipe.data for arm, recipe in recipes.items()}
    if len({(reading_of(r.data), r.data.select, r.split.subject_pattern) for r in recipes.values()}) > 1:
        raise RecipeError(
            "all arms must choose and read the files of the cohort alike",
            reason="reading",
            hint="Set data.form, assume_ras, resample, resample_tilt, select and split.subject_pattern for all arms, "
            "not in a variant.",
        )
    kinds = {arm: one.registration for arm, one in data.items()}
    if study.reference is None and len(set(kinds.values())) > 1:
        raise RecipeError(
            "arms that register differently must be scored against the same images",
            reason="reference",
            found=", ".join(f"{arm}: {kind}" for arm, kind in kinds.items()),
            hint='Give reference = "FOLDER", or "held" for simulated patients.',
        )


def _reliability_jobs(study: Study, out: Path, jobs: Sequence[Job]) -> list[Job]:
    """Judge the maps of one arm, once a fold, with all its seeds as an ensemble."""
    if study.reliability is None:
        return []
    folds: dict[int, list[Job]] = {}
    for job in jobs:
        if job.kind == "arm" and job.arm == study.reliability:
            folds.setdefault(job.fold, []).append(job)
    made = []
    for fold, trained in folds.items():
        recipe, runs = trained[0].recipe, tuple(job.folder for job in trained)
        if recipe.data.task == "super-resolution":
            raise RecipeError(
                "the reliability map's rivals are not judged for super-resolution yet",
                reason="reliability",
                hint="Leave reliability out of the study.",
            )
        key = hashlib.sha256(json.dumps(["reliability", *(job.key for job in trained)]).encode()).hexdigest()[:16]
        name, seed, folder = study.reliability, recipe.training.seed, out / "jobs" / key
        made.append(Job(key, "reliability", name, fold, seed, recipe, folder, runs=runs))
    return made


def _count_folds(study: Study, cohort: Cohort | None) -> int:
    if study.folds == "site":
        if cohort is None:
            raise CohortError(
                "the sites of a simulated cohort are known once it is written",
                reason="no-site",
                hint="Write it with chiasm phantom and give its folder as data.",
            )
        folds = len(sites_of(cohort.cases))
    elif cohort is not None and any(case.split == "test" for case in cohort.cases):
        folds = 1  # whoever is fixed to test is tested in every fold
    else:
        folds = study.folds
        subjects = study.phantom.subjects if study.phantom else len({case.subject for case in cohort.cases})  # type: ignore[union-attr]
        if subjects < folds:
            raise CohortError(
                "has fewer subjects than the study has folds",
                path=study.data,
                reason="folds",
                found=subjects,
                expected=f"at least {folds}",
            )
    if odd := [fold for fold in study.only_folds or () if not 0 <= fold < folds]:
        raise CohortError(
            f"the study has no fold {odd[0]}", path=study.data, reason="folds", expected=f"0 to {folds - 1}"
        )
    return folds


def _recipe(study: Study, arm: str, folds: int, fold: int, seed: int) -> Recipe:
    changes: dict[str, object] = {
        "data.sources": study.sources,
        "data.target": study.target,
        "split.by": "site" if study.folds == "site" else "subject",
        "split.folds": folds,
        "split.fold": fold,
        "split.sealed": study.sealed,
        "training.seed": seed,
    }
    if study.steps is not None:
        changes["schedule.steps"] = study.steps
    return study.build(arm, changes)


def has_judges(recipe: Recipe) -> bool:
    """Tell whether an arm trains any discriminator."""
    return recipe.loss.global_weight > 0 or recipe.loss.local_weight > 0 or needs_local_judge(recipe)


def _warm_ups(recipe: Recipe, base: Recipe) -> list[tuple[Kind, Recipe]]:
    """Return the beginnings that an arm shares with others, as recipes that hold only what they depend on."""
    if recipe.optimiser.kind == "admm":
        return []  # a sparse coder shares nothing with networks
    network = recipe.generator.model_copy(update={"refiner": ()})
    usual_batches = {name: getattr(base.training, name) for name in BATCHES}
    changes: dict[str, object] = {
        "data": recipe.data,
        "generator": network,
        "training": recipe.training.model_copy(update=usual_batches),
        "schedule": recipe.schedule,
        "optimiser": base.optimiser.model_copy(
            update={name: getattr(recipe.optimiser, name) for name in ("generator_rate", "betas", "average")}
        ),
    }
    beginning = base.model_copy(update=changes)
    found: list[tuple[Kind, Recipe]] = [("generator", beginning)]
    if has_judges(recipe):
        asked, usual, local = recipe.loss, Loss(), needs_local_judge(recipe)
        loss = base.loss.model_copy(
            update={
                "global_weight": usual.global_weight if asked.global_weight > 0 else 0.0,
                "local_weight": usual.local_weight if asked.local_weight > 0 else 0.0,
                "adversarial": asked.adversarial,
                "smoothing": asked.smoothing,
                "penalty": asked.penalty,
                "penalty_every": asked.penalty_every,
                "clip": asked.clip,
            }
        )
        attention = Attention(
            target="structured" if local else "none",
            magnitude_mm=recipe.attention.magnitude_mm,
            structured_mm=recipe.attention.structured_mm,
        )
        changes = {
            "loss": loss,
            "attention": attention,
            "discriminators": recipe.discriminators,
            "optimiser": recipe.optimiser,
        }
        found.append(("judges", beginning.model_copy(update=changes)))
    ends = recipe.schedule.ends
    before = {"generator": 0, "judges": ends["generator"]}
    return [(kind, one) for kind, one in found if ends[kind] > before[kind]]  # of few steps a phase may have none


def _job(out: Path, kind: Kind, recipe: Recipe, content: str, threads: int, warm: Path | None, first: bool) -> Job:
    asked = recipe.model_dump(mode="json", exclude_defaults=True)  # a setting that comes later changes no key
    for section, network in (
        ("generator", recipe.generator.network),
        ("discriminators", recipe.discriminators.global_network),
    ):
        if network == OWN and section in asked:  # widths shape these; the scale is of the literature's
            asked[section].pop("scale", None)
            if not asked[section]:
                del asked[section]
    depends = [__version__, REVISION, kind, content, asked, threads, warm and warm.name, first]
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    name = recipe.method if kind == "arm" else kind
    return Job(key, kind, name, recipe.split.fold, recipe.training.seed, recipe, out / "jobs" / key, warm, first)


def _hashed(path: Path) -> str:
    """Hash a volume; a DICOM series by its slices."""
    return ",".join(map(sha256_of, volume_files(path))) if is_dicom(path) else sha256_of(path)


def _fingerprint(study: Study, cohort: Cohort | None) -> str:
    """Hash the files that a study reads, by content; of a simulated cohort, what it is made from."""
    against = "" if study.reference is None else "held"
    if isinstance(study.reference, Path):
        real = _find(study, study.reference)
        against = _contents(select_cases(real, (study.target,), None), (study.target,))
    if study.phantom is not None:
        later = {"misregistration_mm": None, "movement": "elastic"}  # as jobs of before have it, which are still found
        usual = {name for name, value in later.items() if getattr(study.phantom, name) == value}
        return study.phantom.model_dump_json(exclude=usual) + against
    assert cohort is not None
    names = (*study.sources, study.target)
    if any(_recipe(study, arm, 1, 0, 0).optimiser.kind == "admm" for arm in study.arms):
        found = _find(study, cohort.root)
        alone = tuple(case for case in found.cases if side_alone(case, study.sources, study.target))
        against += _contents(replace(found, cases=alone), names) if alone else ""
    return _contents(cohort, names) + against


def _contents(cohort: Cohort, names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for case in sorted(cohort.cases, key=lambda case: case.id):
        files = [*(case.images.get(name) for name in names), case.mask, case.labels]
        soft = [] if case.label_threshold is None else [str(case.label_threshold)]
        parts = [case.id, case.subject, *(_hashed(file) if file else "-" for file in files), *soft]
        digest.update("\0".join(parts).encode())
    return digest.hexdigest()


def work(
    job: Job,
    *,
    data: Path,
    out: Path,
    threads: int,
    layout: str | None,
    opened: bool = False,
    reference: Path | None = None,
    trust: Collection[str] = (),
) -> Outcome:
    """Do a job, or recognise that it was done; what goes wrong is told, not raised.

    Args:
        job: What to do.
        data: Folder of the cases.
        out: The study's folder.
        threads: Of torch and numpy, the same on every machine, so that figures are.
        layout: Name of a layout, where `data` fits several.
        opened: Whether to score the sealed test set as well.
        reference: Folder that is scored against as it lies; None for `data`, registered as the job's recipe says.
        trust: Classes of others that a model may consist of, beside the job's own.
    """
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    trusted = (*trust, job.recipe.generator.network)
    try:
        with threadpool_limits(threads):  # numpy's products too: two jobs with two threads each are three times slower
            if not job.is_done:
                if job.kind == "reliability":
                    _judge(job, data, out, layout, trusted)
                else:
                    _train(job, data, out, layout, reference, trusted)
            if opened and job.kind == "arm" and not (sealed_folder(job) / "evaluation.csv").exists():
                _score(job, data, out, layout, "sealed", sealed_folder(job), reference, trusted)
    except ChiasmError as error:
        return Outcome(job.key, job.name, str(error), error.reason)
    except (MemoryError, OSError, RuntimeError) as error:  # a machine that is too small costs the job, not the study
        return Outcome(job.key, job.name, _shortage(error))
    finally:
        torch.set_num_threads(before)
    return Outcome(job.key, job.name, None)


def _shortage(error: MemoryError | OSError | RuntimeError) -> str:
    """Describe a lack of memory, or a disk that is full or gone; what is neither is raised again."""
    if is_out_of_memory(error):
        return f"memory ran out. {LESS_MEMORY}"
    if isinstance(error, OSError):
        return f"{error.filename or 'the disk'}: {error.strerror or error}."
    raise error


def sealed_folder(job: Job) -> Path:
    """Return where a job's figures on the sealed test set lie."""
    return job.folder / "sealed"


def _train(job: Job, data: Path, out: Path, layout: str | None, reference: Path | None, trust: Collection[str]) -> None:
    start = time.monotonic()
    if job.warm is not None:
        _share_plan(job.warm, job.folder)
    until = None if job.kind == "arm" else job.recipe.schedule.ends[job.kind]
    train(
        data,
        job.recipe,
        job.folder,
        say=_silence,
        layout=layout,
        cache=out / "cache",
        start=job.warm,
        until=until,
    )
    trained = time.monotonic()
    if job.kind == "arm":
        _score(job, data, out, layout, "test", job.folder, reference, trust)
    _mark_done(job, trained - start, time.monotonic() - trained)


def _judge(job: Job, data: Path, out: Path, layout: str | None, trust: Collection[str]) -> None:
    start = time.monotonic()
    rows = judge_maps(job.runs, data, layout=layout, cache=out / "cache", trust=trust)
    write_evaluation(job.folder, rows)
    _mark_done(job, 0.0, time.monotonic() - start)


def _mark_done(job: Job, training: float, scoring: float) -> None:
    seconds = {"training_seconds": round(training, 1), "scoring_seconds": round(scoring, 1)}
    write_json(job.folder / "done.json", {"name": job.name, "version": __version__, "steps": job.steps, **seconds})


def _score(
    job: Job,
    data: Path,
    out: Path,
    layout: str | None,
    role: str,
    folder: Path,
    reference: Path | None,
    trust: Collection[str],
) -> None:
    """Predict the cases of a role and score them.

    Raises:
        ChiasmError: If a case cannot be predicted or scored: arms must be compared on the same ones.
    """
    thick = job.recipe.data.task == "super-resolution"
    predict(job.folder, [data], folder / "predictions", only=role, layout=layout, degrade=thick, trust=trust)
    rows, problems, remarks = score_folder(
        folder / "predictions",
        reference or data,
        layout=layout,
        naive=job.first,
        register=None if reference is None else "none",
        registered=registered_in(job.folder, job.recipe, out / "cache"),
    )
    if problems:
        raise CohortError(problems[0].message, reason=problems[0].reason)
    write_evaluation(folder, rows, remarks)


def _share_plan(warm: Path, folder: Path) -> None:
    """Start from the warm-up's plan: same fold, same data, so nothing is measured twice."""
    if (warm / "plan.toml").exists() and not (folder / "plan.toml").exists():
        write_plan(folder / "plan.toml", read_plan(warm / "plan.toml"))


def _silence(line: str) -> None:
    """Say nothing: a study tells of its jobs, not of their insides."""
    del line
