"""Features of images as text, for a file of replies."""

from __future__ import annotations

import base64

import numpy as np


def pack(features: np.ndarray) -> str:
    """Return features (D,) as text: float32 in base64."""
    return base64.b64encode(np.asarray(features, "<f4").tobytes()).decode()


def unpack(text: str) -> np.ndarray:
    """Return the features (D,) that `pack` wrote."""
    return np.frombuffer(base64.b64decode(text), "<f4")
