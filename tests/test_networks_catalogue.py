"""The literature's networks by name: their contract, networks of other packages, and what is refused."""

from __future__ import annotations

import resource
import time
from contextlib import suppress
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

from chiasm.errors import RecipeError
from chiasm.networks.catalogue import (
    DISCRIMINATORS,
    GENERATORS,
    SameSize,
    check_contract,
    make_discriminator,
    make_network,
    needs_of,
)
from chiasm.networks.foreign import MONAI
from chiasm.networks.generator import ResidualGenerator
from chiasm.networks.shapes import shapes_of, without_memory
from chiasm.prediction import passes
from chiasm.prediction.engines import Engine, Hardware
from chiasm.prediction.passes import predict_stage
from network_checks import lively
from synthetic_cohort import plan_of

THIN = 1 / 16
EVERY = [(name, dims) for name, entry in GENERATORS.items() for dims in entry.dims]


def least_patch(network: nn.Module, dims: int) -> tuple[int, ...]:
    needs = needs_of(network)
    least = max(needs.smallest, 2 * needs.margin + 1)
    return (-(-least // needs.multiple) * needs.multiple,) * dims


@pytest.mark.parametrize(("name", "dims"), EVERY)
def test_every_network_keeps_the_contract_on_its_least_patch(name: str, dims: Any) -> None:
    network = make_network(name, in_channels=3, dims=dims, scale=THIN)
    if name == "pix2pix" and dims == 3:
        return  # 256 voxels in three dimensions: its own test
    check_contract(network, name, 3, least_patch(network, dims))


@pytest.mark.parametrize("name", [name for name in GENERATORS if name != "pix2pix"])
def test_any_size_is_filled_up_and_the_middle_is_what_the_network_makes_of_it(name: str) -> None:
    torch.manual_seed(0)
    network, dims = make_network(name, in_channels=1, dims=2, scale=THIN).eval(), 2
    needs, any_size = needs_of(network), SameSize(network)
    reach = int(network.receptive_field) if needs.margin else 0  # type: ignore[arg-type]
    side = max(least_patch(network, dims)[0] + 2 * needs.multiple, 2 * reach + 3)
    image = torch.randn(1, 1, side, side)
    with torch.inference_mode():
        whole = any_size(image)
        assert whole.shape == image.shape
        odd = any_size(image[..., : side - 1, : side - 3])
        assert odd.shape == (1, 1, side - 1, side - 3) and torch.isfinite(odd).all()
        if needs.margin:  # what lies as far from the edge as the network sees
            inner = (..., *[slice(reach, side - reach)] * 2)
            lost = reach - needs.margin
            made = network(image)
            kept = (..., *[slice(lost, made.shape[-1] - lost)] * 2)
            torch.testing.assert_close(made[kept], whole[inner], atol=1e-5, rtol=1e-4)
        else:
            torch.testing.assert_close(network(image), whole)


@pytest.mark.parametrize("name", list(DISCRIMINATORS))
@pytest.mark.parametrize("dims", [2, 3])
def test_every_discriminator_scores_each_sample_alone_and_can_be_standardised(name: str, dims: Any) -> None:
    discriminator = make_discriminator(name, in_channels=2, dims=dims, scale=THIN).eval()
    discriminator.get_submodule("standardise").set_input_statistics(torch.zeros(2), torch.ones(2))  # type: ignore[operator]
    images = torch.randn(2, 2, *(max(int(discriminator.smallest), 32),) * dims)  # type: ignore[arg-type]
    with torch.no_grad():
        scores = discriminator(images)
        assert len(scores) == 2 and (scores.ndim == 1 or scores.shape[1] == 1)
        torch.testing.assert_close(discriminator(images[1:])[0], scores[1], atol=1e-5, rtol=1e-4)


def test_a_network_of_another_package_or_of_ones_own_is_named_by_module_and_class() -> None:
    pytest.importorskip("monai", reason="MONAI is not installed")
    options = {"features": (4, 4, 4, 4, 4, 4)}
    theirs = make_network("monai:BasicUNet", in_channels=2, dims=2, options=options)
    check_contract(theirs, "monai:BasicUNet", 2, (32, 32))
    own = make_network("toy_networks:Plain", in_channels=2, dims=3, options={"width": 6})
    check_contract(own, "toy_networks:Plain", 2, (9, 9, 9))
    assert own(torch.zeros(1, 2, 9, 9, 9)).shape == (1, 1, 9, 9, 9)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("swin", {}, "srcnn, .*unet, .*monai:CLASS"),
        ("monai:NoSuchNet", {}, "no class NoSuchNet"),
        ("no_such_package:Net", {}, "cannot be imported"),
        ("toy_networks:Plain", {"depth": 3}, "cannot be built.*depth"),
        ("toy_networks:Plain", {"width": "six"}, "option 'width' .*'six'.* a valid integer"),
        ("toy_networks:not_a_network", {}, "no class of networks of the package toy_networks"),
        ("toy_networks:nn", {}, "no class of networks"),
        ("toy_networks:Tensor", {}, "no class of networks of the package toy_networks"),  # of torch
        ("torch.hub:load", {"repo_or_dir": ".", "model": "x", "source": "local"}, "no class of networks of .* torch"),
        ("monai.bundle:run", {"config_file": "x.json"}, "no class of networks of the package monai"),
        ("os:system", {"command": "true"}, "no class of networks"),
        (".toy_networks:Plain", {}, "the name of the network has a wrong form"),
        ("toy_networks:Plain.forward", {}, "the name of the network has a wrong form"),
        ("monai:DenseNet121", {}, "no class DenseNet121 in monai"),
        ("monai:FlexibleUNet", {"backbone": "resnet18", "pretrained": True}, "with the option 'pretrained'"),
        ("monai:BasicUNet", {"features": "many"}, "with the option 'features'"),
        ("strainet", {"nonsense": 5}, "strainet cannot be built.*nonsense.*drop, basis"),
        ("han", {"depth": 3}, "han cannot be built.*depth.*no options"),
        ("pix2pix", {"depth": 0}, "pix2pix cannot be built"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_sentence(name: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        make_network(name, in_channels=1, dims=2, options=options)


def test_options_reach_the_literatures_networks_too() -> None:
    deep, flat = (make_network("pix2pix", in_channels=1, dims=2, options={"depth": depth}) for depth in (6, 5))
    assert needs_of(deep).multiple == 64 and needs_of(flat).multiple == 32
    usual, asked = (make_network("unet", in_channels=1, dims=2, options=given) for given in ({}, {"dropout": 0.25}))
    shares = [{part.p for part in net.modules() if isinstance(part, nn.Dropout)} - {0.0} for net in (usual, asked)]
    assert shares == [{0.5}, {0.25}]


def test_wrong_patches_dimensions_and_channels_are_refused_with_what_is_possible() -> None:
    with pytest.raises(RecipeError, match=r"has no 3D form.*2D"):
        make_network("han", in_channels=1, dims=3)
    large = make_network("pix2pix", in_channels=1, dims=2, scale=THIN)
    with pytest.raises(RecipeError, match=r"cannot take the patch.*96 x 96.*multiples of 256"):
        check_contract(large, "pix2pix", 1, (96, 96))
    with pytest.raises(RecipeError, match="cannot take the patch"):
        check_contract(make_network("fcn3d", in_channels=1, dims=3, scale=THIN), "fcn3d", 1, (4, 4, 4))
    two = make_network("toy_networks:TwoChannels", in_channels=1, dims=2)
    with pytest.raises(RecipeError, match="does not keep the contract"):
        check_contract(two, "toy_networks:TwoChannels", 1, (16, 16))
    with pytest.raises(RecipeError, match="dcgan, patch, context"):
        make_discriminator("discriminator", in_channels=2, dims=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcn3d", "li-cnn", "context-fcn", "srcnn"])
def test_a_volume_in_exact_tiles_equals_the_volume_in_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Valid convolutions take a larger patch than they give: tiles must meet without a seam all the same."""
    torch.manual_seed(0)
    network = lively(make_network(name, in_channels=1, dims=3, scale=THIN))
    source = np.random.default_rng(0).normal(size=(1, 61, 12, 11)).astype(np.float32)
    mask, engine = np.ones(source.shape[1:], bool), Engine.pick(Hardware("cpu", "32-true"))
    plan = plan_of(dims=3, slices=1, patch=(32, 32, 32))
    made, calls = [], []
    for tile in (96, 16):
        monkeypatch.setattr(passes, "TILE", tile)
        counted = Mock(side_effect=network.forward)
        with monkeypatch.context() as patched:
            patched.setattr(network, "forward", counted)
            made.append(predict_stage(network, source, mask, plan=plan, engine=engine))
        calls.append(counted.call_count)
    assert calls[0] == 1 < calls[1]
    np.testing.assert_allclose(made[1], made[0], atol=1e-5 * float(made[0].std()) + 1e-6)


class Starved(nn.Module):
    """A network that misses a package, and says so only when it runs."""

    def __init__(self, *, in_channels: int, dims: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(in_channels, 1, 1)

    def forward(self, source: Any) -> Any:
        """Fail as MONAI's optional imports do."""
        raise ImportError("from einops import rearrange (No module named 'einops').\n\nFor details about installing")


def test_a_package_that_is_missed_only_at_run_time_is_named_in_one_sentence() -> None:
    starved = make_network("test_networks_catalogue:Starved", in_channels=1, dims=2)
    with pytest.raises(RecipeError, match=r"needs a package that is not installed .*einops.*chiasm\[monai\]") as caught:
        check_contract(starved, "monai:Starved", 1, (32, 32))
    assert "\n" not in str(caught.value) and caught.value.reason == "no-package"


@pytest.mark.parametrize("dims", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_monais_swin_unetr_keeps_the_contract(dims: Any) -> None:
    pytest.importorskip("monai", reason="MONAI is not installed")
    pytest.importorskip("einops", reason="einops, which MONAI's transformers need, is not installed")
    swin = make_network("monai:SwinUNETR", in_channels=2, dims=dims, options={"feature_size": 12})
    check_contract(swin, "monai:SwinUNETR", 2, (64,) * dims)


def test_a_misspelt_class_lists_those_like_it() -> None:
    pytest.importorskip("monai", reason="MONAI is not installed")
    with pytest.raises(RecipeError, match=r"no class SwinUnetr in monai .*one of SwinUNETR"):
        make_network("monai:SwinUnetr", in_channels=1, dims=2)
    with pytest.raises(RecipeError, match=r"no class Zebra in toy_networks .*one of Plain, TwoChannels"):
        make_network("toy_networks:Zebra", in_channels=1, dims=2)
    for nameless in (":Plain", "toy_networks:"):
        with pytest.raises(RecipeError, match=r"there is no network .*package\.module:CLASS"):
            make_network(nameless, in_channels=1, dims=2)


#: What classes of MONAI cannot do without.
ASKED: dict[str, dict[str, Any]] = {
    "AttentionUnet": {"channels": (4, 8), "strides": (2,)},
    "AutoEncoder": {"channels": (4, 8), "strides": (2, 2)},
    "BasicUNet": {"features": (4,) * 6},
    "DynUNet": {"kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2)},
    "FlexibleUNet": {"backbone": "efficientnet-b0"},
    "LocalNet": {"num_channel_initial": 4, "extract_levels": (0, 1)},
    "MedNeXt": {"init_filters": 4},
    "RegUNet": {"num_channel_initial": 4, "depth": 2},
    "SegResNetDS": {"init_filters": 8},
    "SwinUNETR": {"feature_size": 12},
    "UNETR": {"img_size": 32},
    "UNet": {"channels": (4, 8), "strides": (2,)},
}


@pytest.mark.parametrize("name", [name for name in MONAI if name != "UNETR"])  # which needs einops
def test_every_class_of_monais_table_has_its_true_shapes_without_memory(name: str) -> None:
    pytest.importorskip("monai", reason="MONAI is not installed")
    asked = {"in_channels": 2, "dims": 2, "options": ASKED.get(name, {})}
    with without_memory():
        untaught = make_network(f"monai:{name}", **asked)
    network = make_network(f"monai:{name}", **asked)
    assert all(value.is_meta for value in untaught.state_dict().values())
    assert shapes_of([("net", untaught)]) == shapes_of([("net", network)])
    if name not in ("AHNet", "SwinUNETR"):  # of larger patches; needs einops
        check_contract(network, name, 2, (32, 32))


def test_no_class_outside_the_table_is_reached_by_the_name_monai() -> None:
    pytest.importorskip("monai", reason="MONAI is not installed")
    with pytest.raises(RecipeError, match=r"no class Zebra in monai .*BasicUNet, .*SwinUNETR") as caught:
        make_network("monai:Zebra", in_channels=1, dims=2)
    assert not any(word in str(caught.value.expected) for word in ("Discriminator", "Dense", " Unet", " ResNet"))


@pytest.mark.parametrize("widths", [(4096,) * 8, (65536,) * 8])
def test_widths_that_no_machine_holds_cost_neither_time_nor_memory(widths: tuple[int, ...]) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with suppress(RecipeError), without_memory():
        shapes_of([("generator", ResidualGenerator(in_channels=3, widths=widths, dims=2))])
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_networks_without_end_are_given_up() -> None:
    with pytest.raises(RecipeError, match=r"too large.*Lower the widths"), without_memory():
        nn.Sequential(*(nn.Linear(2, 2) for _ in range(10_000_000)))


@pytest.mark.parametrize("name", list(DISCRIMINATORS))
def test_a_discriminator_without_normalisation_has_a_bias_in_its_place(name: str) -> None:
    plain = make_discriminator(name, in_channels=2, dims=2, scale=THIN, norm="none")
    parts = list(plain.modules())
    assert not any(isinstance(part, nn.BatchNorm2d) for part in parts)
    assert all(part.bias is not None for part in parts if isinstance(part, nn.Conv2d))
