"""Read the objects of a Shapes image without learning: pixels to colours, components to shapes.

A pixel is a blend of the ground and one colour, so that the soft edge of a black circle is black and not purple. A
component takes the name of the shape whose own rendering, at the best place and size, explains its soft coverage. A
shape that two renderings explain alike, or none well, is "unknown", and so is a colour outside the palette. GenEval's
rules then judge the detections.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from diffalign.geneval.rules import Detection, Verdict, judge
from diffalign.shapes.world import BACKGROUND, COLORS, IMAGE_SIZE, KINDS, signed_distance

MIN_AREA = 30
"""Components of fewer pixels (at 64 x 64) are specks, not objects."""
MIN_OVERLAP = {"circle": 0.978, "square": 0.976, "triangle": 0.94, "cross": 0.966, "ring": 0.945}
"""Least overlap of an object's coverage with the rendering of its shape.

Circles and squares have rounded neighbours (flowers, pentagons, ellipses, superellipses), the others have none.
"""
MIN_MARGIN = 0.02
"""Least lead of that overlap over the overlap with any other shape."""
MAX_RESIDUAL = 70.0
"""Largest distance in RGB of a pixel from the line to its colour."""
MIN_CONTRAST = 90.0
"""Least distance in RGB from the ground of an object's pixel of another colour."""
UNKNOWN = "unknown"

CANVAS = 28
"""Side of the square in which coverage and renderings are compared, in pixels."""
SIDES = np.arange(8.0, 24.5, 0.5)
"""Sizes of the renderings in pixels."""
SIZE_WINDOW = 3
"""Renderings are tried up to so many steps of SIDES from an object's own size."""
OFFSETS = np.arange(-0.5, 0.75, 0.25)
"""Offsets of the renderings from the centre of an object's box in pixels."""

_DIRECTIONS = np.array(list(COLORS.values()), np.float32) - np.array(BACKGROUND, np.float32)
_OTHER = len(COLORS)


