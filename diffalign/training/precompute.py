"""One pass over preference pairs: images to latents, prompts to embeddings, and both images inverted by the reference.

Training then needs neither autoencoder nor text encoders, and for states that are inverted deterministically the
reference's error is one number an (image, state): no forward of the reference either.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from diffalign import lora
from diffalign.config import PreferenceRunConfig
from diffalign.data.images import fit, read_image
from diffalign.data.pair_cache import PairCache
from diffalign.data.pair_tables import PairsError, tables
from diffalign.data.pairs import PreferencePair, Skipped, read_pairs
from diffalign.errors import UsageError
from diffalign.inversion import integrate, inversion_grid, round_trip_error
from diffalign.noise import RectifiedFlow, implied_noise
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.sampling import EmbedCache
from diffalign.precision import compute
from diffalign.seeds import GEOMETRY, STATES, stream
from diffalign.training.forward import image_size, predict
from diffalign.types import PromptEmbeds

logger = logging.getLogger(__name__)
SHARD_PAIRS = 128
NAMED_SKIPS = 5
"""Of each reason, how many skipped rows are named in the log."""
Item = PreferencePair | Skipped


@dataclass(frozen=True)
class Shard:
    """`items` that are read from the source together; the next shard starts at row `stop`."""

    number: int
    items: list[Item]
    stop: int


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


def fingerprint(model: TextToImageModel) -> str:
    """Of all weights without adapters: name, shape and the first values of each tensor."""
    digest = hashlib.sha256()
    parts = {
        name: part
        for name, part in sorted(model.pipeline.components.items())
        if isinstance(part, torch.nn.Module)
    }
    for part_name, part in parts.items():
        for name, tensor in sorted(part.state_dict().items()):
            if "lora_" not in name:
                plain = name.replace(".base_layer", "")
                values = tensor.flatten()[:64].float().cpu().numpy().tobytes()
                digest.update(f"{part_name}.{plain} {tuple(tensor.shape)}".encode() + values)
    return digest.hexdigest()[:16]


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
        "model": fingerprint(model),
        "grid": [round(t, 3) for t in grid.tolist()] if config.states else [],
        "size": list(image_size(config, model)),
        "seed": config.training.seed,
        "mixed_precision": config.training.mixed_precision,
    }


def solver_of(config: PreferenceRunConfig, model: TextToImageModel) -> str:
    """The configured solver, or the family's."""
    flow = isinstance(model.noise, RectifiedFlow)
    found = config.pairs.inversion.solver or ("fireflow" if flow else "midpoint")
    if found == "fireflow" and not flow:
        raise UsageError("pairs.inversion.solver: fireflow is for rectified flows (SD3, FLUX)")
    return found


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


