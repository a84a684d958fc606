"""chiasm turns medical image volumes of one modality into another.

The house, read from top to bottom.  A module imports only from lines above
its own, and within a line only from names to its left; a test reads this map.

    errors      what a user can act on: what, where, found, expected, what to do
    storage     files that appear whole or not at all; TOML, JSON, sha256
    recipe      what the user asked for: frozen settings, presets, one dial
    volumes     what lies on disk: geometry, nifti, metaimage, screening
    cohorts     which files belong together: cases, layouts, splits, intensity, planning, preparation, anatomy, lesions, phantom
    metrics     figures of merit on arrays with a mask; conventions by name
    networks    tensors to tensors: generator, discriminators
    prediction  a network over a whole volume: tiling, engines, calibration, model, synthesis
    training    how networks learn: batches, losses, attention, methods, health, checkpoints, learner, loop
    evidence    what may be claimed: baselines, evaluation, report
    pages       what people look at: templates
    workflow    the verbs as functions, for Python and for the command line
    cli         verbs: parse, call, print
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chiasm.workflow import evaluate, inspect, load, plan, predict, train

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "inspect", "load", "plan", "predict", "train"]


def __getattr__(name: str) -> Any:
    """Import a verb when it is first used, so that `import chiasm` stays light."""
    if name in __all__:
        from chiasm import workflow

        return getattr(workflow, name)
    raise AttributeError(f"module 'chiasm' has no attribute {name!r}; it has {', '.join(__all__)}")
