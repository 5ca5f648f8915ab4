"""Settings of online reinforcement learning: algorithms, rollouts and the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from diffalign.config.base import (
    SOLVERS,
    AnyRunConfig,
    DrawingConfig,
    LoopConfig,
    MethodConfig,
    PlanConfig,
    PromptsConfig,
    Stored,
)
from diffalign.config.checks import at_least, check, one_of, positive
from diffalign.config.fields import setting

WEIGHTS = ("uniform", "t", "t2", "huber", "ghuber")


NOISES = ("fresh", "group", "rollout")


TIMESTEP_SAMPLINGS = ("stratified", "independent")


@dataclass
class AlgorithmConfig(MethodConfig):
    """Settings that all algorithms of the online loop share."""

    advantage_clip: float = 5.0
    std_scope: str = "global"
    """Scope of the standard deviation that divides advantages: "global" or "group".

    It is computed over all images, or over each group.
    """
    reward_mixing: str = "sum"
    """Combination of several rewards: "sum" or "advantages".

    With "sum" the scaled rewards are added; with "advantages" the advantages of each reward are (GDPO).
    """
    kl_beta: float = 0.001
    """Weight of the distance to the reference model."""
    reference_guidance_scale: float | None = None
    """Guidance scale of the reference model in the distance to it; None for no guidance.

    A policy is trained to generate without guidance, and the base model generates better with it. The guided reference
    therefore distils guidance into the policy, at the cost of one more forward.
    """

    def __post_init__(self) -> None:
        one_of(self.std_scope, ("global", "group"), "algorithm.std_scope")
        one_of(self.reward_mixing, ("sum", "advantages"), "algorithm.reward_mixing")
        positive(self, ("advantage_clip",), "algorithm")
        at_least(self, ("kl_beta",), "algorithm", least=0)
        guidance = self.reference_guidance_scale
        check(
            guidance is None or guidance >= 1,
            "algorithm.reference_guidance_scale",
            f"must be at least 1 (no guidance), got {guidance}",
        )

    def states_on_device(self, run: RunConfig) -> int:
        """Return how many latents of an image's trajectory are trained on."""
        return 0

    def states_on_host(self, run: RunConfig) -> int:
        """Return how many latents of an image's trajectory are stored in CPU memory."""
        return 0


