"""Base class of rewards that detect objects and then apply GenEval's rules."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from torch import Tensor

from diffalign.geneval.rules import RELATIONS, Detection, Verdict, judge
from diffalign.rewards.base import Metadata, Reward, RewardError
from diffalign.types import RewardOutput


class DetectionReward(Reward):
    """Reward that applies GenEval's rules to detected objects.

    It needs GenEval metadata (`include`). Subclasses name the classes that they know, and detect objects.
    """

    required_metadata = ("include",)
    classes: ClassVar[Sequence[str]]
    colors: ClassVar[Sequence[str]]
    compat: ClassVar[bool] = False
    """True for the continuous score with the position bug of its release."""

    @abstractmethod
    def detect(self, images: Tensor, metadata: Sequence[Metadata]) -> list[list[Detection]]:
        """Return the relevant objects of each image, the best first.

        Objects have a colour if the prompt names a colour for their class.

        Args:
            images: (B, 3, H, W) uint8.
        """

    def value(self, verdict: Verdict) -> float:
        """Return the raw score of a verdict."""
        return verdict.score

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardOutput:
        detections = self.detect(images, metadata)
        verdicts = [
            judge(objects, entry, compat=self.compat)
            for objects, entry in zip(detections, metadata, strict=True)
        ]
        return RewardOutput(
            np.array([self.value(v) for v in verdicts], np.float32),
            details={
                name: np.array([getattr(v, name) for v in verdicts], np.float32)
                for name in ("score", "correct", "strict")
            },
        )

    def check_metadata(self, metadata: Sequence[Metadata]) -> None:
        super().check_metadata(metadata)
        for row, entry in enumerate(metadata):
            problem = self._problem(entry)
            if problem:
                raise RewardError(
                    f"reward {self.card.name!r} cannot judge prompt {row + 1} ({entry.get('prompt', '')!r}): {problem}"
                )

    def _problem(self, entry: Metadata) -> str | None:
        """Return the reason why the reward cannot judge a prompt, or None."""
        include, exclude = entry["include"], entry.get("exclude", [])
        if not isinstance(include, list) or not include:
            return "`include` must be a list of at least one object"
        if not isinstance(exclude, list):
            return "`exclude` must be a list of objects"
        for number, clause in enumerate([*include, *exclude]):
            if not isinstance(clause, Mapping) or clause.get("class") not in self.classes:
                return f"every object needs a class among {', '.join(self.classes)}, got {clause}"
            count = clause.get("count")
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                return f"every object needs a count of at least 1, got {clause}"
            if "color" in clause and clause["color"] not in self.colors:
                return f"colours are {', '.join(self.colors)}, got {clause['color']!r}"
            if "position" in clause and not _valid_position(clause["position"], number):
                return f"a position is one of {', '.join(RELATIONS)} and the index of an earlier object, got {clause}"
        return None


def _valid_position(position: object, number: int) -> bool:
    return (
        isinstance(position, list | tuple)
        and len(position) == 2
        and position[0] in RELATIONS
        and position[1] in range(number)
    )


DETECTORS = ("verifier", "geneval")


def choose_detector(name: str | None, metadata: Sequence[Metadata]) -> DetectionReward:
    """Load the named detector, or the first one that knows every class of the prompts.

    Raises:
        RewardError: no detector can judge the prompts.
    """
    from diffalign.rewards.registry import create

    problems = []
    for choice in (name,) if name else DETECTORS:
        detector = create(choice)
        assert isinstance(detector, DetectionReward)
        try:
            detector.check_metadata(metadata)
        except RewardError as error:
            problems.append(str(error))
            continue
        detector.prepare()
        return detector
    raise RewardError("; ".join(problems))
