"""Methods and tasks by name, each a few settings away from the defaults.

A recipe is built in layers: the defaults, one size (how much effort), one method, then single settings given as
`section.field=value`.  An ablation is a row of `METHODS`, never code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from chiasm.errors import unknown
from chiasm.recipe import Recipe, parse_setting, put_setting, validate_recipe
from chiasm.sizes import OWN_SIZES, SIZES, Changes

#: What a run can be trained for, in words.
TASKS: Mapping[str, str] = {
    "synthesis": "another modality of the same grid",
    "super-resolution": "thin slices from thick ones, also of another modality; beside bicubic",
}

Group = Literal["method", "control", "literature"]

#: Headings of the groups of methods, in the order in which they are listed.
GROUPS: Mapping[Group, str] = {
    "method": "This method and its arms",
    "control": "Controls: plain losses and other weights, what any claim must be compared with",
    "literature": "Systems of the literature, each with its own network or objective",
}

#: What to start with, and why.
STARTS: Mapping[str, str] = {
    "l2-expected-error": "the default: best in an equal time, with an expected error (docs/results.md)",
    "dual-attention": "the method of the paper: two discriminators, and attention",
    "l2": "the control that every claim needs: the same network alone, fastest",
    "unet": "a plain network of the literature",
}

NIE = "Nie et al., arXiv:1907.03297"

#: Who proposed each method that is not in the paper, by code.
CREDITS: Mapping[str, str] = {
    **dict.fromkeys(("A0", "A1"), "a plain loss, of nobody"),
    "A2": "Mathieu et al., arXiv:1511.05440",
    "A3": "Isola et al., arXiv:1611.07004",
    "A3b": "Isola et al., arXiv:1611.07004",
    "A4": "Gulrajani et al., arXiv:1704.00028",
    "A7": f"{NIE}, with the structured head of this project",
    **dict.fromkeys(("A8n", "A9", *(f"A{n}" for n in range(10, 16))), f"this project, on {NIE}"),
    "A16": "this project, after Ghiasi et al., arXiv:2012.07177",
    "C1": "after Lin et al., arXiv:1708.02002",
    "C2": "after Shrivastava et al., arXiv:1604.03540",
    **dict.fromkeys(("A17", "C3", "C4", "C5"), "this project"),
    "C6": "as Isensee et al., doi:10.1038/s41592-020-01008-z",
    "C7": "after Ghiasi et al., arXiv:2012.07177",
}
CONTROLS = ("A0", "A1", "A2", "A3", "A3b", "A4", *(f"C{n}" for n in range(1, 8)))


@dataclass(frozen=True)
class Method:
    """A method that can be trained, compared and named.

    Attributes:
        name: For `--method` and for the arms of a study.
        words: A description.
        changes: Dotted names of settings to values, where they differ from the defaults.
        code: Short name in recipes and tables of results; without one, the name is used.
        paper: Who proposed the objective, if `CREDITS` does not name it; the networks' papers are in their catalogue.
        aliases: Other names.
    """

    name: str
    words: str
    changes: Changes
    code: str = ""
    paper: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The name under which recipes and results file it."""
        return self.code or self.name

    @property
    def title(self) -> str:
        """The name for people, with the code in brackets where there is one."""
        return f"{self.name} ({self.code})" if self.code else self.name

    @property
    def credit(self) -> str:
        """Who proposed its objective."""
        return self.paper or CREDITS.get(self.code, NIE)

    @property
    def group(self) -> Group:
        """Its group in `GROUPS`; a method without a code of this project is of the literature."""
        return "literature" if not self.code else "control" if self.code in CONTROLS else "method"

    @property
    def called(self) -> set[str]:
        """All its names, in lower case."""
        return {word.lower() for word in (self.name, self.key, *self.aliases)}


_OWN = Recipe().generator.network
_NO_ADVERSARY: Changes = {"loss.global_weight": 0.0, "loss.local_weight": 0.0}
_NO_ATTENTION: Changes = {"attention.head": "none"}
_L1: Changes = {"loss.norm": "l1"}
_L1_GLOBAL: Changes = {"loss.norm": "l1", "loss.global_weight": 0.005}
_L1_LOCAL: Changes = {"loss.norm": "l1", "loss.local_weight": 0.01}
_PLAIN: Changes = {**_NO_ADVERSARY, **_NO_ATTENTION}
#: The generator learns in all steps, and nothing goes by the local discriminator, which learns in the last of them.
_EXPECTING: Changes = {
    **_PLAIN,
    "discriminators.confidence": True,
    "schedule.generator_alone": 0.7,
    "schedule.discriminators_alone": 0.0,
    "attention.magnitude_mm": 1.0,
}
#: As the paper has it: nothing of this project's own, so no gate either.
_LITERAL: Changes = {
    "attention.head": "realness",
    "attention.beta": 2.0,
    "attention.norm": "none",
    "attention.gate": False,
}
#: Adam as Radford 2015 has it, and Isola 2017 after it, for both players.
_RADFORD: Changes = {
    "optimiser.generator_rate": 2e-4,
    "optimiser.discriminator_rate": 2e-4,
    "optimiser.betas": (0.5, 0.999),
}
_CONTEXT_GAN: Changes = {
    **_NO_ATTENTION,
    "generator.network": "context-fcn",
    "discriminators.global_network": "context",
    "loss.local_weight": 0.0,
    "loss.gradient_difference": 1.0,
}

