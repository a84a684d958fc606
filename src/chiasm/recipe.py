"""The settings of a training: frozen, validated, read from TOML and written to TOML.

This module has the sections and their fields, each with its bounds, and reads single settings as they are given to
`--set`; `methods` has the methods by name.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from chiasm.checksums import check_checksum, with_checksum, without_checksum
from chiasm.errors import RecipeError, shortened, unknown
from chiasm.names import SAFE_NAME, is_safe_id
from chiasm.storage import read_toml, write_toml

LEAST_PATCH = 16  # voxels
LEAST_SPACING, MOST_SPACING = 0.001, 100.0  # mm
CHANGING = (
    "class_share",
    "painted_share",
    "simulated_share",
    "shaded_share",
)  # shares of the patches whose source is changed
MOST_LETTERS = 32  # of a modality, which is part of a file's name


def _modality(text: str) -> str:
    if not is_safe_id(text) or len(text.encode()) > MOST_LETTERS:
        raise ValueError(f"a modality is named by at most {MOST_LETTERS} letters, not {shortened(text)}: {SAFE_NAME}")
    return text


def _word(text: str) -> str:
    if not is_safe_id(text):
        raise ValueError(f"{shortened(text)} cannot be used: a name is {SAFE_NAME}")
    return text


Modality = Annotated[str, AfterValidator(_modality)]
Word = Annotated[str, AfterValidator(_word)]
Auto = Literal["auto"]
BiasCorrection = Literal["none", "n4"]
Plane = Literal["axial", "coronal", "sagittal"]  # of the slices that a 2D network sees
Registration = Literal["none", "rigid", "affine", "demons"]
Average = Literal["none", "flip"]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, le=1e6)]
Positive = Annotated[float, Field(ge=1e-9, le=1e6)]
Millimetres = Annotated[float, Field(ge=0.01, le=1000)]
Hounsfield = Annotated[float, Field(ge=-100_000, le=100_000)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Integer = Annotated[int, Field(ge=-65536, le=65536)]
#: Values that a network from another package can be given; no network takes more.
Option = (
    bool
    | Integer
    | Annotated[float, Field(ge=-65536, le=65536)]
    | Annotated[str, Field(max_length=64)]
    | Annotated[tuple[Integer, ...], Field(max_length=64)]
)
Widths = Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(min_length=1, max_length=8)]


class Section(BaseModel):
    """A group of settings that belong together; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    OLD_NAMES: ClassVar[Mapping[str, str]] = {}  # names of settings in version 0.1, which are still read, to today's

    @model_validator(mode="before")
    @classmethod
    def _check_names_and_switches(cls, content: Any) -> Any:
        """Read old names; refuse true and false for a number, because Python would take them for 1 and 0."""
        if not isinstance(content, Mapping):
            return content
        content = {cls.OLD_NAMES.get(name, name): value for name, value in content.items()}
        for name, value in content.items():
            takes_switch = name not in cls.model_fields or "bool" in str(cls.model_fields[name].annotation)
            if isinstance(value, bool) and not takes_switch:
                raise ValueError(f"{name} is no switch: give a value, not {str(value).lower()}")
        return content


