"""World of Shapes: its objects, their rendering, and scenes that fit a prompt.

An image is one to four flat, anti-aliased shapes on a light ground, so that an exact verifier is possible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffalign.geneval.rules import Detection, judge

IMAGE_SIZE = 64
KINDS = ("circle", "square", "triangle", "cross", "ring")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "yellow": (245, 205, 30),
    "green": (40, 165, 70),
    "blue": (40, 90, 220),
    "purple": (150, 50, 180),
    "black": (25, 25, 30),
}
BACKGROUND = (244, 243, 238)
MAX_OBJECTS = 4

# Centres lie on a jittered 3 x 3 grid. With these values two neighbours have a gap of at least one pixel.
GRID = (12.0, 32.0, 52.0)
JITTER = 1.5
SIZES = (12.0, 16.0)


@dataclass(frozen=True)
class SceneObject:
    """One shape. Centre and size (the longer side of its bounding box) are in pixels."""

    kind: str
    color: str
    x: float
    y: float
    size: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Bounding box (x1, y1, x2, y2) in pixels."""
        half_h = self.size / 2 * (TRIANGLE_HEIGHT if self.kind == "triangle" else 1.0)
        half = self.size / 2
        return (self.x - half, self.y - half_h, self.x + half, self.y + half_h)


Scene = tuple[SceneObject, ...]
TRIANGLE_HEIGHT = 0.87
RING_HOLE = 0.5
CROSS_ARM = 0.34


def signed_distance(kind: str, x: np.ndarray, y: np.ndarray, size: float) -> np.ndarray:
    """Return the distance to a centred shape's outline in pixels, negative inside.

    The distance is exact or a close bound.
    """
    half = size / 2
    distance: np.ndarray
    if kind == "circle":
        distance = np.hypot(x, y) - half
    elif kind == "square":
        distance = np.maximum(abs(x), abs(y)) - half
    elif kind == "ring":
        hole = half * RING_HOLE
        distance = np.maximum(np.hypot(x, y) - half, hole - np.hypot(x, y))
    elif kind == "cross":
        arm = half * CROSS_ARM
        distance = np.minimum(
            np.maximum(abs(x) - half, abs(y) - arm), np.maximum(abs(y) - half, abs(x) - arm)
        )
    elif kind == "triangle":
        half_h = half * TRIANGLE_HEIGHT
        slope = np.hypot(half, 2 * half_h)
        side = (abs(x) * 2 * half_h - (y + half_h) * half) / slope
        distance = np.maximum(side, y - half_h)
    else:
        raise ValueError(f"Unknown shape {kind!r}. Choose from {', '.join(KINDS)}.")
    return distance


def render(scene: Scene, *, size: int = IMAGE_SIZE) -> np.ndarray:
    """Render a scene as (size, size, 3) uint8. Later objects cover earlier ones."""
    scale = size / IMAGE_SIZE
    axis = (np.arange(size, dtype=np.float32) + 0.5) / scale
    image: np.ndarray = np.full((size, size, 3), BACKGROUND, np.float32)
    for item in scene:
        distance = signed_distance(
            item.kind, axis[None, :] - item.x, axis[:, None] - item.y, item.size
        )
        cover = np.clip(0.5 - distance * scale, 0, 1)[..., None]
        image = image * (1 - cover) + np.array(COLORS[item.color], np.float32) * cover
    return np.round(image).astype(np.uint8)


def detections(scene: Scene) -> list[Detection]:
    """Return the objects of a scene as detections."""
    return [Detection(name=o.kind, box=o.box, color=o.color) for o in scene]


def sample_scene(metadata: Mapping[str, Any], rng: np.random.Generator) -> Scene:
    """Draw a random scene for which GenEval's rules hold.

    Colours, positions and sizes that the prompt does not state are random. The objects of one clause have the same
    colour, and the scene has only objects that the prompt names.

    Raises:
        ValueError: the prompt names too many objects.
    """
    total = sum(clause["count"] for clause in metadata["include"])
    if not 1 <= total <= MAX_OBJECTS:
        raise ValueError(f"A scene has 1 to {MAX_OBJECTS} objects; the prompt names {total}.")
    # A random layout satisfies a relation about every third time.
    while True:
        cells = iter(rng.permutation(len(GRID) ** 2)[:total])
        scene = []
        for clause in metadata["include"]:
            color = clause.get("color") or str(rng.choice(list(COLORS)))
            for _ in range(clause["count"]):
                row, column = divmod(int(next(cells)), len(GRID))
                dx, dy = rng.uniform(-JITTER, JITTER, size=2)
                size = float(rng.uniform(*SIZES))
                scene.append(
                    SceneObject(
                        kind=clause["class"],
                        color=color,
                        x=GRID[column] + dx,
                        y=GRID[row] + dy,
                        size=size,
                    )
                )
        if judge(detections(tuple(scene)), metadata).correct:
            return tuple(scene)
