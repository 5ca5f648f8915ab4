"""Settings of the base model, of the weights that are trained, and of their optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffalign.config.checks import check, one_of, positive
from diffalign.config.fields import setting

LR_SCHEDULERS = ("constant", "linear", "cosine")
QUANTIZATIONS = ("int8", "int4", "nf4", "fp8")
OPTIMIZERS = ("adamw", "adamw8bit")


@dataclass
class ModelConfig:
    """Settings of the base model."""

    name: str = setting("shapes-sd3", alias="pretrained_model_name_or_path")
    """Name of `diffalign list models`, a folder in diffusers' layout, or a hub id."""
    revision: str | None = setting(None, alias="revision")
    """Branch, tag or commit of a hub id; null for the newest."""
    dtype: str = "bfloat16"
    """Dtype of the frozen base model: bfloat16, float16 or float32. LoRA weights are always float32."""
    max_sequence_length: int | None = setting(None, alias="max_sequence_length")
    """Largest number of T5 tokens per prompt; None for the model's default."""
    attention_backend: str | None = setting(None, free=True)
    """Attention backend of diffusers, such as "xformers", "flash" or "native"; None keeps the default."""
    gradient_checkpointing: bool = setting(False, free=True, alias="gradient_checkpointing")
    """Recompute activations in the backward pass: far less memory, one more forward."""
    compile: bool = setting(False, free=True)
    """Compile each block of the denoiser with torch.compile: a slower start, then faster steps."""
    quantization: str | None = None
    """Format of the frozen denoiser's weights: int8, int4, nf4 or fp8; null for `dtype`.

    The LoRA is trained over the quantised weights (QLoRA). int8 and int4 run wherever torch does, nf4 needs CUDA and
    bitsandbytes, and fp8 needs torchao.
    """
    offload_encoders: bool = setting(False, free=True)
    """Keep text encoders and autoencoder in CPU memory while they do not work.

    Results are the same."""
    offload_blocks: bool = setting(False, free=True)
    """Keep the denoiser's blocks in CPU memory, each but for its forward.

    Results are the same, and every forward waits for the transfers. It needs `gradient_checkpointing`.
    """
    embeds_cache: str | None = setting(None, free=True)
    """Folder for prompt embeddings, which all runs may share; null keeps them in memory only."""
    memory: str | None = setting(None, free=True)
    """Choice of memory settings: "auto", or null for the settings as they are.

    With "auto" the run starts with the first combination that fits, the cheapest in time and in precision first.
    """

    def __post_init__(self) -> None:
        one_of(self.dtype, ("bfloat16", "float16", "float32"), "model.dtype")
        if self.quantization is not None:
            one_of(self.quantization, QUANTIZATIONS, "model.quantization")
        if self.memory is not None:
            one_of(self.memory, ("auto",), "model.memory")
        check(
            not self.offload_blocks or self.gradient_checkpointing,
            "model.offload_blocks",
            "needs the weights of a block again in its backward pass. Set model.gradient_checkpointing=true",
        )
        check(
            not (self.offload_blocks and self.compile),
            "model.offload_blocks",
            "compiled blocks cannot be moved between devices. Set model.compile=false",
        )


@dataclass
class LoraConfig:
    """Settings of the LoRA adapter that is trained."""

    rank: int = setting(32, alias="rank")
    """Rank of the adapter."""
    alpha: float = setting(64.0, alias="lora_alpha")
    """Numerator of the adapter's scale, alpha / rank. An override of the rank alone keeps the recipe's ratio."""
    targets: list[str] | None = setting(None, alias="lora_layers")
    """Name suffixes of the adapted linear layers and convolutions.

    None selects the attention projections of the model family.
    """

    def __post_init__(self) -> None:
        positive(self, ("rank", "alpha"), "lora")


@dataclass
class OptimizerConfig:
    """Settings of AdamW on the weights that are trained."""

    type: str = "adamw"
    """Optimizer: "adamw", or "adamw8bit" with moments of 8 bits, which needs torchao."""
    learning_rate: float = setting(3e-4, alias="learning_rate")
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of AdamW's two moments."""
    weight_decay: float = setting(1e-4, alias="adam_weight_decay")
    """Decoupled weight decay of AdamW."""
    epsilon: float = setting(1e-8, alias="adam_epsilon")
    """Number that AdamW adds to the root of the second moment."""
    max_grad_norm: float = setting(1.0, alias="max_grad_norm")
    """Largest norm of the gradient; a larger gradient is scaled down to it."""
    warmup_updates: int = setting(0, alias="lr_warmup_steps")
    """Optimizer steps over which the learning rate rises from zero."""
    lr_scheduler: str = setting("constant", alias="lr_scheduler")
    """Schedule after the warm-up: "constant", or "linear" or "cosine" to zero.

    The falling schedules reach zero at the run's last planned step.
    """

    def __post_init__(self) -> None:
        one_of(self.type, OPTIMIZERS, "optimizer.type")
        positive(self, ("learning_rate", "epsilon", "max_grad_norm"), "optimizer")
        rate, decay = self.learning_rate, self.weight_decay
        check(math.isfinite(rate), "optimizer.learning_rate", f"must be finite, got {rate}")
        check(
            0 <= decay < math.inf,
            "optimizer.weight_decay",
            f"must be finite and not negative, got {decay}",
        )
        one_of(self.lr_scheduler, LR_SCHEDULERS, "optimizer.lr_scheduler")
        check(
            all(0 <= b < 1 for b in self.betas),
            "optimizer.betas",
            f"must lie in 0..1, got {self.betas}",
        )
