"""`LatentCodec`: all that lies between pixels and a denoiser's tokens, for any autoencoder of diffusers.

A denoiser sees tokens: patches of scaled latents. How many pixels a token stands for, how many numbers it holds, where
it lies and which autoencoder reads it back is one thing, and only here.
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

AFFINES = ("scale", "shift", "statistics")
"""Readings of an autoencoder's configuration by stock pipelines: `scaling_factor` alone (Stable Diffusion, SANA), that
and `shift_factor` (SD3, FLUX), or with it `latents_mean` and `latents_std` per channel where both are set (SDXL)."""


def encoded(vae: Any, pixels: Tensor, *, sample: bool = False) -> tuple[Tensor, Tensor]:
    """Latents as the autoencoder makes them, not scaled, and a penalty on them.

    Args:
        vae: with a posterior (AutoencoderKL) or without one (AutoencoderDC).
        pixels: (B, 3, H, W) in -1..1.
        sample: draw from the posterior instead of taking its mode.

    Returns:
        (B, C, h, w), and the posterior's divergence from a standard normal, a mean over everything: 0 without one.
    """
    found = vae.encode(pixels)
    if hasattr(found, "latent"):
        return found.latent, pixels.new_zeros(())
    posterior = found.latent_dist
    latents = posterior.sample() if sample else posterior.mode()
    penalty = posterior.kl().mean() / latents[0].numel() if sample else pixels.new_zeros(())
    return latents, penalty


def compression(vae: Any) -> int:
    """Pixels of a side of the image for one of the latents."""
    if isinstance(vae, AutoencoderDC):
        return int(vae.spatial_compression_ratio)
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def filled_up(latents: Tensor, channels: int) -> Tensor:
    """(B, C, h, w) with zeros for the channels that a prefix leaves out."""
    missing = channels - latents.shape[1]
    return torch.nn.functional.pad(latents, (0, 0, 0, 0, 0, missing)) if missing else latents


def pack(latents: Tensor, patch_size: int) -> Tensor:
    """(B, C, h, w) to tokens (B, h/p * w/p, C p p): each p x p patch becomes one token, its numbers in the order
    (channel, row, column)."""
    b, c, h, w = latents.shape
    p = patch_size
    patches = latents.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, (h // p) * (w // p), c * p * p)


def unpack(tokens: Tensor, patch_size: int, *, height: int, width: int) -> Tensor:
    """The inverse of `pack`; `height` and `width` are those of the latents."""
    b, _, numbers = tokens.shape
    p = patch_size
    patches = tokens.reshape(b, height // p, width // p, numbers // (p * p), p, p)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, numbers // (p * p), height, width)


def position_ids(rows: int, columns: int) -> Tensor:
    """(rows * columns, 3) float32: FLUX's ids (0, row, column) of a grid of tokens, with steps of 1."""
    places = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    ids = torch.stack([torch.zeros_like(places[0]), *places], dim=-1)
    return ids.reshape(-1, 3).float()


class CodecError(UserError, ValueError):
    """Latents of another autoencoder than a denoiser was trained with."""


