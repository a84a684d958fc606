"""Networks that see coronal or sagittal slices: all that they are given and make is in RAS order outside."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from chiasm.cohorts.discovery import find_cohort
from chiasm.errors import RecipeError
from chiasm.methods import make_recipe
from chiasm.prediction.engines import Engine
from chiasm.prediction.folders import load
from chiasm.prediction.passes import Maps, Networks, synthesise_prepared
from chiasm.preparation.arrays import PreparedCase, prepare_case
from chiasm.preparation.plan import AXES, Plan
from chiasm.preparation.planes import seen_by_networks
from chiasm.recipe import Plane
from chiasm.training.batches import Place, take_batch
from chiasm.training.cross_fitting import train
from chiasm.training.learner import Learner
from chiasm.training.loop import make_fabric
from chiasm.training.run import train as train_one
from chiasm.volumes import canonical, read_volume, write_volume
from chiasm.volumes.geometry import reordered
from conftest import QUICK
from learning import small, textured_case
from synthetic_cohort import plan_of, write_brats

PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal")
OTHERS = PLANES[1:]


class Uneven(nn.Module):
    """A network of five slices that weighs each of them, and each side of a voxel, differently."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Conv2d(5, 1, 3, padding=1, bias=False)
        with torch.no_grad():
            self.weigh.weight.copy_(torch.randn(1, 5, 3, 3, generator=torch.Generator().manual_seed(3)))

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.weigh(images)
        return made


def predicted(case: PreparedCase, plan: Plan, average: str = "none") -> Maps:
    networks = Networks(Uneven().eval(), average=average)  # type: ignore[arg-type]
    return synthesise_prepared(
        networks, case.source, case.mask, plan=plan, conditional=False, error_scale=0.0, engine=ENGINE
    )


ENGINE = Engine(torch.device("cpu"), "32-true")


def case_with_a_mask() -> PreparedCase:
    case = textured_case(1, (24, 28, 18))
    mask = np.random.default_rng(0).random(case.mask.shape) < 0.8
    return replace(case, mask=mask, source=case.source * mask)


@pytest.mark.parametrize("plane", OTHERS)
def test_a_prediction_is_that_of_the_axes_laid_out_for_the_network_and_laid_back(plane: Plane) -> None:
    case, plan = case_with_a_mask(), plan_of(slices=5, plane=plane)
    (seen,) = seen_by_networks([case], plan)
    made = predicted(seen, replace(plan, plane="axial")).prediction
    back = np.empty(case.mask.shape, np.float32)
    back.transpose(AXES[plane])[...] = made
    np.testing.assert_array_equal(predicted(case, plan).prediction, back)


