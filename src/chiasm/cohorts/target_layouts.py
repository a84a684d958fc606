"""The layouts that `chiasm convert` writes: the names of cases, and the places of their files.

A layout may have no name for an image, or no place for a mask.  Facts on a case that it cannot hold, such as a site, go
to `cohort.json`, which chiasm reads in every layout.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from chiasm.cohorts.cases import MODALITIES, Case, Cohort

BIDS_VERSION = "1.10.0"
_BRATS_2021 = re.compile(r"BraTS2021_\d+")
_BRATS_2018 = re.compile(
    r"[Bb]ra[Tt][Ss](?:17|18|19|20)_(?:(?:2013|[A-Z]+\d*)_[^/]+?_\d+|(?:Training|Validation|Testing)_\d+)"
)
_BIDS_SUFFIXES = {
    "t1": "T1w",
    "t1ce": "ce-gadolinium_T1w",
    "t2": "T2w",
    "flair": "FLAIR",
    "pd": "PDw",
}

Documents = Mapping[str, Any]  # name of a file to its content: text, or an object for JSON


class TargetLayout(NamedTuple):
    """A layout that is written.

    Attributes:
        suffixes: Of its volumes; a file with another suffix is written with the first of them.
        names: Returns the name of each case of a cohort, in order.
        place: Returns the place of a file of a case, without suffix; None if the layout has no place for it.
        documents: Makes the files that describe the folder, from its cases by name.
        same_images: Whether every case must have the same images.
    """

    suffixes: tuple[str, ...]
    names: Callable[[Sequence[Case]], list[str]]
    place: Callable[[Case, str, str, Sequence[str]], str | None]
    documents: Callable[[Cohort, Mapping[str, Case], Sequence[str]], Documents]
    same_images: bool = False


def channels_of(cases: Sequence[Case]) -> list[str]:
    """List the modalities of cases; known modalities come first."""
    present = {name for case in cases for name in case.images}
    return sorted(present, key=lambda name: (MODALITIES.index(name) if name in MODALITIES else len(MODALITIES), name))


def _no_documents(cohort: Cohort, cases: Mapping[str, Case], channels: Sequence[str]) -> Documents:
    del cohort, cases, channels
    return {}


def _own_ids(cases: Sequence[Case]) -> list[str]:
    return [case.id for case in cases]


def _brats_names(cases: Sequence[Case]) -> list[str]:
    """Keep the ids if all are BraTS ids; otherwise number the cases."""
    for pattern in (_BRATS_2021, _BRATS_2018):
        if all(pattern.fullmatch(case.id) for case in cases):
            return [case.id for case in cases]
    return [f"BraTS2021_{number:05d}" for number in range(1, len(cases) + 1)]


def _brats_place(case: Case, name: str, role: str, channels: Sequence[str]) -> str | None:
    del case, channels
    word = {"labels": "seg"}.get(role, role)
    return f"{name}/{name}_{word}" if word in ("t1", "t1ce", "t2", "flair", "seg") else None


def _bids_names(cases: Sequence[Case]) -> list[str]:
    """Name a case by its subject, and by a session if the subject has several; labels are letters and digits."""
    counts = Counter(case.subject for case in cases)
    subjects = _unique({case.subject: _letters(case.subject.removeprefix("sub-")) for case in cases})
    sessions = _unique({case.id: _letters(case.id.rpartition("ses-")[2]) for case in cases})
    return [
        f"sub-{subjects[case.subject]}" + (f"_ses-{sessions[case.id]}" if counts[case.subject] > 1 else "")
        for case in cases
    ]


def _letters(text: str) -> str:
    return re.sub("[^A-Za-z0-9]", "", text) or "x"


def _unique(labels: Mapping[str, str]) -> dict[str, str]:
    """Add numbers to labels that would occur twice."""
    counts, seen = Counter(labels.values()), Counter[str]()
    made = {}
    for thing, label in labels.items():
        seen[label] += 1
        made[thing] = f"{label}x{seen[label]}" if counts[label] > 1 else label
    return made


def _bids_place(case: Case, name: str, role: str, channels: Sequence[str]) -> str | None:
    del case, channels
    folder = "/".join([*name.split("_"), "anat"])
    if role in _BIDS_SUFFIXES:
        return f"{folder}/{name}_{_BIDS_SUFFIXES[role]}"
    masks = {"mask": "desc-brain_mask", "labels": "label-lesion_mask"}
    return f"derivatives/chiasm/{folder}/{name}_{masks[role]}" if role in masks else None


def _bids_documents(cohort: Cohort, cases: Mapping[str, Case], channels: Sequence[str]) -> Documents:
    del channels
    about = {"Name": cohort.root.name or "cohort", "BIDSVersion": BIDS_VERSION}
    sites = {name.partition("_")[0]: case.site or "n/a" for name, case in cases.items()}
    rows = ["participant_id\tsite", *(f"{name}\t{site}" for name, site in sites.items())]
    made = {"GeneratedBy": [{"Name": "chiasm"}], "DatasetType": "derivative"}
    return {
        "dataset_description.json": {**about, "DatasetType": "raw"},
        "derivatives/chiasm/dataset_description.json": {**about, **made},
        "participants.tsv": "\n".join(rows) + "\n",
        "README": "Converted by chiasm convert; cohort.json says what each case was called before.\n",
        ".bidsignore": "cohort.json\nconversion.json\n",
    }


def _nnunet_place(case: Case, name: str, role: str, channels: Sequence[str]) -> str | None:
    part = "Ts" if case.split == "test" else "Tr"
    if role == "labels":
        return f"labels{part}/{name}"
    return f"images{part}/{name}_{channels.index(role):04d}" if role in channels else None


def _nnunet_documents(cohort: Cohort, cases: Mapping[str, Case], channels: Sequence[str]) -> Documents:
    regions = {name: values[0] if len(values) == 1 else list(values) for name, values in cohort.regions.items()}
    return {
        "dataset.json": {
            "channel_names": {str(number): name for number, name in enumerate(channels)},
            "labels": {"background": 0, **regions},
            "numTraining": sum(case.split != "test" for case in cases.values()),
            "file_ending": ".nii.gz",
        }
    }


def _konfai_place(case: Case, name: str, role: str, channels: Sequence[str]) -> str | None:
    del case, channels
    word = {"labels": "seg"}.get(role, role)
    return f"Dataset/{name}/{word.upper()}" if word in (*MODALITIES, "mask", "seg") else None


TARGET_LAYOUTS: Mapping[str, TargetLayout] = {
    "brats": TargetLayout((".nii.gz",), _brats_names, _brats_place, _no_documents),
    "bids": TargetLayout((".nii.gz", ".nii"), _bids_names, _bids_place, _bids_documents),
    "nnunet": TargetLayout((".nii.gz",), _own_ids, _nnunet_place, _nnunet_documents, same_images=True),
    "konfai": TargetLayout((".mha",), _own_ids, _konfai_place, _no_documents),
}
