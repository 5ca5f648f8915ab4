"""Messages between reward services and clients: JSON with images as PNG.

They never contain pickles, nor lossy JPEG.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from diffalign.types import RewardOutput
from diffalign.web.images import encode_image

MAX_PIXELS = 4096 * 4096
MAX_TOTAL = 2**29
"""Largest number of pixels of a request, which are 1.5 GB when decoded."""
MAX_IMAGES = 1024
MAX_TEXT = 100_000
PNG = "iVBORw0KGgo"
"""First bytes of a PNG file in base64."""
BLOCK = 4_000_000
"""Number of base64 characters that are decoded at a time, a multiple of four."""


class WireError(ValueError):
    """Message of another format; the error's text repeats no part of it."""


def encode_request(
    images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Convert images (B, 3, H, W) uint8, prompts and metadata to values for JSON."""
    return {
        "images": [encode_image(image) for image in images],
        "prompts": list(prompts),
        "metadata": [dict(entry) for entry in metadata],
    }


def decode_request(message: Any) -> tuple[Tensor, list[str], list[dict[str, Any]]]:
    """Read a request.

    Raises:
        WireError: the request does not have the format of `encode_request`.
    """
    if not isinstance(message, dict):
        raise WireError("expected an object with images, prompts and metadata")
    images, prompts = message.get("images"), message.get("prompts")
    if not isinstance(images, list) or not 1 <= len(images) <= MAX_IMAGES:
        raise WireError(f"images must be a list of 1 to {MAX_IMAGES} base64 PNGs")
    if (
        not isinstance(prompts, list)
        or len(prompts) != len(images)
        or not all(isinstance(p, str) and len(p) <= MAX_TEXT for p in prompts)
    ):
        raise WireError("prompts must be a list of texts, one an image")
    metadata = message.get("metadata", [{}] * len(images))
    if (
        not isinstance(metadata, list)
        or len(metadata) != len(images)
        or not all(isinstance(m, dict) for m in metadata)
    ):
        raise WireError("metadata must be a list of objects, one an image")
    files = [_content(text) for text in images]
    if sum(_size(content) for content in files) > MAX_TOTAL:
        raise WireError(f"a request may have {MAX_TOTAL} pixels in all")
    pixels = [_decode(content) for content in files]
    if len({p.shape for p in pixels}) > 1:
        raise WireError("images of one request must have one size")
    return torch.stack(pixels), prompts, metadata


def _content(text: Any) -> bytes:
    if not isinstance(text, str):
        raise WireError("an image must be base64 text")
    if len(text) > BLOCK and not text.startswith(PNG):
        raise WireError("an image is no PNG")
    try:
        # in blocks, between which other threads may run
        blocks = (text[i : i + BLOCK] for i in range(0, len(text), BLOCK))
        return b"".join(base64.b64decode(block, validate=True) for block in blocks)
    except (binascii.Error, ValueError) as error:
        raise WireError("an image is not base64") from error


@contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    """Yield an opened PNG whose header is read; convert every error to WireError."""
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as file:
            if file.width * file.height > MAX_PIXELS:
                raise WireError(f"an image has more than {MAX_PIXELS} pixels")
            if file.mode != "RGB":
                raise WireError("an image is not RGB with 8 bits")
            yield file
    except WireError:
        raise
    except (
        UnidentifiedImageError,
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:
        raise WireError("an image is no PNG") from error


def _size(content: bytes) -> int:
    with _opened(content) as file:
        return file.width * file.height


def _decode(content: bytes) -> Tensor:
    with _opened(content) as file:
        return torch.from_numpy(np.array(file)).permute(2, 0, 1)


def encode_output(output: RewardOutput) -> dict[str, Any]:
    """Convert a reward's output to values for JSON; numbers that are not finite are null."""
    columns = {"": output.values, **output.details}
    numbers = {
        name: [float(v) if math.isfinite(v) else None for v in values]
        for name, values in columns.items()
    }
    return {"values": numbers.pop(""), "details": numbers}


def decode_output(message: Any, *, n: int) -> RewardOutput:
    """Read an answer for n images.

    Raises:
        WireError: the answer is not that of a reward service.
    """
    if not isinstance(message, dict) or not isinstance(message.get("details", {}), dict):
        raise WireError("expected an object with values and details")

    def column(values: Any) -> np.ndarray:
        if not isinstance(values, list) or len(values) != n:
            raise WireError(f"expected {n} values")
        if not all(
            v is None or (isinstance(v, int | float) and not isinstance(v, bool)) for v in values
        ):
            raise WireError("values must be numbers or null")
        return np.array([math.nan if v is None else v for v in values], np.float32)

    details = {str(name): column(v) for name, v in message.get("details", {}).items()}
    return RewardOutput(column(message.get("values")), details)


def golden() -> tuple[Tensor, list[str], list[dict[str, Any]]]:
    """Return an image that any lossy transfer would change, with a prompt and metadata."""
    x = torch.arange(64)
    noise = (
        x[None, :, None] * 97 + x[None, None, :] * 57 + torch.arange(3)[:, None, None] * 131
    ) % 256
    image = noise.to(torch.uint8)
    image[:, 16:48, 16:48] = torch.tensor([230, 25, 25], dtype=torch.uint8)[:, None, None]
    prompt = 'a photo of a red square with "A"'
    clause = {"class": "square", "count": 1, "color": "red"}
    return image[None], [prompt], [{"prompt": prompt, "tag": "colors", "include": [clause]}]
