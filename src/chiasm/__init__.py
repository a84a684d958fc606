"""chiasm turns medical image volumes of one modality into another.

The house, read from top to bottom.  A module imports only from lines above
its own, and within a line only from names to its left; a test reads this map.

    errors        errors that a user can act on: what is wrong, where, what was found and expected, what to do
    verbs         what callers in Python may write: a string for a path, one thing for a list of one
    names         names of cases and files that are safe on every system
    storage       writing files whole or not at all; TOML, JSON
    on_demand     what there is of each of many cases, on the disk until it is asked for
    records       reading files into records with checked types
    checksums     sha256 of files, and of cards that contain their own checksum
    outputs       what an output folder holds, and which of its files may be replaced
    locks         folders of results with one owner at a time
    stopping      how a command is asked to stop, and how it releases its resources
    recipe        the settings of a training: sections, fields, bounds
    sizes         how much effort a training takes, by name
    methods       what can be asked for by name: methods, tasks
    attempts      one try of a job in another process: its outcome, its error, or that its worker was lost
    slurm_queue   what SLURM's queue says about submitted jobs, and when one has ended
    runners       where independent jobs are done: here, on all cores, by Ray or SLURM
    times         how long the stages of a command took
    progress      how far long work is: a bar on a terminal, lines in a log
    heap          memory that is free but not yet given back
    boxes         boxes of voxels, and the types of arrays
    smoothing     Gaussian smoothing of volumes, fast
    volumes       what lies on disk: geometry, masks, streams, voxels, nifti, nifti_write, metaimage, nrrd, mgh, minc,
                  archives, dicom_silence, dicom_files, dicom_kinds, dicom_pixels, dicom_frames, dicom_stacks,
                  dicom_series, dicom_headers, dicom_scan, dicom_choice, dicom_labels, dicom_structures,
                  dicom_read, dicom_maps, dicom_attributes, dicom_write, mirroring, screening, pairs
    hounsfield    whether a CT is in Hounsfield units
    simulation    patients that are made: deformation, anatomy, lesions, signals, patient, cohort_folder, phantom
    cohorts       which files belong together: cases, images, folder_notes, datalists, manifests, labels, completed,
                  folder_roles, known_layouts, dicom_modalities, dicom_places, dicom_patients, relatives, gathering,
                  discovery, target_layouts, conversion, splits, textures, duplicates
    registration  images of one patient, aligned: demons, alignment, cohort
    preparation   from files to arrays that a network learns from: intensity, bias_field, degradation, fingerprint,
                  memory, side_by_side, displacement, examination, unpaired, inspection, plan, out_of_distribution,
                  patches, planning, arrays, planes
    attenuation   CT to attenuation at 511 keV, for PET
    metrics       scores of one image against another, inside a mask: voxelwise, edges, ssim, cut_out, lesions,
                  ranking, radiotherapy, structures, challenges, conventions
    networks      tensors to tensors: generator, discriminators, layers, chain, srcnn, fcn8, unet, dcgan, pix2pix,
                  fcn3d, han, li_cnn, context_gan, strainet, sparse_coding, foreign, shapes, catalogue
    prediction    a network over a whole volume: watching, tiling, slabs, windows, seams, engines, compiled,
                  calibration, baselines, manifest, resuming, model_files, model, passes, synthesis, ensemble,
                  dicom_case, case_files, inputs, folders, cross_fitted, exported_network, monai_bundle, export
    training      how networks learn: ranks, classes, pretrained, painted_lesions, grown_lesions, simulated_patches,
                  batches, state, losses, attention, players, admm, joint_coding, health, checkpoints, run_folder,
                  finished, session, threads, log, shared_layers, small_grids, trainables, setting, reading, coding,
                  cost, sampler, discriminator_step, generator_step, learner, loop, cascade, run_planning, run,
                  cross_fitting, finetuning
    evaluation    scores, and what may be claimed from them: metric_table, rows, reference, scoring, summary,
                  paired_tests, claims, headlines, statistics, agreement, reader_files, rating, kept, loading,
                  predictions, given_volumes, segmentations, doses, uncertainty, expected_error, weight_map
    reports       the pages that people read: drawing, slices, pages, tables, registration, gallery, error_plot, curves,
                  progress_page, tensorboard, naive_comparison, evaluation_folder, evidence, advice, explanation,
                  model_cards, evaluation_page, pictures, jumps, case_scores, case_volumes, case_page, packed_pages,
                  view, evaluation_cases, evaluation, rating, study_plots, study_cases, study_page, study_digest
    studies       methods x folds x seeds, and completion: study_file, filling, utility, completion, jobs, work, notes,
                  study_report, study
    serving       a DICOM node and a page with a REST API: spool, stop, web_limits, dicom_inbox, dicom_gate, dicom_send,
                  dicom_node, jobs, scans, web_gate, web_forms, web_answers, dicomweb_receive, dicomweb_results,
                  dicomweb_search, dicomweb_studies, dicomweb_api, web_api, server
    bids          a BIDS-App: derivatives of a BIDS folder
    pipeline      from scans to a report, in one call
    demo          the main job on simulated patients
    bench         chiasm beside its peers: measuring, rows, subjects, predictions, batches, starting, files, scores,
                  table
    commands      the verbs of the command line: common, options, serving, start, data, view, models, results, rating,
                  benchmark, bids
    cli           the command: its verbs by group, and how a mistake ends
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chiasm.attenuation import mumap
    from chiasm.cohorts.conversion import convert
    from chiasm.pipeline import run
    from chiasm.prediction.export import export
    from chiasm.prediction.folders import load, predict
    from chiasm.preparation.inspection import inspect_folder as inspect
    from chiasm.reports.evaluation import evaluate
    from chiasm.reports.explanation import explain
    from chiasm.reports.model_cards import describe_models as models
    from chiasm.reports.registration import register
    from chiasm.reports.view import view
    from chiasm.studies.completion import complete
    from chiasm.studies.study import run_study as study
    from chiasm.studies.study_report import report
    from chiasm.training.cross_fitting import train
    from chiasm.training.finetuning import finetune
    from chiasm.training.run_planning import plan_run as plan

__version__ = "0.2.0"
__all__ = [
    "__version__",
    "complete",
    "convert",
    "evaluate",
    "explain",
    "export",
    "finetune",
    "inspect",
    "load",
    "models",
    "mumap",
    "plan",
    "predict",
    "register",
    "report",
    "run",
    "study",
    "train",
    "view",
]

_VERBS = {
    "explain": ("reports.explanation", "explain"),
    "run": ("pipeline", "run"),
    "export": ("prediction.export", "export"),
    "convert": ("cohorts.conversion", "convert"),
    "inspect": ("preparation.inspection", "inspect_folder"),
    "plan": ("training.run_planning", "plan_run"),
    "train": ("training.cross_fitting", "train"),
    "finetune": ("training.finetuning", "finetune"),
    "load": ("prediction.folders", "load"),
    "predict": ("prediction.folders", "predict"),
    "complete": ("studies.completion", "complete"),
    "register": ("reports.registration", "register"),
    "evaluate": ("reports.evaluation", "evaluate"),
    "report": ("studies.study_report", "report"),
    "study": ("studies.study", "run_study"),
    "models": ("reports.model_cards", "describe_models"),
    "mumap": ("attenuation", "mumap"),
    "view": ("reports.view", "view"),
}


def __dir__() -> list[str]:
    """List the verbs, for the tab key of a notebook."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import a verb when it is first used, so that `import chiasm` stays light; strings may stand for its paths."""
    if name not in _VERBS:
        raise AttributeError(f"module 'chiasm' has no attribute {name!r}; it has {', '.join(__all__)}")
    from chiasm.verbs import accept_names

    module, function = _VERBS[name]
    globals()[name] = verb = accept_names(getattr(import_module(f"chiasm.{module}"), function), name)
    return verb
