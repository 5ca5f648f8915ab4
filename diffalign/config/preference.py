"""The dataclasses of a run on preference pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from diffalign.config.base import AnyRunConfig, DrawingConfig, LoopConfig, MethodConfig
from diffalign.config.checks import check, one_of, positive

LOSSES = ("sigmoid", "ipo", "hinge", "dmpo", "kto", "mapo", "sft")
VARIANTS = ("chord", "figure", "released")
SOLVERS = ("euler", "midpoint", "fireflow", "fixed_point", "recorded")
DEFAULT_STATES = 4
TIES = ("drop", "soft", "random")


@dataclass
class PreferenceAlgorithmConfig(MethodConfig):
    """What losses on pairs share. `beta` acts on mean errors: on their sum it is beta / D, D numbers a latent."""

    beta: float = 2000.0
    """As in Diffusion-DPO's release, with the factor 1/2: the value of diffusers' scripts (`--beta_dpo`) times two."""
    loss_type: str = "sigmoid"
    """sigmoid (DPO, soft labels), ipo, hinge, dmpo, kto, mapo (no reference), or sft: the winner's error alone."""
    safeguard: float | None = 0.6
    """SDPO's mu: the loser's gradient is scaled down so that the winner's error falls by at least this share of what it
    would without a loser; null for the plain loss."""
    timesteps_per_pair: int = 1

    def __post_init__(self) -> None:
        positive(self, ("beta",), "algorithm")
        one_of(self.loss_type, LOSSES, "algorithm.loss_type")
        check(
            self.safeguard is None or 0 <= self.safeguard <= 1,
            "algorithm.safeguard",
            f"must lie in 0..1 or be null, got {self.safeguard}",
        )
        check(self.timesteps_per_pair >= 1, "algorithm.timesteps_per_pair", "must be at least 1")


@dataclass
class DiffusionDPOConfig(PreferenceAlgorithmConfig):
    """Diffusion-DPO: fresh noise, shared by both images of a pair, and a forward of the reference."""

    type: str = "diffusion_dpo"


@dataclass
class InversionDPOConfig(PreferenceAlgorithmConfig):
    """Inversion-DPO: the noise is what the reference's own inversion of each image implies."""

    type: str = "inversion_dpo"
    variant: str = "chord"
    """chord: that noise is the target. figure, released: the distance to the reference along the inverted trajectory,
    with the sign of the paper's figure or of its code, for comparison: their gradient is zero where training starts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.variant, VARIANTS, "algorithm.variant")
        check(
            self.variant == "chord" or self.loss_type == "sigmoid",
            "algorithm.loss_type",
            f"algorithm.variant={self.variant} is defined for sigmoid only",
        )


@dataclass
class InversionConfig:
    """What `diffalign precompute` does with each image besides encoding it."""

    steps: int = 16
    """Intervals of the scheduler's own grid."""
    solver: str | None = None
    """euler (DDIM inversion), midpoint, fireflow (flows) or fixed_point; recorded: none, the states are those that
    `diffalign pairs --record_states` kept. null: recorded where they are there and fit, else fireflow for flows and
    midpoint for others."""
    states: int | None = None
    """Grid states that are kept of each image, the same ones of both images of a pair; 0: none. null: 4 for
    inversion_dpo, 0 for algorithms that draw their noise."""
    min_noise: float = 0.05
    """States with a smaller share of noise are never kept: the noise they imply is divided by it."""
    guidance_scale: float | None = None
    """Of the inversion; null: none."""

    def __post_init__(self) -> None:
        check(self.steps >= 2, "pairs.inversion.steps", "must be at least 2")
        check(
            self.states is None or self.states >= 0,
            "pairs.inversion.states",
            "must not be negative",
        )
        if self.solver is not None:
            one_of(self.solver, SOLVERS, "pairs.inversion.solver")
        check(
            0 < self.min_noise < 1,
            "pairs.inversion.min_noise",
            f"must lie in 0..1, got {self.min_noise}",
        )


