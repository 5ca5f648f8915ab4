"""Compute the cached tensors of preference pairs with the frozen reference.

The tensors are latents, prompt embeddings and, for Inversion-DPO, states of an inversion.
"""

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
from diffalign.methods.preference.masks import Ready, mask_of
from diffalign.methods.preference.recorded import RECORDED, RecordedSource, default_solver
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.sampler import Sampler
from diffalign.training.denoise import image_size, predict
from diffalign.types import PromptEmbeds

logger = logging.getLogger(__name__)
NAMED_SKIPS = 5
"""Largest number of skipped rows that the log names for each reason."""
Item = PreferencePair | Skipped


def solver_of(config: PreferenceRunConfig, model: TextToImageModel) -> str:
    """Return the inversion's solver: that of the settings, else the default of the model's family.

    Raises:
        UsageError: FireFlow is configured for a model that is no rectified flow.
    """
    solver = config.pairs.inversion.solver or default_solver(model)
    if solver == "fireflow" and not isinstance(model.noise, RectifiedFlow):
        raise UsageError(
            "pairs.inversion.solver: fireflow is for rectified flows (SD3, FLUX, SANA), but "
            f"{config.model.name} is a {model.family} model. Use midpoint"
        )
    return solver


@dataclass
class PairMaker:
    """Maker of the tensors of shards, with the frozen reference.

    Attributes:
        grid: rising timesteps (N + 1,) of the inversion.
        named: number of skipped rows for each reason.
    """

    config: PreferenceRunConfig
    model: TextToImageModel
    grid: Tensor
    named: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        c = self.config
        self.size = image_size(c, self.model)
        inversion = c.pairs.inversion
        self.sampler = Sampler(
            self.model, Drawing(inversion.steps, inversion.guidance_scale, self.size)
        )
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
            # float32 holds states of any precision without rounding
            self.dtype = torch.float32

    def make(self, shard: Shard) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors of a shard's usable pairs, and the shard's entry in the index.

        The entry has the row after the shard, its number of items, its pairs, the reasons for skipped items and, for
        the first shard, the round-trip error of the inversion.
        """
        skipped: Counter[str] = Counter()
        waiting: list[Ready] = []
        parts: list[dict[str, Tensor]] = []
        facts: dict[str, Any] = {"stop": shard.stop, "items": len(shard.items), "pairs": []}
        for item in shard.items:
            ready = self._ready(item)
            if isinstance(ready, str):
                skipped[ready] += 1
                self._name(item, ready)
                continue
            waiting.append(ready)
            facts["pairs"].append(_facts_of(ready.pair))
            if len(waiting) * 2 >= self.config.pairs.micro_batch_size:
                parts.append(self._tensors(waiting, facts, first=shard.number == 0 and not parts))
                waiting = []
        if waiting:
            parts.append(self._tensors(waiting, facts, first=shard.number == 0 and not parts))
        facts["skipped"] = dict(skipped)
        tensors = {k: torch.cat([p[k] for p in parts]) for k in parts[0]} if parts else {}
        prompts = [pair["prompt"] for pair in facts["pairs"]]
        return tensors | prompt_tensors(prompts, self.sampler.embed), facts

    def _name(self, item: Item, why: str) -> None:
        self.named[why] += 1
        if self.named[why] <= NAMED_SKIPS:
            logger.warning("%s is left out: %s", item.place, why)

    def _ready(self, item: Item) -> Ready | str:
        """Return a pair with the preferred image first, and its tensors.

        Return the reason as a text if the item cannot be used.
        """
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
        mask: Tensor | None = None
        if self.config.algorithm.uses_masks:
            reading = mask_of(item, pixels)
            if isinstance(reading, str):
                return reading
            mask = reading
        generator = torch.Generator().manual_seed(
            stream(GEOMETRY, self.config.pairs.seed, item.row)
        )
        draws = torch.rand(4, generator=generator).tolist()
        pair = _oriented(item, pixels, tie_break=draws[0], ties=self.config.pairs.ties)
        place = (0.5, 0.5) if self.config.pairs.center_crop else (draws[1], draws[2])
        fitted = [fit(p, *self.size, place=place) for p in pixels]
        flip = self.config.pairs.random_flip and draws[3] < 0.5
        images = torch.stack([p.flip(-1) if flip else p for p, _ in fitted])
        if mask is not None:
            mask = fit(mask, *self.size, place=place)[0]
            mask = mask.flip(-1) if flip else mask
        times = torch.tensor(
            [
                [*p.shape[1:], *corner, *self.size]
                for p, (_, corner) in zip(pixels, fitted, strict=True)
            ]
        )
        return Ready(pair, images, times.float(), mask)

    @torch.no_grad()
    def _tensors(
        self,
        ready: list[Ready],
        facts: dict[str, Any],
        *,
        first: bool,
    ) -> dict[str, Tensor]:
        """Return all tensors of n pairs except those of their prompts."""
        pairs = [item.pair for item in ready]
        recorded = self.recorded.read(pairs) if self.recorded else None
        if recorded:
            latents = torch.stack([r.latents for r in recorded]).to(self.model.device)
        else:
            images = torch.cat([item.pixels for item in ready])
            with compute(self.model.device, self.config.training.mixed_precision):
                latents = self.model.encode(images.to(self.model.device)).to(self.dtype)
        tensors = {
            "latents": latents.unflatten(0, (len(pairs), 2)).cpu(),
            "preference": torch.tensor([p.preference for p in pairs]),
            "weight": torch.tensor([p.weight for p in pairs]),
        }
        if self.config.algorithm.uses_masks:
            masks = torch.stack([item.latent_mask(*latents.shape[-2:]) for item in ready])
            tensors["mask"] = masks
        times = torch.stack([item.time_ids for item in ready])
        if self.model.takes_time_ids:
            tensors["time_ids"] = times
        if self.config.states:
            embeds = self.sampler.embed([p.prompt for p in pairs for _ in range(2)])
            if self.model.takes_time_ids:
                of_images = times.flatten(0, 1).to(self.model.device)
                embeds = replace(embeds, time_ids=of_images)
            with lora.policy(self.model.denoiser, lora.REFERENCE):
                tensors |= self._states(latents.float(), embeds, pairs, recorded)
                if first and not recorded:
                    facts["round_trip_error"] = self._round_trip(latents.float(), embeds)
        return tensors

    def _field(self, embeds: PromptEmbeds, *, guided: bool = True) -> Predict:
        """Return the reference's prediction for a batch of prompts, as a function of (states, timesteps).

        With `guided` it has the guidance of the inversion, otherwise that of training. States are rounded to the
        cache's dtype first. A prediction that the inversion makes is then also that of the cached state, and gives the
        reference's error there.
        """
        scale = self.config.pairs.inversion.guidance_scale
        guidance = scale if guided or self.model.guidance_is_embedded else None
        negative = self.sampler.negatives(len(embeds)) if guided else None

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
        """Return the tensors of K states of each image.

        They are the states, their indices on the grid, and the reference's errors at the states. An error that neither
        the recording nor the inversion has costs one forward.
        """
        if self.recorded and recorded:
            usable = [self.recorded.usable(r) for r in recorded[::2]]
            orders = [u[self._chosen(p, len(u))] for u, p in zip(usable, pairs, strict=True)]
            index, states, errors = self.recorded.states(recorded, pairs, orders)
            states, errors = states.to(latents.device), errors.to(latents.device)
        else:
            index, states, errors = self._inverted(latents, embeds, pairs)
        times = self.grid[index].repeat_interleave(2, 0).to(latents.device)
        for k in range(self.config.states):
            unmeasured = errors[:, k].isnan().nonzero().flatten()
            if len(unmeasured):
                state, t = states[unmeasured, k].float(), times[unmeasured, k]
                model_pred = self._field(embeds[unmeasured], guided=False)(state, t)
                errors[unmeasured, k] = self._error(model_pred, latents[unmeasured], state, t)
        pairwise = (len(pairs), 2)
        return {
            "states": states.unflatten(0, pairwise).cpu(),
            "grid_index": index,
            "reference_error": errors.unflatten(0, pairwise).cpu(),
        }

    def _error(self, model_pred: Tensor, latents: Tensor, states: Tensor, times: Tensor) -> Tensor:
        """Return the errors (B,) of predictions for states.

        The targets lead from a state straight to its clean latents.
        """
        target = chord_target(self.model.noise, latents, states, times)
        return matching_error(model_pred, target)

    def _inverted(
        self, latents: Tensor, embeds: PromptEmbeds, pairs: list[PreferencePair]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Invert both images of n pairs, and return K states of each image.

        Returns:
            Indices on the grid (n, K), states (2 n, K, C, H, W), and errors of the reference (2 n, K). An error is NaN
            if the inversion has no prediction for the cached state.
        """
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
            # the inversion's predictions have guidance, those of training have none
            return index, states, errors
        for k in range(self.config.states):
            model_pred, recorded_rows = watched.at(of_image[:, k], like=latents)
            times = self.grid.to(every.device)[of_image[:, k]]
            error = self._error(model_pred, latents, states[:, k].float(), times)
            errors[recorded_rows, k] = error[recorded_rows]
        return index, states, errors

    def _chosen(self, pair: PreferencePair, n: int) -> Tensor:
        """Draw the indices (K,) of a pair's states among n, in ascending order."""
        key = stream(STATES, self.config.pairs.seed, pair.row)
        generator = torch.Generator().manual_seed(key)
        return torch.randperm(n, generator=generator)[: self.config.states].sort().values

    def _round_trip(self, latents: Tensor, embeds: PromptEmbeds) -> float:
        """Return the median relative error of inverting images and sampling them again.

        Sampling uses the inversion's solver, or Euler steps if that is "fixed_point".
        """
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
    """Field that records its predictions at the timesteps of the grid.

    All solvers but FireFlow begin an interval with a prediction at its first state, and make none at that timestep
    afterwards. The last prediction at a timestep is therefore that of the cached state.
    """

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
        """Return the recorded predictions (B, ...) at one timestep of each image.

        The second result (B,) is true where there is a prediction.

        Args:
            places: indices (B,) of the timesteps on the grid.
            like: tensor with the shape, dtype and device of the predictions.
        """
        predictions = torch.empty_like(like)
        present = torch.zeros(len(places), dtype=torch.bool)
        for row, place in enumerate(places.tolist()):
            if place in self.seen:
                predictions[row], present[row] = self.seen[place][row], True
        return predictions, present


def _facts_of(pair: PreferencePair) -> dict[str, Any]:
    """Return the entry of a pair in the index."""
    return {
        "place": pair.place,
        "prompt": pair.prompt,
        "preference": pair.preference,
        "weight": pair.weight,
    }


def _oriented(
    pair: PreferencePair, pixels: list[Tensor], *, tie_break: float, ties: str
) -> PreferencePair:
    """Return the pair with the preferred image first, and reorder `pixels` in place to match."""
    p, images = pair.preference, pair.images
    if p == 0.5 and ties == "random":
        p = 1.0 if tie_break < 0.5 else 0.0
    if p < 0.5:
        pixels.reverse()
        p, images = 1 - p, (images[1], images[0])
    return replace(pair, preference=p, images=images)
