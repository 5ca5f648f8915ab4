"""The dataclasses of a run. A value that cannot be run is refused where it is built, with the name of its field."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from diffalign.config.checks import check, check_numbers, one_of, positive

SOLVERS = ("default", "adams_bashforth")
LR_SCHEDULERS = ("constant", "linear", "cosine")


@dataclass
class ModelConfig:
    """The base model."""

    name: str = "shapes-sd3"
    """A name of `diffalign list models`, a folder in diffusers' layout, or a hub id."""
    revision: str | None = None
    dtype: str = "bfloat16"
    """Of the frozen base: bfloat16, float16 or float32. LoRA weights are always float32."""
    max_sequence_length: int | None = None
    """Tokens of T5; None is the model's own default."""
    attention_backend: str | None = None
    """A diffusers attention backend, for instance "xformers", "flash" or "native"; None leaves it alone."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """torch.compile of the denoiser's blocks, one after the other (regional): slower to start, faster steps."""

    def __post_init__(self) -> None:
        one_of(self.dtype, ("bfloat16", "float16", "float32"), "model.dtype")


@dataclass
class LoraConfig:
    """The adapter that is trained."""

    rank: int = 32
    alpha: float = 64.0
    """The adapter is scaled by alpha / rank. A rank that is set alone keeps the ratio of its recipe."""
    targets: list[str] | None = None
    """Suffixes of linear layers and convolutions; None is the family's default, its attention projections."""

    def __post_init__(self) -> None:
        positive(self, ("rank", "alpha"), "lora")


@dataclass
class MethodConfig:
    """An algorithm's own settings; `type` names it."""

    type: str = ""


@dataclass
class DrawingConfig:
    """How images are made, whatever for."""

    height: int | None = None
    width: int | None = None
    micro_batch_size: int = 64
    """Images made at a time by one process; a matter of memory, never of results."""
    merge_lora: bool = False
    """Add the adapter into the base's weights while images are made, for training and evaluation: faster, at the price
    of memory for a second copy of those weights, and of their rounding."""

    reward_timeout: float | None = 600.0
    """Seconds without a reward after which the run stops; null waits for ever."""

    def __post_init__(self) -> None:
        check(
            self.reward_timeout is None or self.reward_timeout > 0,
            f"{self.group}.reward_timeout",
            "must be positive",
        )
        check(self.micro_batch_size >= 1, f"{self.group}.micro_batch_size", "must be at least 1")

    @property
    def group(self) -> str:
        """What these settings are called in a run."""
        return "images"


@dataclass
class OptimizerConfig:
    """AdamW on the LoRA weights."""

    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    warmup_updates: int = 0
    """Optimizer steps over which the rate rises from zero."""
    lr_scheduler: str = "constant"
    """After the warm-up: "constant", or "linear" or "cosine" down to zero at the run's last planned step."""

    def __post_init__(self) -> None:
        positive(self, ("learning_rate", "epsilon", "max_grad_norm"), "optimizer")
        rate, decay = self.learning_rate, self.weight_decay
        check(math.isfinite(rate), "optimizer.learning_rate", f"must be finite, got {rate}")
        check(
            0 <= decay < math.inf,
            "optimizer.weight_decay",
            f"must be finite and not negative, got {decay}",
        )
        one_of(self.lr_scheduler, LR_SCHEDULERS, "optimizer.lr_scheduler")
        check(all(0 <= b < 1 for b in self.betas), "optimizer.betas", "must lie in 0..1")


