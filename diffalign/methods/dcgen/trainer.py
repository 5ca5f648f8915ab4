"""Train a model in another latent space (DC-Gen).

The trainer fills a cache of latents, aligns the embedder and the last layer in closed form, and then trains a LoRA. A
LoRA whose rank reaches the number of latent channels can represent any change of the embedder's and the last layer's
matrices. These two layers are therefore LoRA targets like any other, and a run has one kind of parameter.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign import lora
from diffalign.config import LatentRunConfig
from diffalign.core.errors import UsageError
from diffalign.core.files import folder_aside, write_text
from diffalign.core.seeds import IMAGES, VALIDATION, stream
from diffalign.data.images import ImageFolderError
from diffalign.data.latent_cache import LatentCache
from diffalign.diffusion.paths import RectifiedFlow, logit_normal_sigmas
from diffalign.latents.move import layer, load_ends, matrix, save_ends
from diffalign.latents.shift import moved_scheduler
from diffalign.methods.dcgen.alignment import Alignment
from diffalign.methods.dcgen.maker import new_autoencoder, precompute_latents, source_of
from diffalign.methods.dcgen.task import DenoisingTask
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.cards import DrawingCard
from diffalign.pipelines.compiled import CompiledSizes
from diffalign.pipelines.moving import load_autoencoder, move_model, tokens_ratio
from diffalign.pipelines.saving import save_pipeline
from diffalign.training.denoise import image_size
from diffalign.training.order import EpochOrder
from diffalign.training.plan import check_share
from diffalign.training.run_folder import ALIGNED, ALIGNMENT_FACTS
from diffalign.training.sums import Sums, accumulate, micro_batches
from diffalign.training.trainer import Trainer

METRICS = ["loss", "relative_error"]
VALIDATION_IMAGES = 256
SIGMAS = 4096
"""Number of noise levels that are sampled for the noise-aware fit of the embedder."""


@dataclass
class LatentTrainer(Trainer):
    """Trainer of DC-Gen runs. The reference policy is the base model in its own latent space."""

    config: LatentRunConfig

    @classmethod
    def trained_model(cls, config: LatentRunConfig, model: TextToImageModel) -> TextToImageModel:
        c = config.latents
        if c.autoencoder is None:
            return model
        dtype = getattr(torch, config.model.dtype)
        vae = load_autoencoder(c.autoencoder, dtype=dtype, meta=True)
        return move_model(model, vae, size=image_size(config, model), channels=c.channels)

    def __post_init__(self) -> None:
        c = self.config
        self.base = self.model
        if not isinstance(self.base.noise, RectifiedFlow):
            raise UsageError(
                f"model.name={c.model.name}: a {self.base.family} model is no rectified flow. DC-Gen trains SD3, FLUX "
                "and SANA models"
            )
        check_share(
            c.training.images_per_update,
            self.accelerator.num_processes,
            setting="training.images_per_update",
        )
        size = image_size(c, self.base)
        # called for its errors: they should come before the base model is scored
        source_of(c, size)
        vae = new_autoencoder(c, self.accelerator.device)
        if vae is not None:
            self.model = move_model(
                self.base, vae, size=size, shift=c.latents.shift, channels=c.latents.channels
            )
        self.codec = self.model.codec
        super().__post_init__()
        self.alignment: dict[str, Any] = {}

    @property
    def moves(self) -> bool:
        """True if the run moves the model into another latent space.

        False if the model is in that space already, so that the run only trains a LoRA.
        """
        return self.model is not self.base

    def prepare(self) -> None:
        c = self.config
        self.cache: LatentCache = precompute_latents(
            c, self.base, self.accelerator, codec=self.codec
        )
        self.images, self.kept = self.cache.split(c.latents.validation)
        if not self.images:
            raise ImageFolderError(
                f"latents.validation={c.latents.validation}: every prompt is kept for validation. Use a smaller share "
                "or more images"
            )
        self.order = EpochOrder(
            self.images, size=c.training.images_per_update, seed=c.training.seed
        )
        self.task = DenoisingTask(
            self.model,
            c.algorithm,
            self.base.encode_prompt([""]),
            self.size,
            c.training.mixed_precision,
        )
        if self.moves:
            self._align()

    def _align(self) -> None:
        """Load the aligned embedder and last layer from the run folder.

        Fit and save them first if the folder has none.
        """
        c = self.config.latents
        assert self.model.ends is not None
        folder = self.folder.path
        if not (folder / ALIGNMENT_FACTS).is_file():
            self._align_anew()
            if self.accelerator.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                save_ends(self.model.denoiser, self.model.ends, folder / ALIGNED)
                write_text(folder / ALIGNMENT_FACTS, json.dumps(self.alignment, indent=1))
            self.accelerator.wait_for_everyone()
        load_ends(self.model.denoiser, self.model.ends, folder / ALIGNED)
        self.alignment = json.loads((folder / ALIGNMENT_FACTS).read_text(encoding="utf-8"))
        if c.shift == "signal":
            self._shift(self.alignment["signal_shift"])

    def _align_anew(self) -> None:
        c = self.config
        started = time.perf_counter()
        trained = set(self.images)
        alignment = Alignment(
            self.base,
            self.model,
            self.cache,
            [i for i in self.cache.paired if i in trained],
            self.accelerator,
            c.training.micro_batch_size,
            objective=c.latents.objective,
            mode=c.latents.mode,
        )
        sigmas = None
        if c.latents.noise_aware:
            generator = torch.Generator().manual_seed(stream(VALIDATION, c.training.seed))
            sigmas = logit_normal_sigmas(
                SIGMAS, mean=c.algorithm.sigma_mean, std=c.algorithm.sigma_std, generator=generator
            )
            sigmas = self.model.shifted(sigmas, self.size)
        alignment.align_embedder(sigmas=sigmas)
        if c.latents.shift == "signal":
            self._shift(alignment.facts["signal_shift"])
        if c.latents.align_head:
            alignment.align_head(self.task)
        else:
            self._random_head()
        self.alignment = alignment.facts | {"alignment_seconds": time.perf_counter() - started}

    def _random_head(self) -> None:
        """Re-initialise the last layer like `nn.Linear`, seeded by the run."""
        assert self.model.ends is not None
        head = layer(self.model.denoiser, self.model.ends.head)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.training.seed)
            fresh = torch.nn.Linear(*matrix(head).shape[::-1])
        head.load_state_dict(fresh.state_dict())

    def _shift(self, signal: float) -> None:
        k = tokens_ratio(self.base, self.codec, self.size)
        scheduler = moved_scheduler(self.base.pipeline.scheduler, ratio=k, signal=signal)
        self.model.pipeline.register_modules(scheduler=scheduler)

    def full_batches(self) -> CompiledSizes:
        c, world = self.config, self.accelerator.num_processes
        share = -(-c.training.images_per_update // world)
        rows = min(c.training.micro_batch_size, share)
        sampled = self.model.forward_rows(c.images.micro_batch_size, c.evaluation.guidance_scale)
        null = {rows} if self.model.guidance_is_embedded else set()
        return CompiledSizes({rows}, {sampled} | null)

    def learn(self, number: int) -> tuple[int, dict[str, Any]]:
        """Train one optimizer step on `images_per_update` images."""
        images = self.order(number)
        own = self.share(len(images))
        sums = Sums(METRICS, self.accelerator.device)
        self.optimizer.zero_grad()

        def share_of_loss(rows: range) -> Tensor:
            places = own[rows.start : rows.stop]
            seeds = [stream(IMAGES, self.config.training.seed, number, i) for i in places]
            losses = self._losses([images[i] for i in places], seeds, sums)
            return losses.sum() / len(images)

        rows = micro_batches(len(own), self.config.training.micro_batch_size)
        accumulate(rows, share_of_loss, self.accelerator.device)
        return len(images), self.descend(number, sums)

    def _losses(self, images: list[int], seeds: list[int], sums: Sums) -> Tensor:
        """Return the losses (B,) of images of the cache, and add their metrics to `sums`."""
        latents = self.cache.batch(images, self.accelerator.device)
        losses, metrics = self.task.loss(self.task.make_batch(latents, seeds))
        for name, values in metrics.items():
            sums.add(name, values)
        return losses

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the evaluated policy's validation loss, on images whose prompts are not trained on.

        Noise and noise levels are the same at every call.
        """
        images = self.kept[:VALIDATION_IMAGES]
        if not images:
            return {}
        sums = Sums(METRICS, self.accelerator.device)
        with lora.policy(self.model.denoiser, self.policy):
            for rows in micro_batches(len(images), self.config.training.micro_batch_size):
                part = images[rows.start : rows.stop]
                self._losses(part, [stream(VALIDATION, image) for image in part], sums)
        return {f"validation/{name}": value for name, value in sums.means().items()}

    def drawn_model(self, policy: str) -> TextToImageModel:
        return self.base if policy == lora.REFERENCE else self.model

    def export(self, folder: Path) -> None:
        """Save a pipeline with the LoRA merged into its weights.

        If the model was in the latent space already, the LoRA is saved separately, too. After a move it is not: no
        saved model has the aligned embedder and last layer that it was trained with.
        """
        if not self.moves:
            super().export(folder)
        target, pipeline = folder / "pipeline", self.model.pipeline
        own = self.model.denoiser
        pipeline.register_modules(transformer=lora.folded(own, self.policy))
        height, width = self.size
        if height == width:
            pipeline.register_to_config(image_size=height)
        try:
            # an export after fewer updates, which this one replaces
            if target.exists():
                shutil.rmtree(target)
            with folder_aside(target) as hidden:
                save_pipeline(pipeline, hidden, card=self._card())
        finally:
            pipeline.register_modules(transformer=own)

    def _card(self) -> DrawingCard:
        """Return the sampling settings of the run's evaluations, to save with the pipeline."""
        evaluation = self.config.evaluation
        return DrawingCard(
            evaluation.num_inference_steps,
            evaluation.guidance_scale,
            self.config.drawing.micro_batch_size,
            dtype=self.config.model.dtype,
        )

    def headline(self, row: dict[str, Any]) -> dict[str, str]:
        return {
            "relative_error": f"{row['relative_error']:.4f}",
            "images_per_s": f"{row['images_per_second']:.1f}",
        }

    def facts(self) -> dict[str, Any]:
        manifest = self.cache.manifest
        return {
            "images": len(self.images),
            "validation_images": len(self.kept),
            "skipped_images": manifest["skipped"],
            "precompute_seconds": manifest["seconds"],
            "tokens": {
                "base": self.base.image_seq_len(self.size),
                "moved": self.model.image_seq_len(self.size),
            },
            "alignment": self.alignment,
        }