@dataclass
class ForwardProcessConfig(AlgorithmConfig):
    """Settings of algorithms whose loss needs clean latents and rewards, but no trajectory.

    The weights are those of AWM's release. An image has fewer timesteps (4, not 6), and the distances are evaluated on
    one of them.
    """

    timesteps_per_image: int = 4
    timestep_start: float = 0.0
    timestep_stop: float = 1.0
    """End of the part of the rollout's timestep grid that is trained on.

    The part begins at `timestep_start`. Noise is 0, the clean end is 1.
    """
    timestep_sampling: str = "stratified"
    """Sampling of an image's timesteps: "stratified" or "independent".

    With "stratified" the trained part of the grid is cut into as many equal parts as an image has timesteps, and one
    timestep is sampled from each.
    """
    noise: str = "fresh"
    """Source of the noise in the training states: "fresh", "group" or "rollout".

    - fresh: each image has its own noise, sampled anew for every update.
    - group: all images of a prompt share fresh noise and timesteps. The reward's part of the gradient has less
      variance; the distances have not.
    - rollout: the states are those of the image's own rollout, and the target leads from them straight to the image.
    """
    ema_kl_beta: float = 1.0
    """Weight of the distance to the lagged policy."""
    kl_timesteps: int = 1
    """Number of an image's timesteps on which the two distances are evaluated.

    The expectation of the distances does not depend on it.
    """
    lag_ramp: float = 0.001
    lag_max: float = 0.3
    """Largest decay of the lagged policy; after update s it is min(lag_max, lag_ramp * s)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, ("ema_kl_beta", "lag_ramp"), "algorithm", least=0)
        check(0 <= self.lag_max < 1, "algorithm.lag_max", f"must lie in 0..1, got {self.lag_max}")
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
            f"need 0 <= timestep_start < timestep_stop <= 1, got {self.timestep_start}, {self.timestep_stop}",
        )

    def rows_per_image(self, run: AnyRunConfig) -> int:
        return self.timesteps_per_image

    def states_on_host(self, run: RunConfig) -> int:
        return run.rollout.num_inference_steps + 1 if self.noise == "rollout" else 0


@dataclass
class AWMConfig(ForwardProcessConfig):
    """Settings of Advantage Weighted Matching; weight, clip and scale are its release's."""

    type: str = "awm"
    weight: str = "ghuber"
    """Weight of the matching error over time: uniform (the paper), t, t2, huber, ghuber (the release)."""
    ghuber_power: float = 0.25
    clip_range: float = 1.0
    advantage_max: float = 1.0
    """Largest magnitude of the advantages after scaling; `advantage_clip` clips them first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.weight, WEIGHTS, "algorithm.weight")
        positive(self, ("ghuber_power", "clip_range", "advantage_max"), "algorithm")


@dataclass
class DiffusionNFTConfig(ForwardProcessConfig):
    """Settings of DiffusionNFT; the defaults are those of its release (GenEval).

    The lagged policy generates the rollouts.
    """

    type: str = "diffusion_nft"
    mix: float = 1.0
    """Distance of the implicit positive and negative policies from the lagged one (beta)."""
    timesteps_per_image: int = 9
    kl_beta: float = 1e-4
    ema_kl_beta: float = 0.0
    lag_max: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, ("mix",), "algorithm")


@dataclass
class DGPOConfig(ForwardProcessConfig):
    """Settings of DGPO (direct group preference optimization); strength, clip and noise are its release's."""

    type: str = "dgpo"
    beta: float = 100.0
    """Strength of a group's preference: the reference's errors count the more, the larger it is."""
    clip_range: float = 0.01
    """Relative change of exp(-error) since the rollout beyond which an image has no gradient.

    The clip acts on a rollout's second and later optimizer steps.
    """
    noise: str = "group"
    ema_kl_beta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, ("beta",), "algorithm")
        check(
            0 < self.clip_range < 1,
            "algorithm.clip_range",
            f"must lie between 0 and 1, got {self.clip_range}",
        )


@dataclass
class FlowGRPOConfig(AlgorithmConfig):
    """Settings of Flow-GRPO.

    Noise, clip and distance are those of its release for SD3.5-medium, without guidance.
    """

    type: str = "flow_grpo"
    clip_range: float = 1e-4
    noise_level: float = 0.7
    """Amount of noise in a stochastic step (a in the paper)."""
    dynamics: str = "sde"
    """Kind of stochastic step: "sde" (the release) or "cps" (coefficients-preserving)."""
    window_size: int | None = None
    """Number of consecutive stochastic steps, which are the trained steps.

    None makes every step stochastic that can be.
    """
    window_stop: float = 1.0
    """Share of the grid, counted from the noise, in which the window lies.

    The window's place is sampled anew for every update. Steps are deterministic when the added noise would exceed the
    next sigma.
    """
    guard: bool = False
    """Use GRPO-Guard's ratio, which does not fall with the policy's distance; for "sde" only."""
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
        at_least(self, ("window_size",), "algorithm")
        check(
            0 < self.window_stop <= 1,
            "algorithm.window_stop",
            f"must lie in 0..1, got {self.window_stop}",
        )

    def rows_per_image(self, run: AnyRunConfig) -> int:
        assert isinstance(run, RunConfig)
        return self.window_size or run.rollout.num_inference_steps - 1

    def states_on_device(self, run: RunConfig) -> int:
        return self.rows_per_image(run) + 1