class Data(Section):
    """Sources, target, and the grid on which networks see them."""

    sources: Annotated[tuple[Modality, ...], Field(min_length=1, max_length=16)] = ("t1",)
    target: Modality = "t2"
    spacing_mm: Auto | Annotated[float, Field(ge=LEAST_SPACING, le=MOST_SPACING)] = "auto"
    dims: Literal["auto", "2d", "2.5d", "3d"] = "auto"
    slices: Annotated[int, Field(ge=1, le=15)] = 3  # neighbouring slices of a 2.5D source
    plane: Auto | Plane = "auto"  # of 2D slices; auto: of several models each has the next one, else axial
    patch: Auto | Annotated[int, Field(ge=LEAST_PATCH, le=1024)] = "auto"  # side in voxels
    intensity: Literal["auto", "percentile", "zscore", "median_iqr", "mode", "rank"] = "auto"
    window_hu: tuple[Hounsfield, Hounsfield] = (-1024.0, 3071.0)
    ct_offset: Annotated[float, Field(ge=-32768, le=32768)] = 0.0  # added to each ct that is in HU with it
    registration: Registration = "none"  # how other images are aligned with the first source, which stays
    bias_correction: BiasCorrection = "none"  # of MR images, sources and target alike; never of CT
    mask: Literal["auto", "nonzero", "body"] = "auto"  # auto: files, else what fits; others use no files
    histogram: bool = False  # show each source a second time, as its rank in the case's own histogram
    task: Literal["synthesis", "super-resolution"] = "synthesis"
    factor: Annotated[int, Field(ge=2, le=32)] = 4  # thin slices in a thick one, for super-resolution as those below
    axis: Literal["I", "J", "K"] = "K"  # across the slices, in RAS order: K for axial ones
    slice_profile: Literal["gaussian", "box"] = "gaussian"
    noise: NonNegative = 0.0  # on thick slices, SD as a share of their range
    form: Literal["none", "sform", "qform"] = "none"  # believed where the two of a NIfTI disagree
    assume_ras: bool = False  # of a NIfTI without orientation
    resample: bool = False  # skewed axes, to a straight grid
    select: tuple[str, ...] = ()  # of several scans of a modality, those with these words in their files' names
    resample_tilt: bool = False  # DICOM slices of a tilted gantry, or uneven ones, to a straight and even grid

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that a case must have: the sources in order, and the target, which may be one of them."""
        return tuple(dict.fromkeys((*self.sources, self.target)))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.sources)) != len(self.sources):
            raise ValueError(f"a source stands twice: {', '.join(self.sources)}")
        if self.target in self.sources and self.task == "synthesis":
            raise ValueError(f"the target {self.target!r} is also a source, which only super-resolution allows")
        if self.plane not in ("auto", "axial") and (self.dims == "3d" or self.task == "super-resolution"):
            raise ValueError("plane is of slices: 3d has none, and super-resolution sees its thick slices edge-on")
        if self.slices % 2 == 0:
            raise ValueError("slices must be odd, so that one is in the middle")
        if self.window_hu[0] >= self.window_hu[1]:
            raise ValueError("window_hu must rise")
        if self.bias_correction != "none" and self.task == "super-resolution":
            raise ValueError("bias_correction is not for super-resolution, whose images keep the scan's own shading")
        return self


class SplitSettings(Section):
    """Who trains, validates and tests: by subject, stratified by site where known."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"sealed": "locked"}

    by: Literal["subject", "site"] = "subject"  # site: each fold tests one site, in the order of their names
    folds: Auto | Annotated[int, Field(ge=1, le=10_000)] = 5  # 1: no test set; auto: leave one out of few subjects
    fold: Annotated[int, Field(ge=0, lt=10_000)] = 0
    models: Auto | Annotated[int, Field(ge=1, le=10)] = 1  # of which each learns from all but one part; auto: 3 of few
    validation: Fraction = 0.2  # share of the subjects that are not tested; at least one
    training_subjects: Annotated[int, Field(ge=0, le=1_000_000)] = 0  # as many of the others train; 0: all of them
    subject_pattern: str = ""  # whose group is the subject in a case's id; "": as layout and names state
    locked: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of the subjects in the locked test set, in no fold
    seed: Seed = 0

    @property
    def described(self) -> str:
        """The fold in words."""
        if self.models != 1:
            return f"model {self.fold + 1} of {self.models}"
        return f"fold {self.fold}{'' if self.folds == 'auto' else f' of {self.folds}'}"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.folds != "auto" and self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} does not exist among {self.folds} folds (0 to {self.folds - 1})")
        if self.models != 1 and (self.folds not in ("auto", 1) or self.by != "subject"):
            raise ValueError("several models share the subjects among them: leave split.folds and split.by as they are")
        return self


