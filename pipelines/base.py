"""`TextToImageModel`: one diffusers pipeline as an algorithm sees it.

An algorithm knows prompts, latents, timesteps and model predictions. Everything else that differs between families
(packed latents, pooled embeddings, guidance embeddings, schedules that depend on the resolution) stays behind this
class. A new family is one file that fills in the abstract methods, and one line in `registry.py`.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from diffalign.core.errors import UsageError
from diffalign.diffusion.paths import Path, RectifiedFlow, shift_sigmas
from diffalign.latents.codec import LatentCodec
from diffalign.latents.move import Ends
from diffalign.types import PromptEmbeds

# The eight attention projections of a joint block: what the released AWM and Flow-GRPO train.
JOINT_ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)


class TextToImageModel(ABC):
    """A stock pipeline, its trainable denoiser, and how to talk to it."""

    family: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]]
    """Suffixes of the linear layers that carry a LoRA by default."""
    max_sequence_length: int
    """Tokens of the long text encoder (T5), where the family has one: as many as the stock pipeline's default, or fewer
    where its tokenizer says so."""
    long_tokenizer: ClassVar[str | None] = None
    """What the pipeline calls that encoder's tokenizer."""

    ends: ClassVar[Ends | None] = None
    """First and last layer of a denoiser that can be moved into another latent space."""
    deep_pipeline: ClassVar[str] = ""
    """The class of `pipelines.dcgen` that then draws with it."""
    patch_size: int = 1
    """Side of the patch of latents that makes a token."""
    takes_time_ids: bool = False
    """The denoiser is told an image's original size and crop (SDXL)."""
    latents_dtype: ClassVar[torch.dtype | None] = None
    """In which the stock pipeline draws noise; None: that of the prompt embeddings."""
    latents_affine: ClassVar[str] = "shift"
    """The reading of the autoencoder's configuration by the stock pipeline: one of `codec.AFFINES`."""
    upcasts_vae: ClassVar[bool] = False
    """The stock pipeline heeds the autoencoder's `force_upcast`."""
    guidance_is_embedded: bool = False
    """Guidance is an input of the denoiser (FLUX.1-dev) and not a second forward."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        max_sequence_length: int | None = None,
        default_size: tuple[int, int] | None = None,
    ) -> None:
        self.pipeline = pipeline
        self._default_size = default_size
        self.noise = self.path_of(pipeline.scheduler)
        tokenizer = getattr(pipeline, self.long_tokenizer or "", None)
        if max_sequence_length is not None:
            self.max_sequence_length = max_sequence_length
        elif tokenizer is not None:
            self.max_sequence_length = min(self.max_sequence_length, tokenizer.model_max_length)

    @classmethod
    def path_of(cls, scheduler: Any) -> Path:
        """The path that a model with that scheduler predicts along.

        Raises:
            UsageError: the scheduler is not one of this family's path.
        """
        config = scheduler.config
        flow = (
            type(scheduler).__name__.startswith("FlowMatch")
            or config.get("use_flow_sigmas")
            or config.get("prediction_type") in ("flow_prediction", "trigflow")
        )
        if not flow or "num_train_timesteps" not in config:
            raise UsageError(
                f"scheduler {type(scheduler).__name__}: {cls.family} models are rectified flows, and this is no "
                "scheduler of flows; put FlowMatchEulerDiscreteScheduler into the pipeline"
            )
        return RectifiedFlow(config.num_train_timesteps)

    @property
    def denoiser(self) -> ModelMixin:
        """The trainable module."""
        return self.pipeline.transformer

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    def costs_a_forward(self, guidance_scale: float | None) -> bool:
        """Whether this guidance needs negative embeddings and a second forward."""
        return not self.guidance_is_embedded and guidance_scale is not None and guidance_scale > 1

    def forward_rows(self, images: int, guidance_scale: float | None) -> int:
        """Rows of the denoiser's forward for so many images."""
        return images * (2 if self.costs_a_forward(guidance_scale) else 1)

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels when none is given: the stock pipeline's, unless the model is known better."""
        if self._default_size is not None:
            return self._default_size
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    @classmethod
    def is_student(cls, denoiser: Mapping[str, Any], scheduler: Mapping[str, Any]) -> bool:
        """Tell by configurations whether a model is for a few steps without guidance."""
        return False

    @classmethod
    def default_sample_size(cls, pipeline: DiffusionPipeline) -> int | None:
        """Latents along a side by default, where the stock class fixes a wrong number."""
        return None

    @abstractmethod
    def encode_prompt(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Embed B prompts exactly as the stock pipeline does."""

    def predict(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        embeds: PromptEmbeds,
        *,
        guidance_scale: float | None = None,
        negative_embeds: PromptEmbeds | None = None,
    ) -> Tensor:
        """Model prediction (B, C, H, W) for noisy latents (B, C, H, W) at timesteps (B,) of the scheduler's scale; with
        classifier-free guidance where that is above 1."""
        if guidance_scale is None or guidance_scale <= 1:
            return self.forward(noisy_latents, timesteps, embeds)
        if negative_embeds is None:
            raise ValueError(
                "classifier-free guidance needs `negative_embeds`, for instance encode_prompt([''])"
            )
        both = PromptEmbeds.cat([negative_embeds, embeds])
        model_pred = self.forward(torch.cat([noisy_latents] * 2), torch.cat([timesteps] * 2), both)
        uncond, cond = model_pred.chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    @abstractmethod
    def forward(self, noisy_latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """The denoiser's own prediction, without guidance by a second forward."""

    def random_inputs(
        self, rows: int, height: int, width: int
    ) -> tuple[Tensor, Tensor, PromptEmbeds]:
        """Arguments of `forward` for so many images, on the denoiser's device and in its dtype: for what depends on
        shapes alone, such as memory and time."""
        options: dict[str, Any] = {"device": self.device, "dtype": self.denoiser.dtype}
        length, features, pooled = self.prompt_shape()
        embeds = PromptEmbeds(
            torch.randn(rows, length, features, **options),
            torch.randn(rows, pooled, **options) if pooled else None,
        )
        latents = torch.randn(rows, *self.latent_shape(height, width), **options)
        return latents, torch.full((rows,), 500.0, device=self.device), embeds

    def image_seq_len(self, height: int, width: int) -> int:
        """Image tokens that the denoiser sees at this resolution (a U-Net: places)."""
        step = self.pixels_per_token
        return (height // step) * (width // step)

    @property
    def pixels_per_token(self) -> int:
        """Of a side of the image."""
        return int(self.patch_size * self.pipeline.vae_scale_factor)

    def moved_config(self, codec: LatentCodec, ratio: int) -> dict[str, Any]:
        """Changes of the denoiser's configuration for the latents of a codec, one token of which replaces `ratio` of
        the old ones along a side."""
        raise NotImplementedError

    @abstractmethod
    def prompt_shape(self) -> tuple[int, int, int]:
        """(S, D, P) of the prompt embeddings: tokens, their width, and the width of the pooled one (0: none)."""

    @property
    @abstractmethod
    def latent_channels(self) -> int: ...

    @property
    def granularity(self) -> int:
        """Pixels of which height and width must be multiples."""
        return self.pixels_per_token

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of one image; UsageError where the model cannot make that size."""
        step, scale = self.granularity, self.pipeline.vae_scale_factor
        if height <= 0 or width <= 0 or height % step or width % step:
            near = tuple(max(step, round(side / step) * step) for side in (height, width))
            raise UsageError(
                f"{self.family} makes images whose height and width are multiples of {step} pixels, not "
                f"{height}x{width}; the nearest is {near[0]}x{near[1]}"
            )
        return self.latent_channels, height // scale, width // scale

    def scheduler_at(self, num_inference_steps: int, *, height: int, width: int) -> Any:
        """A fresh copy of the pipeline's scheduler with its timesteps set as the stock pipeline sets them."""
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        kwargs: dict[str, Any] = self.scheduler_kwargs(num_inference_steps)
        if scheduler.config.get("use_dynamic_shifting"):
            kwargs["mu"] = dynamic_shift(scheduler.config, self.image_seq_len(height, width))
        set_timesteps(scheduler, num_inference_steps, device=self.device, **kwargs)
        return scheduler

    def scheduler_kwargs(self, num_inference_steps: int) -> dict[str, Any]:
        """What the stock pipeline passes to `set_timesteps` besides the number of steps."""
        return {}

    def shifted(self, sigmas: Tensor, *, height: int, width: int) -> Tensor:
        """Noise levels (N,) of a flow as the pipeline's scheduler shifts them for images of that size."""
        config = self.pipeline.scheduler.config
        if config.get("use_dynamic_shifting"):
            mu = dynamic_shift(config, self.image_seq_len(height, width))
            linear = config.get("time_shift_type") == "linear"
            return shift_sigmas(sigmas, mu if linear else math.exp(mu))
        return shift_sigmas(sigmas, config.get("flow_shift") or config.get("shift") or 1.0)

    @property
    def codec(self) -> LatentCodec:
        """Between pixels and the denoiser's tokens."""
        vae, reads = self.pipeline.vae, self.latent_channels
        prefix = reads if self.deep and reads < vae.config.latent_channels else None
        return self.codec_of(vae, patch_size=self.patch_size, prefix=prefix)

    def codec_of(self, vae: Any, *, patch_size: int = 1, prefix: int | None = None) -> LatentCodec:
        """The codec of an autoencoder under the pipelines of this family."""
        return LatentCodec(vae, patch_size, prefix, self.latents_affine, self.upcasts_vae)

    @property
    def deep(self) -> bool:
        """It was moved into other latents."""
        return bool(self.deep_pipeline) and type(self.pipeline).__name__ == self.deep_pipeline

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) to images (B, 3, H, W) uint8, as the stock pipeline makes them."""
        return self.decode_checked(latents)[0]

    def decode_checked(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The images, and (B,) whether all of an image's numbers are finite."""
        return self.codec.decode_checked(latents)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 to latents (B, C, H, W), normalised; of a posterior the mode."""
        return self.codec.encode(images)

    def to(self, device: torch.device | str) -> TextToImageModel:
        self.pipeline.to(device)
        return self


def set_timesteps(scheduler: Any, num_inference_steps: int, **kwargs: Any) -> None:
    """The scheduler's own `set_timesteps`; `sigmas` among the arguments stand for the number of steps.

    Raises:
        UsageError: the scheduler makes no such number of steps.
    """
    name = type(scheduler).__name__
    if num_inference_steps < 1:
        raise UsageError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    try:
        if "sigmas" in kwargs:
            scheduler.set_timesteps(**kwargs)
        else:
            scheduler.set_timesteps(num_inference_steps, **kwargs)
    except (ValueError, AssertionError, IndexError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"num_inference_steps: {name} makes no {num_inference_steps} steps ({reason}); use fewer"
        ) from error


def dynamic_shift(config: Any, image_seq_len: int) -> float:
    """`mu` of FLUX's resolution-dependent schedule: linear in the number of image tokens."""
    x0, x1 = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    y0, y1 = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return y0 + (y1 - y0) / (x1 - x0) * (image_seq_len - x0)
