"""Alignment with a reward or with preferences, or by a LoRA that exists."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffalign.composition.digests import of_listing
from diffalign.composition.stage import Forecast, State, held_bytes
from diffalign.composition.trained import TrainedSettings, TrainedStage
from diffalign.config import AnyRunConfig
from diffalign.core.errors import UsageError
from diffalign.lora.files import check_places, read_lora
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.registry import available
from diffalign.training.rerun import read_config, run_of


@dataclass
class AlignSettings(TrainedSettings):
    """Settings of the alignment."""

    lora: str | None = None
    """LoRA that exists, instead of a recipe: folder, .safetensors file or hub id."""


class AlignStage(TrainedStage):
    """Alignment by a recipe of an online or a preference method, merged into the weights.

    A LoRA that exists is merged instead. One that was trained before a move is carried over, if the move left all of
    its layers in place.
    """

    name = "align"
    title = "alignment"
    kind = AlignSettings
    settings: AlignSettings
    methods = ("online", "preference")
    precedes = {
        "quantize": "weights are trained before they are rounded",
        "qsched": "factors belong to the weights of their search",
        "accelerate": "a plan belongs to the weights that it was made for",
    }

    def check(self, state: State) -> State:
        lora = self.settings.lora
        if lora is None:
            return super().check(state)
        if self.settings.recipe is not None or self.settings.settings:
            raise UsageError(
                "the stage has a LoRA and a recipe. Leave one of them out",
                setting="stages.align.lora",
                value=lora,
            )
        self._check_base(lora, state)
        self._check_places(lora, state)
        return state

    def _check_base(self, lora: str, state: State) -> None:
        """Raise UsageError for a LoRA whose run tells that it was trained on another base."""
        folder, names = run_of(lora), available()
        if folder is None:
            return
        trained = read_config(folder).model.name
        if trained != self.recipe.model and {trained, self.recipe.model} <= set(names):
            raise UsageError(
                f"the LoRA was trained on {trained}, and the base is {self.recipe.model}. Name a LoRA of this base",
                setting="stages.align.lora",
                value=lora,
            )

    def _check_places(self, lora: str, state: State) -> None:
        """Raise UsageError with the reason if a layer of the LoRA has no place."""
        model = state.model
        try:
            check_places(model.pipeline, read_lora(lora))
        except UsageError as error:
            reason = str(error)
            if state.is_moved and model.ends is not None:
                reason = (
                    f"a LoRA from before the move keeps its place in the blocks alone, and the move replaced "
                    f"{model.ends.embedder} and {model.ends.head}. {reason}"
                )
            raise UsageError(reason, setting="stages.align.lora", value=lora) from error

    def after(self, config: AnyRunConfig, state: State, trained: TextToImageModel) -> State:
        guidance = config.evaluation.guidance_scale
        return state.after(card=replace(state.card, guidance_scale=guidance))

    def key(self) -> Any:
        lora = self.settings.lora
        return super().key() if lora is None else [lora, of_listing(lora)]

    def forecast(self, state: State) -> Forecast:
        if self.settings.lora is None:
            return super().forecast(state)
        return Forecast(held_bytes(state.model), 0.0)

    def make(self, state: State, after: State, target: Path, place: Path) -> dict[str, Any]:
        if self.settings.lora is not None:
            self.merge(state, after, target, lora=self.settings.lora)
            return {"lora": self.settings.lora}
        return {**self.train(place), **self.merge(state, after, target)}


STAGE = AlignStage
