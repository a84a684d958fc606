"""`chiasm evaluate` and its pages: scores of a cohort, the report, and a page for each case.

While cases are scored, their pages are packed into a folder of work, so that no image is read twice.  Pages can also be
made again from files, without scoring anything: scores from `evaluation.csv`, volumes from where `asked.json` says that
predictions and reference lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from chiasm.cohorts.cases import Cohort, Problem, grouped, subjects_of
from chiasm.cohorts.dicom_patients import Selection
from chiasm.cohorts.gathering import LOST, notes_in_lines
from chiasm.errors import RecipeError, RunError, unknown
from chiasm.evaluation.doses import GammaCriteria, check_installed, read_criteria, score_doses
from chiasm.evaluation.given_volumes import FolderPair, pair_up
from chiasm.evaluation.headlines import headlines
from chiasm.evaluation.loading import RULES, PredictionFolder
from chiasm.evaluation.predictions import (
    CaseScores,
    Scoring,
    open_predictions,
    open_reference,
    score_cases,
)
from chiasm.evaluation.rows import MaskUse, Remarks, Row, read_evaluation, read_remarks, write_evaluation
from chiasm.evaluation.segmentations import score_segmentations
from chiasm.evaluation.summary import format_table, paired
from chiasm.locks import locked
from chiasm.metrics.conventions import CONVENTIONS
from chiasm.metrics.radiotherapy import THOMAS, Curve, read_angles, read_curve
from chiasm.outputs import refuse_data_folder
from chiasm.prediction.manifest import Entry, folders_of, relative, warn_of_seen
from chiasm.preparation.bias_field import UNSHADED
from chiasm.preparation.plan import Plan
from chiasm.progress import Progress
from chiasm.recipe import Registration
from chiasm.registration.cohort import AlignedCohort, describe_movement
from chiasm.reports.curves import read_history
from chiasm.reports.evaluation_cases import (
    PAGES,
    CasePages,
    PagePacking,
    no_cases,
    predicted_cases,
    write_cases,
)
from chiasm.reports.evaluation_folder import ASKED, REGISTERED, make_room, open_assessed, place_of, read_asked
from chiasm.reports.evaluation_page import EvaluationPage, write_report
from chiasm.reports.evidence import gather_evidence, split_facts
from chiasm.reports.explanation import explain_evidence
from chiasm.reports.registration import report_registered
from chiasm.reports.tables import as_text, cases_of, join_facts, name_some, recipe_facts
from chiasm.storage import read_facts, read_toml, working_folder, write_json
from chiasm.volumes import Reading

MASKS_NAMED = 12  # cases that are named beside the mask that they were scored in
FEWEST_TO_TEST = 6


@dataclass(frozen=True)
class Scored:
    """What an evaluation left behind.

    Attributes:
        rows: One for each score.
        headlines: What came of it, in at most six lines, behind one on cases that were used in training.
        table: All scores side by side, lines of text.
        report: The page.
        problems: Cases that could not be scored.
        notes: What the reference holds beside its cases, which of several scans were taken, and which cases
            have no naive baselines.
    """

    rows: tuple[Row, ...]
    headlines: tuple[str, ...]
    table: tuple[str, ...]
    report: Path
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()


def evaluate(
    predictions: Path | Sequence[Path],
    reference: Path,
    out: Path,
    *,
    regions: str = "seg",
    convention: str = "chiasm",
    model: Path | None = None,
    layout: str | None = None,
    register: Registration | None = None,
    selection: Selection | None = None,
    segmentations: tuple[Path, Path] | None = None,
    doses: tuple[Path, Path] | None = None,
    gamma: str = "2,2",
    angles: str | None = None,
    density_curve: Path | None = None,
    overwrite: bool = False,
    processes: int = 1,
    progress: Progress | None = None,
) -> Scored:
    """Score every predicted case that has a real target; write CSV, JSON and a report.

    Args:
        predictions: Folder written by `chiasm predict`; several, one for each fold or model, are scored together.
        reference: The cohort with the real targets.
        out: Where `evaluation.csv`, `evaluation.json`, `report.html` and `pictures/` go.
        regions: "seg" for the cohort's label maps, "none" to score the mask alone.
        convention: A name of `CONVENTIONS`.
        model: Run or model folder of a single folder of predictions, where it no longer stands where it stood.
        layout: Name of a layout, where the folder fits several.
        register: How real images are aligned with the sources, into `out/registered`; None as those of
            training were, "none" takes them as they lie.
        selection: Which DICOM series are taken, and how files are read; where it says nothing, as in training.
        segmentations: Folders of label maps of the synthetic and of the real images, by a tool of the user's; see
            `FolderPair`.
        doses: Folders of dose distributions, planned on the synthetic and on the real CT.
        gamma: Criteria of the gamma pass rate, percent and mm.
        angles: Gantry angles of beams through a CT, such as "0,72,144", degrees.
        density_curve: File of Hounsfield units and electron density of a scanner; see `read_curve`.
        overwrite: Whether to replace another evaluation in `out`.
        processes: How many score cases at once; each takes about 0.4 GiB, and the scores are the same.
        progress: Called with cases done, all cases, the next case's id.

    Raises:
        ChiasmError: If a folder is not what it should be, the folders are of
            several methods or modalities, no case can be scored, another process
            writes to `out`, a file of it is read here, or it holds another evaluation or files of
            somebody else and `overwrite` is False.
    """
    pairs = pair_up(segmentations, "segmentation"), pair_up(doses, "dose")
    curve = THOMAS if density_curve is None else read_curve(density_curve)
    given = _Given(*pairs, read_criteria(gamma), () if angles is None else read_angles(angles), curve)
    request = _Request(reference, regions, convention, model, layout, register, selection or Selection(), given)
    request.check()
    if processes < 1:
        raise ValueError(f"at least 1 process scores cases, not {processes}")
    assessed = _open_alike(folders_of([predictions] if isinstance(predictions, Path) else predictions), model)
    request.check_target(assessed[0].plan)
    asked = request.to_dict(assessed, out)
    refuse_data_folder(out, [reference])
    with locked(out):
        read = [reference, *given.folders, *chain.from_iterable((one.folder, one.model) for one in assessed)]
        make_room(out, asked, read, overwrite=overwrite)
        together = request.open(assessed, out, progress)
        with working_folder(out) as folder:
            packing = PagePacking(folder, CasePages(with_labels=regions == "seg"))
            work = partial(score_cases, progress=progress, after=packing.share(processes).add, processes=processes)
            found, problems = _score(assessed, together, request, work)
            _write_scores(out, found, problems, asked, subjects_of(together.cohort.cases))
            report = _write_pages(out, assessed, together, packing)
        return _sum_up(found, problems, assessed, together.cohort, report)


@dataclass(frozen=True)
class _Given:
    """What a user made of synthetic and real images, to be compared beside them, and beams and curve of the user's."""

    segmentations: FolderPair | None
    doses: FolderPair | None
    criteria: GammaCriteria
    angles: tuple[float, ...] = ()
    curve: Curve = THOMAS

    @property
    def folders(self) -> list[Path]:
        """All folders that are read."""
        return [*(self.segmentations or ()), *(self.doses or ())]

    def to_dict(self, out: Path) -> dict[str, Any]:
        """Write it down; nothing where nothing is given, as in evaluations of before."""
        noted: dict[str, Any] = {}
        if self.segmentations is not None:
            noted["segmentations"] = [relative(folder, out) for folder in self.segmentations]
        if self.doses is not None:
            noted |= {"doses": [relative(folder, out) for folder in self.doses], "gamma": self.criteria.in_words}
        if self.angles:
            noted["angles"] = list(self.angles)
        if self.curve != THOMAS:
            noted["density_curve"] = list(map(list, self.curve))
        return noted

    def score(self, work: Sequence[tuple[PredictionFolder, Entry]]) -> tuple[list[Row], list[Problem]]:
        """Score what is given of predicted cases."""
        rows: list[Row] = []
        problems: list[Problem] = []
        if self.segmentations is not None:
            rows, problems = score_segmentations(self.segmentations, work)
        if self.doses is not None:
            more, unscored = score_doses(self.doses, work, self.criteria)
            rows, problems = [*rows, *more], [*problems, *unscored]
        return rows, problems


