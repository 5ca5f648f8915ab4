"""Plan of an acceleration, which the composed folder carries."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffalign.acceleration.apply import accelerate, report_of, restore
from diffalign.acceleration.options import Options, check_preset
from diffalign.composition.stage import Forecast, Stage, StageSettings, State, device, held_bytes
from diffalign.pipelines.registry import load_model


@dataclass
class AccelerateSettings(StageSettings):
    """Settings of the plan; see `diffalign.accelerate`."""

    preset: str = "lossless"
    options: dict[str, Any] = field(default_factory=dict)
    """Options besides the preset's, such as `vae: slicing`."""
    images: int = 2
    """Images that are drawn plain and accelerated, to check them."""


class AccelerateStage(Stage):
    """Choice of the options that keep the images, written as a plan."""

    name = "accelerate"
    title = "acceleration"
    kind = AccelerateSettings
    settings: AccelerateSettings
    keeps_images = True

    def check(self, state: State) -> State:
        check_preset(self.settings.preset)
        Options.of(self.settings.options)
        return state

    def key(self) -> Any:
        # a plan depends on the device that it is made on
        return [self.choices, device()]

    def forecast(self, state: State) -> Forecast:
        model = state.model
        memory = held_bytes(model)
        rows = model.forward_rows(2 * self.settings.images, state.card.guidance_scale)
        return Forecast(memory, rows * state.card.num_inference_steps)

    def make(self, state: State, after: State, target: Path, place: Path) -> dict[str, Any]:
        model = load_model(state.source, dtype=self.dtype, device=device())
        size = model.image_size((state.card.height, state.card.width))
        options: dict[str, Any] = {
            "steps": state.card.num_inference_steps,
            "sizes": (size,),
            "check": self.settings.images,
            **self.settings.options,
        }
        guidance = state.card.guidance_scale
        if guidance is not None or not model.guidance_is_embedded:
            options.setdefault("arguments", {"guidance_scale": guidance or 1.0})
        accelerate(model.pipeline, self.settings.preset, **options)
        report = report_of(model.pipeline)
        restore(model.pipeline)
        shutil.copytree(state.source, target)
        # the times of the check differ from time to time, and the folder's bytes do not
        replace(report.plan, measured={}).save(target)
        record = report.to_json()
        names = ("preset", "options", "dropped", "reasons", "measured")
        return {name: record[name] for name in names}


STAGE = AccelerateStage