@dataclass
class PairMaker:
    """Makes the tensors of shards with the frozen reference."""

    config: PreferenceRunConfig
    model: TextToImageModel
    grid: Tensor
    named: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        c = self.config
        self.embed = EmbedCache(self.model)
        self.size = image_size(c, self.model)
        self.dtype = getattr(torch, c.pairs.dtype)
        noise = self.model.noise.scales(self.grid)[1]
        self.allowed = [
            i for i in range(1, len(self.grid)) if noise[i] >= c.pairs.inversion.min_noise
        ]
        if c.states > len(self.allowed):
            raise UsageError(
                f"pairs.inversion.states: {c.states} of {len(self.allowed)} states with at least "
                f"{c.pairs.inversion.min_noise} of noise; use more pairs.inversion.steps"
            )

    def make(self, shard: Shard) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors of the usable pairs, and what is to be known of the shard."""
        skipped: Counter[str] = Counter()
        kept: list[tuple[PreferencePair, Tensor, Tensor]] = []
        parts: list[dict[str, Tensor]] = []
        facts: dict[str, Any] = {"stop": shard.stop, "items": len(shard.items), "pairs": []}
        for item in shard.items:
            ready = self._ready(item)
            if isinstance(ready, str):
                skipped[ready] += 1
                self._name(item, ready)
                continue
            kept.append(ready)
            facts["pairs"].append(_facts_of(ready[0]))
            if len(kept) * 2 >= self.config.pairs.micro_batch_size:
                parts.append(self._tensors(kept, facts, first=shard.number == 0 and not parts))
                kept = []
        if kept:
            parts.append(self._tensors(kept, facts, first=shard.number == 0 and not parts))
        facts["skipped"] = dict(skipped)
        tensors = {k: torch.cat([p[k] for p in parts]) for k in parts[0]} if parts else {}
        return tensors | self._prompts(facts["pairs"]), facts

    def _name(self, item: Item, why: str) -> None:
        self.named[why] += 1
        if self.named[why] <= NAMED_SKIPS:
            logger.warning("%s is left out: %s", item.place, why)

    def _ready(self, item: Item) -> tuple[PreferencePair, Tensor, Tensor] | str:
        """The pair with the preferred image first, its pixels (2, 3, H, W) and time ids (2, 6); or why not."""
        if isinstance(item, Skipped):
            return item.why
        if item.preference == 0.5 and self.config.pairs.ties == "drop":
            return "tie"
        try:
            pixels = [read_image(image) for image in item.images]
        except OSError:
            return "unreadable image"
        if torch.equal(*pixels):
            return "identical images"
        generator = torch.Generator().manual_seed(
            stream(GEOMETRY, self.config.training.seed, item.row)
        )
        draws = torch.rand(4, generator=generator).tolist()
        pair = _oriented(item, pixels, tie_break=draws[0], ties=self.config.pairs.ties)
        place = (0.5, 0.5) if self.config.pairs.center_crop else (draws[1], draws[2])
        fitted = [fit(p, *self.size, place=place) for p in pixels]
        flip = self.config.pairs.random_flip and draws[3] < 0.5
        images = torch.stack([p.flip(-1) if flip else p for p, _ in fitted])
        times = torch.tensor(
            [
                [*p.shape[1:], *corner, *self.size]
                for p, (_, corner) in zip(pixels, fitted, strict=True)
            ]
        )
        return pair, images, times.float()

    @torch.no_grad()
    def _tensors(
        self,
        kept: list[tuple[PreferencePair, Tensor, Tensor]],
        facts: dict[str, Any],
        *,
        first: bool,
    ) -> dict[str, Tensor]:
        """Of n pairs: everything of a shard but its prompts."""
        pairs = [pair for pair, _, _ in kept]
        images = torch.cat([pixels for _, pixels, _ in kept])
        with compute(self.model.device, self.config.training.mixed_precision):
            latents = self.model.encode(images.to(self.model.device)).to(self.dtype)
        found = {
            "latents": latents.unflatten(0, (len(pairs), 2)).cpu(),
            "preference": torch.tensor([p.preference for p in pairs]),
            "weight": torch.tensor([p.weight for p in pairs]),
        }
        times = torch.stack([t for _, _, t in kept])
        if self.model.takes_time_ids:
            found["time_ids"] = times
        if self.config.states:
            embeds = self.embed([p.prompt for p in pairs for _ in range(2)])
            if self.model.takes_time_ids:
                of_images = times.flatten(0, 1).to(self.model.device)
                embeds = replace(embeds, time_ids=of_images)
            with lora.policy(self.model.denoiser, lora.REFERENCE):
                found |= self._inverted(latents.float(), embeds, pairs)
                if first:
                    facts["round_trip_error"] = self._round_trip(latents.float(), embeds)
        return found

    def _field(self, embeds: PromptEmbeds) -> Any:
        """The reference's prediction for one batch of prompts, guided as the inversion is."""
        guidance = self.config.pairs.inversion.guidance_scale
        negative = None
        if self.model.costs_a_forward(guidance):
            negative = self.embed([""]).repeat_first(len(embeds))

        def field_of(noisy: Tensor, times: Tensor) -> Tensor:
            return predict(
                self.model,
                noisy,
                times,
                embeds,
                mixed_precision=self.config.training.mixed_precision,
                guidance_scale=guidance,
                negative_embeds=negative,
            )

        return field_of

    def _inverted(
        self, latents: Tensor, embeds: PromptEmbeds, pairs: list[PreferencePair]
    ) -> dict[str, Tensor]:
        """K states of each image, and the reference's error at them."""
        path, solver = self.model.noise, solver_of(self.config, self.model)
        states = integrate(self._field(embeds), latents, self.grid, path, solver=solver)
        index = torch.stack([self._chosen(p) for p in pairs])
        of_image = index.repeat_interleave(2, 0)
        every = torch.stack(states, 1)  # (2n, N + 1, C, H, W)
        rows = torch.arange(len(every), device=every.device)
        kept, errors = [], []
        for k in range(self.config.states):
            where = of_image[:, k]
            state = every[rows, where.to(every.device)].to(self.dtype)
            times = self.grid[where].to(every.device)
            noise = implied_noise(path, latents, state.float(), times)
            target = path.target(latents, noise, times)
            guidance = self.config.pairs.inversion.guidance_scale
            model_pred = predict(
                self.model,
                state.float(),
                times,
                embeds,
                mixed_precision=self.config.training.mixed_precision,
                guidance_scale=guidance if self.model.guidance_is_embedded else None,
            )
            errors.append((model_pred.float() - target).square().flatten(1).mean(1))
            kept.append(state)
        pairwise = (len(pairs), 2)
        return {
            "states": torch.stack(kept, 1).unflatten(0, pairwise).cpu(),
            "grid_index": index,
            "reference_error": torch.stack(errors, 1).unflatten(0, pairwise).cpu(),
        }

    def _chosen(self, pair: PreferencePair) -> Tensor:
        """(K,) places on the grid, the same of both images."""
        key = stream(STATES, self.config.training.seed, pair.row)
        generator = torch.Generator().manual_seed(key)
        order = torch.randperm(len(self.allowed), generator=generator)[: self.config.states]
        return torch.tensor(self.allowed)[order].sort().values

    def _round_trip(self, latents: Tensor, embeds: PromptEmbeds) -> float:
        """Median relative error of inverting and sampling with the same solver."""
        solver = solver_of(self.config, self.model)
        errors = round_trip_error(
            self._field(embeds),
            latents,
            self.grid,
            self.model.noise,
            solver=solver,
            sampler="euler" if solver == "fixed_point" else solver,
        )
        return float(errors.median())

    def _prompts(self, pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Each prompt's embeddings once, and the row of each pair's."""
        if not pairs:
            return {}
        texts = list(dict.fromkeys(p["prompt"] for p in pairs))
        embeds = self.embed(texts).to("cpu")
        found = {
            "prompt_row": torch.tensor([texts.index(p["prompt"]) for p in pairs]),
            "prompt_embeds": embeds.prompt_embeds,
        }
        if embeds.pooled_prompt_embeds is not None:
            found["pooled_prompt_embeds"] = embeds.pooled_prompt_embeds
        return found


def _facts_of(pair: PreferencePair) -> dict[str, Any]:
    """What the index says of a pair."""
    return {
        "place": pair.place,
        "prompt": pair.prompt,
        "preference": pair.preference,
        "weight": pair.weight,
    }


def _oriented(
    pair: PreferencePair, pixels: list[Tensor], *, tie_break: float, ties: str
) -> PreferencePair:
    """The preferred image first; swaps `pixels` in place along with it."""
    p = pair.preference
    if p == 0.5 and ties == "random":
        p = 1.0 if tie_break < 0.5 else 0.0
    if p < 0.5:
        pixels.reverse()
        p = 1 - p
    return replace(pair, preference=p)
