"""Settings of runs that train on preference pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from diffalign.config.base import AnyRunConfig, DrawingConfig, LoopConfig, MethodConfig
from diffalign.config.checks import at_least, check, one_of, positive
from diffalign.config.fields import setting

LOSSES = ("sigmoid", "ipo", "hinge", "dmpo", "kto", "mapo", "sft")
VARIANTS = ("chord", "figure", "released")
SOLVERS = ("euler", "midpoint", "fireflow", "fixed_point", "recorded")
DEFAULT_STATES = 4
TIES = ("drop", "soft", "random")


@dataclass
class PreferenceAlgorithmConfig(MethodConfig):
    """Settings that all losses on preference pairs share."""

    beta: float = setting(2000.0, alias="beta_dpo")
    """Strength of the preference, as in Diffusion-DPO's release with its factor 1/2.

    It is twice the value of diffusers' scripts (`--beta_dpo`). It multiplies mean errors; for summed errors it would be
    beta / D with D numbers per latent.
    """
    loss_type: str = setting("sigmoid", alias="loss_type")
    """Loss: sigmoid (DPO, soft labels), ipo, hinge, dmpo, kto, mapo or sft.

    The loss mapo needs no reference model; sft is the winner's error alone.
    """
    safeguard: float | None = 0.6
    """Smallest fall of the winner's error, relative to training without a loser.

    It is SDPO's mu. The loser's gradient is scaled down accordingly. With null the loss has no safeguard.
    """
    timesteps_per_pair: int = 1
    """Number of timesteps at which a pair is trained on in an update."""

    on_states: ClassVar[bool] = False
    """True if the loss reads states of an inversion instead of freshly noised latents."""

    @property
    def gradient_factor(self) -> float | None:
        """Gradient factor that `beta` is lowered to keep; None for a constant `beta`."""
        return None

    @property
    def uses_masks(self) -> bool:
        """True to compare images only where a mask is white."""
        return False

    @property
    def form(self) -> str:
        """Form of the loss; "chord" for every loss on a denoising target."""
        return "chord"

    def __post_init__(self) -> None:
        positive(self, ("beta",), "algorithm")
        one_of(self.loss_type, LOSSES, "algorithm.loss_type")
        check(
            self.safeguard is None or 0 <= self.safeguard <= 1,
            "algorithm.safeguard",
            f"must lie in 0..1 or be null, got {self.safeguard}",
        )
        at_least(self, ("timesteps_per_pair",), "algorithm")

    def rows_per_image(self, run: AnyRunConfig) -> int:
        return (1 if self.loss_type == "sft" else 2) * self.timesteps_per_pair


@dataclass
class DiffusionDPOConfig(PreferenceAlgorithmConfig):
    """Settings of Diffusion-DPO.

    Both images of a pair share fresh noise, and every update runs a forward of the reference model.
    """

    type: str = "diffusion_dpo"
    auto_beta: float | None = None
    """Gradient factor of pairs that `beta` is lowered to keep; null for none.

    The factor lies between 0 and 0.5. It is 0.5 at the start and falls as the margin grows. beta follows the running
    mean of the margin and never exceeds the setting. It is for the loss sigmoid.
    """
    masked: bool = False
    """Compare the images of a pair only where their mask (column `mask`) is white.

    A row without a mask counts as a whole.
    """

    @property
    def gradient_factor(self) -> float | None:
        """Gradient factor that `beta` is lowered to keep."""
        return self.auto_beta

    @property
    def uses_masks(self) -> bool:
        """True if masks are read."""
        return self.masked

    def __post_init__(self) -> None:
        super().__post_init__()
        target = self.auto_beta
        check(
            target is None or 0 < target < 0.5,
            "algorithm.auto_beta",
            f"must lie between 0 and 0.5 or be null, got {target}",
        )
        check(
            target is None or self.loss_type == "sigmoid",
            "algorithm.auto_beta",
            f"is defined for algorithm.loss_type sigmoid only, got {self.loss_type}. Set it to null",
        )


@dataclass
class InversionDPOConfig(PreferenceAlgorithmConfig):
    """Settings of Inversion-DPO.

    The noise of an image is the one that its inversion by the reference model implies.
    """

    type: str = "inversion_dpo"
    variant: str = "chord"
    """Target of the loss: chord, figure or released.

    - chord: the noise that the inversion implies.
    - figure, released: the distance to the reference model along the inverted trajectory, with the sign of the paper's
      figure or of its code. They serve for comparison: their gradient is zero at the start of training.
    """

    on_states: ClassVar[bool] = True

    @property
    def form(self) -> str:
        """Form of the loss: that of the variant."""
        return self.variant

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
    """Settings of the inversion of each image by `diffalign precompute`."""

    steps: int = setting(16, alias="num_inference_steps")
    """Number of intervals of the scheduler's timestep grid."""
    solver: str | None = None
    """Solver of the inversion: euler, midpoint, fireflow, fixed_point or recorded.

    The solver euler is DDIM inversion, and fireflow is for flows. With recorded no inversion runs: the states are those
    of `diffalign pairs --record_states`. With null the states are recorded ones if they exist and fit, else inverted
    with fireflow for flows and with midpoint for other models.
    """
    states: int | None = None
    """Number of grid states that are cached of each image; 0 for none.

    Both images of a pair have the same grid states. With null the number is 4 for inversion_dpo, and 0 for algorithms
    that sample their noise.
    """
    min_noise: float = 0.05
    """Smallest share of noise of a cached state; the implied noise is divided by it."""
    guidance_scale: float | None = None
    """Guidance scale of the inversion; null for none."""

    def __post_init__(self) -> None:
        at_least(self, ("steps",), "pairs.inversion", least=2)
        at_least(self, ("states",), "pairs.inversion", least=0)
        if self.solver is not None:
            one_of(self.solver, SOLVERS, "pairs.inversion.solver")
        check(
            0 < self.min_noise < 1,
            "pairs.inversion.min_noise",
            f"must lie in 0..1, got {self.min_noise}",
        )


