"""One pass over captioned images: latents in the new space, prompts, and of the first images latents in the old one."""

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
from diffalign.data.captioned import CaptionedItem, ImageSource, stacked
from diffalign.data.fill import SHARD_ITEMS, fill
from diffalign.data.images import ImageFolderError
from diffalign.data.latent_cache import LatentCache
from diffalign.data.shard_cache import Shard, prompt_tensors
from diffalign.latents.codec import LatentCodec
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.moving import load_autoencoder, tokens_ratio
from diffalign.pipelines.sampling import EmbedCache
from diffalign.training.denoise import image_size


def source_of(config: LatentRunConfig, size: tuple[int, int]) -> ImageSource:
    """Where the images of a run come from."""
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
    """Everything that a cache depends on."""
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
    """Makes the tensors of shards.

    Args:
        base: encodes prompts, and images in the old space where `paired`.
        codec: of the new space.
    """

    def __init__(
        self, config: LatentRunConfig, base: TextToImageModel, codec: LatentCodec, *, paired: bool
    ) -> None:
        self.config, self.base, self.codec, self.paired = config, base, codec, paired
        self.embed = EmbedCache(base)
        self.dtype = getattr(torch, config.latents.dtype)

    def make(self, shard: Shard) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors of the usable images, and what is to be known of the shard."""
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
        found = {}
        for name, codec in codecs.items():
            with compute(self.base.device, self.config.training.mixed_precision):
                found[name] = codec.encode(pixels).to(self.dtype).cpu()
        return found


def new_autoencoder(config: LatentRunConfig, device: torch.device) -> Any:
    """Of the space that a run moves to, frozen; None where the model is there already."""
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
    """Fill the cache of a run, or go on where that stopped; processes share the shards.

    Args:
        codec: of the space that the run moves to, where it is there already.

    Raises:
        ImageFolderError: the source is not readable, or no image of it can be used.
        UsageError: the sizes do not fit the new space.
        CacheError: the cache was made from something else, or the disk is full.
    """
    size = image_size(config, base)
    paired = config.latents.autoencoder is not None
    source = source_of(config, size)
    if codec is None:
        vae = new_autoencoder(config, accelerator.device)
        codec = base.codec if vae is None else base.codec_of(vae, prefix=config.latents.channels)
    if paired:
        tokens_ratio(base, codec, size)  # refuses sizes that do not fit
    return fill(
        LatentCache(config.latents.cache or f"{config.output_dir.rstrip('/')}-cache"),
        accelerator,
        key=cache_key(config, base, codec, source, paired=paired),
        items=source.items,
        limit=config.latents.limit,
        make=lambda: LatentMaker(config, base, codec, paired=paired).make,
        nothing=lambda why: ImageFolderError(f"latents.images: no image can be used ({why})"),
    )
