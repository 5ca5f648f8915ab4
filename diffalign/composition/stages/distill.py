"""Distillation into a student of few steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from diffalign.composition.stage import State
from diffalign.composition.trained import TrainedStage
from diffalign.config import AnyRunConfig
from diffalign.methods.distillation.trainer import student_scheduler
from diffalign.pipelines.base import TextToImageModel

GUIDANCE = "teacher.guidance_scale"


class DistillStage(TrainedStage):
    """Student of the model before, by a recipe of a distillation method.

    The teacher draws with the guidance of the stage before, unless the recipe's settings name another.
    """

    name = "distill"
    title = "few-step student"
    methods = ("distillation",)
    precedes = {
        "quantize": "activations are calibrated on the student's own steps",
        "qsched": "factors belong to the student's own steps",
        "accelerate": "a plan belongs to the student's own steps",
    }

    def overrides(self, state: State) -> list[str]:
        teacher = self.settings.settings.get("teacher")
        is_named = isinstance(teacher, dict) and "guidance_scale" in teacher
        if is_named or GUIDANCE in self.settings.settings:
            return []
        guidance = state.card.guidance_scale
        return [f"--{GUIDANCE}={'null' if guidance is None else guidance}"]

    def after(self, config: AnyRunConfig, state: State, trained: TextToImageModel) -> State:
        method = config.algorithm.type

        def build() -> TextToImageModel:
            model = state.build()
            model.pipeline.register_modules(scheduler=student_scheduler(model, method))
            return model

        card = replace(
            state.card,
            num_inference_steps=config.evaluation.num_inference_steps,
            guidance_scale=config.evaluation.guidance_scale,
        )
        return state.after(build=build, card=card)

    def make(self, state: State, after: State, target: Path, place: Path) -> dict[str, Any]:
        facts = self.train(place)
        scheduler = str(self.run_folder / "scheduler")
        return {**facts, **self.merge(state, after, target, scheduler=scheduler)}


STAGE = DistillStage
