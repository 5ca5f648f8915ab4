"""The factors of Q-Sched and the form in which a scheduler's configuration keeps them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffalign.core.errors import UserError

KEY = "qsched"
VERSION = 1
LEAST, MOST = 0.1, 10.0
"""Of a factor: searches stay within 0.8 to 1.2, and what lies beyond these is damage and no schedule."""


class CoefficientsError(UserError, ValueError):
    """Factors that cannot be used, or a configuration that holds none in a form that is known."""


@dataclass(frozen=True)
class Coefficients:
    """Factors of a scheduler's two inputs at each of N steps, noise first: of the noisy latents (`sample`, c_x of the
    paper) and of the denoiser's prediction (`model_output`, c_epsilon)."""

    sample: tuple[float, ...]
    model_output: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sample) != len(self.model_output) or not self.sample:
            raise CoefficientsError(
                f"need as many factors of sample ({len(self.sample)}) as of model_output "
                f"({len(self.model_output)}), one a step"
            )
        for value in (*self.sample, *self.model_output):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise CoefficientsError(f"factors must be finite numbers, got {value!r}")
            if not LEAST <= value <= MOST:
                raise CoefficientsError(f"factors must lie in {LEAST:g}..{MOST:g}, got {value!r}")

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def identity(self) -> bool:
        """Whether nothing is changed."""
        return all(v == 1 for v in (*self.sample, *self.model_output))

    @classmethod
    def ones(cls, steps: int) -> Coefficients:
        """Those of the scheduler as it is."""
        return cls((1.0,) * steps, (1.0,) * steps)

    @classmethod
    def ramp(cls, sample: float, model_output: float, steps: int) -> Coefficients:
        """The two numbers that the published search looks for: from them at the first step evenly to 1 at the last."""

        def line(start: float) -> tuple[float, ...]:
            return tuple(start + (1 - start) * i / max(1, steps - 1) for i in range(steps))

        return cls(line(sample), line(model_output))

    @classmethod
    def from_vector(cls, values: Sequence[float]) -> Coefficients:
        """The inverse of `vector`."""
        half = len(values) // 2
        return cls(tuple(map(float, values[:half])), tuple(map(float, values[half:])))

    @property
    def vector(self) -> list[float]:
        """2 N numbers: all factors of the latents, then all of the predictions."""
        return [*self.sample, *self.model_output]


@dataclass(frozen=True)
class Tables:
    """What a configuration keeps: `steps`, coefficients for each number of steps that was tuned, and what they were
    found with: the `fingerprint` of the denoiser, and class and settings of the `scheduler`. None: not known."""

    steps: Mapping[int, Coefficients]
    fingerprint: str | None = None
    scheduler: Mapping[str, Any] | None = None

    def to_config(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "scheduler": None if self.scheduler is None else dict(self.scheduler),
            "steps": {
                str(n): {"sample": list(c.sample), "model_output": list(c.model_output)}
                for n, c in sorted(self.steps.items())
            },
        }

    @classmethod
    def from_config(cls, raw: Any) -> Tables:
        """CoefficientsError where `raw`, what a configuration holds under `KEY`, is not what `to_config` writes."""
        if raw is None:
            return cls({})
        if not isinstance(raw, Mapping) or raw.get("version") != VERSION:
            raise CoefficientsError(
                f"the scheduler's configuration holds {KEY!r} in a form that this version does not read; expected "
                f"version {VERSION}"
            )
        try:
            steps = {
                int(n): Coefficients(tuple(c["sample"]), tuple(c["model_output"]))
                for n, c in raw["steps"].items()
            }
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CoefficientsError(
                f"the scheduler's configuration holds damaged factors under {KEY!r}: {error}"
            ) from error
        for n, c in steps.items():
            if n != len(c):
                raise CoefficientsError(f"{KEY!r} holds {len(c)} factors for {n} steps")
        scheduler = raw.get("scheduler")
        if not isinstance(scheduler, Mapping | None):
            raise CoefficientsError(f"{KEY!r} holds a damaged scheduler: {scheduler!r}")
        return cls(steps, raw.get("fingerprint"), scheduler)
