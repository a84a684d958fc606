"""Which files of a folder belong together: the layouts that are recognised without a converter.

`LAYOUTS` is the whole list, the more specific first; a folder that fits
several is read as the first.  Everything before `inspect_cohort` goes by names
alone and opens no volume.

Two sidecars at a folder's root are heeded whatever the layout: `cohort.json` with
``{"cases": {id: {"subject", "site", "head"}}, "regions": {name: [values]}}``,
every part optional; and `manifest.csv`, `.tsv` or `.json`, which says itself
which files belong together and makes their names irrelevant.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chiasm.cohorts.cases import (
    ALIASES,
    LABEL_NAMES,
    MASK_NAMES,
    MODALITIES,
    Case,
    Cohort,
    Problem,
    is_safe_id,
    role_of,
    volume_stem,
)
from chiasm.errors import CohortError, RunError, VolumeError, unknown
from chiasm.storage import read_json
from chiasm.volumes import Volume, check_pair, read_volume

Regions = Mapping[str, tuple[int, ...]]
Progress = Callable[[int, int, str], None]

#: 1 core or necrosis, 2 oedema, 4 enhancing.
BRATS_2017: Regions = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
#: 1 necrosis, 2 oedema, 3 non-enhancing, 4 enhancing.
BRATS_2013: Regions = {"WT": (1, 2, 3, 4), "TC": (1, 3, 4), "ET": (4,)}
#: 1 core or necrosis, 2 oedema, 3 enhancing.
BRATS_2023: Regions = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
#: As in 2023, and 4 is the resection cavity, no tumour.
BRATS_2024: Regions = {**BRATS_2023, "RC": (4,)}
#: The paediatric numbering changed between years; only the sum of all means the same in each.
BRATS_PEDS: Regions = {"WT": (1, 2, 3, 4)}
#: Where a layout has labels and no table: whatever is marked.
LESION: Regions = {"lesion": (1, 2, 3, 4)}

MANIFESTS = ("manifest.csv", "manifest.tsv", "manifest.json")
SIDECAR = "cohort.json"
DEEPEST = 8  # levels of folders that are looked into


class File(NamedTuple):
    """A volume below the root: its path there with "/" and without suffix, and its path on disk."""

    stem: str
    path: Path


class Find(NamedTuple):
    """One file whose name a layout understands.

    Attributes:
        group: Files with the same group make one case; a name or a folder below the root.
        case: What the case is called, if no other group is called so.
        subject: The person, as the name tells.
        role: "mask", "labels" or a modality.
        path: The file.
        site: Hospital or scanner, if the name tells.
        split: A role in the split, if the layout fixes one.
    """

    group: str
    case: str
    subject: str
    role: str
    path: Path
    site: str | None = None
    split: str | None = None


class Finds(NamedTuple):
    """What one layout makes of a folder; `regions` where the folder itself declares them."""

    files: Sequence[Find] = ()
    problems: Sequence[Problem] = ()
    regions: Regions | None = None


class Layout(NamedTuple):
    """One way of laying out a cohort.

    Attributes:
        name: As in `--layout`.
        example: One case, as its file names stand.
        find: Understands the files of a folder.
        regions: Region name to label values.
        sign: Must occur in some path for the layout to be recognised unasked.
    """

    name: str
    example: str
    find: Callable[[Path, Sequence[File]], Finds]
    regions: Regions
    sign: str = ""


def named(pattern: str, roles: Mapping[str, str] | None = None, *, by_folder: bool = False) -> Callable[..., Finds]:
    """Make a finder from a pattern of paths without suffix.

    Args:
        pattern: Has the groups `case` and `what`, and perhaps `subject` and
            `site`; it must reach the end of the path.
        roles: Words under `what` that mean something else than usual.
        by_folder: Case names are unique in their folder only: files of cases
            of one name in two folders are two people's.
    """
    compiled = re.compile(f"(?:^|/){pattern}$")

    def find(_root: Path, files: Sequence[File]) -> Finds:
        finds = []
        for file in files:
            if match := compiled.search(file.stem):
                parts = match.groupdict()
                case, what = parts["case"], parts["what"]
                group = file.stem[: match.end("case")] if by_folder else case
                role = (roles or {}).get(what) or role_of(what)
                finds.append(Find(group, case, parts.get("subject") or case, role, file.path, parts.get("site")))
        return Finds(finds)

    return find


_BIDS = re.compile(
    r"(?:^|/)(?P<subject>sub-[A-Za-z0-9]+)/(?:ses-[A-Za-z0-9]+/)?(?:anat/)?"
    r"(?P=subject)(?P<entities>(?:_[a-z]+-[A-Za-z0-9+]+)*)_(?P<suffix>[A-Za-z0-9]+)$"
)


def find_bids(root: Path, files: Sequence[File]) -> Finds:
    """Understand BIDS: raw images in `anat`, masks wherever they lie; a session is a case, its person the subject."""
    sites = _bids_sites(root / "participants.tsv")
    finds = []
    for file in files:
        if not (match := _BIDS.search(file.stem)):
            continue
        subject = match["subject"]
        entities = dict(part.split("-", 1) for part in match["entities"].split("_")[1:])
        role = role_of(match["suffix"])
        words = (entities.get("label", "") + entities.get("desc", "")).lower()
        if role == "mask":
            # A mask in another space than the raw images does not lie on their grid.
            if entities.get("space", "orig") not in ("orig", "individual", "T1w"):
                continue
            if "lesion" in words or "tumor" in words:
                role = "labels"
            elif "brain" not in words:
                continue
        elif role not in MODALITIES or "derivatives" in PurePosixPath(file.stem).parts:
            continue
        elif role == "t1" and "ce" in entities:
            role = "t1ce"
        case = f"{subject}_ses-{entities['ses']}" if "ses" in entities else subject
        finds.append(Find(case, case, subject, role, file.path, sites.get(subject)))
    return Finds(finds)


def _bids_sites(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8-sig", newline="") as text:
        rows = list(csv.DictReader(text, delimiter="\t"))
    named_site = ((row.get("participant_id"), row.get("site") or row.get("acquisition_site")) for row in rows)
    return {subject: site for subject, site in named_site if subject and site and site != "n/a"}


def find_nnunet(root: Path, files: Sequence[File]) -> Finds:
    """Understand nnU-Net's raw folders: `dataset.json` names channels and labels, imagesTs is the test set.

    Raises:
        CohortError: If `dataset.json` is damaged or names no channels.
    """
    matches = [(re.fullmatch(r"(images|labels)(Tr|Ts)/(.+)", file.stem), file.path) for file in files]
    path = root / "dataset.json"
    if not any(match for match, _ in matches) or not path.is_file():
        return Finds()
    content = _json(path)
    names, labels = content.get("channel_names", content.get("modality")), content.get("labels", {})
    if not isinstance(names, Mapping) or not isinstance(labels, Mapping):
        raise CohortError(
            "names no channels", path=path, reason="channels", expected='"channel_names": {"0": "T1", "1": "T2"}'
        )
    channels = {str(key).zfill(4): role_of(str(name)) for key, name in names.items()}
    finds, problems = [], []
    for match, file in matches:
        if match is None:
            continue
        kind, part, name = match.groups()
        case, _, channel = name.rpartition("_")
        if kind == "labels":
            case, role = name, "labels"
        elif channel in channels:
            role = channels[channel]
        else:
            message = f"channel {channel or '(none)'} is not one of dataset.json: {', '.join(sorted(channels))}"
            problems.append(Problem(file, "channel", message, case or name))
            continue
        finds.append(Find(case, case, case, role, file, split="test" if part == "Ts" else None))
    return Finds(finds, problems, _nnunet_regions(labels))


def _nnunet_regions(labels: Mapping[str, object]) -> Regions:
    regions = {}
    for name, value in labels.items():
        # Version 1 maps number to name, version 2 name to number or to a list of numbers.
        if str(name).isdigit():
            name, value = str(value), int(name)
        values = tuple(int(v) for v in value) if isinstance(value, list) else (int(str(value)),)
        if name not in ("background", "ignore") and values != (0,):
            regions[name] = values
    return regions


def find_two_folders(_root: Path, files: Sequence[File]) -> Finds:
    """Understand one folder per modality whose files have the same names; those without a partner are named."""
    folders: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for file in files:
        folder, _, name = file.stem.rpartition("/")
        if folder and "/" not in folder:
            folders[folder].append((name, file.path))
    images = {
        folder: {name for name, _ in inside}
        for folder, inside in folders.items()
        if role_of(folder) not in ("mask", "labels")
    }
    paired = set.intersection(*images.values()) if len(images) > 1 else set()
    if not paired:
        return Finds()
    finds, problems = [], []
    for folder, inside in folders.items():
        for name, path in inside:
            if name in paired:
                finds.append(Find(name, name, name, role_of(folder), path))
            elif folder in images:
                without = [other for other in sorted(images) if name not in images[other]]
                message = f"{folder}/{name} has no partner in {', '.join(without)}"
                problems.append(Problem(path, "no-pair", message, name))
    return Finds(finds, problems)


def _words() -> str:
    words = {*MODALITIES, *ALIASES, *MASK_NAMES, *LABEL_NAMES}
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


_ANY = f"(?P<what>(?i:{_words()}))"
_GLIOMA = r"(?P<case>(?P<subject>BraTS-(?:GLI|MEN|MET|SSA)-\d+)-\d{3})"
_T1N_T1C = "(?P<what>t1n|t1c|t2w|t2f|seg)"
_VOID: Regions = {"void": (1,)}

#: Every layout that is recognised, the more specific first.
LAYOUTS: Sequence[Layout] = (
    Layout(
        "brats-inpainting",
        "BraTS-GLI-00000-000/BraTS-GLI-00000-000-{t1n,t1n-voided,mask}.nii.gz",
        # Its mask is the hole to fill, not the brain.
        named(_GLIOMA + "-(?P<what>t1n-voided|t1n|t1c|t2w|t2f|mask)", {"mask": "labels", "t1n-voided": "t1-voided"}),
        _VOID,
        sign="-t1n-voided$",
    ),
    Layout(
        # Time points count from 100 after an operation; a folder with any of them is read by this table,
        # which fits the older cases among them too, since these have no label 4.
        "brats-2024",
        "BraTS-GLI-00005-100/BraTS-GLI-00005-100-{t1n,t1c,t2w,t2f,seg}.nii.gz",
        named(_GLIOMA + "-" + _T1N_T1C),
        BRATS_2024,
        sign=r"BraTS-GLI-\d+-[1-9]\d\d-",
    ),
    Layout(
        "brats-peds",
        "BraTS-PED-00001-000/BraTS-PED-00001-000-{t1n,t1c,t2w,t2f,seg}.nii.gz",
        named(r"(?P<case>(?P<subject>BraTS-PED-\d+)-\d{3})-" + _T1N_T1C),
        BRATS_PEDS,
    ),
    Layout(
        "brats-2023",
        "BraTS-GLI-00000-000/BraTS-GLI-00000-000-{t1n,t1c,t2w,t2f,seg}.nii.gz",
        named(_GLIOMA + "-" + _T1N_T1C),
        BRATS_2023,
    ),
    Layout(
        "brats-2021",
        "BraTS2021_00000/BraTS2021_00000_{t1,t1ce,t2,flair,seg}.nii.gz",
        named(r"(?P<case>BraTS2021_\d+)[_/](?P<what>t1|t1ce|t2|flair|seg)"),
        BRATS_2017,
    ),
    Layout(
        "brats-2018",
        "[HGG|LGG/]Brats18_TCIA01_201_1/Brats18_TCIA01_201_1_{t1,t1ce,t2,flair,seg}.nii.gz",
        named(
            r"(?P<case>[Bb]ra[Tt][Ss](?:17|18|19|20)_"
            r"(?:(?P<subject>(?P<site>2013|[A-Z]+\d*)_[^/]+?)_\d+|(?:Training|Validation|Testing)_\d+))"
            r"[_/](?P<what>t1|t1ce|t2|flair|seg|W39_1998\.09\.19_Segm)",
            {"W39_1998.09.19_Segm": "labels"},  # as BraTS20_Training_355 was published
        ),
        BRATS_2017,
    ),
    Layout(
        "brats-2015",
        "HGG/brats_2013_pat0001_1/VSD.Brain.XX.O.MR_T1.54513/VSD.Brain.XX.O.MR_T1.54513.mha",
        # The dot after MR_T1 keeps MR_T1c out; high and low grade both have a brats_2013_pat0001_1.
        named(
            r"(?P<case>(?!VSD)(?:(?P<subject>[^/]*_pat\d+)_\d+|[^/]+))/(?:VSD[^/]*/)?"
            r"VSD\.Brain(?:_\d+more)?\.XX\.(?:O|XX)\.(?:MR_)?(?P<what>T1|T1c|T2|Flair|OT)\.\d+",
            {"OT": "labels"},
            by_folder=True,
        ),
        BRATS_2013,
    ),
    Layout(
        "synthrad-2023",
        "Task1/brain/1BA001/{mr,ct,mask}.nii.gz",
        named(r"(?P<case>[12][BP](?P<site>[A-Z])\d{3})/(?P<what>mr|ct|cbct|mask|seg)"),
        LESION,
    ),
    Layout(
        "synthrad-2025",
        "Task1/HN/1HNA001/{mr,ct,mask}.mha",
        named(r"(?P<case>[12](?:AB|HN|TH)(?P<site>[A-Z])\d{3})/(?P<what>mr|ct|cbct|mask|seg)"),
        LESION,
    ),
    Layout(
        "ixi",
        "IXI-T1/IXI002-Guys-0828-T1.nii.gz",
        named(r"(?P<case>(?P<subject>IXI\d+)-(?P<site>Guys|HH|IOP)-\d+)-(?P<what>T1|T2|PD|MRA)"),
        LESION,
    ),
    Layout(
        "phantom",
        "PHANTOM_0001/PHANTOM_0001_{t1,t1ce,t2,flair,pd,ct,seg,mask}.nii.gz and cohort.json",
        named(r"(?P<case>PHANTOM_\d+)[_/](?P<what>t1|t1ce|t2|flair|pd|ct|mr|cbct|seg|mask)"),
        BRATS_2017,
    ),
    Layout("nnunet", "imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz and dataset.json", find_nnunet, {}),
    Layout("bids", "sub-01/ses-01/anat/sub-01_ses-01_T1w.nii.gz", find_bids, {"lesion": (1,)}),
    Layout(
        "konfai",
        "Dataset/CASE/{MR,CT,MASK}.mha",
        named(r"(?P<case>[^/]+)/(?P<what>" + _words().upper() + ")", by_folder=True),
        LESION,
    ),
    Layout(
        "case-folders",
        "CASE/{t1,t2,mask,seg}.nii.gz",
        named(r"(?P<case>[^/]+)/" + _ANY, by_folder=True),
        LESION,
    ),
    Layout(
        "case-files",
        "CASE/CASE_{T1,T2,mask,seg}.nii.gz",
        named(r"(?P<case>[^/]+)/(?P=case)[_-]" + _ANY, by_folder=True),
        LESION,
    ),
    Layout("flat", "CASE_{T1,T2,mask,seg}.nii.gz", named("(?<!/)(?P<case>[^/]+?)[_-]" + _ANY), LESION),
    Layout("two-folders", "T1/CASE.nii.gz and T2/CASE.nii.gz", find_two_folders, LESION),
)
NAMES = ("manifest", *(layout.name for layout in LAYOUTS), "dicom")


def find_cohort(root: Path, *, layout: str | None = None) -> Cohort:
    """Find the cases of a folder or manifest by their names; no volume is read.

    Folders may be symbolic links, except below a manifest, which must not lead
    out of its own folder.

    Args:
        root: A folder in one of `LAYOUTS`, a folder with a manifest, or the manifest itself.
        layout: A name of `NAMES`, where the folder fits several; else the most specific is taken.

    Returns:
        Cases in the order of their ids, and what was found and is not used.

    Raises:
        CohortError: If there is no such folder or layout, no case is
            recognised, DICOM series would have to be converted first, or a
            manifest cannot be trusted.
    """
    root = Path(root)
    if layout is not None and layout not in NAMES:
        raise unknown("layout", layout, NAMES, CohortError)
    if not root.exists():
        raise CohortError("does not exist", path=root, reason="not-found")
    manifest = _manifest_of(root, forced=layout == "manifest")
    if manifest is not None and layout in (None, "manifest"):
        return _with_sidecar(read_manifest(manifest))
    if not root.is_dir():
        raise CohortError(
            "is neither a folder nor a manifest", path=root, reason="no-folder", expected=".csv, .tsv or .json"
        )
    files = volumes_below(root)
    for row in LAYOUTS:
        asked = layout == row.name
        if not asked and (layout is not None or not any(re.search(row.sign, file.stem) for file in files)):
            continue
        finds = row.find(root, files)
        cases, problems = _gather(root, finds)
        if cases:
            regions = row.regions if finds.regions is None else finds.regions
            with_labels = regions if any(case.labels for case in cases) else {}
            return _with_sidecar(Cohort(root, row.name, tuple(cases), with_labels, tuple(problems)))
    raise _unrecognised(root, files, layout)


def volumes_below(root: Path) -> list[File]:
    """List the volumes below a folder in the order of their paths, through symbolic links, without hidden ones.

    Raises:
        CohortError: If a folder cannot be listed.
    """
    found: list[File] = []

    def walk(folder: Path, above: str, open_folders: tuple[str, ...]) -> None:
        real = os.path.realpath(folder)
        if real in open_folders or len(open_folders) > DEEPEST:
            return
        with os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
        for entry in inside:
            if entry.name.startswith((".", "__MACOSX")):
                continue
            if entry.is_dir():
                walk(folder / entry.name, f"{above}{entry.name}/", (*open_folders, real))
            elif stem := volume_stem(entry.name):
                found.append(File(above + stem, folder / entry.name))

    try:
        walk(root, "", ())
    except OSError as error:
        raise CohortError("cannot be listed", path=root, reason="unreadable", found=error) from error
    return found


def _gather(root: Path, finds: Finds) -> tuple[list[Case], list[Problem]]:
    """Make cases of the files that belong together; of several files for one role the shortest name is taken."""
    groups: dict[str, list[Find]] = defaultdict(list)
    for find in finds.files:
        groups[find.group].append(find)
    names = Counter(members[0].case for members in groups.values())
    with_folders = any(count > 1 for count in names.values())
    cases, problems = [], list(finds.problems)
    for group, members in groups.items():
        first = members[0]
        # Where two folders hold cases of one name, every case and person is called by folder and name.
        above = group[: -len(first.case)].replace("/", "_") if with_folders else ""
        name = above + first.case
        roles: dict[str, Path] = {}
        for find in sorted(members, key=lambda find: (len(find.path.name), find.path.as_posix())):
            if roles.setdefault(find.role, find.path) != find.path:
                message = f"case {name} has a second {find.role}; {roles[find.role].name} is used"
                problems.append(Problem(find.path, "several", message, name))
        images = {role: path for role, path in sorted(roles.items()) if role not in ("mask", "labels")}
        if not images:
            problems.append(Problem(first.path, "no-image", f"case {name} has no image, only a mask or labels", name))
            continue
        mask, labels = roles.get("mask"), roles.get("labels")
        site = next((find.site for find in members if find.site), None)
        split = next((find.split for find in members if find.split), None)
        cases.append(Case(name, above + first.subject, images, mask, labels, site, split))
    return _with_unique_ids(root, cases), problems


def _with_unique_ids(root: Path, cases: Iterable[Case]) -> list[Case]:
    ordered = sorted(cases, key=lambda case: case.id)
    if twice := [a.id for a, b in pairwise(ordered) if a.id == b.id]:
        raise CohortError(
            "two cases have the same id",
            path=root,
            reason="duplicate-id",
            found=", ".join(sorted(set(twice))[:5]),
            hint="Give each row of a manifest an id of its own, in a column called id.",
        )
    return ordered


def _with_sidecar(cohort: Cohort) -> Cohort:
    """Heed `cohort.json`: sites, subjects and regions; a head shared by every case is a template, not a person."""
    path = cohort.root / SIDECAR
    content = _json(path) if path.is_file() else {}
    notes, regions = content.get("cases", {}), content.get("regions")
    if not isinstance(notes, Mapping) or not all(isinstance(note, Mapping) for note in notes.values()):
        raise CohortError("is not of the expected form", path=path, reason="sidecar", expected='{"cases": {id: {...}}}')
    heads = {str(notes.get(case.id, {}).get("head")) for case in cohort.cases}

    def noted(case: Case) -> Case:
        note = notes.get(case.id, {})
        head = note.get("head") if len(heads) > 1 else None
        person = note.get("subject") if head is None else head
        site = note.get("site")
        return replace(
            case,
            subject=case.subject if person is None else str(person),
            site=case.site if site is None else str(site),
        )

    return replace(
        cohort,
        cases=tuple(map(noted, cohort.cases)),
        regions=cohort.regions if regions is None else _declared_regions(regions, path),
    )


def _declared_regions(content: object, path: Path) -> Regions:
    if isinstance(content, Mapping):
        lists = {str(name): value if isinstance(value, list) else [value] for name, value in content.items()}
        if all(isinstance(v, int) and v > 0 for values in lists.values() for v in values):
            return {name: tuple(values) for name, values in lists.items()}
    raise CohortError("declares regions wrongly", path=path, reason="regions", expected='{"WT": [1, 2, 4], "ET": [4]}')


def _json(path: Path) -> Mapping[str, object]:
    try:
        content = read_json(path)
    except RunError as error:
        raise CohortError(error.what, path=path, reason=error.reason, found=error.found) from error
    if not isinstance(content, Mapping):
        raise CohortError("is no JSON object", path=path, reason="json")
    return content


def _unrecognised(root: Path, files: Sequence[File], layout: str | None) -> CohortError:
    series = _dicom_series(root) if not files or layout == "dicom" else {}
    if series:
        return CohortError(
            "holds DICOM series, which are not read yet",
            path=root,
            reason="dicom",
            found=f"{sum(series.values())} files in {len(series)} folders",
            expected="NIfTI or MetaImage",
            hint="Convert each series first: dcm2niix -z y -f CASE_MODALITY -o OUT FOLDER.",
        )
    some = ", ".join(str(file.path.relative_to(root)) for file in files[:3])
    found = f"{len(files)} volumes such as {some}" if files else "no .nii.gz, .nii, .mha or .mhd file"
    if layout is not None:
        example = next((row.example for row in LAYOUTS if row.name == layout), "DICOM series")
        return CohortError(f"does not fit layout {layout}", path=root, reason="layout", found=found, expected=example)
    return CohortError(
        "fits no layout that is known",
        path=root,
        reason="unknown-layout",
        found=found,
        expected="one of " + ", ".join(NAMES),
        hint="Rename the files, or list them in a manifest.csv with the columns subject, source, target.",
    )


def _dicom_series(root: Path) -> dict[str, int]:
    """Count DICOM files by folder, by suffix or by the letters DICM after 128 bytes."""
    counts: dict[str, int] = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            if path.suffix.lower() in (".dcm", ".ima") or (not path.suffix and _is_dicom(path)):
                counts[folder] = counts.get(folder, 0) + 1
    return counts


def _is_dicom(path: Path) -> bool:
    if not path.is_file() or not os.access(path, os.R_OK):
        return False
    with path.open("rb") as content:
        return content.read(132)[128:] == b"DICM"


# --- manifests ---------------------------------------------------------------------------------------------------

_RESERVED = {"subject": "subject", "id": "id", "case": "id", "site": "site", "split": "split"}
_RESERVED |= dict.fromkeys(MASK_NAMES, "mask") | dict.fromkeys(LABEL_NAMES, "labels")
ROLES = ("train", "validation", "test")


def read_manifest(path: Path) -> Cohort:
    """Read a CSV, TSV or JSON manifest: one row per case, one column per image.

    Columns: `subject`; `id` where a subject has several cases; `mask`;
    `regions` (a label map); `site`; `split` (train, validation or test).  Every
    other column whose cells name volumes is an image of that modality:
    `source`, `target`, `t1`, `source_flair` (which is `flair`) ...  An empty
    cell means that there is no such file.  JSON is a list of such rows, or
    ``{"cases": [...], "regions": {"WT": [1, 2, 4]}}``.

    Args:
        path: The manifest; paths in it start at its folder and stay inside it.

    Raises:
        CohortError: If it is damaged, lacks a column, repeats an id, or has a
            path with `..` or NUL, outside its folder, or led out by a link.
    """
    root = path.parent
    rows, regions = _rows(path)
    columns = _image_columns(path, rows)
    if not rows or "subject" not in rows[0] or not columns:
        raise CohortError(
            "lacks a column or has no row",
            path=path,
            reason="columns",
            found=", ".join(rows[0]) if rows else "no row",
            expected="subject and one column per image, such as source and target",
        )
    cases, problems = [], []
    for number, row in enumerate(rows, start=1):
        where = f"row {number}"
        subject = row.get("subject", "")
        name = row.get("id") or subject
        if not is_safe_id(subject) or not is_safe_id(name):
            raise CohortError(
                f"{where}: subject or id cannot be used as a file name",
                path=path,
                reason="unsafe-id",
                found=repr(name if is_safe_id(subject) else subject),
                expected="a name without slashes or control characters",
            )
        split = row.get("split") or None
        if split not in (None, *ROLES):
            raise CohortError(
                f"{where}: unknown split", path=path, reason="split", found=split, expected="/".join(ROLES)
            )
        cells = {role: row[column] for column, role in columns.items() if row.get(column)}
        cells |= {role: row[role] for role in ("mask", "labels") if row.get(role)}
        files = {role: _inside(root, text, path, where) for role, text in cells.items()}
        if missing := [role for role, file in files.items() if not file.exists()]:
            message = f"{path.name}, {where}: the {missing[0]} of case {name} does not exist"
            problems.append(Problem(files[missing[0]], "missing-file", message, name))
            continue
        images = {role: file for role, file in files.items() if role not in ("mask", "labels")}
        if not images:
            problems.append(Problem(path, "no-image", f"{path.name}, {where}: case {name} has no image", name))
            continue
        cases.append(
            Case(name, subject, images, files.get("mask"), files.get("labels"), row.get("site") or None, split)
        )
    _with_unique_ids(path, [*cases, *(Case(p.case, p.case, {}) for p in problems if p.case)])
    if not cases:
        raise CohortError(f"has no usable row; {problems[0].message}", path=path, reason="no-cases")
    with_labels = any(case.labels for case in cases)
    declared = (regions or LESION) if with_labels else {}
    return Cohort(root, "manifest", tuple(_with_unique_ids(path, cases)), declared, tuple(problems))


def _manifest_of(root: Path, *, forced: bool) -> Path | None:
    """Return the manifest that `root` is or holds; a table without subjects is somebody else's."""
    if root.is_file():
        return root if root.suffix.lower() in (".csv", ".tsv", ".json") else None
    for path in (root / name for name in MANIFESTS):
        if path.is_file() and (forced or "subject" in _head(path).lower()):
            return path
    if forced:
        raise CohortError("holds no manifest", path=root, reason="layout", expected=" or ".join(MANIFESTS))
    return None


