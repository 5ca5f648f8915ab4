"""Reads a Shapes image without learning: pixels to colours, colours to components, components to shapes.

A pixel is explained as a blend of the ground and one colour, so that the soft edge of a black circle is black and not
purple. A component is named by the shape that, drawn into the same box, covers it best. Then GenEval's rules judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from scipy import ndimage

from diffalign.geneval.rules import Detection, Verdict, judge
from diffalign.shapes.world import (
    BACKGROUND,
    COLORS,
    IMAGE_SIZE,
    KINDS,
    TRIANGLE_HEIGHT,
    signed_distance,
)

MIN_AREA = 30
"""Components of fewer pixels (at 64 x 64) are specks, not objects."""
MIN_IOU = 0.72
"""Overlap with the best shape below which a component has no name."""
MAX_RESIDUAL = 70.0
"""Distance in RGB to the line from the ground to a colour beyond which a pixel has no colour."""
TEMPLATE = 20
UNNAMED = "unknown"

_DIRECTIONS = np.array(list(COLORS.values()), np.float32) - np.array(BACKGROUND, np.float32)


def color_map(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 to (H, W) int: index into COLORS, or -1 for ground and for unexplained pixels."""
    pixel = image.astype(np.float32) - np.array(BACKGROUND, np.float32)
    squared = (_DIRECTIONS**2).sum(1)
    amount = np.clip(pixel @ _DIRECTIONS.T / squared, 0, 1)  # (H, W, C): how much of each colour
    # |p - a d|^2 expanded, so that no (H, W, C, 3) array is made
    residual = (
        (pixel**2).sum(-1, keepdims=True)
        - 2 * amount * (pixel @ _DIRECTIONS.T)
        + amount**2 * squared
    )
    best = residual.argmin(-1)
    pick = best[..., None]
    explained = np.take_along_axis(residual, pick, -1)[..., 0] < MAX_RESIDUAL**2
    inside = np.take_along_axis(amount, pick, -1)[..., 0] > 0.5
    return np.where(explained & inside, best, -1)


@cache
def _templates() -> np.ndarray:
    """(kinds, TEMPLATE, TEMPLATE) bool: each shape drawn to fill its box."""
    axis = (np.arange(TEMPLATE, dtype=np.float32) + 0.5) / TEMPLATE - 0.5
    masks = []
    for kind in KINDS:
        height = TRIANGLE_HEIGHT if kind == "triangle" else 1.0
        masks.append(signed_distance(kind, axis[None, :], axis[:, None] * height, 1.0) < 0)
    return np.stack(masks)


def name_shape(mask: np.ndarray) -> tuple[str, float]:
    """Name of the shape that fills a cropped (h, w) bool mask best, and their intersection over union."""
    h, w = mask.shape
    if not 0.6 < h / w < 1.5:
        return UNNAMED, 0.0
    rows = np.minimum((np.arange(TEMPLATE) + 0.5) * h / TEMPLATE, h - 1).astype(int)
    columns = np.minimum((np.arange(TEMPLATE) + 0.5) * w / TEMPLATE, w - 1).astype(int)
    filled = mask[rows[:, None], columns[None, :]]
    templates = _templates()
    iou = (templates & filled).sum((1, 2)) / (templates | filled).sum((1, 2))
    best = int(iou.argmax())
    return (KINDS[best] if iou[best] >= MIN_IOU else UNNAMED), float(iou[best])


def detect(image: np.ndarray) -> list[Detection]:
    """All objects of a (H, W, 3) uint8 image; what has a colour but no shape is named "unknown"."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected a (H, W, 3) uint8 image, got {image.shape} {image.dtype}")
    colors = color_map(image)
    smallest = MIN_AREA * (image.shape[0] * image.shape[1]) / IMAGE_SIZE**2
    found = []
    for index, color in enumerate(COLORS):
        mask = colors == index
        if mask.sum() < smallest:
            continue
        labels, _ = ndimage.label(mask)
        for number, window in enumerate(ndimage.find_objects(labels), 1):
            component = labels[window] == number
            if component.sum() < smallest:
                continue
            kind, iou = name_shape(component)
            rows, columns = window
            box = (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
            found.append(Detection(name=kind, box=box, score=iou, color=color))
    return found


def verify(image: np.ndarray, metadata: Mapping[str, Any]) -> Verdict:
    """Judge one (H, W, 3) uint8 image against one prompt's metadata."""
    return judge(detect(image), metadata)
