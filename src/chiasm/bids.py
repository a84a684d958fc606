"""A BIDS-App: derivatives of a BIDS folder, one subject at a time, then a report on those with a real target.

Reference: Gorgolewski et al., "BIDS apps: Improving ease of use, accessibility, and
reproducibility of neuroimaging data analysis methods", PLoS Computational Biology 13(3), 2017.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from chiasm import __version__
from chiasm.cohorts.cases import Case, Cohort, Problem, volume_stem
from chiasm.cohorts.completed import sidecar_of
from chiasm.cohorts.discovery import find_cohort
from chiasm.cohorts.images import read_case_image, read_case_labels
from chiasm.errors import ChiasmError, CohortError, RecipeError, RunError
from chiasm.prediction.folders import Predicted, load_models, predict
from chiasm.prediction.manifest import FILE, NOTICE, Entry
from chiasm.progress import Progress, counted
from chiasm.reports.evaluation import Scored, evaluate
from chiasm.storage import copy_file, write_json, write_text

PREDICTIONS, EVALUATION = "predictions", "evaluation"  # folders that BIDS does not know, in `.bidsignore`
BIDS_VERSION = "1.10.0"
RAW = "raw"  # what addresses of sources call the dataset that they lie in
#: Suffix of BIDS by modality; BIDS has none for CT.
SUFFIXES: Mapping[str, str] = {"t1": "T1w", "t2": "T2w", "flair": "FLAIR", "pd": "PDw"}


class Derived(NamedTuple):
    """The result of a call.

    Attributes:
        files: Images of the derivatives, in order.
        problems: Cases that failed.
    """

    files: tuple[Path, ...]
    problems: Sequence[Problem]


def derive_participants(
    folder: Path,
    out: Path,
    run: Path | Sequence[Path],
    *,
    labels: Collection[str] = (),
    sessions: Collection[str] = (),
    trust: Collection[str] = (),
    progress: Progress | None = None,
) -> Derived:
    """Predict subjects of a BIDS folder and write them as derivatives; what is there already is kept.

    Args:
        folder: BIDS raw data.
        out: Folder of the derivatives.
        run: Run or model folder; of several, the images are averaged and their spread is written too.
        labels: Subjects, with or without "sub-"; empty for all.
        sessions: Sessions, with or without "ses-"; empty for all.
        trust: As for `predict`.
        progress: Called with cases done, all cases, the last case's id.

    Raises:
        CohortError: If the folder is not BIDS, or holds none of the subjects or sessions.
        RecipeError: If BIDS has no name for the model's target.
        RunError: If there is no model, several cannot be averaged, or `out` holds files of another program.
    """
    cases = _chosen(_open(folder), labels, sessions)
    runs = [run] if isinstance(run, Path) else list(run)
    suffix = _suffix(load_models(runs, trust)[0].plan.target, runs[0])
    _describe(out, folder)
    files: list[Path] = []
    problems: list[Problem] = []
    for case in counted(
        cases, lambda case: case.id, progress
    ):  # each in its own folder, so that calls run side by side
        made = predict(runs, [case], out / PREDICTIONS / case.id, container="nifti", trust=trust)
        files += [_derive(entry, case, made, suffix, folder, out) for entry in made.manifest.cases]
        problems += made.problems
    return Derived(tuple(files), problems)


def derive_group(folder: Path, out: Path, *, progress: Progress | None = None) -> Scored:
    """Score the derivatives of all subjects that have a real target.

    Args:
        folder: BIDS raw data.
        out: Folder of the derivatives, which hold at least one subject.
        progress: Called with cases done, all cases, the next case's id.

    Raises:
        CohortError: If the folder is not BIDS, or no subject has a real target.
        RunError: If there are no derivatives.
    """
    _open(folder)
    made = sorted(path.parent for path in (out / PREDICTIONS).glob(f"*/{FILE}"))
    if not made:
        raise RunError(
            "holds no derivatives", path=out, reason="no-predictions", hint="Run the level participant first."
        )
    return evaluate(made, folder, out / EVALUATION, layout="bids", progress=progress)


def _open(folder: Path) -> Cohort:
    if not (folder / "dataset_description.json").is_file():
        raise CohortError(
            "is not BIDS: it lacks dataset_description.json",
            path=folder,
            reason="layout",
            hint="chiasm predict takes any folder.",
        )
    return find_cohort(folder, layout="bids")


def _chosen(cohort: Cohort, labels: Collection[str], sessions: Collection[str]) -> list[Case]:
    """Return the cases of some subjects and sessions."""
    subjects = {f"sub-{label.removeprefix('sub-')}" for label in labels}
    ends = {f"ses-{label.removeprefix('ses-')}" for label in sessions}
    labelled = [(case, *_labels(case)) for case in cohort.cases]
    if strange := sorted(subjects - {subject for _, subject, _ in labelled}):
        raise CohortError(f"holds no usable image of {', '.join(strange)}", path=cohort.root, reason="no-cases")
    cases = [
        case
        for case, subject, session in labelled
        if (not subjects or subject in subjects) and (not ends or session in ends)
    ]
    if not cases:
        raise CohortError("holds no such session", path=cohort.root, reason="no-cases", found=sorted(ends))
    return cases


def _labels(case: Case) -> tuple[str, str]:
    """Return subject and session as the files name them, "sub-01" and "ses-01" or "": `cohort.json` may differ."""
    words = (volume_stem(next(iter(case.images.values())).name) or case.id).split("_")
    subject, session = (next((word for word in words if word.startswith(start)), "") for start in ("sub-", "ses-"))
    return subject, session


def _suffix(target: str, run: Path) -> str:
    if target not in SUFFIXES:
        raise RecipeError(
            f"BIDS has no name for {target}",
            path=run,
            reason="target",
            expected=", ".join(SUFFIXES),
            hint="chiasm predict writes it without BIDS names.",
        )
    return SUFFIXES[target]


def _describe(out: Path, folder: Path) -> None:
    """Write what the derivatives are, and which folders are not BIDS."""
    write_json(
        out / "dataset_description.json",
        {
            "Name": "Synthetic images by chiasm",
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "chiasm", "Version": __version__}],
            "SourceDatasets": [{"URL": folder.resolve().as_uri()}],
            "DatasetLinks": {RAW: folder.resolve().as_uri()},
        },
    )
    write_text(out / ".bidsignore", f"{PREDICTIONS}\n{EVALUATION}\n")
    write_text(out / "README", f"{NOTICE} Each image's JSON names its sources and its model.\n")


def _is_cut_out(case: Case, made: Predicted) -> bool:
    """Return whether a source is constant outside the mask that lies beside it, as far as both can be read."""
    if case.mask is None:
        return False
    try:
        mask, source = read_case_labels(case, case.mask), read_case_image(case, made.manifest.sources[0])
    except ChiasmError:  # the model's plan may read what these files leave open
        return False
    around = source.array[mask.array == 0] if source.array.shape == mask.array.shape else source.array[:0]
    return around.size > 0 and float(np.ptp(around)) == 0.0


def _derive(entry: Entry, case: Case, made: Predicted, suffix: str, folder: Path, out: Path) -> Path:
    """Copy the files of a case to their names in BIDS, each with its JSON; return the image."""
    first = case.images[made.manifest.sources[0]]
    entities = re.sub(r"_[A-Za-z0-9]+$", "", volume_stem(first.name) or case.id)
    place = out.joinpath(*filter(None, _labels(case)), "anat")
    sources = [f"bids:{RAW}:{case.images[name].relative_to(folder).as_posix()}" for name in made.manifest.sources]
    about = {
        "Sources": sources,
        "SkullStripped": entry.mask_rule == "nonzero" or (entry.mask_rule == "given" and _is_cut_out(case, made)),
        "SyntheticData": "YES",
        "Model": {"Method": made.manifest.method, "Sha256": made.manifest.sha256, "Software": f"chiasm {__version__}"},
    }
    image = place / f"{entities}_desc-synthetic_{suffix}.nii.gz"
    copy_file(made.folder / entry.image, image)
    write_json(sidecar_of(image), {**about, "Description": f"{NOTICE} {' '.join(entry.warnings)}".strip()})
    if entry.expected_error is not None:
        error = place / f"{entities}_desc-expectederror_{suffix}.nii.gz"
        copy_file(made.folder / entry.expected_error, error)
        write_json(sidecar_of(error), {**about, "Description": "Expected absolute error of the synthetic image."})
    if entry.spread is not None:
        spread = place / f"{entities}_desc-spread_{suffix}.nii.gz"
        copy_file(made.folder / entry.spread, spread)
        write_json(sidecar_of(spread), {**about, "Description": "Standard deviation of the images of several models."})
    if entry.mask is not None:
        mask = place / f"{entities}_desc-synthetic_mask.nii.gz"
        copy_file(made.folder / entry.mask, mask)
        write_json(sidecar_of(mask), {"Sources": sources, "Type": "ROI", "Description": "Voxels that were predicted."})
    return image
