"""What to try next: a list of rules; the first rule that applies gives the advice.

The worst problems come first: an unfinished training, unusual inputs, a training that was too short or too long,
lesions, and so on.  The last rule advises a comparison with other methods.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from statistics import fmean

from chiasm.cohorts.cases import grouped
from chiasm.methods import find_method
from chiasm.names import three_digits
from chiasm.recipe import Recipe
from chiasm.reports.curves import FLAT_RATIO, HEALTHY_ACCURACY, Point
from chiasm.reports.evidence import Evidence
from chiasm.reports.naive_comparison import BaselineComparison

STILL_FALLING = 0.01  # by which share the last validation is better than the one before, where more steps may help
RISEN = 0.05  # by which share the last validation is worse than the best one, where a training was too long
FEW_STEPS = 200  # below, a training shows little but its start
FEW_SUBJECTS = 6  # below, no difference can be called significant
SITE_RATIO = 1.25  # of the mean errors of two sites, above which they differ
TRUSTED = (0.8, 1.25)  # ratio of expected and true error
MOST_CLOSED = 0.5  # share of steps without attention, above which it is worth asking what it is for


Rule = Callable[[Evidence], str]


def _of_any_model(rule: Rule) -> Rule:
    """Apply a rule to one model after another, and name the first that it applies to, of several."""

    @wraps(rule)
    def of_any(found: Evidence) -> str:
        said = (f"{label}{sentence}" for label, one in found.models.items() if (sentence := rule(one)))
        return next(said, "")

    return of_any


def advise(evidence: Evidence) -> str:
    """Say what to try next, and why."""
    return next(said for rule in RULES if (said := rule(evidence)))


def _unfinished(found: Evidence) -> str:
    if stopped := _stopped(found):
        return stopped
    if len(found.models) < found.planned:
        return f"Model {len(found.models) + 1} of {found.planned} has not begun: run the same command again to go on."
    return ""


@_of_any_model
def _stopped(model: Evidence) -> str:
    if model.is_finished:
        return ""
    steps = max((line["step"] for line in model.history), default=0)
    done = f"stopped after step {steps} of {model.recipe.schedule.steps}" if steps else "has not begun"
    return f"The training {done}: run the same command again to go on."


def _unevaluated(found: Evidence) -> str:
    if found.rows:
        return ""
    return (
        "The model was not tested on other cases yet: chiasm predict RUN DATA --only test -o PREDICTIONS, "
        "then chiasm evaluate PREDICTIONS DATA -o EVALUATION."
    )


def _inputs(found: Evidence) -> str:
    count, every = len(found.out_of_distribution), len(found.entries)
    if not count or 2 * count < every:
        return ""
    return (
        f"{count} of {every} inputs are out of distribution: train on cases like them too, or prepare them "
        "in the same way; chiasm inspect shows what differs."
    )


def _too_short(found: Evidence) -> str:
    steps = found.recipe.schedule.steps
    if steps >= FEW_STEPS:
        return ""
    return (
        f"Only {steps} steps were trained, too few to assess the method: give chiasm run more --minutes, or "
        f"chiasm train --steps {10 * FEW_STEPS}."
    )


@_of_any_model
def _steps(found: Evidence) -> str:
    """Say whether the training was too short or too long, by its validations."""
    curve = [point for point in found.points("validation", "mae") if point.step > 0]
    if len(curve) < 2:
        return ""
    best, last, before = min(curve, key=lambda point: point.value), curve[-1], curve[-2]
    if last.value > (1 + RISEN) * best.value:
        return (
            f"The validation error rose from {best.value:.3g} at step {best.step} to {last.value:.3g} at step "
            f"{last.step}: give fewer steps (chiasm train --steps {best.step * int(found.recipe.split.models)}) or, "
            "better, more training cases."
        )
    if last == best and last.value < (1 - STILL_FALLING) * before.value:
        return _longer(before, last, found.recipe)
    return ""


def _longer(before: Point, last: Point, recipe: Recipe) -> str:
    steps = 2 * recipe.schedule.steps * int(recipe.split.models)  # that several models share
    return (
        f"The validation error was still falling, from {before.value:.3g} at step {before.step} to {last.value:.3g} at "
        f"step {last.step}: give more steps (chiasm train --steps {steps}), or more minutes."
    )


def _lesions(found: Evidence) -> str:
    """Advise on lesions, if the model's error is not lower there than a baseline's."""
    behind = [one for one in found.lesions if not one.paired.is_ahead]
    if not behind:
        return ""
    worst = max(behind, key=lambda one: one.difference.mean)
    share = found.recipe.training.lesion_share
    why = _behind(worst.region, worst)
    if not share:
        return f"{why}: take half of the patches on lesions, chiasm train --set training.lesion_share=0.5."
    if not found.recipe.training.transplant_share:
        return (
            f"{why}, though a share of {share:g} of the patches lies on lesions: move lesions between cases, "
            "chiasm train --method difficult-transplants."
        )
    return f"{why}, though lesions were moved between cases: more cases with lesions would help most."


def _whole(found: Evidence) -> str:
    """Advise on the whole mask, if the model's error is not lower there than a baseline's."""
    mask = next((one for one in found.comparisons if one.region == "mask"), None)
    if mask is None or mask.paired.is_ahead:
        return ""
    why = _behind("the mask", mask)
    if found.plan.registration == "none":
        return f"{why}: check whether source and target are aligned; if not, use chiasm train --register rigid."
    return f"{why}: {found.roles.get('train', 0)} training cases may be too few; more of them would help most."


def _behind(where: str, one: BaselineComparison) -> str:
    """Say that the error is not lower than a baseline's by more than the tolerance."""
    return (
        f"In {where} the error is not lower than that of {one.baseline} "
        f"({three_digits(one.ours)} against {three_digits(one.theirs)}, n = {one.paired.subjects})"
    )