def _head(path: Path) -> str:
    """Return a table's first line, or the start of a JSON file."""
    with path.open(encoding="utf-8", errors="replace") as text:
        return text.read(4096) if path.suffix == ".json" else text.readline(4096)


def _rows(path: Path) -> tuple[list[dict[str, str]], Regions | None]:
    """Read a manifest's rows, keys in lower case and values as text, and the regions it declares."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CohortError("cannot be read as text", path=path, reason="unreadable", found=error) from error
    if "\0" in text:
        raise CohortError("holds a NUL character", path=path, reason="nul")
    regions = None
    if path.suffix.lower() == ".json":
        try:
            content = read_json(path)
        except RunError as error:
            raise CohortError(error.what, path=path, reason=error.reason, found=error.found) from error
        if isinstance(content, Mapping):
            regions = _declared_regions(content["regions"], path) if "regions" in content else None
            content = content.get("cases")
        if not isinstance(content, list) or not all(isinstance(row, Mapping) for row in content):
            raise CohortError("is no list of rows", path=path, reason="json", expected='[{"subject": ...}, ...]')
        given = [[(str(key), "" if cell is None else str(cell)) for key, cell in row.items()] for row in content]
    else:
        lines = text.splitlines()
        semicolons = bool(lines) and lines[0].count(";") > lines[0].count(",")
        separator = "\t" if path.suffix.lower() == ".tsv" else ";" if semicolons else ","
        table = [row for row in csv.reader(lines, delimiter=separator) if any(cell.strip() for cell in row)]
        for number, row in enumerate(table):
            if len(row) != len(table[0]):
                raise CohortError(
                    f"row {number} has another length than the header",
                    path=path,
                    reason="ragged",
                    found=f"{len(row)} cells",
                    expected=len(table[0]),
                )
        given = [list(zip(table[0], row)) for row in table[1:]]
    rows = []
    for pairs in given:
        keys = [_RESERVED.get(key.strip().lower(), key.strip().lower()) for key, _ in pairs]
        if twice := [key for key, count in Counter(keys).items() if count > 1]:
            raise CohortError("has two columns of one meaning", path=path, reason="columns", found=", ".join(twice))
        rows.append({key: cell.strip(" \t") for key, (_, cell) in zip(keys, pairs)})
    return rows, regions


def _image_columns(path: Path, rows: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Map each column that holds images to its modality."""
    columns: dict[str, str] = {}
    for key in dict.fromkeys(key for row in rows for key in row if key not in _RESERVED.values()):
        bare = re.sub(r"^(source|target)[_:. -]+", "", key)
        if role_of(bare) in (*MODALITIES, "source", "target") or any(volume_stem(row.get(key, "")) for row in rows):
            columns[key] = role_of(bare)
    if twice := [role for role, count in Counter(columns.values()).items() if count > 1]:
        raise CohortError("has two columns of one modality", path=path, reason="columns", found=", ".join(twice))
    return columns


