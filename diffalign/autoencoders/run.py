"""Run the training of an autoencoder: train, save in diffusers' layout, measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from diffalign.autoencoders.images import RENDERED, ImageFiles, RenderedImages, quality
from diffalign.autoencoders.trainer import AutoencoderConfig, AutoencoderTrainer, set_scale
from diffalign.core import locks
from diffalign.core.errors import UsageError
from diffalign.core.files import check_target, folder_aside, write_text
from diffalign.core.versions import versions
from diffalign.latents.codec import LatentCodec, compression

SCALED = 512
"""Largest number of images that the scale of the latents is computed from."""


def check_folder(output_dir: Path) -> None:
    """Raise UsageError if the folder cannot be written, or holds a finished autoencoder."""
    check_target(output_dir)
    if output_dir.joinpath("config.json").is_file():
        raise UsageError(f"output_dir: {output_dir} holds a finished autoencoder already")


def train_autoencoder(
    vae: Any,
    images: str,
    output_dir: Path,
    config: AutoencoderConfig,
    *,
    resolution: int,
    from_scratch: bool = False,
) -> dict[str, Any]:
    """Train an autoencoder, save it, and return its quality before and after.

    Quality is PSNR and SSIM on held-out images. The result is also written to `training.json`.

    Args:
        vae: an AutoencoderKL or AutoencoderDC in float32.
        images: a folder, or `shapes` for rendered scenes.
        resolution: side of the training images in pixels.
        from_scratch: keep only the autoencoder's configuration and initialise new weights.

    Raises:
        UsageError: the images or the resolution do not fit the autoencoder.
        LockError: another process trains in the same folder.
    """
    work = output_dir.with_name(f"{output_dir.name}-checkpoint")
    with locks.hold(work):
        return _train(vae, images, output_dir, config, work, resolution, from_scratch)


def _train(
    vae: Any,
    images: str,
    output_dir: Path,
    config: AutoencoderConfig,
    work: Path,
    resolution: int,
    from_scratch: bool,
) -> dict[str, Any]:
    if from_scratch:
        torch.manual_seed(config.seed)
        vae = type(vae).from_config(vae.config)
    vae.to("cuda" if torch.cuda.is_available() else "cpu")
    source = _images(images, vae, resolution=resolution, seed=config.seed)
    held_out = source.measured()
    before = quality(vae, held_out)
    key = {"images": images, "resolution": resolution, "start": LatentCodec(vae).identity}
    trainer = AutoencoderTrainer(vae, source, config, folder=work, key=key)
    trainer.run()
    # an existing autoencoder keeps its scale: models trained on its latents rely on it
    if from_scratch:
        set_scale(vae, source(10**6, min(SCALED, 16 * config.batch_size)))
    result: dict[str, Any] = {
        "phase": config.phase,
        "before": before,
        "after": quality(vae, held_out),
        "codec": LatentCodec(vae).to_dict(),
        "updates": trainer.update,
        "seconds": round(trainer.seconds, 1),
        "history": trainer.history,
        "versions": versions(),
    }
    with folder_aside(output_dir) as folder:
        vae.save_pretrained(folder)
        write_text(folder / "training.json", json.dumps(result, indent=1))
    return result


def _images(images: str, vae: Any, *, resolution: int, seed: int) -> ImageFiles | RenderedImages:
    step = compression(vae)
    if images == RENDERED:
        return RenderedImages(seed=seed)
    if resolution % step or resolution <= 0:
        raise UsageError(f"resolution: must be a multiple of {step}, got {resolution}")
    return ImageFiles(images, resolution, seed=seed)
