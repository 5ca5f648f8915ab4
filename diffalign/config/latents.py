"""Settings of runs that move a model into another latent space (DC-Gen)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from diffalign.config.base import (
    AnyRunConfig,
    DrawingConfig,
    LoopConfig,
    MethodConfig,
)
from diffalign.config.checks import at_least, check, one_of
from diffalign.config.fields import setting
from diffalign.config.model import OptimizerConfig

OBJECTIVES = ("downsample", "upsample", "average")
MODES = ("nearest", "bilinear", "bicubic")
SHIFTS = ("pixels", "tokens", "signal")


@dataclass
class DCGenConfig(MethodConfig):
    """Settings of DC-Gen: flow matching in the new latent space.

    The loss keeps the meaning of an embedded guidance scale.
    """

    type: str = "dcgen"
    min_guidance: float = 1.0
    """Smallest guidance scale of training, for models with guidance as an input."""
    max_guidance: float = 14.0
    """Largest guidance scale in training; scales are sampled uniformly from `min_guidance` on.

    Both settings concern models with a guidance embedding only.
    """
    prompt_dropout: float = setting(0.1, alias="proportion_empty_prompts")
    """Share of training images whose prompt is replaced by the empty prompt."""
    sigma_mean: float = setting(0.0, alias="logit_mean")
    """Mean of the normal law of the training noise levels' logits."""
    sigma_std: float = setting(1.0, alias="logit_std")
    """Standard deviation of the logit of the noise level, before the scheduler's shift.

    The mean is `sigma_mean`.
    """

    def __post_init__(self) -> None:
        check(
            1 <= self.min_guidance <= self.max_guidance < math.inf,
            "algorithm.min_guidance",
            f"1 <= min_guidance <= max_guidance must hold, got {self.min_guidance}, {self.max_guidance}",
        )
        check(
            0 <= self.prompt_dropout < 1,
            "algorithm.prompt_dropout",
            f"must lie in 0..1, got {self.prompt_dropout}",
        )
        check(self.sigma_std > 0, "algorithm.sigma_std", f"must be positive, got {self.sigma_std}")


@dataclass
class LatentsConfig:
    """Settings of the new latent space and its training images (`diffalign precompute`)."""

    autoencoder: str | None = None
    """Autoencoder of the new space: a name that ships (shapes-dc), a folder or a hub id.

    Its subfolder `vae` is used if there is one. With null the model stays in its latent space (a resolution lift).
    """
    channels: int | None = None
    """Number of leading channels to use, for autoencoders trained for that (DC-AE 1.5)."""
    images: str = setting("", alias="train_data_dir")
    """Folder of captioned images (docs/dcgen.md), or shapes:train."""
    limit: int | None = setting(None, alias="max_train_samples")
    """Largest number of images, taken from the start."""
    alignment_images: int = 2048
    """Number of images that align the embedder; the head is aligned with as many.

    These images are encoded by the old autoencoder, too.
    """
    objective: str = "downsample"
    """Target that the new embedder's tokens are compared with: downsample, upsample or average."""
    mode: str = "bilinear"
    """Interpolation of the objective `upsample`: nearest, bilinear or bicubic."""
    noise_aware: bool = False
    """Align on noisy latents, with the noise levels of training, instead of clean latents."""
    align_head: bool = True
    """Initialise the last layer in closed form; with false at random, like the released code."""
    shift: str = "pixels"
    """Rule for the noise schedule in the new space: pixels, tokens or signal.

    - pixels: the schedule of the base model for an image of the same size in pixels.
    - tokens: the schedule of the base model for an image of as many tokens. A size that the base's schedule does not
      suit (4K) is then generated like 1K.
    - signal: like pixels, then shifted until the measured signal-to-noise ratio equals that in the base's space.
    """
    cache: str | None = setting(None, free=True)
    """Folder of the cache of latents and prompts; null for OUTPUT_DIR-cache."""
    dtype: str = "bfloat16"
    """Dtype of the cached latents and prompts: bfloat16 or float32."""
    validation: float = 0.02
    """Share of the prompts whose images are held out from training."""
    center_crop: bool = setting(True, alias="center_crop")
    """Crop images at their centre; with false at a random place."""
    random_flip: bool = setting(False, alias="random_flip")
    """Mirror half of the images."""
    seed: int = 0
    """Seed of crops, flips and rendered images."""
    micro_batch_size: int = setting(32, free=True)
    """Number of images encoded at a time."""

    def __post_init__(self) -> None:
        one_of(self.objective, OBJECTIVES, "latents.objective")
        one_of(self.mode, MODES, "latents.mode")
        one_of(self.shift, SHIFTS, "latents.shift")
        one_of(self.dtype, ("bfloat16", "float32"), "latents.dtype")
        check(
            0 <= self.validation < 1,
            "latents.validation",
            f"must lie in 0..1, got {self.validation}",
        )
        check(
            self.autoencoder is not None or self.shift == "pixels",
            "latents.shift",
            "a model that stays in its space keeps its schedule",
        )
        exact = self.objective == "downsample" or (self.objective, self.mode) == (
            "upsample",
            "nearest",
        )
        check(
            exact or not self.noise_aware,
            "latents.noise_aware",
            "is for latents.objective=downsample, or upsample with mode nearest: others change the noise, too",
        )
        at_least(self, ("limit", "channels", "micro_batch_size", "alignment_images"), "latents")


@dataclass
class LatentLoopConfig(LoopConfig):
    """Settings of the training loop over images; `micro_batch_size` counts images."""

    images_per_update: int = 64
    """Number of images per update, over all processes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, ("images_per_update",), "training")


@dataclass
class LatentRunConfig(AnyRunConfig):
    """Settings of a run that moves a model into another latent space.

    The rewards only score held-out prompts: the base model in its own space before training, and the moved model after
    it.
    """

    changes_base: ClassVar[bool] = True

    output_dir: str = setting("runs/dcgen", free=True)
    algorithm: DCGenConfig = field(default_factory=DCGenConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    images: DrawingConfig = field(default_factory=DrawingConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=1e-4, betas=(0.9, 0.95), weight_decay=0.0
        )
    )
    training: LatentLoopConfig = field(default_factory=LatentLoopConfig)

    @property
    def drawing(self) -> DrawingConfig:
        return self.images

    @property
    def encoded_images(self) -> int:
        return self.latents.micro_batch_size
