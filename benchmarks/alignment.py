"""Pretrain small denoisers with and without the semantic map, and probe both.

The probe tells what a denoiser knows of relations and bindings. It compares denoising errors: of held-out `position`
images under their prompt and under the prompt with the opposite relation, and of `color_attr` images under their prompt
and under the prompt with the two colours exchanged. A model that knows the difference has the lower error under the
right prompt; without knowledge half of the images have.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.record import BenchOptions, spread
from diffalign.core.precision import compute
from diffalign.geneval.rules import Metadata, entry
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.registry import load_model
from diffalign.scripts.shapes.denoiser import (
    Captioned,
    PretrainConfig,
    Pretraining,
    build_sd3_transformer,
    make_dataset,
)
from diffalign.scripts.shapes.evaluation import NO_GUIDANCE, evaluate_shapes
from diffalign.shapes.prompts import prompts
from diffalign.shapes.world import render, sample_scene

MODEL = "shapes-sd3"
ARMS = {"aligned": PretrainConfig.alignment, "plain": 0.0}
STEPS, QUICK_STEPS = 1200, 6
PROBES = 4
"""Number of probes, evenly spaced over the training."""
IMAGES = 32_000
SIGMA = 0.75
"""Noise level of the probe."""
REPEATS = {"position": 5, "color_attr": 2}
"""Rendered images of each held-out prompt."""
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
BATCH = 64


def swapped(prompt: Metadata) -> Metadata:
    """Return the prompt with the opposite relation, or with the two colours exchanged."""
    first, second = prompt["include"]
    if prompt["tag"] == "position":
        relation = second["position"][0]
        text = f"a {second['class']} {OPPOSITE[relation]} a {first['class']}"
    else:
        text = f"a {second['color']} {first['class']} and a {first['color']} {second['class']}"
    return entry(prompt["tag"], prompt["include"], text)


@torch.no_grad()
def errors(model: TextToImageModel, latents: Tensor, texts: list[str], noise: Tensor) -> Tensor:
    """Return the mean squared error (B,) of the velocity at noise level SIGMA under prompts."""
    parts = []
    for start in range(0, len(texts), BATCH):
        rows = slice(start, start + BATCH)
        times = model.noise.timesteps(torch.full((len(texts[rows]),), SIGMA))
        with compute(model.device):
            embeds = model.encode_prompt(texts[rows])
            noisy = model.noise.add_noise(latents[rows], noise[rows], times)
            pred = model.predict(noisy, times, embeds, guidance_scale=NO_GUIDANCE)
        target = model.noise.target(latents[rows], noise[rows], times)
        parts.append((pred.float() - target).square().flatten(1).mean(1))
    return torch.cat(parts)


def probe(model: TextToImageModel) -> dict[str, float]:
    """Return the share of images with a lower error under the right prompt, by task."""
    rng, generator = np.random.default_rng(7), torch.Generator().manual_seed(7)
    shares = {}
    for task, repeats in REPEATS.items():
        entries = [p for p in prompts("held_out") if p["tag"] == task] * repeats
        images = np.stack([render(sample_scene(entry, rng)) for entry in entries])
        with torch.no_grad(), compute(model.device):
            latents = model.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).float()
        noise = torch.randn(latents.shape, generator=generator)
        right = errors(model, latents, [p["prompt"] for p in entries], noise)
        wrong = errors(model, latents, [swapped(p)["prompt"] for p in entries], noise)
        shares[task] = float((right < wrong).float().mean())
        shares[f"{task}_error"] = float(right.mean())
    return shares


def pretrained(config: PretrainConfig, data: Captioned, folder: Path) -> dict[str, Any]:
    """Pretrain one denoiser, and return its probes and its held-out GenEval."""
    model = load_model(MODEL, dtype=torch.float32)
    torch.manual_seed(config.seed)
    model.pipeline.register_modules(transformer=build_sd3_transformer())
    run = Pretraining(model, config, folder)
    rows: list[dict[str, float]] = []
    for number in range(1, PROBES + 1):
        while run.step < config.steps * number // PROBES:
            run.update(data)
        with run.averaged():
            rows.append({"step": run.step, **probe(model)})
    with run.averaged():
        geneval = evaluate_shapes(model, seed=1)
    return {"probes": rows, "geneval": geneval}


def run(options: BenchOptions) -> dict[str, Any]:
    """Pretrain both arms with all seeds on the same images."""
    steps = QUICK_STEPS if options.quick else STEPS
    selected = options.select(ARMS)
    base = load_model(MODEL, dtype=torch.float32)
    data = make_dataset(base, 256 if options.quick else IMAGES, seed=0)
    arms: dict[str, Any] = {}
    for arm in selected:
        cells = []
        for seed in range(options.seeds):
            config = PretrainConfig(
                steps=steps,
                images=len(data.rows),
                alignment=ARMS[arm],
                seed=seed,
                compile=not options.quick,
            )
            make = partial(pretrained, config, data, options.folder(arm, seed))
            cells.append(options.cached(arm, seed, make, key=asdict(config)))
        last = [cell["probes"][-1] for cell in cells]
        arms[arm] = {
            "relation right": spread(row["position"] for row in last),
            "colours right": spread(row["color_attr"] for row in last),
            "geneval": spread(cell["geneval"]["overall"] for cell in cells),
            "seeds": cells,
        }
    headline = {
        f"{name.replace(' ', '_')}_{arm}": figures[name]["median"]
        for arm, figures in arms.items()
        for name in ("relation right", "colours right", "geneval")
    }
    return {"headline": headline, "steps": steps, "sigma": SIGMA, "arms": arms}