@dataclass(frozen=True)
class _Request:
    """What is asked of an evaluation, beside the predictions."""

    reference: Path
    regions: str
    convention: str
    model: Path | None
    layout: str | None
    register: Registration | None
    selection: Selection
    given: _Given

    def check(self) -> None:
        """Refuse names that are not known, and doses without what compares them.

        Raises:
            RecipeError: If there is one.
        """
        if self.convention not in CONVENTIONS:
            raise unknown("convention", self.convention, list(CONVENTIONS))
        if self.regions not in ("seg", "none"):
            raise unknown("choice of regions", self.regions, ["seg", "none"])
        if self.given.doses is not None:
            check_installed()

    def check_target(self, plan: Plan) -> None:
        """Refuse beams through what is no CT, and a density curve of it.

        Raises:
            RecipeError: If there are some.
        """
        asked = ["--angles"] * bool(self.given.angles) + ["--density-curve"] * (self.given.curve != THOMAS)
        if asked and plan.target_unit != "HU":
            raise RecipeError(
                "path lengths of beams and electron density need a CT",
                reason="angles",
                found=f"the target {plan.target}",
                hint=f"Run chiasm evaluate without {' and '.join(asked)}.",
            )

    def to_dict(self, assessed: Sequence[PredictionFolder], out: Path) -> dict[str, Any]:
        """Write it down; paths start at the evaluation's folder, so that a whole tree can be moved."""
        return {
            "predictions": [relative(one.folder, out) for one in assessed],
            "model": None if self.model is None else relative(self.model, out),
            "reference": relative(self.reference, out),
            "written_in": str(out.resolve()),
            "layout": self.layout,
            "regions": self.regions,
            "register": assessed[0].plan.registration if self.register is None else self.register,
            "convention": self.convention,
            "series": dict(self.selection.series),
            "select": list(self.selection.select),
            "subject_pattern": self.selection.subject_pattern,
            "reading": asdict(self.selection.reading),
        } | self.given.to_dict(out)

    def open(self, assessed: Sequence[PredictionFolder], out: Path, progress: Progress | None) -> AlignedCohort:
        """Find the real images, aligned with the sources where they must be."""
        return open_reference(
            self.reference,
            assessed,
            out / REGISTERED,
            register=self.register,
            layout=self.layout,
            selection=self.selection,
            progress=progress,
        )


