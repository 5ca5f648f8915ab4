"""Fill a shard cache row by row, distributed over processes and resumable."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, islice
from typing import Any, TypeVar

from accelerate import Accelerator
from torch import Tensor

from diffalign.core import console, processes
from diffalign.core.interruption import Interrupted, Interruption
from diffalign.data.shard_cache import Shard, ShardCache

logger = logging.getLogger(__name__)
SHARD_ITEMS = 128
Cache = TypeVar("Cache", bound=ShardCache)


def shards(
    items: Iterable[Any], *, first: int = 0, limit: int | None = None, size: int
) -> Iterator[Shard]:
    """Cut a stream of items into shards of at least `size` items.

    The last shard may be smaller. A shard ends with a row, so that it can be read without the shards before it.

    Args:
        first: number of the first shard.
        limit: largest number of items.
    """
    held: list[Any] = []
    number = first
    for row, group in groupby(islice(items, limit), key=lambda item: item.row):
        if len(held) >= size:
            yield Shard(number, held, row)
            held, number = [], number + 1
        held.extend(group)
    if held:
        yield Shard(number, held, held[-1].row + 1)


def fill(
    cache: Cache,
    accelerator: Accelerator,
    *,
    key: dict[str, Any],
    items: Callable[[int], Iterable[Any]],
    limit: int | None,
    make: Callable[[], Callable[[Shard], tuple[dict[str, Tensor], dict[str, Any]]]],
    nothing: Callable[[str], Exception],
) -> Cache:
    """Fill a cache and return it, complete.

    Args:
        key: every value that the cache depends on.
        items: yields the items of the source, beginning with a given row.
        make: returns the function that makes a shard's tensors and facts; not called if the cache is complete.
        nothing: makes the error to raise if every row was skipped, from a summary of the reasons.
    """
    if processes.highest(int(cache.complete)):
        processes.on_main(lambda: cache.claim(key))
        return cache
    with processes.hold(cache.folder, setting=cache.setting):
        processes.on_main(lambda: cache.claim(key))
        # another launch may have filled the cache while this one waited for the lock
        if not cache.complete:
            done = _write_shards(cache, accelerator, items, limit=limit, make=make)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                finish(cache, done, nothing)
        accelerator.wait_for_everyone()
    return cache


def _write_shards(
    cache: ShardCache,
    accelerator: Accelerator,
    items: Callable[[int], Iterable[Any]],
    *,
    limit: int | None,
    make: Callable[[], Callable[[Shard], tuple[dict[str, Tensor], dict[str, Any]]]],
) -> int:
    """Write this process's part of the missing shards; return the number of all shards."""
    done, row, count = 0, 0, 0
    while (facts := cache.facts(done)) is not None:
        done, row, count = done + 1, facts["stop"], count + facts["items"]
    maker = make()
    bar = console.progress("precompute", None, unit=cache.rows.removesuffix("s"), initial=count)
    left = None if limit is None else limit - count
    with Interruption("the shard in hand is written first") as interruption:
        for shard in shards(items(row), first=done, limit=left, size=SHARD_ITEMS):
            done = shard.number + 1
            mine = shard.number % accelerator.num_processes == accelerator.process_index
            if mine and cache.facts(shard.number) is None:
                started = time.perf_counter()
                tensors, facts = maker(shard)
                facts["seconds"] = time.perf_counter() - started
                cache.write_shard(shard.number, tensors, facts)
            bar.update(len(shard.items))
            if interruption.number:
                bar.close()
                raise Interrupted(
                    interruption.number,
                    f"stopped with {bar.n} {cache.rows} in {cache.folder}; the same command goes on from there",
                )
    bar.close()
    return done


def finish(cache: ShardCache, shards: int, nothing: Callable[[str], Exception]) -> None:
    """Write the index of a cache, and log the number of skipped rows by reason."""
    facts = [cache.facts(number) or {} for number in range(shards)]
    skipped = sum((Counter(f["skipped"]) for f in facts), Counter[str]())
    if not any(f[cache.rows] for f in facts):
        reasons = ", ".join(f"{why}: {n}" for why, n in skipped.items())
        raise nothing(reasons or "there is none")
    errors = [f["round_trip_error"] for f in facts if "round_trip_error" in f]
    notes = {
        "skipped": dict(skipped),
        "round_trip_error": errors[0] if errors else None,
        "seconds": sum(f["seconds"] for f in facts),
    }
    cache.finish(facts, notes=notes)
    if skipped:
        left_out = ", ".join(f"{why}: {n}" for why, n in skipped.most_common())
        logger.warning("%s left out: %s", cache.rows, left_out)
