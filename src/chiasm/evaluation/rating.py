"""What a reader study found: agreement, images taken for real, quality, each with its interval and test.

Agreement within a rater is between the two showings of an image; all else is
of the first showings alone.  The unit of every test is the subject: a
subject's images, and the raters, are averaged first.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, combinations
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from chiasm.errors import RunError
from chiasm.evaluation.agreement import (
    binomial_p,
    count_pairs,
    resampled_interval,
    weighted_kappa,
    wilson_interval,
)
from chiasm.evaluation.paired_tests import FEWEST, Table, cluster_interval, holm, permutation_p, wilcoxon_p
from chiasm.evaluation.reader_files import (
    ANSWERS,
    LEVELS,
    REAL,
    Place,
    Rating,
    Ratings,
    has_columns,
    read_key,
    read_ratings,
)
from chiasm.methods import title_of
from chiasm.outputs import refuse_foreign, refuse_inputs, refuse_links
from chiasm.storage import whole_file, write_json

RESULTS = ("results.csv", "results.json")
ALL = "all raters"

Question = Literal[
    "agreement on quality", "agreement on real", "taken for real", "recognised", "quality", "quality difference"
]
K = TypeVar("K")


class Finding(NamedTuple):
    """One number of a reader study.

    Attributes:
        question: "agreement on quality" and "agreement on real" are kappas,
            "taken for real" a share of images, "recognised" the share of right
            answers among as many images of a method and real ones, "quality" a
            mean, "quality difference" one of `method` minus `against`.
        method: Of the images, "real" among them; "" for all.
        against: What it is set against, or "".
        rater: By name, or "all raters".
        other_rater: The second of two; the same name for one who saw images twice; "" for none.
        images: How many.
        subjects: Of how many persons.
        value: The number; NaN where it is not defined.
        low: Lower end of its 95 % interval; NaN where there is none.
        high: Upper end.
        interval: "Wilson", or "subjects" and "subjects, raters" for what was resampled.
        p: Two-sided; NaN where nothing was tested.
        p_holm: `p`, corrected over all differences in quality.
        test: By name, or "".
    """

    question: Question
    method: str
    against: str
    rater: str
    other_rater: str
    images: int
    subjects: int
    value: float
    low: float
    high: float
    interval: str
    p: float = math.nan
    p_holm: float = math.nan
    test: str = ""


class ReaderResults(NamedTuple):
    """What a reader study found: numbers, the same in sentences, and what raters left out."""

    findings: tuple[Finding, ...]
    sentences: tuple[str, ...]
    notes: tuple[str, ...]


def report_ratings(folder: Path, files: Sequence[Path]) -> ReaderResults:
    """Read the ratings of a study, and write `results.csv` and `results.json` into its folder.

    Args:
        folder: Of the study, which holds its key.
        files: One for each rater, as the page wrote them.

    Raises:
        RunError: If the folder holds no study, a file is not of it, or a file
            of somebody else stands where results go.
        ChiasmError: If the folder cannot be written.
    """
    ratings = read_ratings(files, read_key(folder))
    refuse_inputs((folder / name for name in RESULTS), files, what="the results")
    refuse_links(folder, RESULTS)
    if not has_columns(folder / RESULTS[0], Finding._fields):
        refuse_foreign(folder, RESULTS)
    found = assess(ratings)
    _write_results(folder, found)
    return found


def assess(ratings: Ratings) -> ReaderResults:
    """Answer every question of a reader study.

    Raises:
        RunError: If there are no readings of a first showing.
    """
    readings = [one for one in ratings.readings if one.item.showing == 1]
    if not readings:
        raise RunError("there is no answer to any image's first showing", reason="empty")
    findings = (
        *_agreements(ratings.readings),
        *chain.from_iterable(_taken_for_real(readings, method) for method in _methods(readings)),
        *chain.from_iterable(_recognised(readings, method) for method in _methods(readings) if method != REAL),
        *chain.from_iterable(_mean_quality(readings, method) for method in _methods(readings)),
        *_differences(readings),
    )
    stated = [one for one in findings if one.question != "taken for real" or one.interval == "Wilson"]  # once
    return ReaderResults(findings, tuple(map(say, stated)), ratings.notes)


def _methods(readings: Iterable[Rating]) -> list[str]:
    """List what images are of, the real ones first."""
    return sorted({one.item.method for one in readings}, key=lambda method: (method != REAL, method))


def _by(readings: Iterable[Rating], key: Callable[[Rating], K]) -> dict[K, list[Rating]]:
    """Group readings, in the order in which the groups come."""
    groups: dict[K, list[Rating]] = {}
    for one in readings:
        groups.setdefault(key(one), []).append(one)
    return groups


# Agreement


def _level_of_quality(one: Rating) -> int | None:
    return None if one.quality is None else one.quality - 1


def _level_of_answer(one: Rating) -> int | None:
    return None if one.answer is None else ANSWERS.index(one.answer)


def _agreements(readings: Sequence[Rating]) -> Iterator[Finding]:
    """Set the two showings of each rater against each other, and the first ones of each two raters."""
    by_rater = _by(readings, lambda one: one.rater)
    first = {rater: [one for one in said if one.item.showing == 1] for rater, said in by_rater.items()}
    again = {rater: [one for one in said if one.item.showing == 2] for rater, said in by_rater.items()}
    for rater in by_rater:
        yield from _agreement(rater, first[rater], rater, again[rater])
    for one, other in combinations(by_rater, 2):
        yield from _agreement(one, first[one], other, first[other])


def _agreement(rater: str, one: Sequence[Rating], other_rater: str, other: Sequence[Rating]) -> Iterator[Finding]:
    """Return the kappas of quality and of real or synthetic, where there are images that both readings share."""
    yield from _kappa("agreement on quality", LEVELS, _level_of_quality, (rater, one), (other_rater, other))
    yield from _kappa("agreement on real", len(ANSWERS), _level_of_answer, (rater, one), (other_rater, other))


def _kappa(
    question: Question,
    levels: int,
    level_of: Callable[[Rating], int | None],
    one: tuple[str, Sequence[Rating]],
    other: tuple[str, Sequence[Rating]],
) -> Iterator[Finding]:
    first, second = (
        {a.item.place: level for a in said if (level := level_of(a)) is not None} for _, said in (one, other)
    )
    subject_of = {a.item.place: a.item.subject for a in one[1]}
    shared: dict[str, list[Place]] = defaultdict(list)
    for place in first:
        if place in second:
            shared[subject_of[place]].append(place)
    if not shared:
        return
    sums = np.array(
        [
            count_pairs([first[place] for place in places], [second[place] for place in places], levels)
            for places in shared.values()
        ]
    )
    low, high = resampled_interval(sums, weighted_kappa)
    value = float(weighted_kappa(sums.sum(0)))
    yield Finding(question, "", "", one[0], other[0], int(sums.sum()), len(sums), value, low, high, "subjects")


# Real or synthetic


def _taken_for_real(readings: Sequence[Rating], method: str) -> Iterator[Finding]:
    """Return the share of a method's images that each rater took for real, and that of all raters.

    Wilson's interval takes images as independent, and counts an image once
    however many raters saw it; the other one resamples subjects.
    """
    answered = [one for one in readings if one.item.method == method and one.answer is not None]
    for rater, said in _with_all(answered):
        images = len({one.item.place for one in said})
        sums = np.array(
            [[sum(_is_for_real(one) for one in own), len(own)] for own in _by(said, _subject).values()], float
        )
        share = float(sums[:, 0].sum() / sums[:, 1].sum())
        row = Finding("taken for real", method, "", rater, "", images, len(sums), share, math.nan, math.nan, "Wilson")
        low, high = wilson_interval(share * images, images)
        yield row._replace(low=low, high=high)
        low, high = resampled_interval(sums, _ratio)
        yield row._replace(low=low, high=high, interval="subjects")


def _subject(one: Rating) -> str:
    return one.item.subject


def _is_for_real(one: Rating) -> bool:
    return one.answer == REAL


def _ratio(sums: Table) -> Table:
    with np.errstate(invalid="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


def _with_all(readings: Sequence[Rating]) -> Iterator[tuple[str, list[Rating]]]:
    """Yield each rater, and then all raters together if there are several."""
    by_rater = _by(readings, lambda one: one.rater)
    yield from by_rater.items()
    if len(by_rater) > 1:
        yield ALL, list(readings)


def _recognised(readings: Sequence[Rating], method: str) -> Iterator[Finding]:
    """Return the share of right answers among a method's images and the real ones of the same slices.

    There are as many of both, so that whoever guesses, however often "real",
    is right in half of them.
    """
    pairs = _slice_pairs([one for one in readings if one.answer is not None], method, REAL)
    by_rater: dict[str, list[tuple[str, int]]] = defaultdict(list)  # subject, right answers of two
    for made, real in pairs:
        by_rater[made.rater].append((made.item.subject, int(not _is_for_real(made)) + int(_is_for_real(real))))
    row = Finding("recognised", method, REAL, ALL, "", 0, 0, math.nan, math.nan, math.nan, "subjects")
    for rater, found in by_rater.items():
        right, images = sum(count for _, count in found), 2 * len(found)
        table = _table([(subject, rater, count / 2) for subject, count in found])
        low, high = _interval(table)
        yield row._replace(
            rater=rater,
            images=images,
            subjects=len(table),
            value=right / images,
            low=low,
            high=high,
            p=binomial_p(right, images),
            test="binomial",
        )
    if len(by_rater) > 1:
        table = _table([(subject, rater, count / 2) for rater, found in by_rater.items() for subject, count in found])
        means = np.nanmean(table, axis=1)
        low, high = _interval(table)
        yield row._replace(
            images=2 * len({made.item.place for made, _ in pairs}),
            subjects=len(table),
            value=float(means.mean()),
            low=low,
            high=high,
            interval="subjects, raters",
            p=permutation_p(means - 0.5) if len(means) >= FEWEST else math.nan,
            test="sign flips by subject",
        )


# Quality


def _slice_pairs(readings: Sequence[Rating], method: str, against: str) -> list[tuple[Rating, Rating]]:
    """Pair what each rater said of two methods' images of one slice."""
    said = {(one.rater, one.item.place): one for one in readings}
    return [
        (one, other)
        for (rater, (case, index, name)), one in said.items()
        if name == method and (other := said.get((rater, (case, index, against)))) is not None
    ]


