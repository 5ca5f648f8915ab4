"""Append-only file of replies, and the asking of what it lacks.

Replies are stored under a digest of judge, question and image. The same question about the same image is never asked
twice, whatever happens to the process.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.core.fingerprint import of_json
from diffalign.core.interruption import Interrupted, Interruption
from diffalign.judges.base import Judge, JudgeCard, Question, Reply, Task

Progress = Callable[[int, int], None]
MISSING = "the image is missing"


@dataclass(frozen=True)
class Ask:
    """Question about one image of a folder.

    Attributes:
        path: file of the image.
        prompt: number of the prompt that the question is of.
        image: number of the image within the prompt that it was drawn for.
    """

    path: Path
    prompt: int
    image: int
    question: Question


class AnswerBook:
    """Replies of one folder, in files that are only appended to.

    Args:
        folder: folder of the files `answers-*.jsonl`.
        process: number of this process, which writes a file of its own.
    """

    def __init__(self, folder: Path, *, process: int = 0) -> None:
        self.folder = folder
        self.file = folder / f"answers-{process:05d}.jsonl"
        self.replies: dict[str, Reply] = {}
        self._hashes: dict[Path, str | None] = {}
        self.read()

    def read(self) -> None:
        """Read all files; a line that a killed process cut off is left out."""
        for file in sorted(self.folder.glob("answers-*.jsonl")):
            for line in file.read_bytes().split(b"\n"):
                try:
                    entry = json.loads(line)
                    digest, reply = entry["digest"], _reply(entry)
                except (ValueError, KeyError, TypeError):
                    continue
                # processes have files of their own: a reply is not hidden by another's earlier error
                earlier = self.replies.get(digest)
                if reply.error is None or earlier is None or earlier.error is not None:
                    self.replies[digest] = reply

    def digest(self, ask: Ask, card: JudgeCard) -> str | None:
        """Return the digest of a question, or None if the image cannot be read."""
        content = self.content(ask.path)
        if content is None:
            return None
        return of_json([card.name, card.revision, card.how, ask.question.digest(), content])

    def content(self, path: Path) -> str | None:
        """Return the digest of an image, or None if it cannot be read."""
        if path not in self._hashes:
            self._hashes[path] = _hash(path)
        return self._hashes[path]

    def reply(self, ask: Ask, card: JudgeCard) -> Reply:
        """Return the reply to a question, or one with an error."""
        digest = self.digest(ask, card)
        if digest is None:
            return Reply(error=MISSING)
        return self.replies.get(digest, Reply(error="not asked"))

    def append(self, entries: Sequence[tuple[str, Ask, Reply]]) -> None:
        """Append replies to this process's file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = b""
        for digest, ask, reply in entries:
            entry = {
                "digest": digest,
                "image": f"{ask.path.parents[1].name}/{ask.path.name}",
                "prompt": ask.prompt,
                "key": ask.question.key,
                "text": reply.text,
                "low": reply.low,
                "high": reply.high,
                "error": reply.error,
            }
            lines += json.dumps(entry).encode() + b"\n"
            self.replies[digest] = reply
        with self.file.open("ab") as file:
            # the last line of a killed process has no end
            if file.tell() and not self._ends_with_line():
                lines = b"\n" + lines
            file.write(lines)

    def _ends_with_line(self) -> bool:
        with self.file.open("rb") as file:
            file.seek(-1, 2)
            return file.read(1) == b"\n"


def _reply(entry: Mapping[str, Any]) -> Reply:
    low, high = (tuple(float(v) for v in entry[name]) for name in ("low", "high"))
    return Reply(entry["text"], low, high, entry["error"])


def _hash(path: Path) -> str | None:
    """Return the sha256 of an image that can be opened, or None."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.verify()
    # Pillow's parsers raise whatever a damaged file leads them to
    except Exception:
        return None
    return hashlib.sha256(content).hexdigest()


def ask_missing(
    asks: Sequence[Ask],
    judges: Mapping[str, Judge],
    book: AnswerBook,
    *,
    store: bool = True,
    progress: Progress | None = None,
) -> int:
    """Ask the judges what the book lacks, and return the number of questions.

    Questions that had an error are asked again.

    Args:
        judges: judge of each kind of question.
        store: append the replies to the book.

    Raises:
        JudgeError: a judge is away.
        Interrupted: a signal came; the replies so far are kept.
    """
    missing: dict[str, Ask] = {}
    for ask in asks:
        digest = book.digest(ask, judges[ask.question.kind].card)
        earlier = book.replies.get(digest) if digest else None
        if digest and (earlier is None or earlier.error is not None):
            missing.setdefault(digest, ask)
    done = 0
    with Interruption("the answers in hand are finished and kept") as interruption:
        for kind, judge in judges.items():
            mine = [(d, a) for d, a in missing.items() if a.question.kind == kind]
            for start in range(0, len(mine), judge.at_once):
                part = mine[start : start + judge.at_once]
                replies = judge.answer(_tasks([a for _, a in part]))
                entries = [(d, a, r) for (d, a), r in zip(part, replies, strict=True)]
                if store:
                    book.append(entries)
                done += len(part)
                if progress is not None:
                    progress(done, len(missing))
                if interruption.number:
                    raise Interrupted(
                        interruption.number,
                        f"{done} of {len(missing)} missing answers are in {book.folder}; the same command "
                        "asks the others",
                    )
    return done


def _tasks(asks: Sequence[Ask]) -> list[Task]:
    """Return the questions with their images, each file opened once."""
    images: dict[Path, Image.Image] = {}
    for ask in asks:
        if ask.path not in images:
            with Image.open(ask.path) as image:
                images[ask.path] = image.convert("RGB")
    return [(ask.question, (images[ask.path],)) for ask in asks]