def _inside(root: Path, text: str, manifest: Path, where: str) -> Path:
    """Return the file that a manifest's cell names, refusing whatever leaves the manifest's folder."""
    candidate = root / text

    def refusal(reason: str, why: str) -> CohortError:
        hint = "Keep the files below the manifest, and name them from there."
        return CohortError(f"{where}: {why}", path=manifest, reason=reason, found=repr(text), hint=hint)

    if "\0" in text:
        raise refusal("nul", "a path holds a NUL character")
    if ".." in PurePosixPath(text).parts or ".." in PureWindowsPath(text).parts:
        raise refusal("outside", "a path holds '..'")
    if Path(text).is_absolute() and not candidate.is_relative_to(root.absolute()):
        raise refusal("outside", "an absolute path lies outside the manifest's folder")
    try:
        real = candidate.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise refusal("outside", "a link leads nowhere") from error
    if not real.is_relative_to(root.resolve()):
        raise refusal("outside", "a link leads out of the manifest's folder")
    return candidate


# --- choosing and inspecting -------------------------------------------------------------------------------------


def count_modalities(cohort: Cohort) -> dict[str, int]:
    """Count the cases that have each modality."""
    return dict(sorted(Counter(name for case in cohort.cases for name in case.images).items()))


def select_cases(cohort: Cohort, sources: Sequence[str], target: str | None) -> Cohort:
    """Keep the cases that have every modality asked for; the others become problems that name what is missing.

    Args:
        cohort: From `find_cohort`.
        sources: Modalities that go in.
        target: The modality that comes out, or None where only sources are needed.

    Raises:
        CohortError: If no case has one of the modalities, or none has all of them.
    """
    wanted = [*sources, *([] if target is None else [target])]
    present = count_modalities(cohort)
    counted = ", ".join(f"{name} ({count})" for name, count in present.items())
    for name in wanted:
        if name not in present:
            known = role_of(name)
            raise CohortError(
                f"no case has the modality {name!r}",
                path=cohort.root,
                reason="unknown-modality",
                found=f"layout {cohort.layout} with {counted}",
                hint=f"It is called {known} here." if known in present else None,
            )
    kept, problems = [], list(cohort.problems)
    for case in cohort.cases:
        if missing := [name for name in wanted if name not in case.images]:
            folder = next(iter(case.images.values())).parent
            message = f"case {case.id} has no {' and no '.join(missing)}"
            problems.append(Problem(folder, "missing-modality", message, case.id))
        else:
            kept.append(case)
    if not kept:
        raise CohortError(
            f"no case has {' and '.join(wanted)} together", path=cohort.root, reason="no-cases", found=counted
        )
    return replace(cohort, cases=tuple(kept), problems=tuple(problems))


