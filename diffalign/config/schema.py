"""The dataclasses of a run. A value that cannot be run is refused where it is built, with the name of its field."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from diffalign.errors import UserError

WEIGHTS = ("uniform", "t", "t2", "huber", "ghuber")
SOLVERS = ("default", "adams_bashforth")
LR_SCHEDULERS = ("constant", "linear", "cosine")


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run; the message names the field."""


def _check(condition: bool, path: str, message: str) -> None:
    if not condition:
        raise ConfigError(f"{path}: {message}")


def _one_of(value: str, choices: Sequence[str], path: str) -> None:
    _check(value in choices, path, f"unknown value {value!r}{nearest(value, choices)}")


def _positive(config: object, names: Sequence[str], group: str) -> None:
    for name in names:
        value = getattr(config, name)
        _check(value > 0, f"{group}.{name}", f"must be positive, got {value}")


def nearest(name: str, valid: Sequence[str]) -> str:
    """A hint to append to a message: the closest valid name, or all of them when they are few."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid are {', '.join(sorted(valid))}" if len(valid) <= 20 else ""


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
        _one_of(self.dtype, ("bfloat16", "float16", "float32"), "model.dtype")


@dataclass
class LoraConfig:
    """The adapter that is trained."""

    rank: int = 32
    alpha: float = 64.0
    targets: list[str] | None = None
    """Suffixes of linear layers; None is the family's default, its attention projections."""

    def __post_init__(self) -> None:
        _positive(self, ("rank", "alpha"), "lora")


