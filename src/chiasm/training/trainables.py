"""The networks of a method while they learn: with their optimisers, averages and learning rates.

Only this module knows backward passes, optimisers, precision and freezing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from chiasm.prediction.model import Model
from chiasm.preparation.plan import Plan
from chiasm.recipe import Recipe
from chiasm.training import ranks
from chiasm.training.players import Players, make_players, only_expects_error
from chiasm.training.shared_layers import share_layers
from chiasm.training.small_grids import keep_small_grids_exact

DISCRIMINATORS = ("global_discriminator", "second_discriminator", "local_discriminator")
#: Times the discriminators' rate, for a local one that only expects the error: it joins late, when rates are low.
EXPECTING_RATE = 3.0


class Trainables:
    """Networks that learn, by name, each with an optimiser; and slow averages of those that are shipped.

    Args:
        recipe: Resolved settings.
        plan: What follows from the data.
        fabric: Devices and precision, launched.
    """

    def __init__(self, recipe: Recipe, plan: Plan, fabric: Fabric) -> None:
        self.recipe, self.fabric = recipe, fabric
        players = make_players(recipe, plan, recipe.training.seed)
        averages = make_players(recipe, plan, recipe.training.seed)
        self.average, self.average_refiner = averages.generator, averages.refiner
        for average in (self.average, self.average_refiner):
            if average is not None:
                average.eval().requires_grad_(False).to(fabric.device)
        memory = torch.channels_last if plan.dims == 2 else torch.channels_last_3d
        self.modules: dict[str, nn.Module] = {}
        self.optimisers: dict[str, torch.optim.Optimizer] = {}
        for name, module in zip(Players.__dataclass_fields__, vars(players).values()):
            if module is not None:
                module.to(fabric.device, memory_format=memory)
                share_layers(module, recipe.training.batch)
                keep_small_grids_exact(module)
                self.modules[name], self.optimisers[name] = fabric.setup(module, self._optimiser(name, module))
        self._followed = {
            name: _pairs(self.bare(name), average)
            for name, average in (("generator", self.average), ("refiner", self.average_refiner))
            if average is not None
        }

    def _optimiser(self, name: str, module: nn.Module) -> torch.optim.Optimizer:
        settings = self.recipe.optimiser
        if name not in DISCRIMINATORS:  # fused: without it a step reads how many there were
            return torch.optim.Adam(module.parameters(), lr=settings.generator_rate, betas=settings.betas, fused=True)
        if settings.discriminator == "rmsprop":
            return torch.optim.RMSprop(module.parameters(), lr=settings.discriminator_rate)
        betas = settings.betas if settings.discriminator_betas == "auto" else settings.discriminator_betas
        return torch.optim.Adam(module.parameters(), lr=settings.discriminator_rate, betas=betas, fused=True)

    @property
    def parts(self) -> dict[str, Any]:
        """Everything with tensors that a checkpoint holds, by name."""
        averages = {"average": self.average, "average_refiner": self.average_refiner}
        return {
            **{name: self.bare(name) for name in self.modules},
            **{f"adam_{name}": optimiser for name, optimiser in self.optimisers.items()},
            **{name: average for name, average in averages.items() if average is not None},
        }

    def adopt(self, model: Model) -> None:
        """Take over the weights of a model that has these networks; others, which no model ships, stay as they are."""
        shipped = {
            "generator": model.generator,
            "local_discriminator": model.local_discriminator,
            "refiner": model.refiner,
        }
        for name, network in shipped.items():
            if network is None or name not in self.modules:
                continue
            for own in (self.bare(name), *self._averages(name)):
                own.load_state_dict(network.state_dict())

    def _averages(self, name: str) -> list[nn.Module]:
        averages = {"generator": self.average, "refiner": self.average_refiner}
        return [average for average in (averages.get(name),) if average is not None]

    def bare(self, name: str) -> nn.Module:
        """Return a network without its wrapper, for passes that must not be synchronised or trained."""
        module: nn.Module = getattr(self.modules[name], "module", self.modules[name])
        return module

    def descend(self, name: str, loss: Tensor, share: float = 1.0) -> None:
        """Let one network follow the gradient of a loss.

        Args:
            name: Of the network.
            loss: A mean over the samples of this process.
            share: Of the whole batch's samples that this process has.
        """
        optimiser = self.optimisers[name]
        optimiser.zero_grad(set_to_none=True)
        self.fabric.backward(loss * share if share < 1 else loss)
        ranks.total_in_place([one.grad for one in self.bare(name).parameters() if one.grad is not None])
        optimiser.step()

    @torch.no_grad()
    def clip(self, name: str, most: float) -> None:
        """Keep a critic's weights small, so that its slope is bounded (Arjovsky et al., arXiv:1701.07875)."""
        for weight in self.bare(name).parameters():
            weight.clamp_(-most, most)

    @contextmanager
    def frozen_discriminators(self) -> Iterator[None]:
        """Let gradients pass through the discriminators, not into them; their power iterations stand still.

        Batch normalisation goes on with the batch's own statistics, by which its
        discriminator separates real from synthetic: the running ones are a mixture of both.
        """
        discriminators = [module for name, module in self.modules.items() if name in DISCRIMINATORS]
        for discriminator in discriminators:
            discriminator.eval().requires_grad_(False)
            for part in discriminator.modules():
                if isinstance(part, nn.BatchNorm2d | nn.BatchNorm3d):
                    part.train()
        try:
            yield
        finally:
            for discriminator in discriminators:
                discriminator.train().requires_grad_(True)

    @torch.no_grad()
    def largest_weights(self) -> dict[str, Tensor]:
        """Return the largest absolute value in each network and each average, on the device; NaN if one is NaN."""
        held = {
            name: [one for one in part.state_dict().values() if one.is_floating_point() and one.numel()]
            for name, part in self.parts.items()
            if isinstance(part, nn.Module)
        }
        return {name: torch.stack(torch._foreach_norm(some, math.inf)).max() for name, some in held.items() if some}

    def set_rates(self, step: int) -> None:
        """Cosine decay to a hundredth, from the step alone."""
        share = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / self.recipe.schedule.steps))
        rates = self.recipe.optimiser
        for name, optimiser in self.optimisers.items():
            rate = rates.discriminator_rate if name in DISCRIMINATORS else rates.generator_rate
            if name == "local_discriminator" and only_expects_error(self.recipe):
                rate *= EXPECTING_RATE
            for group in optimiser.param_groups:
                group["lr"] = rate * share

    @torch.no_grad()
    def move_average(self, name: str, age: int) -> None:
        """Follow a network's weights slowly; faster in its first steps, when there is little to average."""
        keep = min(self.recipe.optimiser.average, (1 + age) / (10 + age))
        averages, currents, counts, current_counts = self._followed[name]
        torch._foreach_lerp_(averages, currents, 1 - keep)
        if counts:
            torch._foreach_copy_(counts, current_counts)


def _pairs(network: nn.Module, average: nn.Module) -> tuple[list[Tensor], ...]:
    """List the tensors of an average and those that they follow; then those that are only copied, likewise."""
    own, followed = (one.state_dict(keep_vars=True) for one in (average, network))  # which stay, wherever they are laid
    names = [[name for name in own if own[name].is_floating_point() is moves] for moves in (True, False)]
    return tuple([tensors[name] for name in some] for some in names for tensors in (own, followed))
