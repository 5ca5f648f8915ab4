"""Fields of a request for images, checked and converted to settings of images."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffalign.core.errors import UsageError
from diffalign.core.nearest import nearest
from diffalign.pipelines.base import TextToImageModel
from diffalign.serving.engine import Engine
from diffalign.serving.tickets import PLAIN, ImageSettings
from diffalign.types import Size

FORMATS = ("png", "jpeg", "webp")
"""Formats of the images in an answer."""
WITHOUT_EFFECT = ("moderation", "user", "safety_identifier")
"""Fields of OpenAI's API without effect, because this server moderates nothing."""
QUALITIES: Mapping[str, str | None] = {
    **{"auto": None, "high": None, "standard": None, "hd": None},
    **{"low": "fast", "medium": "balanced", "xhigh": PLAIN, "max": PLAIN},
}
"""Mode of each of OpenAI's qualities; None is the server's default."""
LARGEST_SEED = 2**63 - 1
_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")


class FieldError(Exception):
    """Field of a request that cannot be used.

    Attributes:
        param: name of the field.
        code: OpenAI's code of the error.
    """

    def __init__(self, param: str, text: str, *, code: str = "invalid_value") -> None:
        super().__init__(text)
        self.param, self.code = param, code


@dataclass(frozen=True)
class Bounds:
    """Limits of one request.

    Attributes:
        pixels: largest number of pixels of an image.
        images: largest `n`.
        steps: largest number of steps.
        prompt: largest number of characters of a prompt.
    """

    pixels: int = 2048 * 2048
    images: int = 10
    steps: int = 200
    prompt: int = 32_000


@dataclass(frozen=True)
class Defaults:
    """Values of the fields that a request leaves out."""

    names: tuple[str, ...]
    """Names by which a request may call the model; the first is its own."""
    size: Size
    num_inference_steps: int
    guidance_scale: float | None


@dataclass(frozen=True)
class Question:
    """Request for images, checked.

    Attributes:
        images: settings of the n images.
        format: one of `FORMATS`.
        compression: 0 to 100, for JPEG and WebP.
        stream: whether images are sent as events when they are done.
        echoed: fields of OpenAI's answer that repeat the request.
    """

    images: tuple[ImageSettings, ...]
    format: str
    compression: int
    stream: bool
    echoed: dict[str, str] = field(default_factory=dict)


