"""Settings of the algorithms of online reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from diffalign.config.base import AnyRunConfig, MethodConfig
from diffalign.config.checks import at_least, check, one_of, positive

if TYPE_CHECKING:
    from diffalign.config.online import RunConfig

WEIGHTS = ("uniform", "t", "t2", "huber", "ghuber")


NOISES = ("fresh", "group", "rollout")


TIMESTEP_SAMPLINGS = ("stratified", "independent")


@dataclass
class AlgorithmConfig(MethodConfig):
    """Settings that all algorithms of the online loop share."""

    advantage_clip: float = 5.0
    """Largest magnitude of an advantage."""
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

    def check_rollout(self, run: RunConfig) -> None:
        """Check the algorithm's settings together with those of the rollouts.

        Raises:
            ConfigError: they cannot be combined.
        """


@dataclass
class ForwardProcessConfig(AlgorithmConfig):
    """Settings of algorithms whose loss needs clean latents and rewards, but no trajectory.

    The weights are those of AWM's release. An image has fewer timesteps (4, not 6), and the distances are evaluated on
    one of them.
    """

    timesteps_per_image: int = 4
    """Number of timesteps at which an image is trained on in an update."""
    timestep_start: float = 0.0
    """Beginning of the part of the rollout's timestep grid that is trained on."""
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
    kl_by_reward: bool = False
    """Weigh an image's distance to the reference by its optimality: the advantage, clipped and moved to 0..1 (CRD).

    Images with a high reward stay close to the reference. The worst images keep a weight of 1e-4.
    """
    norm_guard: float = 0.0
    """Weight of NormGuard's hinge: max(0, |prediction| / |reference's prediction| - 1)^2.

    Reinforcement learning on the forward process makes predictions larger, which blurs images. The reference is used
    without guidance, which costs a forward if `reference_guidance_scale` is set.
    """
    lag_start: float = 0.0
    """Decay of the lagged policy before the first update."""
    lag_ramp: float = 0.001
    """Growth of the lagged policy's decay with each update."""
    lag_max: float = 0.3
    """Largest decay of the lagged policy.

    After update s the decay is min(lag_max, lag_start + lag_ramp * s).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("ema_kl_beta", "norm_guard", "lag_start", "lag_ramp")
        at_least(self, names, "algorithm", least=0)
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
    """Exponent p of the weight `ghuber`."""
    clip_range: float = 1.0
    """Relative change of the likelihood ratio beyond which an image has no gradient."""
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
class CRDConfig(ForwardProcessConfig):
    """Settings of CRD (centered reward distillation); strength, distance and lags are its release's."""

    type: str = "crd"
    beta: float = 1.0
    """Scale of the implicit reward against the optimality."""
    kl_beta: float = 0.1
    kl_by_reward: bool = True
    ema_kl_beta: float = 0.0
    lag_start: float = 0.25
    lag_ramp: float = 0.005
    lag_max: float = 0.999
    sampler_start: int = 75
    """Updates in which the policy that samples the rollouts is the current one."""
    sampler_ramp: float = 0.0075
    """Growth of the sampling policy's decay with each update after `sampler_start`."""
    sampler_max: float = 0.999
    """Largest decay of the policy that samples the rollouts.

    After update s the decay is min(sampler_max, sampler_ramp * (s - sampler_start)).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, ("beta",), "algorithm")
        at_least(self, ("sampler_start", "sampler_ramp"), "algorithm", least=0)
        check(
            0 <= self.sampler_max < 1,
            "algorithm.sampler_max",
            f"must lie in 0..1, got {self.sampler_max}",
        )

    def sampler_decay(self, update: int) -> float:
        """Return the decay, after an update, of the policy that samples the rollouts."""
        return min(self.sampler_max, self.sampler_ramp * max(0, update - self.sampler_start))


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
class TrajectoryConfig(AlgorithmConfig):
    """Settings of algorithms whose loss needs the likelihoods of a rollout's stochastic steps.

    Noise and distance are those of Flow-GRPO's release for SD3.5-medium, without guidance.
    """

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
    kl_beta: float = 0.04

    @property
    def needs_mean(self) -> bool:
        """True if the loss needs the means of the policy that sampled the rollout."""
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, ("noise_level",), "algorithm")
        one_of(self.dynamics, ("sde", "cps"), "algorithm.dynamics")
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
        return self.window_size or cast("RunConfig", run).rollout.num_inference_steps - 1

    def states_on_device(self, run: RunConfig) -> int:
        return self.rows_per_image(run) + 1

    def check_rollout(self, run: RunConfig) -> None:
        # on every schedule the last step ends without noise, so it is never stochastic
        steps = run.rollout.num_inference_steps
        most = min(round(self.window_stop * steps), steps - 1)
        size = 1 if self.window_size is None else self.window_size
        check(
            size <= most,
            "algorithm.window_size",
            f"{size} stochastic steps do not fit into {steps} (rollout.num_inference_steps), of which {most} at "
            "most may be stochastic",
        )
        check(
            not run.rollout.merge_lora,
            "rollout.merge_lora",
            f"true cannot be combined with {self.type}: merged weights round differently, and the likelihood ratio "
            "would be wrong. Set it to false",
        )
        check(
            run.rollout.solver == "default",
            "rollout.solver",
            f"{run.rollout.solver} cannot be combined with {self.type}, which trains on its own sampling steps. Set "
            "it to default",
        )


@dataclass
class FlowGRPOConfig(TrajectoryConfig):
    """Settings of Flow-GRPO; the clip is that of its release for SD3.5-medium."""

    type: str = "flow_grpo"
    clip_range: float = 1e-4
    """Relative change of the likelihood ratio beyond which an image has no gradient."""
    guard: bool = False
    """Use GRPO-Guard's ratio, which does not fall with the policy's distance; for "sde" only."""

    @property
    def needs_mean(self) -> bool:
        """True for GRPO-Guard's ratio."""
        return self.guard

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, ("clip_range",), "algorithm")
        check(
            self.dynamics == "sde" or not self.guard,
            "algorithm.guard",
            'is defined for algorithm.dynamics "sde" only',
        )


@dataclass
class FlowDPPOConfig(TrajectoryConfig):
    """Settings of Flow-DPPO; threshold and window are its release's for SD3.5-medium.

    With one optimizer step per rollout the policy is the one that sampled it, so that no step is left out.
    """

    type: str = "flow_dppo"
    divergence_threshold: float = 1e-5
    """Divergence from the rollout's policy at which a step is left out.

    Steps whose gradient would increase the divergence are left out. The divergence is a mean over dimensions.
    """
    window_size: int | None = 3
    window_stop: float = 0.5

    @property
    def needs_mean(self) -> bool:
        """True: the divergence is that from the old policy's means."""
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, ("divergence_threshold",), "algorithm")
