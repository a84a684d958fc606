"""The layouts that are recognised: each has a name, an example, and a function that understands its files.

`LAYOUTS` is the whole list; the more specific layouts come first.  Everything here uses only names and opens no volume,
except one of nnU-Net's labelsTr, which may hold target images.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from chiasm.cohorts.cases import (
    ALIASES,
    LABEL_NAMES,
    LESION,
    MAPS,
    MASK_NAMES,
    MODALITIES,
    Problem,
    Regions,
    grouped,
    role_of,
    without_problems,
)
from chiasm.cohorts.folder_notes import read_object
from chiasm.cohorts.folder_roles import find_folder_roles, role_above, without_roles
from chiasm.cohorts.labels import holds_image
from chiasm.errors import CohortError

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


class File(NamedTuple):
    """A volume below the root: its path there with "/" and without suffix, and its path on disk."""

    stem: str
    path: Path


class Find(NamedTuple):
    """One file whose name a layout understands.

    Attributes:
        group: Files with the same group make one case; a name or a folder below the root.
        case: The name of the case, if no other group has this name.
        subject: The person, as the name states.
        role: "mask", "labels" or a modality.
        path: The file.
        site: Hospital or scanner, if the name states it.
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
    """The files of a folder as one layout understands them; `regions` if the folder itself declares them."""

    files: Sequence[Find] = ()
    problems: Sequence[Problem] = ()
    regions: Regions | None = None


class Layout(NamedTuple):
    """One way of laying out a cohort.

    Attributes:
        name: As in `--layout`.
        example: One case, as its file names stand.
        find: The function that understands the files of a folder.
        regions: Region name to label values.
        sign: Must occur in a path, unless the user chose the layout.
        people: Whether its rules leave open which cases are of one person.
        foreign: Must occur in no path, unless the user chose the layout.
    """

    name: str
    example: str
    find: Callable[[Path, Sequence[File]], Finds]
    regions: Regions
    sign: str = ""
    people: bool = False
    foreign: str = ""


def named(pattern: str, roles: Mapping[str, str] | None = None, *, by_folder: bool = False) -> Callable[..., Finds]:
    """Make a finder from a pattern of paths without suffix.

    Args:
        pattern: Has the groups `case` and `what`, and perhaps `subject` and
            `site`; it must reach the end of the path.
        roles: Words in the group `what` with another meaning than usual.
        by_folder: Case names are unique only in their folder: one name in two folders means two people.
    """
    compiled = re.compile(f"(?:^|/){pattern}$")
    words = roles or {}

    def find(_root: Path, files: Sequence[File]) -> Finds:
        return Finds([_by_groups(match, file, words, by_folder) for match, file in _matches(compiled, files)])

    return find


def _matches(pattern: re.Pattern[str], files: Sequence[File]) -> list[tuple[re.Match[str], File]]:
    """Return the files whose path fits a pattern, and how."""
    return [(match, file) for file in files if (match := pattern.search(file.stem))]


def _by_groups(match: re.Match[str], file: File, roles: Mapping[str, str], by_folder: bool) -> Find:
    """Understand a file by the groups of a pattern of `named`."""
    parts = match.groupdict()
    case, what = parts["case"], parts["what"]
    group = file.stem[: match.end("case")] if by_folder else case
    role = roles.get(what) or role_of(what)
    return Find(group, case, parts.get("subject") or case, role, file.path, parts.get("site"))


_BIDS = re.compile(
    r"(?:^|/)(?P<subject>sub-[A-Za-z0-9]+)/(?:ses-[A-Za-z0-9]+/)?(?:anat/)?"
    r"(?P=subject)(?P<entities>(?:_[a-z]+-[A-Za-z0-9+]+)*)_(?P<suffix>[A-Za-z0-9]+)$"
)


def find_bids(root: Path, files: Sequence[File]) -> Finds:
    """Understand BIDS: raw images in `anat`, masks wherever they lie; a session is a case, its person the subject."""
    sites = _bids_sites(root / "participants.tsv")
    finds = (_bids_find(match, file, sites) for match, file in _matches(_BIDS, files))
    return Finds(list(filter(None, finds)))


def _bids_find(match: re.Match[str], file: File, sites: Mapping[str, str]) -> Find | None:
    """Understand one file of BIDS; None if it is not used."""
    subject = match["subject"]
    entities = dict(part.split("-", 1) for part in match["entities"].split("_")[1:])
    role = _bids_role(match["suffix"], entities, file)
    if role is None:
        return None
    case = f"{subject}_ses-{entities['ses']}" if "ses" in entities else subject
    return Find(case, case, subject, role, file.path, sites.get(subject))


