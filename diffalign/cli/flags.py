"""Values of the flags of a verb, which its `run` takes instead of argparse's Namespace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self


@dataclass(kw_only=True)
class Values:
    """Values of the flags of one verb, by name."""

    @classmethod
    def taken_from(cls, values: Mapping[str, Any]) -> Self:
        """Return the flags that the class has of all parsed values."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


@dataclass(kw_only=True)
class ModelFlags(Values):
    """Flags of `options.add_model`."""

    model: str
    lora: str | None = None
    dtype: str
    """Format of the weights; None until the model's card is read (`models.settle_drawing`)."""


@dataclass(kw_only=True)
class DrawingFlags(ModelFlags):
    """Flags of `options.add_drawing`.

    Those that the user leaves out are None until the model's card is read.
    """

    num_inference_steps: int
    solver: str = "default"
    guidance_scale: float | None
    height: int | None
    width: int | None
    seed: int
    batch_size: int
    images_per_prompt: int = 1
    images_per_task: int | None = None


@dataclass(kw_only=True)
class SampleFlags(DrawingFlags):
    """Flags of verbs that draw images of --prompts."""

    prompts: str
    """Prompts to draw; None for the default of verbs that decide it by the model."""
    max_prompts: int | None = None
    record_states: int | None = None