def _open_alike(folders: Sequence[Path], model: Path | None) -> list[PredictionFolder]:
    """Open predictions that can be scored together: of one method, source, target and registration."""
    assessed = [open_predictions(folder, model) for folder in folders]
    alike = {(one.manifest.method, one.plan.sources, one.plan.target, one.plan.registration) for one in assessed}
    if len(alike) != 1:
        raise RunError(
            "folders that are scored together must be of one method, source, target and registration",
            path=assessed[1].folder,
            reason="other-method",
            hint="Evaluate them one by one; chiasm study compares methods.",
        )
    return assessed


def _score(
    assessed: Sequence[PredictionFolder],
    together: AlignedCohort,
    request: _Request,
    score: Callable[..., CaseScores],
) -> tuple[CaseScores, list[Problem]]:
    """Score all predicted cases that have a real target; return also why others could not be scored."""
    missing = {problem.case for problem in together.problems}
    work = [(one, entry) for one, entry in predicted_cases(assessed) if entry.case not in missing]
    given = request.given
    scoring = Scoring(request.convention, request.regions == "seg", angles=given.angles, curve=given.curve)
    found = score(work, together.cohort, scoring)
    problems = [*together.problems, *_unfinished(assessed), *found.problems]
    if not found.rows:
        raise no_cases("no predicted case could be scored", problems, assessed[0].folder)
    scored = {row.case for row in found.rows}
    rows, unscored = request.given.score([one for one in work if one[1].case in scored])
    return found._replace(rows=[*found.rows, *rows]), [*problems, *unscored]


def _write_scores(
    out: Path, found: CaseScores, problems: Sequence[Problem], asked: Mapping[str, Any], subjects: Mapping[str, str]
) -> None:
    """Write the scores, what was asked, what could not be scored, and the subject of each case that has another id."""
    spoiled = tuple(problem.message for problem in found.spoiled)
    write_evaluation(out, found.rows, Remarks(found.masks, spoiled, found.notes))
    others = {case: subjects[case] for case in sorted(cases_of(found.rows)) if subjects.get(case, case) != case}
    write_json(out / ASKED, {**asked, "problems": [problem.message for problem in problems], "subjects": others})


