"""How much memory a run will need, before anything is loaded: the same graph on the meta device, its tensors counted.

Activations are what autograd keeps of one micro-batch, found by running the denoiser's forward without data, attention
as a fused kernel computes it (CUDA's, xformers'). Peaks inside a layer, the allocator's rounding and the CUDA context
come on top.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffalign import lora
from diffalign.config import (
    AnyRunConfig,
    DCGenConfig,
    DistillationConfig,
    FlowGRPOConfig,
    ForwardProcessConfig,
    PreferenceAlgorithmConfig,
    RunConfig,
)
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.compiled import blocks
from diffalign.pipelines.sampling import EmbedCache
from diffalign.training.denoise import image_size

GIB = 2**30
FLOAT32 = 4


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes of one process."""

    denoiser: int
    text_encoders: int
    autoencoder: int
    adapters: int
    """Float32 copies of the LoRA: current, averaged, and online the lagged one."""
    optimizer: int
    """Gradients and two moments, float32."""
    rollout: int
    """What an online update keeps of its images: latents and, of Flow-GRPO, trajectories, all of them and once more
    those that are trained on; embeddings of its prompts."""
    activations: int
    """Of one micro-batch of training."""
    merged_weights: int
    """A second copy of the weights that carry an adapter (`merge_lora`), while images are made."""
    host: int
    """Beside the total, on the CPU: embeddings that are kept for later updates, and states of `noise: rollout`."""

    @property
    def total(self) -> int:
        """Images are made before anything is trained on: of activations and merged weights the larger counts."""
        always = self.denoiser + self.text_encoders + self.autoencoder + self.adapters
        return always + self.optimizer + self.rollout + max(self.activations, self.merged_weights)

    def __str__(self) -> str:
        names = ("denoiser", "text_encoders", "autoencoder", "adapters", "optimizer", "rollout")
        sizes = {n.replace("_", " "): getattr(self, n) for n in names}
        shown = [f"{name} {size / GIB:.2f}" for name, size in sizes.items() if size]
        last = f"activations {self.activations / GIB:.2f}"
        if self.merged_weights:
            last += f" or merged weights {self.merged_weights / GIB:.2f}"
        text = f"memory forecast, GiB for a process: {self.total / GIB:.2f} ({', '.join([*shown, last])})"
        return f"{text}, and up to {self.host / GIB:.2f} on the CPU" if self.host else text


def forecast(
    model: TextToImageModel, config: AnyRunConfig, *, processes: int = 1
) -> MemoryForecast:
    """Count a run on a model whose modules are on the meta device; they get the run's adapters.

    Args:
        model: from `pipelines.registry.load_meta_model`.
        processes: those that share the images of an update.
    """
    parts = {
        name: size_of(part)
        for name, part in model.pipeline.components.items()
        if isinstance(part, nn.Module)
    }
    denoiser = size_of(model.denoiser)
    autoencoder = parts.get("vae", 0)
    targets = config.lora.targets or model.lora_targets
    parameters = lora.attach(
        model.denoiser, rank=config.lora.rank, alpha=config.lora.alpha, targets=targets, policies=()
    )
    trained = sum(p.numel() for p in parameters) * FLOAT32
    rollout, host = kept_of_rollout(model, config, processes=processes)
    return MemoryForecast(
        denoiser=denoiser,
        text_encoders=sum(parts.values()) - denoiser - autoencoder,
        autoencoder=autoencoder,
        adapters=(3 if isinstance(config, RunConfig) else 2) * trained,
        optimizer=3 * trained,
        rollout=rollout,
        activations=activations(model, config),
        merged_weights=adapted(model.denoiser) if config.drawing.merge_lora else 0,
        host=host,
    )