@dataclass
class PairsConfig:
    """Settings of the preference pairs and of their cache (`diffalign precompute`)."""

    # free: the manifest of the cache names the pairs that it was made from
    source: str = setting("", free=True, alias=("dataset_name", "train_data_dir"))
    """Source of the pairs: a folder of `diffalign pairs`, an image folder or a table.

    A table is parquet, json, csv or tar; an image folder has one, too (docs/preferences.md).
    """
    preset: str | None = None
    """Name of a published layout, such as pickapic (docs/preferences.md); null detects it by its columns."""
    column_map: dict[str, str] = field(default_factory=dict)
    """Column names of a custom layout, by role.

    The roles are prompt, image_0, image_1 and label (or label_0 and label_1).
    """
    cache: str | None = setting(None, free=True)
    """Folder of the cache of latents, prompts and inverted states; null for OUTPUT_DIR-cache."""
    dtype: str = "bfloat16"
    """Dtype of the cached tensors: bfloat16 or float32. Recorded states keep their own dtype."""
    ties: str = "drop"
    """Treatment of pairs without a preference: drop, soft (label 0.5), or random (a random winner)."""
    limit: int | None = setting(None, alias="max_train_samples")
    """Largest number of pairs, taken from the start."""
    validation: float = 0.05
    """Share of the prompts whose pairs are held out from training."""
    center_crop: bool = setting(True, alias="center_crop")
    """Crop images at their centre; with false at one random place for both images."""
    random_flip: bool = setting(False, alias="random_flip")
    """Mirror both images of half of the pairs."""
    seed: int = 0
    """Seed of crops, flips, random ties and the choice of cached states.

    It is not the run's seed, so that runs of any seed share a cache.
    """
    micro_batch_size: int = setting(16, free=True)
    """Number of images encoded and inverted at a time."""
    inversion: InversionConfig = field(default_factory=InversionConfig)

    def __post_init__(self) -> None:
        one_of(self.dtype, ("bfloat16", "float32"), "pairs.dtype")
        one_of(self.ties, TIES, "pairs.ties")
        check(
            0 <= self.validation < 1,
            "pairs.validation",
            f"must lie in 0..1, got {self.validation}",
        )
        at_least(self, ("limit", "micro_batch_size"), "pairs")


@dataclass
class PreferenceLoopConfig(LoopConfig):
    """Settings of the training loop over pairs; `micro_batch_size` counts pairs."""

    pairs_per_update: int = 64
    """Number of pairs per update, over all processes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, ("pairs_per_update",), "training")


@dataclass
class PreferenceRunConfig(AnyRunConfig):
    """Settings of a run on preference pairs; the rewards only score held-out prompts."""

    pairs_per_step: ClassVar[bool] = True

    output_dir: str = setting("runs/inversion-dpo", free=True)
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
        check(
            math.isfinite(self.algorithm.beta),
            "algorithm.beta",
            f"must be finite, got {self.algorithm.beta}",
        )

    @property
    def states(self) -> int:
        """Number of inverted states that are cached of each image."""
        default = DEFAULT_STATES if isinstance(self.algorithm, InversionDPOConfig) else 0
        states = self.pairs.inversion.states
        return default if states is None else states

    @property
    def drawing(self) -> DrawingConfig:
        return self.images

    @property
    def encoded_images(self) -> int:
        return self.pairs.micro_batch_size
