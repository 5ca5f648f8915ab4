"""The dataclasses of a run. A value that cannot be run is refused where it is built, with the name of its field."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from diffalign.config.checks import check, one_of, positive

WEIGHTS = ("uniform", "t", "t2", "huber", "ghuber")
NOISES = ("fresh", "group", "rollout")
TIMESTEP_SAMPLINGS = ("stratified", "independent")
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
    targets: list[str] | None = None
    """Suffixes of linear layers and convolutions; None is the family's default, its attention projections."""

    def __post_init__(self) -> None:
        positive(self, ("rank", "alpha"), "lora")


@dataclass
class MethodConfig:
    """An algorithm's own settings; `type` names it."""

    type: str = ""


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


ONLINE: dict[str, type[AlgorithmConfig]] = {
    "awm": AWMConfig,
    "diffusion_nft": DiffusionNFTConfig,
    "flow_grpo": FlowGRPOConfig,
}


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

    def __post_init__(self) -> None:
        one_of(self.mixed_precision, ("bf16", "no"), "training.mixed_precision")
        for name in ("num_updates", "micro_batch_size", "checkpoint_every", "keep_checkpoints"):
            check(getattr(self, name) >= 1, f"training.{name}", "must be at least 1")
        for name in ("eval_every", "sample_every"):
            check(getattr(self, name) >= 0, f"training.{name}", "must not be negative; 0 for none")
        check(0 <= self.ema_max < 1, "training.ema_max", "must lie in 0..1")
        check(self.seed >= 0, "training.seed", "must not be negative")


@dataclass
class TrainingConfig(LoopConfig):
    """The online loop. `num_updates` counts rollouts; with updates_per_rollout = 1 these are also optimizer steps."""

    updates_per_rollout: int = 1
    drop_uninformative: bool = True
    """Leave out groups whose images all got the same reward."""
    on_collapse: str = "warn"
    """When the reward has fallen and the gradient has risen for good: "warn", "stop", or "rollback" to the last good
    checkpoint and go on with half the learning rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.on_collapse, ("warn", "stop", "rollback"), "training.on_collapse")
        check(self.updates_per_rollout >= 1, "training.updates_per_rollout", "must be at least 1")


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
    """What every run has."""

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


@dataclass
class RunConfig(AnyRunConfig):
    """Everything that decides an online run."""

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
