"""Options that several verbs share, in records: each is declared once, and a verb takes the records that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args, get_type_hints

import typer

from chiasm.commands.common import Settings, Size, Steps
from chiasm.errors import RecipeError, unknown

if TYPE_CHECKING:
    from chiasm.cohorts.dicom_patients import Selection
    from chiasm.recipe import Recipe, Registration
    from chiasm.volumes import Reading

MANY = (
    "--source",
    "--set",
    "--regions",
    "--series",
    "--select",
    "--allow",
    "--read",
    "--methods",
    "--run",
)  # options that take several values in a row
LEVELS = ("participant", "group")  # what stands last before the options of `chiasm bids`

Select = Annotated[
    list[str] | None,
    typer.Option(
        "--select",
        help="Prefer scans whose file names have these words: --select acq-mprage.",
        rich_help_panel="Data",
    ),
]

Form = Literal["sform", "qform"]


@dataclass(frozen=True)
class ReadingOptions:
    """What to assume of files whose headers leave a question open."""

    form: Annotated[
        str | None,
        typer.Option(
            "--form", help="sform or qform: the one to use if a NIfTI's two disagree.", rich_help_panel="Expert"
        ),
    ] = None
    assume_ras: Annotated[
        bool,
        typer.Option(
            "--assume-ras", help="Assume RAS order for NIfTI files without orientation.", rich_help_panel="Expert"
        ),
    ] = False
    resample: Annotated[
        bool, typer.Option("--resample", help="Resample sheared axes on a straight grid.", rich_help_panel="Expert")
    ] = False
    resample_tilt: Annotated[
        bool,
        typer.Option(
            "--resample-tilt",
            help="Resample tilted or uneven DICOM slices on a straight grid.",
            rich_help_panel="Expert",
        ),
    ] = False

    def reading(self) -> Reading:
        """Return them as the functions take them.

        Raises:
            RecipeError: If the form is unknown.
        """
        from chiasm.volumes import Reading

        if self.form not in (None, "sform", "qform"):
            raise unknown("form", str(self.form), ["sform", "qform"])
        form: Form | None = None if self.form is None else "sform" if self.form == "sform" else "qform"
        return Reading(form, self.assume_ras, self.resample, self.resample_tilt)


@dataclass(frozen=True)
class PeopleOptions:
    """Which cases are of one person."""

    subject_pattern: Annotated[
        str,
        typer.Option(
            "--subject-pattern",
            help="Regular expression whose group is the subject in a case's id: '(P\\[0-9]+)-'.",
            rich_help_panel="Data",
        ),
    ] = ""


@dataclass(frozen=True)
class CohortOptions:
    """Which files of a folder are used, and their roles."""

    layout: Annotated[
        str | None,
        typer.Option("--layout", help="Name of the layout, if a folder fits several.", rich_help_panel="Data"),
    ] = None
    series: Annotated[
        list[str] | None,
        typer.Option(
            "--series", help="DICOM series by number or words: --series t1=5 t2=SPACE pd=TE=30.", rich_help_panel="Data"
        ),
    ] = None
    select: Select = None

    def selection(
        self,
        sources: Iterable[str] | None,
        reading: ReadingOptions,
        allow: Iterable[str] | None = None,
        people: PeopleOptions | None = None,
    ) -> Selection:
        """Return them as the functions take them.

        Args:
            sources: Source modalities; a rule without a modality is for a single source.
            reading: What to assume of the files.
            allow: Marks that do not exclude an image.
            people: How cases are assigned to persons.

        Raises:
            RecipeError: If a rule or a mark is wrong.
        """
        from chiasm.cohorts.dicom_patients import Selection, parse_rules
        from chiasm.cohorts.folder_notes import MARKS

        if strange := set(several(allow)) - set(MARKS):
            raise unknown("mark", min(strange), MARKS)
        rules = parse_rules(several(self.series), several(sources))
        pattern = people.subject_pattern if people else ""
        return Selection(rules, None, several(allow), reading.reading(), several(self.select), subject_pattern=pattern)


def file_settings(reading: ReadingOptions, selection: Selection) -> dict[str, object]:
    """Return a recipe's settings for choosing and reading files; None for options that were not given."""
    return {
        "data.form": reading.form,
        "data.assume_ras": reading.assume_ras or None,
        "data.resample": reading.resample or None,
        "data.resample_tilt": reading.resample_tilt or None,
        "data.select": tuple(selection.select) or None,
        "split.subject_pattern": selection.subject_pattern or None,
    }


def complete_method(incomplete: str) -> list[str]:
    """Complete the name of a method in a shell."""
    from chiasm.methods import METHODS

    return [method.name for method in METHODS.values() if method.name.startswith(incomplete.lower())]


