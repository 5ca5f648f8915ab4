"""The dataclasses of a run that moves a model into another latent space (DC-Gen)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from diffalign.config.base import (
    AnyRunConfig,
    DrawingConfig,
    LoopConfig,
    MethodConfig,
    OptimizerConfig,
)
from diffalign.config.checks import check, one_of

OBJECTIVES = ("downsample", "upsample", "average")
MODES = ("nearest", "bilinear", "bicubic")
SHIFTS = ("pixels", "tokens", "signal")


@dataclass
class DCGenConfig(MethodConfig):
    """Flow matching in the new space that keeps the meaning of an embedded guidance scale."""

    type: str = "dcgen"
    min_guidance: float = 1.0
    max_guidance: float = 14.0
    """Scales that a model with a guidance embedding is trained at, uniformly; others have none."""
    prompt_dropout: float = 0.1
    """Share of images that are trained on with the empty prompt."""
    sigma_mean: float = 0.0
    sigma_std: float = 1.0
    """Of the logit of the noise level, before the scheduler's shift."""

    def __post_init__(self) -> None:
        check(
            1 <= self.min_guidance <= self.max_guidance < math.inf,
            "algorithm.min_guidance",
            f"1 <= min_guidance <= max_guidance must hold, got {self.min_guidance}, {self.max_guidance}",
        )
        check(0 <= self.prompt_dropout < 1, "algorithm.prompt_dropout", "must lie in 0..1")
        check(self.sigma_std > 0, "algorithm.sigma_std", "must be positive")


@dataclass
class LatentsConfig:
    """The new space, and the images with which a model gets to know it (`diffalign precompute`)."""

    autoencoder: str | None = None
    """A name that ships (shapes-dc), a folder or a hub id, whose subfolder `vae` is used where there is one; null: the
    model is in its space already (a resolution lift)."""
    channels: int | None = None
    """Only so many of the autoencoder's first channels, where it was trained for that (DC-AE 1.5)."""
    images: str = ""
    """A folder of captioned images (docs/dcgen.md), or shapes:train."""
    limit: int | None = None
    """Only so many images."""
    alignment_images: int = 2048
    """So many of them are encoded by the old autoencoder, too, and align the embedder; as many align the head."""
    objective: str = "downsample"
    """downsample, upsample or average: what the new embedder's tokens are compared with."""
    mode: str = "bilinear"
    """Of the interpolation of `upsample`."""
    noise_aware: bool = False
    """Align for noisy latents, as training draws them, instead of clean ones."""
    align_head: bool = True
    """Begin with the last layer in closed form; false: at random, as the released code does."""
    shift: str = "pixels"
    """pixels: an image is drawn at the noise levels at which the base drew one of its size; tokens: of as many tokens,
    so that sizes at which the base's schedule is of no use (4K) are drawn as 1K was; signal: as pixels, and then as
    noisy for what it shows as the base's, measured."""
    cache: str | None = None
    """Where latents and prompts are kept; null: OUTPUT_DIR-cache."""
    dtype: str = "bfloat16"
    """Of what is kept: bfloat16 or float32."""
    validation: float = 0.02
    """Share of the prompts whose images are never trained on."""
    center_crop: bool = True
    """False: at a random place."""
    random_flip: bool = False
    """Mirror half of the images."""
    seed: int = 0
    """Of crops and flips, and of images that are rendered."""
    micro_batch_size: int = 32
    """Images encoded at a time."""

    def __post_init__(self) -> None:
        one_of(self.objective, OBJECTIVES, "latents.objective")
        one_of(self.mode, MODES, "latents.mode")
        one_of(self.shift, SHIFTS, "latents.shift")
        one_of(self.dtype, ("bfloat16", "float32"), "latents.dtype")
        check(0 <= self.validation < 1, "latents.validation", "must lie in 0..1")
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
        check(self.limit is None or self.limit >= 1, "latents.limit", "must be at least 1")
        check(self.channels is None or self.channels >= 1, "latents.channels", "must be at least 1")
        check(self.micro_batch_size >= 1, "latents.micro_batch_size", "must be at least 1")
        check(self.alignment_images >= 1, "latents.alignment_images", "must be at least 1")


@dataclass
class LatentLoopConfig(LoopConfig):
    """The loop over images; `micro_batch_size` counts images."""

    images_per_update: int = 64
    """Of all processes together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.images_per_update >= 1, "training.images_per_update", "must be at least 1")


@dataclass
class LatentRunConfig(AnyRunConfig):
    """Everything that decides a move into another latent space. `rewards` only score held-out prompts: of the base in
    its own space before, of the moved model after."""

    aliases: ClassVar[dict[str, Any]] = {
        "resolution": ("images.height", "images.width"),
        "guidance_scale": "evaluation.guidance_scale",
        "num_inference_steps": "evaluation.num_inference_steps",
        "train_data_dir": "latents.images",
        "max_train_samples": "latents.limit",
        "proportion_empty_prompts": "algorithm.prompt_dropout",
        "logit_mean": "algorithm.sigma_mean",
        "logit_std": "algorithm.sigma_std",
        "random_flip": "latents.random_flip",
        "center_crop": "latents.center_crop",
    }

    output_dir: str = "runs/dcgen"
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