_METHODS = (
    Method("l1", "L1", {**_PLAIN, **_L1}, code="A0"),
    Method("l2", "L2", {**_PLAIN}, code="A1"),
    Method("l2-expected-error", "L2, and beside it an expected error of each voxel", {**_EXPECTING}, code="A17"),
    Method(
        "gradient-difference",
        "L1 and gradient difference",
        {**_PLAIN, **_L1, "loss.gradient_difference": 0.05},
        code="A2",
    ),
    Method(
        "global", "L1 and a global discriminator", {**_NO_ATTENTION, **_L1_GLOBAL, "loss.local_weight": 0.0}, code="A3"
    ),
    Method("global-l2", "L2 and a global discriminator", {**_NO_ATTENTION, "loss.local_weight": 0.0}, code="A3b"),
    Method(
        "global-wgan-gp",
        "L1 and a global discriminator, Wasserstein with gradient penalty",
        {**_NO_ATTENTION, **_L1_GLOBAL, "loss.local_weight": 0.0, "loss.adversarial": "wgan-gp"},
        code="A4",
    ),
    Method(
        "local", "L1 and a local discriminator", {**_NO_ATTENTION, **_L1_LOCAL, "loss.global_weight": 0.0}, code="A5"
    ),
    Method("local-l2", "L2 and a local discriminator", {**_NO_ATTENTION, "loss.global_weight": 0.0}, code="A5b"),
    Method(
        "dual-l1", "L1 and both discriminators, no attention", {**_NO_ATTENTION, **_L1_GLOBAL, **_L1_LOCAL}, code="A6"
    ),
    Method("dual", "L2 and both discriminators, no attention", {**_NO_ATTENTION}, code="A6b"),
    Method("dual-attention", "L2, both discriminators, attention from the structured head", {}, code="A7"),
    Method(
        "literal", "as the paper states it: attention from realness, beta 2, not normalised", {**_LITERAL}, code="A8"
    ),
    Method(
        "literal-normalised",
        "attention from realness, beta 2, normalised",
        {**_LITERAL, "attention.norm": "mean"},
        code="A8n",
    ),
    Method(
        "literal-attached",
        "attention from realness, beta 2, not detached",
        {**_LITERAL, "attention.detach": False},
        code="A9",
    ),
    Method("attention-only", "attention alone, no adversarial terms", {**_NO_ADVERSARY}, code="A10"),
    Method(
        "unconditional-local",
        "dual-attention with a local discriminator that does not see the source",
        {"discriminators.conditional": False},
        code="A11",
    ),
    Method("magnitude-attention", "attention from the magnitude head", {"attention.head": "magnitude"}, code="A12"),
    Method(
        "attention-sampling",
        "attention decides where patches are taken, not how they weigh",
        {"attention.use": "sample"},
        code="A13",
    ),
    Method(
        "ranks",
        "dual-attention that also sees each source as ranks in its own histogram",
        {"data.histogram": True, "training.intensity_jitter": 0.2},
        code="A14",
    ),
    Method(
        "refiner",
        "dual-attention with a second stage that corrects where confidence is low",
        {"generator.refiner": (8, 16, 32)},
        code="A15",
    ),
    Method(
        "difficult-transplants",
        "dual-attention with lesions transplanted between training cases, hard ones more often",
        {"training.transplant_share": 0.5, "training.transplant": "difficulty"},
        code="A16",
    ),
    Method("focal", "L2 weighted by the error itself (focal)", {**_PLAIN, "loss.focal": 1.0}, code="C1"),
    Method("top-k", "L2 of the worst quarter of the voxels", {**_PLAIN, "loss.top_k": 0.25}, code="C2"),
    Method(
        "lesion-oracle",
        "L2 weighted four times inside the true lesion (oracle)",
        {**_PLAIN, "loss.lesion": 4.0},
        code="C3",
    ),
    Method(
        "shuffled-attention",
        "dual-attention with its weights shuffled over the mask",
        {"attention.shuffle": True},
        code="C4",
    ),
    Method(
        "two-global",
        "L2 and two global discriminators",
        {**_NO_ATTENTION, "discriminators.second_global": True},
        code="C5",
    ),
    Method("lesion-patches", "L2, half of the patches on lesions", {**_PLAIN, "training.lesion_share": 0.5}, code="C6"),
    Method(
        "random-transplants",
        "L2, lesions transplanted at random",
        {**_PLAIN, "training.transplant_share": 0.5},
        code="C7",
    ),
    # the literature's systems: each its own network, and the loss that its paper trains it with
    Method("srcnn", "three convolutions, 9-1-5 (Dong 2016)", {**_PLAIN, "generator.network": "srcnn"}),
    Method("srcnn-955", "three convolutions, 9-5-5 (Dong 2016)", {**_PLAIN, "generator.network": "srcnn-955"}),
    Method("fcn8", "VGG16 with fused scores (Long 2015)", {**_PLAIN, "generator.network": "fcn8"}),
    Method("unet", "the plain U-Net (Ronneberger 2015)", {**_PLAIN, "generator.network": "unet"}),
    Method("fcn3d", "valid 3D convolutions (Nie 2016)", {**_PLAIN, "generator.network": "fcn3d", "data.dims": "3d"}),
    Method(
        "han",
        "27 convolutions with unpooling, L1 (Han 2017)",
        {**_PLAIN, **_L1, "generator.network": "han", "data.dims": "2d"},
    ),
    Method(
        "li-cnn",
        "3D patch network of two hidden layers (Li 2014)",
        {
            **_PLAIN,
            "generator.network": "li-cnn",
            "generator.scale": 1.0,  # ten channels: an eighth of them is one, which dies
            "data.dims": "3d",
        },
    ),
    Method("context-gan", "FCN with a discriminator and gradient difference (Nie 2017)", _CONTEXT_GAN),
    Method(
        "context-gan-2",
        "context-gan in two stages, the second of which sees the first's image (Nie 2017)",
        {**_CONTEXT_GAN, "generator.stages": 2},
    ),
    Method(
        "strainet",
        "stochastic residual units, spatially varying convolution (Nie 2018)",
        {
            **_NO_ATTENTION,
            "generator.network": "strainet",
            "discriminators.global_network": "strainet",
            "loss.local_weight": 0.0,
        },
    ),
    Method(
        "gan",
        "L1 and a global discriminator, literal cross-entropy (Goodfellow 2014)",
        {**_NO_ATTENTION, **_L1_GLOBAL, "loss.local_weight": 0.0, "loss.smoothing": 0.0},
        paper="Goodfellow et al., arXiv:1406.2661",
    ),
    Method(
        "lsgan",
        "L1 and a global discriminator, least squares (Mao 2017)",
        {**_NO_ATTENTION, **_L1_GLOBAL, "loss.local_weight": 0.0, "loss.adversarial": "lsgan"},
        paper="Mao et al., arXiv:1611.04076",
    ),
    Method(
        "hinge",
        "L1 and a global discriminator, hinge and spectral normalisation (Miyato 2018)",
        {
            **_NO_ATTENTION,
            **_L1_GLOBAL,
            "loss.local_weight": 0.0,
            "loss.adversarial": "hinge",
            "discriminators.global_spectral_norm": True,
            "optimiser.discriminator_rate": 2e-4,
            "optimiser.discriminator_betas": (0.5, 0.999),
        },
        paper="Miyato et al., arXiv:1802.05957",
        aliases=("sngan",),
    ),
    Method(
        "wgan",
        "L1 and a global critic with clipped weights (Arjovsky 2017)",
        {
            **_NO_ATTENTION,
            **_L1_GLOBAL,
            "loss.local_weight": 0.0,
            "loss.adversarial": "wgan",
            "loss.discriminator_steps": 5,
            "optimiser.discriminator": "rmsprop",  # the paper: momentum makes a clipped critic unstable
            "optimiser.discriminator_rate": 5e-5,
        },
        paper="Arjovsky et al., arXiv:1701.07875",
    ),
    Method(
        "wgan-gp",
        "L1 and a global critic with gradient penalty (Gulrajani 2017)",
        {
            **_NO_ATTENTION,
            **_L1_GLOBAL,
            "loss.local_weight": 0.0,
            "loss.adversarial": "wgan-gp",
            "loss.penalty_every": 1,
            "loss.discriminator_steps": 5,
            "optimiser.discriminator_rate": 1e-4,
            "optimiser.discriminator_betas": (0.0, 0.9),
        },
        paper="Gulrajani et al., arXiv:1704.00028",
    ),
    Method(
        "dcgan",
        "strided and transposed convolutions with their discriminator (Radford 2015)",
        {
            **_NO_ATTENTION,
            **_L1_GLOBAL,
            **_RADFORD,
            "generator.network": "dcgan",
            "discriminators.global_network": "dcgan",
            "loss.local_weight": 0.0,
            "loss.smoothing": 0.0,
        },
    ),
    Method(
        "pix2pix",
        "U-Net-256, 70 x 70 PatchGAN and 100 L1 (Isola 2017)",
        {
            **_NO_ATTENTION,
            **_L1,
            **_RADFORD,
            "generator.network": "pix2pix",
            "discriminators.global_network": "patch",
            "loss.global_weight": 0.01,  # one to a hundred of L1
            "loss.local_weight": 0.0,
            "loss.smoothing": 0.0,
        },
    ),
    Method(
        "jcsc",
        "joint convolutional sparse coding, few pairs and unpaired images (Huang 2017)",
        {
            **_PLAIN,
            "generator.network": "jcsc",
            "generator.scale": 0.04,  # 32 filters: codes of all patches are kept in memory
            "data.dims": "2d",
            "optimiser.kind": "admm",
            "schedule.steps": 30,
            "training.validations": 1,
        },
    ),
)

