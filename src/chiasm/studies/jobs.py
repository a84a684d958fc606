"""The jobs of a study: independent, and each named by a hash of what it depends on.

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from chiasm import __version__
from chiasm.checksums import sha256_of
from chiasm.cohorts.cases import Cohort, grouped, reading_of, side_alone
from chiasm.cohorts.discovery import find_cohort, select_cases, selection_of
from chiasm.cohorts.splits import sites_of
from chiasm.errors import CohortError, RecipeError
from chiasm.networks.catalogue import OWN
from chiasm.recipe import Attention, Loss, Recipe, SplitSettings
from chiasm.simulation.lesions import REGIONS
from chiasm.storage import read_facts
from chiasm.studies.study_file import WHOLE, Study, data_folder
from chiasm.training.players import check_players, needs_local_discriminator
from chiasm.volumes.dicom_scan import is_dicom
from chiasm.volumes.screening import volume_files

#: Raised by one whenever the same recipe and data would give other scores.
REVISION = 2
#: What to do where jobs are killed for memory.
LESS_MEMORY = "A smaller size, or data.patch and training.batch in set, need less memory."
WARM_UP = "A1"  # the arm whose beginning all share: the generator alone
BATCHES = ("body_share", "lesion_share", "transplant_share", "transplant")  # its batches are the same for all arms

JobKind = Literal["generator", "discriminators", "arm", "expected_error"]
STAGES: tuple[JobKind, ...] = ("generator", "discriminators", "arm", "expected_error")


@dataclass(frozen=True)
class Job:
    """One training with its prediction and scores, one shared warm-up, or an assessment of expected-error maps.

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
        runs: Folders of the trainings, one a seed, whose maps it assesses.
    """

    key: str
    kind: JobKind
    arm: str
    fold: int
    seed: int
    recipe: Recipe
    folder: Path
    warm: Path | None = None
    first: bool = False
    runs: tuple[Path, ...] = ()

    @property
    def needs(self) -> tuple[Path, ...]:
        """Folders of the jobs that must be done before."""
        return self.runs if self.warm is None else (self.warm, *self.runs)

    @property
    def name(self) -> str:
        """Its name on the screen."""
        if self.kind == "expected_error":
            return f"expected error of {self.arm} fold {self.fold}"
        return f"{self.arm if self.kind == 'arm' else f'warm-up ({self.kind})'} fold {self.fold} seed {self.seed}"

    @property
    def is_done(self) -> bool:
        """Whether it wrote its mark; a killed job did not, and a job with a damaged mark is checked again."""
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
    def seconds(self) -> float:
        """Seconds of its training and of its scoring together; 0 before it is done."""
        return sum(self.spent.values())

    @property
    def steps(self) -> int:
        """Its own steps, without those of its warm-ups."""
        schedule = self.recipe.schedule
        if self.kind == "expected_error":
            return 0
        end = schedule.steps if self.kind == "arm" else schedule.ends[self.kind]
        return end - self._warm_steps

    @property
    def _warm_steps(self) -> int:
        """Steps that its warm-ups did."""
        if self.warm is None:
            return 0
        of_both = self.kind == "arm" and has_discriminators(self.recipe)
        return self.recipe.schedule.ends["discriminators" if of_both else "generator"]


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


def list_jobs(study: Study, out: Path, cohort: Cohort | None) -> list[Job]:
    """List a study's jobs, warm-ups first; everything that can be refused is refused here.

    Args:
        study: The content of the study file.
        out: The study's folder.
        cohort: Its cases; None for a simulated cohort that is not written yet.

    Raises:
        RecipeError: If an arm, size or setting is unknown.
        CohortError: If there are fewer subjects than folds, a fold does not exist,
            sites are not known, or no case has the primary region.
    """
    folds = _count_folds(study, cohort)
    _check_folds(study, folds)
    _check_regions(study, cohort)
    _check_alike(study, folds)
    place = _JobSetting(out, content_of(study, cohort), study.threads)
    jobs: dict[str, Job] = {}
    numbers = range(folds) if study.only_folds is None else study.only_folds
    for fold, seed, arm in product(numbers, study.seeds, study.arms):
        recipe = _recipe(study, arm, folds, fold, seed)
        check_players(recipe)
        shared = study.warmup == "shared" and recipe.generator.stages == 1  # a cascade begins on fewer cases
        beginnings = warm_ups(recipe, _recipe(study, WARM_UP, folds, fold, seed)) if shared else []
        # the naive baselines are scored once a fold and seed, with the first arm
        chain = place.chain(beginnings, recipe, first=arm == study.arms[0])
        jobs |= {job.key: job for job in chain}
    assessing = _expected_error_jobs(study, out, list(jobs.values()))
    return sorted([*jobs.values(), *assessing], key=lambda job: STAGES.index(job.kind))


def _check_regions(study: Study, cohort: Cohort | None) -> None:
    """Refuse a primary comparison in a region that no case can have."""
    regions = {*WHOLE, *(REGIONS if cohort is None else cohort.regions)}
    for one in study.declared:
        if one.region not in regions:
            raise CohortError(
                f"has no region {one.region!r}, which the primary comparison is about",
                path=study.data,
                reason="no-region",
                expected=", ".join(sorted(regions)),
            )


def _check_alike(study: Study, folds: int) -> None:
    """Refuse arms that read other files or are scored against other images, because they cannot be compared."""
    recipes = {arm: _recipe(study, arm, folds, 0, study.seeds[0]) for arm in study.arms}
    _check_reading(recipes.values())
    _check_testing({arm: recipe.split for arm, recipe in recipes.items()})
    if study.reference is None:
        _check_registration({arm: recipe.data.registration for arm, recipe in recipes.items()})


def _check_reading(recipes: Iterable[Recipe]) -> None:
    """Refuse arms that choose or read the files of the cohort differently."""
    if len({(reading_of(r.data), r.data.select, r.split.subject_pattern) for r in recipes}) > 1:
        raise RecipeError(
            "all arms must choose and read the files of the cohort alike",
            reason="reading",
            hint="Set data.form, assume_ras, resample, resample_tilt, select and split.subject_pattern for all arms, "
            "not in a variant.",
        )


def _check_testing(splits: Mapping[str, SplitSettings]) -> None:
    """Refuse arms, given with how they split, that would be tested on different subjects.

    They may learn from different ones.
    """
    tested = {arm: split.model_dump(exclude={"training_subjects", "validation"}) for arm, split in splits.items()}
    first, *others = tested
    if odd := [arm for arm in others if tested[arm] != tested[first]]:
        raise RecipeError(
            "all arms must be tested on the same subjects",
            reason="split",
            found=f"another split for {', '.join(odd)} than for {first}",
            hint="In a variant, of all settings of split only training_subjects and validation can be changed.",
        )


def _check_registration(kinds: Mapping[str, str]) -> None:
    """Refuse arms, given with how they register, that would be scored against differently registered images."""
    if len(set(kinds.values())) > 1:
        raise RecipeError(
            "arms that register differently must be scored against the same images",
            reason="reference",
            found=", ".join(f"{arm}: {kind}" for arm, kind in kinds.items()),
            hint='Give reference = "FOLDER", or "held" for simulated patients.',
        )


def _expected_error_jobs(study: Study, out: Path, jobs: Sequence[Job]) -> list[Job]:
    """Assess the maps of one arm, once a fold, with all its seeds as an ensemble."""
    if study.expected_error is None:
        return []
    trained = [job for job in jobs if job.kind == "arm" and job.arm == study.expected_error]
    return [_expected_error_job(some, out) for some in grouped(trained, lambda job: job.fold).values()]


def _expected_error_job(trained: Sequence[Job], out: Path) -> Job:
    """Assess the map of an arm in one fold, where it was trained with several seeds."""
    first, runs = trained[0], tuple(job.folder for job in trained)
    if first.recipe.data.task == "super-resolution":
        raise RecipeError(
            "the expected-error map's baselines are not assessed for super-resolution yet",
            reason="expected_error",
            hint="Leave expected_error out of the study.",
        )
    key = _key(["expected_error", *(job.key for job in trained)])
    seed, folder = first.recipe.training.seed, out / "jobs" / key
    return Job(key, "expected_error", first.arm, first.fold, seed, first.recipe, folder, runs=runs)


def _key(depends: Sequence[Any]) -> str:
    """Return the hash of everything that a job depends on."""
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]


def _count_folds(study: Study, cohort: Cohort | None) -> int:
    """Count the folds of a study, all of which its cohort must have."""
    if study.folds == "site":
        return _count_sites(cohort)
    if cohort is not None and any(case.split == "test" for case in cohort.cases):
        return 1  # whoever is fixed to test is tested in every fold
    _check_subjects(study, cohort, study.folds)
    return study.folds


def _check_folds(study: Study, folds: int) -> None:
    """Refuse to do a fold that does not exist."""
    if odd := [fold for fold in study.only_folds or () if not 0 <= fold < folds]:
        raise CohortError(
            f"the study has no fold {odd[0]}", path=study.data, reason="folds", expected=f"0 to {folds - 1}"
        )


def _count_sites(cohort: Cohort | None) -> int:
    if cohort is None:
        raise CohortError(
            "the sites of a simulated cohort are known once it is written",
            reason="no-site",
            hint="Write it with chiasm phantom and give its folder as data.",
        )
    return len(sites_of(cohort.cases))


def _check_subjects(study: Study, cohort: Cohort | None, folds: int) -> None:
    """Refuse more folds than there are subjects."""
    if study.phantom is not None:
        subjects = study.phantom.subjects
    else:
        assert cohort is not None  # only simulated ones are not written yet
        subjects = len({case.subject for case in cohort.cases})
    if subjects < folds:
        raise CohortError(
            "has fewer subjects than the study has folds",
            path=study.data,
            reason="folds",
            found=subjects,
            expected=f"at least {folds}",
        )


def _recipe(study: Study, arm: str, folds: int, fold: int, seed: int) -> Recipe:
    changes: dict[str, object] = {
        "data.sources": study.sources,
        "data.target": study.target,
        "split.by": "site" if study.folds == "site" else "subject",
        "split.folds": folds,
        "split.fold": fold,
        "split.locked": study.locked,
        "training.seed": seed,
    }
    if study.steps is not None:
        changes["schedule.steps"] = study.steps
    return study.build(arm, changes)


def has_discriminators(recipe: Recipe) -> bool:
    """Return whether an arm trains any discriminator."""
    return recipe.loss.global_weight > 0 or recipe.loss.local_weight > 0 or needs_local_discriminator(recipe)


def warm_ups(recipe: Recipe, base: Recipe) -> list[tuple[JobKind, Recipe]]:
    """Return the warm-ups that an arm shares with others, as recipes that hold only what they depend on."""
    if recipe.optimiser.kind == "admm":
        return []  # a sparse coder shares nothing with networks
    generator = _generator_warm_up(recipe, base)
    ends = recipe.schedule.ends
    found: list[tuple[JobKind, Recipe]] = []
    if ends["generator"] > 0:  # of few steps a phase may have none
        found.append(("generator", generator))
    if has_discriminators(recipe) and ends["discriminators"] > ends["generator"]:
        found.append(("discriminators", _discriminator_warm_up(recipe, generator, base.loss)))
    return found


def _generator_warm_up(recipe: Recipe, base: Recipe) -> Recipe:
    """Return the recipe of the first warm-up, of the generator alone."""
    usual_batches = {name: getattr(base.training, name) for name in BATCHES}
    rates = {name: getattr(recipe.optimiser, name) for name in ("generator_rate", "betas", "average")}
    return base.model_copy(
        update={
            "data": recipe.data,
            "split": recipe.split,
            "generator": recipe.generator.model_copy(update={"refiner": ()}),
            "training": recipe.training.model_copy(update=usual_batches),
            "schedule": recipe.schedule,
            "optimiser": base.optimiser.model_copy(update=rates),
        }
    )


def _discriminator_warm_up(recipe: Recipe, beginning: Recipe, base: Loss) -> Recipe:
    """Return the recipe of the second warm-up, of the discriminators, with the usual weights for every arm."""
    usual = Loss()
    same = {
        name: getattr(recipe.loss, name) for name in ("adversarial", "smoothing", "penalty", "penalty_every", "clip")
    }
    weights = {
        name: getattr(usual, name) if getattr(recipe.loss, name) > 0 else 0.0
        for name in ("global_weight", "local_weight")
    }
    attention = Attention(
        head="structured" if needs_local_discriminator(recipe) else "none",
        magnitude_mm=recipe.attention.magnitude_mm,
        structured_mm=recipe.attention.structured_mm,
    )
    return beginning.model_copy(
        update={
            "loss": base.model_copy(update={**weights, **same}),
            "attention": attention,
            "discriminators": recipe.discriminators,
            "optimiser": recipe.optimiser,
        }
    )


class _JobSetting(NamedTuple):
    """What the jobs of a study share: its folder, the hash of its data, and the threads of a job."""

    out: Path
    content: str
    threads: int

    def job(self, kind: JobKind, recipe: Recipe, warm: Path | None, *, first: bool = False) -> Job:
        """Return a job, named by the hash of what it depends on."""
        depends = [
            *(__version__, REVISION, kind, self.content, _asked(recipe)),
            *(self.threads, warm and warm.name, first),
        ]
        key = _key(depends)
        name, folder = recipe.method if kind == "arm" else kind, self.out / "jobs" / key
        return Job(key, kind, name, recipe.split.fold, recipe.training.seed, recipe, folder, warm, first)

    def chain(self, beginnings: Sequence[tuple[JobKind, Recipe]], recipe: Recipe, *, first: bool) -> list[Job]:
        """Return the warm-ups of an arm and the arm itself, each going on from the one before."""
        jobs: list[Job] = []
        for kind, beginning in beginnings:
            jobs.append(self.job(kind, beginning, jobs[-1].folder if jobs else None))
        return [*jobs, self.job("arm", recipe, jobs[-1].folder if jobs else None, first=first)]


def _asked(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that differ from the defaults, so that a new setting changes no earlier key."""
    asked = recipe.model_dump(mode="json", exclude_defaults=True)
    networks = {"generator": recipe.generator.network, "discriminators": recipe.discriminators.global_network}
    for section, network in networks.items():
        if network == OWN and section in asked:  # widths shape these; the scale is of the literature's
            asked[section].pop("scale", None)
            if not asked[section]:
                del asked[section]
    return asked


