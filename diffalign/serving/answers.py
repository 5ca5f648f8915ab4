"""Answers in the form of OpenAI's images API: images, events of a stream, and errors."""

from __future__ import annotations

import base64
import io
import json
import time
from typing import Any

from PIL import Image
from torch import Tensor

from diffalign.serving.fields import Question
from diffalign.web.images import encode_image

TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}
TYPES |= {429: "rate_limit_error", 503: "service_unavailable_error", 504: "timeout_error"}
"""Types of errors by status; others are invalid requests below 500, and errors of the server from there on."""
STATUSES = {"deadline": 504, "memory": 503, "shutdown": 503, "usage": 400}
"""Status of an image that failed, by its cause; 500 for others."""
AGAIN = ("shutdown",)
"""Causes after which the same request may succeed."""


def picture(image: Tensor, question: Question) -> str:
    """Return an image (3, H, W) uint8 in base64, in the request's format."""
    if question.format == "png":
        return encode_image(image)
    buffer = io.BytesIO()
    file = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    file.save(buffer, format=question.format.upper(), quality=max(1, question.compression))
    return base64.b64encode(buffer.getvalue()).decode()


def usage(input_tokens: int, output_tokens: int) -> dict[str, Any]:
    """Return the counts of tokens of text and of images."""
    return {
        "input_tokens": input_tokens,
        "input_tokens_details": {"text_tokens": input_tokens, "image_tokens": 0},
        "output_tokens": output_tokens,
        "total_tokens": input_tokens + output_tokens,
    }


def whole(question: Question, images: list[dict[str, Any]], tokens: dict[str, Any]) -> Any:
    """Return the answer with all images."""
    return {"created": int(time.time()), "data": images, **question.echoed, "usage": tokens}


def event(kind: str, question: Question, content: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    name = f"image_generation.{kind}"
    message = {"type": name, "created_at": int(time.time()), **question.echoed, **content}
    return f"event: {name}\ndata: {json.dumps(message)}\n\n".encode()


def error_event(status: int, text: str, *, code: str | None = None) -> bytes:
    """Return the event of an error in the middle of a stream."""
    return f"event: error\ndata: {json.dumps(error(status, text, code=code))}\n\n".encode()


def error(
    status: int, text: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return the body of an answer with an error."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}