@dataclass(frozen=True)
class CaseSummary:
    """One line of the table that tells what a cohort holds.

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


@dataclass(frozen=True)
class Inspection:
    """What a folder holds, after reading all of it.

    Attributes:
        cohort: What its names tell.
        summaries: One for each case.
        problems: Everything that is wrong, with file and reason.
        unused: Volumes that fit no name of the layout.
    """

    cohort: Cohort
    summaries: tuple[CaseSummary, ...]
    problems: tuple[Problem, ...]
    unused: tuple[Path, ...]

    def lines(self) -> list[str]:
        """Tell layout, counts and cases as lines of text; problems are not among them."""
        cases = self.cohort.cases
        sites = Counter(case.site or "unknown" for case in cases)
        lines = [
            f"{self.cohort.root}: layout {self.cohort.layout}",
            f"{len(cases)} cases of {len({case.subject for case in cases})} subjects; sites: {_counted(sites)}",
            f"modalities: {_counted(count_modalities(self.cohort))}",
            f"masks: {sum(case.mask is not None for case in cases)}; "
            f"label maps: {sum(case.labels is not None for case in cases)}",
        ]
        if self.unused:
            some = ", ".join(path.name for path in self.unused[:3])
            lines.append(f"not used, their names are not of this layout: {len(self.unused)} volumes such as {some}")
        width = max(len(summary.id) for summary in self.summaries)
        for row in self.summaries:
            shape = "x".join(map(str, row.shape)) if row.shape else "unreadable"
            spacing = "x".join(f"{mm:.3g}" for mm in row.spacing_mm) + " mm" if row.spacing_mm else ""
            regions = ", ".join(f"{name} {ml:.1f} ml" for name, ml in row.regions_ml.items())
            lines.append(f"  {row.id:{width}}  {','.join(row.modalities)}  {shape}  {spacing}  {regions}".rstrip())
        return lines


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))


def inspect_cohort(
    cohort: Cohort, sources: Sequence[str] = (), target: str | None = None, progress: Progress | None = None
) -> list[Problem]:
    """Read every file of a cohort and say what is wrong with each.

    Args:
        cohort: From `find_cohort`.
        sources: Modalities that matter; none means all that a case has.
        target: Another that matters.
        progress: Called with cases done, all cases, the next case's id.

    Returns:
        The cohort's own problems first, then those of its files.

    Raises:
        CohortError: If no case has the modalities asked for.
    """
    return list(_inspect(cohort, sources, target, progress)[1])


def inspect_folder(
    root: Path,
    sources: Sequence[str] = (),
    target: str | None = None,
    *,
    layout: str | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Find a folder's cases, read every file, and tell what is there and what is wrong.

    Args:
        root: As for `find_cohort`.
        sources: Modalities that matter; none means all that a case has.
        target: Another that matters.
        layout: A name of `NAMES`.
        progress: Called with cases done, all cases, the next case's id.

    Raises:
        CohortError: If nothing is recognised, or no case has the modalities asked for.
    """
    cohort = find_cohort(root, layout=layout)
    summaries, problems = _inspect(cohort, sources, target, progress)
    known = {path for case in cohort.cases for path in (*case.images.values(), case.mask, case.labels)}
    known |= {problem.path for problem in cohort.problems}
    unused = tuple(file.path for file in volumes_below(cohort.root) if file.path not in known)
    return Inspection(cohort, tuple(summaries), tuple(problems), unused)


