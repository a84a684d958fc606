"""The content of a study file, with its checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from chiasm.errors import RecipeError
from chiasm.evaluation.metric_table import OF_SCALE, ORDERED
from chiasm.methods import find_method, is_method, key_of, make_recipe
from chiasm.prediction.baselines import NAMES
from chiasm.recipe import Recipe, Registration, Section
from chiasm.runners import Ray, Slurm
from chiasm.simulation.patient import Movement
from chiasm.storage import read_toml

WHOLE = ("mask", "image", "healthy", "edges", "lesion-edge")  # regions that every cohort has


Arm = Annotated[str, AfterValidator(key_of)]


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


def _as_list(value: object) -> object:
    """Take a single name or number for a list of one, as the command line does."""
    return [value] if isinstance(value, str | int) else value


class Study(Section):
    """The content of a study file."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"sealed": "locked", "reliability": "expected_error"}

    data: Path | None = None
    phantom: Phantom | None = None
    reference: Literal["held"] | Path | None = (
        None  # what is scored against, without alignment; held: the same patients without movement
    )
    sources: Annotated[tuple[str, ...], Field(min_length=1, alias="source"), BeforeValidator(_as_list)]
    target: str
    arms: Annotated[tuple[Arm, ...], Field(min_length=1), BeforeValidator(_as_list)]
    variants: Mapping[str, Annotated[tuple[str, ...], Field(min_length=1)]] = {}  # name: an arm, then its own settings
    folds: Annotated[int, Field(ge=2)] | Literal["site"] = 5
    only_folds: tuple[int, ...] | None = None
    locked: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seeds: Annotated[tuple[int, ...], Field(min_length=1), BeforeValidator(_as_list)] = (0,)
    size: str = "small"
    steps: Annotated[int, Field(ge=1)] | None = None
    warmup: Literal["shared", "own"] = "shared"
    threads: Annotated[int, Field(ge=1)] = 1
    settings: Annotated[tuple[str, ...], Field(alias="set")] = ()
    primary: Primary | tuple[Primary, ...] = ()
    expected_error: Arm | None = None
    layout: str | None = None
    slurm: Slurm | None = None  # what a job asks of a cluster
    ray: Ray | None = None

    @property
    def asked(self) -> tuple[Primary, ...]:
        """All primary comparisons, as the study file has them."""
        return (self.primary,) if isinstance(self.primary, Primary) else self.primary

    @property
    def declared(self) -> tuple[Primary, ...]:
        """Those whose scores can be compared: all of a study file; notes of before version 0.2 may hold others."""
        return tuple(one for one in self.asked if not self.why_not_compared(one))

    def why_not_compared(self, one: Primary) -> str:
        """Say why a comparison cannot be made; nothing if it can."""
        if one.metric not in ORDERED:
            return (
                f"the metric {one.metric!r} is unknown, or neither more nor less of it is better: {', '.join(ORDERED)}"
            )
        if not self.are_comparable(one.arm, one.against, one.metric):
            return (
                f"{one.arm} and {one.against} learn from different subjects, whose SD is the unit of {one.metric}: "
                'compare them by metric = "mae_own", in the intensities of each scan'
            )
        return ""

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
        """The description of each arm, by name."""
        return {arm: self._describe(arm) for arm in self.arms}

    def _describe(self, arm: str) -> str:
        """Describe an arm or a variant."""
        if arm not in self.variants:
            return find_method(arm).words
        base, *own = self.variants[arm]
        return f"{find_method(base).name} with {', '.join(own) or 'nothing changed'}"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for sentence in chain(self._faults_of_data(), self._faults_of_reference(), self._faults_of_arms()):
            raise ValueError(sentence)
        return self

    def _faults_of_data(self) -> Iterator[str]:
        """Yield the faults of the cohort's settings."""
        if (self.data is None) == (self.phantom is None):
            yield "give either data, a folder, or phantom, a simulated cohort"

    def _faults_of_reference(self) -> Iterator[str]:
        """Yield the faults of the reference's settings."""
        moved = self.phantom is not None and self.phantom.movement != "held"
        if self.reference == "held" and not moved:
            yield 'reference = "held" is only for simulated patients who moved: give a folder'
        if self.reference is not None and self.expected_error is not None:
            yield "expected_error is assessed on the cohort itself: leave out reference, or expected_error"

    def _faults_of_arms(self) -> Iterator[str]:
        """Yield the faults of arms, variants, seeds and comparisons."""
        for listed in (self.arms, self.seeds):
            yield from _faults_of_list(listed)
        for name in self.variants:
            yield from self._faults_of_variant(name)
        yield from self._faults_of_comparisons()

    def own_split(self, arm: str) -> tuple[str, ...]:
        """Return the settings by which an arm learns from other subjects than the study's arms do; none for most."""
        _, *own = self.variants.get(arm, (arm,))
        return tuple(one for one in own if one.startswith("split."))

    def are_comparable(self, arm: str, against: str, metric: str) -> bool:
        """Return whether scores of two arms have one scale: those of MR have that of the subjects they learnt from."""
        alike = self.own_split(arm) == self.own_split(against)
        return alike or metric not in OF_SCALE or self.target == "ct"

    @property
    def own_units(self) -> frozenset[str]:
        """The metrics of which arms have units of their own."""
        first, *others = self.arms
        alike = all(self.are_comparable(arm, first, metric) for arm in others for metric in OF_SCALE)
        return frozenset() if alike else OF_SCALE

    def _faults_of_comparisons(self) -> Iterator[str]:
        """Name the arms in comparisons that the study does not have."""
        if self.expected_error not in (None, *self.arms):
            yield f"expected_error names {self.expected_error!r}, which is none of the arms"
        for arm in chain.from_iterable((one.arm, one.against) for one in self.asked):
            if arm not in self.arms:
                yield f"the primary comparison names {arm!r}, which is none of the arms"

    def _faults_of_variant(self, name: str) -> Iterator[str]:
        if name in NAMES or is_method(name):
            yield f"the variant {name!r} has the name of another arm or of a baseline"
        if name not in self.arms:
            yield f"the variant {name!r} is none of the arms"