def _table(values: Iterable[tuple[str, str, float]]) -> Table:
    """Average values (subject, rater, value) to a table (subjects, raters), in the order of names; NaN for none."""
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for subject, rater, value in values:
        cells[subject, rater].append(value)
    subjects, raters = (sorted({cell[side] for cell in cells}) for side in (0, 1))
    return np.array(
        [
            [float(np.mean(cells[row, column])) if (row, column) in cells else math.nan for column in raters]
            for row in subjects
        ]
    )


def _interval(table: Table) -> tuple[float, float]:
    return cluster_interval(table) if len(table) > 1 else (math.nan, math.nan)


def _resampled(table: Table) -> str:
    return "subjects, raters" if table.shape[1] > 1 else "subjects"


def _mean_quality(readings: Sequence[Rating], method: str) -> Iterator[Finding]:
    """Return the mean quality over subjects of the mean over raters and slices, where there is any."""
    rated = [one for one in readings if one.item.method == method and one.quality is not None]
    if not rated:
        return
    table = _table((one.item.subject, one.rater, float(one.quality or 0)) for one in rated)
    images, value = len({one.item.place for one in rated}), float(np.nanmean(table, axis=1).mean())
    yield Finding("quality", method, "", ALL, "", images, len(table), value, *_interval(table), _resampled(table))