def _sum_up(
    found: CaseScores, problems: Sequence[Problem], assessed: Sequence[PredictionFolder], cohort: Cohort, report: Path
) -> Scored:
    subjects = subjects_of(cohort.cases)
    shared = paired(found.rows)
    entries = [entry for _, entry in predicted_cases(assessed)]
    seen = warn_of_seen([entry.case for entry in entries if entry.was_seen], len(entries))
    first = assessed[0]
    sentences = (*seen, *headlines(shared, first.manifest.method, first.baselines.names, subjects))
    table = tuple(format_table(shared, subjects=subjects))
    notes = (*notes_in_lines(cohort.notes, ("several", *LOST)), *found.notes)
    return Scored(tuple(found.rows), sentences, table, report, (*problems, *found.spoiled), notes)


def _unfinished(assessed: Sequence[PredictionFolder]) -> list[Problem]:
    """Name the cases of which a prediction that was stopped, or is at work, has made nothing yet."""
    what = "is not predicted yet: chiasm predict was stopped, or is still at work"
    return [
        Problem(one.folder, "unfinished", f"case {case} {what}", case)
        for one in assessed
        for case in one.manifest.pending
    ]


def report_evaluation(out: Path, *, pages: int = PAGES, whole: bool = False) -> Path:
    """Make the report and the pages of single cases from an evaluation's files; nothing is scored.

    Args:
        out: Folder that `evaluate` wrote.
        pages: At most as many cases get a page; the worst, the median and the best come first.
        whole: Keep the volumes of these pages uncut and unthinned.

    Returns:
        The report.

    Raises:
        ChiasmError: If a file is missing or damaged.
    """
    asked = read_asked(out)
    assessed = open_assessed(out, asked)
    how: Registration = asked.get("register", "none")
    reference = place_of(out, asked, asked["reference"])
    together = open_reference(
        reference, assessed, out / REGISTERED, register=how, layout=asked["layout"], selection=selection_asked(asked)
    )
    return _write_pages(out, assessed, together, CasePages(pages, whole=whole, with_labels=asked["regions"] == "seg"))


def _write_pages(
    out: Path, assessed: Sequence[PredictionFolder], together: AlignedCohort, pages: CasePages | PagePacking
) -> Path:
    """Write the report, the pages of single cases and that of registered pairs beside an evaluation's scores."""
    rows, asked, remarks = read_evaluation(out), read_asked(out), read_remarks(out)
    how: Registration = asked.get("register", "none")
    cohort = together.cohort
    if together.moved_mm:
        report_registered(out / REGISTERED)
    method, plan = assessed[0].manifest.method, assessed[0].plan
    gallery, links = write_cases(predicted_cases(assessed), cohort, rows, method, out, pages)
    page = EvaluationPage(
        title=f"{' + '.join(plan.sources)} to {plan.target}",
        rows=rows,
        history=_read_curves(assessed),
        gallery=gallery,
        facts={**_facts(assessed, cohort), "Masks": _mask_facts(remarks.masks)},
        warnings=[
            *_how_they_lie(assessed[0], how, together),
            *_how_they_are_shaded(assessed[0].plan),
            *_warnings(assessed, rows),
            *_mask_warnings(remarks.masks, cohort),
            *remarks.notes,
            *map("labels not used: {}".format, remarks.problems),
            *map("not scored: {}".format, asked.get("problems", [])),
        ],
        method=method,
        naive=assessed[0].baselines.names,
        pages=links,
        explained=explain_evidence(gather_evidence(assessed, rows, asked.get("subjects", {}))),
        subjects=asked.get("subjects", {}),
    )
    return write_report(out / "report.html", page)


def _read_curves(assessed: Sequence[PredictionFolder]) -> list[dict[str, Any]]:
    """Read the log of a training; none where several folds are assessed."""
    return read_history(assessed[0].model.parent / "log.jsonl") if len(assessed) == 1 else []


