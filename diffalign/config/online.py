"""Settings of online reinforcement learning: algorithms, rollouts and the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from diffalign.config.base import (
    SOLVERS,
    AnyRunConfig,
    DrawingConfig,
    LoopConfig,
    MethodConfig,
    PromptsConfig,
)
from diffalign.config.checks import check, one_of, positive

WEIGHTS = ("uniform", "t", "t2", "huber", "ghuber")


NOISES = ("fresh", "group", "rollout")


TIMESTEP_SAMPLINGS = ("stratified", "independent")


@dataclass
class AlgorithmConfig(MethodConfig):
    """What all algorithms of the online loop share."""

    advantage_clip: float = 5.0
    std_scope: str = "global"
    """Standard deviation that divides the advantages: of all images ("global") or of each group ("group")."""
    reward_mixing: str = "sum"
    """Several rewards: "sum" of the scaled rewards, or each one's "advantages" summed (GDPO)."""
    kl_beta: float = 0.001
    """Weight of the distance to the reference model."""
    reference_guidance_scale: float | None = None
    """Guidance of the reference. A policy is trained to draw without guidance, and the base draws better with it: near
    the guided base is where the policy belongs. Distils guidance along the way, at the price of one more forward."""

    def __post_init__(self) -> None:
        one_of(self.std_scope, ("global", "group"), "algorithm.std_scope")
        one_of(self.reward_mixing, ("sum", "advantages"), "algorithm.reward_mixing")
        positive(self, ("advantage_clip",), "algorithm")
        check(self.kl_beta >= 0, "algorithm.kl_beta", "must not be negative")
        guidance = self.reference_guidance_scale
        check(
            guidance is None or guidance >= 1,
            "algorithm.reference_guidance_scale",
            f"must be at least 1 (no guidance), got {guidance}",
        )


@dataclass
class ForwardProcessConfig(AlgorithmConfig):
    """Algorithms whose loss needs clean latents and rewards, and no trajectory.

    Weights are those of AWM's release; timesteps are fewer (4, not 6) and distances are evaluated on one of them.
    """

    timesteps_per_image: int = 4
    timestep_start: float = 0.0
    timestep_stop: float = 1.0
    """Share of the rollout's grid that is trained on, from noise (0) to the clean end (1)."""
    timestep_sampling: str = "stratified"
    """Of an image's timesteps: "stratified", one from each of as many equal parts of that share, or "independent"."""
    noise: str = "fresh"
    """What images are noised with: "fresh" noise at every update, an image's own or, "group", one for all images of a
    prompt, at the same timesteps (less variance of the reward's part, not of the distances), or that of the "rollout"
    itself: the states through which an image was made, and what leads from them straight to it."""
    ema_kl_beta: float = 1.0
    """Weight of the distance to the lagged policy."""
    kl_timesteps: int = 1
    """Of the timesteps of an image, how many the two distances are evaluated on; the expectation stays the same."""
    lag_ramp: float = 0.001
    lag_max: float = 0.3
    """The lagged policy's decay after update s is min(lag_max, lag_ramp * s)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ema_kl_beta", "lag_ramp"):
            check(getattr(self, name) >= 0, f"algorithm.{name}", "must not be negative")
        check(0 <= self.lag_max < 1, "algorithm.lag_max", "must lie in 0..1")
        one_of(self.noise, NOISES, "algorithm.noise")
        one_of(self.timestep_sampling, TIMESTEP_SAMPLINGS, "algorithm.timestep_sampling")
        n = self.timesteps_per_image
        check(n >= 1, "algorithm.timesteps_per_image", "must be at least 1")
        check(
            1 <= self.kl_timesteps <= n,
            "algorithm.kl_timesteps",
            f"must lie in 1..timesteps_per_image ({n}), got {self.kl_timesteps}",
        )
        check(
            0 <= self.timestep_start < self.timestep_stop <= 1,
            "algorithm.timestep_start",
            "need 0 <= timestep_start < timestep_stop <= 1",
        )


@dataclass
class AWMConfig(ForwardProcessConfig):
    """Advantage Weighted Matching; weight, clip and scale are those of its release."""

    type: str = "awm"
    weight: str = "ghuber"
    """Weight of the matching error over time: uniform (the paper), t, t2, huber, ghuber (the release)."""
    ghuber_power: float = 0.25
    clip_range: float = 1.0
    advantage_max: float = 1.0
    """Advantages are clipped to advantage_clip, then scaled so that this is their largest magnitude."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.weight, WEIGHTS, "algorithm.weight")
        positive(self, ("ghuber_power", "clip_range", "advantage_max"), "algorithm")


@dataclass
class DiffusionNFTConfig(ForwardProcessConfig):
    """DiffusionNFT; the defaults are those of its release (GenEval). The lagged policy makes the images."""

    type: str = "diffusion_nft"
    mix: float = 1.0
    """beta of the paper: how far the implicit positive and negative policies lie from the lagged one."""
    timesteps_per_image: int = 9
    kl_beta: float = 1e-4
    ema_kl_beta: float = 0.0
    lag_max: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, ("mix",), "algorithm")