def _differences(readings: Sequence[Rating]) -> list[Finding]:
    """Compare the quality of each two methods, and of each with the real images, by subject."""
    rated = [one for one in readings if one.quality is not None]
    names = [*(method for method in _methods(readings) if method != REAL), REAL]
    found = [_difference(rated, method, against) for method, against in combinations(names, 2)]
    tested = [one for one in found if one is not None]
    return [one._replace(p_holm=p) for one, p in zip(tested, holm([one.p for one in tested]))]


def _difference(rated: Sequence[Rating], method: str, against: str) -> Finding | None:
    pairs = _slice_pairs(rated, method, against)
    if not pairs:
        return None
    table = _table((a.item.subject, a.rater, float((a.quality or 0) - (b.quality or 0))) for a, b in pairs)
    means = np.nanmean(table, axis=1)
    low, high = _interval(table)
    return Finding(
        "quality difference",
        method,
        against,
        ALL,
        "",
        len({a.item.place for a, _ in pairs}),
        len(table),
        float(means.mean()),
        low,
        high,
        _resampled(table),
        wilcoxon_p(means) if len(means) >= FEWEST else math.nan,
        test="Wilcoxon signed rank",
    )


# In words and on the disk


def say(one: Finding) -> str:
    """Describe a finding in a sentence.

    >>> say(Finding("taken for real", "A7", "", "anna", "", 12, 6, 0.25, 0.09, 0.53, "Wilson"))
    'anna took 25 % of 12 images of dual-attention (A7) for real (95 % interval 9 % to 53 %, Wilson).'
    """
    return _SENTENCES[one.question](one)


