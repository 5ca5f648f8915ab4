"""GenEval of a Shapes model while it is pretrained."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from diffalign.core.precision import compute
from diffalign.geneval.rules import Metadata, summarize
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.sampling import Sampling
from diffalign.shapes.prompts import prompts
from diffalign.shapes.verifier import verify

NULL_PROMPT = ""
NO_GUIDANCE = 1.0


@torch.no_grad()
def draw_shapes(
    model: TextToImageModel,
    entries: list[Metadata],
    *,
    seed: int,
    num_inference_steps: int = 10,
    guidance_scale: float = NO_GUIDANCE,
) -> np.ndarray:
    """Return one image for each prompt, (N, H, W, 3) uint8."""
    generator = torch.Generator().manual_seed(seed)
    with compute(model.device):
        embeds = model.encode_prompt([e["prompt"] for e in entries])
        guided = model.costs_a_forward(guidance_scale)
        negative = model.encode_prompt([NULL_PROMPT] * len(entries)) if guided else None
        drawing = Drawing(num_inference_steps, guidance_scale)
        latents = Sampling(model, embeds, drawing, negative).draw(generator)
        return model.decode(latents).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def evaluate_shapes(
    model: TextToImageModel,
    *,
    seed: int,
    repeats: int = 2,
    split: str = "held_out",
    **drawing: Any,
) -> dict[str, float]:
    """Return the GenEval scores of a Shapes model on all prompts of a split.

    Args:
        seed: seed of the noise.
        repeats: images of each prompt.
        split: "held_out" or "train".
        drawing: `num_inference_steps` and `guidance_scale` of `draw_shapes`.
    """
    entries = prompts(split) * repeats
    images = draw_shapes(model, entries, seed=seed, **drawing)
    correct = [verify(image, entry).correct for image, entry in zip(images, entries, strict=True)]
    return summarize([e["tag"] for e in entries], correct)
