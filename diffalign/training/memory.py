"""How much memory a run will need, before anything is loaded: the same graph on the meta device, its tensors counted.

Activations are what autograd keeps of one micro-batch, found by running the denoiser's forward without data, attention
as a fused kernel computes it (CUDA's, xformers'). Peaks inside a layer, the allocator's rounding and the CUDA context
come on top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
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
from diffalign.training.forward import image_size

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
    activations: int
    """Of one micro-batch of training."""

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))

    def __str__(self) -> str:
        rows = [(f.name.replace("_", " "), getattr(self, f.name)) for f in fields(self)]
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in rows)
        return f"memory forecast, GiB for a process: {self.total / GIB:.2f} ({parts})"


def forecast(model: TextToImageModel, config: AnyRunConfig) -> MemoryForecast:
    """Count a run on a model whose modules are on the meta device; they get the run's adapters.

    Args:
        model: from `pipelines.registry.load_meta_model`.
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
    return MemoryForecast(
        denoiser=denoiser,
        text_encoders=sum(parts.values()) - denoiser - autoencoder,
        autoencoder=autoencoder,
        adapters=(3 if isinstance(config, RunConfig) else 2) * trained,
        optimizer=3 * trained,
        activations=activations(model, config),
    )


def size_of(module: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


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
