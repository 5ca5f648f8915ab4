"""Encode captioned images and their prompts into the latent cache of a DC-Gen run.

Every image is encoded in the new latent space. The first images are also encoded in the old one, for the alignment.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign.config import LatentRunConfig
from diffalign.core.fingerprint import of_json, of_pipeline
from diffalign.core.precision import compute
from diffalign.data.captioned import RENDERED, CaptionedItem, ImageSource, stacked, training_images
from diffalign.data.fill import SHARD_ITEMS, fill
from diffalign.data.images import ImageFolderError
from diffalign.data.latent_cache import LatentCache
from diffalign.data.shard_cache import Shard, prompt_tensors
from diffalign.latents.codec import LatentCodec
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.moving import load_autoencoder, tokens_ratio
from diffalign.pipelines.sampling import EmbedCache
from diffalign.training.denoise import image_size


def check_source(config: LatentRunConfig) -> None:
    """Check that the images of a run exist, before a model is loaded.

    Raises:
        ImageFolderError: the folder does not exist, or holds no image or no caption.
    """
    if config.latents.images not in ("", RENDERED):
        training_images(config.latents.images)


def source_of(config: LatentRunConfig, size: tuple[int, int]) -> ImageSource:
    """Return the image source of a run, at `size` (height, width) in pixels."""
    c = config.latents
    return ImageSource(
        c.images,
        size,
        seed=c.seed,
        center_crop=c.center_crop,
        random_flip=c.random_flip,
        limit=c.limit,
    )


def cache_key(
    config: LatentRunConfig,
    base: TextToImageModel,
    codec: LatentCodec,
    source: ImageSource,
    *,
    paired: bool,
) -> dict[str, Any]:
    """Return all settings and digests that determine the content of a latent cache."""
    c = config.latents
    images = asdict(source)
    if files := source.files:
        images |= {"source": "", "files": len(files), "digest": of_json(files)}
    return {
        "images": images,
        "codec": codec.to_dict(),
        "base": of_pipeline(base.pipeline),
        "text_tokens": base.max_sequence_length,
        "paired_images": c.alignment_images if paired else 0,
        "dtype": c.dtype,
        "mixed_precision": config.training.mixed_precision,
    }


class LatentMaker:
    """Maker of the tensors of shards.

    Args:
        base: model that encodes prompts and, if `paired`, images in the old latent space.
        codec: codec of the new latent space.
        paired: encode the first `latents.alignment_images` images in both latent spaces.
    """

    def __init__(
        self, config: LatentRunConfig, base: TextToImageModel, codec: LatentCodec, *, paired: bool
    ) -> None:
        self.config, self.base, self.codec, self.paired = config, base, codec, paired
        self.embed = EmbedCache(base)
        self.dtype = getattr(torch, config.latents.dtype)

    def make(self, shard: Shard) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors of a shard's usable images, and the shard's entry in the index.

        The entry has the row after the shard, its number of items, its images and the reasons for skipped items.
        """
        usable = [i for i in shard.items if i.pixels is not None]
        skipped = Counter(i.problem for i in shard.items if i.pixels is None)
        paired = self.paired and shard.number * SHARD_ITEMS < self.config.latents.alignment_images
        size = self.config.latents.micro_batch_size
        parts = [
            self._tensors(usable[at : at + size], paired=paired)
            for at in range(0, len(usable), size)
        ]
        facts = {
            "stop": shard.stop,
            "items": len(shard.items),
            "images": [{"row": i.row, "prompt": i.prompt, "paired": paired} for i in usable],
            "skipped": dict(skipped),
        }
        tensors = {k: torch.cat([p[k] for p in parts]) for k in parts[0]} if parts else {}
        return tensors | prompt_tensors([i.prompt for i in usable], self.embed), facts

    @torch.no_grad()
    def _tensors(self, items: list[CaptionedItem], *, paired: bool) -> dict[str, Tensor]:
        pixels = stacked(items)
        codecs = {"latents": self.codec} | ({"base_latents": self.base.codec} if paired else {})
        latents = {}
        for name, codec in codecs.items():
            with compute(self.base.device, self.config.training.mixed_precision):
                latents[name] = codec.encode(pixels).to(self.dtype).cpu()
        return latents


def new_autoencoder(config: LatentRunConfig, device: torch.device) -> Any:
    """Return the frozen autoencoder of the latent space that a run moves to.

    Return None if the model is in that space already.
    """
    name = config.latents.autoencoder
    if name is None:
        return None
    vae = load_autoencoder(name, dtype=getattr(torch, config.model.dtype))
    return vae.requires_grad_(False).to(device)


def precompute_latents(
    config: LatentRunConfig,
    base: TextToImageModel,
    accelerator: Accelerator,
    *,
    codec: LatentCodec | None = None,
) -> LatentCache:
    """Fill the latent cache of a run, or continue an interrupted fill.

    All processes share the shards.

    Args:
        codec: codec of the latent space that the run moves to. None loads the autoencoder of `latents.autoencoder`.

    Raises:
        ImageFolderError: the image source is not readable, or none of its images can be used.
        UsageError: the image size does not fit the new latent space.
        CacheError: the cache was made from other settings or files, or the disk is full.
    """
    size = image_size(config, base)
    paired = config.latents.autoencoder is not None
    source = source_of(config, size)
    if codec is None:
        vae = new_autoencoder(config, accelerator.device)
        codec = base.codec if vae is None else base.codec_of(vae, prefix=config.latents.channels)
    if paired:
        # raises UsageError for an image size that does not fit the new latent space
        tokens_ratio(base, codec, size)
    return fill(
        LatentCache(config.latents.cache or f"{config.output_dir.rstrip('/')}-cache"),
        accelerator,
        key=cache_key(config, base, codec, source, paired=paired),
        items=source.items,
        limit=config.latents.limit,
        make=lambda: LatentMaker(config, base, codec, paired=paired).make,
        nothing=lambda why: ImageFolderError(
            f"latents.images: no image can be used ({why}). Replace them, or name another folder"
        ),
    )
