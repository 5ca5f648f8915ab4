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
from diffalign.config import PreferenceAlgorithmConfig
from diffalign.core.seeds import stream
from diffalign.diffusion.paths import chord_target, training_timesteps
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.compiled import CompiledSizes
from diffalign.training.denoise import predict
from diffalign.training.sums import Sums, accumulate, micro_batches
from diffalign.types import DenoisingBatch, PreferenceBatch, PromptEmbeds

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
class PairStates:
    """States of the I images of B pairs, at T timesteps each.

    I is 2, or 1 for losses on the winner alone. Both images of a pair have the same timesteps.

    Attributes:
        batch: denoising batch (B * I * T rows).
        shape: (B, I, T).
        reference_error: mean squared errors (B, I, T) of the reference, None if they are not cached.
        mask: weights (B, 1, 1, 1, H, W) of the latents' places, None for all alike.
    """

    batch: DenoisingBatch
    shape: tuple[int, int, int]
    reference_error: Tensor | None = None
    mask: Tensor | None = None

    def by_image(self, rows: Tensor) -> Tensor:
        """Return rows (B * I * T, ...) as (B, I, T, ...)."""
        return rows.view(*self.shape, *rows.shape[1:])


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
        self.seed, self.beta = seed, config.beta
        self.guidance_scale = guidance_scale if model.guidance_is_embedded else None
        self.on_states, self.form = config.on_states, config.form
        self.images = 1 if config.loss_type == "sft" else 2

    def sizes(self, pairs: int) -> CompiledSizes:
        """Return the batch sizes of the denoiser's forwards for a micro-batch of `pairs`."""
        n = pairs * self.images * self.config.timesteps_per_pair
        return CompiledSizes({n}, {n})

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

        def share_of_loss(rows: range) -> Tensor:
            part = batch[rows.start : rows.stop]
            return self.loss(part, self.states(part, key), sums, baseline).sum() / total

        rows = micro_batches(len(batch.pair), self.micro_batch_size)
        accumulate(rows, share_of_loss, batch.latents.device)
        return sums

    @torch.no_grad()
    def measure(self, batch: PreferenceBatch, *, key: tuple[int, ...]) -> Sums:
        """Return the sums of a batch's metrics, without a gradient. KTO's baseline is 0."""
        sums = Sums(METRICS, batch.latents.device)
        for part in self._parts(batch):
            self.loss(
                part, self.states(part, key), sums, torch.zeros((), device=part.latents.device)
            )
        return sums

    @torch.no_grad()
    def gain(self, batch: PreferenceBatch, *, key: tuple[int, ...]) -> Tensor:
        """Return sum and count (2,) of -Delta over all images, whose mean is KTO's baseline.

        Delta is the policy's error less the reference's. The method costs a forward of its own, so that the baseline
        is that of the whole update for any micro-batch size.
        """
        totals = torch.zeros(2, device=batch.latents.device)
        for part in self._parts(batch):
            states = self.states(part, key)
            gain = self._reference_errors(states) - self._errors(states)[0]
            totals += torch.stack([gain.sum(), torch.full_like(gain.sum(), gain.numel())])
        return totals

    def _parts(self, batch: PreferenceBatch) -> Sequence[PreferenceBatch]:
        parts = micro_batches(len(batch.pair), self.micro_batch_size)
        return [batch[rows.start : rows.stop] for rows in parts]

    def states(self, batch: PreferenceBatch, key: tuple[int, ...]) -> PairStates:
        """Return the states of a micro-batch of pairs.

        Args:
            key: what random streams depend on besides the pair, see `accumulate`.
        """
        generators = [
            torch.Generator().manual_seed(stream(*key, self.seed, pair)) for pair in batch.pair
        ]
        return (
            self._inverted(batch, generators) if self.on_states else self._noised(batch, generators)
        )

    def _noised(self, batch: PreferenceBatch, generators: list[torch.Generator]) -> PairStates:
        """Add fresh noise, the same for both images of a pair, at the same timesteps."""
        path, count = self.model.noise, self.config.timesteps_per_pair
        latent = batch.latents.shape[2:]
        device = batch.latents.device
        times = torch.stack([training_timesteps(path, count, generator=g) for g in generators])
        noise = torch.stack([torch.randn(count, *latent, generator=g) for g in generators])
        times, noise = times.to(device), noise.to(device)
        latents = batch.latents[:, : self.images, None].expand(-1, -1, count, *latent)
        noise = noise[:, None].expand_as(latents)
        shape = (len(times), self.images, count)
        times = times[:, None].expand(shape).flatten()
        rows = latents.flatten(0, 2), noise.flatten(0, 2), times
        noisy, target = path.add_noise(*rows), path.target(*rows)
        embeds = self._embeds(batch, shape)
        mask = None if batch.mask is None else batch.mask[:, None, None]
        return PairStates(DenoisingBatch(noisy, times, target, embeds), shape, mask=mask)

    def _inverted(self, batch: PreferenceBatch, generators: list[torch.Generator]) -> PairStates:
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
        shape = (len(picks), self.images, count)
        grid = self.grid.to(index.device)
        latents = batch.latents[:, : self.images, None].expand_as(noisy).flatten(0, 2)
        noisy = noisy.flatten(0, 2)
        times = grid[index][:, None].expand(shape).flatten()
        target = chord_target(path, latents, noisy, times)
        # Inversion-DPO's released code evaluates the earlier latents at the later timestep.
        if self.form == "released":
            later = grid[(index + 1).clamp(max=len(self.grid) - 1)]
            times = later[:, None].expand(shape).flatten()
        embeds = self._embeds(batch, shape)
        return PairStates(DenoisingBatch(noisy, times, target, embeds), shape, reference_error)

    @staticmethod
    def _embeds(batch: PreferenceBatch, shape: tuple[int, int, int]) -> PromptEmbeds:
        """Return the embeddings of the prompts for each state (B * I * T rows)."""
        pairs, images, count = shape
        rows = torch.arange(pairs).repeat_interleave(images * count)
        embeds = batch.embeds[rows.to(batch.latents.device)]
        if batch.time_ids is None:
            return embeds
        ids = batch.time_ids[:, :images, None].expand(-1, -1, count, -1).flatten(0, 2)
        return replace(embeds, time_ids=ids)

    def predict(self, states: PairStates) -> Tensor:
        """Return the active policy's predictions (B, I, T, C, H, W), float32."""
        batch = states.batch
        model_pred = predict(
            self.model,
            batch.noisy,
            batch.timesteps,
            batch.embeds,
            mixed_precision=self.mixed_precision,
            guidance_scale=self.guidance_scale,
        )
        return states.by_image(model_pred.float())

    def _errors(self, states: PairStates) -> tuple[Tensor, Tensor]:
        """Return the mean squared errors (B, I, T) of the active policy, and its predictions."""
        model_pred = self.predict(states)
        return _error(model_pred, states), model_pred

    @torch.no_grad()
    def _reference_errors(self, states: PairStates) -> Tensor:
        if states.reference_error is not None:
            return states.reference_error
        with lora.policy(self.model.denoiser, lora.REFERENCE):
            return self._errors(states)[0]

    def loss(
        self,
        batch: PreferenceBatch,
        states: PairStates,
        sums: Sums,
        baseline: Tensor | None = None,
    ) -> Tensor:
        """Return the losses (B,) times the pairs' weights, and add their metrics to `sums`."""
        if self.form != "chord":
            return self._trajectory_loss(batch, states, sums)
        c = self.config
        errors, model_pred = self._errors(states)
        if c.loss_type == "sft":
            sums.add("error_winner", errors.detach().flatten())
            return self._weighted(errors[:, 0], batch, sums)
        winner, loser = errors[:, 0].flatten(), errors[:, 1].flatten()
        if c.loss_type == "mapo":
            sums.add("error_winner", winner.detach())
            sums.add("error_loser", loser.detach())
            losses = preference.mapo_loss(winner, loser, beta=self.beta)
            return self._weighted(losses.view(len(batch.pair), -1), batch, sums)
        reference = self._reference_errors(states)
        reference_errors = reference[:, 0].flatten(), reference[:, 1].flatten()
        pair = PairErrors(winner, loser, *reference_errors)
        for name, values in pair.metrics(self.beta).items():
            sums.add(name, values)
        labels = batch.preference[:, None].expand(-1, errors.shape[2]).flatten()
        if c.loss_type == "kto":
            assert baseline is not None
            losses = self._kto(pair, labels, baseline.clamp_min(0))
        else:
            losses = preference.pair_loss(
                self._guarded(pair, states, model_pred, sums),
                labels,
                beta=self.beta,
                loss_type=c.loss_type,
            )
        return self._weighted(losses.view(len(batch.pair), -1), batch, sums)

    def _guarded(
        self, pair: PairErrors, states: PairStates, model_pred: Tensor, sums: Sums
    ) -> PairErrors:
        if self.config.safeguard is None:
            return pair
        preds, targets = model_pred.detach(), states.by_image(states.batch.target)
        if states.mask is not None:
            preds = targets + states.mask * (preds - targets)
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
                    error, reference, sign, beta=self.beta, baseline=baseline
                )
        return losses

    def _trajectory_loss(self, batch: PreferenceBatch, states: PairStates, sums: Sums) -> Tensor:
        model_pred = self.predict(states)
        with torch.no_grad(), lora.policy(self.model.denoiser, lora.REFERENCE):
            reference = self.predict(states)
        distance = (model_pred - reference).square().flatten(3).mean(3)
        weight = trajectory_weight(self.model.noise, states.batch.timesteps)
        distance = (distance * states.by_image(weight)).mean(2)
        losses = trajectory_loss(distance[:, 0], distance[:, 1], beta=self.beta, variant=self.form)
        # the metrics of the other losses, so that runs can be compared
        with torch.no_grad():
            errors = _error(model_pred, states), _error(reference, states)
            pair = PairErrors(*(e[:, i].flatten() for e in errors for i in range(2)))
            for name, values in pair.metrics(self.beta).items():
                sums.add(name, values)
        return self._weighted(losses[:, None], batch, sums)

    @staticmethod
    def _weighted(losses: Tensor, batch: PreferenceBatch, sums: Sums) -> Tensor:
        """Return losses (B, T) as means over T times the pairs' weights, (B,)."""
        weighted = losses.mean(1) * batch.weight
        sums.add("loss", weighted.detach())
        return weighted


def _error(model_pred: Tensor, states: PairStates) -> Tensor:
    """Return the mean squared errors (B, I, T) of the predictions."""
    target = states.by_image(states.batch.target)
    return preference.masked_error(model_pred, target, states.mask)
