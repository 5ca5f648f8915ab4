"""Measure bytes and time of weight formats at the sizes of published models.

Only shapes matter, so the weights are random.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from benchmarks.common.record import spread
from diffalign.core.precision import attention
from diffalign.pipelines.published import LAYOUTS, denoiser
from diffalign.quantization.accounting import report
from diffalign.quantization.apply import quantize_model
from diffalign.quantization.backends import BACKENDS
from diffalign.quantization.latency import interleaved
from diffalign.quantization.layers import PackSpec
from diffalign.quantization.observer import InputObserver
from diffalign.quantization.packed import pack_model, packable

SPECS = {
    "int8": PackSpec(8),
    "int4": PackSpec(4),
    "int4 svd 32": PackSpec(4, svd_rank=32),
    "int3": PackSpec(3),
    "int2": PackSpec(2),
}
FORMS = ("int8", "int4", "int8-static", "int8-dynamic", "int4a8", "torchao-int8")
ON_CUDA = ("torchao-fp8",)
COMPILED = ("torchao-int8", "torchao-fp8")
INTEGERS = ("int8-static", "int8-dynamic", "torchao-int8")
MODES = ("eager", "compiled")


def published_sizes() -> dict[str, Any]:
    """Return the bytes of published denoisers in all packed formats, counted on the meta device."""
    result: dict[str, Any] = {}
    for name in LAYOUTS:
        whole = report(denoiser(name))
        result[name] = {"weights": whole.weights, "bf16_bytes": whole.bytes}
        for form, spec in SPECS.items():
            model = denoiser(name)
            pack_model(model, spec=spec)
            small = report(model)
            result[name][form] = {
                "bytes": small.bytes,
                "ratio": round(small.ratio, 3),
                "quantised_fraction": round(small.quantised_fraction, 4),
            }
    return result


def speeds(*, quick: bool) -> dict[str, Any]:
    """Time forwards of FLUX.1-schnell at 512 x 512 relative to bfloat16.

    A CPU runs a part of the blocks, CUDA all of them; ratios are paired, eager and compiled. The headline is the
    fastest 8-bit integer format.
    """
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    blocks = (19, 38) if cuda and not quick else (1, 2)
    width = {"num_attention_heads": 2} if quick else {}
    model = denoiser(
        "flux.1-schnell",
        device=device,
        num_layers=blocks[0],
        num_single_layers=blocks[1],
        **width,
    ).eval()
    inputs = flux_inputs(model, tokens=64 if quick else 1024, text=256)
    result: dict[str, Any] = {"blocks": blocks, "image_tokens": inputs["hidden_states"].shape[1]}
    ratios: dict[str, Any] = {}
    for form in FORMS + (ON_CUDA if cuda else ()):
        small = in_form(copy.deepcopy(model), form, inputs)
        ratios[form] = {"bytes_ratio": round(report(small).ratio, 3)}
        for mode in MODES[: 2 if form in COMPILED else 1]:
            ratios[form][mode] = spread(_ratios(model, small, inputs, compiled=mode == "compiled"))
        del small
    result["forms"] = ratios
    integers = [
        ratios[form][mode]["median"] for form in INTEGERS for mode in MODES if mode in ratios[form]
    ]
    return {"int8_latency_vs_bf16": min(integers), **result}


def in_form(model: Any, form: str, inputs: dict[str, Any]) -> Any:
    """Quantize a model in place. Calibrate it on the inputs if the format needs that."""
    activations = None
    if BACKENDS[form].activations:
        names = [n for n, layer in packable(model).items() if isinstance(layer, torch.nn.Linear)]
        observer = InputObserver(model, names, by_timestep=True)
        with torch.no_grad(), observer.watching(), attention(model.device):
            model(**inputs)
        activations = observer.scales()
    quantize_model(model, form, activations=activations)
    return model


@torch.no_grad()
def _ratios(model: Any, small: Any, inputs: dict[str, Any], *, compiled: bool) -> list[float]:
    """Time interleaved forwards of both models, both compiled or neither, and return ratios."""
    if compiled:
        for each in (model, small):
            each.compile_repeated_blocks()
    with attention(model.device):
        calls = [lambda m=m: m(**inputs) for m in (model, small)]
        base, times = interleaved(calls, model.device)
    return [t / b for t, b in zip(times, base, strict=True)]


def flux_inputs(model: Any, *, tokens: int, text: int) -> dict[str, Any]:
    """Return the inputs for one image of random latents and a random prompt."""
    config = model.config
    options = {"device": model.device, "dtype": model.dtype}
    side = int(tokens**0.5)
    positions = torch.stack(
        torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1
    )
    ids = torch.cat([torch.zeros(side * side, 1), positions.flatten(0, 1)], 1)
    return {
        "hidden_states": torch.randn(1, side * side, config.in_channels, **options),
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim, **options),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, **options),
        "timestep": torch.tensor([0.5], **options),
        "img_ids": ids.to(**options),
        "txt_ids": torch.zeros(text, 3, **options),
        "return_dict": False,
    }
