"""What the frozen reference makes of a shard of preference pairs: latents, prompt embeddings, inverted states."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffalign import lora
from diffalign.algorithms.forward_process import matching_error
from diffalign.config import PreferenceRunConfig
from diffalign.core.errors import UsageError
from diffalign.core.precision import compute
from diffalign.core.seeds import GEOMETRY, STATES, stream
from diffalign.data.images import fit, read_image
from diffalign.data.pairs.records import PreferencePair, Skipped
from diffalign.data.pairs.states import RecordedStates
from diffalign.data.shard_cache import Shard, prompt_tensors
from diffalign.diffusion.inversion import Predict, integrate, round_trip_error
from diffalign.diffusion.paths import RectifiedFlow, chord_target
from diffalign.methods.preference.recorded import RECORDED, RecordedSource, default_solver
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.sampling import EmbedCache
from diffalign.training.denoise import image_size, predict
from diffalign.types import PromptEmbeds

logger = logging.getLogger(__name__)
NAMED_SKIPS = 5
"""Of each reason, how many skipped rows are named in the log."""
Item = PreferencePair | Skipped


def solver_of(config: PreferenceRunConfig, model: TextToImageModel) -> str:
    """Solver of the settings, or the family's."""
    found = config.pairs.inversion.solver or default_solver(model)
    if found == "fireflow" and not isinstance(model.noise, RectifiedFlow):
        raise UsageError(
            "pairs.inversion.solver: fireflow is for rectified flows (SD3, FLUX, SANA)"
        )
    return found


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
        self.recorded: RecordedSource | None = None
        if c.states and solver_of(c, self.model) == RECORDED:
            self.recorded = RecordedSource(c, self.model, self.grid)
            self.dtype = torch.float32  # or whatever they were drawn in: nothing is rounded

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
        prompts = [pair["prompt"] for pair in facts["pairs"]]
        return tensors | prompt_tensors(prompts, self.embed), facts

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
            stream(GEOMETRY, self.config.pairs.seed, item.row)
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
        recorded = self.recorded.read(pairs) if self.recorded else None
        if recorded:
            latents = torch.stack([r.latents for r in recorded]).to(self.model.device)
        else:
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
                found |= self._states(latents.float(), embeds, pairs, recorded)
                if first and not recorded:
                    facts["round_trip_error"] = self._round_trip(latents.float(), embeds)
        return found

    def _field(self, embeds: PromptEmbeds, *, guided: bool = True) -> Predict:
        """The reference's prediction for one batch of prompts, guided as the inversion is or plain as training asks for
        it; of states as they are kept, so that an inversion that looks at one has its reference error, too."""
        scale = self.config.pairs.inversion.guidance_scale
        guidance = scale if guided or self.model.guidance_is_embedded else None
        negative = None
        if self.model.costs_a_forward(guidance):
            negative = self.embed([""]).repeat_first(len(embeds))

        def field_of(noisy: Tensor, times: Tensor) -> Tensor:
            return predict(
                self.model,
                noisy.to(self.dtype).float(),
                times,
                embeds,
                mixed_precision=self.config.training.mixed_precision,
                guidance_scale=guidance,
                negative_embeds=negative,
            )

        return field_of

    def _states(
        self,
        latents: Tensor,
        embeds: PromptEmbeds,
        pairs: list[PreferencePair],
        recorded: list[RecordedStates] | None,
    ) -> dict[str, Tensor]:
        """K states of each image, and the reference's error at them: as they come, or one forward each."""
        if self.recorded and recorded:
            usable = [self.recorded.usable(r) for r in recorded[::2]]
            orders = [u[self._chosen(p, len(u))] for u, p in zip(usable, pairs, strict=True)]
            index, states, errors = self.recorded.states(recorded, pairs, orders)
            states, errors = states.to(latents.device), errors.to(latents.device)
        else:
            index, states, errors = self._inverted(latents, embeds, pairs)
        times = self.grid[index].repeat_interleave(2, 0).to(latents.device)
        for k in range(self.config.states):
            asked = errors[:, k].isnan().nonzero().flatten()
            if len(asked):
                state, t = states[asked, k].float(), times[asked, k]
                model_pred = self._field(embeds[asked], guided=False)(state, t)
                errors[asked, k] = self._error(model_pred, latents[asked], state, t)
        pairwise = (len(pairs), 2)
        return {
            "states": states.unflatten(0, pairwise).cpu(),
            "grid_index": index,
            "reference_error": errors.unflatten(0, pairwise).cpu(),
        }

    def _error(self, model_pred: Tensor, latents: Tensor, states: Tensor, times: Tensor) -> Tensor:
        """(B,) of predictions for states, beside what leads straight to the latents."""
        target = chord_target(self.model.noise, latents, states, times)
        return matching_error(model_pred, target)

    def _inverted(
        self, latents: Tensor, embeds: PromptEmbeds, pairs: list[PreferencePair]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of n pairs: places on the grid (n, K), states (2 n, K, C, H, W), errors (2 n, K) of the reference: NaN where
        the inversion did not look at a state as it is kept."""
        path, solver = self.model.noise, solver_of(self.config, self.model)
        watched = _Watched(self._field(embeds), self.grid)
        every = torch.stack(integrate(watched, latents, self.grid, path, solver=solver), 1)
        allowed = torch.tensor(self.allowed)
        index = torch.stack([allowed[self._chosen(p, len(allowed))] for p in pairs])
        of_image = index.repeat_interleave(2, 0).to(every.device)
        rows = torch.arange(len(every), device=every.device)
        states = every[rows[:, None], of_image].to(self.dtype)
        errors = torch.full(of_image.shape, math.nan, device=every.device)
        if self.model.costs_a_forward(self.config.pairs.inversion.guidance_scale):
            return index, states, errors  # it looked with guidance
        for k in range(self.config.states):
            model_pred, known = watched.at(of_image[:, k], like=latents)
            times = self.grid.to(every.device)[of_image[:, k]]
            error = self._error(model_pred, latents, states[:, k].float(), times)
            errors[known, k] = error[known]
        return index, states, errors

    def _chosen(self, pair: PreferencePair, n: int) -> Tensor:
        """(K,) of n states of a pair's images, in order."""
        key = stream(STATES, self.config.pairs.seed, pair.row)
        generator = torch.Generator().manual_seed(key)
        return torch.randperm(n, generator=generator)[: self.config.states].sort().values

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


class _Watched:
    """A field that remembers what it predicted on the grid. All solvers but FireFlow begin an interval at its state,
    and nothing looks at that time afterwards: the last prediction for it is of the state that is kept."""

    def __init__(self, field_of: Predict, grid: Tensor) -> None:
        self.field_of = field_of
        self.places = {t: i for i, t in enumerate(grid[:-1].tolist())}
        self.seen: dict[int, Tensor] = {}

    def __call__(self, noisy: Tensor, times: Tensor) -> Tensor:
        model_pred = self.field_of(noisy, times)
        place = self.places.get(times[0].item())
        if place is not None:
            self.seen[place] = model_pred.float()
        return model_pred

    def at(self, places: Tensor, *, like: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions (B, ...) for a state of each image, and (B,) whether there is one."""
        found = torch.empty_like(like)
        known = torch.zeros(len(places), dtype=torch.bool)
        for row, place in enumerate(places.tolist()):
            if place in self.seen:
                found[row], known[row] = self.seen[place][row], True
        return found, known


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
    p, images = pair.preference, pair.images
    if p == 0.5 and ties == "random":
        p = 1.0 if tie_break < 0.5 else 0.0
    if p < 0.5:
        pixels.reverse()
        p, images = 1 - p, (images[1], images[0])
    return replace(pair, preference=p, images=images)