@dataclass
class FlowGRPOConfig(AlgorithmConfig):
    """Flow-GRPO; noise, clip and distance are those of its release for SD3.5-medium, without guidance."""

    type: str = "flow_grpo"
    clip_range: float = 1e-4
    noise_level: float = 0.7
    """a: how stochastic a stochastic step is."""
    dynamics: str = "sde"
    """How a step is made stochastic: "sde" (the release) or "cps" (coefficients-preserving)."""
    window_size: int | None = None
    """Stochastic steps in a row, which are those that are trained on; None is all that can be stochastic."""
    window_stop: float = 1.0
    """The window is drawn anew for every update from this share of the grid, counted from the noise. A step whose noise
    would be above the sigma at which it arrives is never stochastic."""
    guard: bool = False
    """GRPO-Guard's ratio (for dynamics "sde"), which does not fall with the policy's distance."""
    kl_beta: float = 0.04

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, ("clip_range", "noise_level"), "algorithm")
        one_of(self.dynamics, ("sde", "cps"), "algorithm.dynamics")
        check(
            self.dynamics == "sde" or not self.guard,
            "algorithm.guard",
            'is defined for algorithm.dynamics "sde" only',
        )
        check(
            self.dynamics != "cps" or self.noise_level < 1,
            "algorithm.noise_level",
            f"cps needs less than 1, got {self.noise_level}",
        )
        check(
            self.window_size is None or self.window_size >= 1,
            "algorithm.window_size",
            "must be at least 1",
        )
        check(0 < self.window_stop <= 1, "algorithm.window_stop", "must lie in 0..1")


@dataclass
class RolloutConfig(DrawingConfig):
    """How images are made for training: global numbers, whatever the number of processes."""

    prompts_per_update: int = 12
    group_size: int = 16
    """Images of one prompt that compete with each other."""
    num_inference_steps: int = 10
    solver: str = "default"
    """"default": the scheduler's own step; "adams_bashforth": second order on the same timesteps, so that fewer do. For
    losses that need clean latents alone."""
    guidance_scale: float | None = None
    """None: no classifier-free guidance (FLUX: its default guidance embedding)."""
    overlap_rewards: bool | None = None
    """Score a micro-batch while the next is drawn; None: on CUDA. On a CPU it pays where rewards are made elsewhere (a
    reward server); a reward model in this process would take the denoiser's time and its attention kernel."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.group_size >= 2, "rollout.group_size", "a group needs at least 2 images")
        one_of(self.solver, SOLVERS, "rollout.solver")
        for name in ("prompts_per_update", "num_inference_steps"):
            check(getattr(self, name) >= 1, f"rollout.{name}", "must be at least 1")

    @property
    def group(self) -> str:
        return "rollout"

    @property
    def images_per_update(self) -> int:
        return self.prompts_per_update * self.group_size


@dataclass
class TrainingConfig(LoopConfig):
    """The online loop. `num_updates` counts rollouts; with updates_per_rollout = 1 these are also optimizer steps."""

    updates_per_rollout: int = 1
    drop_uninformative: bool = True
    """Leave out groups whose images all got the same reward."""
    on_collapse: str = "warn"
    """When the reward has fallen and the gradient has risen for good: "warn", "stop", or "rollback" to the last good
    checkpoint and go on with half the learning rate."""
    max_idle_updates: int = 20
    """Updates in a row in which all images of every prompt have the same reward, after which the run ends; 0: never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.max_idle_updates >= 0, "training.max_idle_updates", "must not be negative")
        one_of(self.on_collapse, ("warn", "stop", "rollback"), "training.on_collapse")
        check(self.updates_per_rollout >= 1, "training.updates_per_rollout", "must be at least 1")


@dataclass
class RunConfig(AnyRunConfig):
    """Everything that decides an online run."""

    aliases: ClassVar[dict[str, Any]] = {
        "resolution": ("rollout.height", "rollout.width"),
        "guidance_scale": "rollout.guidance_scale",
        "num_inference_steps": "rollout.num_inference_steps",
    }

    algorithm: AlgorithmConfig = field(default_factory=AWMConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.algorithm, FlowGRPOConfig):
            # of any schedule: the last step arrives where no noise is
            steps = self.rollout.num_inference_steps
            most = min(round(self.algorithm.window_stop * steps), steps - 1)
            size = 1 if self.algorithm.window_size is None else self.algorithm.window_size
            check(
                size <= most,
                "algorithm.window_size",
                f"{size} stochastic steps do not fit into {steps} (rollout.num_inference_steps), of which {most} at "
                "most may be stochastic",
            )

    @property
    def drawing(self) -> DrawingConfig:
        return self.rollout
