"""Dataclasses of the settings that all runs share.

An invalid value raises a ConfigError with the name of its field when the dataclass is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from diffalign.config.checks import at_least, check, check_numbers, one_of
from diffalign.config.fields import setting
from diffalign.config.model import LoraConfig, ModelConfig, OptimizerConfig
from diffalign.core.text import RANK

SOLVERS = ("default", "adams_bashforth")


@dataclass
class MethodConfig:
    """Settings of one algorithm, which `type` names."""

    type: str = ""
    """Name of the algorithm, which decides all other settings of this group."""

    def rows_per_image(self, run: AnyRunConfig) -> int:
        """Return the rows of a training batch for one image, or pair, of a micro-batch."""
        return 1


@dataclass
class DrawingConfig:
    """Settings of image generation, for training and for evaluation."""

    height: int | None = setting(None, alias="resolution")
    """Height of the images in pixels; null for the model's."""
    width: int | None = setting(None, alias="resolution")
    """Width of the images in pixels; null for the model's."""
    micro_batch_size: int = setting(64, free=True)
    """Images that one process generates at a time. It changes memory use, never results."""
    merge_lora: bool = False
    """Merge the adapter into the base weights while images are generated.

    Generation for training and evaluation is faster. It needs memory for a second copy of those weights, and the merged
    weights are rounded.
    """

    reward_timeout: float | None = setting(600.0, free=True)
    """Seconds that the run waits for a reward before it stops; null waits forever."""

    def __post_init__(self) -> None:
        check(
            self.reward_timeout is None or self.reward_timeout > 0,
            f"{self.group}.reward_timeout",
            f"must be positive, got {self.reward_timeout}",
        )
        at_least(self, ("micro_batch_size",), self.group)

    @property
    def group(self) -> str:
        """Name of the group of a run's settings that these settings belong to."""
        return "images"


@dataclass
class PlanConfig(DrawingConfig):
    """Settings of generating new images in every update of a run."""

    prompts_per_update: int = 12
    """Number of prompts that an update draws."""

    @property
    def images_per_prompt(self) -> int:
        """Images of each prompt per update."""
        return 1


@dataclass(frozen=True)
class Stored:
    """Numbers of tensors that a run stores of the images of an update.

    Attributes:
        images: images of the update, over all processes.
        prompts: prompts of the update.
        states_on_device: latents of an image's trajectory that stay on the device, besides the final ones.
        states_on_host: latents of an image's trajectory that are moved to CPU memory.
    """

    images: int
    prompts: int
    states_on_device: int = 0
    states_on_host: int = 0


@dataclass
class LoopConfig:
    """Settings that all training loops share."""

    num_updates: int = setting(100, free=True, alias="max_train_steps")
    """Number of updates; in online runs each has a rollout."""
    micro_batch_size: int = setting(64, free=True, alias="train_batch_size")
    """Images that one process trains on at a time. It changes memory use, never results."""
    mixed_precision: str = setting("bf16", alias="mixed_precision")
    """Autocast of forward passes: "bf16" or "no". In fp16 the loss of a large update would underflow."""
    seed: int = setting(0, alias="seed")
    """Seed of all random choices of training."""
    ema_max: float = 0.99
    """Largest decay of the averaged weights, which are evaluated and saved.

    With 0 the current weights are evaluated and saved.
    """
    checkpoint_every: int = setting(20, free=True, alias="checkpointing_steps")
    """Updates between checkpoints."""
    keep_checkpoints: int = setting(2, free=True, alias="checkpoints_total_limit")
    """Number of checkpoints that are kept."""
    eval_every: int = setting(20, free=True)
    """Updates between evaluations on held-out prompts; 0 evaluates only before and after training."""
    sample_every: int = setting(20, free=True)
    """Updates between sample grids; 0 for none."""
    trackers: list[str] = setting(factory=list, free=True, alias="report_to")
    """Names of accelerate's trackers that receive the log and the sample grids.

    Examples are tensorboard, wandb and trackio.
    """
    max_minutes: float | None = setting(None, free=True)
    """Minutes of updates (and rollouts) after which training stops; other work is not counted."""
    total_minutes: float | None = None
    """Minutes for the whole run: start, evaluations, compilation, training and report.

    After the first updates are timed, the run plans as many of `num_updates` as fit, and the learning rate's schedule
    ends with them. The images of evaluations are planned in the same way.
    """

    def __post_init__(self) -> None:
        one_of(self.mixed_precision, ("bf16", "no"), "training.mixed_precision")
        at_least(
            self,
            ("num_updates", "micro_batch_size", "checkpoint_every", "keep_checkpoints"),
            "training",
        )
        for name in ("eval_every", "sample_every"):
            check(
                getattr(self, name) >= 0,
                f"training.{name}",
                f"must not be negative; 0 for none, got {getattr(self, name)}",
            )
        check(0 <= self.ema_max < 1, "training.ema_max", f"must lie in 0..1, got {self.ema_max}")
        at_least(self, ("seed",), "training", least=0)
        for name in ("max_minutes", "total_minutes"):
            minutes = getattr(self, name)
            check(
                minutes is None or minutes > 0,
                f"training.{name}",
                f"must be positive, got {minutes}",
            )


