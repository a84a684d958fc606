"""`chiasm inspect`: read every file of a cohort, and report grids, regions and problems."""

from __future__ import annotations

import shlex
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from chiasm.cohorts.cases import Case, Cohort, Problem, volume_stem
from chiasm.cohorts.dicom_patients import Selection
from chiasm.cohorts.discovery import count_modalities, find_cohort, select_cases
from chiasm.cohorts.gathering import notes_in_lines
from chiasm.cohorts.splits import choose_folds, make_split
from chiasm.errors import CohortError
from chiasm.names import amount
from chiasm.on_demand import Scratch
from chiasm.preparation.examination import ExaminedCase, describe_displaced, examine_cases
from chiasm.preparation.unpaired import refuse_duplicates
from chiasm.progress import Progress
from chiasm.recipe import Data, SplitSettings


@dataclass(frozen=True)
class CaseSummary:
    """One line of the table of a cohort's cases.

    Attributes:
        id: The case.
        subject: The person.
        site: Hospital or scanner, where known.
        modalities: Names of its images.
        shape: Voxels of the first image that could be read, or None.
        spacing_mm: Its voxel spacing, or None.
        regions_ml: Volume of each labelled region; empty where there are no readable labels.
    """

    id: str
    subject: str
    site: str | None
    modalities: tuple[str, ...]
    shape: tuple[int, int, int] | None
    spacing_mm: tuple[float, float, float] | None
    regions_ml: Mapping[str, float]

    def line(self, width: int) -> str:
        """Describe the case in a line whose first column is `width` characters wide."""
        shape = "x".join(map(str, self.shape)) if self.shape else "unreadable"
        spacing = "x".join(f"{mm:.3g}" for mm in self.spacing_mm) + " mm" if self.spacing_mm else ""
        regions = ", ".join(f"{name} {ml:.1f} ml" for name, ml in self.regions_ml.items())
        return f"  {self.id:{width}}  {','.join(self.modalities)}  {shape}  {spacing}  {regions}".rstrip()


@dataclass(frozen=True)
class Inspection:
    """The content of a folder, after reading all of it.

    Attributes:
        cohort: What its names state.
        summaries: One for each case.
        problems: Everything that is wrong, with file and reason.
        unused: Images that no case uses, such as volumes whose names do not fit the layout.
        verdict: Where a pair was asked for: how many can be used, how training would split them, what to do next.
        displaced: Which images do not lie on others of their case, in words; None where all do.
    """

    cohort: Cohort
    summaries: tuple[CaseSummary, ...]
    problems: tuple[Problem, ...]
    unused: tuple[Path, ...]
    verdict: tuple[str, ...] = ()
    displaced: str | None = None

    def lines(self) -> list[str]:
        """Return layout, counts and cases as lines of text; problems are not among them."""
        cases = self.cohort.cases
        sites = Counter(case.site or "unknown" for case in cases)
        people = amount(len({case.subject for case in cases}), "subject")
        lines = [
            f"{self.cohort.root}: layout {self.cohort.layout}",
            f"{amount(len(cases), 'case')} of {people}; sites: {_counted(sites)}",
            f"modalities: {_counted(count_modalities(self.cohort))}",
            f"masks: {sum(case.mask is not None for case in cases)}; "
            f"label maps: {sum(case.labels is not None for case in cases)}",
            *notes_in_lines(self.cohort.notes),
        ]
        if self.unused:
            lines += ["not used:", *(f"  {line}" for line in _listed(self.unused, self.cohort.root))]
        width = max((len(summary.id) for summary in self.summaries), default=0)
        table = [*self.cohort.listing, *(one.line(width) for one in self.summaries)]
        return [*lines, *table, *([f"warning: {self.displaced}"] if self.displaced else []), *self.verdict]


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))


def _listed(paths: Sequence[Path], root: Path) -> list[str]:
    """Name every file below a root; DICOM and other files that make one image together by their folder."""
    alone = [path for path in paths if volume_stem(path.name)]
    folders = Counter(path.parent for path in paths if not volume_stem(path.name))
    lines = [path.relative_to(root).as_posix() for path in alone]
    return lines + [f"{folder.relative_to(root).as_posix()}/ ({count} files)" for folder, count in folders.items()]


