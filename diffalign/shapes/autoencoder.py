"""Training images of the autoencoders of Shapes (`scripts/shapes/train.py`)."""

from __future__ import annotations

import numpy as np

from diffalign.shapes.world import (
    COLORS,
    GRID,
    JITTER,
    KINDS,
    MAX_OBJECTS,
    SIZES,
    SceneObject,
    render,
)


def random_images(rng: np.random.Generator, n: int) -> np.ndarray:
    """Render images (n, 64, 64, 3) uint8 of one to four random objects."""
    images = []
    for _ in range(n):
        cells = rng.permutation(len(GRID) ** 2)[: rng.integers(1, MAX_OBJECTS + 1)]
        images.append(
            render(
                tuple(
                    SceneObject(
                        kind=str(rng.choice(KINDS)),
                        color=str(rng.choice(list(COLORS))),
                        x=GRID[cell % 3] + rng.uniform(-JITTER, JITTER),
                        y=GRID[cell // 3] + rng.uniform(-JITTER, JITTER),
                        size=float(rng.uniform(*SIZES)),
                    )
                    for cell in cells
                )
            )
        )
    return np.stack(images)
