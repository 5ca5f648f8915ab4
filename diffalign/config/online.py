"""Settings of online reinforcement learning: rollouts and the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from diffalign.config.algorithms import AlgorithmConfig, AWMConfig
from diffalign.config.base import (
    SOLVERS,
    AnyRunConfig,
    DrawingConfig,
    LoopConfig,
    PlanConfig,
    PromptsConfig,
    Stored,
)
from diffalign.config.checks import at_least, check, one_of
from diffalign.config.fields import setting

ON_HACKING = ("warn", "raise_kl", "rollback", "stop")


@dataclass
class RolloutConfig(PlanConfig):
    """Settings of generating images for training; numbers are totals over all processes."""

    group_size: int = 16
    """Number of images of one prompt, which are compared with each other."""
    num_inference_steps: int = setting(10, alias="num_inference_steps")
    """Steps of the sampler for rollouts; training uses their timesteps."""
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
    """Optimizer steps on the images of one rollout."""
    drop_uninformative: bool = True
    """Leave out groups whose images all have the same reward."""
    on_collapse: str = setting("warn", free=True)
    """Reaction to a lasting fall of the reward with a risen gradient: "warn", "stop" or "rollback".

    With "rollback" the run returns to the last good checkpoint and continues with half the learning rate.
    """
    on_hacking: str = setting("warn", free=True)
    """Reaction to a trained reward that is gamed: "warn", "raise_kl", "rollback" or "stop".

    The signs are a held-out reward that falls while the trained reward rises, images of a prompt that become alike, and
    predictions that grow beyond the reference's.

    - raise_kl: the distance to the reference counts four times as much.
    - rollback: the run returns to the last good checkpoint and continues with half the learning rate.
    - stop: training ends, and the best checkpoint is exported beside the last.
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
        one_of(self.on_hacking, ON_HACKING, "training.on_hacking")
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
        self.algorithm.check_rollout(self)
        reaction = self.training.on_hacking
        check(
            reaction == "warn" or (bool(self.evaluation.rewards) and self.training.eval_every > 0),
            "training.on_hacking",
            f"{reaction} needs a held-out reward that is evaluated during training. Name one in evaluation.rewards, "
            "and set training.eval_every above 0",
        )
        check(
            reaction != "raise_kl" or self.algorithm.kl_beta > 0,
            "training.on_hacking",
            "raise_kl needs a distance to the reference. Set algorithm.kl_beta above 0",
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