@dataclass
class LoopConfig:
    """What all loops share."""

    num_updates: int = 100
    micro_batch_size: int = 64
    """Images trained on at a time by one process; a matter of memory, never of results."""
    mixed_precision: str = "bf16"
    """Autocast of forward passes: "bf16" or "no". (The loss of a large update underflows in fp16.)"""
    seed: int = 0
    ema_max: float = 0.99
    """Largest decay of the averaged weights that are evaluated and saved; 0 evaluates the current ones."""
    checkpoint_every: int = 20
    keep_checkpoints: int = 2
    eval_every: int = 20
    """Updates between evaluations on held-out prompts; 0 evaluates only before and after."""
    sample_every: int = 20
    """Updates between sample grids; 0 for none."""
    trackers: list[str] = field(default_factory=list)
    """Trackers of accelerate that also get the log and the sample grids: tensorboard, wandb, trackio, ..."""
    max_minutes: float | None = None
    """Stop after this much time, counting updates (and rollouts) only."""
    total_minutes: float | None = None
    """Time for the whole run: start, evaluations, compilation, training, report. Once the first updates are measured,
    so many of `num_updates` are planned as fit, and the learning rate's schedule ends with them; likewise images of
    evaluations."""

    def __post_init__(self) -> None:
        one_of(self.mixed_precision, ("bf16", "no"), "training.mixed_precision")
        for name in ("num_updates", "micro_batch_size", "checkpoint_every", "keep_checkpoints"):
            check(getattr(self, name) >= 1, f"training.{name}", "must be at least 1")
        for name in ("eval_every", "sample_every"):
            check(getattr(self, name) >= 0, f"training.{name}", "must not be negative; 0 for none")
        check(0 <= self.ema_max < 1, "training.ema_max", "must lie in 0..1")
        check(self.seed >= 0, "training.seed", "must not be negative")
        for name in ("max_minutes", "total_minutes"):
            minutes = getattr(self, name)
            check(
                minutes is None or minutes > 0,
                f"training.{name}",
                f"must be positive, got {minutes}",
            )


@dataclass
class EvaluationConfig:
    """Scoring on held-out prompts, always the same seeds."""

    num_inference_steps: int = 10
    solver: str = "default"
    """As in rollout."""
    guidance_scale: float | None = None
    images_per_prompt: int = 1
    images_per_task: int | None = None
    """Instead: so many images of every task, its prompts in turn. The overall score is a plain mean of the tasks, so
    one task with few images makes all of it uncertain."""
    max_prompts: int | None = None
    seed: int = 1000
    rewards: list[str] = field(default_factory=list)
    """Rewards that are only looked at, never trained on: they show whether the trained one was gamed."""

    def __post_init__(self) -> None:
        one_of(self.solver, SOLVERS, "evaluation.solver")
        check(self.num_inference_steps >= 1, "evaluation.num_inference_steps", "must be at least 1")
        check(
            self.images_per_task is None or self.images_per_task >= 1,
            "evaluation.images_per_task",
            "must be at least 1",
        )
        check(self.images_per_prompt >= 1, "evaluation.images_per_prompt", "must be at least 1")
        check(
            self.max_prompts is None or self.max_prompts >= 1,
            "evaluation.max_prompts",
            "must be at least 1",
        )
        check(self.seed >= 0, "evaluation.seed", "must not be negative")


@dataclass
class HeldOutPromptsConfig:
    """Where prompts come from: `shapes:train`, `shapes:held_out`, `geneval`, or a .txt / .jsonl file."""

    evaluation: str = "shapes:held_out"


@dataclass
class PromptsConfig(HeldOutPromptsConfig):
    """Those of evaluation, and those that images are made of for training."""

    train: str = "shapes:train"
    balance_tasks: bool = True
    """Draw every task (`tag` of the metadata) equally often, however many prompts it has."""
    task_weights: dict[str, float] | None = None
    """How often a task is drawn compared with one that is not named here: more of those with something to learn."""

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
    """Settings that every run has."""

    aliases: ClassVar[dict[str, Any]] = {}
    """Flags of diffusers' training scripts that mean these settings in this kind of run."""
    pairs_per_step: ClassVar[bool] = False
    """An optimizer step is a number of pairs, which diffusers' scripts give as three factors."""

    output_dir: str = "runs/awm"
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    algorithm: MethodConfig = field(default_factory=MethodConfig)
    """Of the class that `algorithm.type` names."""
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
                name not in self.rewards,
                f"evaluation.rewards.{name}",
                "is trained on (rewards); a held-out reward must be another one",
            )
        check(
            self.model.attention_backend is None or self.training.mixed_precision == "no",
            "model.attention_backend",
            "needs training.mixed_precision=no and a bfloat16 base: under autocast queries are float32, values not",
        )

    @property
    def drawing(self) -> DrawingConfig:
        """How images are made."""
        raise NotImplementedError
