"""Candidates of a search: combinations of options, and the steps from one combination to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from diffalign.acceleration.conditions import FEW_STEPS
from diffalign.acceleration.options import CHOICES
from diffalign.acceleration.schedule import fewest
from diffalign.core.errors import UsageError
from diffalign.core.nearest import closest

STEPS, CACHE = "steps", "cache"
SHARES = (0.7, 0.5, 0.35, 0.25)
"""Shares of the plain number of steps that are tried."""
FEWEST_STEPS = 4
RATIOS = (1.5, 2.0, 2.4, 2.8, 3.5)
"""Numbers of steps per computed step that the cache is tried with."""
AXES = (STEPS, CACHE, "guidance", "quantize", "attention", "compile", "vae", "offload")
"""Options in the order in which they are tried."""
ATTENTION = ("_native_cudnn", "_native_flash")
"""Attention backends that are part of torch."""
CUDA_ONLY = ("attention", "compile", "offload")
"""Options that gain nothing on other devices (`acceleration.rules`)."""
ON_CPU = ("int8", "int4")
"""Backends of quantisation that are tried on a CPU."""
SLOW_TO_APPLY = ("quantize", "compile", "offload")
"""Options that take seconds to apply, so that they are timed in blocks."""


@dataclass(frozen=True)
class Candidate:
    """Options of an acceleration.

    Attributes:
        steps: number of steps.
        options: names and values of options, in the order of their application.
        computed: number of steps that the cache computes; None without a cache.
    """

    steps: int
    options: tuple[tuple[str, Any], ...] = ()
    computed: int | None = None

    @property
    def axes(self) -> frozenset[str]:
        """Names of the options that are on; `steps` is not among them."""
        names = {name for name, _ in self.options}
        return frozenset(names | ({CACHE} if self.computed is not None else set()))

    @property
    def key(self) -> dict[str, Any]:
        """JSON value that identifies the candidate."""
        return {**asdict(self), "options": [list(pair) for pair in self.options]}

    def without_cache(self) -> Candidate:
        """Return the candidate with all steps computed."""
        return replace(self, computed=None)

    def named(self) -> dict[str, Any]:
        """Return the options as `acceleration.rules` sees them; the cache has any value."""
        values = dict(self.options)
        if self.computed is not None:
            values[CACHE] = CHOICES[CACHE][0]
        return {name: values[name] for name in CHOICES if name in values}

    def text(self, plain_steps: int) -> str:
        """Return the candidate in words."""
        parts = [] if self.steps == plain_steps else [f"{self.steps} steps"]
        parts += [f"{name} {value}" for name, value in self.options]
        if self.computed is not None:
            parts.append(f"cache {self.computed} of {self.steps}")
        return ", ".join(parts) or "plain"


@dataclass(frozen=True)
class Level:
    """Value of one option, such as half of the steps."""

    axis: str
    value: Any

    def on(self, candidate: Candidate, *, plain_steps: int) -> Candidate | None:
        """Return a candidate with this level besides its own options.

        Return None if the option has a value already, or if this one is impossible with so many steps.
        """
        if self.axis in candidate.axes:
            return None
        if self.axis == STEPS:
            return self._with_steps(candidate, plain_steps)
        if self.axis == CACHE:
            return cached(candidate, math.ceil(candidate.steps / self.value))
        options = {**dict(candidate.options), self.axis: self.value}
        ordered = tuple((name, options[name]) for name in CHOICES if name in options)
        return replace(candidate, options=ordered)

    def _with_steps(self, candidate: Candidate, plain_steps: int) -> Candidate | None:
        steps = math.ceil(plain_steps * self.value)
        if candidate.steps != plain_steps or not FEWEST_STEPS <= steps < plain_steps:
            return None
        shorter = Candidate(steps, candidate.options)
        if candidate.computed is None:
            return shorter
        return cached(shorter, math.ceil(candidate.computed * steps / plain_steps))


def cached(candidate: Candidate, computed: int) -> Candidate | None:
    """Return a candidate with a cache that computes so many steps.

    Return None if that is impossible.
    """
    if candidate.steps <= FEW_STEPS:
        return None
    computed = max(fewest(candidate.steps), computed)
    return replace(candidate, computed=computed) if computed < candidate.steps else None


def levels_of(device: str, *, memory: bool, axes: Sequence[str] = AXES) -> list[Level]:
    """Return the levels to try, in order.

    Args:
        device: type of the device.
        memory: whether memory counts; otherwise options that save memory alone are left out.
        axes: options to try.
    """
    cuda = device == "cuda"
    values: dict[str, Sequence[Any]] = {
        STEPS: SHARES,
        CACHE: RATIOS,
        "guidance": CHOICES["guidance"],
        "quantize": CHOICES["quantize"] if cuda else ON_CPU if memory else (),
        "attention": ATTENTION if cuda else (),
        "compile": CHOICES["compile"] if cuda else (),
        "vae": CHOICES["vae"] if memory else (),
        "offload": CHOICES["offload"] if cuda and memory else (),
    }
    return [Level(axis, value) for axis in AXES if axis in axes for value in values[axis]]


def check_axes(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of options to try.

    Raises:
        UsageError: a name is unknown, or there is none.
    """
    for name in names:
        if name not in AXES:
            near = closest(name, list(AXES))
            hint = f"Did you mean {near!r}?" if near else f"Choose from {', '.join(AXES)}."
            raise UsageError(f"no such option to try. {hint}", setting="options", value=name)
    if not names:
        raise UsageError(
            f"there is no option to try. Choose from {', '.join(AXES)}.", setting="options"
        )
    return tuple(names)
