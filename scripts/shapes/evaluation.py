"""GenEval of a Shapes model while it is pretrained."""

from __future__ import annotations

import torch

from diffalign.core.precision import compute
from diffalign.geneval.rules import summarize
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.sampling import Sampling
from diffalign.shapes.prompts import prompts
from diffalign.shapes.verifier import verify

NULL_PROMPT = ""
NO_GUIDANCE = 1.0


@torch.no_grad()
def evaluate_shapes(
    model: TextToImageModel,
    *,
    seed: int,
    num_inference_steps: int = 10,
    guidance_scale: float = NO_GUIDANCE,
    repeats: int = 2,
    split: str = "held_out",
) -> dict[str, float]:
    """Return the GenEval scores of a Shapes model on all prompts of a split.

    Each prompt has `repeats` images.
    """
    entries = prompts(split) * repeats
    generator = torch.Generator().manual_seed(seed)
    correct = []
    with compute(model.device):
        embeds = model.encode_prompt([e["prompt"] for e in entries])
        guided = model.costs_a_forward(guidance_scale)
        negative = model.encode_prompt([NULL_PROMPT] * len(entries)) if guided else None
        drawing = Drawing(num_inference_steps, guidance_scale)
        latents = Sampling(model, embeds, drawing, negative).draw(generator)
        images = model.decode(latents).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    for image, entry in zip(images, entries, strict=True):
        correct.append(verify(image, entry).correct)
    return summarize([e["tag"] for e in entries], correct)
