"""Two players and one step of theirs.

Only this module knows backward passes, optimisers, precision and freezing.
Networks map tensors to tensors, losses are pure functions, and `Learner.step`
reads like the method: one shared forward pass, the judges, the generator, and
where there is one the refiner, from which nobody before it learns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from chiasm.errors import RunError
from chiasm.networks.catalogue import OWN
from chiasm.prediction.engines import Engine
from chiasm.prediction.model import Model
from chiasm.prediction.synthesis import Maps, refine, synthesise_prepared
from chiasm.preparation.arrays import PreparedCase
from chiasm.preparation.plan import Plan
from chiasm.recipe import Recipe
from chiasm.training import attention, losses
from chiasm.training.batches import Batch, Place, crop_batch, draw_places, lesion_voxels, take_batch
from chiasm.training.players import Players, make_players

RUNNING = 0.98  # decay of running figures
POOL = 256  # places remembered by attention-driven sampling
CRITIC_LOSS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lsgan": losses.least_squares_discriminator_loss,
    "hinge": losses.hinge_discriminator_loss,
    "wgan": losses.wasserstein_discriminator_loss,
    "wgan-gp": losses.wasserstein_discriminator_loss,
}
GENERATOR_LOSS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "bce": losses.adversarial_generator_loss,
    "lsgan": losses.least_squares_generator_loss,
    "hinge": losses.wasserstein_generator_loss,
    "wgan": losses.wasserstein_generator_loss,
    "wgan-gp": losses.wasserstein_generator_loss,
}
JUDGES = ("global_judge", "second_judge", "local_judge")
SMALLEST_DOUBT = 1e-6  # so that whatever can be drawn may be
RUNNING_LESION = 0.9  # decay of a case's doubt, which is seen only where a patch meets its lesion


class Learner:
    """Two players and the state between their steps.

    Args:
        recipe: Resolved settings.
        plan: What follows from the data.
        training: Prepared training cases.
        fabric: Devices and precision, launched.
    """

    def __init__(self, recipe: Recipe, plan: Plan, training: Sequence[PreparedCase], fabric: Fabric) -> None:
        self.recipe, self.plan, self.cases, self.fabric = recipe, plan, training, fabric
        self.lesions = lesion_voxels(training)
        players = make_players(recipe, plan, recipe.training.seed)
        averages = make_players(recipe, plan, recipe.training.seed)
        self.average, self.average_refiner = averages.generator, averages.refiner
        for average in (self.average, self.average_refiner):
            if average is not None:
                average.eval().requires_grad_(False).to(fabric.device)
        self.modules: dict[str, nn.Module] = {
            name: module
            for name, module in zip(Players.__dataclass_fields__, vars(players).values())
            if module is not None
        }
        rates, betas = recipe.optimiser, recipe.optimiser.betas
        self.optimisers: dict[str, torch.optim.Optimizer] = {}
        for name, module in self.modules.items():
            rate = rates.discriminator_rate if name in JUDGES else rates.generator_rate
            module.to(memory_format=torch.channels_last if plan.dims == 2 else torch.channels_last_3d)  # type: ignore[call-overload]
            optimiser: torch.optim.Optimizer
            if name in JUDGES and rates.discriminator == "rmsprop":
                optimiser = torch.optim.RMSprop(module.parameters(), lr=rate)
            else:
                own = betas if name not in JUDGES or rates.discriminator_betas == "auto" else rates.discriminator_betas
                optimiser = torch.optim.Adam(module.parameters(), lr=rate, betas=own)
            self.modules[name], self.optimisers[name] = fabric.setup(module, optimiser)
        self.state: dict[str, Any] = {
            "error_scale": 0.0,
            "accuracy": 0.5,
            "accuracy_global": 0.5,
            "confidence_sd": 0.0,
            "rho": -1.0,
            "closed_steps": 0,
            "attention_steps": 0,
            "pool": [],
            "lesion_doubt": {},  # running mean of 1 - M in the lesion, by id of the case; unseen ones are absent
        }
        spacing = plan.spacing_mm[: plan.dims]
        self.sigma_magnitude = tuple(recipe.attention.magnitude_mm / s for s in spacing)
        self.sigma_structured = tuple(recipe.attention.structured_mm / s for s in spacing)

    @property
    def parts(self) -> dict[str, Any]:
        """Everything with tensors that a checkpoint holds, by name."""
        bare = {name: getattr(module, "module", module) for name, module in self.modules.items()}
        averages = {"average": self.average, "average_refiner": self.average_refiner}
        return {
            **bare,
            **{f"adam_{name}": optimiser for name, optimiser in self.optimisers.items()},
            **{name: average for name, average in averages.items() if average is not None},
        }

    def bare(self, name: str) -> nn.Module:
        """Return a player without its wrapper, for passes that must not be synchronised or trained."""
        module: nn.Module = getattr(self.modules[name], "module", self.modules[name])
        return module

    def phase(self, step: int) -> attention.Phase:
        """Say who plays at a step, and at which strength; the same for all arms, so generators learn equally often."""
        schedule = self.recipe.schedule
        return attention.phase(
            step,
            steps=schedule.steps,
            generator_alone=schedule.generator_alone,
            critics_alone=schedule.critics_alone,
            ramp=schedule.ramp,
        )

    def step(self, step: int) -> dict[str, float]:
        """Do one step: draw a batch, one forward pass of the generator, judges, generator.

        Returns:
            Figures for the log.

        Raises:
            RunError: If the loss is not finite; the figures name step and cases.
        """
        self._set_rates(step)
        now = self.phase(step)
        if not now.generator and len(self.modules) == 1:
            return {}  # the judges' turn, and there are none
        figures: dict[str, float] = {}
        for turn in range(1, self.recipe.loss.critic_steps if now.generator and now.judges else 1):
            _, batch, masked = self._make(step, now, turn)
            figures |= self._step_global(step, turn, batch, masked)
        places, batch, masked = self._make(step, now)
        self._update_scale(masked.detach() - batch.target, batch.mask)
        if now.judges:
            figures |= self._step_judges(step, batch, masked.detach())
        if now.generator:
            figures |= self._step_generator(step, now, batch, masked, places)
        for name, value in figures.items():
            if not math.isfinite(value):
                names = sorted({self.cases[place.case].id for place in places})
                raise RunError(
                    f"{name} is not a finite number at step {step} (cases {', '.join(names)})",
                    reason="not-finite",
                    hint="Checkpoints are good. Lower the rate: chiasm train --set optimiser.generator_rate=1e-4.",
                )
        return figures

    def _make(self, step: int, now: attention.Phase, turn: int = 0) -> tuple[list[Place], Batch, Tensor]:
        """Draw a batch and make its images, zero outside the mask; with gradient where the generator plays.

        Turns but the first are the critic's own: other batches, no gradient.
        """
        places = self._draw(step, now, turn)
        batch = self._to_device(take_batch(self.cases, places, patch=self.plan.patch, slices=self.plan.slices))
        generator = self.modules["generator"].train()
        if self.recipe.generator.dropout or self.recipe.generator.network != OWN:
            # its draws are the step's, so that a resumed run draws the same
            torch.manual_seed(self._seed(step, 3, turn))
        with torch.set_grad_enabled(now.generator and turn == 0):
            prediction = generator(batch.source).float()  # shared by both players
        batch = crop_batch(batch, prediction.shape[2:])
        return places, batch, prediction * batch.mask

    def _step_judges(self, step: int, batch: Batch, fake: Tensor) -> dict[str, float]:
        """Train both discriminators to tell real from synthetic, and the confidence heads to foresee the error."""
        figures = self._step_global(step, 0, batch, fake)
        return figures | self._step_local(batch, fake) if "local_judge" in self.modules else figures

    def _step_global(self, step: int, turn: int, batch: Batch, fake: Tensor) -> dict[str, float]:
        """Train what judges whole images to tell real from synthetic."""
        loss_settings = self.recipe.loss
        every, more = loss_settings.penalty_every, loss_settings.critic_steps - 1
        taken = step + more * max(0, step - self.recipe.schedule.ends["judges"]) + turn  # one a step while alone
        figures: dict[str, float] = {}
        pairs = self._see(batch, batch.target), self._see(batch, fake)
        for name in ("global_judge", "second_judge"):
            if name not in self.modules:
                continue
            judge = self.modules[name]
            real, synthetic = (judge(pair).float() for pair in pairs)
            objective = loss_settings.adversarial
            if objective == "bce":
                loss = losses.adversarial_discriminator_loss(real, synthetic, smoothing=loss_settings.smoothing)
            else:
                loss = CRITIC_LOSS[objective](real, synthetic)
            if objective == "wgan-gp" and taken % every == 0:
                factor = torch.rand(len(real), generator=self._torch_rng(step, 1, turn)).to(real)
                penalty = losses.gradient_penalty(self._scores(name), *pairs, factor)
                loss = loss + every * loss_settings.penalty * penalty
            self._descend(name, loss)
            if objective == "wgan":
                self._clip(name)
            figures[f"{name}_loss"] = float(loss.detach())
            accuracy = float(((real > 0).float().mean() + (synthetic < 0).float().mean()) / 2)
            self.state["accuracy_global"] = RUNNING * self.state["accuracy_global"] + (1 - RUNNING) * accuracy
            figures["accuracy_global"] = self.state["accuracy_global"]
        return figures

    def _step_local(self, batch: Batch, fake: Tensor) -> dict[str, float]:
        judge, mask = self.modules["local_judge"].train(), batch.mask
        real = judge(self._see_locally(batch, batch.target))
        synthetic = judge(self._see_locally(batch, fake))
        realness, on_fake = real.realness.float(), synthetic.realness.float()
        error, scale = fake - batch.target, self.state["error_scale"]
        magnitude = losses.soft_target_magnitude(error, mask, scale, self.sigma_magnitude)
        structured = losses.soft_target_structured(error, mask, scale, self.sigma_structured)
        told_apart = losses.adversarial_discriminator_loss(realness, on_fake, smoothing=0.0, mask=mask)
        foreseen = losses.confidence_loss(synthetic.magnitude.float(), magnitude, mask)
        foreseen_structured = losses.confidence_loss(synthetic.structured.float(), structured, mask)
        self._descend("local_judge", told_apart + foreseen + foreseen_structured)
        hits = losses.masked_mean((realness > 0).float(), mask) + losses.masked_mean((on_fake < 0).float(), mask)
        self.state["accuracy"] = RUNNING * self.state["accuracy"] + (1 - RUNNING) * float(hits) / 2
        return {
            "local_judge_loss": float(told_apart.detach()),
            "magnitude_loss": float(foreseen.detach()),
            "structured_loss": float(foreseen_structured.detach()),
            "accuracy_local": self.state["accuracy"],
        }

    def _step_generator(
        self, step: int, now: attention.Phase, batch: Batch, masked: Tensor, places: Sequence[Place]
    ) -> dict[str, float]:
        """Train the generator against the target, against both judges, and hardest where M is low."""
        settings = self.recipe.loss
        figures: dict[str, float] = {}
        with self._frozen_judges():
            adversarial = torch.zeros((), device=masked.device)
            weights = {"global_judge": settings.global_weight, "second_judge": settings.local_weight}
            if now.adversarial > 0:
                for name, factor in weights.items():
                    if name in self.modules:
                        with self.fabric.autocast():
                            logits = self.bare(name)(self._see(batch, masked)).float()
                        adversarial = adversarial + factor * GENERATOR_LOSS[settings.adversarial](logits)
            weight, doubted = torch.ones_like(masked), None
            if "local_judge" in self.modules and (now.adversarial > 0 or now.attention > 0):
                with self.fabric.autocast():
                    logits = self.bare("local_judge")(self._see_locally(batch, masked))
                doubted = logits.structured.detach()
                self._note_lesions(places, batch, logits)
                if settings.local_weight > 0 and not self.recipe.discriminators.second_global:
                    term = losses.adversarial_generator_loss(logits.realness.float(), mask=batch.mask)
                    adversarial = adversarial + settings.local_weight * term
                weight = self._attention_weight(step, now, batch, logits, places, figures)
            weight = weight * self._control_weight(batch, masked)
            power = 1 if settings.norm == "l1" else 2
            reconstruction = losses.reconstruction_loss(masked, batch.target, batch.mask, weight, power)
            loss = reconstruction + now.adversarial * adversarial
            if settings.gradient_difference > 0:
                gdl = losses.gradient_difference_loss(masked, batch.target, batch.mask, self.plan.dims)
                loss = loss + settings.gradient_difference * gdl
            self._descend("generator", loss)
        self._move_average("generator", self.average, step)
        if doubted is not None and self.average_refiner is not None:
            figures |= self._step_refiner(step, batch, masked.detach(), doubted)
        return figures | {
            "loss": float(loss.detach()),
            "reconstruction": float(reconstruction.detach()),
            "adversarial": float(now.adversarial * adversarial.detach()),
        }

    def _step_refiner(self, step: int, batch: Batch, masked: Tensor, structured: Tensor) -> dict[str, float]:
        """Train the second stage against the target, on what the first one made and doubts, both without gradient."""
        assert self.average_refiner is not None
        refined = refine(self.modules["refiner"].train(), batch.source, masked, structured, batch.mask)
        power = 1 if self.recipe.loss.norm == "l1" else 2
        loss = losses.reconstruction_loss(refined, batch.target, batch.mask, p=power)
        self._descend("refiner", loss)
        self._move_average("refiner", self.average_refiner, step - self.recipe.schedule.ends["judges"])
        return {"refinement": float(loss.detach())}

    def _note_lesions(self, places: Sequence[Place], batch: Batch, logits: Any) -> None:
        """Follow how much each case's lesion is doubted, where transplants go by it.

        A patch with a transplant says nothing: its lesion is of two cases.
        """
        if self.recipe.training.transplant == "random":
            return
        head = self.recipe.attention.target
        confidence = torch.sigmoid(getattr(logits, "structured" if head == "none" else head).detach().float())
        known = dict(self.state["lesion_doubt"])
        for place, sample, sick in zip(places, confidence, batch.lesion & batch.mask):
            if place.donor is None and sick.any():
                name, doubt = self.cases[place.case].id, float(1 - sample[sick].mean())
                known[name] = RUNNING_LESION * known.get(name, doubt) + (1 - RUNNING_LESION) * doubt
        self.state["lesion_doubt"] = known

    def _difficulty(self) -> list[float] | None:
        """Say how hard each case's lesions are, unseen ones as the mean of the others; or None: all alike."""
        known = self.state["lesion_doubt"]
        if not known or self.recipe.training.transplant == "random":
            return None
        usual = float(np.mean(list(known.values())))
        return [max(known.get(case.id, usual), SMALLEST_DOUBT) for case in self.cases]

    def _attention_weight(
        self,
        step: int,
        now: attention.Phase,
        batch: Batch,
        logits: Any,
        places: Sequence[Place],
        figures: dict[str, float],
    ) -> Tensor:
        """Turn the confidence of the chosen head into weights, unless the health gate is closed."""
        settings = self.recipe.attention
        ones = torch.ones_like(batch.target)
        if settings.target == "none" or now.attention <= 0:
            return ones
        confidence = torch.sigmoid(getattr(logits, settings.target).float())
        inside = confidence.detach()[batch.mask]
        sd = float(inside.std()) if inside.numel() > 1 else 0.0
        self.state["confidence_sd"] = RUNNING * self.state["confidence_sd"] + (1 - RUNNING) * sd
        reason = self.gate_reason() if settings.gate else None
        self.state["attention_steps"] += 1
        self.state["closed_steps"] += reason is not None
        strength = 0.0 if reason else now.attention * settings.strength
        figures["attention_strength"] = strength
        if settings.use != "weight":
            self._remember(places, batch, confidence.detach())
        if strength == 0 or settings.use == "sample":
            return ones
        weight = attention.attention_weight(
            confidence,
            batch.mask,
            beta=settings.beta,
            norm=settings.norm,
            cap=settings.cap,
            strength=strength,
            detach=settings.detach,
        )
        if settings.shuffle:
            weight = attention.shuffle_weight(weight, batch.mask, self._torch_rng(step, 2))
        if batch.lesion.any():
            sick, healthy = batch.lesion & batch.mask, ~batch.lesion & batch.mask
            if healthy.any():
                figures["weight_ratio"] = float(weight[sick].mean().detach() / weight[healthy].mean().detach())
        return weight

    def _control_weight(self, batch: Batch, masked: Tensor) -> Tensor:
        """Weights of the controls: focal (C1), top-k (C2) and the lesion oracle (C3); ones otherwise."""
        settings, error = self.recipe.loss, (masked - batch.target).detach()
        weight = torch.ones_like(error)
        if settings.focal > 0:
            weight = weight * losses.focal_weight(error, batch.mask, settings.focal)
        if settings.top_k < 1:
            weight = weight * losses.top_k_weight(error, batch.mask, settings.top_k)
        if settings.lesion > 1:
            weight = weight * attention.lesion_weight(batch.lesion, settings.lesion, batch.mask)
        return weight

    def gate_reason(self) -> str | None:
        """Say why the attention is switched off now; None while it is healthy."""
        return attention.gate_reason(
            target=self.recipe.attention.target,
            realness_accuracy=self.state["accuracy"],
            confidence_sd=self.state["confidence_sd"],
            spearman=self.state["rho"],
        )

    def _draw(self, step: int, now: attention.Phase, turn: int = 0) -> list[Place]:
        settings = self.recipe.training
        count = max(1, settings.batch // self.fabric.world_size)
        rng = np.random.default_rng((settings.seed, step, self.fabric.global_rank, *([turn] if turn else [])))
        places = draw_places(
            self.cases,
            self.lesions,
            count=count,
            rng=rng,
            body_share=settings.body_share,
            lesion_share=settings.lesion_share,
            augment=settings.augment,
            intensity_jitter=settings.intensity_jitter,
            transplant_share=settings.transplant_share,
            difficulty=self._difficulty(),
        )
        pool = self.state["pool"]
        if self.recipe.attention.use == "weight" or now.attention <= 0 or len(pool) < POOL // 4 or self.gate_reason():
            return places
        doubt = np.array([entry[4] for entry in pool])
        chosen = rng.choice(len(pool), size=count // 2, p=doubt / doubt.sum())
        for slot, index in enumerate(chosen):  # half of the batch goes back to where M was low
            case, i, j, k, _ = pool[index]
            places[slot] = replace(places[slot], case=int(case), centre=(int(i), int(j), int(k)))
        return places

    def _remember(self, places: Sequence[Place], batch: Batch, confidence: Tensor) -> None:
        doubt = ((1 - confidence) * batch.mask).flatten(1).sum(1) / batch.mask.flatten(1).sum(1).clamp(min=1)
        fresh = [[place.case, *place.centre, max(float(d), SMALLEST_DOUBT)] for place, d in zip(places, doubt)]
        self.state["pool"] = [*self.state["pool"], *fresh][-POOL:]

    def _see(self, batch: Batch, image: Tensor) -> Tensor:
        return torch.cat([batch.source, image], dim=1)

    def _see_locally(self, batch: Batch, image: Tensor) -> Tensor:
        return self._see(batch, image) if self.recipe.discriminators.conditional else image

    def _scores(self, name: str) -> Callable[[Tensor], Tensor]:
        """Return a critic as one score a sample, for its gradient penalty."""
        critic = self.bare(name)
        return lambda pair: critic(pair).reshape(len(pair), -1).mean(1)

    @torch.no_grad()
    def _clip(self, name: str) -> None:
        """Keep a critic's weights small, so that its slope is bounded (Arjovsky et al., arXiv:1701.07875)."""
        most = self.recipe.loss.clip
        for weight in self.bare(name).parameters():
            weight.clamp_(-most, most)

    def _descend(self, name: str, loss: Tensor) -> None:
        optimiser = self.optimisers[name]
        optimiser.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        optimiser.step()

    @contextmanager
    def _frozen_judges(self) -> Iterator[None]:
        """Let gradients pass through the judges, not into them; their power iterations stand still.

        Batch normalisation goes on with the batch's own statistics, by which its
        judge tells real from synthetic: the running ones are a mixture of both.
        """
        judges = [module for name, module in self.modules.items() if name in JUDGES]
        for judge in judges:
            judge.eval().requires_grad_(False)
            for part in judge.modules():
                if isinstance(part, nn.BatchNorm2d | nn.BatchNorm3d):
                    part.train()
        try:
            yield
        finally:
            for judge in judges:
                judge.train().requires_grad_(True)

    def _set_rates(self, step: int) -> None:
        """Cosine decay to a hundredth, from the step alone."""
        share = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / self.recipe.schedule.steps))
        rates = self.recipe.optimiser
        for name, optimiser in self.optimisers.items():
            rate = rates.discriminator_rate if name in JUDGES else rates.generator_rate
            for group in optimiser.param_groups:
                group["lr"] = rate * share

    @torch.no_grad()
    def _move_average(self, name: str, average: nn.Module, age: int) -> None:
        """Follow a player's weights slowly; faster in its first steps, when there is little to average."""
        keep = min(self.recipe.optimiser.average, (1 + age) / (10 + age))
        current = self.bare(name).state_dict()
        for key, value in average.state_dict().items():
            if value.dtype.is_floating_point:
                value.lerp_(current[key].to(value), 1 - keep)
            else:
                value.copy_(current[key])

    def _update_scale(self, error: Tensor, mask: Tensor) -> None:
        self.state["error_scale"] = attention.update_error_scale(self.state["error_scale"], error, mask, RUNNING)

    def _to_device(self, batch: Batch) -> Batch:
        memory = torch.channels_last if self.plan.dims == 2 else torch.channels_last_3d
        source = batch.source.to(self.fabric.device, memory_format=memory)
        return Batch(source, *(part.to(self.fabric.device) for part in batch[1:]))

    def _torch_rng(self, step: int, purpose: int, turn: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(step, purpose, turn))

    def _seed(self, step: int, purpose: int, turn: int) -> int:
        """Number the draws of a run: above the 55 bits that seed, step and purpose can fill stands the turn."""
        return (self.recipe.training.seed * 1_000_003 + step) * 4 + purpose + (turn << 56)

    def maps(self, case: PreparedCase, engine: Engine) -> Maps:
        """Predict a prepared case as the run would ship it: averaged weights, the local discriminator, the refiner."""
        return self._maps(case, engine, self.average_refiner)

    def first_maps(self, case: PreparedCase, engine: Engine) -> Maps:
        """Predict a prepared case without the refiner: what the attention, and its health, are about."""
        return self._maps(case, engine, None)

    def _maps(self, case: PreparedCase, engine: Engine, refiner: nn.Module | None) -> Maps:
        local = self.bare("local_judge").eval() if "local_judge" in self.modules else None
        found = synthesise_prepared(
            self.average,
            local,
            np.asarray(case.source),
            np.asarray(case.mask),
            plan=self.plan,
            conditional=self.recipe.discriminators.conditional,
            error_scale=self.state["error_scale"],
            engine=engine,
            refiner=refiner,
        )
        if local is not None:
            local.train()
        return found

    def model(self) -> Model:
        """Return what the run would ship now."""
        local = self.bare("local_judge") if "local_judge" in self.modules else None
        return Model(
            self.recipe, self.plan, self.average, local, self.state["error_scale"], refiner=self.average_refiner
        )
