"""Work of a stage before it runs: rows of the denoiser, counted from the settings."""

from __future__ import annotations

from typing import Any

from diffalign.config import AnyRunConfig
from diffalign.pipelines.base import TextToImageModel

BACKWARD = 2
"""Work of a backward, in forwards."""


def rows_of_run(config: AnyRunConfig, model: TextToImageModel) -> float:
    """Return the rows of the denoiser that a run computes, without its evaluations.

    A backward counts as two forwards, and one that computes activations again as three. The prediction of a reference
    or of the empty prompt counts as one more forward of each trained row.
    """
    c: Any = config
    trained = 1 + BACKWARD + bool(c.model.gradient_checkpointing) + 1
    plan = c.plan
    sampled = 0.0
    if plan is not None:
        images = plan.prompts_per_update * plan.images_per_prompt
        rows = model.forward_rows(1, plan.guidance_scale)
        sampled = images * plan.num_inference_steps * rows
        states = getattr(c.algorithm, "timesteps_per_image", None)
        states = states or getattr(c.algorithm, "states_per_image", 1)
        learnt = images * states
    elif hasattr(c.training, "pairs_per_update"):
        learnt = 2 * c.training.pairs_per_update
    else:
        learnt = c.training.images_per_update
    return float(c.training.num_updates * (sampled + learnt * trained))
