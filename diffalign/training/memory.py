"""Forecast the memory of a run before any weights are loaded.

The denoiser runs on the meta device, without data, and the tensors of its graph are counted. Activations are the
tensors that autograd saves for one micro-batch, with attention as a fused kernel computes it (CUDA's, xformers'). The
forecast does not include peaks inside a layer, the allocator's rounding and the CUDA context.
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
from diffalign.config import AnyRunConfig
from diffalign.config.methods import trainer_class
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.compiled import blocks
from diffalign.pipelines.sampling import EmbedCache
from diffalign.training.denoise import image_size

GIB = 2**30
FLOAT32 = 4


@dataclass(frozen=True)
class MemoryForecast:
    """Memory of one process, in bytes."""

    denoiser: int
    text_encoders: int
    autoencoder: int
    adapters: int
    """Float32 copies of the LoRA: current, averaged, and for online runs lagged."""
    optimizer: int
    """Gradients and two moments of the LoRA, float32."""
    rollout: int
    """Latents, trajectories and prompt embeddings of an online update.

    Only Flow-GRPO has trajectories. Latents and trajectories count twice: for all images, and for the copies of those
    that are trained on.
    """
    activations: int
    """Activations of one micro-batch of training."""
    merged_weights: int
    """Copies of the weights that carry an adapter, which `merge_lora` makes for sampling."""
    host: int
    """CPU memory, not part of the total.

    It has embeddings that are cached for later updates, and states of `noise: rollout`.
    """

    @property
    def total(self) -> int:
        """Memory of the whole run on the device.

        Images are sampled before training, so that merged weights and activations do not exist at the same time: the
        larger of the two counts.
        """
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
    """Forecast the memory of a run, with a model on the meta device.

    The run's adapters are attached to the model.

    Args:
        model: model from `pipelines.registry.load_meta_model`.
        processes: number of processes that share the images of an update.
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
    # the current policy, and those that the method's trainer has besides it
    policies = 1 + len(trainer_class(config.algorithm.type).policies_of(config))
    rollout, host = kept_of_rollout(model, config, processes=processes)
    return MemoryForecast(
        denoiser=denoiser,
        text_encoders=sum(parts.values()) - denoiser - autoencoder,
        autoencoder=autoencoder,
        adapters=policies * trained,
        optimizer=3 * trained,
        rollout=rollout,
        activations=activations(model, config),
        merged_weights=adapted(model.denoiser) if config.drawing.merge_lora else 0,
        host=host,
    )


def size_of(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def adapted(denoiser: nn.Module) -> int:
    """Return the bytes of the base weights that carry an adapter, which `lora.merged` copies."""
    layers = [m for m in denoiser.modules() if isinstance(m, BaseTunerLayer)]
    weights = [layer.get_base_layer().weight for layer in layers]
    return sum(w.numel() * w.element_size() for w in weights)


def kept_of_rollout(
    model: TextToImageModel, config: AnyRunConfig, *, processes: int
) -> tuple[int, int]:
    """Return the bytes that one process stores for a rollout: on its device, and on the CPU."""
    stored = config.stored
    if stored is None:
        return 0, 0
    base = getattr(torch, config.model.dtype)
    tokens, width, pooled = model.prompt_shape()
    prompt = (tokens * width + pooled) * base.itemsize
    latents = math.prod(model.latent_shape(image_size(config, model)))
    latents *= (model.latents_dtype or base).itemsize
    # Latents count twice, because the training batch is a copy. It has all images if no group is dropped.
    images = 2 * -(-stored.images // processes)
    rollout = images * latents * (1 + stored.states_on_device) + stored.prompts * prompt
    num_prompts = stored.prompts * config.training.num_updates
    host = min(EmbedCache(model).size, num_prompts) * prompt
    return rollout, host + images * latents * stored.states_on_host


def activations(model: TextToImageModel, config: AnyRunConfig) -> int:
    """Return the bytes that autograd saves for one micro-batch, with the adapters attached."""
    dtype = getattr(torch, config.model.dtype)
    autocast = config.training.mixed_precision != "no"
    # autocast computes adapters in the base model's dtype
    if autocast:
        for parameter in model.denoiser.parameters():
            parameter.data = parameter.data.to(dtype)
    rows = config.training.micro_batch_size * config.algorithm.rows_per_image(config)
    size = image_size(config, model)
    latents, times, embeds = model.random_inputs(rows, size)
    model.denoiser.train()
    if config.model.gradient_checkpointing:
        model.denoiser.enable_gradient_checkpointing()

    def forward() -> Tensor:
        with AsOnDevice(dtype if autocast else None):
            return model.predict(latents, times, embeds).float().square().mean()

    saved = saved_bytes(model.denoiser, forward)
    # checkpointing recomputes one block at a time, whose tensors come on top
    if config.model.gradient_checkpointing:
        model.denoiser.disable_gradient_checkpointing()
        saved += saved_bytes(model.denoiser, forward) // max(1, len(blocks(model.denoiser)))
    model.denoiser.eval()
    return saved


def saved_bytes(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Return the bytes of all tensors that autograd saves in a forward, without parameters."""
    held = {p.untyped_storage()._cdata for p in module.parameters()}
    storages: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # the dictionary holds a reference to the tensor, so that its address is not reused
        if storage._cdata not in held:
            storages[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(size for size, _ in storages.values())


class AsOnDevice(TorchFunctionMode):
    """Mode in which the meta device saves the tensors that a GPU saves.

    Attention saves the tensors of a fused kernel. The plain kernel, which the meta device uses, saves all
    probabilities. Products of float32 tensors (SANA's linear attention) have the dtype of autocast, which the meta
    device does not support.
    """

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
        tensors = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        return _Kept.apply(tensors["query"], tensors["key"], tensors["value"])  # type: ignore[no-untyped-call]


class _Kept(torch.autograd.Function):
    """Attention that saves the tensors of a fused kernel. It has no backward, which a forecast never calls."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, length, _ = query.shape
        # fused kernels allocate (rows, length, heads, channels) and return it transposed
        out = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        norms = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, norms)
        return out
