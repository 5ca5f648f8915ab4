"""The dataclasses of a run that distils a model into a few-step student of itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from diffalign.config.base import (
    AnyRunConfig,
    DrawingConfig,
    LoopConfig,
    MethodConfig,
    PromptsConfig,
)
from diffalign.config.checks import check, one_of

TEACHER_SOLVERS = ("euler", "midpoint", "fireflow")


@dataclass
class DistillationConfig(MethodConfig):
    """What methods share. The student has `evaluation.num_inference_steps` steps."""

    states_per_image: int = 4
    """States of each of the teacher's trajectories that an update trains on."""

    def __post_init__(self) -> None:
        check(self.states_per_image >= 1, "algorithm.states_per_image", "must be at least 1")


@dataclass
class ReflowConfig(DistillationConfig):
    """Piecewise rectified flow: within each of the student's steps, the straight line between the teacher's states."""

    type: str = "reflow"
    window_starts: float = 0.5
    """Share of the states that lie where a student's step begins, all that it meets with its own number of steps; the
    rest lie anywhere in it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            0 <= self.window_starts <= 1,
            "algorithm.window_starts",
            f"must lie in 0..1, got {self.window_starts}",
        )


@dataclass
class ConsistencyConfig(DistillationConfig):
    """Consistency distillation: from every state to the end of its trajectory in one evaluation."""

    type: str = "consistency"
    skip: int | None = None
    """The target is the averaged student's answer so many of the teacher's steps later (LCM); null: the trajectory's
    own end, which the teacher has reached anyway."""
    huber_c: float = 0.001
    """Of the pseudo-Huber distance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.skip is None or self.skip >= 1, "algorithm.skip", "must be at least 1 or null")
        check(self.huber_c > 0, "algorithm.huber_c", f"must be positive, got {self.huber_c}")


@dataclass
class TeacherConfig(DrawingConfig):
    """How the base draws what the student learns from."""

    prompts_per_update: int = 32
    """Trajectories of an update, of all processes together."""
    num_inference_steps: int = 16
    """At least: each of the student's steps is cut into equally many of the teacher's."""
    guidance_scale: float | None = None
    solver: str = "euler"
    """euler, midpoint (two evaluations a step, second order) or fireflow (flows)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompts_per_update", "num_inference_steps"):
            check(getattr(self, name) >= 1, f"teacher.{name}", "must be at least 1")
        one_of(self.solver, TEACHER_SOLVERS, "teacher.solver")

    @property
    def group(self) -> str:
        return "teacher"

    @property
    def group_size(self) -> int:
        """Images of a prompt in an update: they do not compete."""
        return 1


@dataclass
class DistillationRunConfig(AnyRunConfig):
    """Everything that decides a distillation. `rewards` only score held-out prompts: of the teacher before, of the
    student after."""

    aliases: ClassVar[dict[str, Any]] = {
        "resolution": ("teacher.height", "teacher.width"),
        "guidance_scale": "teacher.guidance_scale",
        "num_inference_steps": "evaluation.num_inference_steps",
        "num_ddim_timesteps": "teacher.num_inference_steps",
        "huber_c": "algorithm.huber_c",
    }

    output_dir: str = "runs/distill"
    algorithm: DistillationConfig = field(default_factory=ReflowConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    training: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = self.evaluation.num_inference_steps
        check(
            self.teacher.num_inference_steps >= steps,
            "teacher.num_inference_steps",
            f"must be at least the student's steps (evaluation.num_inference_steps, {steps})",
        )
        check(
            self.evaluation.solver == "default",
            "evaluation.solver",
            "a student takes its scheduler's own steps",
        )

    @property
    def drawing(self) -> DrawingConfig:
        return self.teacher
