"""Structure of an image or a prompt: objects, attributes, relations and scores.

This is the schema of compositional preference data. It represents GenEval's metadata, detections of a detector or of
the Shapes verifier, and scene graphs (items and relations, as in LAION-SG). Neither Inversion-DPO's own set of 11,140
images with structural annotations nor its format is published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from diffalign.core.errors import UserError
from diffalign.geneval.rules import Detection, relative_position


class StructureError(UserError, ValueError):
    """Annotation that is no valid structure; the message names the fault."""


@dataclass(frozen=True)
class StructuredObject:
    """Object of an image, or objects of one kind that a prompt requires.

    Attributes:
        name: kind of the object.
        attributes: attributes such as a colour.
        count: number of objects; more than one only for prompts.
        box: (x1, y1, x2, y2) in pixels, of a detected object.
    """

    name: str
    attributes: tuple[str, ...] = ()
    count: int = 1
    box: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Relation:
    """Relation between two objects, which are given by their numbers in the list of objects."""

    subject: int
    predicate: str
    object: int


@dataclass(frozen=True)
class Structure:
    """Objects, relations between them, and named scores of the image."""

    objects: tuple[StructuredObject, ...]
    relations: tuple[Relation, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, relation in enumerate(self.relations):
            for end in (relation.subject, relation.object):
                if end not in range(len(self.objects)):
                    raise StructureError(
                        f"relation {number} names object {end}, which is not there. Correct its number"
                    )

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and mappings, for JSON."""
        entries = asdict(self)
        lists = {name: list(entries[name]) for name in ("objects", "relations")}
        return {**entries, **lists}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Structure:
        """Build a structure from the result of `to_dict`.

        Raises:
            StructureError: a key is missing, or a value has the wrong type.
        """
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
    """Return the structure that a GenEval prompt requires."""
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
    """Return the structure of an image's detections.

    It has every relation of GenEval that holds between two of the objects.
    """
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
    """Return the structure of a scene graph.

    Args:
        graph: `items` with item_id, label and attributes, and `relations` with item1, relation and item2, where item1
            and item2 are ids of items.

    Raises:
        StructureError: the graph lacks a key, or a relation names an unknown item.
    """
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


def satisfied(required: Structure, seen: Structure) -> dict[str, float]:
    """Return the shares of a required structure that an image fulfils.

    Returns:
        `objects`, the share of kinds with enough objects; `attributes`, the share of kinds with enough objects that
        have the attributes; `relations`, the share of relations between any two objects of the right kinds. The last
        two are left out if nothing of the kind is required.
    """
    kinds = [
        [o for o in seen.objects if o.name == w.name and set(w.attributes) <= set(o.attributes)]
        for w in required.objects
    ]
    named = [[o for o in seen.objects if o.name == w.name] for w in required.objects]
    shares = {
        "objects": _share(len(n) >= w.count for n, w in zip(named, required.objects, strict=True))
    }
    attributed = [i for i, w in enumerate(required.objects) if w.attributes]
    if attributed:
        shares["attributes"] = _share(
            len(kinds[i]) >= required.objects[i].count for i in attributed
        )
    if required.relations:
        triples = {
            (seen.objects[r.subject], r.predicate, seen.objects[r.object]) for r in seen.relations
        }
        shares["relations"] = _share(
            any((a, r.predicate, b) in triples for a in kinds[r.subject] for b in kinds[r.object])
            for r in required.relations
        )
    return shares


def _share(values: Any) -> float:
    held = [bool(v) for v in values]
    return sum(held) / len(held) if held else 1.0