@contextmanager
def _in_float32(vae: Any, upcast: bool) -> Iterator[None]:
    """The autoencoder's weights in float32 for a while, where that is wanted."""
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
    """An autoencoder, and the side of the patches that make a token (1 where each place of the latents is one).

    Args:
        prefix: only so many of the first channels, of an autoencoder that was trained to be read so (DC-AE 1.5).
        affine: one of AFFINES, by the stock pipeline's class.
        upcast: heed the autoencoder's `force_upcast`, as SDXL's pipelines do: float16 decodes in float32, and every
            narrower dtype encodes in it.
    """

    vae: Any
    patch_size: int = 1
    prefix: int | None = None
    affine: str = "shift"
    upcast: bool = False

    def __post_init__(self) -> None:
        if self.prefix is not None and not 0 < self.prefix <= self.vae.config.latent_channels:
            raise CodecError(
                f"latents.channels: {self.prefix} of an autoencoder with {self.vae.config.latent_channels}"
            )
        if self.affine not in AFFINES:
            raise ValueError(f"unknown affine {self.affine!r}; choices are {', '.join(AFFINES)}")

    @property
    def channels(self) -> int:
        """Of the latents."""
        return int(self.prefix or self.vae.config.latent_channels)

    @property
    def token_channels(self) -> int:
        """Numbers in a token."""
        return self.channels * self.patch_size**2

    @property
    def compression(self) -> int:
        return compression(self.vae)

    @property
    def pixels_per_token(self) -> int:
        """Of a side of the image; height and width must be multiples of it."""
        return self.compression * self.patch_size

    @property
    def scale(self) -> float:
        return float(self.vae.config.scaling_factor)

    @property
    def shift(self) -> float:
        """Zero where the stock pipeline reads none, whatever the configuration says."""
        if self.affine != "shift":
            return 0.0
        return float(getattr(self.vae.config, "shift_factor", None) or 0.0)

    @property
    def statistics(self) -> dict[str, list[float]]:
        """`mean` and `std` of each channel, or nothing."""
        if self.affine != "statistics":
            return {}
        raw = {n: getattr(self.vae.config, f"latents_{n}", None) for n in ("mean", "std")}
        if None in raw.values():
            return {}
        return {name: [float(v) for v in values] for name, values in raw.items()}

    def normalized(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) of the autoencoder as the denoiser reads them."""
        if self.statistics:
            mean, std = self._statistics(latents)
            return (latents - mean) * self.scale / std
        return (latents - self.shift) * self.scale

    def denormalized(self, latents: Tensor) -> Tensor:
        """The inverse of `normalized`, in the stock pipelines' order of operations."""
        if self.statistics:
            mean, std = self._statistics(latents)
            return latents * std / self.scale + mean
        latents = latents / self.scale
        return latents + self.shift if self.affine == "shift" else latents

    def _statistics(self, like: Tensor) -> list[Tensor]:
        """Mean and std, each (1, C, 1, 1) in the dtype of latents."""
        values = self.statistics.values()
        return [torch.tensor(v).view(1, -1, 1, 1).to(like.device, like.dtype) for v in values]

    def tokens(self, height: int, width: int) -> int:
        """Of an image of that size in pixels."""
        return (height // self.pixels_per_token) * (width // self.pixels_per_token)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of one image."""
        return self.channels, height // self.compression, width // self.compression

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 to latents (B, C, h, w): the mode of the posterior, normalised."""
        dtype = self.vae.dtype
        with _in_float32(self.vae, self.upcast and self.vae.config.force_upcast):
            pixels = (images.to(self.vae.device).float() / 127.5 - 1).to(self.vae.dtype)
            latents = encoded(self.vae, pixels)[0][:, : self.channels]
        return self.normalized(latents.to(dtype) if latents.dtype == torch.float32 else latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W) uint8, as the stock pipelines make them."""
        return self.decode_checked(latents)[0]

    @torch.no_grad()
    def decode_checked(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The images, and (B,) whether all of an image's numbers are finite: in 8 bits it can no longer be seen."""
        half = self.vae.dtype == torch.float16
        with _in_float32(self.vae, self.upcast and half and self.vae.config.force_upcast):
            latents = self.denormalized(latents.to(self.vae.dtype))
            if self.prefix is not None:
                latents = filled_up(latents, self.vae.config.latent_channels)
            pixels = self.vae.decode(latents, return_dict=False)[0]
        finite = pixels.isfinite().flatten(1).all(1)
        pixels = (pixels * 0.5 + 0.5).clamp(0, 1).float()
        return (pixels * 255).round().to(torch.uint8), finite

    def pack(self, latents: Tensor) -> Tensor:
        """As the function."""
        return pack(latents, self.patch_size)

    def unpack(self, tokens: Tensor, *, height: int, width: int) -> Tensor:
        """As the function."""
        return unpack(tokens, self.patch_size, height=height, width=width)

    @cached_property
    def identity(self) -> str:
        """16 hex digits: the same for the same weights, wherever and in whatever dtype they are loaded."""
        return fingerprint({"vae": self.vae}, rounded=True)

    def to_dict(self) -> dict[str, Any]:
        """What a manifest says of it."""
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

    def check(self, told: Mapping[str, Any], *, where: str) -> None:
        """That a manifest tells of this codec.

        Raises:
            CodecError: of another one; the message says what differs.
        """
        here = self.to_dict()
        for name in dict.fromkeys((*here, "mean", "std")):
            if told.get(name) != here.get(name):
                raise CodecError(
                    f"{where} was trained with another autoencoder: {name} was {told.get(name)}, and is "
                    f"{here.get(name)} of the one that is there"
                )
