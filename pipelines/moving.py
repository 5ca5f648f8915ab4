"""Move of a model into another latent space, before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, DiffusionPipeline

from diffalign.core.errors import UsageError, one_line
from diffalign.core.hub import unreachable
from diffalign.latents.alignment import ratio
from diffalign.latents.codec import LatentCodec
from diffalign.latents.move import moved
from diffalign.latents.shift import moved_scheduler
from diffalign.pipelines import dcgen, hub
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.places import look
from diffalign.pipelines.registry import wrap_pipeline
from diffalign.shapes import CHECKPOINTS
from diffalign.types import Size

AUTOENCODERS = {"shapes-dc": "an AutoencoderDC f16c32 for Shapes; ships with diffalign"}


def load_autoencoder(name: str, *, dtype: Any = torch.bfloat16, meta: bool = False) -> Any:
    """Load an AutoencoderDC or AutoencoderKL.

    Args:
        name: a name that ships, a folder or a hub id; of a pipeline the subfolder `vae` is read.
        meta: read the configuration only, and build the autoencoder on the meta device.

    Raises:
        UsageError: the autoencoder cannot be loaded.
    """
    source = str(CHECKPOINTS / name) if name in AUTOENCODERS else name
    try:
        options = _place(source)
        kind = _kind(source, options)
        if meta:
            with torch.device("meta"):
                return kind.from_config(kind.load_config(source, **options)).to(dtype)
        return kind.from_pretrained(source, torch_dtype=dtype, **options).eval()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"latents.autoencoder: {name} could not be loaded: {one_line(error)}"
        ) from error


def _place(source: str) -> dict[str, Any]:
    """Return the arguments that locate the autoencoder in a folder or hub id.

    They name the subfolder `vae` of a pipeline.
    """
    if Path(source).is_dir():
        return {"subfolder": "vae"} if (Path(source) / "vae").is_dir() else {}
    place = look(source, setting="path")
    if place is None or place.kind != "hub":
        raise ValueError(f"it is no folder and no hub id; shipped are {', '.join(AUTOENCODERS)}")
    repo = hub.repository(place.source, place.revision)
    if not repo.files:
        raise ValueError(unreachable(place.source))
    inner = {} if "config.json" in repo.files else {"subfolder": "vae"}
    return {**repo.options, **inner}


def _kind(source: str, options: dict[str, Any]) -> Any:
    name = AutoencoderDC.load_config(source, **options).get("_class_name")
    if name not in ("AutoencoderDC", "AutoencoderKL"):
        raise ValueError(f"{name} is no AutoencoderDC or AutoencoderKL")
    return {"AutoencoderDC": AutoencoderDC, "AutoencoderKL": AutoencoderKL}[name]


def tokens_ratio(model: TextToImageModel, codec: LatentCodec, size: Size) -> int:
    """Return how many of the model's tokens per side one token of the codec replaces.

    Args:
        size: (height, width) of the images in pixels.

    Raises:
        UsageError: the ratio is no whole number, or the codec does not support the size.
    """
    height, width = size
    if height % codec.pixels_per_token or width % codec.pixels_per_token:
        raise UsageError(
            f"images of {height}x{width} do not fit an autoencoder that makes a token of "
            f"{codec.pixels_per_token} pixels a side"
        )
    old = model.pixels_per_token
    grids = [(height // step, width // step) for step in (old, codec.pixels_per_token)]
    return ratio(grids[0], grids[1])


def move_model(
    model: TextToImageModel,
    vae: Any,
    *,
    size: Size,
    shift: str = "pixels",
    channels: int | None = None,
) -> TextToImageModel:
    """Return a pipeline with the model's text encoders and blocks over another autoencoder.

    The first and the last layer of its denoiser are zeros.

    Args:
        vae: autoencoder of the new latent space.
        size: (height, width) of the images in pixels.
        shift: "pixels" or "tokens", the quantity that keeps the base model's noise schedule.
        channels: number of leading channels of the autoencoder to use (`LatentCodec.prefix`).

    Raises:
        UsageError: the family cannot be moved, or the sizes do not fit.
    """
    if model.ends is None:
        raise UsageError(
            f"a {model.family} model cannot be moved: its first layer is no patch embedder; SD3, FLUX and SANA can"
        )
    codec = model.codec_of(vae, prefix=channels)
    k = tokens_ratio(model, codec, size)
    denoiser = moved(model.denoiser, model.ends, **model.moved_config(codec, k))
    parts = {
        **model.pipeline.components,
        "transformer": denoiser,
        "vae": vae,
        "scheduler": moved_scheduler(model.pipeline.scheduler, ratio=1 if shift == "tokens" else k),
    }
    pipeline: DiffusionPipeline = getattr(dcgen, model.deep_pipeline)(
        **parts,
        image_size=size[0] if size[0] == size[1] else None,
        max_sequence_length=model.max_sequence_length,
        codec=None if vae.device.type == "meta" else codec.to_dict(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return wrap_pipeline(pipeline, max_sequence_length=model.max_sequence_length, default_size=size)
