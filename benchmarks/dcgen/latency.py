"""Measure the time of an image by part, and the cost of published token counts.

The parts are text encoding, denoising, decoding and the transfer to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.peak_memory import peak_bytes
from benchmarks.common.record import spread
from benchmarks.qsched.weights import flux_inputs
from diffalign.core.precision import attention, compute
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.published import denoiser
from diffalign.pipelines.sampling import Sampling
from diffalign.quantization.latency import interleaved

STEPS, IMAGES, GUIDANCE = 10, 16, 3.5
REPEATS = 5
SIDES = (1024, 2048, 4096)
PIXELS = {"f8 patch 2": (16, 64), "f32": (32, 32), "f64": (64, 128)}
"""Pixels per side of a token, and its channels: FLUX.1 with its own autoencoder and with DC-AE."""
TEXT = {"base": 512, "moved": 256}


def parts_of(models: Mapping[str, TextToImageModel], *, quick: bool) -> dict[str, Any]:
    """Time each part of a batch, interleaved, and the first model's time over the second's."""
    names = list(models)
    calls = {name: _parts(model, 2 if quick else IMAGES) for name, model in models.items()}
    times: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for part in next(iter(calls.values())):
        with torch.no_grad():
            device = models[names[0]].device
            durations = interleaved(
                [calls[name][part] for name in names], device, repeats=2 if quick else REPEATS
            )
        for name, seconds in zip(names, durations, strict=True):
            times[name][part] = seconds
    for rows in times.values():
        rows["all"] = [sum(parts) for parts in zip(*rows.values(), strict=True)]
    first, second = (times[name] for name in names)
    return {
        "images": 2 if quick else IMAGES,
        "steps": STEPS,
        "seconds": {n: {p: spread(t) for p, t in times[n].items()} for n in names},
        "ratio": {
            part: spread(a / b for a, b in zip(first[part], second[part], strict=True))
            for part in first
        },
    }


def _parts(model: TextToImageModel, n: int) -> dict[str, Callable[[], Any]]:
    """Return the parts of sampling n images, each ready to be called."""
    prompts = ["a photo of a red circle and a blue square"] * n
    guidance = GUIDANCE if model.guidance_is_embedded else None
    with torch.no_grad(), compute(model.device):
        embeds = model.encode_prompt(prompts)
        latents = torch.randn(n, *model.latent_shape(model.default_size), device=model.device)
        pixels = model.decode(latents)

    def denoise() -> Any:
        with compute(model.device):
            return Sampling(model, embeds, Drawing(STEPS, guidance)).draw(latents=latents)

    def decode() -> Any:
        with compute(model.device):
            return model.decode(latents)

    return {
        "text": lambda: model.encode_prompt(prompts),
        "denoise": denoise,
        "decode": decode,
        "host": lambda: pixels.permute(0, 2, 3, 1).cpu().numpy().tobytes(),
    }


def flops(models: Mapping[str, TextToImageModel]) -> dict[str, Any]:
    """Count the FLOPs and peak bytes of one denoiser forward and one decoding per model.

    The counts are for one image, by torch's counter; the bytes exclude the weights.
    """
    return {name: _costs(model) for name, model in models.items()}


def _costs(model: TextToImageModel) -> dict[str, int]:
    size = model.default_size
    inputs = model.random_inputs(1, size)
    latents = torch.randn(1, *model.latent_shape(size)).to(model.device)
    allocated = [model.denoiser, model.pipeline.vae, latents, *tensors_of(inputs)]
    with attention(model.device):
        forward = counted(partial(model.forward, *inputs), allocated)
    decode = counted(partial(model.decode, latents), allocated)
    return {
        "tokens": model.image_seq_len(size),
        "forward": forward[0],
        "decode": decode[0],
        "forward_peak_bytes": forward[1],
        "decode_peak_bytes": decode[1],
    }


def real_sizes(*, quick: bool) -> dict[str, Any]:
    """Count a step and a decoding of FLUX.1 with random weights at three resolutions.

    The result holds TFLOPs and GiB at the peak without weights, counted on the meta device. On CUDA it also holds
    seconds and peak memory of both, and of a compiled step. Here `tokens` counts image tokens; the text has 512 tokens
    for the base and 256 for the moved model.
    """
    cuda = torch.cuda.is_available()
    result: dict[str, Any] = {}
    for side in SIDES[:1] if quick else SIDES:
        row: dict[str, Any] = {}
        for name, (pixels, channels) in PIXELS.items():
            text = TEXT["base" if pixels == 16 else "moved"]
            tokens = (side // pixels) ** 2
            row[name] = {"tokens": tokens, **_step(channels, tokens, text)}
            if cuda:
                row[name] |= _measured(channels, tokens, text, quick=quick)
        decoders = {
            "AutoencoderKL f8": kl_autoencoder(),
            "AutoencoderDC f32": _dc(6, 32),
            "AutoencoderDC f64": _dc(7, 128),
        }
        for name, (vae, f, c) in decoders.items():
            latents = torch.empty(1, c, side // f, side // f, dtype=vae.dtype, device="meta")
            row[f"decode {name}"] = _rounded(
                "tflop", *counted(partial(vae.decode, latents), [vae, latents])
            )
            if cuda:
                row[f"decode {name}"] |= decoding(vae, latents.shape, quick=quick)
        base = row["f8 patch 2"]
        for name in ("f32", "f64"):
            row[name]["ratio"] = round(base["tflop_step"] / row[name]["tflop_step"], 2)
            if cuda and base["seconds"] and row[name]["seconds"]:
                row[name]["latency_ratio"] = round(base["seconds"] / row[name]["seconds"], 2)
        result[str(side)] = row
    return result


def _step(channels: int, tokens: int, text: int) -> dict[str, float]:
    model = denoiser("flux.1-dev", in_channels=channels)
    inputs = flux_inputs(model, tokens=tokens, text=text)
    guidance = torch.empty(1, device="meta")
    allocated = [model, guidance, *tensors_of(inputs.values())]
    return _rounded("tflop_step", *counted(partial(model, **inputs, guidance=guidance), allocated))


def _rounded(name: str, flop: int, peak: int) -> dict[str, float]:
    return {name: round(flop / 1e12, 2), "activations_gib": round(peak / 2**30, 2)}


def tensors_of(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among the inputs of a forward."""
    return [leaf for leaf in tree_leaves(list(values)) if isinstance(leaf, Tensor)]