def _hashed(path: Path | None) -> str:
    """Hash a volume (a DICOM series by its slices); return a dash if there is none."""
    if path is None:
        return "-"
    return ",".join(map(sha256_of, volume_files(path))) if is_dicom(path) else sha256_of(path)


def content_of(study: Study, cohort: Cohort | None) -> str:
    """Hash the files that a study reads, by content; of a simulated cohort, name what it is made from.

    Args:
        study: What is asked for.
        cohort: Its cases; None for a simulated cohort that is not written yet.
    """
    if study.phantom is not None:
        later = {"misregistration_mm": None, "movement": "elastic"}  # as jobs of before have it, which are still found
        usual = {name for name, value in later.items() if getattr(study.phantom, name) == value}
        return study.phantom.model_dump_json(exclude=usual) + _reference_content(study)
    assert cohort is not None  # only simulated ones are not written yet
    return (
        _contents(cohort, (*study.sources, study.target)) + _reference_content(study) + _unpaired_content(study, cohort)
    )


def _reference_content(study: Study) -> str:
    """Hash the reference images, if they are not the cohort's own."""
    if not isinstance(study.reference, Path):
        return "" if study.reference is None else "held"
    real = _find(study, study.reference)
    return _contents(select_cases(real, (study.target,), None), (study.target,))


def _unpaired_content(study: Study, cohort: Cohort) -> str:
    """Hash the cases with only one side, if an arm learns from them."""
    if not _learns_from_one_side(study):
        return ""
    found = _find(study, cohort.root)
    alone = tuple(case for case in found.cases if side_alone(case, study.sources, study.target))
    return _contents(replace(found, cases=alone), (*study.sources, study.target)) if alone else ""


def _learns_from_one_side(study: Study) -> bool:
    """Return whether an arm learns from cases with only one side, as sparse coding does."""
    return any(_recipe(study, arm, 1, 0, 0).optimiser.kind == "admm" for arm in study.arms)


def _contents(cohort: Cohort, names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for case in sorted(cohort.cases, key=lambda case: case.id):
        files = [*(case.images.get(name) for name in names), case.mask, case.labels]
        soft = [] if case.label_threshold is None else [str(case.label_threshold)]
        parts = [case.id, case.subject, *map(_hashed, files), *soft]
        digest.update("\0".join(parts).encode())
    return digest.hexdigest()
