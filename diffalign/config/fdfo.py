"""Settings of FDFO, online reinforcement learning on pairs of rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffalign.config.algorithms import ForwardProcessConfig
from diffalign.config.checks import check, positive

if TYPE_CHECKING:
    from diffalign.config.online import RunConfig


@dataclass
class FDFOConfig(ForwardProcessConfig):
    """Settings of FDFO (finite difference flow optimization); churn and clip are the paper's.

    The images of a prompt are pairs that share their initial noise, and the states are those of the rollout. The paper
    has one pair for each prompt, 40 steps, and 4 optimizer steps for each rollout.
    """

    type: str = "fdfo"
    churn: float = 0.03
    """Share of fresh noise that each step of a rollout adds.

    The images of a pair differ by it alone.
    """
    clip_range: float = 0.03
    """Change of the likelihood ratio at which the loss is least."""
    noise: str = "rollout"
    kl_beta: float = 0.0
    ema_kl_beta: float = 0.0
    # the rollouts of several optimizer steps are those of the policy before the first of them
    lag_max: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, ("churn", "clip_range"), "algorithm")
        check(
            self.noise == "rollout",
            "algorithm.noise",
            f"fdfo trains on the states of its rollouts, got {self.noise}. Set it to rollout",
        )

    def check_rollout(self, run: RunConfig) -> None:
        size = run.rollout.group_size
        check(size % 2 == 0, "rollout.group_size", f"fdfo needs pairs of images, got {size}")
        check(
            run.rollout.solver == "default",
            "rollout.solver",
            f"{run.rollout.solver} cannot be combined with fdfo, which takes steps of its own. Set it to default",
        )
