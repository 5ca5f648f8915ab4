"""Measurements of a search, kept one a file, so that the same command goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffalign.core.files import write_text
from diffalign.core.fingerprint import of_json
from diffalign.core.interruption import Interrupted, Interruption

Clock = Callable[[], float]


class Kept:
    """Folder of measurements, each under a digest of all that it depends on.

    Attributes:
        seconds: seconds that the measurements asked for so far took, those of earlier sittings included.
        new: number of measurements that were made, not read.
    """

    def __init__(
        self, folder: Path, *, key: Any, clock: Clock, interruption: Interruption | None = None
    ) -> None:
        self.folder = folder
        self.seconds = 0.0
        self.new = 0
        self._key, self._clock, self._interruption = key, clock, interruption
        self._asked: set[str] = set()
        self._needs: list[list[str]] = []
        """Measurements that each one in progress asked for, the innermost last."""

    def get(self, key: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the measurement of a key (JSON), made by `make` unless it is kept.

        Raises:
            Interrupted: a signal came; the measurements so far are kept.
        """
        file = self.file(key, ".json")
        record = _read(file)
        if record is None:
            return self.again(key, make)
        return self._answer(file.stem, record)

    def again(self, key: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Make and keep a measurement, whether it is kept already or not."""
        file = self.file(key, ".json")
        counted, started = self.seconds, self._clock()
        self._needs.append([])
        try:
            made = make()
        finally:
            needs = self._needs.pop()
        # what it asked for has its own seconds
        seconds = max(0.0, self._clock() - started - (self.seconds - counted))
        record = {"key": key, "made": made, "seconds": seconds, "needs": needs}
        # what is read may differ from what was made, for JSON has no tuples
        record = json.loads(json.dumps(record))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(record))
        self.new += 1
        return self._answer(file.stem, record)

    def file(self, key: Any, suffix: str) -> Path:
        """Return the file of a key."""
        return self.folder / f"{of_json([self._key, key])[:16]}{suffix}"

    def _answer(self, digest: str, record: dict[str, Any]) -> dict[str, Any]:
        """Return what was measured, and count it among what the measurement in progress needs."""
        if self._needs:
            self._needs[-1].append(digest)
        self._count(digest, record)
        self._stop()
        measurement: dict[str, Any] = record["made"]
        return measurement

    def _count(self, digest: str, record: dict[str, Any]) -> None:
        """Add the seconds of a measurement and of what it needed, once."""
        if digest in self._asked:
            return
        self._asked.add(digest)
        self.seconds += record["seconds"]
        for need in record["needs"]:
            needed = _read(self.folder / f"{need}.json")
            if needed is not None:
                self._count(need, needed)

    def _stop(self) -> None:
        if self._interruption is not None and self._interruption.number:
            raise Interrupted(
                self._interruption.number,
                f"{len(self._asked)} measurements are kept in {self.folder}; the same command goes on",
            )


def _read(file: Path) -> dict[str, Any] | None:
    """Return a kept record. Return None for a missing or damaged file, which is made again."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return record if {"made", "seconds", "needs"} <= set(record) else None
    except (OSError, ValueError, TypeError):
        return None
