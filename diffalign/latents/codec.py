"""Conversion between pixels and a denoiser's tokens, for any autoencoder of diffusers.

Tokens are patches of scaled latents. The pixels per token, its number of channels, its position and the autoencoder
that decodes it belong together; `LatentCodec` is the only place that knows them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderDC
from torch import Tensor

from diffalign.core.errors import UserError
from diffalign.core.fingerprint import fingerprint

AFFINES = ("scale", "shift", "statistics", "channels", "batch_norm")
"""Ways in which stock pipelines scale latents, by an autoencoder's configuration.

The way "scale" is `scaling_factor` alone (Stable Diffusion, SANA), "shift" also uses `shift_factor` (SD3, FLUX), and
"statistics" also uses `latents_mean` and `latents_std` per channel if both are set (SDXL). The way "channels" uses only
these two (Qwen-Image). The way "batch_norm" folds patches into channels, and uses the mean and variance of the
autoencoder's batch normalisation for each of them (FLUX.2).
"""


def encoded(vae: Any, pixels: Tensor, *, sample: bool = False) -> tuple[Tensor, Tensor]:
    """Return unscaled latents of an autoencoder and a penalty on them.

    Args:
        vae: autoencoder with a posterior (AutoencoderKL) or without one (AutoencoderDC).
        pixels: images (B, 3, H, W) in -1..1.
        sample: whether to sample from the posterior instead of taking its mode.

    Returns:
        Latents (B, C, h, w), and the posterior's divergence from a standard normal, a mean over all numbers; 0 without
            a posterior or without sampling.
    """
    frames = has_frames(vae)
    output = vae.encode(pixels.unsqueeze(2) if frames else pixels)
    if hasattr(output, "latent"):
        return output.latent, pixels.new_zeros(())
    posterior = output.latent_dist
    latents = posterior.sample() if sample else posterior.mode()
    latents = latents.squeeze(2) if frames else latents
    penalty = posterior.kl().mean() / latents[0].numel() if sample else pixels.new_zeros(())
    return latents, penalty


def compression(vae: Any) -> int:
    """Return the pixels per side of the image for one latent."""
    if isinstance(vae, AutoencoderDC):
        return int(vae.spatial_compression_ratio)
    if has_frames(vae):
        return int(2 ** len(vae.config.temperal_downsample))
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def has_frames(vae: Any) -> bool:
    """Return True for an autoencoder of videos, whose tensors have an axis of frames (Qwen-Image)."""
    return "temperal_downsample" in vae.config


def channels_of(vae: Any) -> int:
    """Return the number of channels of an autoencoder's latents."""
    return int(vae.config.z_dim if has_frames(vae) else vae.config.latent_channels)


def patchified(latents: Tensor, patch_size: int) -> Tensor:
    """Fold patches of latents (B, C, h, w) into channels.

    The channels of a patch are in the order (channel, row, column).
    """
    return torch.nn.functional.pixel_unshuffle(latents, patch_size)


def unpatchified(latents: Tensor, patch_size: int) -> Tensor:
    """Undo `patchified`."""
    return torch.nn.functional.pixel_shuffle(latents, patch_size)


def filled_up(latents: Tensor, channels: int) -> Tensor:
    """Append zeros for missing channels: latents become (B, `channels`, h, w)."""
    missing = channels - latents.shape[1]
    return torch.nn.functional.pad(latents, (0, 0, 0, 0, 0, missing)) if missing else latents


