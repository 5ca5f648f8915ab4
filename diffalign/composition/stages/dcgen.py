"""Move into deeply compressed latents (DC-Gen)."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffalign.composition.stage import State
from diffalign.composition.trained import TrainedStage
from diffalign.config import AnyRunConfig
from diffalign.data.latent_cache import LatentCache
from diffalign.latents.codec import CodecError
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.moving import load_autoencoder


class DCGenStage(TrainedStage):
    """Move of the model before into other latents, by a recipe of DC-Gen."""

    name = "dcgen"
    title = "DC-Gen"
    methods = ("dcgen",)
    precedes = {
        "distill": "training in new latents undoes what a student has learnt",
        "quantize": "weights are trained before they are rounded",
        "qsched": "factors belong to the weights of their search",
        "accelerate": "a plan belongs to the weights that it was made for",
    }

    def after(self, config: AnyRunConfig, state: State, trained: TextToImageModel) -> State:
        self._check_cache(config, trained)

        def build() -> TextToImageModel:
            return self._trained(config, state.build())

        guidance = config.evaluation.guidance_scale
        card = replace(state.card, guidance_scale=guidance)
        moves = getattr(config, "latents").autoencoder is not None  # noqa: B009
        return state.after(build=build, card=card, is_moved=moves or state.is_moved)

    def _check_cache(self, config: Any, model: TextToImageModel) -> None:
        """Raise CodecError if `latents.cache` names a cache of another autoencoder."""
        place = config.latents.cache
        if place is None or not LatentCache(place).begun:
            return
        codec = model.codec
        if config.latents.autoencoder is not None:
            vae = load_autoencoder(config.latents.autoencoder, dtype=self.dtype)
            codec = model.codec_of(vae, prefix=config.latents.channels)
        own, cached = codec.to_dict(), LatentCache(place).manifest["key"].get("codec", {})
        name = next((n for n in own if own[n] != cached.get(n)), None)
        if name is not None:
            raise CodecError(
                f"the cache was made with another autoencoder: its {name} is {cached.get(name)}, and this one's is "
                f"{own[name]}. Name another folder, or leave the setting out",
                setting="stages.dcgen.settings.latents.cache",
                value=place,
            )

    def make(self, state: State, after: State, target: Path, place: Path) -> dict[str, Any]:
        facts = self.train(place)
        if getattr(self.run_config, "latents").autoencoder is None:  # noqa: B009
            return {**facts, **self.merge(state, after, target)}
        shutil.copytree(self.run_folder / "pipeline", target)
        after.card.save(target)
        file = self.run_folder / "aligned.json"
        return {**facts, "alignment": json.loads(file.read_text(encoding="utf-8"))}


STAGE = DCGenStage
