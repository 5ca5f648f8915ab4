"""Interface of judges: questions about images, and replies that may be unknown.

A judge does not know what a benchmark does with its replies. A reply that was not given has bounds, never a score.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from diffalign.core.errors import UserError
from diffalign.core.fingerprint import of_json

Kind = Literal["words", "text", "objects", "reward", "features"]
"""Kind of reply: probabilities of first words, a text, detections, a number, or a vector."""


class JudgeError(UserError, RuntimeError):
    """Judge that cannot be asked, or that is not the one that was named."""


@dataclass(frozen=True)
class Question:
    """Question about one image, or about two.

    Attributes:
        key: name of the question within its prompt.
        text: text that the judge reads; images stand where it says <image>, else before it.
        kind: kind of reply.
        words: groups of surface forms whose probability as the first word is asked for.
        max_tokens: largest number of tokens of a reply.
        space_token: add the probability of a bare space token to forms that begin with a space before a digit, as
            GenEval 2's release does.
        system: text of the system's turn; empty for none.
        metadata: metadata of the prompt, for rewards and detectors.
    """

    key: str
    text: str
    kind: Kind = "words"
    words: tuple[tuple[str, ...], ...] = ()
    max_tokens: int = 1
    space_token: bool = False
    system: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """Return 64 hex digits of all that the judge sees besides images."""
        return of_json(
            [
                *(self.text, self.kind, self.words, self.max_tokens, self.space_token, self.system),
                dict(self.metadata) if self.kind in ("reward", "objects") else None,
            ]
        )


@dataclass(frozen=True)
class Reply:
    """Reply to one question.

    The probability of each group of words lies between `low` and `high`, which are equal where it is exact. For a
    reward they hold the number. `error` says why there is no reply.
    """

    text: str | None = None
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class JudgeCard:
    """Identity of a judge, which results record and which replies are stored under.

    Attributes:
        name: model id, or the judge's name.
        revision: commit or digest; None if it is unknown.
        kinds: kinds of question that the judge answers.
        how: way in which the judge is asked, such as "local bfloat16".
    """

    name: str
    revision: str | None
    kinds: tuple[Kind, ...]
    how: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {"name": self.name, "revision": self.revision, "how": self.how}


YES = ("Yes", "yes", " Yes", " yes")
NO = ("No", "no", " No", " no")
"""Surface forms of a first word."""
IMAGE = "<image>"
"""Mark in a question where an image stands."""
Task = tuple[Question, tuple[Image.Image, ...]]
"""Question and its images, RGB."""


class Judge(ABC):
    """Base class of judges; subclasses set `card` and implement `answer`."""

    card: JudgeCard
    at_once: int = 64
    """Number of questions that are worth sending together."""

    @abstractmethod
    def answer(self, tasks: Sequence[Task]) -> list[Reply]:
        """Return the replies to B questions, in their order.

        A question that cannot be answered has a reply with an error.

        Raises:
            JudgeError: the judge is away, so that asking further questions is of no use.
        """

    def check_kind(self, kind: Kind) -> None:
        """Raise JudgeError if the judge does not answer questions of a kind."""
        if kind not in self.card.kinds:
            raise JudgeError(
                f"judge {self.card.name} answers {', '.join(self.card.kinds)} but not {kind}; choose another `judge`"
            )


def parts_of(text: str, images: int) -> list[str | int]:
    """Return texts and numbers of images in their order.

    Images stand at their marks if there are as many of these, else before the text.
    """
    pieces = text.split(IMAGE)
    if len(pieces) != images + 1:
        return [*range(images), text]
    parts: list[str | int] = [pieces[0]]
    for number, piece in enumerate(pieces[1:]):
        parts += [number, piece]
    return [part for part in parts if part != ""]


def probability(reply: Reply | None, group: int = 0) -> tuple[float, float]:
    """Return the bounds of a group's probability; (0, 1) without a reply."""
    if reply is None or reply.error is not None or group >= len(reply.low):
        return 0.0, 1.0
    return reply.low[group], reply.high[group]


def said(reply: Reply | None) -> str:
    """Return the text of a reply, or an empty text for an error."""
    return "" if reply is None or reply.error is not None else reply.text or ""
