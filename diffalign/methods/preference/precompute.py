"""Fill the cache of a run on preference pairs.

The cache has the latents of the images, the embeddings of the prompts, and for Inversion-DPO the states of both images
as the reference inverts them. Training then needs neither the autoencoder nor the text encoders. It needs no forward of
the reference at these states either: the reference's error is one cached number per image and state.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from diffalign.config import PreferenceRunConfig
from diffalign.core.fingerprint import of_pipeline
from diffalign.data.fill import fill
from diffalign.data.pairs.cache import PairCache
from diffalign.data.pairs.records import check_pairs, has_masks, read_pairs
from diffalign.data.pairs.tables import PairsError, tables
from diffalign.diffusion.inversion import inversion_grid
from diffalign.methods.preference.maker import PairMaker, solver_of
from diffalign.methods.preference.recorded import with_solver
from diffalign.pipelines.base import TextToImageModel
from diffalign.training.denoise import image_size

logger = logging.getLogger(__name__)


def check_source(config: PreferenceRunConfig) -> None:
    """Check that the pairs of a run exist, before a model is loaded.

    Raises:
        PairsError: they do not exist, or their layout is unknown.
    """
    check_pairs(config.pairs)
    present = has_masks(config.pairs)
    if config.algorithm.uses_masks and not present:
        raise PairsError(
            f"{config.pairs.source} has no column `mask`, which algorithm.masked=true reads. Add one with an image for "
            "each pair, white where the pair is compared, or name it with pairs.column_map",
            setting="pairs.source",
        )
    if present and not config.algorithm.uses_masks:
        logger.warning(
            "%s has a column `mask`, which is not used: set algorithm.type=diffusion_dpo and algorithm.masked=true",
            config.pairs.source,
        )


def cache_key(config: PreferenceRunConfig, model: TextToImageModel, grid: Tensor) -> dict[str, Any]:
    """Return all settings and digests that determine the content of a pair cache."""
    pairs = asdict(config.pairs)
    for name in ("cache", "validation", "micro_batch_size", "source"):
        del pairs[name]
    root = Path(config.pairs.source)
    files = {
        (f.relative_to(root) if root.is_dir() else Path(f.name)).as_posix(): f.stat().st_size
        for f in tables(config.pairs.source)
    }
    pairs["inversion"] |= {"states": config.states, "solver": solver_of(config, model)}
    return {
        "files": files,
        "pairs": pairs,
        "model": of_pipeline(model.pipeline),
        **model.codec.statistics,
        "grid": [round(t, 3) for t in grid.tolist()] if config.states else [],
        "size": list(image_size(config, model)),
        "mixed_precision": config.training.mixed_precision,
        # absent without masks, so that older caches still fit
        **({"masked": True} if config.algorithm.uses_masks else {}),
    }


def grid_of(config: PreferenceRunConfig, model: TextToImageModel) -> Tensor:
    """Return the timesteps (N + 1,) of the model's scheduler, from clean to noise."""
    size = image_size(config, model)
    scheduler = model.scheduler_at(config.pairs.inversion.steps, size)
    return inversion_grid(scheduler.timesteps)


def precompute(
    config: PreferenceRunConfig, model: TextToImageModel, accelerator: Accelerator
) -> PairCache:
    """Fill the pair cache of a run, or continue an interrupted fill.

    All processes share the shards.

    Raises:
        PairsError: the source of the pairs is not readable, or none of its pairs can be used.
        CacheError: the cache was made from other settings or files, or the disk is full.
    """
    cache = PairCache(config.pairs.cache or f"{config.output_dir.rstrip('/')}-cache")
    grid = grid_of(config, model)
    config = with_solver(config, model, grid, say=accelerator.is_main_process)
    return fill(
        cache,
        accelerator,
        key=cache_key(config, model, grid),
        items=lambda row: read_pairs(config.pairs, start=row),
        limit=config.pairs.limit,
        make=lambda: PairMaker(config, model, grid).make,
        nothing=lambda reasons: PairsError(
            f"pairs.source: no pair can be used ({reasons}). Correct its rows, or name another source"
        ),
    )
