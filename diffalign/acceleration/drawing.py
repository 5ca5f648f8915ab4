"""Drawing with a stock pipeline's own call, for calibration and checks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffalign.acceleration.cache import Tensors
from diffalign.core.errors import UsageError

PROMPTS = (
    "a photo of a red circle",
    "a photo of a blue square",
    "a photo of two green circles",
    "a photo of a cat",
)
"""Prompts of calibrations and checks, if the caller passes none."""


@dataclass(frozen=True)
class Call:
    """Arguments of a pipeline's call that an acceleration is made for.

    Attributes:
        steps: number of steps.
        height: height in pixels.
        width: width in pixels.
        prompts: prompts to draw.
        arguments: further arguments, such as `guidance_scale`.
        seed: seed of the first image.
    """

    steps: int
    height: int
    width: int
    prompts: tuple[str, ...] = PROMPTS
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def take(self, n: int, *, seed: int | None = None) -> Call:
        """Return a call with n images of the prompts in turn."""
        prompts = tuple(self.prompts[i % len(self.prompts)] for i in range(n))
        return replace(self, prompts=prompts, seed=self.seed if seed is None else seed)


@torch.no_grad()
def draw(pipeline: Any, call: Call) -> Tensor:
    """Return images (B, 3, H, W) in [0, 1], one a prompt, on the CPU."""
    generators = [torch.Generator().manual_seed(call.seed + i) for i in range(len(call.prompts))]
    arguments = dict(call.arguments)
    # SANA would otherwise draw the nearest of its own sizes and resize it
    if "use_resolution_binning" in inspect.signature(type(pipeline).__call__).parameters:
        arguments.setdefault("use_resolution_binning", False)
    images = pipeline(
        prompt=list(call.prompts),
        num_inference_steps=call.steps,
        height=call.height,
        width=call.width,
        generator=generators,
        output_type="pt",
        **arguments,
    ).images
    tensor: Tensor = images.float().cpu()
    return tensor


def psnr(images: Tensor, plain: Tensor) -> list[float]:
    """Return the PSNR of each image in dB, at most 150.

    It is NaN for an image whose values are not all finite.
    """
    error = (images - plain).double().square().flatten(1).mean(1)
    ratios = -10 * torch.log10(error.clamp(min=1e-15))
    return [float(r) for r in ratios]


def guidance_of(pipeline: Any) -> Any:
    """Return the function that applies a pipeline's guidance to a batch [negative; positive].

    A pipeline without a second half in its batch gets the identity. The function reads the guidance scale when it is
    called, because a pipeline learns it in its call.
    """

    def guided(tensors: Tensors) -> Tensors:
        if not getattr(pipeline, "do_classifier_free_guidance", False):
            return tensors
        scale = float(pipeline.guidance_scale)
        if len(tensors) == 1:
            if len(tensors[0]) % 2:
                return tensors
            negative, positive = tensors[0].double().chunk(2)
            return [negative + scale * (positive - negative)]
        return tensors

    return guided


def default_steps(pipeline: Any) -> int:
    """Return the number of steps that a pipeline's call has by default.

    Raises:
        UsageError: the call has no such argument.
    """
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("num_inference_steps")
    if parameter is None or not isinstance(parameter.default, int):
        raise UsageError(
            f"steps=None: {type(pipeline).__name__} has no default number of steps. Pass `steps`."
        )
    return parameter.default
