"""Train on preference pairs.

A cache of latents and embeddings is filled once. The updates then need the denoiser alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from diffalign import lora
from diffalign.algorithms.preference import automatic_beta
from diffalign.config import PreferenceRunConfig
from diffalign.core.seeds import TIMESTEPS, VALIDATION
from diffalign.data.pairs.cache import PairCache
from diffalign.data.pairs.tables import PairsError
from diffalign.methods.preference.precompute import grid_of, precompute
from diffalign.methods.preference.update import PreferenceUpdate
from diffalign.pipelines.compiled import CompiledSizes
from diffalign.training.order import EpochOrder
from diffalign.training.plan import check_share
from diffalign.training.trainer import Trainer

VALIDATION_PAIRS = 256
GAIN_DECAY = 0.9
"""Decay of the running mean of the margins, which an automatic beta follows."""


@dataclass
class PreferenceTrainer(Trainer):
    """Trainer of runs on the preference pairs of `config.pairs`."""

    config: PreferenceRunConfig
    unit: ClassVar[str] = "pair"
    keeps_best: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        c = self.config
        check_share(
            c.training.pairs_per_update,
            self.accelerator.num_processes,
            setting="training.pairs_per_update",
            unit="pairs",
        )
        self.update = PreferenceUpdate(
            self.model,
            c.algorithm,
            grid=grid_of(c, self.model),
            micro_batch_size=c.training.micro_batch_size,
            mixed_precision=c.training.mixed_precision,
            seed=c.training.seed,
            guidance_scale=c.pairs.inversion.guidance_scale,
        )

    def prepare(self) -> None:
        self.cache: PairCache = precompute(self.config, self.model, self.accelerator)
        self.pairs, self.kept = self.cache.split(self.config.pairs.validation)
        if not self.pairs:
            raise PairsError(
                f"pairs.validation={self.config.pairs.validation}: every prompt is kept for validation. Use a smaller "
                "share or more pairs"
            )
        c = self.config.training
        self.order = EpochOrder(self.pairs, size=c.pairs_per_update, seed=c.seed)

    def full_batches(self) -> CompiledSizes:
        c, world = self.config, self.accelerator.num_processes
        share = -(-c.training.pairs_per_update // world)
        trained = self.update.sizes(min(c.training.micro_batch_size, share))
        sampled = self.model.forward_rows(c.images.micro_batch_size, c.evaluation.guidance_scale)
        inverted = self.model.forward_rows(
            c.pairs.micro_batch_size, c.pairs.inversion.guidance_scale
        )
        return trained | CompiledSizes(without={sampled, inverted} if c.states else {sampled})

    def learn(self, number: int) -> tuple[int, dict[str, Any]]:
        """Train one optimizer step on `pairs_per_update` pairs."""
        pairs = self.order(number)
        own = self.share(len(pairs))
        key = (TIMESTEPS, number)
        batch = self.cache.batch(pairs[own.start : own.stop], self.accelerator.device)
        baseline = None
        if self.config.algorithm.loss_type == "kto":
            gain, count = self.accelerator.reduce(self.update.gain(batch, key=key), "sum")
            baseline = gain / count
        self.optimizer.zero_grad()
        self.update.beta = self.beta
        sums = self.update.accumulate(batch, total=len(pairs), key=key, baseline=baseline)
        row = self.descend(number, sums)
        if self.config.algorithm.gradient_factor is not None:
            row["beta"] = self.update.beta
            gain = row["margin"] / self.update.beta
            self.progress.gain = GAIN_DECAY * self.progress.gain + (1 - GAIN_DECAY) * gain
        return len(pairs), row

    @property
    def beta(self) -> float:
        """Strength of the preference in the next update."""
        c, done = self.config.algorithm, self.progress.update
        if c.gradient_factor is None or done == 0:
            return c.beta
        # a running mean that began at 0 is corrected for it
        gain = self.progress.gain / (1 - GAIN_DECAY**done)
        return automatic_beta(gain, most=c.beta, target=c.gradient_factor)

    def headline(self, row: dict[str, Any]) -> dict[str, str]:
        return {
            "loss": f"{row['loss']:.4f}",
            "accuracy": f"{row.get('accuracy', 0):.3f}",
            "pairs_per_s": f"{row['pairs_per_second']:.1f}",
        }

    def validate(self) -> dict[str, float]:
        """Return the evaluated policy's metrics on pairs whose prompts are not trained on.

        Noise and timesteps are the same at every call.
        """
        pairs = self.kept[:VALIDATION_PAIRS]
        if not pairs:
            return {}
        with lora.policy(self.model.denoiser, self.policy):
            batch = self.cache.batch(pairs, self.accelerator.device)
            metrics = self.update.measure(batch, key=(VALIDATION,)).means()
        return {f"validation/{name}": value for name, value in metrics.items()}

    def facts(self) -> dict[str, Any]:
        c = self.config
        manifest = self.cache.manifest
        return {
            "pairs": len(self.pairs),
            "validation_pairs": len(self.kept),
            "skipped_pairs": manifest["skipped"],
            "precompute_seconds": manifest["seconds"],
            "round_trip_error": manifest["round_trip_error"],
            "beta_per_element": c.algorithm.beta / math.prod(self.model.latent_shape(self.size)),
            "states": c.states,
        }