def _bids_role(suffix: str, entities: Mapping[str, str], file: File) -> str | None:
    """Return the role of a file of BIDS by the end of its name and its entities; None if it is not used."""
    role = role_of(suffix)
    if role == "mask":
        return _bids_mask(entities)
    if role not in MODALITIES or "derivatives" in PurePosixPath(file.stem).parts:
        return None
    return "t1ce" if role == "t1" and "ce" in entities else role


def _bids_mask(entities: Mapping[str, str]) -> str | None:
    """Separate masks of the brain from those of lesions; a mask in another space lies on another grid."""
    if entities.get("space", "orig") not in ("orig", "individual", "T1w"):
        return None
    words = (entities.get("label", "") + entities.get("desc", "")).lower()
    roles = {"lesion": "labels", "tumor": "labels", "brain": "mask"}
    return next((role for word, role in roles.items() if word in words), None)


def _bids_sites(path: Path) -> dict[str, str]:
    """Return the site of each participant from BIDS's table of participants."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8-sig", newline="") as text:
        rows = list(csv.DictReader(text, delimiter="\t"))
    named_sites = ((row.get("participant_id"), _bids_site(row)) for row in rows)
    return {subject: site for subject, site in named_sites if subject and site}


def _bids_site(row: Mapping[str, str]) -> str | None:
    """Return the site of a participant, if a row states it."""
    site = row.get("site") or row.get("acquisition_site")
    return None if site == "n/a" else site


_NNUNET = re.compile(r"(?:^|/)(images|labels)(Tr|Ts|Va|Val)/([^/]+)$")


def find_nnunet(root: Path, files: Sequence[File]) -> Finds:
    """Understand nnU-Net's raw folders: `dataset.json` names channels and labels, imagesTs is the test set.

    Without a `dataset.json`, two channels or more have their numbers as names, such as 0000.

    Raises:
        CohortError: If `dataset.json` is damaged or names no channels.
    """
    matches = _matches(_NNUNET, files)
    path = root / "dataset.json"
    if not matches or not (path.is_file() or _has_channels(matches)):
        return Finds()
    channels, regions = _nnunet_names(path) if path.is_file() else (None, None)
    finds, problems = without_problems([_nnunet_find(match, file.path, channels) for match, file in matches])
    return Finds(_with_targets(finds, path, regions or {}), problems, regions)


def _has_channels(matches: Sequence[tuple[re.Match[str], File]]) -> bool:
    """Return whether images have two channels or more."""
    images = [match[3] for match, _ in matches if match[1] == "images"]
    return len({name[-5:] for name in images if re.search(r"_\d{4}$", name)}) > 1


def _nnunet_find(match: re.Match[str], file: Path, channels: Mapping[str, str] | None) -> Find | Problem:
    """Understand one file of `imagesTr` and similar folders; channels without names are called by their numbers."""
    kind, part, name = match.groups()
    split = "test" if part == "Ts" else None
    if kind == "labels":
        return Find(name, name, name, "labels", file, split=split)
    case, _, channel = name.rpartition("_")
    role = _role_of_channel(channel, channels)
    if role:
        return Find(case, case, case, role, file, split=split)
    return Problem(file, "channel", _strange_channel(channel, channels), case or name)


def _role_of_channel(channel: str, channels: Mapping[str, str] | None) -> str:
    """Return the modality that a channel's number stands for; "" if there is none."""
    if channels is not None:
        return channels.get(channel, "")
    return channel if re.fullmatch(r"\d{4}", channel) else ""


def _strange_channel(channel: str, channels: Mapping[str, str] | None) -> str:
    """Say that a channel stands for no modality."""
    known = "0000, 0001, ..." if channels is None else "dataset.json: " + ", ".join(sorted(channels))
    return f"channel {channel or '(none)'} is not one of {known}"


def _nnunet_names(path: Path) -> tuple[dict[str, str], Regions]:
    """Return the names of channels and regions from `dataset.json`."""
    content = read_object(path)
    names, labels = content.get("channel_names", content.get("modality")), content.get("labels", {})
    if not isinstance(names, Mapping) or not isinstance(labels, Mapping):
        raise CohortError(
            "names no channels", path=path, reason="channels", expected='"channel_names": {"0": "T1", "1": "T2"}'
        )
    return {str(key).zfill(4): role_of(str(name)) for key, name in names.items()}, _nnunet_regions(labels)


def _with_targets(finds: Sequence[Find], description: Path, regions: Regions) -> list[Find]:
    """Use images in labelsTr as the target: the modality that `dataset.json` calls "target"."""
    if not _hold_images(finds, regions):
        return list(finds)
    content = read_object(description) if description.is_file() else {}
    called = role_of(str(content.get("target", "target")))
    return [find._replace(role=called) if find.role == "labels" else find for find in finds]


def _hold_images(finds: Sequence[Find], regions: Regions) -> bool:
    """Return whether the first file in the place of labels is an image."""
    first = next((find.path for find in finds if find.role == "labels"), None)
    return first is not None and holds_image(first, set(chain.from_iterable(regions.values())))