def _say_agreement(one: Finding) -> str:
    who = f"{one.rater}, who saw them twice" if one.rater == one.other_rater else f"{one.rater} and {one.other_rater}"
    on = "quality, weighted," if one.question == "agreement on quality" else "real or synthetic"
    if math.isnan(one.value):
        return f"Kappa of {on} is not defined over {one.images} images of {who}: each reading knows one level only."
    return f"Kappa of {on} is {_two(one.value)} over {one.images} images of {who}{_aside(one, _two)}."


def _say_taken(one: Finding) -> str:
    return f"{one.rater} took {_percent(one.value)} of {one.images} {_of(one.method)} for real{_aside(one, _percent)}."


def _say_recognised(one: Finding) -> str:
    right = f"{one.rater} answered right in {_percent(one.value)} of {one.images} images"
    return f"{right}, half of them real and half of {title_of(one.method)}{_aside(one, _percent)}; chance is 50 %."


def _say_quality(one: Finding) -> str:
    return f"Mean quality of {one.images} {_of(one.method)} is {_two(one.value)} of {LEVELS}{_aside(one, _two)}."


def _say_difference(one: Finding) -> str:
    first, second = (name if name == REAL else title_of(name) for name in (one.method, one.against))
    words = f"Quality of {first} minus {second} is {_signed(one.value)} over {one.subjects} subjects"
    return f"{words}{_aside(one, _signed)}."


def _of(method: str) -> str:
    return "real images" if method == REAL else f"images of {title_of(method)}"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _signed(value: float) -> str:
    return f"{value:+.2f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _aside(one: Finding, show: Callable[[float], str]) -> str:
    """Describe the interval and the test of a finding, in brackets."""
    parts = []
    if not math.isnan(one.low):
        how = one.interval if one.interval == "Wilson" else f"{one.interval.replace(', ', ' and ')} resampled"
        parts.append(f"95 % interval {show(one.low)} to {show(one.high)}, {how}")
    if not math.isnan(one.p):
        parts.append(f"{one.test} p = {one.p:.3g}")
        parts += [] if math.isnan(one.p_holm) else [f"{one.p_holm:.3g} after Holm"]
    elif one.test:
        parts.append(f"not tested: fewer than {FEWEST} subjects")
    return f" ({'; '.join(parts)})" if parts else ""


_SENTENCES: dict[Question, Callable[[Finding], str]] = {
    "agreement on quality": _say_agreement,
    "agreement on real": _say_agreement,
    "taken for real": _say_taken,
    "recognised": _say_recognised,
    "quality": _say_quality,
    "quality difference": _say_difference,
}


def _write_results(folder: Path, found: ReaderResults) -> None:
    """Write the findings as a table, and with the sentences as JSON, in which NaN is null."""
    with whole_file(folder / RESULTS[0]) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Finding._fields)
        writer.writerows(found.findings)
    rows = [
        {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in one._asdict().items()
        }
        for one in found.findings
    ]
    write_json(folder / RESULTS[1], {"findings": rows, "sentences": list(found.sentences), "notes": list(found.notes)})
