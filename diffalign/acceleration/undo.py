"""Undoing of an acceleration, with a proof that the pipeline is what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from diffalign.acceleration.tap import DENOISERS, IMPLEMENTATION, METHODS
from diffalign.core.errors import UsageError
from diffalign.core.fingerprint import UnknownWeights, fingerprint

PRIVATE = ("_diffusers_hook", "_hf_hook", "forward", IMPLEMENTATION)
"""Attributes by which hooks and compilation change a module."""


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
        after = state_of(self.pipeline)
        different = [name for name, value in self._before.items() if after.get(name) != value]
        if different:
            raise UsageError(
                f"restore: {', '.join(different)} of the pipeline changed after `accelerate`, by something else. "
                "Load the pipeline again."
            )


def state_of(pipeline: Any) -> dict[str, Any]:
    """Return what an acceleration may change: weights, processors, hooks, compilation, scheduler."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    state: dict[str, Any] = {"attention backend": _AttentionBackendRegistry._active_backend}
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            state[f"weights of {name}"] = _weights(name, part)
            # transformers puts hooks of its own into text encoders in their first call
            if name in (*DENOISERS, "vae"):
                state[f"hooks of {name}"] = hooks_of(part)
    scheduler = pipeline.scheduler
    state["scheduler"] = type(scheduler)
    state["hooks of scheduler"] = set(METHODS) & set(vars(scheduler))
    vae = getattr(pipeline, "vae", None)
    state["tiling of vae"] = [getattr(vae, n, None) for n in ("use_slicing", "use_tiling")]
    return state


def _weights(name: str, module: nn.Module) -> str:
    try:
        return fingerprint({name: module})
    except UnknownWeights:
        return "not in memory"


def _changes(module: nn.Module, attribute: str) -> bool:
    """Return whether an attribute of a module changes its calls."""
    value = vars(module).get(attribute)
    if attribute == "_diffusers_hook":
        return bool(getattr(value, "hooks", None))
    # a removed hook leaves the class's own method on the instance
    is_own = getattr(value, "__func__", None) is getattr(type(module), attribute, value)
    return value is not None and not is_own


def hooks_of(module: nn.Module) -> list[tuple[str, ...]]:
    """Return the hooks, compilations and attention processors of a module and its parts."""
    rows: list[tuple[str, ...]] = []
    for name, part in module.named_modules():
        for attribute in PRIVATE:
            if _changes(part, attribute):
                rows.append((name, attribute))
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        rows += [(name, "hook", str(id(hook))) for hook in hooks]
        processor = getattr(part, "processor", None)
        if processor is not None:
            backend = getattr(processor, "_attention_backend", None)
            rows.append((name, type(processor).__name__, str(id(processor)), str(backend)))
    return rows