def color_amounts(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Explain the pixels of a (H, W, 3) uint8 image.

    Returns:
        labels (H, W): the index of a pixel's colour in COLORS, len(COLORS) for a colour outside the palette, -1 for the
        ground; amounts (H, W, C) in 0..1: the share of each colour in a pixel, 0 where that colour does not explain it.
    """
    pixel = image.astype(np.float32) - np.array(BACKGROUND, np.float32)
    projection = pixel @ _DIRECTIONS.T
    squared = (_DIRECTIONS**2).sum(1)
    amounts = np.clip(projection / squared, 0, 1)
    contrast = (pixel**2).sum(-1)
    # |p - a d|^2 expanded, so that no (H, W, C, 3) array is made
    residual = contrast[..., None] - 2 * amounts * projection + amounts**2 * squared
    explained = residual < MAX_RESIDUAL**2
    best = residual.argmin(-1)
    pick = best[..., None]
    named = np.take_along_axis(explained, pick, -1)[..., 0]
    inside = np.take_along_axis(amounts, pick, -1)[..., 0] > 0.5
    labels = np.where(named & inside, best, -1)
    labels = np.where(~named & (contrast > MIN_CONTRAST**2), _OTHER, labels)
    return labels, np.where(explained, amounts, 0)


@cache
def _renderings() -> np.ndarray:
    """Return the coverages (sizes, kinds * offsets^2, CANVAS^2) of all shapes, float32."""
    axis = np.arange(CANVAS, dtype=np.float32) + 0.5 - CANVAS / 2
    bank = [
        np.clip(0.5 - signed_distance(kind, axis[None] - dx, axis[:, None] - dy, side), 0, 1)
        for side in SIDES
        for kind in KINDS
        for dy in OFFSETS
        for dx in OFFSETS
    ]
    return np.stack(bank).astype(np.float32).reshape(len(SIDES), -1, CANVAS * CANVAS)


@cache
def _energies() -> np.ndarray:
    """Return the sum of squares of each rendering."""
    energies: np.ndarray = (_renderings() ** 2).sum(-1)
    return energies


def name_shape(coverage: np.ndarray) -> tuple[str, float]:
    """Return the name of the shape that a coverage shows, and their overlap.

    The overlap of two coverages a and b is 2 a.b / (a.a + b.b). Too large, too small or long objects are unknown.
    """
    rows, columns = (np.flatnonzero((coverage > 0.5).any(axis)) for axis in (1, 0))
    if not len(rows):
        return UNKNOWN, 0.0
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = bottom - top, right - left
    side = max(height, width)
    if not 0.6 < height / width < 1.5 or not SIDES[0] - 1 <= side <= SIDES[-1] + 1:
        return UNKNOWN, 0.0
    padded = np.pad(coverage, CANVAS)
    y, x = ((a + b + 1) // 2 + CANVAS - CANVAS // 2 for a, b in ((top, bottom), (left, right)))
    window = padded[y : y + CANVAS, x : x + CANVAS].astype(np.float32).ravel()
    near = np.abs(SIDES - side).argmin()
    sizes = slice(max(0, near - SIZE_WINDOW), near + SIZE_WINDOW + 1)
    overlap = 2 * (_renderings()[sizes] @ window) / (_energies()[sizes] + window @ window)
    by_kind = overlap.reshape(overlap.shape[0], len(KINDS), -1).max((0, 2))
    second, best = np.argsort(by_kind)[-2:]
    whole = by_kind[best] >= MIN_OVERLAP[KINDS[best]]
    sure = whole and by_kind[best] - by_kind[second] >= MIN_MARGIN
    return (KINDS[best] if sure else UNKNOWN), float(by_kind[best])


def _coverage(
    component: np.ndarray, color: int, labels: np.ndarray, amounts: np.ndarray, image: np.ndarray
) -> np.ndarray:
    """Return the soft coverage (H, W) of a component and its edge."""
    near = ndimage.binary_dilation(component, iterations=2)
    if color == _OTHER:
        pixel = image.astype(np.float32) - np.array(BACKGROUND, np.float32)
        own = np.median(pixel[component], axis=0)
        amount = np.clip(pixel @ own / (own @ own), 0, 1)
        near &= np.square(pixel - amount[..., None] * own).sum(-1) < MAX_RESIDUAL**2
    else:
        amount = amounts[..., color]
        near &= component | (labels == -1)
    full = max(0.5, float(np.quantile(amount[component], 0.75)))
    return np.where(near, np.minimum(amount / full, 1), 0)


def detect(image: np.ndarray) -> list[Detection]:
    """Return all objects of a (H, W, 3) uint8 image, boxes in its pixels.

    An object of no known shape is named "unknown"; a colour outside the palette is "unknown", too.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected a (H, W, 3) uint8 image, got {image.shape} {image.dtype}")
    height, width = image.shape[:2]
    if (height, width) != (IMAGE_SIZE, IMAGE_SIZE):
        small = Image.fromarray(image).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
        image = np.asarray(small)
    scale = np.array([width, height, width, height]) / IMAGE_SIZE
    labels, amounts = color_amounts(image)
    detections = []
    for index, color in enumerate((*COLORS, UNKNOWN)):
        mask = labels == index
        if mask.sum() < MIN_AREA:
            continue
        numbered, _ = ndimage.label(mask)
        for number, (rows, columns) in enumerate(ndimage.find_objects(numbered), 1):
            edge = slice(max(0, rows.start - 3), rows.stop + 3)
            side = slice(max(0, columns.start - 3), columns.stop + 3)
            component = numbered[edge, side] == number
            if component.sum() < MIN_AREA:
                continue
            window = (labels[edge, side], amounts[edge, side], image[edge, side])
            kind, overlap = name_shape(_coverage(component, index, *window))
            edges = np.array([columns.start, rows.start, columns.stop, rows.stop]) * scale
            x1, y1, x2, y2 = map(float, edges)
            detections.append(
                Detection(name=kind, box=(x1, y1, x2, y2), score=overlap, color=color)
            )
    return detections


def verify(image: np.ndarray, metadata: Mapping[str, Any]) -> Verdict:
    """Judge one (H, W, 3) uint8 image against one prompt's metadata."""
    return judge(detect(image), metadata)