def inspect_folder(
    root: Path,
    sources: Sequence[str] = (),
    target: str | None = None,
    *,
    layout: str | None = None,
    selection: Selection | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Find a folder's cases, read every file, and report cases and problems.

    Args:
        root: As for `find_cohort`.
        sources: Modalities that matter; none means all that a case has.
        target: The modality to make, if a pair is asked for.
        layout: A name of `layouts.NAMES`.
        selection: Which DICOM series are taken.
        progress: Called with cases done, all cases, the next case's id.

    Raises:
        CohortError: If nothing is recognised, or no case has the modalities asked for.
    """
    cohort = find_cohort(root, layout=layout, selection=selection)
    seen = _inspect(cohort, sources, target, progress)
    verdict = () if seen.usable is None else tuple(_verdict(root, seen, sources, str(target)))
    return Inspection(cohort, tuple(seen.summaries), tuple(seen.problems), cohort.unused, verdict, seen.displaced)


class _Seen(NamedTuple):
    """What came of reading all cases; where a pair was asked for, the usable ones and what keeps them from a split."""

    summaries: list[CaseSummary]
    problems: list[Problem]
    displaced: str | None
    usable: list[Case] | None = None
    refusal: CohortError | None = None


def _verdict(root: Path, seen: _Seen, sources: Sequence[str], target: str) -> Iterator[str]:
    """State how many pairs can be used, how a training would split them, and what to do next."""
    usable = seen.usable or []
    people = len({case.subject for case in usable})
    names, pair = " ".join(sources), f"{' + '.join(sources)} and {target}"
    yield f"usable: {len(usable)} of {len(seen.summaries)} pairs of {pair}, of {amount(people, 'subject')}"
    if not usable:
        yield "next: mend the files that are named below, or look for other files with chiasm inspect without --source"
        return
    settings = SplitSettings()
    shares = {"validation": settings.validation, "locked": settings.locked}
    try:
        if seen.refusal is not None:
            raise seen.refusal
        split = make_split(usable, folds="auto", fold=settings.fold, seed=settings.seed, **shares)
    except CohortError as error:
        yield f"chiasm run would not split them as it is: {error.what}. {error.hint or ''}".rstrip()
        return
    yield (
        f"chiasm run --models 1 would take {len(split.train)} for training, {len(split.validation)} for validation, "
        f"{len(split.test)} for testing (fold {settings.fold} of {choose_folds('auto', people)}, by subject)"
    )
    yield f"next: chiasm run {shlex.quote(str(root))} --source {names} --target {target} -o OUT --dry-run"


def _inspect(cohort: Cohort, sources: Sequence[str], target: str | None, progress: Progress | None) -> _Seen:
    """Examine all cases."""
    wanted = [*sources, *([] if target is None else [target])]
    chosen = select_cases(cohort, wanted, None) if wanted else cohort
    data = _pair(sources, target)
    summaries, problems, displaced = [], list(chosen.problems), list[ExaminedCase]()
    cases = list[Case]()
    usable = Scratch[ExaminedCase](Path(tempfile.gettempdir()))
    with closing(examine_cases(chosen.cases, wanted or None, cohort.regions, data, progress)) as found:
        for examined in found:
            summaries.append(_summary(examined))
            problems += examined.problems
            displaced += [examined] if any(image.apart_mm for image in examined.images.values()) else []
            if data is not None and examined.is_usable:
                cases.append(examined.case)
                usable.keep(examined.case.id, replace(examined, facts=None))
    seen = _Seen(summaries, problems, describe_displaced(displaced))
    if data is None:
        return seen
    return seen._replace(usable=cases, refusal=_refusal(usable, replace(chosen, cases=tuple(cases)), data.modalities))


def _refusal(usable: Mapping[str, ExaminedCase], cohort: Cohort, names: Sequence[str]) -> CohortError | None:
    """Return why a training would refuse the cases together: one scan under two subjects."""
    try:
        refuse_duplicates(usable, cohort, names)
    except CohortError as error:
        return error
    return None


def _pair(sources: Sequence[str], target: str | None) -> Data | None:
    """Return what a training of these modalities asks of images; None where they are no pair."""
    if not sources or target is None or target in sources:
        return None
    return Data(sources=tuple(dict.fromkeys(sources)), target=target)


def _summary(examined: ExaminedCase) -> CaseSummary:
    case, first = examined.case, next(iter(examined.images.values()), None)
    shape, spacing = (None, None) if first is None else (first.geometry.shape, first.geometry.spacing_mm)
    return CaseSummary(case.id, case.subject, case.site, tuple(case.images), shape, spacing, examined.regions_ml)