def _inspect(
    cohort: Cohort, sources: Sequence[str], target: str | None, progress: Progress | None
) -> tuple[list[CaseSummary], list[Problem]]:
    wanted = [*sources, *([] if target is None else [target])]
    chosen = select_cases(cohort, wanted, None) if wanted else cohort
    summaries, problems = [], list(chosen.problems)
    for index, case in enumerate(chosen.cases):
        if progress is not None:
            progress(index, len(chosen.cases), case.id)
        summary, found = examine_case(case, wanted or list(case.images), cohort.regions)
        summaries.append(summary)
        problems += found
    if progress is not None:
        progress(len(chosen.cases), len(chosen.cases), "")
    return summaries, problems


def examine_case(case: Case, modalities: Sequence[str], regions: Regions) -> tuple[CaseSummary, list[Problem]]:
    """Read a case's images, mask and labels, and compare each with the first that can be read.

    Args:
        case: The case.
        modalities: Which of its images to read.
        regions: Region name to label values; labels with other values are a problem.
    """
    problems: list[Problem] = []
    first: Volume | None = None
    first_name = ""
    regions_ml: dict[str, float] = {}
    files = [(name, case.images[name]) for name in modalities] + [("mask", case.mask), ("labels", case.labels)]
    for name, path in files:
        if path is None:
            continue
        is_labels = name in ("mask", "labels")
        try:
            volume = read_volume(path, labels=is_labels)
            if name == "labels":
                check_label_values(volume.array, regions, path)
                regions_ml = region_volumes(volume, regions)
            if first is None and not is_labels:
                first, first_name = volume, name
            elif first is not None:
                check_pair(first, volume, a_name=first_name, b_name=name, labels=is_labels)
        except VolumeError as error:
            problems.append(Problem(error.path or path, error.reason, f"case {case.id}, {name}: {error}", case.id))
    grid = None if first is None else first.geometry
    shape, spacing = (None, None) if grid is None else (grid.shape, grid.spacing_mm)
    return CaseSummary(case.id, case.subject, case.site, tuple(case.images), shape, spacing, regions_ml), problems