@dataclass
class EvaluationConfig:
    """Settings of scoring on held-out prompts, always with the same seeds."""

    num_inference_steps: int = setting(10, alias="num_inference_steps")
    """Steps of the sampler for evaluation images."""
    solver: str = "default"
    """Solver that generates the evaluation images; see `RolloutConfig.solver`."""
    guidance_scale: float | None = setting(None, alias="guidance_scale")
    """Guidance scale of evaluation images; null for none, or for FLUX's default."""
    images_per_prompt: int = 1
    """Images of each held-out prompt."""
    images_per_task: int | None = None
    """Images of every task, which replaces `images_per_prompt`; the prompts of a task take turns.

    The overall score is a plain mean of the tasks, so one task with few images makes the whole score uncertain.
    """
    max_prompts: int | None = None
    """Largest number of held-out prompts, spread over the set; null for all."""
    seed: int = 1000
    """Seed of the noise of evaluation images."""
    rewards: list[str] = field(default_factory=list)
    """Held-out rewards: they are logged, never trained on, and show if the trained reward was gamed."""

    def __post_init__(self) -> None:
        one_of(self.solver, SOLVERS, "evaluation.solver")
        at_least(
            self,
            ("num_inference_steps", "images_per_task", "images_per_prompt", "max_prompts"),
            "evaluation",
        )
        at_least(self, ("seed",), "evaluation", least=0)


@dataclass
class HeldOutPromptsConfig:
    """Prompts for evaluation.

    A value is `shapes:train`, `shapes:held_out`, `geneval`, or a .txt or .jsonl file.
    """

    evaluation: str = "shapes:held_out"
    """Prompts that are held out: they score the run and are never trained on."""


@dataclass
class PromptsConfig(HeldOutPromptsConfig):
    """Prompts for training and for evaluation."""

    train: str = "shapes:train"
    """Prompts to train on."""
    balance_tasks: bool = True
    """Sample every task (`tag` of the metadata) equally often, however many prompts it has."""
    task_weights: dict[str, float] | None = None
    """Relative sampling frequency of tasks; a task that is not named has weight 1.

    Raise the weight of tasks that the model still has to learn.
    """

    def __post_init__(self) -> None:
        weights = self.task_weights or {}
        check(
            not weights or self.balance_tasks, "prompts.task_weights", "needs prompts.balance_tasks"
        )
        for task, weight in weights.items():
            check(
                0 <= weight < math.inf,
                f"prompts.task_weights.{task}",
                f"must be a finite number, not negative, got {weight}",
            )


@dataclass
class AnyRunConfig:
    """Settings that every run has; base class of each method's run."""

    pairs_per_step: ClassVar[bool] = False
    """True if an optimizer step counts pairs; diffusers' scripts give three factors instead."""
    changes_base: ClassVar[bool] = False
    """True if the run changes and saves the base model's weights."""
    trains_on_rewards: ClassVar[bool] = False
    """True if the rewards are trained on; otherwise they only score held-out prompts."""

    output_dir: str = setting("runs/awm", free=True)
    """Folder of the run. The same command resumes a run in its folder."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    algorithm: MethodConfig = field(default_factory=MethodConfig)
    """Settings of the algorithm, in the dataclass that `algorithm.type` selects."""
    prompts: HeldOutPromptsConfig = field(default_factory=HeldOutPromptsConfig)
    rewards: dict[str, float] = field(default_factory=lambda: {"verifier": 1.0})
    """Reward names of `diffalign list rewards` and their weights."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: LoopConfig = field(default_factory=LoopConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        check_numbers(self)
        check(bool(self.rewards), "rewards", "name at least one reward")
        for name, weight in self.rewards.items():
            check(math.isfinite(weight), f"rewards.{name}", f"needs a finite weight, got {weight}")
        for name in self.evaluation.rewards:
            check(
                name not in {trained.removeprefix(RANK) for trained in self.rewards},
                f"evaluation.rewards.{name}",
                "is trained on (rewards); a held-out reward must be another one",
            )
        check(
            self.model.attention_backend is None or self.training.mixed_precision == "no",
            "model.attention_backend",
            "needs training.mixed_precision=no and a bfloat16 base: under autocast queries are float32, values not",
        )

        for name in ("quantization", "offload_blocks"):
            if not getattr(self.model, name):
                continue
            check(
                not self.changes_base,
                f"model.{name}",
                f"{self.algorithm.type} changes the base model's weights. Remove the setting",
            )
            check(
                not self.drawing.merge_lora,
                f"model.{name}",
                f"adapters cannot be merged into such weights. Set {self.drawing.group}.merge_lora=false",
            )

    @property
    def drawing(self) -> DrawingConfig:
        """Settings of image generation in this run."""
        raise NotImplementedError

    @property
    def plan(self) -> PlanConfig | None:
        """Settings of the images that every update generates, or None."""
        return None

    @property
    def training_prompts(self) -> PromptsConfig | None:
        """Settings of the prompts to train on, or None for runs on pairs or images."""
        return None

    @property
    def encoded_images(self) -> int:
        """Number of images that the run encodes at a time, 0 if it encodes none."""
        return 0

    @property
    def stored(self) -> Stored | None:
        """Tensors that the run stores of an update's images, or None."""
        return None
