"""Cards of models: default generation settings, published by their makers or saved in a folder."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from diffalign.core.errors import UserError
from diffalign.pipelines.places import look
from diffalign.pipelines.registry import MODELS, available, resolve

CARD = "diffalign_card.json"
"""Name of the card's file in a pipeline's folder."""
FEW_STEPS = 4
STUDENTS = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")
"""Schedulers that only few-step students have."""


class CardError(UserError, ValueError):
    """Card whose file is damaged."""


@dataclass(frozen=True)
class DrawingCard:
    """Default settings of generation with one model: steps, guidance, size, batch and dtype.

    A `guidance_scale` of None means no second forward (for FLUX its default embedding). A `height` or `width` of None
    means the model's own size in pixels.
    """

    num_inference_steps: int
    guidance_scale: float | None = None
    batch_size: int = 4
    height: int | None = None
    width: int | None = None
    dtype: str = "bfloat16"

    def save(self, folder: Path) -> None:
        """Write the card into a pipeline's folder."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        (folder / CARD).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, file: Path) -> DrawingCard:
        """Read a card.

        Raises:
            CardError: the file is damaged; the message names it.
        """
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(record, dict):
                raise CardError(
                    f"{file} is damaged: an object was expected; delete it or save it anew"
                )
            return cls(
                **{f.name: record[f.name] for f in fields(cls) if f.name in record}
            )._checked(file)
        except (OSError, ValueError, TypeError) as error:
            if isinstance(error, CardError):
                raise
            raise CardError(f"{file} is damaged ({error}); delete it or save it anew") from error

    def _checked(self, file: Path) -> DrawingCard:
        def is_count(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= 1

        counts = [self.num_inference_steps, self.batch_size]
        counts += [side for side in (self.height, self.width) if side is not None]
        guidance = self.guidance_scale
        number = guidance is None or (
            isinstance(guidance, int | float) and not isinstance(guidance, bool)
        )
        if (
            not all(is_count(c) for c in counts)
            or not number
            or self.dtype not in ("bfloat16", "float16", "float32")
        ):
            raise CardError(f"{file} is damaged: {asdict(self)}; delete it or save it anew")
        return self

    def updated(self, flags: Mapping[str, Any]) -> DrawingCard:
        """Return a copy with the flags that are not None."""
        names = {f.name for f in fields(self)}
        return replace(self, **{k: v for k, v in flags.items() if k in names and v is not None})

    def __str__(self) -> str:
        guidance = (
            "no guidance" if self.guidance_scale is None else f"guidance {self.guidance_scale:g}"
        )
        size = "the model's own size"
        if self.height is not None or self.width is not None:
            size = f"{self.height or 'own height'} x {self.width or 'own width'} px"
        return f"{self.num_inference_steps} steps, {guidance}, {size}, {self.batch_size} at a time, {self.dtype}"


SHAPES = DrawingCard(10, batch_size=64)
SHAPES_STUDENT = DrawingCard(FEW_STEPS, batch_size=64)
PUBLISHED = {
    "shapes-sd3": SHAPES,
    "shapes-flux": SHAPES,
    "shapes-sd": SHAPES,
    "shapes-flux-schnell": SHAPES_STUDENT,
    "shapes-sd-lcm": SHAPES_STUDENT,
    "sd1.5": DrawingCard(50, 7.5, 16, 512, 512),
    "lcm-sd1.5": DrawingCard(FEW_STEPS, None, 16, 512, 512),
    "pcm-sd1.5": DrawingCard(FEW_STEPS, None, 16, 512, 512),
    "sdxl": DrawingCard(50, 5.0, 4, 1024, 1024),
    "sdxl-turbo": DrawingCard(1, None, 16, 512, 512),
    "sd3.5-medium": DrawingCard(40, 4.5, 4, 1024, 1024),
    "sd3.5-large": DrawingCard(28, 3.5, 2, 1024, 1024),
    "flux.1-dev": DrawingCard(50, 3.5, 2, 1024, 1024),
    "flux.1-krea": DrawingCard(28, 4.5, 2, 1024, 1024),
    "flux.1-schnell": DrawingCard(FEW_STEPS, None, 2, 1024, 1024),
    "sana-1.6b": DrawingCard(20, 4.5, 8, 1024, 1024),
    "flux.2-klein-base-4b": DrawingCard(50, 4.0, 4, 1024, 1024),
    "flux.2-klein-base-9b": DrawingCard(50, 4.0, 2, 1024, 1024),
    "flux.2-klein-4b": DrawingCard(FEW_STEPS, None, 4, 1024, 1024),
    "flux.2-klein-9b": DrawingCard(FEW_STEPS, None, 2, 1024, 1024),
    "flux.2-dev": DrawingCard(50, 4.0, 1, 1024, 1024),
    "z-image": DrawingCard(50, 6.0, 4, 1024, 1024),
    "z-image-turbo": DrawingCard(8, None, 4, 1024, 1024),
    "qwen-image": DrawingCard(50, 4.0, 1, 1024, 1024),
    "qwen-image-2512": DrawingCard(50, 4.0, 1, 1024, 1024),
    "stabilityai/stable-diffusion-3-medium-diffusers": DrawingCard(28, 7.0, 4, 1024, 1024),
    "stabilityai/stable-diffusion-3.5-large-turbo": DrawingCard(FEW_STEPS, None, 2, 1024, 1024),
}
"""Cards by name or hub id, as recommended on the models' pages of the hub.

Batch sizes are for one GPU. All cards have the dtype bfloat16, which every family supports, on CPUs, too.
"""


def card_of(name: str, *, revision: str | None = None) -> DrawingCard:
    """Find the card of a model without reading its weights.

    Args:
        name: a name of `diffalign list models`, a folder, a .safetensors file or a hub id.

    Raises:
        UnknownModel: the model does not exist.
        CardError: the card in the model's folder is damaged.
    """
    spec = resolve(name)
    if name in available() and name in PUBLISHED:
        return PUBLISHED[name]
    published = _published(spec.source)
    if published is not None:
        return published
    place = look(spec.source)
    assert place is not None
    if place.kind == "file":
        from diffalign.pipelines.single_file import base_of, layout_of

        layout = layout_of(place.source)
        beside = layout.source == str(Path(place.source).with_suffix(""))
        base = None if beside else _published(base_of(place.source))
        if base is not None:
            return base
        place = layout
    if place.kind == "folder" and (Path(place.source) / CARD).is_file():
        return DrawingCard.load(Path(place.source) / CARD)
    return _derived(place, revision or spec.revision)


def _published(source: str) -> DrawingCard | None:
    """Return the published card of a hub id, or None."""
    if source in PUBLISHED:
        return PUBLISHED[source]
    names = [n for n, s in MODELS.items() if s.source == source and s.lora is None]
    return PUBLISHED.get(names[0]) if names else None


def _derived(place: Any, revision: str | None) -> DrawingCard:
    """Return a card with the defaults of the stock call, or those of few-step students."""
    from diffalign.pipelines.loading import open_folder, pipeline_class
    from diffalign.pipelines.registry import family_of

    folder = open_folder(place, {"revision": revision})
    family = family_of(folder.class_name)
    parameters = inspect.signature(pipeline_class(folder.class_name).__call__).parameters
    scheduler = folder.component_config("scheduler") or {}
    part = "unet" if "unet" in folder.index else "transformer"
    denoiser = folder.component_config(part) or {}
    pixels = _pixels(folder.component_config("vae") or {}, denoiser)
    batch_size = 64 if pixels <= 128 else 16 if pixels <= 512 else 4
    if scheduler.get("_class_name") in STUDENTS or family.is_student(
        denoiser, scheduler, folder.index
    ):
        return DrawingCard(FEW_STEPS, batch_size=batch_size)
    return DrawingCard(
        parameters["num_inference_steps"].default,
        family.default_guidance(parameters),
        batch_size=batch_size,
    )


def _pixels(vae: Mapping[str, Any], denoiser: Mapping[str, Any]) -> int:
    """Return the approximate side of a model's images in pixels, to estimate a batch's cost."""
    side = denoiser.get("sample_size")
    if not isinstance(side, int):
        return int(vae.get("sample_size") or 1024)
    blocks = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or range(4)
    return int(side * 2 ** (len(blocks) - 1))