@dataclass
class PairsConfig:
    """Where pairs come from and what is made of them once (`diffalign precompute`)."""

    source: str = ""
    """A folder of `diffalign pairs`, an image folder with a table, parquet, json, csv or tar (docs/preferences.md)."""
    preset: str | None = None
    """A known layout, such as pickapic (docs/preferences.md); null: told by its columns."""
    column_map: dict[str, str] = field(default_factory=dict)
    """Of a layout of one's own: prompt, image_0, image_1, label (or label_0 and label_1) to its names."""
    cache: str | None = None
    """Where latents, prompts and inverted states are kept; null: OUTPUT_DIR-cache."""
    dtype: str = "bfloat16"
    """Of what is kept: bfloat16 or float32. Recorded states stay as they were drawn."""
    ties: str = "drop"
    """Pairs without a preference: drop, soft (label 0.5), or random (one is called the winner)."""
    limit: int | None = None
    """Only so many pairs, from the start."""
    validation: float = 0.05
    """Share of the prompts whose pairs are never trained on."""
    center_crop: bool = True
    """False: at a random place, the same for both images."""
    random_flip: bool = False
    """Mirror half of the pairs, both images."""
    seed: int = 0
    """Of crops, flips, ties at random, and which inverted states are kept: runs of any seed share a cache."""
    micro_batch_size: int = 16
    """Images encoded and inverted at a time."""
    inversion: InversionConfig = field(default_factory=InversionConfig)

    def __post_init__(self) -> None:
        one_of(self.dtype, ("bfloat16", "float32"), "pairs.dtype")
        one_of(self.ties, TIES, "pairs.ties")
        check(
            0 <= self.validation < 1,
            "pairs.validation",
            f"must lie in 0..1, got {self.validation}",
        )
        check(self.limit is None or self.limit >= 1, "pairs.limit", "must be at least 1")
        check(self.micro_batch_size >= 1, "pairs.micro_batch_size", "must be at least 1")


@dataclass
class PreferenceLoopConfig(LoopConfig):
    """The loop over pairs; `micro_batch_size` counts pairs."""

    pairs_per_update: int = 64
    """Of all processes together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.pairs_per_update >= 1, "training.pairs_per_update", "must be at least 1")


@dataclass
class PreferenceRunConfig(AnyRunConfig):
    """Everything that decides a run on preference pairs. `rewards` only score held-out prompts."""

    pairs_per_step: ClassVar[bool] = True
    aliases: ClassVar[dict[str, Any]] = {
        "resolution": ("images.height", "images.width"),
        "guidance_scale": "evaluation.guidance_scale",
        "num_inference_steps": "pairs.inversion.steps",
        "beta_dpo": "algorithm.beta",
        "loss_type": "algorithm.loss_type",
        "dataset_name": "pairs.source",
        "train_data_dir": "pairs.source",
        "max_train_samples": "pairs.limit",
        "random_flip": "pairs.random_flip",
        "center_crop": "pairs.center_crop",
    }

    output_dir: str = "runs/inversion-dpo"
    algorithm: PreferenceAlgorithmConfig = field(default_factory=InversionDPOConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    images: DrawingConfig = field(default_factory=DrawingConfig)
    training: PreferenceLoopConfig = field(default_factory=PreferenceLoopConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            not isinstance(self.algorithm, InversionDPOConfig)
            or self.states >= self.algorithm.timesteps_per_pair,
            "pairs.inversion.states",
            f"{self.algorithm.type} trains on {self.algorithm.timesteps_per_pair} states of an image",
        )
        check(math.isfinite(self.algorithm.beta), "algorithm.beta", "must be finite")

    @property
    def states(self) -> int:
        """Inverted states that are kept of each image."""
        needed = DEFAULT_STATES if isinstance(self.algorithm, InversionDPOConfig) else 0
        given = self.pairs.inversion.states
        return needed if given is None else given

    @property
    def drawing(self) -> DrawingConfig:
        return self.images
