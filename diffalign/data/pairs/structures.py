"""What an image shows, or a prompt asks for, as objects, attributes, relations and scores.

The schema of compositional preference data: one mapping for GenEval's metadata, for what a detector or the Shapes
verifier found, and for scene graphs (items and relations, as LAION-SG has them). (Inversion-DPO's own set of 11,140
images with structural annotations is not published, nor is its format.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from diffalign.core.errors import UserError
from diffalign.geneval.rules import Detection, relative_position


class StructureError(UserError, ValueError):
    """An annotation that is no structure; the message says where."""


@dataclass(frozen=True)
class StructuredObject:
    """`count` objects of one kind (more than one only in what a prompt asks for); `box` (x1, y1, x2, y2) in pixels
    where it was seen."""

    name: str
    attributes: tuple[str, ...] = ()
    count: int = 1
    box: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Relation:
    """`subject` stands in relation `predicate` to `object`, both numbers in the list of objects."""

    subject: int
    predicate: str
    object: int


@dataclass(frozen=True)
class Structure:
    """Objects, what holds between them, and named scores of the image."""

    objects: tuple[StructuredObject, ...]
    relations: tuple[Relation, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, relation in enumerate(self.relations):
            for end in (relation.subject, relation.object):
                if end not in range(len(self.objects)):
                    raise StructureError(
                        f"relation {number} names object {end}, which is not there"
                    )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and mappings, for JSON."""
        found = asdict(self)
        return {**found, "objects": list(found["objects"]), "relations": list(found["relations"])}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Structure:
        """The inverse of `to_dict`; StructureError where something is missing."""
        try:
            objects = tuple(
                StructuredObject(
                    str(o["name"]),
                    tuple(o.get("attributes", ())),
                    int(o.get("count", 1)),
                    None if o.get("box") is None else tuple(o["box"]),
                )
                for o in raw["objects"]
            )
            relations = tuple(
                Relation(int(r["subject"]), str(r["predicate"]), int(r["object"]))
                for r in raw.get("relations", ())
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StructureError(f"no structure: {error!r} in {raw!r}") from error
        return cls(objects, relations, dict(raw.get("scores", {})))


def of_prompt(metadata: Mapping[str, Any]) -> Structure:
    """What a prompt of GenEval's asks for."""
    clauses = metadata["include"]
    objects = tuple(
        StructuredObject(c["class"], (c["color"],) if "color" in c else (), c["count"])
        for c in clauses
    )
    relations = tuple(
        Relation(i, c["position"][0], c["position"][1])
        for i, c in enumerate(clauses)
        if "position" in c
    )
    return Structure(objects, relations)


def of_image(detections: Sequence[Detection], scores: Mapping[str, float]) -> Structure:
    """What was found in an image, with every relation of GenEval's that holds between two of its objects."""
    objects = tuple(
        StructuredObject(d.name, (d.color,) if d.color else (), 1, tuple(d.box)) for d in detections
    )
    relations = tuple(
        Relation(i, predicate, j)
        for i, a in enumerate(detections)
        for j, b in enumerate(detections)
        if i != j
        for predicate in sorted(relative_position(a.box, b.box))
    )
    return Structure(objects, relations, scores)


def of_scene_graph(graph: Mapping[str, Any]) -> Structure:
    """Of `items` (item_id, label, attributes) and `relations` (item1, relation, item2) between their ids."""
    try:
        items = graph["items"]
        number = {item["item_id"]: i for i, item in enumerate(items)}
        objects = tuple(
            StructuredObject(str(item["label"]), tuple(item.get("attributes", ())))
            for item in items
        )
        relations = tuple(
            Relation(number[r["item1"]], str(r["relation"]), number[r["item2"]])
            for r in graph.get("relations", ())
        )
    except (KeyError, TypeError) as error:
        raise StructureError(f"no scene graph: {error!r}") from error
    return Structure(objects, relations)


def satisfied(wanted: Structure, seen: Structure) -> dict[str, float]:
    """Shares of what is wanted that an image shows, part by part: `objects` (enough of each kind), `attributes` (on as
    many) and `relations` (between some two of the right kinds); a part that is not asked for is left out."""
    kinds = [
        [o for o in seen.objects if o.name == w.name and set(w.attributes) <= set(o.attributes)]
        for w in wanted.objects
    ]
    named = [[o for o in seen.objects if o.name == w.name] for w in wanted.objects]
    found = {
        "objects": _share(len(n) >= w.count for n, w in zip(named, wanted.objects, strict=True))
    }
    asked = [i for i, w in enumerate(wanted.objects) if w.attributes]
    if asked:
        found["attributes"] = _share(len(kinds[i]) >= wanted.objects[i].count for i in asked)
    if wanted.relations:
        there = {
            (seen.objects[r.subject], r.predicate, seen.objects[r.object]) for r in seen.relations
        }
        found["relations"] = _share(
            any((a, r.predicate, b) in there for a in kinds[r.subject] for b in kinds[r.object])
            for r in wanted.relations
        )
    return found


def _share(values: Any) -> float:
    held = [bool(v) for v in values]
    return sum(held) / len(held) if held else 1.0
