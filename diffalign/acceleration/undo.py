"""Undoing of an acceleration, with a proof that the pipeline is what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffalign.acceleration.state import differences, state_of
from diffalign.core.errors import UsageError


class Undo:
    """Steps that undo an acceleration, and the state that they must bring back."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self._steps: list[Callable[[], object]] = []
        self._before = state_of(pipeline)

    def add(self, step: Callable[[], object]) -> None:
        """Add a step, which is undone before those added earlier."""
        self._steps.append(step)

    def back(self) -> None:
        """Undo all steps, the last one first."""
        while self._steps:
            self._steps.pop()()

    def run(self) -> None:
        """Undo all steps, and check that they brought the state back.

        Raises:
            UsageError: something is not what it was; the message names it.
        """
        self.back()
        different = differences(self._before, state_of(self.pipeline))
        if different:
            raise UsageError(
                f"restore: {'; '.join(different)}: changed after `accelerate`, by something else. All that "
                "`accelerate` did is undone. Undo the other change (for a LoRA: unload_lora_weights()), or "
                "load the pipeline again."
            )


def replace_method(pipeline: Any, name: str, method: Callable[..., Any], undo: Undo) -> None:
    """Replace a method of one pipeline until its acceleration is undone."""
    before = vars(pipeline).get(name)

    def put_back() -> None:
        vars(pipeline).pop(name, None)
        if before is not None:
            setattr(pipeline, name, before)

    undo.add(put_back)
    setattr(pipeline, name, method)