#: Every method by its key, in the order of the tables.
METHODS: dict[str, Method] = {method.key: method for method in _METHODS}


def title_of(key: str) -> str:
    """Return what to call a recipe's method; a variant of a study is called by its own name.

    >>> title_of("A7"), title_of("srcnn"), title_of("A7 sharper")
    ('dual-attention (A7)', 'srcnn', 'A7 sharper')
    """
    return METHODS[key].title if key in METHODS else key


def is_method(name: str) -> bool:
    """Return whether a method is called so, by name, code or alias."""
    return any(name.lower() in method.called for method in METHODS.values())


def find_method(name: str) -> Method:
    """Return a method by its name, its code or an alias, whatever the case.

    Raises:
        RecipeError: If there is none.

    >>> find_method("Dual-Attention").key
    'A7'
    """
    for method in METHODS.values():
        if name.lower() in method.called:
            return method
    aliases = sorted(set().union(*(method.called for method in METHODS.values())))
    raise unknown("method", name, [method.name for method in METHODS.values()], aliases=aliases)


def key_of(name: str) -> str:
    """Return the key of a method, found as by `find_method`; any other name stays, such as that of a variant.

    >>> key_of("dual-attention"), key_of("A7 sharper")
    ('A7', 'A7 sharper')
    """
    return find_method(name).key if is_method(name) else name