class Generator(Section):
    """The network that makes the image: this project's, or one of the literature's (see `networks.catalogue`)."""

    network: Annotated[str, Field(max_length=200)] = "chiasm"
    scale: Annotated[float, Field(gt=0, le=4)] = 0.25  # of a reference network's published channels
    options: Annotated[
        dict[Annotated[str, Field(max_length=64)], Option], Field(max_length=64)
    ] = {}  # of a network from another package
    widths: Widths = (16, 32, 64, 128)
    fold: Literal[1, 2] = 1  # voxels an axis that become channels before the first convolution, in this project's own
    norm: Literal["batch", "none"] = "batch"
    skip: Literal["none", "source", "lookup"] = "lookup"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of each level's features, so a model can be asked many times
    refiner: Annotated[
        tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(max_length=8)
    ] = ()  # widths of the second stage; none without
    stages: Annotated[int, Field(ge=1, le=4)] = 1  # auto-context: each sees what the one before made of the source
    inner_folds: Annotated[int, Field(ge=2, le=10)] = 2  # of the training subjects, for out-of-fold contexts
    average: Average = "none"  # flip: the mean of a prediction and of that of the source with left and right changed

    @property
    def own_multiple(self) -> int:
        """The sides of what this project's own network takes are multiples of this."""
        return self.fold << len(self.widths) - 1


class Discriminators(Section):
    """The two discriminators; a loss weight of 0 switches one's adversarial term off."""

    global_widths: Widths = (16, 32, 64, 64)
    local_widths: Annotated[Widths, Field(min_length=3)] = (8, 16, 32, 64)
    local_fold: Literal[1, 2] = 1  # voxels an axis that become channels before the local one's first convolution
    spectral_norm: bool = True  # of the local one
    global_network: str = "chiasm"
    scale: Annotated[float, Field(gt=0, le=4)] = 0.25  # of a published discriminator's channels
    conditional: bool = True  # the local one sees the source too
    global_spectral_norm: bool = False  # of this project's own global one
    second_global: bool = False  # in place of the local one's adversarial term (control C5)
    confidence: bool = False  # the local one learns to expect the error, where nothing else asks for it

    @property
    def local_multiple(self) -> int:
        """The sides of what the local one assesses are multiples of this."""
        return self.local_fold << len(self.local_widths) - 1


class Loss(Section):
    """The terms of the losses, and their weights."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"critic_steps": "discriminator_steps"}

    norm: Literal["l1", "l2"] = "l2"
    global_weight: NonNegative = 0.001
    local_weight: NonNegative = 0.002
    adversarial: Literal["bce", "lsgan", "hinge", "wgan", "wgan-gp"] = "bce"  # of the global discriminator
    clip: Positive = 0.01  # largest weight of a wgan critic
    smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    penalty: NonNegative = 10.0  # gradient penalty of wgan-gp
    penalty_every: Annotated[int, Field(ge=1, le=64)] = 4  # of so many discriminator steps one, weighted up by as much
    discriminator_steps: Annotated[int, Field(ge=1, le=20)] = (
        1  # of the global one for each of the generator's, once both play
    )
    gradient_difference: NonNegative = 0.0
    focal: NonNegative = 0.0  # exponent on |error| (control C1)
    top_k: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of the voxels that count (control C2)
    lesion: Annotated[float, Field(ge=1, le=1e6)] = 1.0  # weight inside the labelled lesion (control C3, an oracle)


class Attention(Section):
    """The attention: F = (1 - M) ** beta weighs voxels in the reconstruction loss."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"target": "head"}

    head: Literal["none", "realness", "magnitude", "structured"] = "structured"
    beta: NonNegative = 1.0
    norm: Literal["mean", "none"] = "mean"
    cap: Annotated[float, Field(gt=1, le=1e6)] = 5.0
    strength: Fraction = 1.0  # a_t at the end of its ramp
    gate: bool = True
    detach: bool = True
    shuffle: bool = False  # same weights, no place (control C4)
    use: Literal["weight", "sample", "both"] = "weight"
    magnitude_mm: Millimetres = 2.0  # sigma of g1
    structured_mm: Millimetres = 4.0  # sigma of g2


