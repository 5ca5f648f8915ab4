"""The world of Shapes: renderer against verifier, prompts, splits."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffalign.geneval.rules import TASKS, judge
from diffalign.shapes.prompts import RELATIONS, prompts, sample_prompts
from diffalign.shapes.verifier import detect, name_shape, verify
from diffalign.shapes.world import (
    COLORS,
    GRID,
    IMAGE_SIZE,
    KINDS,
    SIZES,
    SceneObject,
    detections,
    render,
    sample_scene,
)


def by_task(task):
    return [p for split in ("train", "held_out") for p in prompts(split) if p["tag"] == task]


@pytest.mark.parametrize("task", TASKS)
def test_verifier_agrees_with_the_renderer(task):
    rng = np.random.default_rng(TASKS.index(task))
    entries = by_task(task)
    right = []
    for _ in range(600):
        entry = entries[rng.integers(len(entries))]
        scene = sample_scene(entry, rng)
        image = render(scene)
        right.append(verify(image, entry).correct and len(detect(image)) == len(scene))
    assert np.mean(right) >= 0.995


def corrupt(entry, rng):
    """(scene, what): a scene that differs from the prompt in one thing that the prompt asks for."""
    scene = list(sample_scene(entry, rng))
    options = ["shape", "count"]
    if any("color" in c for c in entry["include"]):
        options.append("color")
    if entry["tag"] == "position":
        options = ["shape", "relation"]
    what = str(rng.choice(options))
    i = int(rng.integers(len(scene)))
    asked = {c["class"] for c in entry["include"]}
    if what == "shape":
        scene[i] = replace(scene[i], kind=str(rng.choice([k for k in KINDS if k not in asked])))
    elif what == "color":
        wrong = [c for c in COLORS if c != scene[i].color]
        scene[i] = replace(scene[i], color=str(rng.choice(wrong)))
    elif what == "count":
        del scene[i]
    else:
        scene = [
            replace(scene[0], x=scene[1].x, y=scene[1].y),
            replace(scene[1], x=scene[0].x, y=scene[0].y),
        ]
    return tuple(scene), what


def test_verifier_rejects_what_is_wrong():
    rng = np.random.default_rng(7)
    rejected = {}
    for _ in range(2400):
        entry = sample_prompts(rng, 1)[0]
        scene, what = corrupt(entry, rng)
        rejected.setdefault(what, []).append(not verify(render(scene), entry).correct)
    assert set(rejected) == {"shape", "count", "color", "relation"}
    assert {k: np.mean(v) >= 0.99 for k, v in rejected.items()} == dict.fromkeys(rejected, True)


def test_counting_rejects_one_too_many():
    entry = next(p for p in by_task("counting") if p["prompt"] == "a photo of two circles")
    three = tuple(SceneObject("circle", "red", x, 32, 14) for x in GRID)
    assert verify(render(three[:2]), entry).correct
    verdict = verify(render(three), entry)
    assert not verdict.correct
    assert verdict.reasons == ("expected circle<3, found 3",)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("color", COLORS)
def test_every_object_is_read_back_with_its_box(kind, color):
    for size in (*SIZES, 14.3):
        truth = SceneObject(kind, color, 31.3, 30.8, size)
        (found,) = detect(render((truth,)))
        assert (found.name, found.color) == (kind, color)
        np.testing.assert_allclose(found.box, truth.box, atol=1.01)


def test_an_empty_image_and_noise_hold_no_objects():
    assert detect(render(())) == []
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert [d for d in detect(noise) if d.name in KINDS] == []


def test_half_a_shape_is_not_that_shape():
    image = render((SceneObject("circle", "red", 32, 32, 16),))
    image[32:] = render(())[32:]
    assert [d.name for d in detect(image)] != ["circle"]
    assert name_shape(np.ones((4, 20), bool)) == ("unknown", 0.0)


def test_images_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        detect(np.zeros((64, 64, 3), np.float32))


def test_larger_images_are_read_as_well():
    rng = np.random.default_rng(0)
    entry = prompts("train")[100]
    scene = sample_scene(entry, rng)
    assert len(detect(render(scene, size=128))) == len(scene)


def test_splits_are_disjoint_complete_and_fixed():
    train, held_out = ({p["prompt"] for p in prompts(s)} for s in ("train", "held_out"))
    assert not train & held_out
    assert len(train) + len(held_out) == 750
    assert (
        {p["tag"] for p in prompts("train")}
        == {p["tag"] for p in prompts("held_out")}
        == set(TASKS)
    )
    first = [next(p["prompt"] for p in prompts("held_out") if p["tag"] == t) for t in TASKS]
    assert first == HELD_OUT_FIRST


HELD_OUT_FIRST = [
    "a photo of a ring",
    "a photo of a circle and a triangle",
    "a photo of two circles",
    "a photo of a blue circle",
    "a photo of a circle left of a square",
    "a photo of a red circle and a yellow triangle",
]


def test_prompts_have_genevals_form():
    reference = Path(__file__).parents[1] / "expected" / "geneval_examples.jsonl"
    examples = {e["tag"]: e for e in map(json.loads, reference.read_text().splitlines())}
    for entry in prompts("train"):
        example = examples[entry["tag"]]
        assert list(entry) == list(example)
        assert len(entry["include"]) == len(example["include"])
        for clause, other in zip(entry["include"], example["include"], strict=True):
            assert list(clause) == list(other)


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="Unknown split 'test'. Choose from train, held_out"):
        prompts("test")


def test_tasks_are_drawn_equally_often():
    tasks = [p["tag"] for p in sample_prompts(np.random.default_rng(0), 3000)]
    assert all(abs(tasks.count(t) / 3000 - 1 / 6) < 0.03 for t in TASKS)


def test_scenes_obey_their_prompt():
    rng = np.random.default_rng(3)
    for entry in prompts("train")[::7]:
        assert judge(detections(sample_scene(entry, rng)), entry).strict


def test_relations_of_a_scene_follow_the_picture():
    rng = np.random.default_rng(0)
    axis = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
    for entry in by_task("position"):
        target, subject = sample_scene(entry, rng)
        which, sign = axis[entry["include"][1]["position"][0]]
        offset = (subject.x - target.x, subject.y - target.y)[which]
        assert offset * sign > 0
    assert set(axis) == set(RELATIONS)


def test_a_scene_holds_at_most_four_objects():
    with pytest.raises(ValueError, match="1 to 4 objects"):
        sample_scene({"include": [{"class": "circle", "count": 5}]}, np.random.default_rng(0))


def test_renderer_is_antialiased_and_exact_in_area():
    image = render((SceneObject("circle", "black", 32, 32, 16),)).astype(float)
    ground, ink = 244.0, 25.0
    area = ((ground - image[..., 0]) / (ground - ink)).sum()
    assert area == pytest.approx(np.pi * 8**2, rel=0.01)
    assert len(np.unique(image[..., 0])) > 4  # soft edges
    assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
