"""What other eyes say of policies that were trained on the verifier: a learned reward that shares no code with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.config import EvaluationConfig, RunConfig
from diffalign.data.prompts import load_prompts
from diffalign.evaluation.preference import win_rate
from diffalign.evaluation.score import Evaluation, evaluate_model
from diffalign.lora import load_lora
from diffalign.pipelines.registry import load_model
from diffalign.rewards.composition import CompositeReward

REWARD = "shapes_clip"
IMAGES_PER_TASK = 48


class SecondOpinion:
    """By `REWARD`, on held-out prompts; the base is drawn once a seed."""

    def __init__(self) -> None:
        self.reward = CompositeReward.from_config({REWARD: 1.0})
        self.base: dict[int, Evaluation] = {}

    def __call__(self, config: RunConfig) -> dict[str, Any]:
        """Of a finished run: means over images of the base and of the LoRA that it left, and how often the latter's are
        better."""
        few = min(config.evaluation.images_per_task or IMAGES_PER_TASK, IMAGES_PER_TASK)
        how = replace(config.evaluation, images_per_task=few)
        if how.seed not in self.base:
            self.base[how.seed] = self.evaluate(config, None, how)
        before = self.base[how.seed]
        after = self.evaluate(config, Path(config.output_dir) / "lora", how)
        wins = win_rate(after.rewards, before.rewards, [p.text for p in after.prompts])
        assert wins is not None  # it scores every image
        return {
            "before": round(float(np.mean(before.rewards)), 4),
            "after": round(float(np.mean(after.rewards)), 4),
            "win_rate": round(wins.rate, 4),
            "interval": [round(wins.low, 4), round(wins.high, 4)],
        }

    def evaluate(self, config: RunConfig, lora: Path | None, how: EvaluationConfig) -> Evaluation:
        """The run's model, with a LoRA or without."""
        model = load_model(config.model.name)
        if lora is not None:
            load_lora(model.pipeline, str(lora))
        prompts = load_prompts(config.prompts.evaluation)
        return evaluate_model(model, prompts, self.reward.score, how)
