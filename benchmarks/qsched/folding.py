"""Measure what scales of channels, folded into FLUX's modulation, give to rounded activations.

A norm's output x (1 + s) + t feeds linear layers W. For scales r of the channels, (1 + s) / r and t / r feed W r, with
the same products: r goes into the rows and biases of the modulation that predict s and t (RepQuant, Li et al. 2024).
One scale for all channels then rounds inputs of nearly equal ranges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.record import BenchOptions, spread
from benchmarks.qsched.forms import PLAIN, built
from diffalign.data.prompts import load_prompts
from diffalign.evaluation.likeness import psnr
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.registry import load_model
from diffalign.tuning.calibration import Calibration

MODEL, STEPS = "shapes-flux-schnell", 4
FORMS = ("int8-static", "int4a8 gptq")
POWERS = (0.0, 1.0)
"""Powers of the channels' ranges; 0 folds nothing, 1 is RepQuant's."""
CALIBRATION, IMAGES = 24, 32
"""Numbers of prompts of the calibration and of the measurement."""
QUICK = 4
"""Both numbers with `quick`."""


@dataclass(frozen=True)
class Place:
    """Norm whose output feeds linear layers, and the chunks of its modulation.

    Attributes:
        modulation: linear layer that predicts shifts, scales and gates, one after the other.
        shift: number of the chunk that shifts; the next one scales.
        consumers: linear layers that read the norm's output, by name.
    """

    modulation: nn.Linear
    shift: int
    consumers: dict[str, nn.Linear]


def compare(options: BenchOptions) -> dict[str, Any]:
    """Return the PSNR in dB to the plain images by form and power."""
    prompts, images = (QUICK, QUICK) if options.quick else (CALIBRATION, IMAGES)
    cells: dict[str, dict[str, Any]] = {}
    for form in FORMS:
        for power in POWERS:
            key = [form, power, prompts, images]
            values = [
                options.cached(
                    f"folding {form} {power}",
                    seed,
                    partial(_cell, form, power, seed, prompts=prompts, images=images),
                    key=key,
                )["psnr"]
                for seed in range(options.seeds)
            ]
            cells.setdefault(form, {})[str(power)] = spread(values)
    return {"model": MODEL, "steps": STEPS, "calibration": prompts, "images": images, "psnr": cells}


def headline(result: dict[str, Any]) -> dict[str, float]:
    """Return the largest gain of PSNR in dB by folding, by form."""
    gains = {}
    for form, cells in result["psnr"].items():
        plain = cells["0.0"]["median"]
        gains[form] = round(max(c["median"] for p, c in cells.items() if p != "0.0") - plain, 2)
    return gains


def places(denoiser: nn.Module) -> Iterator[Place]:
    """Yield the places of a FLUX transformer where folding is exact."""
    for name, block in denoiser.named_modules():
        if type(block).__name__ == "FluxTransformerBlock":
            for norm, first, layers in (
                ("norm1", 0, ("attn.to_q", "attn.to_k", "attn.to_v")),
                ("norm1_context", 0, ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
                ("norm1", 3, ("ff.net.0.proj",)),
                ("norm1_context", 3, ("ff_context.net.0.proj",)),
            ):
                yield _place(name, block, norm, first, layers)
        if type(block).__name__ == "FluxSingleTransformerBlock":
            yield _place(
                name, block, "norm", 0, ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            )


@torch.no_grad()
def fold(place: Place, scales: Tensor) -> None:
    """Divide the inputs of a place's consumers by scales (channels,), and multiply their weights."""
    width, first = len(scales), place.shift * len(scales)
    weight, bias = place.modulation.weight, place.modulation.bias
    shift, scale = slice(first, first + width), slice(first + width, first + 2 * width)
    bias[scale] += 1
    for rows in (shift, scale):
        weight[rows] /= scales[:, None].to(weight)
        bias[rows] /= scales.to(bias)
    bias[scale] -= 1
    for layer in place.consumers.values():
        layer.weight *= scales.to(layer.weight)


def _place(name: str, block: nn.Module, norm: str, first: int, layers: Sequence[str]) -> Place:
    modulation = block.get_submodule(f"{norm}.linear")
    assert isinstance(modulation, nn.Linear)
    consumers: dict[str, Any] = {f"{name}.{part}": block.get_submodule(part) for part in layers}
    return Place(modulation, first, consumers)


def _ranges(calibration: Calibration, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the largest magnitude (channels,) of each layer's inputs."""
    ranges: dict[str, Tensor] = {}

    def read(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        largest = args[0].detach().float().abs().flatten(0, -2).amax(0)
        ranges[name] = torch.maximum(ranges.get(name, largest), largest)

    with ExitStack() as stack:
        for name in names:
            layer = calibration.model.denoiser.get_submodule(name)
            stack.callback(layer.register_forward_pre_hook(partial(read, name)).remove)
        calibration.run()
    return ranges


def _cell(form: str, power: float, seed: int, *, prompts: int, images: int) -> dict[str, float]:
    """Return the mean PSNR of held-out images of one form, power and seed."""
    drawing = Drawing(num_inference_steps=STEPS, seed=seed, micro_batch_size=16)
    plain = load_model(MODEL, dtype=torch.float32)
    held_out = load_prompts("shapes:held_out")[seed * images : (seed + 1) * images]
    expected = Calibration(plain, held_out, drawing).images(images)
    model = load_model(MODEL, dtype=torch.float32)
    train = load_prompts("shapes:train")[seed * prompts : (seed + 1) * prompts]
    calibration = Calibration(model, train, drawing)
    all_places = list(places(model.denoiser))
    if power:
        firsts = [next(iter(place.consumers)) for place in all_places]
        ranges = _ranges(calibration, firsts)
        for place, name in zip(all_places, firsts, strict=True):
            largest = ranges[name].clamp_min(1e-6) ** power
            fold(place, largest / largest.mean())
    built(model, PLAIN[form], calibration)
    return {"psnr": psnr(Calibration(model, held_out, drawing).images(images), expected)}