def make_recipe(
    method: str = "A7", size: str = "small", changes: Changes | None = None, settings: Sequence[str] = ()
) -> Recipe:
    """Build a recipe from the defaults, a size, a method and single changes, in this order.

    Args:
        method: A name, code or alias of `METHODS`.
        size: A name of `SIZES`.
        changes: Dotted field names to values.
        settings: Texts such as "loss.norm=l1", as given to `--set`; values are TOML, bare words are strings.

    Raises:
        RecipeError: If a name is unknown, a value is out of range, or two settings are at odds.

    >>> make_recipe("A0", "tiny").loss.norm
    'l1'
    """
    found = find_method(method)
    if size not in SIZES:
        raise unknown("size", size, SIZES)
    asked: list[Changes] = [found.changes, changes or {}, dict(map(parse_setting, settings))]
    is_own = all(layer.get("generator.network", _OWN) == _OWN for layer in asked)
    layers: list[Changes] = [SIZES[size], OWN_SIZES.get(size, {}) if is_own else {}, *asked]
    content: dict[str, Any] = {"method": found.key, "size": size}
    for name, value in chain.from_iterable(layer.items() for layer in layers):
        put_setting(content, name, value)
    return validate_recipe(content, None)


def change_recipe(content: dict[str, Any], changes: Changes, settings: Sequence[str]) -> Recipe:
    """Change single settings of a recipe.

    Args:
        content: Its sections, as `model_dump` gives them; changed in place.
        changes: Dotted field names to values.
        settings: Texts such as "loss.norm=l1", as given to `--set`.

    Raises:
        RecipeError: As `make_recipe`.
    """
    for name, value in [*changes.items(), *map(parse_setting, settings)]:
        put_setting(content, name, value)
    return validate_recipe(content, None)