def size_of(module: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def adapted(denoiser: nn.Module) -> int:
    """Bytes of the base's weights that carry an adapter: what `lora.merged` makes anew."""
    layers = [m for m in denoiser.modules() if isinstance(m, BaseTunerLayer)]
    weights = [layer.get_base_layer().weight for layer in layers]
    return sum(w.numel() * w.element_size() for w in weights)


def kept_of_rollout(
    model: TextToImageModel, config: AnyRunConfig, *, processes: int
) -> tuple[int, int]:
    """Bytes that one process keeps of an update's images: on its device, and on the CPU."""
    if not isinstance(config, RunConfig):
        return 0, 0
    drawn, algorithm = config.rollout, config.algorithm
    base = getattr(torch, config.model.dtype)
    tokens, width, pooled = model.prompt_shape()
    prompt = (tokens * width + pooled) * base.itemsize
    latents = math.prod(model.latent_shape(*image_size(config, model)))
    latents *= (model.latents_dtype or base).itemsize
    # twice: the batch that is trained on is a copy, of all images where no group is dropped
    images = 2 * -(-drawn.images_per_update // processes)
    rollout = images * latents + drawn.prompts_per_update * prompt
    asked = drawn.prompts_per_update * config.training.num_updates
    host = min(EmbedCache(model).size, asked) * prompt
    if isinstance(algorithm, FlowGRPOConfig):
        rollout += images * latents * (_rows_per_image(config) + 1)
    elif isinstance(algorithm, ForwardProcessConfig) and algorithm.noise == "rollout":
        host += images * latents * (drawn.num_inference_steps + 1)
    return rollout, host


def activations(model: TextToImageModel, config: AnyRunConfig) -> int:
    """Bytes that autograd keeps of one micro-batch, with the adapters in place."""
    dtype = getattr(torch, config.model.dtype)
    autocast = config.training.mixed_precision != "no"
    if autocast:  # it computes adapters in the base's dtype
        for parameter in model.denoiser.parameters():
            parameter.data = parameter.data.to(dtype)
    rows = config.training.micro_batch_size * _rows_per_image(config)
    size = image_size(config, model)
    latents, times, embeds = model.random_inputs(rows, *size)
    model.denoiser.train()
    if config.model.gradient_checkpointing:
        model.denoiser.enable_gradient_checkpointing()

    def forward() -> Tensor:
        with AsOnDevice(dtype if autocast else None):
            return model.predict(latents, times, embeds).float().square().mean()

    kept = saved_bytes(model.denoiser, forward)
    if config.model.gradient_checkpointing:  # and one block at a time is computed again
        model.denoiser.disable_gradient_checkpointing()
        kept += saved_bytes(model.denoiser, forward) // max(1, len(blocks(model.denoiser)))
    model.denoiser.eval()
    return kept


def saved_bytes(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of all tensors that autograd keeps of a forward, without parameters."""
    held = {p.untyped_storage()._cdata for p in module.parameters()}
    found: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:  # the tensor is held on to, so that no address is used again
            found[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(size for size, _ in found.values())


class AsOnDevice(TorchFunctionMode):
    """On the meta device, what a fused attention kernel keeps, where the plain one, which is taken there, keeps all
    probabilities; and products of float32 tensors (SANA's linear attention) in the dtype of autocast, which meta has
    none of."""

    def __init__(self, autocast: torch.dtype | None) -> None:
        super().__init__()
        self._autocast = autocast

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.matmul and self._autocast is not None:
            args = tuple(a.to(self._autocast) for a in args)
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        return _Kept.apply(given["query"], given["key"], given["value"])


class _Kept(torch.autograd.Function):
    """Forward only: nothing is ever propagated back through it."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, length, _ = query.shape
        out = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)  # as kernels do
        norms = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, norms)
        return out


def _rows_per_image(config: AnyRunConfig) -> int:
    algorithm = config.algorithm
    if isinstance(algorithm, PreferenceAlgorithmConfig):
        return (1 if algorithm.loss_type == "sft" else 2) * algorithm.timesteps_per_pair
    if isinstance(algorithm, DistillationConfig):
        return algorithm.states_per_image
    if isinstance(algorithm, DCGenConfig):
        return 1
    if isinstance(algorithm, ForwardProcessConfig):
        return algorithm.timesteps_per_image
    assert isinstance(algorithm, FlowGRPOConfig)
    assert isinstance(config, RunConfig)
    return algorithm.window_size or config.rollout.num_inference_steps - 1
