"""Compute the gradient of a loss on preference pairs.

The random choices for a pair come from a random stream of its own. Neither the micro-batch size nor the number of
processes changes the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign import lora
from diffalign.algorithms import preference
from diffalign.algorithms.inversion_dpo import trajectory_loss, trajectory_weight
from diffalign.algorithms.preference import PairErrors
from diffalign.config import InversionDPOConfig, PreferenceAlgorithmConfig
from diffalign.core.precision import attention
from diffalign.core.seeds import stream
from diffalign.diffusion.paths import chord_target, training_timesteps
from diffalign.pipelines.base import TextToImageModel
from diffalign.training.denoise import predict
from diffalign.training.sums import Sums
from diffalign.types import PreferenceBatch

METRICS = (
    "loss",
    "error_winner",
    "error_loser",
    "error_winner_reference",
    "error_loser_reference",
    "margin",
    "accuracy",
    "safeguard",
)


@dataclass(frozen=True)
class Question:
    """Denoising batch for the I images of B pairs, at T timesteps each.

    I is 2, or 1 for losses on the winner alone.

    Attributes:
        noisy: noisy latents (B, I, T, C, H, W).
        target: targets (B, I, T, C, H, W) of the prediction.
        timesteps: timesteps (B, T), the same for both images.
        reference_error: mean squared errors (B, I, T) of the reference, None if they are not cached.
    """

    noisy: Tensor
    target: Tensor
    timesteps: Tensor
    reference_error: Tensor | None = None


class PreferenceUpdate:
    """Accumulator of the gradient over this process's pairs. The caller owns the optimizer."""

    def __init__(
        self,
        model: TextToImageModel,
        config: PreferenceAlgorithmConfig,
        *,
        grid: Tensor,
        micro_batch_size: int,
        mixed_precision: str,
        seed: int,
        guidance_scale: float | None = None,
    ) -> None:
        self.model, self.config, self.grid = model, config, grid
        self.micro_batch_size, self.mixed_precision = micro_batch_size, mixed_precision
        self.seed = seed
        self.guidance_scale = guidance_scale if model.guidance_is_embedded else None
        self.on_states = isinstance(config, InversionDPOConfig)
        self.variant = config.variant if isinstance(config, InversionDPOConfig) else "chord"
        self.images = 1 if config.loss_type == "sft" else 2

    def rows(self, pairs: int) -> dict[bool, set[int]]:
        """Return the batch sizes of the denoiser's forwards for a micro-batch of `pairs`.

        The keys say whether a forward has a gradient.
        """
        n = pairs * self.images * self.config.timesteps_per_pair
        return {True: {n}, False: {n}}

    def accumulate(
        self,
        batch: PreferenceBatch,
        *,
        total: int,
        key: tuple[int, ...],
        baseline: Tensor | None = None,
    ) -> Sums:
        """Add the gradient of a batch to `.grad`, and return its sums of metrics.

        Args:
            total: number of pairs of the whole update; the loss is a mean over them.
            key: what random streams depend on besides the pair: a purpose of `seeds.py` and the update.
            baseline: baseline of KTO, see `gain`.
        """
        sums = Sums(METRICS, batch.latents.device)
        for part in self._parts(batch):
            question = self.ask(part, key)
            loss = self.loss(part, question, sums, baseline)
            with attention(part.latents.device):
                (loss.sum() / total).backward()
        return sums

    @torch.no_grad()
    def measure(self, batch: PreferenceBatch, *, key: tuple[int, ...]) -> Sums:
        """Return the sums of a batch's metrics, without a gradient. KTO's baseline is 0."""
        sums = Sums(METRICS, batch.latents.device)
        for part in self._parts(batch):
            self.loss(part, self.ask(part, key), sums, torch.zeros((), device=part.latents.device))
        return sums

    @torch.no_grad()
    def gain(self, batch: PreferenceBatch, *, key: tuple[int, ...]) -> Tensor:
        """Return sum and count (2,) of -Delta over all images, whose mean is KTO's baseline.

        Delta is the policy's error less the reference's. The method costs a forward of its own, so that the baseline
        is that of the whole update for any micro-batch size.
        """
        totals = torch.zeros(2, device=batch.latents.device)
        for part in self._parts(batch):
            question = self.ask(part, key)
            errors = self._errors(part, question)[0]
            gain = self._reference_errors(part, question) - errors
            totals += torch.stack([gain.sum(), torch.full_like(gain.sum(), gain.numel())])
        return totals

    def _parts(self, batch: PreferenceBatch) -> Sequence[PreferenceBatch]:
        size = self.micro_batch_size
        return [batch[i : i + size] for i in range(0, len(batch.pair), size)]

    def ask(self, batch: PreferenceBatch, key: tuple[int, ...]) -> Question:
        """Build the denoising batch of a micro-batch of pairs.

        Args:
            key: what random streams depend on besides the pair, see `accumulate`.
        """
        generators = [
            torch.Generator().manual_seed(stream(*key, self.seed, pair)) for pair in batch.pair
        ]
        return (
            self._inverted(batch, generators) if self.on_states else self._noised(batch, generators)
        )

    def _noised(self, batch: PreferenceBatch, generators: list[torch.Generator]) -> Question:
        """Add fresh noise, the same for both images of a pair, at the same timesteps."""
        path, count = self.model.noise, self.config.timesteps_per_pair
        shape = batch.latents.shape[2:]
        device = batch.latents.device
        times = torch.stack([training_timesteps(path, count, generator=g) for g in generators])
        noise = torch.stack([torch.randn(count, *shape, generator=g) for g in generators])
        times, noise = times.to(device), noise.to(device)
        latents = batch.latents[:, : self.images, None].expand(-1, -1, count, *shape)
        noise = noise[:, None].expand_as(latents)
        flat_times = times[:, None].expand(*latents.shape[:3]).flatten()
        flat = latents.flatten(0, 2), noise.flatten(0, 2), flat_times
        return Question(
            path.add_noise(*flat).view(latents.shape),
            path.target(*flat).view(latents.shape),
            times,
        )

    def _inverted(self, batch: PreferenceBatch, generators: list[torch.Generator]) -> Question:
        """Pick some of the states that the reference's inversion passed through.

        The target is that of the noise which a state and its clean latents imply.
        """
        assert batch.states is not None
        assert batch.grid_index is not None
        assert batch.reference_error is not None
        path, count = self.model.noise, self.config.timesteps_per_pair
        num_states = batch.states.shape[2]
        picks = torch.stack([torch.randperm(num_states, generator=g)[:count] for g in generators])
        picks = picks.to(batch.latents.device)
        rows = torch.arange(len(picks), device=picks.device)[:, None]
        index = batch.grid_index[rows, picks]
        noisy = torch.stack([batch.states[:, i][rows, picks] for i in range(self.images)], 1)
        reference_error = torch.stack(
            [batch.reference_error[:, i][rows, picks] for i in range(self.images)], 1
        )
        times = self.grid.to(index.device)[index]
        latents = batch.latents[:, : self.images, None].expand_as(noisy).flatten(0, 2)
        flat_times = times[:, None].expand(*noisy.shape[:3]).flatten()
        target = chord_target(path, latents, noisy.flatten(0, 2), flat_times).view(noisy.shape)
        # Inversion-DPO's released code evaluates the earlier latents at the later timestep.
        if self.variant == "released":
            times = self.grid.to(index.device)[(index + 1).clamp(max=len(self.grid) - 1)]
        return Question(noisy, target, times, reference_error)

    def predict(self, batch: PreferenceBatch, question: Question) -> Tensor:
        """Return the active policy's predictions (B, I, T, C, H, W), float32."""
        shape = question.noisy.shape
        pairs, images, count = shape[:3]
        rows = torch.arange(pairs).repeat_interleave(images * count)
        embeds = batch.embeds[rows.to(batch.latents.device)]
        if batch.time_ids is not None:
            ids = batch.time_ids[:, :images, None].expand(-1, -1, count, -1).flatten(0, 2)
            embeds = replace(embeds, time_ids=ids)
        times = question.timesteps[:, None].expand(pairs, images, count).flatten()
        model_pred = predict(
            self.model,
            question.noisy.flatten(0, 2),
            times,
            embeds,
            mixed_precision=self.mixed_precision,
            guidance_scale=self.guidance_scale,
        )
        return model_pred.float().view(shape)

    def _errors(self, batch: PreferenceBatch, question: Question) -> tuple[Tensor, Tensor]:
        """Return the mean squared errors (B, I, T) of the active policy, and its predictions."""
        model_pred = self.predict(batch, question)
        return (model_pred - question.target).square().flatten(3).mean(3), model_pred

    @torch.no_grad()
    def _reference_errors(self, batch: PreferenceBatch, question: Question) -> Tensor:
        if question.reference_error is not None:
            return question.reference_error
        with lora.policy(self.model.denoiser, lora.REFERENCE):
            return self._errors(batch, question)[0]

    def loss(
        self,
        batch: PreferenceBatch,
        question: Question,
        sums: Sums,
        baseline: Tensor | None = None,
    ) -> Tensor:
        """Return the losses (B,) times the pairs' weights, and add their metrics to `sums`."""
        if self.variant != "chord":
            return self._trajectory_loss(batch, question, sums)
        c = self.config
        errors, model_pred = self._errors(batch, question)
        if c.loss_type == "sft":
            sums.add("error_winner", errors.detach().flatten())
            return self._weighted(errors[:, 0], batch, sums)
        winner, loser = errors[:, 0].flatten(), errors[:, 1].flatten()
        if c.loss_type == "mapo":
            sums.add("error_winner", winner.detach())
            sums.add("error_loser", loser.detach())
            losses = preference.mapo_loss(winner, loser, beta=c.beta)
            return self._weighted(losses.view(len(batch.pair), -1), batch, sums)
        reference = self._reference_errors(batch, question)
        reference_errors = reference[:, 0].flatten(), reference[:, 1].flatten()
        pair = PairErrors(winner, loser, *reference_errors)
        for name, values in pair.metrics(c.beta).items():
            sums.add(name, values)
        labels = batch.preference[:, None].expand(-1, errors.shape[2]).flatten()
        if c.loss_type == "kto":
            assert baseline is not None
            losses = self._kto(pair, labels, baseline.clamp_min(0))
        else:
            losses = preference.pair_loss(
                self._guarded(pair, question, model_pred, sums),
                labels,
                beta=c.beta,
                loss_type=c.loss_type,
            )
        return self._weighted(losses.view(len(batch.pair), -1), batch, sums)

    def _guarded(
        self, pair: PairErrors, question: Question, model_pred: Tensor, sums: Sums
    ) -> PairErrors:
        if self.config.safeguard is None:
            return pair
        preds, targets = model_pred.detach(), question.target
        factor = preference.safeguard(
            preds[:, 0].flatten(0, 1),
            targets[:, 0].flatten(0, 1),
            preds[:, 1].flatten(0, 1),
            targets[:, 1].flatten(0, 1),
            mu=self.config.safeguard,
        )
        sums.add("safeguard", factor)
        loser = preference.scale_gradient(pair.loser, factor)
        return PairErrors(pair.winner, loser, pair.reference_winner, pair.reference_loser)

    def _kto(self, pair: PairErrors, labels: Tensor, baseline: Tensor) -> Tensor:
        """Return KTO's loss, which judges each image on its own.

        A soft label counts each image as preferred and as not preferred, in its shares.
        """
        sides = (
            (pair.winner, pair.reference_winner, labels),
            (pair.loser, pair.reference_loser, 1 - labels),
        )
        losses = torch.zeros_like(labels)
        for error, reference, share in sides:
            for preferred, weight in ((True, share), (False, 1 - share)):
                sign = torch.full_like(share, preferred, dtype=torch.bool)
                losses = losses + weight / 2 * preference.kto_loss(
                    error, reference, sign, beta=self.config.beta, baseline=baseline
                )
        return losses

    def _trajectory_loss(self, batch: PreferenceBatch, question: Question, sums: Sums) -> Tensor:
        model_pred = self.predict(batch, question)
        with torch.no_grad(), lora.policy(self.model.denoiser, lora.REFERENCE):
            reference = self.predict(batch, question)
        distance = (model_pred - reference).square().flatten(3).mean(3)
        weight = trajectory_weight(self.model.noise, question.timesteps.flatten())
        distance = (distance * weight.view(question.timesteps.shape)[:, None]).mean(2)
        losses = trajectory_loss(
            distance[:, 0], distance[:, 1], beta=self.config.beta, variant=self.variant
        )
        # the metrics of the other losses, so that runs can be compared
        with torch.no_grad():
            errors = (model_pred - question.target).square().flatten(3).mean(3)
            reference_errors = (reference - question.target).square().flatten(3).mean(3)
            pair = PairErrors(
                *(e[:, i].flatten() for e in (errors, reference_errors) for i in range(2))
            )
            for name, values in pair.metrics(self.config.beta).items():
                sums.add(name, values)
        return self._weighted(losses[:, None], batch, sums)

    @staticmethod
    def _weighted(losses: Tensor, batch: PreferenceBatch, sums: Sums) -> Tensor:
        """Return losses (B, T) as means over T times the pairs' weights, (B,)."""
        weighted = losses.mean(1) * batch.weight
        sums.add("loss", weighted.detach())
        return weighted
