"""Compositional annotations: prompts, images and scene graphs in one schema."""

import json

import numpy as np
import pytest

from diffalign.data.pairs.structures import (
    Relation,
    Structure,
    StructuredObject,
    StructureError,
    of_image,
    of_prompt,
    of_scene_graph,
    satisfied,
)
from diffalign.shapes.prompts import prompts
from diffalign.shapes.verifier import detect, verify
from diffalign.shapes.world import render, sample_scene

POSITION = {
    "tag": "position",
    "include": [
        {"class": "circle", "count": 1},
        {"class": "star", "count": 1, "color": "red", "position": ["left of", 0]},
    ],
}


def test_a_prompt_s_metadata():
    found = of_prompt(POSITION)
    assert found.objects == (StructuredObject("circle"), StructuredObject("star", ("red",)))
    assert found.relations == (Relation(1, "left of", 0),)


def test_through_json_and_back():
    wanted = Structure(
        (StructuredObject("a", ("red",), 2), StructuredObject("b", (), 1, (0.0, 1.0, 2.0, 3.0))),
        (Relation(0, "above", 1),),
        {"verifier": 0.5},
    )
    assert Structure.from_dict(json.loads(json.dumps(wanted.to_dict()))) == wanted


def test_a_scene_graph():
    graph = {
        "items": [
            {"item_id": 7, "label": "dog", "attributes": ["brown"]},
            {"item_id": 3, "label": "sofa"},
        ],
        "relations": [{"item1": 7, "relation": "on", "item2": 3}],
    }
    found = of_scene_graph(graph)
    assert found.objects[0] == StructuredObject("dog", ("brown",))
    assert found.relations == (Relation(0, "on", 1),)


@pytest.mark.parametrize("entry", prompts("train")[::23], ids=lambda e: e["prompt"])
def test_rendered_images_show_what_was_asked_for(entry):
    """And the shares agree with GenEval's verdict."""
    image = render(sample_scene(entry, np.random.default_rng(0)))
    seen = of_image(detect(image), {})
    assert set(satisfied(of_prompt(entry), seen).values()) == {1.0}
    assert verify(image, entry).correct


def test_shares_of_what_is_missing():
    seen = Structure(
        (StructuredObject("circle"), StructuredObject("star", ("blue",))),
        (Relation(1, "left of", 0),),
    )
    found = satisfied(of_prompt(POSITION), seen)
    assert found == {"objects": 1.0, "attributes": 0.0, "relations": 0.0}
    assert satisfied(Structure((StructuredObject("ring"),)), seen) == {"objects": 0.0}


@pytest.mark.parametrize(
    "raw", [{}, {"objects": [{}]}, {"objects": 3}, {"objects": [], "relations": [{"subject": 0}]}]
)
def test_what_is_no_structure(raw):
    with pytest.raises(StructureError):
        Structure.from_dict(raw)


def test_relations_between_objects_that_are_not_there():
    with pytest.raises(StructureError, match="relation 0 names object 2"):
        Structure((StructuredObject("a"),), (Relation(0, "on", 2),))
    with pytest.raises(StructureError, match="no scene graph"):
        of_scene_graph({"items": [], "relations": [{"item1": 1, "relation": "on", "item2": 2}]})