class Schedule(Section):
    """When generator and discriminators learn, as shares of all steps."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"critics_alone": "discriminators_alone"}

    steps: Annotated[int, Field(ge=1, le=10_000_000)] = 4000
    generator_alone: Fraction = 0.4
    discriminators_alone: Fraction = 0.15
    ramp: Annotated[float, Field(gt=0, le=0.5)] = 0.05

    @property
    def ends(self) -> dict[str, int]:
        """Steps after which the generator, then the discriminators, have been alone."""
        together = self.generator_alone + self.discriminators_alone
        return {"generator": round(self.generator_alone * self.steps), "discriminators": round(together * self.steps)}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.generator_alone + self.discriminators_alone + 2 * self.ramp > 1:
            raise ValueError("generator_alone + discriminators_alone + 2 ramp must not exceed 1")
        return self


class Optimiser(Section):
    """Adam for the generator, a choice for discriminators, cosine decay, averaged weights; or a coder's own rounds."""

    kind: Literal["adam", "admm"] = "adam"  # admm: codes, filters and mapping in turns, for the network jcsc alone
    tolerance: NonNegative = 1e-3  # admm has done when a round lowers its objective by a smaller share
    discrepancy: NonNegative = 1.0  # admm's weight of unpaired patches' means
    generator_rate: Positive = 5e-4
    discriminator_rate: Positive = 1e-3
    betas: tuple[Momentum, Momentum] = (0.5, 0.99)
    discriminator: Literal["adam", "rmsprop"] = "adam"
    discriminator_betas: Auto | tuple[Momentum, Momentum] = "auto"  # as the generator's
    average: Annotated[float, Field(ge=0, lt=1)] = 0.999


class Training(Section):
    """How batches are drawn, and on which hardware the training runs."""

    batch: Annotated[int, Field(ge=1, le=4096)] = 8
    seed: Seed = 0
    body_share: Fraction = 0.5  # patches centred in the mask
    lesion_share: Fraction = 0.25  # patches centred on a training lesion, where labels exist
    pairs: Annotated[int, Field(ge=0, le=1_000_000)] = 0  # training cases that count as pairs, the first ones; 0: all
    transplant_share: Fraction = 0.0  # patches that are given a lesion of another training case
    transplant: Literal["random", "difficulty"] = "random"  # difficulty: lesions that M finds hard come more often
    class_share: Auto | Fraction = 0.0  # patches in which each class of tissue is shifted in the source; auto: a half
    painted_share: Auto | Fraction = 0.0  # patches into which a lesion is painted, in source and target; auto: likewise
    simulated_share: Auto | Fraction = 0.0  # patches of simulated patients, tumours in training cases; auto: 0.25
    shaded_share: Auto | Fraction = 0.0  # patches whose source is shaded, as by a coil; auto: a half
    pretrained: Literal["auto", "none"] = "none"  # auto: the generator starts from weights that ship, where they fit
    augment: bool = True
    intensity_jitter: Annotated[float, Field(ge=0, le=1)] = 0.1  # of a source's scale and offset, if it has no unit
    validations: Annotated[int, Field(ge=1, le=1000)] = 8
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    accelerator: str = "auto"
    devices: Annotated[int, Field(ge=1, le=1024)] = 1
    parent: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""  # sha256 of the model it goes on from

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.body_share + self.lesion_share > 1:
            raise ValueError("body_share + lesion_share must not exceed 1")
        return self