class Fields:
    """Reader of the fields of requests to one engine."""

    def __init__(self, engine: Engine, defaults: Defaults, bounds: Bounds) -> None:
        self.engine, self.defaults, self.bounds = engine, defaults, bounds
        self._readers: dict[str, Callable[[Any], Any]] = {
            "prompt": self._prompt,
            "model": self._model,
            "n": lambda v: _whole("n", v, 1, bounds.images),
            "size": self._size,
            "quality": lambda v: _one_of("quality", v, QUALITIES),
            "response_format": _response_format,
            "output_format": lambda v: _one_of("output_format", v, FORMATS),
            "output_compression": lambda v: _whole("output_compression", v, 0, 100),
            "background": lambda v: _one_of("background", v, ("auto", "opaque")),
            "stream": lambda v: _flag("stream", v),
            "partial_images": lambda v: _whole("partial_images", v, 0, 3),
            "seed": lambda v: _whole("seed", v, 0, LARGEST_SEED - bounds.images),
            "num_inference_steps": lambda v: _whole("num_inference_steps", v, 1, bounds.steps),
            "guidance_scale": _guidance,
            "negative_prompt": lambda v: self._text("negative_prompt", v),
            "lora": self._lora,
            "preset": self._preset,
            **{name: _short_text(name) for name in WITHOUT_EFFECT},
        }

    def read(self, body: Any) -> Question:
        """Return the request in a body of JSON.

        Raises:
            FieldError: a field is unknown, missing or out of range, or two exclude each other.
        """
        if not isinstance(body, dict):
            raise FieldError("prompt", "the body must be an object with a `prompt`")
        for name in body:
            if name not in self._readers:
                shown = name[:80]
                raise FieldError(
                    shown,
                    f"there is no field {shown!r}{nearest(shown, self._readers)}",
                    code="unknown_parameter",
                )
        # OpenAI's API takes null for a field that is left out
        values = {n: read(body[n]) for n, read in self._readers.items() if body.get(n) is not None}
        if "prompt" not in values:
            raise FieldError("prompt", "`prompt` is missing; it is the text of the image")
        self._check_together(values)
        return self._question(values)

    def _question(self, values: dict[str, Any]) -> Question:
        defaults = self.defaults
        size = values.get("size", defaults.size)
        quality = values.get("quality", "auto")
        seed = values.get("seed")
        seed = secrets.randbelow(2**31) if seed is None else seed
        guidance = values.get("guidance_scale", defaults.guidance_scale)
        format_ = values.get("output_format", "png")
        images = tuple(
            ImageSettings(
                values["prompt"],
                seed + i,
                size,
                values.get("num_inference_steps", defaults.num_inference_steps),
                guidance,
                values.get("negative_prompt", ""),
                values.get("lora"),
                values.get("preset") or self._mode(quality),
                values.get("partial_images", 0),
            )
            for i in range(values.get("n", 1))
        )
        echoed = {
            "background": "opaque",
            "output_format": format_,
            "quality": quality,
            "size": f"{size[1]}x{size[0]}",
        }
        compression = values.get("output_compression", 100)
        return Question(images, format_, compression, values.get("stream", False), echoed)

    def _check_together(self, values: dict[str, Any]) -> None:
        """Raise FieldError for fields that have no effect together."""
        if values.get("partial_images") and not values.get("stream"):
            raise FieldError("partial_images", "`partial_images` needs `stream`: true")
        if "output_compression" in values and values.get("output_format", "png") == "png":
            raise FieldError(
                "output_compression", "PNG has no `output_compression`; ask for jpeg or webp"
            )
        if "preset" in values and values.get("quality", "auto") != "auto":
            raise FieldError("quality", "`quality` and `preset` choose the same; leave one out")
        guidance = values.get("guidance_scale", self.defaults.guidance_scale)
        if values.get("negative_prompt") and not self.engine.model.costs_a_forward(guidance):
            raise FieldError(
                "negative_prompt",
                "`negative_prompt` has no effect without classifier-free guidance; set a `guidance_scale` above 1, or "
                "leave it out",
            )

    def _mode(self, quality: str) -> str:
        """Return the mode of a quality."""
        mode = QUALITIES[quality]
        if mode is None:
            return next(iter(self.engine.modes))
        if mode not in self.engine.modes:
            qualities = ", ".join(
                q for q, m in QUALITIES.items() if m is None or m in self.engine.modes
            )
            raise FieldError(
                "quality",
                f"this server has not prepared the preset {mode!r} of the quality {quality!r}; choose from {qualities}",
            )
        return mode

    def _preset(self, value: Any) -> str:
        return _one_of("preset", value, self.engine.modes)

    def _prompt(self, value: Any) -> str:
        text = self._text("prompt", value)
        if not text.strip():
            raise FieldError("prompt", "`prompt` is empty; it is the text of the image")
        return text

    def _text(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise FieldError(name, f"`{name}` must be a text")
        if len(value) > self.bounds.prompt:
            raise FieldError(
                name,
                f"`{name}` has {len(value)} characters, and at most {self.bounds.prompt} are read; shorten it",
                code="string_above_max_length",
            )
        # a lone surrogate is valid JSON and no text
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise FieldError(name, f"`{name}` is not text in Unicode")
        return value

    def _model(self, value: Any) -> str:
        if value not in self.defaults.names:
            own = self.defaults.names[0]
            raise FieldError(
                "model", f"this server has the model {own!r} only", code="model_not_found"
            )
        return str(value)

    def _size(self, value: Any) -> Size:
        if value == "auto":
            return self.defaults.size
        match = _SIZE.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise FieldError("size", '`size` must be "auto" or WIDTHxHEIGHT, such as "1024x1024"')
        width, height = int(match[1]), int(match[2])
        if width * height > self.bounds.pixels:
            raise FieldError(
                "size", f"an image may have {self.bounds.pixels} pixels, and {value} has more"
            )
        return check_size(self.engine.model, (height, width))

    def _lora(self, value: Any) -> str:
        if not isinstance(value, str):
            raise FieldError("lora", "`lora` must be the name of a LoRA")
        try:
            self.engine.loras.check(value)
        except UsageError as error:
            raise FieldError("lora", str(error), code="lora_not_found") from error
        return value


def check_size(model: TextToImageModel, size: Size) -> Size:
    """Return a size that the model can draw.

    Raises:
        FieldError: it cannot.
    """
    try:
        model.latent_shape(size)
    except UsageError as error:
        raise FieldError("size", str(error)) from error
    return size


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise FieldError(name, f"`{name}` must be a whole number from {low} to {high}")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise FieldError(name, f"`{name}` must be true or false")
    return value


def _guidance(value: Any) -> float:
    number = float(value) if isinstance(value, int | float) and abs(value) < 1e6 else math.nan
    if isinstance(value, bool) or not 0 <= number <= 100:
        raise FieldError("guidance_scale", "`guidance_scale` must be a number from 0 to 100")
    return number


def _one_of(name: str, value: Any, names: Any) -> str:
    if not isinstance(value, str) or value not in names:
        hint = nearest(value[:80], names) if isinstance(value, str) else ""
        raise FieldError(name, f"`{name}` must be one of {', '.join(names)}{hint}")
    return value


def _response_format(value: Any) -> str:
    if value != "b64_json":
        raise FieldError(
            "response_format",
            "images are sent as base64; leave `response_format` out, or set b64_json",
        )
    return "b64_json"


def _short_text(name: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or len(value) > 512:
            raise FieldError(name, f"`{name}` must be a text of at most 512 characters")
        return value

    return read