@dataclass
class RolloutConfig(PlanConfig):
    """Settings of generating images for training; numbers are totals over all processes."""

    group_size: int = 16
    """Number of images of one prompt, which are compared with each other."""
    num_inference_steps: int = setting(10, alias="num_inference_steps")
    solver: str = "default"
    """Solver of the rollouts: "default" or "adams_bashforth".

    With "default" the scheduler takes its own steps. With "adams_bashforth" the steps are second order on the same
    timesteps, so that fewer steps suffice; it is for losses that need clean latents only.
    """
    guidance_scale: float | None = setting(None, alias="guidance_scale")
    """Guidance scale of the rollouts; None for no classifier-free guidance.

    For FLUX None selects its default guidance embedding.
    """
    overlap_rewards: bool | None = setting(None, free=True)
    """Score a micro-batch while the next one is generated; None does so on CUDA only.

    On a CPU it pays for rewards that are computed elsewhere (a reward server). A reward model in this process would
    compete with the denoiser for time and change its attention kernel.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.group_size >= 2, "rollout.group_size", "a group needs at least 2 images")
        one_of(self.solver, SOLVERS, "rollout.solver")
        at_least(self, ("prompts_per_update", "num_inference_steps"), "rollout")

    @property
    def group(self) -> str:
        return "rollout"

    @property
    def images_per_prompt(self) -> int:
        return self.group_size

    @property
    def images_per_update(self) -> int:
        return self.prompts_per_update * self.group_size


@dataclass
class TrainingConfig(LoopConfig):
    """Settings of the online loop.

    The setting `num_updates` counts rollouts; with updates_per_rollout = 1 these are also optimizer steps.
    """

    updates_per_rollout: int = 1
    drop_uninformative: bool = True
    """Leave out groups whose images all have the same reward."""
    on_collapse: str = setting("warn", free=True)
    """Reaction to a lasting fall of the reward with a risen gradient: "warn", "stop" or "rollback".

    With "rollback" the run returns to the last good checkpoint and continues with half the learning rate.
    """
    max_idle_updates: int = setting(20, free=True)
    """Largest number of consecutive updates without a learning signal before the run ends.

    An update has no signal if all images of every prompt have the same reward. With 0 the run never ends for this
    reason.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, ("max_idle_updates",), "training", least=0)
        one_of(self.on_collapse, ("warn", "stop", "rollback"), "training.on_collapse")
        at_least(self, ("updates_per_rollout",), "training")


@dataclass
class RunConfig(AnyRunConfig):
    """Settings of an online run."""

    trains_on_rewards: ClassVar[bool] = True

    algorithm: AlgorithmConfig = field(default_factory=AWMConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.algorithm, FlowGRPOConfig):
            # on every schedule the last step ends without noise, so it is never stochastic
            steps = self.rollout.num_inference_steps
            most = min(round(self.algorithm.window_stop * steps), steps - 1)
            size = 1 if self.algorithm.window_size is None else self.algorithm.window_size
            check(
                size <= most,
                "algorithm.window_size",
                f"{size} stochastic steps do not fit into {steps} (rollout.num_inference_steps), of which {most} at "
                "most may be stochastic",
            )
            check(
                not self.rollout.merge_lora,
                "rollout.merge_lora",
                "true cannot be combined with Flow-GRPO: merged weights round differently, and the likelihood ratio "
                "would be wrong. Set it to false",
            )
            check(
                self.rollout.solver == "default",
                "rollout.solver",
                f"{self.rollout.solver} cannot be combined with Flow-GRPO, which trains on its own sampling steps. Set "
                "it to default",
            )

    @property
    def drawing(self) -> DrawingConfig:
        return self.rollout

    @property
    def plan(self) -> RolloutConfig:
        return self.rollout

    @property
    def training_prompts(self) -> PromptsConfig:
        return self.prompts

    @property
    def stored(self) -> Stored:
        return Stored(
            images=self.rollout.images_per_update,
            prompts=self.rollout.prompts_per_update,
            states_on_device=self.algorithm.states_on_device(self),
            states_on_host=self.algorithm.states_on_host(self),
        )