def selection_asked(asked: Mapping[str, Any]) -> Selection:
    """Read which files an evaluation took; earlier versions noted less."""
    return Selection(
        series=asked.get("series", {}),
        reading=Reading(**asked.get("reading", {})),
        select=asked.get("select", []),
        subject_pattern=asked.get("subject_pattern", ""),
    )


def _mask_facts(masks: Sequence[MaskUse]) -> dict[str, str]:
    """Say which mask was scored, in how many cases; one by one where they are few."""
    return {
        reason: f"{len(cases)} cases: {name_some(cases, MASKS_NAMED)}"
        for reason, cases in _cases_by_reason(masks).items()
    }


def _mask_warnings(masks: Sequence[MaskUse], cohort: Cohort) -> list[str]:
    """Say where the cohort has a mask file and another mask was scored."""
    with_file = {case.id for case in cohort.cases if case.mask is not None}
    others = [mask for mask in masks if mask.case in with_file and not _is_file(mask)]
    return [
        f"{len(cases)} cases are scored in {reason}, not in the mask file of the cohort: {', '.join(cases)}"
        for reason, cases in _cases_by_reason(others).items()
    ]


def _is_file(mask: MaskUse) -> bool:
    return mask.used == "cohort" or mask.reason == RULES["given"]


def _cases_by_reason(masks: Sequence[MaskUse]) -> dict[str, list[str]]:
    """Name the cases of each reason, why their mask was scored, in the order in which they came."""
    return {reason: [mask.case for mask in some] for reason, some in grouped(masks, lambda one: one.reason).items()}


def _how_they_lie(assessed: PredictionFolder, how: Registration, together: AlignedCohort) -> list[str]:
    """Say whether the real images were moved before they were compared with."""
    trained = assessed.plan.registration
    if together.moved_mm:
        return [
            f"the real {assessed.plan.target} was aligned with the source before it was compared with ({how}; "
            f"{REGISTERED}/index.html shows each): {describe_movement(together.moved_mm)}; "
            "chiasm evaluate --register none compares without alignment"
        ]
    if trained != "none":
        return [f"training pairs were registered ({trained}); the real images are compared without alignment"]
    return []


def _how_they_are_shaded(plan: Plan) -> list[str]:
    """Say that real images are as scanned where synthetic ones have no shading."""
    if plan.bias_correction == "none" or plan.target in UNSHADED:
        return []
    return [
        f"synthetic {plan.target} is free of coil shading, as in training; the real one is as scanned, "
        "and its shading counts as error"
    ]


def _warnings(assessed: Sequence[PredictionFolder], rows: Sequence[Row]) -> Iterator[str]:
    """Say whether the cases are few, and what was said of single ones."""
    entries = [entry for _, entry in predicted_cases(assessed)]
    if (scored := len(cases_of(rows))) < FEWEST_TO_TEST:
        yield f"too few cases ({scored}): no difference between methods can be called significant"
    yield from (f"case {entry.case}: {sentence}" for entry in entries for sentence in entry.warnings)


def _facts(assessed: Sequence[PredictionFolder], cohort: Cohort) -> dict[str, dict[str, str]]:
    """Collect the data sheet: what was asked, on what, with what."""
    first = assessed[0]
    facts = {
        "Cohort": _cohort_facts(cohort, sum(len(one.manifest.cases) for one in assessed)),
        "Split": split_facts(assessed),
        "Plan": join_facts(as_text(read_toml(one.model / "plan.toml").get("reasons", {})) for one in assessed),
        "Model": {
            "method": first.manifest.method,
            "sha256 of model.toml": ", ".join(one.manifest.sha256 for one in assessed),
        },
        "Recipe": join_facts(recipe_facts(read_toml(one.model / "recipe.toml")) for one in assessed),
    }
    if environment := join_facts(as_text(read_facts(one.model.parent / "environment.json")) for one in assessed):
        facts["Environment"] = environment
    return facts


def _cohort_facts(cohort: Cohort, predicted: int) -> dict[str, str]:
    sites = sorted({case.site for case in cohort.cases if case.site})
    return {
        "layout": cohort.layout,
        "cases in the folder": str(len(cohort.cases)),
        "subjects": str(len({case.subject for case in cohort.cases})),
        "cases predicted": str(predicted),
        "sites": ", ".join(sites) or "not known",
    }