@pytest.mark.parametrize("plane", PLANES)
def test_a_mean_over_mirror_images_is_of_left_and_right_in_every_plane(plane: Plane) -> None:
    case, plan = case_with_a_mask(), plan_of(slices=5, plane=plane)
    mirrored = replace(case, source=case.source[:, ::-1], mask=case.mask[::-1])
    expected = (predicted(case, plan).prediction + predicted(mirrored, plan).prediction[::-1]) / 2
    np.testing.assert_allclose(predicted(case, plan, "flip").prediction, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("plane", PLANES)
def test_voxels_keep_their_places_in_the_world(plane: Plane) -> None:
    case = textured_case(2, (9, 11, 7))
    (seen,) = seen_by_networks([case], plan_of(plane=plane))
    voxel = np.array([2, 5, 3])
    i, j, k = voxel[[*AXES[plane]]]
    assert seen.source[0, i, j, k] == case.source[0, 2, 5, 3] and seen.target[i, j, k] == case.target[2, 5, 3]
    assert seen.labels is not None and case.labels is not None and seen.labels[i, j, k] == case.labels[2, 5, 3]
    np.testing.assert_allclose(seen.grid.affine @ [i, j, k, 1], case.grid.affine @ [*voxel, 1])
    assert seen.grid.shape == seen.mask.shape and AXES[plane][seen.sideways] == 0


@pytest.mark.parametrize("plane", PLANES)
def test_a_flipped_patch_is_the_patch_of_the_mirror_image(plane: Plane) -> None:
    case, plan = textured_case(3, (20, 20, 20)), plan_of(plane=plane)
    case = replace(case, source=np.stack([case.source[0], case.target]))
    other = replace(case, **{name: getattr(case, name)[::-1] for name in ("target", "mask", "labels")})
    other = replace(other, source=case.source[:, ::-1])
    centre = [10, 10, 10]
    place = Place(0, (10, 10, 10), True, (1.0, 1.0), (0.0, 0.0), shifts=None)
    centre[AXES[plane].index(0)] = 9 if plane == "sagittal" else 10  # of 20 voxels, mirrored
    there = replace(place, centre=(centre[0], centre[1], centre[2]), flip=False)
    took = [
        take_batch(seen_by_networks([one], plan), [at], patch=(20, 20), slices=5)
        for one, at in ((case, place), (other, there))
    ]
    for flipped, mirrored in zip(*took, strict=True):
        torch.testing.assert_close(flipped, mirrored, rtol=0, atol=0)


def test_prepared_arrays_are_in_ras_order_whatever_the_plane_and_its_slices_lie_together(tmp_path: Path) -> None:
    case = find_cohort(write_brats(tmp_path / "cohort", 1)).cases[0]
    axial, *others = (prepare_case(case, plan_of(plane=plane), tmp_path / "cache") for plane in PLANES)
    for plane, other in zip(OTHERS, others):
        np.testing.assert_array_equal(axial.source, other.source)
        np.testing.assert_array_equal(axial.target, other.target)
        (seen,) = seen_by_networks([other], plan_of(plane=plane))
        assert seen.source[0, ..., 4].flags.c_contiguous


def test_a_network_learns_from_slices_of_its_plane() -> None:
    recipe, plan = small("l2"), plan_of(plane="sagittal", spacing_mm=(1.0, 1.1, 1.2))
    learner = Learner(recipe, plan, [textured_case(4, (20, 24, 16))], make_fabric(recipe))
    assert learner.setting.cases[0].mask.shape == (24, 16, 20) and plan.seen_mm == (1.1, 1.2, 1.0)


def test_tumours_grow_in_the_same_places_whatever_the_plane() -> None:
    """What is below stays below: no glioma of the brainstem is simulated."""
    recipe, case = small("l2", {"training.simulated_share": 0.5}), textured_case(5, (40, 44, 36))
    spacing = {"spacing_mm": (1.0, 1.1, 1.2)}
    axial, sagittal = (
        Learner(recipe, plan_of(plane=plane, **spacing), [case], make_fabric(recipe)).setting.variation
        for plane in ("axial", "sagittal")
    )
    assert len(axial.grown[0]) == len(sagittal.grown[0]) > 0
    where = np.arange(40), np.arange(44), np.arange(36)
    for one, other in zip(axial.grown[0], sagittal.grown[0]):
        np.testing.assert_array_equal(one.centres[:, [1, 2, 0]], other.centres)
        np.testing.assert_allclose(
            one.at(where).transpose(0, 2, 3, 1), other.at((where[1], where[2], where[0])), atol=1e-6
        )
    assert axial.painter is not None and sagittal.painter is not None
    assert sagittal.painter.spacing_mm == (1.1, 1.2, 1.0)
    np.testing.assert_array_equal(axial.painter.ends, sagittal.painter.ends)


@pytest.mark.parametrize("change", [["data.dims=3d"], ["data.task=super-resolution", "data.sources=['t2']"]])
def test_only_synthesis_in_2d_has_slices_of_another_plane(change: list[str]) -> None:
    with pytest.raises(RecipeError, match="plane is of slices"):
        make_recipe("l2", "tiny", {}, ["data.plane=coronal", *change])
    with pytest.raises(ValueError, match="slices of another plane"):
        plan_of(plane="coronal", dims=3, slices=1, patch=(32, 32, 32))


def planes_of(run: Path) -> list[str]:
    return [model.plan.plane for model in load([*sorted((run / "models").iterdir())]).models]


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_brats(tmp_path_factory.mktemp("cube") / "cohort", 3, shape=(40, 44, 36), spacing=(1.0, 1.0, 1.1))


def several(**changes: object) -> dict[str, object]:
    return {**QUICK, "split.folds": "auto", "split.models": 3, "schedule.steps": 9, **changes}


def test_several_models_see_the_three_planes_where_voxels_are_as_long_as_wide(cube: Path, tmp_path: Path) -> None:
    recipe, said = make_recipe("l2", "tiny", several()), list[str]()
    train(cube, recipe, tmp_path / "run", say=said.append)
    assert planes_of(tmp_path / "run") == [*PLANES]
    assert "model 3 of 3, of sagittal slices" in said
    train(cube, recipe, tmp_path / "run", say=said.append)  # what was chosen is no other recipe
    scan = next(cube.glob("*/*_t1.nii.gz"))
    volume = read_volume(scan)
    other = tmp_path / "other.nii.gz"
    moved = reordered(volume, (2, 0, 1), (True, False, True))
    write_volume(other, moved.array, moved.geometry)
    predictor = load(tmp_path / "run")
    made, again = (predictor.predict(path).image for path in (scan, other))
    np.testing.assert_allclose(canonical(made).array, canonical(again).array, rtol=0, atol=1e-3 * np.ptp(made.array))


def test_a_plane_that_is_asked_for_holds_for_all_models(cube: Path, tmp_path: Path) -> None:
    train(cube, make_recipe("l2", "tiny", several(**{"data.plane": "sagittal"})), tmp_path / "run", say=lambda _: None)
    assert planes_of(tmp_path / "run") == ["sagittal"] * 3


def test_thick_slices_stay_axial(tmp_path: Path) -> None:
    data = write_brats(tmp_path / "cohort", 3, spacing=(1.0, 1.0, 2.0))
    train(data, make_recipe("l2", "tiny", several()), tmp_path / "run", say=lambda _: None)
    assert planes_of(tmp_path / "run") == ["axial"] * 3


def test_one_model_sees_the_plane_that_is_asked_for_and_says_so(cube: Path, tmp_path: Path) -> None:
    asked = {**QUICK, "split.folds": 1, "split.validation": 0.34, "data.plane": "coronal"}
    run = train_one(cube, make_recipe("l2", "tiny", asked), tmp_path / "run", say=lambda _: None)
    assert run.plan.plane == "coronal" and "set in the recipe" in run.plan.reasons["plane"]
