"""chiasm turns medical image volumes of one modality into another.

The house, read from top to bottom.  A module imports only from lines above
its own, and within a line only from names to its left; a test reads this map.

    errors      what a user can act on: what, where, found, expected, what to do
    storage     files that appear whole or not at all; TOML, JSON, sha256
    recipe      what the user asked for: frozen settings, presets, one dial
    runners     where independent jobs are done: here, on all cores, by Ray or SLURM
    volumes     what lies on disk: geometry, streams, voxels, nifti, metaimage, dicom_files, dicom_kinds, dicom_frames,
                dicom_series, dicom_pixels, dicom_labels, dicom_read, dicom_write, screening
    cohorts     which files belong together: cases, masks, hounsfield, images, manifests, labels, completed,
                folder_roles, patterns, dicom_folders, gathering, relatives, layouts, splits, duplicates, intensity,
                bias, degradation, demons, registration, pairing, fingerprint, examination, inspection, planning,
                preparation, unpaired, anatomy, lesions, signals, phantom, attenuation
    metrics     figures of merit on arrays with a mask; conventions by name
    networks    tensors to tensors: generator, discriminators, layers, srcnn, fcn8, unet, dcgan, pix2pix, fcn3d, han,
                li_cnn, context_gan, strainet, sparse_coding, foreign, shapes, catalogue
    prediction  a network over a whole volume: tiling, engines, calibration, baselines, manifest, resuming,
                model_files, model, synthesis, dicom_case, rivals, folders
    training    how networks learn: batches, losses, attention, methods, coding, cost, health, checkpoints, finished,
                learner, loop, cascade, run
    evidence    what may be claimed: evaluation, statistics, drawing, aligning, gallery, curves, report, pictures,
                case_pages, folders, reporting, completing, reliability, jobs, findings, digest, study
    pages       what people look at or send to: templates, dicom_inbox, dicom_gate, dicom_node
    demo        the main job on simulated patients
    progress    how far long work is: a bar on a terminal, lines in a log
    options     options that several verbs share, in records
    cli         verbs: parse, call, print
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chiasm.cohorts.attenuation import mumap
    from chiasm.cohorts.inspection import inspect_folder as inspect
    from chiasm.evidence.aligning import register
    from chiasm.evidence.completing import complete
    from chiasm.evidence.reporting import evaluate
    from chiasm.evidence.study import report
    from chiasm.evidence.study import run_study as study
    from chiasm.prediction.folders import load, predict
    from chiasm.training.run import plan_run as plan
    from chiasm.training.run import train

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "complete",
    "evaluate",
    "inspect",
    "load",
    "mumap",
    "plan",
    "predict",
    "register",
    "report",
    "study",
    "train",
]

_VERBS = {
    "inspect": ("cohorts.inspection", "inspect_folder"),
    "plan": ("training.run", "plan_run"),
    "train": ("training.run", "train"),
    "load": ("prediction.folders", "load"),
    "predict": ("prediction.folders", "predict"),
    "complete": ("evidence.completing", "complete"),
    "register": ("evidence.aligning", "register"),
    "evaluate": ("evidence.reporting", "evaluate"),
    "report": ("evidence.study", "report"),
    "study": ("evidence.study", "run_study"),
    "mumap": ("cohorts.attenuation", "mumap"),
}


def __getattr__(name: str) -> Any:
    """Import a verb when it is first used, so that `import chiasm` stays light."""
    if name not in _VERBS:
        raise AttributeError(f"module 'chiasm' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, function = _VERBS[name]
    return getattr(import_module(f"chiasm.{module}"), function)
