"""The verifier on shapes that are nearly those of the world: what a person would not call a circle is none."""

import numpy as np
import pytest

from diffalign.shapes.verifier import UNKNOWN, detect, verify
from diffalign.shapes.world import BACKGROUND, COLORS, KINDS, SceneObject, render, signed_distance

SIDE = 15.0
ORANGE = (255, 140, 0)


def picture(distance, color=COLORS["red"], *, x=32.3, y=31.8):
    """One object with this signed distance (x, y) -> pixels."""
    axis = np.arange(64) + 0.5
    cover = np.clip(0.5 - distance(axis[None] - x, axis[:, None] - y), 0, 1)[..., None]
    image = np.full((64, 64, 3), BACKGROUND, float) * (1 - cover) + np.array(color) * cover
    return np.round(image).astype(np.uint8)


def superellipse(power):
    return lambda x, y: (np.abs(x) ** power + np.abs(y) ** power) ** (1 / power) - SIDE / 2


def flower(petals, depth):
    def distance(x, y):
        radius = SIDE / 2 * (1 + depth * np.cos(petals * np.arctan2(y, x))) / (1 + depth)
        return np.hypot(x, y) - radius

    return distance


def ellipse(ratio):
    return lambda x, y: np.hypot(x, y / ratio) - SIDE / 2


def rectangle(ratio):
    return lambda x, y: np.maximum(abs(x), abs(y) / ratio) - SIDE / 2


def turned(kind, degrees):
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return lambda x, y: signed_distance(kind, x * cos + y * sin, y * cos - x * sin, SIDE)


def ring(hole):
    return lambda x, y: np.maximum(np.hypot(x, y) - SIDE / 2, hole * SIDE / 2 - np.hypot(x, y))


def cross(arm):
    half = SIDE / 2
    return lambda x, y: np.minimum(
        np.maximum(abs(x) - half, abs(y) - arm * half),
        np.maximum(abs(y) - half, abs(x) - arm * half),
    )


def polygon(corners):
    angles = 2 * np.pi * np.arange(corners) / corners + np.pi / 2
    inner = SIDE / 2 * np.cos(np.pi / corners)
    return lambda x, y: np.max([x * np.cos(a) + y * np.sin(a) for a in angles], 0) - inner


def cut(keep):
    return lambda x, y: np.maximum(np.hypot(x, y) - SIDE / 2, y - keep)


NO_SHAPE = {
    "rounded square 3": superellipse(3),
    "rounded square 4": superellipse(4),
    "diamond": superellipse(1),
    **{f"flower {k} {d}": flower(k, d) for k in (4, 5, 6) for d in (0.1, 0.15, 0.25)},
    **{f"ellipse {r}": ellipse(r) for r in (0.7, 0.75, 0.8)},
    **{f"rectangle {r}": rectangle(r) for r in (0.7, 0.75, 0.8)},
    **{f"square turned {d}": turned("square", d) for d in (10, 20, 30, 45)},
    **{f"triangle turned {d}": turned("triangle", d) for d in (15, 45, 90, 180)},
    **{f"cross turned {d}": turned("cross", d) for d in (15, 30, 45)},
    "pentagon": polygon(5),
    "thin ring": ring(0.75),
    "disc with a hole": ring(0.3),
    "thin cross": cross(0.2),
    "thick cross": cross(0.55),
    "half circle": cut(0.0),
    "cut circle": cut(SIDE / 4),
}


@pytest.mark.parametrize("name", NO_SHAPE)
@pytest.mark.parametrize("place", [(32.3, 31.8), (20.0, 40.5), (50.25, 12.75)])
def test_nearly_a_shape_is_unknown(name, place):
    x, y = place
    assert [d.name for d in detect(picture(NO_SHAPE[name], x=x, y=y))] == [UNKNOWN]


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_is_named_at_every_place_and_size(kind):
    rng = np.random.default_rng(0)
    for size in np.arange(10, 20, 0.5):
        x, y = rng.uniform(14, 50, 2)
        scene = (SceneObject(kind, "blue", x, y, size),)
        assert [d.name for d in detect(render(scene))] == [kind], (size, x, y)


def test_a_circle_in_the_centre_of_the_image_is_a_circle():
    (detection,) = detect(render((SceneObject("circle", "red", 32, 32, 15),)))
    assert (detection.name, detection.color) == ("circle", "red")


@pytest.mark.parametrize("kind", KINDS)
def test_an_orange_object_is_an_object_of_unknown_colour(kind):
    image = picture(lambda x, y: signed_distance(kind, x, y, SIDE), ORANGE)
    (detection,) = detect(image)
    assert (detection.name, detection.color) == (kind, UNKNOWN)


def test_an_orange_object_counts():
    two = {
        "tag": "counting",
        "include": [{"class": "circle", "count": 2}],
        "exclude": [{"class": "circle", "count": 3}],
    }
    image = render(
        (SceneObject("circle", "red", 12, 12, 14), SceneObject("circle", "blue", 52, 12, 14))
    )
    assert verify(image, two).correct
    third = picture(lambda x, y: np.hypot(x, y) - 7, ORANGE)
    marked = np.where((third != np.array(BACKGROUND)).any(-1, keepdims=True), third, image)
    assert not verify(marked.astype(np.uint8), two).correct


def test_faint_and_soft_objects_are_read_as_trained_models_draw_them():
    rng = np.random.default_rng(1)
    for kind in KINDS:
        image = render((SceneObject(kind, "green", 30.6, 33.2, 14),)).astype(float)
        image = 0.9 * image + 0.1 * np.array(BACKGROUND) + rng.normal(0, 3, image.shape)
        (detection,) = detect(image.clip(0, 255).astype(np.uint8))
        assert (detection.name, detection.color) == (kind, "green")
