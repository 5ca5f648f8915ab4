"""One pass over preference pairs: images to latents, prompts to embeddings, and both images inverted by the reference.

Training then needs neither autoencoder nor text encoders, and for states that are inverted deterministically the
reference's error is one number an (image, state): no forward of the reference either.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from diffalign.config import PreferenceRunConfig
from diffalign.data.pair_cache import PairCache
from diffalign.data.pair_tables import PairsError, tables
from diffalign.data.pairs import read_pairs
from diffalign.fingerprint import fingerprint
from diffalign.inversion import inversion_grid
from diffalign.pipelines.base import TextToImageModel
from diffalign.training.forward import image_size
from diffalign.training.pair_maker import Item, PairMaker, Shard, solver_of

logger = logging.getLogger(__name__)
SHARD_PAIRS = 128


def shards(
    items: Iterable[Item], *, first: int = 0, limit: int | None = None, size: int
) -> Iterator[Shard]:
    """Cut a stream where a row ends, so that a shard can be read without those before it."""
    held: list[Item] = []
    number = first
    for row, group in groupby(islice(items, limit), key=lambda item: item.row):
        if len(held) >= size:
            yield Shard(number, held, row)
            held, number = [], number + 1
        held.extend(group)
    if held:
        yield Shard(number, held, held[-1].row + 1)


def fingerprint_of(model: TextToImageModel) -> str:
    """Of all weights without adapters."""
    parts = model.pipeline.components.items()
    return fingerprint({n: p for n, p in parts if isinstance(p, torch.nn.Module)})


def cache_key(config: PreferenceRunConfig, model: TextToImageModel, grid: Tensor) -> dict[str, Any]:
    """Everything that a cache depends on."""
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
        "model": fingerprint_of(model),
        "grid": [round(t, 3) for t in grid.tolist()] if config.states else [],
        "size": list(image_size(config, model)),
        "mixed_precision": config.training.mixed_precision,
    }


def grid_of(config: PreferenceRunConfig, model: TextToImageModel) -> Tensor:
    """The rising timesteps (N + 1,) of the model's own scheduler, from clean to noise."""
    height, width = image_size(config, model)
    scheduler = model.scheduler_at(config.pairs.inversion.steps, height=height, width=width)
    return inversion_grid(scheduler.timesteps)


def precompute(
    config: PreferenceRunConfig, model: TextToImageModel, accelerator: Accelerator
) -> PairCache:
    """Fill the cache of a run, or go on where that stopped; processes share the shards.

    Raises:
        PairsError: the source is not readable, or no pair of it can be used.
        CacheError: the cache was made from something else, or the disk is full.
    """
    cache = PairCache(config.pairs.cache or f"{config.output_dir.rstrip('/')}-cache")
    grid = grid_of(config, model)
    if accelerator.is_main_process:
        cache.claim(cache_key(config, model, grid))
    accelerator.wait_for_everyone()
    if cache.complete:
        return cache
    done, row, items = 0, 0, 0
    while (facts := cache.facts(done)) is not None:
        done, row, items = done + 1, facts["stop"], items + facts["items"]
    limit = None if config.pairs.limit is None else config.pairs.limit - items
    maker = PairMaker(config, model, grid)
    bar = tqdm(
        desc="precompute", unit="pair", initial=items, disable=not accelerator.is_main_process
    )
    stream_of_items = read_pairs(config.pairs, start=row)
    for shard in shards(stream_of_items, first=done, limit=limit, size=SHARD_PAIRS):
        done = shard.number + 1
        mine = shard.number % accelerator.num_processes == accelerator.process_index
        if mine and cache.facts(shard.number) is None:
            started = time.perf_counter()
            tensors, facts = maker.make(shard)
            facts["seconds"] = time.perf_counter() - started
            cache.write_shard(shard.number, tensors, facts)
        bar.update(len(shard.items))
    bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish(cache, done)
    accelerator.wait_for_everyone()
    return cache


def finish(cache: PairCache, shards: int) -> None:
    """Write the index; say what was left out."""
    found = [cache.facts(number) or {} for number in range(shards)]
    skipped = sum((Counter(f["skipped"]) for f in found), Counter[str]())
    if not any(f["pairs"] for f in found):
        reasons = ", ".join(f"{why}: {n}" for why, n in skipped.items())
        raise PairsError(f"pairs.source: no pair can be used ({reasons or 'there is none'})")
    errors = [f["round_trip_error"] for f in found if "round_trip_error" in f]
    notes = {
        "skipped": dict(skipped),
        "round_trip_error": errors[0] if errors else None,
        "seconds": sum(f["seconds"] for f in found),
    }
    cache.finish(found, notes=notes)
    if skipped:
        logger.warning(
            "pairs left out: %s", ", ".join(f"{why}: {n}" for why, n in skipped.most_common())
        )