def pack(latents: Tensor, patch_size: int) -> Tensor:
    """Pack latents (B, C, h, w) into tokens (B, h/p * w/p, C p p).

    Each p x p patch becomes one token, with its numbers in the order (channel, row, column).
    """
    b, c, h, w = latents.shape
    p = patch_size
    patches = latents.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, (h // p) * (w // p), c * p * p)


def unpack(tokens: Tensor, patch_size: int, *, height: int, width: int) -> Tensor:
    """Undo `pack`: tokens (B, N, C p p) become latents (B, C, `height`, `width`)."""
    b, _, numbers = tokens.shape
    p = patch_size
    patches = tokens.reshape(b, height // p, width // p, numbers // (p * p), p, p)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, numbers // (p * p), height, width)


def position_ids(rows: int, columns: int) -> Tensor:
    """Return FLUX's position ids of a grid of tokens, (rows * columns, 3) float32.

    An id is (0, row, column), with steps of 1.
    """
    positions = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    ids = torch.stack([torch.zeros_like(positions[0]), *positions], dim=-1)
    return ids.reshape(-1, 3).float()


class CodecError(UserError, ValueError):
    """Error for latents of another autoencoder than the one of a denoiser's training."""


@contextmanager
def _in_float32(vae: Any, upcast: bool) -> Iterator[None]:
    """Keep the autoencoder's weights in float32 inside the context if `upcast` is set."""
    before = vae.dtype
    if not upcast or before == torch.float32:
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(before)


@dataclass(frozen=True)
class LatentCodec:
    """Autoencoder with a patch size, as the converter between pixels and tokens.

    Args:
        vae: autoencoder of diffusers.
        patch_size: side of the patches that become tokens; 1 if each latent position is a token.
        prefix: number of first channels to use, for an autoencoder that was trained for that (DC-AE 1.5).
        affine: one of `AFFINES`, given by the stock pipeline's class.
        upcast: whether to follow the autoencoder's `force_upcast`, as SDXL's pipelines do: float16 decodes in float32,
            and every narrower dtype encodes in it.

    Raises:
        CodecError: `prefix` is not a number of the autoencoder's channels.
        ValueError: unknown `affine`.
    """

    vae: Any
    patch_size: int = 1
    prefix: int | None = None
    affine: str = "shift"
    upcast: bool = False

    def __post_init__(self) -> None:
        if self.prefix is not None and not 0 < self.prefix <= channels_of(self.vae):
            raise CodecError(
                f"latents.channels={self.prefix}: the autoencoder has {channels_of(self.vae)} channels. "
                "Choose a number from 1 to that."
            )
        if self.affine not in AFFINES:
            raise ValueError(f"Unknown affine {self.affine!r}. Choose from {', '.join(AFFINES)}.")

    @property
    def channels(self) -> int:
        """Number of channels of the latents, with folded patches."""
        return (self.prefix or channels_of(self.vae)) * self.fold**2

    @property
    def fold(self) -> int:
        """Side of the autoencoder's patches that are folded into channels; 1 without folding."""
        return int(self.vae.config.patch_size[0]) if self.affine == "batch_norm" else 1

    @property
    def token_channels(self) -> int:
        """Numbers per token."""
        return self.channels * self.patch_size**2

    @property
    def compression(self) -> int:
        """Pixels per side of the image for one position of the latents."""
        return compression(self.vae) * self.fold

    @property
    def pixels_per_token(self) -> int:
        """Pixels per side of the image for one token; height and width must be multiples."""
        return self.compression * self.patch_size

    @property
    def scale(self) -> float:
        """Scale of the latents, one if the stock pipeline does not use it."""
        if self.affine in ("channels", "batch_norm"):
            return 1.0
        return float(self.vae.config.scaling_factor)

    @property
    def shift(self) -> float:
        """Shift of the latents, zero if the stock pipeline does not use one."""
        if self.affine != "shift":
            return 0.0
        return float(getattr(self.vae.config, "shift_factor", None) or 0.0)

    @property
    def statistics(self) -> dict[str, list[float]]:
        """Statistics `mean` and `std` of each channel, or {} if they are not used."""
        if self.affine == "batch_norm":
            names = ("mean", "std")
            return {n: v.tolist() for n, v in zip(names, self._batch_statistics(), strict=True)}
        if self.affine not in ("statistics", "channels"):
            return {}
        raw = {n: getattr(self.vae.config, f"latents_{n}", None) for n in ("mean", "std")}
        lists = {name: values for name, values in raw.items() if values is not None}
        if len(lists) < len(raw):
            return {}
        return {name: [float(v) for v in values] for name, values in lists.items()}

    @property
    def scaled_by_channel(self) -> bool:
        """True if each channel has its own mean and standard deviation."""
        return self.affine == "batch_norm" or bool(self.statistics)

    def normalized(self, latents: Tensor) -> Tensor:
        """Scale latents (B, C, h, w) of the autoencoder for the denoiser; fold patches."""
        if self.fold > 1:
            latents = patchified(latents, self.fold)
        if self.scaled_by_channel:
            mean, std = self._statistics(latents)
            return (latents - mean) * self.scale / std
        return (latents - self.shift) * self.scale

    def denormalized(self, latents: Tensor) -> Tensor:
        """Undo `normalized`, in the stock pipelines' order of operations."""
        if self.scaled_by_channel:
            mean, std = self._statistics(latents)
            if self.affine == "channels":
                return latents / (1 / std) + mean
            latents = latents * std / self.scale + mean
            return unpatchified(latents, self.fold) if self.fold > 1 else latents
        latents = latents / self.scale
        return latents + self.shift if self.affine == "shift" else latents

    def _statistics(self, like: Tensor) -> list[Tensor]:
        """Return mean and std, each (1, C, 1, 1) in the dtype of latents."""
        if self.affine == "batch_norm":
            values = list(self._batch_statistics())
        else:
            values = [torch.tensor(v) for v in self.statistics.values()]
        return [v.view(1, -1, 1, 1).to(like.device, like.dtype) for v in values]

    def _batch_statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and std (C,) of the autoencoder's batch normalisation."""
        normalisation = self.vae.bn
        variance = normalisation.running_var + self.vae.config.batch_norm_eps
        return normalisation.running_mean, torch.sqrt(variance)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) uint8 as normalised latents (B, C, h, w).

        The posterior's mode is used.
        """
        dtype = self.vae.dtype
        with _in_float32(self.vae, self.upcast and self.vae.config.force_upcast):
            pixels = (images.to(self.vae.device).float() / 127.5 - 1).to(self.vae.dtype)
            latents = encoded(self.vae, pixels)[0][:, : self.prefix]
        return self.normalized(latents.to(dtype) if latents.dtype == torch.float32 else latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to images (B, 3, H, W) uint8."""
        return self.decode_checked(latents)[0]

    @torch.no_grad()
    def decode_checked(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Decode latents; return also whether each image is finite, (B,) bool.

        The 8-bit images do not show it.
        """
        half = self.vae.dtype == torch.float16
        with _in_float32(self.vae, self.upcast and half and self.vae.config.force_upcast):
            latents = self.denormalized(latents.to(self.vae.dtype))
            if self.prefix is not None:
                latents = filled_up(latents, channels_of(self.vae))
            frames = has_frames(self.vae)
            latents = latents.unsqueeze(2) if frames else latents
            pixels = self.vae.decode(latents, return_dict=False)[0]
            pixels = pixels.squeeze(2) if frames else pixels
        finite = pixels.isfinite().flatten(1).all(1)
        pixels = (pixels * 0.5 + 0.5).clamp(0, 1).float()
        return (pixels * 255).round().to(torch.uint8), finite

    @cached_property
    def identity(self) -> str:
        """Fingerprint of the weights, 16 hex digits, independent of their location and dtype."""
        return fingerprint({"vae": self.vae}, rounded=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the description of the codec for a manifest."""
        return {
            "autoencoder": type(self.vae).__name__,
            "identity": self.identity,
            "compression": self.compression,
            "channels": self.channels,
            "patch_size": self.patch_size,
            "scale": self.scale,
            "shift": self.shift,
            **self.statistics,
        }

    def check(self, manifest: Mapping[str, Any], *, where: str) -> None:
        """Check that `manifest` was written for this codec.

        Raises:
            CodecError: the manifest is of another codec; the message lists the first difference.
        """
        own = self.to_dict()
        for name in dict.fromkeys((*own, "mean", "std")):
            if manifest.get(name) != own.get(name):
                raise CodecError(
                    f"{where} was trained with another autoencoder: {name} was {manifest.get(name)}, and is "
                    f"{own.get(name)}. Use the autoencoder of the training."
                )
