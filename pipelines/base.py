"""Interface between algorithms and a diffusers pipeline (`TextToImageModel`).

Algorithms use prompts, latents, timesteps and model predictions only. This class hides all other differences between
families: packed latents, pooled embeddings, guidance embeddings, schedules that depend on the resolution. A new family
is one file that implements the abstract methods, and one line in `registry.py`.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from diffalign.core.errors import UsageError, one_line
from diffalign.diffusion.paths import Path, shift_sigmas
from diffalign.latents.codec import LatentCodec
from diffalign.latents.move import Ends
from diffalign.pipelines.embed_folder import EmbedFolder
from diffalign.pipelines.flows import flow_of
from diffalign.pipelines.offloading import Resting
from diffalign.types import PromptEmbeds, Size

# The eight attention projections of a joint block, which the releases of AWM and Flow-GRPO train.
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
    """Stock pipeline with a trainable denoiser, behind the interface of all families."""

    family: ClassVar[str]
    denoiser_part: ClassVar[str] = "transformer"
    """Name of the pipeline's component that is trained."""
    lora_targets: ClassVar[tuple[str, ...]]
    """Name suffixes of the linear layers that carry a LoRA by default."""
    max_sequence_length: int
    """Largest number of tokens of the long text encoder (T5).

    It is the stock pipeline's default, or fewer if the tokenizer allows fewer.
    """
    long_tokenizer: ClassVar[str | None] = None
    """Name of the long text encoder's tokenizer in the pipeline; None without one."""

    ends: ClassVar[Ends | None] = None
    """Names of the first and last layer; None for families that cannot be moved."""
    deep_pipeline: ClassVar[str] = ""
    """Class of `pipelines.dcgen` that generates with a moved denoiser; empty if there is none."""
    patch_size: int = 1
    """Side of the patch of latents that forms one token."""
    takes_time_ids: bool = False
    """True if an image's original size and crop are inputs of the denoiser (SDXL)."""
    latents_dtype: ClassVar[torch.dtype | None] = None
    """Dtype in which the stock pipeline samples noise; None for that of the prompt embeddings."""
    latents_affine: ClassVar[str] = "shift"
    """Convention of the latents' scale in the stock pipeline: one of `codec.AFFINES`."""
    upcasts_vae: ClassVar[bool] = False
    """True if the stock pipeline honours the autoencoder's `force_upcast`."""
    guidance_is_embedded: bool = False
    """True if guidance is an input of the denoiser (FLUX.1-dev), not a second forward."""
    embedded_guidance: ClassVar[float] = 1.0
    """Guidance that is an input of the denoiser, if none is asked for."""
    prediction_sign: ClassVar[int] = 1
    """Sign by which `forward` multiplies the denoiser's output."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        max_sequence_length: int | None = None,
        default_size: Size | None = None,
    ) -> None:
        self.pipeline = pipeline
        self._default_size = default_size
        self.resting: Resting | None = None
        """Parts that leave the device while they do not work; None if all stay."""
        self.embed_folder: EmbedFolder | None = None
        """Folder of prompt embeddings that were computed before."""
        self.noise = self.path_of(pipeline.scheduler)
        tokenizer = getattr(pipeline, self.long_tokenizer or "", None)
        if max_sequence_length is not None:
            self.max_sequence_length = max_sequence_length
        elif tokenizer is not None:
            self.max_sequence_length = min(self.max_sequence_length, tokenizer.model_max_length)

    @classmethod
    def path_of(cls, scheduler: Any) -> Path:
        """Return the diffusion path that a model with this scheduler predicts on.

        Raises:
            UsageError: the scheduler does not belong to this family's kind of path.
        """
        return flow_of(scheduler, family=cls.family)

    @property
    def denoiser(self) -> ModelMixin:
        """Trainable module of the pipeline, a transformer or a U-Net."""
        return getattr(self.pipeline, self.denoiser_part)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.denoiser.device
        return device

    def costs_a_forward(self, guidance_scale: float | None) -> bool:
        """Return True if this guidance needs negative embeddings and a second forward."""
        return not self.guidance_is_embedded and guidance_scale is not None and guidance_scale > 1

    def forward_rows(self, images: int, guidance_scale: float | None) -> int:
        """Return the number of rows in the denoiser's forward for so many images."""
        return images * (2 if self.costs_a_forward(guidance_scale) else 1)

    @property
    def default_size(self) -> Size:
        """Default image size (height, width) in pixels.

        It is the stock pipeline's default, unless the constructor received another one.
        """
        if self._default_size is not None:
            return self._default_size
        return self.stock_side, self.stock_side

    @property
    def stock_side(self) -> int:
        """Default side of the stock pipeline's images in pixels."""
        return int(self.pipeline.default_sample_size * self.pipeline.vae_scale_factor)

    def image_size(self, size: tuple[int | None, int | None] | None) -> Size:
        """Return a size whose missing sides are the model's own."""
        height, width = size or (None, None)
        return height or self.default_size[0], width or self.default_size[1]

    @classmethod
    def is_student(
        cls, denoiser: Mapping[str, Any], scheduler: Mapping[str, Any], index: Mapping[str, Any]
    ) -> bool:
        """Return True if the configurations are those of a few-step student without guidance.

        Args:
            index: content of `model_index.json`.
        """
        return False

    @property
    def is_distilled(self) -> bool:
        """True for a few-step student without guidance, by its configurations."""
        configs = (self.denoiser.config, self.pipeline.scheduler.config, self.pipeline.config)
        return self.is_student(*configs)

    @classmethod
    def default_guidance(cls, parameters: Mapping[str, Any]) -> float | None:
        """Return the guidance scale that the parameters of the stock pipeline's call default to."""
        default: float | None = parameters["guidance_scale"].default
        return default

    @classmethod
    def default_sample_size(cls, pipeline: DiffusionPipeline) -> int | None:
        """Return the default side in latents, or None to keep the stock class's."""
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
        guidance_scale: Any = None,
        negative_embeds: PromptEmbeds | None = None,
    ) -> Tensor:
        """Return the model prediction (B, C, H, W), with classifier-free guidance above 1.

        Args:
            noisy_latents: (B, C, H, W).
            timesteps: (B,), in the scheduler's scale.
            guidance_scale: a number, or None; (B,) too for families whose denoiser has it as an input.
            negative_embeds: B rows, needed for guidance above 1.
        """
        if guidance_scale is None or guidance_scale <= 1:
            return self.forward(noisy_latents, timesteps, embeds)
        if negative_embeds is None:
            raise ValueError(
                "classifier-free guidance needs `negative_embeds`, for instance encode_prompt([''])"
            )
        both = PromptEmbeds.cat([negative_embeds, embeds])
        model_pred = self.forward(torch.cat([noisy_latents] * 2), torch.cat([timesteps] * 2), both)
        uncond, cond = model_pred.chunk(2)
        return self.guided(uncond, cond, guidance_scale)

    def guided(self, uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
        """Return the guided prediction (B, C, H, W) of two predictions.

        It is uncond + scale (cond - uncond) (Ho & Salimans 2022). A family whose stock pipeline has another convention
        overrides this method; its `guidance_scale` stays the usual one, of which 1 means no guidance.
        """
        return uncond + guidance_scale * (cond - uncond)

    @abstractmethod
    def forward(self, noisy_latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """Return the denoiser's prediction (B, C, H, W), without classifier-free guidance."""

    def random_inputs(self, rows: int, size: Size) -> tuple[Tensor, Tensor, PromptEmbeds]:
        """Return random arguments of `forward`, to measure memory and time.

        They are on the denoiser's device and in its dtype.

        Args:
            rows: batch size.
        """
        options: dict[str, Any] = {"device": self.device, "dtype": self.denoiser.dtype}
        length, features, pooled = self.prompt_shape()
        embeds = PromptEmbeds(
            torch.randn(rows, length, features, **options),
            torch.randn(rows, pooled, **options) if pooled else None,
        )
        latents = torch.randn(rows, *self.latent_shape(size), **options)
        return latents, torch.full((rows,), 500.0, device=self.device), embeds

    def image_seq_len(self, size: Size) -> int:
        """Return the number of image tokens of a size, for a U-Net of latent positions."""
        step = self.pixels_per_token
        return (size[0] // step) * (size[1] // step)

    @property
    def pixels_per_latent(self) -> int:
        """Side in pixels of the image area that one position of the latents covers."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def pixels_per_token(self) -> int:
        """Side in pixels of the image area that one token covers."""
        return self.patch_size * self.pixels_per_latent

    def moved_config(self, codec: LatentCodec, ratio: int) -> dict[str, Any]:
        """Return the changes of the denoiser's configuration for the latents of a codec.

        Args:
            ratio: number of old tokens per side that one token of the codec replaces.
        """
        raise NotImplementedError

    @abstractmethod
    def prompt_shape(self) -> tuple[int, int, int]:
        """Return the sizes (S, D, P) of the prompt embeddings.

        They are the number of tokens, their width, and the width of the pooled embedding (0 for none).
        """

    @property
    @abstractmethod
    def latent_channels(self) -> int: ...

    @property
    def granularity(self) -> int:
        """Number of pixels that height and width must be multiples of."""
        return self.pixels_per_token

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of the latents of one image of a size.

        Raises:
            UsageError: the model cannot generate images of this size.
        """
        height, width = size
        step, scale = self.granularity, self.pixels_per_latent
        if height <= 0 or width <= 0 or height % step or width % step:
            near = tuple(max(step, round(side / step) * step) for side in (height, width))
            raise UsageError(
                f"{self.family} makes images whose height and width are multiples of {step} pixels, not "
                f"{height}x{width}; the nearest is {near[0]}x{near[1]}"
            )
        return self.latent_channels, height // scale, width // scale

    def scheduler_at(self, num_inference_steps: int, size: Size) -> Any:
        """Return a copy of the pipeline's scheduler, with the stock pipeline's timesteps."""
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        kwargs: dict[str, Any] = self.scheduler_kwargs(num_inference_steps)
        if scheduler.config.get("use_dynamic_shifting"):
            kwargs["mu"] = self.mu(size, num_inference_steps)
        set_timesteps(scheduler, num_inference_steps, device=self.device, **kwargs)
        return scheduler

    def scheduler_kwargs(self, num_inference_steps: int) -> dict[str, Any]:
        """Return further arguments that the stock pipeline passes to `set_timesteps`."""
        return {}

    def mu(self, size: Size, num_inference_steps: int) -> float:
        """Return `mu` of a dynamic schedule, which the stock pipeline gives to its scheduler."""
        del num_inference_steps
        return dynamic_shift(self.pipeline.scheduler.config, self.image_seq_len(size))

    def shifted(self, sigmas: Tensor, size: Size, *, num_inference_steps: int = 50) -> Tensor:
        """Return noise levels (N,) of a flow after the scheduler's shift for this image size.

        The levels of a scheduler with `shift_terminal` end there instead of at 0.

        Args:
            num_inference_steps: number of steps, on which some schedules depend (FLUX.2).
        """
        config = self.pipeline.scheduler.config
        shift = config.get("flow_shift") or config.get("shift") or 1.0
        if config.get("use_dynamic_shifting"):
            shift = self.mu(size, num_inference_steps)
            if config.get("time_shift_type") != "linear":
                shift = math.exp(shift)
        sigmas = shift_sigmas(sigmas, shift)
        terminal = config.get("shift_terminal")
        return 1 - (1 - sigmas) * (1 - terminal) if terminal else sigmas

    @property
    def codec(self) -> LatentCodec:
        """Codec that converts between pixels and the denoiser's latents."""
        vae, reads = self.pipeline.vae, self.latent_channels
        prefix = reads if self.deep and reads < vae.config.latent_channels else None
        return self.codec_of(vae, patch_size=self.patch_size, prefix=prefix)

    def codec_of(self, vae: Any, *, patch_size: int = 1, prefix: int | None = None) -> LatentCodec:
        """Return the codec of an autoencoder, with the conventions of this family."""
        return LatentCodec(vae, patch_size, prefix, self.latents_affine, self.upcasts_vae)

    @property
    def deep(self) -> bool:
        """True if the model was moved into another latent space."""
        return bool(self.deep_pipeline) and type(self.pipeline).__name__ == self.deep_pipeline

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents like the stock pipeline, to images (B, 3, H, W) uint8."""
        return self.decode_checked(latents)[0]

    def decode_checked(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Decode latents to images and a mask (B,) of those whose values are all finite."""
        with self._autoencoder():
            return self.codec.decode_checked(latents)

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) uint8 to normalised latents (B, C, H, W).

        A posterior is replaced by its mode.
        """
        with self._autoencoder():
            return self.codec.encode(images)

    def _autoencoder(self) -> AbstractContextManager[None]:
        """Return the context in which the autoencoder is on the device."""
        return nullcontext() if self.resting is None else self.resting.autoencoder()

    def to(self, device: torch.device | str) -> TextToImageModel:
        self.pipeline.to(device)
        return self


def set_timesteps(scheduler: Any, num_inference_steps: int, **kwargs: Any) -> None:
    """Call the scheduler's `set_timesteps`; `sigmas` replace the number of steps.

    Raises:
        UsageError: the scheduler does not support this number of steps.
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
        reason = one_line(error)
        raise UsageError(
            f"num_inference_steps: {name} makes no {num_inference_steps} steps ({reason}); use fewer"
        ) from error


def dynamic_shift(config: Any, image_seq_len: int) -> float:
    """Return `mu` of FLUX's resolution-dependent schedule, linear in the image tokens."""
    x0, x1 = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    y0, y1 = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    shift: float = y0 + (y1 - y0) / (x1 - x0) * (image_seq_len - x0)
    return shift
