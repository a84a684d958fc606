"""How much effort a training takes: sizes by name, each a few settings away from the defaults."""

from __future__ import annotations

from collections.abc import Mapping

Changes = Mapping[str, object]

#: How much effort: one dial.  Paper scale follows METHOD (widths 64 to 1024, 200k steps of 32).
SIZES: Mapping[str, Changes] = {
    "tiny": {
        "generator.widths": (8, 16, 32),
        "generator.scale": 0.125,
        "discriminators.scale": 0.125,
        "discriminators.global_widths": (8, 16, 32),
        "discriminators.local_widths": (8, 16, 32),
        "schedule.steps": 400,
        "optimiser.average": 0.99,
        "training.validations": 4,
    },
    "small": {},
    "paper": {
        "data.slices": 5,
        "generator.widths": (64, 128, 256, 512, 1024),
        "generator.scale": 1.0,
        "discriminators.scale": 1.0,
        "discriminators.global_widths": (64, 128, 256, 512),
        "discriminators.local_widths": (32, 64, 128, 256),
        "schedule.steps": 200_000,
        "optimiser.generator_rate": 2e-4,
        "optimiser.discriminator_rate": 1e-4,
        "optimiser.average": 0.9999,
        "training.batch": 32,
        "training.validations": 40,
    },
    "large": {
        "data.slices": 5,
        "generator.widths": (32, 64, 128, 256, 512),
        "generator.scale": 0.5,
        "discriminators.scale": 0.5,
        "discriminators.global_widths": (32, 64, 128, 256),
        "discriminators.local_widths": (16, 32, 64, 128),
        "schedule.steps": 40_000,
        "optimiser.generator_rate": 3e-4,
        "optimiser.discriminator_rate": 2e-4,
        "training.batch": 16,
        "training.validations": 20,
    },
}

#: Further settings of a size for this project's own generator; they were measured for it (docs/results.md).
OWN_SIZES: Mapping[str, Changes] = {
    "small": {
        "generator.fold": 2,
        "generator.widths": (24, 48, 96, 192),
        "generator.average": "flip",
        "discriminators.local_fold": 2,
        "discriminators.local_widths": (16, 32, 64),
        "optimiser.generator_rate": 1e-3,
        "training.class_share": "auto",
        "training.painted_share": "auto",
        "training.simulated_share": "auto",
        "training.shaded_share": "auto",
        "training.pretrained": "auto",
    },
}
