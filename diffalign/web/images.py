"""Images in messages of HTTP."""

from __future__ import annotations

import base64
import io

from PIL import Image
from torch import Tensor


def encode_image(image: Tensor) -> str:
    """Convert an image (3, H, W) uint8 to PNG in base64."""
    buffer = io.BytesIO()
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    # time matters more than bytes
    picture.save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()
