"""What a policy knows of relations: told from rendered scenes, where it is known."""

import numpy as np
import pytest

from diffalign.data.prompts import load_prompts
from diffalign.scripts.shapes.relations import colours, positions
from diffalign.shapes.verifier import detect
from diffalign.shapes.world import GRID, SceneObject, render, sample_scene

HELD_OUT = load_prompts("shapes:held_out")
POSITION = [p for p in HELD_OUT if p.task == "position"]
COLOR_ATTR = [p for p in HELD_OUT if p.task == "color_attr"]


def right(prompts):
    rng = np.random.default_rng(0)
    return [render(sample_scene(p.metadata, rng)) for p in prompts]


def by_chance(prompt, rng):
    """Both objects, in two cells drawn by chance."""
    cells = rng.permutation(len(GRID) ** 2)[:2]
    return render(
        tuple(
            SceneObject(c["class"], "red", GRID[cell % 3], GRID[cell // 3], 14.0)
            for c, cell in zip(prompt.metadata["include"], cells, strict=True)
        )
    )


def test_who_knows_the_relation_is_always_right():
    prompts = POSITION * 3
    found = positions(right(prompts), prompts, detect)
    assert found["both objects"] == {"share": 1.0, "error": 0.0, "images": 60}
    assert found["then as prompted"]["share"] == 1.0
    # one relation, or two where the offset is a diagonal
    assert 0.25 <= found["then by chance"]["share"] < 0.4


def test_who_does_not_is_right_by_chance():
    rng = np.random.default_rng(1)
    prompts = POSITION * 30
    found = positions([by_chance(p, rng) for p in prompts], prompts, detect)
    assert found["both objects"]["share"] == 1.0
    asked, chance = found["then as prompted"], found["then by chance"]
    # drawn by chance, a prompt's images are as independent as any
    assert asked["error"] == pytest.approx(
        (asked["share"] * (1 - asked["share"]) / 600) ** 0.5, rel=0.4
    )
    assert abs(asked["share"] - chance["share"]) < 4 * asked["error"]


def test_images_of_one_prompt_are_one_piece_of_evidence():
    prompts = POSITION[:4]
    images = right(prompts)
    wrong = render((SceneObject("circle", "red", GRID[0], GRID[0], 14.0),))
    pictures = [images[0], images[1], wrong, wrong]
    once = positions(pictures, prompts, detect)["both objects"]
    often = positions(pictures * 25, prompts * 25, detect)["both objects"]
    assert once["share"] == often["share"] == 0.5
    assert once["error"] == often["error"] == 0.25


def test_a_missing_object_is_no_wrong_relation():
    prompt = POSITION[0]
    alone = SceneObject(prompt.metadata["include"][0]["class"], "red", GRID[0], GRID[0], 14.0)
    found = positions([render((alone,))], [prompt], detect)
    assert found["both objects"]["share"] == 0.0
    assert found["then as prompted"] == {"share": None, "error": None, "images": 0}


def test_colours_are_right_swapped_or_missing():
    images = right(COLOR_ATTR)
    found = colours(images, COLOR_ATTR, detect)
    assert found["both objects and colours"]["share"] == found["then as prompted"]["share"] == 1.0

    def drawn(prompt, shades):
        return render(
            tuple(
                SceneObject(c["class"], shade, x, GRID[1], 14.0)
                for c, shade, x in zip(
                    prompt.metadata["include"], shades, (GRID[0], GRID[2]), strict=True
                )
            )
        )

    first, second = (c["color"] for c in COLOR_ATTR[0].metadata["include"])
    swapped, same = drawn(COLOR_ATTR[0], (second, first)), drawn(COLOR_ATTR[0], (first, first))
    found = colours([images[0], swapped, same], [COLOR_ATTR[0]] * 3, detect)
    assert found["both objects and colours"] == {"share": 0.6667, "error": None, "images": 3}
    assert found["then as prompted"]["share"] == 0.5