@dataclass
class AlgorithmConfig:
    """What all algorithms of the online loop share."""

    type: str = ""
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
        _one_of(self.std_scope, ("global", "group"), "algorithm.std_scope")
        _one_of(self.reward_mixing, ("sum", "advantages"), "algorithm.reward_mixing")
        _positive(self, ("advantage_clip",), "algorithm")
        _check(self.kl_beta >= 0, "algorithm.kl_beta", "must not be negative")
        guidance = self.reference_guidance_scale
        _check(
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
            _check(getattr(self, name) >= 0, f"algorithm.{name}", "must not be negative")
        _check(0 <= self.lag_max < 1, "algorithm.lag_max", "must lie in 0..1")
        n = self.timesteps_per_image
        _check(n >= 1, "algorithm.timesteps_per_image", "must be at least 1")
        _check(
            1 <= self.kl_timesteps <= n,
            "algorithm.kl_timesteps",
            f"must lie in 1..timesteps_per_image ({n}), got {self.kl_timesteps}",
        )
        _check(
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
        _one_of(self.weight, WEIGHTS, "algorithm.weight")
        _positive(self, ("ghuber_power", "clip_range", "advantage_max"), "algorithm")


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
        _positive(self, ("mix",), "algorithm")


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
        _positive(self, ("clip_range", "noise_level"), "algorithm")
        _one_of(self.dynamics, ("sde", "cps"), "algorithm.dynamics")
        _check(
            self.dynamics == "sde" or not self.guard,
            "algorithm.guard",
            'is defined for algorithm.dynamics "sde" only',
        )
        _check(
            self.dynamics != "cps" or self.noise_level < 1,
            "algorithm.noise_level",
            f"cps needs less than 1, got {self.noise_level}",
        )
        _check(
            self.window_size is None or self.window_size >= 1,
            "algorithm.window_size",
            "must be at least 1",
        )
        _check(0 < self.window_stop <= 1, "algorithm.window_stop", "must lie in 0..1")


ALGORITHMS: dict[str, type[AlgorithmConfig]] = {
    "awm": AWMConfig,
    "diffusion_nft": DiffusionNFTConfig,
    "flow_grpo": FlowGRPOConfig,
}


@dataclass
class RolloutConfig:
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
        _check(
            self.reward_timeout is None or self.reward_timeout > 0,
            "rollout.reward_timeout",
            "must be positive",
        )
        _check(self.group_size >= 2, "rollout.group_size", "a group needs at least 2 images")
        _one_of(self.solver, SOLVERS, "rollout.solver")
        for name in ("prompts_per_update", "num_inference_steps", "micro_batch_size"):
            _check(getattr(self, name) >= 1, f"rollout.{name}", "must be at least 1")


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
        _positive(self, ("learning_rate", "epsilon", "max_grad_norm"), "optimizer")
        _one_of(self.lr_scheduler, LR_SCHEDULERS, "optimizer.lr_scheduler")
        _check(all(0 <= b < 1 for b in self.betas), "optimizer.betas", "must lie in 0..1")


@dataclass
class TrainingConfig:
    """The loop."""

    num_updates: int = 100
    """Rollouts; with updates_per_rollout = 1 also optimizer steps."""
    updates_per_rollout: int = 1
    micro_batch_size: int = 64
    """Images trained on at a time by one process; a matter of memory, never of results."""
    mixed_precision: str = "bf16"
    """Autocast of forward passes: "bf16" or "no". (The loss of a large update underflows in fp16.)"""
    seed: int = 0
    drop_uninformative: bool = True
    """Leave out groups whose images all got the same reward."""
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
    on_collapse: str = "warn"
    """When the reward has fallen and the gradient has risen for good: "warn", "stop", or "rollback" to the last good
    checkpoint and go on with half the learning rate."""
    max_minutes: float | None = None
    """Stop after this much time, counting rollouts and updates only."""

    def __post_init__(self) -> None:
        _one_of(self.mixed_precision, ("bf16", "no"), "training.mixed_precision")
        _one_of(self.on_collapse, ("warn", "stop", "rollback"), "training.on_collapse")
        for name in ("num_updates", "updates_per_rollout", "micro_batch_size", "checkpoint_every"):
            _check(getattr(self, name) >= 1, f"training.{name}", "must be at least 1")
        _check(self.keep_checkpoints >= 1, "training.keep_checkpoints", "must be at least 1")
        _check(0 <= self.ema_max < 1, "training.ema_max", "must lie in 0..1")


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
        _one_of(self.solver, SOLVERS, "evaluation.solver")
        _check(
            self.num_inference_steps >= 1, "evaluation.num_inference_steps", "must be at least 1"
        )
        _check(
            self.images_per_task is None or self.images_per_task >= 1,
            "evaluation.images_per_task",
            "must be at least 1",
        )
        _check(self.images_per_prompt >= 1, "evaluation.images_per_prompt", "must be at least 1")
        _check(
            self.max_prompts is None or self.max_prompts >= 1,
            "evaluation.max_prompts",
            "must be at least 1",
        )
        _check(self.seed >= 0, "evaluation.seed", "must not be negative")


@dataclass
class PromptsConfig:
    """Where prompts come from: `shapes:train`, `shapes:held_out`, `geneval`, or a .txt / .jsonl file."""

    train: str = "shapes:train"
    evaluation: str = "shapes:held_out"
    balance_tasks: bool = True
    """Draw every task (`tag` of the metadata) equally often, however many prompts it has."""
    task_weights: dict[str, float] | None = None
    """How often a task is drawn compared with one that is not named here: more of those with something to learn."""

    def __post_init__(self) -> None:
        weights = self.task_weights or {}
        _check(
            not weights or self.balance_tasks, "prompts.task_weights", "needs prompts.balance_tasks"
        )
        for task, weight in weights.items():
            _check(
                0 <= weight < math.inf,
                f"prompts.task_weights.{task}",
                f"must be a finite number, not negative, got {weight}",
            )


@dataclass
class RunConfig:
    """Everything that decides a training run."""

    output_dir: str = "runs/awm"
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    algorithm: AlgorithmConfig = field(default_factory=AWMConfig)
    """Of the class that `algorithm.type` names."""
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    rewards: dict[str, float] = field(default_factory=lambda: {"verifier": 1.0})
    """Reward names of `diffalign list rewards` and their weights."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        _check(bool(self.rewards), "rewards", "name at least one reward")
        for name, weight in self.rewards.items():
            _check(math.isfinite(weight), f"rewards.{name}", f"needs a finite weight, got {weight}")
        for name in self.evaluation.rewards:
            _check(
                name not in self.rewards,
                f"evaluation.rewards.{name}",
                "is trained on (rewards); a held-out reward must be another one",
            )
        _check(self.training.seed >= 0, "training.seed", "must not be negative")
        _check(
            self.model.attention_backend is None or self.training.mixed_precision == "no",
            "model.attention_backend",
            "needs training.mixed_precision=no and a bfloat16 base: under autocast queries are float32, values not",
        )