def _faults_of_list(listed: Sequence[object]) -> Iterator[str]:
    """Yield a fault if an item occurs twice in a list."""
    if len(set(listed)) != len(listed):
        yield f"something stands twice: {', '.join(map(str, listed))}"


def read_study(path: Path) -> Study:
    """Read a study file; relative `data` and `reference` are looked up beside the file.

    Raises:
        RunError: If the file is missing or not TOML.
        RecipeError: If a setting is unknown, missing or impossible.
    """
    try:
        study = Study.model_validate(read_toml(path))
    except ValidationError as error:
        raise RecipeError(_first_fault(error), path=path, reason="study") from error
    if faults := list(filter(None, map(study.why_not_compared, study.asked))):
        raise RecipeError(f"a primary comparison cannot be made: {faults[0]}", path=path, reason="study")
    named = {name: getattr(study, name) for name in ("data", "reference")}
    beside = {name: (path.parent / file).resolve() for name, file in named.items() if isinstance(file, Path)}
    return study.model_copy(update=beside)


def _first_fault(error: ValidationError) -> str:
    """Describe the first wrong setting, and why it is wrong."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"])) or "study"
    if first["type"] == "extra_forbidden" and len(first["loc"]) < 3:
        tables: dict[str, type[Section]] = {"slurm": Slurm, "ray": Ray}
        section = tables.get(str(first["loc"][0]), Study)
        known = [field.alias or name for name, field in section.model_fields.items()]
        return f"there is no setting {where}; known are {', '.join(known)}"
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"


def data_folder(study: Study, out: Path) -> Path:
    """Return the folder of a study's cases; a simulated cohort lies in the study's folder."""
    return out / "cohort" if study.data is None else study.data


def reference_folder(study: Study, out: Path) -> Path | None:
    """Return the reference folder, which is used without alignment; None for the cohort itself."""
    return out / "unmoved" if study.reference == "held" else study.reference


def alignment_of(reference: Path | None) -> Registration | None:
    """Return how real images are aligned: as in training, or not at all if they come from a reference folder."""
    return None if reference is None else "none"
