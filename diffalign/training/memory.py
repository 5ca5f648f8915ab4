"""Forecast the memory of a run before any weights are loaded.

The denoiser runs on the meta device, without data, and the tensors that it makes are counted as they come and go:
forward and backward of one micro-batch, one step of drawing, decoding and encoding of images. Attention counts as a
fused kernel computes it (CUDA's, xformers'). The forecast does not include buffers inside a kernel, the allocator's
rounding, reward models and the CUDA context.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffalign import lora
from diffalign.config import AnyRunConfig
from diffalign.config.methods import trainer_class
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.compiled import blocks
from diffalign.pipelines.sampling import EmbedCache
from diffalign.training.denoise import image_size
from diffalign.training.optimizers import moment_bytes
from diffalign.training.peak import AsOnDevice, peak_of, step_as_on_device
from diffalign.training.quantized import pack_on_meta

GIB = 2**30
FLOAT32 = 4


@dataclass(frozen=True)
class MemoryForecast:
    """Memory of one process, in bytes."""

    denoiser: int
    """Denoiser on the device; without the blocks that are offloaded, but for the largest."""
    text_encoders: int
    autoencoder: int
    adapters: int
    """Float32 copies of the trained weights: current, averaged, and for online runs lagged."""
    optimizer: int
    """Gradients and two moments of the trained weights."""
    rollout: int
    """Latents, trajectories and prompt embeddings of an online update.

    Only Flow-GRPO has trajectories. Latents and trajectories count twice: for all images, and for the copies of those
    that are trained on.
    """
    activations: int
    """Peak of a forward and backward on one micro-batch of training."""
    sampling: int = 0
    """Peak of one forward that draws images."""
    decoding: int = 0
    """Peak of decoding one batch of images."""
    encoding: int = 0
    """Peak of encoding one batch of images, for runs on pairs or images."""
    merged_weights: int = 0
    """Copies of the weights that carry an adapter, which `merge_lora` makes for sampling."""
    host: int = 0
    """CPU memory, not part of the total.

    It has embeddings that are cached for later updates, states of `noise: rollout`, and parts that are offloaded.
    """
    encoders_rest: bool = False
    """True if text encoders and autoencoder are on the device only while they work."""

    @property
    def always(self) -> dict[str, int]:
        """Parts that are on the device at all times."""
        names = ("denoiser", "text_encoders", "autoencoder", "adapters", "optimizer", "rollout")
        resting = ("text_encoders", "autoencoder") if self.encoders_rest else ()
        return {name: getattr(self, name) for name in names if name not in resting}

    @property
    def phases(self) -> dict[str, int]:
        """Memory of each phase of a run, besides the parts that are always there."""
        visitor = self.autoencoder if self.encoders_rest else 0
        return {
            "training": self.activations,
            "drawing": self.merged_weights + max(self.sampling, self.decoding + visitor),
            "encoding": max(
                self.encoding + visitor if self.encoding else 0,
                self.text_encoders if self.encoders_rest else 0,
            ),
        }

    @property
    def total(self) -> int:
        """Memory of the whole run on the device.

        Phases follow each other, so that the largest counts.
        """
        return sum(self.always.values()) + max(self.phases.values())

    def __str__(self) -> str:
        shown = [
            f"{name.replace('_', ' ')} {size / GIB:.2f}"
            for name, size in self.always.items()
            if size
        ]
        phases = [f"{name} {size / GIB:.2f}" for name, size in self.phases.items() if size]
        parts = f"{', '.join(shown)}, and the largest of {', '.join(phases)}"
        text = f"memory forecast, GiB for a process: {self.total / GIB:.2f} ({parts})"
        return f"{text}, and up to {self.host / GIB:.2f} on the CPU" if self.host else text


def forecast(
    model: TextToImageModel, config: AnyRunConfig, *, processes: int = 1
) -> MemoryForecast:
    """Forecast the memory of a run, with a model on the meta device.

    The denoiser is quantised as configured, and the run's adapters are attached to it.

    Args:
        model: model from `pipelines.registry.load_meta_model`.
        processes: number of processes that share the images of an update.
    """
    return MetaRun(model, config).forecast(config, processes=processes)


class MetaRun:
    """Run on the meta device, whose memory is forecast with various memory settings.

    Sizes are counted once, and each peak is measured once.

    Args:
        model: model from `pipelines.registry.load_meta_model`. Its denoiser is quantised, and gets adapters.
        config: settings of the run. `forecast` may be asked with others of `model.gradient_checkpointing`,
            `model.offload_*`, `optimizer.type`, `merge_lora` and micro-batches, but not of other settings.
    """

    def __init__(self, model: TextToImageModel, config: AnyRunConfig) -> None:
        self.model = model
        saved = pack_on_meta(model.denoiser, config.model.quantization)
        parts = {
            name: size_of(part)
            for name, part in model.pipeline.components.items()
            if isinstance(part, nn.Module)
        }
        self.denoiser, self.autoencoder = size_of(model.denoiser) - saved, parts.get("vae", 0)
        self.encoders = sum(parts.values()) - size_of(model.denoiser) - self.autoencoder
        self.offloaded = _offloaded(model.denoiser)
        self.parameters = lora.attach(
            model.denoiser,
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            targets=config.lora.targets or model.lora_targets,
            policies=(),
        )
        self.trained = sum(p.numel() for p in self.parameters) * FLOAT32
        self.adapted = adapted(model.denoiser)
        self.peaks = Peaks(model, config)

    def forecast(self, config: AnyRunConfig, *, processes: int = 1) -> MemoryForecast:
        """Forecast the memory of one of `processes` processes."""
        return replace(
            self.resident(config, processes=processes),
            activations=self.peaks.training(config),
            sampling=self.peaks.sampling(config),
            decoding=self.peaks.decoding(config),
            encoding=self.peaks.encoding(config),
        )

    def resident(self, config: AnyRunConfig, *, processes: int = 1) -> MemoryForecast:
        """Return a forecast whose peaks are 0: a lower bound that needs no measurement."""
        c = config.model
        # the current policy, and those that the method's trainer has besides it
        policies = 1 + len(trainer_class(config.algorithm.type).policies_of(config))
        rollout, host = kept_of_rollout(self.model, config, processes=processes)
        offloaded = self.offloaded if c.offload_blocks else 0
        resting = self.encoders + self.autoencoder if c.offload_encoders else 0
        return MemoryForecast(
            denoiser=self.denoiser - offloaded,
            text_encoders=self.encoders,
            autoencoder=self.autoencoder,
            adapters=policies * self.trained,
            optimizer=self.trained + moment_bytes(self.parameters, config.optimizer.type),
            rollout=rollout,
            activations=0,
            merged_weights=self.adapted if config.drawing.merge_lora else 0,
            host=host + offloaded + resting,
            encoders_rest=c.offload_encoders,
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


def _offloaded(denoiser: nn.Module) -> int:
    """Return the bytes of all blocks but the largest, which the device holds."""
    sizes = [size_of(block) for block in blocks(denoiser)]
    return sum(sizes) - max(sizes, default=0)


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


class Peaks:
    """Peaks of a run's phases, measured on the meta device once for each setting.

    Args:
        model: model on the meta device, with its adapters.
        config: settings of the run.
    """

    def __init__(self, model: TextToImageModel, config: AnyRunConfig) -> None:
        self.model, self.size = model, image_size(config, model)
        self._known: dict[tuple[object, ...], int] = {}
        dtype = getattr(torch, config.model.dtype)
        self.autocast = dtype if config.training.mixed_precision != "no" else None
        # autocast computes adapters in the base model's dtype
        if self.autocast is not None:
            for parameter in model.denoiser.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)

    def training(self, config: AnyRunConfig) -> int:
        """Return the peak of a forward and backward on one micro-batch."""
        rows = config.training.micro_batch_size * config.algorithm.rows_per_image(config)
        checkpointed = config.model.gradient_checkpointing
        return self._once(self._step, rows, checkpointed)

    def sampling(self, config: AnyRunConfig) -> int:
        """Return the peak of one forward that draws a batch of images."""
        scales = (getattr(config.drawing, "guidance_scale", None), config.evaluation.guidance_scale)
        images = config.drawing.micro_batch_size
        return self._once(
            self._forward, max(self.model.forward_rows(images, scale) for scale in scales)
        )

    def decoding(self, config: AnyRunConfig) -> int:
        """Return the peak of decoding a batch of images."""
        return self._once(self._decode, config.drawing.micro_batch_size)

    def encoding(self, config: AnyRunConfig) -> int:
        """Return the peak of encoding a batch of images, 0 for runs that encode none."""
        images = config.encoded_images
        return self._once(self._encode, images) if images else 0

    def _once(self, measure: Callable[..., int], *arguments: int) -> int:
        key = (measure.__name__, *arguments)
        if key not in self._known:
            self._known[key] = measure(*arguments)
        return self._known[key]

    def _step(self, rows: int, checkpointed: bool) -> int:
        denoiser = self.model.denoiser
        latents, times, embeds = self.model.random_inputs(rows, self.size)
        denoiser.train()
        if checkpointed:
            denoiser.enable_gradient_checkpointing()

        def loss() -> Tensor:
            return self.model.predict(latents, times, embeds).float().square().mean()

        result = peak_of(denoiser, lambda: step_as_on_device(loss, autocast=self.autocast))
        denoiser.eval()
        if checkpointed:
            denoiser.disable_gradient_checkpointing()
        return result

    def _forward(self, rows: int) -> int:
        latents, times, embeds = self.model.random_inputs(rows, self.size)
        with torch.no_grad(), AsOnDevice(self.autocast):
            return peak_of(self.model.denoiser, lambda: self.model.predict(latents, times, embeds))

    def _decode(self, images: int) -> int:
        model = self.model
        shape = (images, *model.latent_shape(self.size))
        latents = torch.empty(*shape, dtype=model.denoiser.dtype, device="meta")
        with AsOnDevice(self.autocast):
            return peak_of(model.pipeline.vae, lambda: model.decode_checked(latents))

    def _encode(self, images: int) -> int:
        model = self.model
        pixels = torch.empty(images, 3, *self.size, dtype=torch.uint8, device="meta")
        with AsOnDevice(self.autocast):
            return peak_of(model.pipeline.vae, lambda: model.encode(pixels))
