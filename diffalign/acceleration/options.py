"""Options of an acceleration, and the presets that choose for the caller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict

from diffalign.core.errors import UsageError
from diffalign.core.nearest import closest

CHOICES: dict[str, tuple[str, ...]] = {
    "quantize": ("int8", "int4", "torchao-int8", "torchao-int8wo", "torchao-fp8", "torchao-fp8wo"),
    "layout": ("channels_last",),
    "attention": (),
    "cache": ("static",),
    "guidance": ("interval", "reuse"),
    "compile": ("blocks",),
    "offload": ("model", "group"),
    "vae": ("slicing", "tiling"),
}
"""Options in the order in which they are applied, with their names.

The names of attention backends are those of diffusers.
"""
LOSSY = ("quantize", "cache", "guidance")
"""Options that change what is computed, the strongest last."""
STATIC = 50.0
"""PSNR in dB that half of the images reach with `cache="static"`."""
INTERVAL = (0.2, 0.8)
"""Part of the schedule in which `guidance="interval"` guides."""
PRESETS: dict[str, dict[str, Any]] = {
    "lossless": {"attention": "auto", "compile": "blocks"},
    "balanced": {"attention": "auto", "compile": "blocks", "cache": STATIC},
    "fast": {"attention": "auto", "compile": "blocks", "cache": 40.0, "guidance": "interval"},
    "small": {"attention": "auto", "quantize": "int4", "offload": "model", "vae": "slicing"},
}
"""Values of the options that a preset leaves to "auto"; others are off.

The value "auto" of `attention` is `attention.pick`.
"""
FLOORS = {"lossless": 60.0, "balanced": 30.0, "fast": 15.0, "small": 15.0}
"""Median PSNR in dB below which a preset takes its last lossy option back."""
Choice = str | float | bool


class Arguments(TypedDict, total=False):
    """Keyword arguments of `accelerate`; `Options` describes them."""

    quantize: Choice
    cache: Choice
    compile: Choice
    attention: Choice
    guidance: Choice
    offload: Choice
    vae: Choice
    layout: Choice
    sizes: tuple[tuple[int, int], ...]
    batch_sizes: tuple[int, ...]
    steps: int
    lora_rank: int
    check: int
    floor: float
    prompts: tuple[str, ...]
    arguments: Mapping[str, Any]
    seed: int


@dataclass(frozen=True)
class Options:
    """Options of an acceleration. Each choice is "auto", False or a name.

    Attributes:
        quantize: backend of `diffalign.quantization` for the denoiser.
        cache: "static", or the PSNR in dB that half of the images shall reach with the static cache.
        compile: "blocks" compiles the denoiser's blocks.
        attention: attention backend of diffusers; "auto" is `attention.pick`'s.
        guidance: "interval" guides in the middle of the schedule only; "reuse" computes the negative half of the batch
            in every second step; the path of a LoRA that draws without guidance never computes it.
        offload: "model" or "group", diffusers' offloading to the CPU.
        vae: "slicing" or "tiling" of the autoencoder.
        layout: "channels_last" lays the weights of convolutions out as GPUs read them.
        sizes: sizes (height, width) in pixels that it is made for; empty for the pipeline's own.
        batch_sizes: numbers of images in a call that blocks are compiled for; with a check before the first call.
        steps: number of steps that it is made for; None for the default of the pipeline's call.
        lora_rank: largest rank of the LoRAs that will be swapped without compiling again; None prepares nothing.
        check: number of images that are drawn plain and accelerated.
        floor: median PSNR in dB below which the last lossy option is taken back; None for the preset's.
        prompts: prompts of the calibration and the check; empty for those of `drawing.PROMPTS`.
        arguments: further arguments of the pipeline's call, such as `guidance_scale`.
        seed: seed of the first image of the calibration.
    """

    quantize: Choice = "auto"
    cache: Choice = "auto"
    compile: Choice = "auto"
    attention: Choice = "auto"
    guidance: Choice = "auto"
    offload: Choice = "auto"
    vae: Choice = "auto"
    layout: Choice = "auto"
    sizes: tuple[tuple[int, int], ...] = ()
    batch_sizes: tuple[int, ...] = (1,)
    steps: int | None = None
    lora_rank: int | None = None
    check: int = 2
    floor: float | None = None
    prompts: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Options:
        """Check the values and return the options.

        Raises:
            UsageError: an option or its value does not exist.
        """
        names = [f.name for f in fields(cls)]
        for name, value in values.items():
            if name not in names:
                raise UsageError(
                    f"{name}={value!r}: accelerate has no such option. {_hint(name, names)}"
                )
            if name in CHOICES:
                _check_choice(name, value)
        options = cls(**values)
        for name in ("check", "steps", "lora_rank"):
            number = getattr(options, name)
            if number is not None and (isinstance(number, bool) or number < (name != "check")):
                what = "rank" if name == "lora_rank" else f"number of {name}"
                raise UsageError(f"{name}={number}: this is no {what}. Pass a positive integer.")
        _check_counts("batch_sizes", options.batch_sizes, options.batch_sizes)
        if not options.batch_sizes:
            raise UsageError("batch_sizes=(): there is no number of images. Pass (1,), or several.")
        for size in options.sizes:
            _check_counts("sizes", options.sizes, size if _is_pair(size) else None)
        return options

    def chosen(self, preset: str) -> dict[str, tuple[Choice, bool]]:
        """Return the value of each option that is on, and whether the caller named it."""
        values: dict[str, tuple[Choice, bool]] = {}
        for name, names in CHOICES.items():
            value, named = getattr(self, name), True
            if value == "auto" or value is True:
                named = value is True
                value = PRESETS[preset].get(name, names[0] if named and names else False)
            if value is not False:
                values[name] = (value, named)
        return values


def check_preset(preset: str) -> None:
    """Raise UsageError with the nearest name if there is no preset of this name."""
    if preset not in PRESETS:
        raise UsageError(
            f"preset={preset!r}: there is no such preset. {_hint(preset, list(PRESETS))}"
        )


def _check_choice(name: str, value: Any) -> None:
    names = ["auto", *CHOICES[name]]
    is_number = name == "cache" and isinstance(value, int | float) and not isinstance(value, bool)
    is_file = name == "guidance" and isinstance(value, str | Path) and Path(value).exists()
    any_name = not CHOICES[name] and isinstance(value, str)
    if isinstance(value, bool) or is_number or is_file or any_name:
        return
    if value not in names:
        raise UsageError(f"{name}={value!r}: {name} has no such choice. {_hint(str(value), names)}")


def _is_pair(size: Any) -> bool:
    return isinstance(size, tuple | list) and len(size) == 2


def _check_counts(name: str, value: Any, counts: Any) -> None:
    """Raise UsageError unless `counts` holds positive integers; `value` is the whole option."""
    is_row = isinstance(counts, tuple | list)
    if is_row and all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in counts):
        return
    example = "((1024, 1024), (768, 1024))" if name == "sizes" else "(1, 4)"
    raise UsageError(
        f"{name}={value!r}: these are no positive integers. Pass for instance {example}."
    )


def _hint(name: str, names: list[str]) -> str:
    close = closest(name, names)
    return f"Did you mean {close!r}?" if close else f"Choose from {', '.join(names)}."