def _nnunet_regions(labels: Mapping[str, object]) -> Regions:
    regions = (_nnunet_region(name, value) for name, value in labels.items())
    return {name: values for name, values in regions if name not in ("background", "ignore") and values != (0,)}


def _nnunet_region(name: str, value: object) -> tuple[str, tuple[int, ...]]:
    """Return a region and its labels: version 1 maps number to name, version 2 name to one number or several."""
    if str(name).isdigit():
        return str(value), (int(name),)
    return name, tuple(map(int, value)) if isinstance(value, list) else (int(str(value)),)


def find_two_folders(_root: Path, files: Sequence[File]) -> Finds:
    """Understand one folder per modality whose files have the same names; those without a partner are named.

    Folders that fix a role may lie above or below (`train/T1`, `A/test`), or be part of the name (`trainA`, `trainB`).
    """
    finds, problems = [], []
    for inside in grouped(_in_folders(files), lambda one: one.split).values():
        found, lost = _paired_by_name(inside)
        finds += found
        problems += lost
    return Finds(finds, problems) if finds else Finds()


class _InFolder(NamedTuple):
    """A file of a folder for one modality: its role in the split, the folder's name, its own."""

    split: str | None
    folder: str
    name: str
    path: Path

    @property
    def find(self) -> Find:
        """The file as a `Find`, for a file with partners."""
        return Find(self.name, self.name, self.name, role_of(self.folder), self.path, split=self.split)


def _in_folders(files: Sequence[File]) -> list[_InFolder]:
    """Return the files that lie in a folder for one modality."""
    places = _places_of({file.stem.rpartition("/")[0] for file in files})
    split_stems = ((*file.stem.rpartition("/")[::2], file.path) for file in files)
    return [_InFolder(*places[parent], name, path) for parent, name, path in split_stems if parent in places]


def _places_of(folders: Collection[str]) -> dict[str, tuple[str | None, str]]:
    """Return the role and the name of each folder for one modality, by its path."""
    roles = find_folder_roles(folders)
    names = {folder: without_roles(folder, roles) for folder in folders}
    return {folder: (role_above(folder, roles, ""), name) for folder, name in names.items() if name and "/" not in name}


def _paired_by_name(files: Sequence[_InFolder]) -> tuple[list[Find], list[Problem]]:
    """Pair the files of several folders by their names."""
    folders = grouped(files, lambda one: one.folder)
    images = _images_by_folder(folders)
    paired = set.intersection(*images.values()) if len(images) > 1 else set()
    parted = grouped(chain.from_iterable(folders.values()), lambda one: one.name in paired)
    lost = [_without_partner(one, images) for one in parted.get(False, ()) if one.folder in images]
    return [one.find for one in parted.get(True, ())], lost


def _images_by_folder(folders: Mapping[str, Sequence[_InFolder]]) -> dict[str, set[str]]:
    """Return the names of the files in each folder that holds images, and no masks or labels."""
    return {folder: {one.name for one in inside} for folder, inside in folders.items() if role_of(folder) not in MAPS}


def _without_partner(file: _InFolder, images: Mapping[str, Collection[str]]) -> Problem:
    without = [other for other in sorted(images) if file.name not in images[other]]
    message = f"{file.folder}/{file.name} has no partner in {', '.join(without) or 'another folder'}"
    return Problem(file.path, "no-pair", message, file.name)


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
    Layout("nnunet", "imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz and dataset.json", find_nnunet, {}, people=True),
    Layout("bids", "sub-01/ses-01/anat/sub-01_ses-01_T1w.nii.gz", find_bids, {"lesion": (1,)}),
    Layout(
        "konfai",
        "Dataset/CASE/{MR,CT,MASK}.mha",
        named(r"(?P<case>[^/]+)/(?P<what>" + _words().upper() + ")", by_folder=True),
        LESION,
        people=True,
        foreign=f"/(?!(?:{_words().upper()})$)(?i:{_words()})$",  # T1 beside seg: case-folders reads both
    ),
    Layout(
        "case-folders",
        "CASE/{t1,t2,mask,seg}.nii.gz",
        named(r"(?P<case>[^/]+)/" + _ANY, by_folder=True),
        LESION,
        people=True,
    ),
    Layout(
        "case-files",
        "CASE/CASE_{T1,T2,mask,seg}.nii.gz",
        named(r"(?P<case>[^/]+)/(?P=case)[_-]" + _ANY, by_folder=True),
        LESION,
        people=True,
    ),
    Layout("flat", "CASE_{T1,T2,mask,seg}.nii.gz", named("(?<!/)(?P<case>[^/]+?)[_-]" + _ANY), LESION, people=True),
    Layout("two-folders", "T1/CASE.nii.gz and T2/CASE.nii.gz", find_two_folders, LESION, people=True),
)