def counted(call: Callable[[], Any], allocated: Sequence[nn.Module | Tensor]) -> tuple[int, int]:
    """Return the FLOPs of a call and the bytes that it allocates at its peak."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops(), peak_bytes(call, allocated)


def _measured(channels: int, tokens: int, text: int, *, quick: bool) -> dict[str, Any]:
    """Time a forward on CUDA, eager and with compiled blocks."""
    model = denoiser("flux.1-dev", device="cuda", in_channels=channels).eval()
    inputs = flux_inputs(model, tokens=tokens, text=text)
    guidance = torch.full((1,), GUIDANCE, device="cuda")

    def step() -> Any:
        return model(**inputs, guidance=guidance)

    eager = timed(step, model.device, quick=quick)
    model.compile_repeated_blocks(fullgraph=True)
    return eager | {"compiled": timed(step, model.device, quick=quick)}


def decoding(
    vae: Any, shape: Sequence[int], *, device: str = "cuda", quick: bool
) -> dict[str, Any]:
    """Time the decoding of latents of a shape with random weights.

    The autoencoder comes from the meta device. Random latents take as long as real ones.
    """
    real = vae.to_empty(device=device).eval()
    for weight in real.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    latents = torch.randn(*shape, dtype=real.dtype, device=device)
    return timed(lambda: real.decode(latents), latents.device, quick=quick)


@torch.no_grad()
def timed(call: Callable[[], Any], device: torch.device, *, quick: bool) -> dict[str, Any]:
    """Return the median seconds and, on CUDA, the peak GiB. Seconds are None if memory runs out."""
    cuda = device.type == "cuda"
    try:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = interleaved([call], device, repeats=2 if quick else 3)[0]
    except torch.OutOfMemoryError:
        return {"seconds": None}
    figures = {"seconds": spread(seconds)["median"]}
    if cuda:
        figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return figures


def kl_autoencoder() -> tuple[Any, int, int]:
    """Return FLUX.1's autoencoder on the meta device, its compression and its channels."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    return vae.to(torch.bfloat16), 8, 16


def _dc(stages: int, channels: int) -> tuple[Any, int, int]:
    """Return the published DC-AE f32c32 or f64c128 on the meta device.

    Like `kl_autoencoder`, it also returns compression and channels.
    """
    widths = (128, 256, 512, 512, 1024, 1024, 2048)[:stages]
    layers = (0, 4, 8, 2, 2, 2, 2)[:stages]
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * (stages - 3)
    none = ((),) * stages
    with torch.device("meta"):
        vae = AutoencoderDC(
            latent_channels=channels,
            attention_head_dim=32,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            encoder_layers_per_block=layers,
            decoder_layers_per_block=(0, 5, 10, 2, 2, 2, 2)[:stages],
            encoder_qkv_multiscales=none,
            decoder_qkv_multiscales=none,
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            downsample_block_type="pixel_unshuffle",
            upsample_block_type="pixel_shuffle",
        )
    return vae.to(torch.bfloat16), 2 ** (stages - 1), channels
