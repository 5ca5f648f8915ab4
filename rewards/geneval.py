"""GenEval (Ghosh et al. 2023) as a reward.

Mask2Former detects objects, CLIP classifies their colours, and GenEval's rules judge them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffalign.geneval.rules import CLASSES, COLORS, THRESHOLD, Detection, confident
from diffalign.rewards.base import Metadata, RewardCard
from diffalign.rewards.clip import ClipScorer
from diffalign.rewards.detection import DetectionReward
from diffalign.rewards.mask2former import Instances, ObjectDetector
from diffalign.rewards.weights import CLIP_L, REVISIONS

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
GROUND = 0x99
"""Grey value that replaces pixels outside an object's mask."""
TEXTS = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)


class GenEvalReward(DetectionReward):
    """Continuous score of Flow-GRPO, with partial credit.

    The details hold the score and the verdicts `correct` (official) and `strict` (exact numbers).
    """

    card = RewardCard(
        name="geneval",
        description="continuous GenEval score by Mask2Former and CLIP; 1 is all right",
        model_id=DETECTOR,
        auxiliary={CLIP_L: REVISIONS[CLIP_L]},
        input_size=800,
        raw_range=(-3.0, 1.0),
        license="MIT (GenEval, CLIP); the detector's card says other",
    )
    classes = CLASSES
    colors = COLORS

    def __init__(
        self, detector: ObjectDetector | None = None, clip: ClipScorer | None = None
    ) -> None:
        self._detector, self._clip = detector, clip

    def prepare(self) -> None:
        if self._detector is None:
            self._detector = ObjectDetector.from_pretrained(DETECTOR)
            self.declare(revision=self._detector.revision)
        self._clip = self._clip or ClipScorer.from_pretrained(
            CLIP_L,
            # the same arguments as in other rewards on this model, so that they share it
            revision=REVISIONS[CLIP_L],
        )

    def detect(self, images: Tensor, metadata: Sequence[Metadata]) -> list[list[Detection]]:
        self.prepare()
        assert self._detector is not None
        everything = self._detector(images, threshold=THRESHOLD)
        objects: list[list[Detection]] = []
        coloured: list[tuple[int, int, Tensor]] = []  # image, object, crop
        for image, instances, entry in zip(images, everything, metadata, strict=True):
            clauses = [*entry.get("include", ()), *entry.get("exclude", ())]
            in_color = {c["class"] for c in clauses if "color" in c}
            rows = _asked_for(instances, {c["class"] for c in clauses})
            coloured += [
                (len(objects), i, crop(image, instances.masks[row], d.box))
                for i, (row, d) in enumerate(rows)
                if d.name in in_color
            ]
            objects.append([d for _, d in rows])
        names = [objects[n][i].name for n, i, _ in coloured]
        shades = self._colors([c for _, _, c in coloured], names)
        for (n, i, _), color in zip(coloured, shades, strict=True):
            objects[n][i] = replace(objects[n][i], color=color)
        return [confident(o, e) for o, e in zip(objects, metadata, strict=True)]

    def _colors(self, crops: Sequence[Tensor], names: Sequence[str]) -> list[str]:
        """Return the colour of each crop that CLIP ranks highest."""
        if not crops:
            return []
        assert self._clip is not None
        nearest = []
        for features, name in zip(self._clip.crop_features(crops), names, strict=True):
            texts = [t.format(color=c, name=name) for t in TEXTS for c in COLORS]
            means = self._clip.text_features(texts).view(len(TEXTS), len(COLORS), -1).mean(0)
            means = means / means.norm(dim=-1, keepdim=True)
            nearest.append(COLORS[int((means @ features).argmax())])
        return nearest


class GenEvalCompatReward(GenEvalReward):
    """GenEval reward with the position bug of Flow-GRPO's and AWM's releases.

    Its scores are comparable with those of the releases.
    """

    card = replace(
        GenEvalReward.card,
        name="geneval_compat",
        description="geneval as released: a wrong position counts as half right",
    )
    compat = True


def crop(image: Tensor, mask: Tensor, box: Sequence[float]) -> Tensor:
    """Crop an image to a box (3, h, w), grey outside the mask.

    Args:
        image: (3, H, W) uint8.
        mask: (H, W) bool.
    """
    x1, y1, x2, y2 = (round(v) for v in box)
    alone = image.where(mask.to(image.device), torch.full_like(image, GROUND))
    return alone[:, y1:y2, x1:x2]


def _asked_for(instances: Instances, names: set[str]) -> list[tuple[int, Detection]]:
    """Return the objects of these classes and their rows."""
    rows = zip(
        instances.labels.tolist(), instances.boxes.tolist(), instances.scores.tolist(), strict=True
    )
    return [
        (row, Detection(CLASSES[label], tuple(box), score))
        for row, (label, box, score) in enumerate(rows)
        if CLASSES[label] in names
    ]