class Recipe(Section):
    """All settings, resolved: the same recipe and data give the same model."""

    method: Word = "A7"
    size: Word = "small"
    data: Data = Data()
    split: SplitSettings = SplitSettings()
    generator: Generator = Generator()
    discriminators: Discriminators = Discriminators()
    loss: Loss = Loss()
    attention: Attention = Attention()
    schedule: Schedule = Schedule()
    optimiser: Optimiser = Optimiser()
    training: Training = Training()

    @model_validator(mode="after")
    def _varies_what_is_shown(self) -> Self:
        varied = [name for name in CHANGING if getattr(self.training, name) not in (0, "auto")]
        if varied and (self.data.histogram or self.data.task == "super-resolution"):
            raise ValueError(
                f"training.{varied[0]} changes the source's intensities: it cannot be used with data.histogram (ranks "
                "would not change) or super-resolution"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        stages, folds = self.generator.stages, self.generator.inner_folds
        trainings = (stages - 1) * (folds + 1) + 1
        if stages > 1 and self.schedule.steps < stages * (folds + 1):
            raise ValueError(
                f"{stages} stages with {folds} inner folds are {trainings} trainings and need at least "
                f"{stages * (folds + 1)} steps, not {self.schedule.steps}"
            )
        return self


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from TOML, a user's own or one that `write_recipe` wrote.

    Raises:
        RunError: If the file is missing, not TOML, or was changed after `write_recipe`.
        RecipeError: If a setting is unknown or out of range.
    """
    content = read_toml(path)
    recipe = validate_recipe(without_checksum(content), path)
    check_checksum(
        content,
        path,
        "Restore it as it was, or start a new run in another folder; a recipe of your own has no line `checksum`.",
    )
    return recipe


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Write a recipe as TOML, every field stated, with its checksum."""
    write_toml(path, with_checksum(recipe.model_dump(mode="json")))


#: How a value is written, by the kind of error that another value causes.
AS_WRITTEN = {
    "tuple_type": 'Write a list in brackets, such as [1, 2] or ["t1", "t2"].',
    "dict_type": "Write a table in braces, such as {size=24}.",
}


def validate_recipe(content: Mapping[str, Any], path: Path | None) -> Recipe:
    """Make a recipe of its sections, read from `path` or made here.

    Raises:
        RecipeError: If a setting is unknown or out of range, or two are at odds.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        first = errors[0]
        name = ".".join(map(str, first["loc"][:2])) or "recipe"
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "literal_error" and len(errors) > 1 and errors[1]["loc"][:2] == first["loc"][:2]:
            message += f" or {errors[1]['msg'].removeprefix('Input should be ')}"  # a word or a number
        what = f"setting {name}: {message}"
        found = None if isinstance(first["input"], Mapping) else shortened(first["input"])
        hint = AS_WRITTEN.get(first["type"])
        raise RecipeError(what[0].lower() + what[1:], path=path, reason="setting", found=found, hint=hint) from error


def parse_setting(text: str) -> tuple[str, object]:
    """Separate a text such as "loss.norm=l1" into the name and the value of a setting.

    Raises:
        RecipeError: If it has no name or no equals sign, or the value is a table that cannot be read.
    """
    name, separator, value = text.partition("=")
    if not separator or not name.strip():
        raise RecipeError("a setting is not of the form section.field=value", reason="setting", found=repr(text))
    return name.strip(), _parse_value(value.strip(), name.strip())


def _parse_value(text: str, name: str) -> object:
    """Read a value as TOML, a table also as JSON; what is neither is a word.

    >>> _parse_value('{size = 24}', "generator.options"), _parse_value('{"size": 24}', "generator.options")
    ({'size': 24}, {'size': 24})
    """
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # no TOML, a number of endless digits, brackets without end
        if not text.startswith("{"):
            return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RecipeError(
            f"the value of {name} is no table of TOML or JSON",
            reason="setting",
            found=shortened(text),
            expected='{size=24} or {"size": 24}',
        ) from None


def put_setting(content: dict[str, Any], name: str, value: object) -> None:
    """Put a value into the sections of a recipe.

    Args:
        content: The sections; changed in place.
        name: Dotted, such as "loss.norm"; names of version 0.1 are known too.
        value: Not yet checked.

    Raises:
        RecipeError: If there is no such section or setting.
    """
    section, separator, field = name.partition(".")
    known = Recipe.model_fields
    if section not in known:
        raise unknown("section of a recipe", section, list(known))
    settings = known[section].annotation
    fields = getattr(settings, "model_fields", {})
    field = getattr(settings, "OLD_NAMES", {}).get(field, field)
    if not separator and fields:
        raise RecipeError(f"{section!r} is a section", reason="setting", expected=f"{section}.FIELD={shortened(value)}")
    if not separator:
        content[section] = value
        return
    if field not in fields:
        raise unknown(f"setting in {section!r}", field, list(fields) or "none")
    content.setdefault(section, {})[field] = value