@dataclass(frozen=True)
class RecipeOptions:
    """What to learn, by which method, with how much effort, on which fold."""

    source: Annotated[
        list[str], typer.Option("--source", help="Source modality; several: --source t1 flair.", rich_help_panel="Data")
    ]
    target: Annotated[
        str | None,
        typer.Option(
            "--target", help="Target modality; for super-resolution the source by default.", rich_help_panel="Data"
        ),
    ] = None
    task: Annotated[
        str,
        typer.Option(
            "--task", help="synthesis, or super-resolution (thick slices become thin).", rich_help_panel="Method"
        ),
    ] = "synthesis"
    factor: Annotated[
        int | None,
        typer.Option(
            "--factor", help="Number of thin slices in a thick one (super-resolution).", rich_help_panel="Method"
        ),
    ] = None
    axis: Annotated[
        str | None,
        typer.Option(
            "--axis", help="Axis across the thick slices: K axial, J coronal, I sagittal.", rich_help_panel="Method"
        ),
    ] = None
    register: Annotated[
        str,
        typer.Option(
            "--register",
            help="Align other images with the first source: none, rigid, affine or demons.",
            rich_help_panel="Method",
        ),
    ] = "none"
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="Method by name: l2-expected-error, dual-attention, literal, unet, ... (chiasm methods lists all)",
            rich_help_panel="Method",
            autocompletion=complete_method,
        ),
    ] = "l2-expected-error"
    size: Size = "small"
    steps: Steps = None
    fold: Annotated[
        int | None, typer.Option("--fold", help="Fold that is the test set: 0 by default.", rich_help_panel="Run")
    ] = None
    folds: Annotated[
        str | None,
        typer.Option(
            "--folds",
            help="Folds by subject, of which one is the test set: 5 test a fifth, 1 nobody; auto, the default of one "
            "model: 5, or one subject each of fewer than 10; site: each tests one site.",
            rich_help_panel="Run",
        ),
    ] = None
    models: Annotated[
        str | None,
        typer.Option(
            "--models",
            help="Models that share subjects and steps; auto, the default without folds: 3 of 3 to 9 subjects where "
            "weights that ship fit, else 1.",
            rich_help_panel="Run",
        ),
    ] = None
    seed: Annotated[int, typer.Option("--seed", help="Seed of weights and batches.", rich_help_panel="Run")] = 0
    settings: Settings = None

    def recipe(self, reading: ReadingOptions, selection: Selection, settings: Sequence[str] = ()) -> Recipe:
        """Resolve them.

        Args:
            reading: What to assume of the files.
            selection: Which files are taken, and whose the cases are.
            settings: More of them, which `--set` may overrule.

        Raises:
            RecipeError: If one is missing, unknown or out of range.
        """
        from chiasm.methods import make_recipe

        sources = tuple(filter(None, ",".join(self.source).lower().split(",")))
        changes: dict[str, object] = {
            "data.sources": sources,
            "data.target": self._target(sources),
            "data.task": self.task,
            "data.registration": self.register,
            "split.fold": self.fold or 0,
            "split.folds": "auto" if self.folds in (None, "site") else self.folds,
            "split.by": "site" if self.folds == "site" else "subject",
            "split.models": self.models or ("auto" if self._leaves_split_open() else 1),
            "training.seed": self.seed,
        }
        given: dict[str, object] = {
            "data.factor": self.factor,
            "data.axis": None if self.axis is None else self.axis.upper(),
            "schedule.steps": self.steps,
            **file_settings(reading, selection),
        }
        changes |= {name: value for name, value in given.items() if value is not None}
        return make_recipe(self.method, self.size, changes, [*settings, *several(self.settings)])

    def _leaves_split_open(self) -> bool:
        """Return whether nobody says how the subjects are split."""
        asked = [setting.strip() for setting in several(self.settings)]
        return self.fold is None and self.folds is None and not any(one.startswith("split.") for one in asked)

    def _target(self, sources: Sequence[str]) -> str:
        if self.task == "synthesis" and (self.factor is not None or self.axis is not None):
            raise RecipeError("--factor and --axis are for --task super-resolution", reason="task")
        if self.target is not None:
            return self.target.lower()
        if self.task != "super-resolution" or len(sources) != 1:
            raise RecipeError(
                "--target is missing", reason="target", hint="Name the modality to synthesise: --target t2."
            )
        return sources[0]


def with_records(verb: Callable[..., None]) -> Callable[..., None]:
    """Let a verb take records: each field of a parameter that is a dataclass becomes an option of its own.

    >>> def verb(reading: ReadingOptions, seed: int = 0) -> None: ...
    >>> list(signature(with_records(verb)).parameters)
    ['form', 'assume_ras', 'resample', 'resample_tilt', 'seed']
    """
    hints = get_type_hints(verb, include_extras=True)
    records = {name: hints[name] for name in signature(verb).parameters if is_dataclass(hints[name])}
    flat: list[Parameter] = []
    for name, parameter in signature(verb).parameters.items():
        if name in records:
            flat += _parameters_of(records[name])
        else:
            flat.append(parameter.replace(annotation=hints[name], kind=Parameter.KEYWORD_ONLY))

    @wraps(verb)
    def called(**given: Any) -> None:
        built = {
            name: record(**{field.name: given.pop(field.name) for field in fields(record)})
            for name, record in records.items()
        }
        verb(**given, **built)

    called.__signature__ = Signature(flat)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return called


def _parameters_of(record: Any) -> list[Parameter]:
    hints = get_type_hints(record, include_extras=True)
    return [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(record)
    ]


def spread(words: Sequence[str]) -> list[str]:
    """Turn `--source t1 flair` into `--source t1 --source flair`.

    >>> spread(["DATA", "--source", "t1", "flair", "-o", "RUN"])
    ['DATA', '--source', 't1', '--source', 'flair', '-o', 'RUN']
    >>> spread(["BIDS", "OUT", "participant", "--run", "A", "B"])[3:]  # but not before the folders
    ['--run', 'A', '--run', 'B']
    """
    spaced: list[str] = []
    option: str | None = None
    for word in words:
        if word.startswith("-"):
            is_late = word != "--run" or any(level in spaced for level in LEVELS)
            option = word if word in MANY and is_late else None
        elif option is not None and spaced[-1] != option:
            spaced.append(option)
        spaced.append(word)
    return spaced


def registration_named(name: str) -> Registration:
    """Return the registration of this name.

    Raises:
        RecipeError: If there is none of this name.
    """
    from chiasm.recipe import Registration

    if name not in get_args(Registration):
        raise unknown("registration", name, get_args(Registration))
    return cast("Registration", name)


def several(values: Iterable[str] | None) -> list[str]:
    """Return the values of an option that may be given more than once."""
    return list(values or [])