@_of_any_model
def _attention(found: Evidence) -> str:
    """Advise on attention that had no effect."""
    if found.recipe.attention.head == "none":
        return ""
    shares, ratios = found.points("validation", "gate_closed_share"), found.points("validation", "weight_ratio")
    if shares and shares[-1].value > MOST_CLOSED:
        why = f"The attention was off in {100 * shares[-1].value:.0f} % of its steps"
    elif ratios and abs(ratios[-1].value - 1) <= FLAT_RATIO:
        why = f"The attention does not favour lesions: they weigh {ratios[-1].value:.2f} times healthy tissue"
    else:
        return ""
    plain = find_method("dual").title
    return f"{why}: chiasm train --method dual trains without attention; chiasm study shows whether {plain} is as good."


@_of_any_model
def _discriminators(found: Evidence) -> str:
    """Advise on a discriminator that left its working range."""
    lowest, highest = HEALTHY_ACCURACY
    rate = found.recipe.optimiser.discriminator_rate
    for name in ("global", "local"):
        curve = found.points("step", f"accuracy_{name}")
        if curve and not lowest <= curve[-1].value <= highest:
            return _other_rate(name, curve[-1].value, rate)
    return ""


def _other_rate(name: str, accuracy: float, rate: float) -> str:
    """Describe how to change the rate of a discriminator that ended too weak or too strong."""
    weak = accuracy < HEALTHY_ACCURACY[0]
    ended, change, factor = ("near guessing", "double", 2) if weak else ("saturated", "halve", 0.5)
    return (
        f"The {name} discriminator ended {ended} (accuracy {accuracy:.2f}): {change} its rate, "
        f"chiasm train --set optimiser.discriminator_rate={rate * factor:g}."
    )


def _sites(found: Evidence) -> str:
    by_site = errors_by_site(found)
    if len(by_site) < 2:
        return ""
    low, high = (choose(by_site, key=lambda site: fmean(by_site[site])) for choose in (min, max))
    errors = fmean(by_site[low]), fmean(by_site[high])
    if min(len(by_site[low]), len(by_site[high])) < 2 or errors[1] < SITE_RATIO * errors[0]:
        return ""
    return (
        f"Site {high} is harder ({three_digits(errors[1])} against {three_digits(errors[0])} at {low}): "
        "chiasm train --method ranks also shows intensities as ranks, and depends less on the scanner."
    )


def errors_by_site(found: Evidence) -> dict[str, list[float]]:
    """Return the mean absolute error in the mask of each case, by site."""
    errors = found.of_cases("mask", "mae")
    sites = grouped((case for case in errors if case in found.sites), lambda case: found.sites[case])
    return {site: [errors[case] for case in cases] for site, cases in sites.items()}


def _expected_error(found: Evidence) -> str:
    ratio = found.scores("mask", "calibration")
    if ratio is None or TRUSTED[0] <= ratio.mean <= TRUSTED[1]:
        return ""
    return f"The expected error is {ratio.mean:.2f} times the true one: {_way_to_calibrate(found)}."


def _way_to_calibrate(found: Evidence) -> str:
    """Name the setting by which more cases calibrate a model, if there is one: several models share all cases."""
    validating, share = found.roles.get("validation", 0), min(0.4, 2 * found.recipe.split.validation)
    more = round(share * (validating + found.roles.get("train", 0)))
    if found.recipe.split.models != 1 or more <= validating:
        return "it needs more cases to calibrate on, so use it to compare voxels, not as a number"
    return f"calibrate it on more cases, chiasm train --set split.validation={share:g}"


def _few(found: Evidence) -> str:
    count = len(found.of_cases("mask", "mae"))
    if count >= FEW_SUBJECTS or found.recipe.split.models != 1:  # of several models, each case was tested already
        return ""
    return (
        f"Only {count} cases were tested: train the other folds too (chiasm train --fold 1, ...), and evaluate all "
        "predictions together: chiasm evaluate PREDICTIONS_0 PREDICTIONS_1 ... DATA -o EVALUATION."
    )


def _compare(found: Evidence) -> str:
    other = "dual" if found.recipe.method != find_method("dual").key else "l2"
    return f"No weakness stands out: use chiasm study to compare it with other methods, such as {other}."


RULES: tuple[Rule, ...] = (
    *(_unfinished, _unevaluated, _inputs, _too_short, _steps, _lesions, _whole),
    *(_attention, _discriminators, _sites, _expected_error, _few, _compare),
)
