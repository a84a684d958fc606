"""Make a run on simulated patients the weights that trainings start from: a file of weights and its card.

    chiasm phantom -o PATIENTS --anatomy LABEL_MAPS --subjects 42 --spacing 1 --difficulty varied --seed 500
    chiasm train PATIENTS -o RUN --source t1 --target t2 --method l2 --folds 1 --steps 6000 \
        --set split.validation=0 --set training.lesion_share=0.35 --set training.painted_share=0 \
        --set training.simulated_share=0 --set training.pretrained=none
    python benchmarks/ship_pretrained.py RUN brain-t1-t2 --patients PATIENTS

So T1 to T2 is learnt; weights for other contrasts differ in source, target and name alone, and come from the same
patients.  LABEL_MAPS is a folder of label maps of heads, such as those of SynthSeg (docs/pretrained.md).  Only
simulated patients may go into weights that ship: a run on any other cohort is refused.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import tomli_w
import torch
from safetensors.torch import save_file

from chiasm.checksums import sha256_of
from chiasm.prediction.model import load_model
from chiasm.training.pretrained import FOLDER, WeightsCard

SOURCES = (
    "Label maps of 14 heads from SynthSeg (github.com/BBillot/SynthSeg), Apache-2.0; Billot et al., Medical Image "
    "Analysis 86:102789 (2023), doi:10.1016/j.media.2023.102789. Merged to 12 tissues, deformed, and shown with "
    "simulated lesions and contrasts: no image of a person was used.",
)
SPACING_MM = (0.7, 1.5)  # that weights of 1 mm serve: nothing else was tried


def describe(patients: Path) -> str:
    """Say what the patients of a cohort are; refuse any that chiasm did not simulate."""
    cases = json.loads((patients / "cohort.json").read_text())["cases"]
    heads = {note["head"] for note in cases.values()}
    for name in cases:
        if not (patients / "truth" / name / "parameters.json").is_file():
            raise SystemExit(f"{patients}: {name} is no simulated patient")
    lesions = sum(note["lesion"] != "none" for note in cases.values())
    return f"learnt from {len(cases)} simulated patients of {len(heads)} heads, {lesions} with a lesion"


def main() -> None:
    """Write weights and card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--patients", type=Path, required=True)
    asked = parser.parse_args()
    model = load_model(asked.run)
    recipe, plan = model.recipe, model.plan
    known = set(json.loads((asked.patients / "cohort.json").read_text())["cases"])
    if not set(plan.trained_on) <= known:
        raise SystemExit(f"{asked.run} was trained on others than the patients of {asked.patients}")
    stored = {
        key: value.to(torch.float16) if value.is_floating_point() else value
        for key, value in model.generator.state_dict().items()
        if not key.startswith("lookup_")  # a new training begins with its own table
    }
    task = f"--source {' '.join(plan.sources)} --target {plan.target}"
    commands = __doc__.split("\n\n")[1].replace("\\\n", "")
    commands = commands.replace("--source t1 --target t2", task).replace("brain-t1-t2", asked.name)
    commands = commands.replace("--steps 6000", f"--steps {recipe.schedule.steps}")
    path = FOLDER / f"{asked.name}.safetensors"
    save_file({key: value.contiguous() for key, value in stored.items()}, path)
    card = WeightsCard(
        contrasts=(*plan.sources, plan.target),
        widths=recipe.generator.widths,
        fold=recipe.generator.fold,
        norm=recipe.generator.norm,
        skip=recipe.generator.skip,
        slices=plan.slices,
        spacing_mm=SPACING_MM,
        about=describe(asked.patients),
        sha256=sha256_of(path),
        sources=SOURCES,
        commands=tuple(" ".join(line.split()) for line in commands.splitlines() if line),
    )
    (FOLDER / f"{asked.name}.toml").write_text(tomli_w.dumps(card.model_dump()))
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MB, {card.about}")


if __name__ == "__main__":
    main()
