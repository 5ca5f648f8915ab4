"""Base of rewards that ask a judge: a question for each image, or for each pair, and a way to read its reply.

The judge is that of DIFFALIGN_JUDGE (URL#MODEL, a folder or a hub id), else of DIFFALIGN_JUDGE_URL and
DIFFALIGN_JUDGE_MODEL, else the reward's own model. A question without a reply is NaN, never 0.
"""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from diffalign.judges.base import Judge, JudgeError, Question, Reply, Task
from diffalign.judges.opening import open_judge
from diffalign.rewards.base import Metadata, Reward, RewardError
from diffalign.types import RewardOutput

logger = logging.getLogger(__name__)
JUDGE, URL, MODEL = "DIFFALIGN_JUDGE", "DIFFALIGN_JUDGE_URL", "DIFFALIGN_JUDGE_MODEL"


def template(name: str) -> str:
    """Return the question of a file beside this one."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def fill(text: str, prompt: str) -> str:
    """Return a question with the prompt in its place, whatever braces either has."""
    return text.replace("{prompt}", prompt)


def pictures(images: Tensor) -> list[Image.Image]:
    """Return images (B, 3, H, W) uint8 as pictures."""
    return [Image.fromarray(x) for x in images.permute(0, 2, 3, 1).cpu().numpy()]


def named_judge(default: str | None) -> str:
    """Return the name of the judge that the environment names, else the default.

    Raises:
        RewardError: neither names one.
    """
    if os.environ.get(JUDGE):
        return os.environ[JUDGE]
    if os.environ.get(URL) and os.environ.get(MODEL):
        return f"{os.environ[URL]}#{os.environ[MODEL]}"
    if default is None:
        raise RewardError(
            f"this reward needs a judge. Set {JUDGE} to URL#MODEL, a folder or a hub id"
        )
    return default


class Asking(Reward):
    """Base class of rewards that open their judge once, and ask it.

    Args:
        judge: judge to ask; None opens that of the environment.
    """

    needs_prompt = True
    default: str | None = None
    """Judge of a reward that has its own model."""

    def __init__(self, judge: Judge | None = None) -> None:
        self._judge = judge

    def prepare(self) -> None:
        """Open the judge."""
        card = self.opened().card
        self.declare(model_id=card.name, revision=card.revision)

    def opened(self) -> Judge:
        """Return the judge.

        Raises:
            RewardError: the judge cannot be opened.
        """
        if self._judge is None:
            try:
                self._judge = open_judge(named_judge(self.default))
            except JudgeError as error:
                raise RewardError(str(error)) from error
        return self._judge

    def replies(self, tasks: Sequence[Task]) -> list[Reply]:
        """Return the replies to B questions; a judge that is away answers none of them."""
        judge = self.opened()
        try:
            replies = judge.answer(tasks)
        except JudgeError as error:
            logger.warning("%s", error)
            return [Reply(error=str(error))] * len(tasks)
        for reply in replies:
            if reply.error is not None:
                logger.warning("%s: %s", judge.card.name, reply.error)
        return replies


class JudgedReward(Asking):
    """Reward that asks a judge one question about each image.

    Subclasses say which question, and read the reply.
    """

    @abstractmethod
    def question(self, prompt: str) -> Question:
        """Return the question about an image of a prompt."""

    @abstractmethod
    def read(self, reply: Reply) -> float:
        """Return the raw score of a reply, or NaN."""

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardOutput:
        """Return the raw scores (B,), NaN without a reply."""
        self.prepare()
        shown = pictures(images)
        tasks = [(self.question(p), (i,)) for p, i in zip(prompts, shown, strict=True)]
        values = [
            float("nan") if reply.error is not None else self.read(reply)
            for reply in self.replies(tasks)
        ]
        return RewardOutput(np.array(values, np.float32))