def check_label_values(array: NDArray[np.generic], regions: Regions, path: Path) -> None:
    """Refuse labels that are no whole numbers, or that no region declares; all zero is legal.

    Args:
        array: A label map of any shape.
        regions: Region name to label values; empty declares every whole number.
        path: Its file, for the message.

    Raises:
        VolumeError: With reason "labels".
    """
    values = np.unique(array)
    declared = {0, *(value for values_of in regions.values() for value in values_of)}
    if broken := [value for value in values.tolist() if value != int(value)]:
        raise VolumeError("labels are not whole numbers", path=path, reason="labels", found=broken[0])
    if regions and (strange := [int(value) for value in values.tolist() if value not in declared]):
        raise VolumeError(
            "labels have values that no region declares",
            path=path,
            reason="labels",
            found=", ".join(map(str, strange[:5])),
            expected=", ".join(map(str, sorted(declared))),
            hint=f'Declare them in {SIDECAR}: {{"regions": {{"lesion": [...]}}}}, or choose another --layout.',
        )


def region_volumes(labels: Volume, regions: Regions) -> dict[str, float]:
    """Measure each region of a label map, in millilitres; 0.0 where it is absent."""
    voxel_ml = abs(float(np.linalg.det(labels.geometry.affine[:3, :3]))) / 1000
    return {name: float(np.isin(labels.array, values).sum()) * voxel_ml for name, values in regions.items()}
