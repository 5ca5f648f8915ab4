"""Score policies that were trained on the verifier with an independent learned reward.

The reward shares no code with the verifier.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.config import EvaluationConfig, RunConfig, to_dict
from diffalign.core.fingerprint import of_file
from diffalign.data.prompts import Prompt, load_prompts
from diffalign.evaluation.preference import win_rate
from diffalign.evaluation.score import Evaluation, Score, drawing_of, evaluate_model
from diffalign.lora.files import load_lora
from diffalign.pipelines.registry import load_model
from diffalign.rewards.composition import CompositeReward
from diffalign.rewards.weights import device

REWARD = "shapes_clip"
IMAGES_PER_TASK = 48


def lora_left(config: RunConfig) -> Path:
    """Return the folder of the LoRA that a finished run has trained."""
    return Path(config.output_dir) / "lora"


def weights_left(config: RunConfig) -> dict[str, str]:
    """Return the digests of a finished run's weight files, by file name."""
    files = sorted(lora_left(config).glob("*.safetensors"))
    return {f.name: of_file(f)[:16] for f in files}


class SecondOpinion:
    """Evaluation of finished runs by `REWARD` on held-out prompts.

    Each base model is sampled once.
    """

    def __init__(self) -> None:
        self.reward = CompositeReward.from_config({REWARD: 1.0})
        self.bases: dict[str, Evaluation] = {}

    def key(self, config: RunConfig) -> Any:
        """Return everything that the evaluation of a run depends on."""
        return [self.setting(config), weights_left(config)]

    def setting(self, config: RunConfig) -> Any:
        """Return everything that the evaluation of the run's base model depends on."""
        return [REWARD, config.model.name, config.prompts.evaluation, to_dict(self.how(config))]

    def how(self, config: RunConfig) -> EvaluationConfig:
        """Return the run's evaluation settings with fewer images."""
        few = min(config.evaluation.images_per_task or IMAGES_PER_TASK, IMAGES_PER_TASK)
        return replace(config.evaluation, images_per_task=few)

    def __call__(self, config: RunConfig) -> dict[str, Any]:
        """Score a finished run's base model and LoRA.

        Return the mean scores of both and the LoRA's win rate over the base model. The win rate has a 95 % interval
        over prompts.
        """
        setting = json.dumps(self.setting(config))
        if setting not in self.bases:
            self.bases[setting] = self.evaluate(config, None)
        before, after = self.bases[setting], self.evaluate(config, lora_left(config))
        wins = win_rate(after.rewards, before.rewards, [p.text for p in after.prompts])
        # The reward scores every image, so pairs exist.
        assert wins is not None
        return {
            "before": round(float(np.mean(before.rewards)), 4),
            "after": round(float(np.mean(after.rewards)), 4),
            "win_rate": round(wins.rate, 4),
            "interval": [round(wins.low, 4), round(wins.high, 4)],
        }

    def evaluate(self, config: RunConfig, lora: Path | None) -> Evaluation:
        """Evaluate the run's base model, with or without a LoRA."""
        prompts = load_prompts(config.prompts.evaluation)
        return evaluate_lora(config.model.name, lora, prompts, self.reward.score, self.how(config))


def evaluate_lora(
    name: str,
    lora: Path | None,
    prompts: Sequence[Prompt],
    score: Score,
    how: EvaluationConfig,
) -> Evaluation:
    """Evaluate a model by name, with or without a LoRA. Use the GPU if there is one."""
    model = load_model(name, device=device())
    if lora is not None:
        load_lora(model.pipeline, str(lora))
    return evaluate_model(model, prompts, score, drawing_of(how))
