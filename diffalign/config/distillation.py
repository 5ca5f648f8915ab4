"""Settings of runs that distil a model into a few-step student of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffalign.config.base import (
    AnyRunConfig,
    DrawingConfig,
    LoopConfig,
    MethodConfig,
    PlanConfig,
    PromptsConfig,
)
from diffalign.config.checks import at_least, check, one_of
from diffalign.config.fields import setting

TEACHER_SOLVERS = ("euler", "midpoint", "fireflow")


@dataclass
class DistillationConfig(MethodConfig):
    """Settings that all distillation methods share.

    The student has `evaluation.num_inference_steps` steps.
    """

    states_per_image: int = 4
    """Number of states of each teacher trajectory that an update trains on."""

    def __post_init__(self) -> None:
        at_least(self, ("states_per_image",), "algorithm")

    def rows_per_image(self, run: AnyRunConfig) -> int:
        return self.states_per_image


@dataclass
class ReflowConfig(DistillationConfig):
    """Settings of piecewise rectified flow.

    Within each student step the student learns the straight line between the teacher's states.
    """

    type: str = "reflow"
    window_starts: float = 0.5
    """Share of the training states at the beginning of a student step, in 0..1.

    Only these states occur when the student generates with its own number of steps. The remaining training states lie
    anywhere within a student step.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            0 <= self.window_starts <= 1,
            "algorithm.window_starts",
            f"must lie in 0..1, got {self.window_starts}",
        )


@dataclass
class ConsistencyConfig(DistillationConfig):
    """Settings of consistency distillation.

    The student maps every state to the end of its trajectory in one evaluation.
    """

    type: str = "consistency"
    skip: int | None = None
    """Number of teacher steps between a training state and the state of its target (LCM).

    The target is the averaged student's prediction at that later state. With null it is the end of the trajectory,
    which the teacher has computed anyway.
    """
    huber_c: float = setting(0.001, alias="huber_c")
    """Constant c of the pseudo-Huber distance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, ("skip",), "algorithm")
        check(self.huber_c > 0, "algorithm.huber_c", f"must be positive, got {self.huber_c}")


@dataclass
class TeacherConfig(PlanConfig):
    """Settings of the base model's trajectories, which the student learns from."""

    prompts_per_update: int = 32
    """Number of trajectories per update, over all processes."""
    num_inference_steps: int = setting(16, alias="num_ddim_timesteps")
    """Smallest number of teacher steps.

    It is rounded up so that each student step covers the same number of teacher steps.
    """
    guidance_scale: float | None = setting(None, alias="guidance_scale")
    """Guidance scale of the teacher; null for none."""
    solver: str = "euler"
    """Solver of the teacher: euler, midpoint or fireflow.

    The solver midpoint is second order with two evaluations per step; fireflow is for flows only.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, ("prompts_per_update", "num_inference_steps"), "teacher")
        one_of(self.solver, TEACHER_SOLVERS, "teacher.solver")

    @property
    def group(self) -> str:
        return "teacher"


@dataclass
class DistillationRunConfig(AnyRunConfig):
    """Settings of a distillation run.

    The rewards only score held-out prompts: the teacher before training and the student after it.
    """

    output_dir: str = setting("runs/distill", free=True)
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

    @property
    def plan(self) -> TeacherConfig:
        return self.teacher

    @property
    def training_prompts(self) -> PromptsConfig:
        return self.prompts
