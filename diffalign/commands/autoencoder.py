"""The verb autoencoder."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from diffalign.autoencoders.trainer import AutoencoderConfig, AutoencoderTrainer, set_scale
from diffalign.core.errors import UsageError
from diffalign.core.files import folder_aside, write_text
from diffalign.core.seeds import GEOMETRY, stream
from diffalign.core.versions import versions
from diffalign.data.images import SUFFIXES, fit, read_image
from diffalign.latents.codec import LatentCodec, compression
from diffalign.pipelines.moving import load_autoencoder
from diffalign.shapes.autoencoder import random_images

logger = logging.getLogger(__name__)
RENDERED = "shapes"
HELD_OUT = 64
"""Images that are measured and never trained on."""
SCALED = 512
"""Images that the scale of the latents is taken from."""


class ImageFiles:
    """Crops of the readable images of a folder, mirrored at random; every twentieth is held out.

    Raises:
        UsageError: there is no such folder, or too few images that can be read.
    """

    def __init__(self, folder: str, resolution: int, *, seed: int) -> None:
        if not Path(folder).is_dir():
            raise UsageError(f"--images: {folder} is no folder")
        found = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES)
        readable = [p for p in found if _readable(p)]
        if len(readable) < len(found):
            logger.warning(
                "--images: %d files are left out as unreadable", len(found) - len(readable)
            )
        if len(readable) < 2:
            raise UsageError(
                f"--images: {folder} holds {len(readable)} readable images; 2 are too few"
            )
        self.held_out = readable[::20][:HELD_OUT]
        self.training = [p for p in readable if p not in set(self.held_out)]
        self.resolution, self.seed = resolution, seed

    def __call__(self, update: int, count: int) -> Tensor:
        """Of an update of training."""
        rng = np.random.default_rng(stream(GEOMETRY, self.seed, update))
        rows = rng.integers(len(self.training), size=count)
        return torch.stack([self._crop(self.training[r], rng) for r in rows])

    def measured(self) -> Tensor:
        """The middles of the held-out images."""
        size = self.resolution, self.resolution
        return torch.stack([fit(_read(p), *size)[0] for p in self.held_out])

    def _crop(self, path: Path, rng: np.random.Generator) -> Tensor:
        top, left = rng.uniform(size=2)
        found, _ = fit(_read(path), self.resolution, self.resolution, place=(top, left))
        return found.flip(-1) if rng.uniform() < 0.5 else found


class RenderedImages:
    """Scenes of Shapes, 64 px."""

    def __init__(self, *, seed: int) -> None:
        self.seed = seed

    def __call__(self, update: int, count: int) -> Tensor:
        """Of an update of training."""
        rng = np.random.default_rng((self.seed, update))
        return torch.from_numpy(random_images(rng, count)).permute(0, 3, 1, 2)

    def measured(self) -> Tensor:
        """Scenes that no update has."""
        return self(10**9, HELD_OUT)


def autoencoder(args: argparse.Namespace) -> int:
    """Train, save the autoencoder in diffusers' layout, and print how well it reconstructs."""
    if args.output_dir.joinpath("config.json").is_file():
        raise UsageError(f"--output_dir: {args.output_dir} holds a finished autoencoder already")
    names = {f.name for f in fields(AutoencoderConfig)}
    config = AutoencoderConfig(**{k: v for k, v in vars(args).items() if k in names})
    vae = load_autoencoder(args.autoencoder, dtype=torch.float32)
    if args.from_scratch:
        torch.manual_seed(args.seed)
        vae = type(vae).from_config(vae.config)
    vae.to("cuda" if torch.cuda.is_available() else "cpu")
    images = _images(args, vae)
    held_out = images.measured()
    before = quality(vae, held_out)
    work = args.output_dir.with_name(f"{args.output_dir.name}-checkpoint")
    key = {"images": args.images, "resolution": args.resolution, "start": LatentCodec(vae).identity}
    trainer = AutoencoderTrainer(vae, images, config, folder=work, key=key)
    trainer.run()
    if args.from_scratch:  # users of the latents of an autoencoder that is there rely on its scale
        set_scale(vae, images(10**6, min(SCALED, 16 * config.batch_size)))
    found: dict[str, Any] = {
        "phase": config.phase,
        "before": before,
        "after": quality(vae, held_out),
        "codec": LatentCodec(vae).to_dict(),
        "updates": trainer.update,
        "seconds": round(trainer.seconds, 1),
        "history": trainer.history,
        "versions": versions(),
    }
    with folder_aside(args.output_dir) as folder:
        vae.save_pretrained(folder)
        write_text(folder / "training.json", json.dumps(found, indent=1))
    print(json.dumps({k: found[k] for k in ("phase", "before", "after", "updates", "seconds")}))
    return 0


def _images(args: argparse.Namespace, vae: Any) -> Any:
    step = compression(vae)
    if args.images == RENDERED:
        return RenderedImages(seed=args.seed)
    if args.resolution % step or args.resolution <= 0:
        raise UsageError(f"--resolution: must be a multiple of {step}, got {args.resolution}")
    return ImageFiles(args.images, args.resolution, seed=args.seed)


@torch.no_grad()
def quality(vae: Any, images: Tensor) -> dict[str, float]:
    """PSNR (dB) and SSIM of reconstructions of images (N, 3, H, W) uint8, means over images."""
    codec = LatentCodec(vae.eval())
    parts = [codec.decode(codec.encode(part)).cpu() for part in images.split(8)]
    found, wanted = torch.cat(parts).float(), images.float()
    every = (1, 2, 3)
    psnr = peak_signal_noise_ratio(found, wanted, data_range=255.0, dim=every, reduction="none")
    ssim = structural_similarity_index_measure(found, wanted, data_range=255.0)
    assert isinstance(ssim, Tensor)  # a pair only where the full map is asked for
    return {"psnr": round(float(psnr.mean()), 3), "ssim": round(float(ssim), 4)}


@lru_cache(maxsize=256)
def _read(path: Path) -> Tensor:
    return read_image(path)


def _readable(path: Path) -> bool:
    try:
        _read(path)
    except OSError:
        return False
    return True
