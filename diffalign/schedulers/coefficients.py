"""Factors of Q-Sched, and their form in a scheduler's configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffalign.core.errors import UserError

KEY = "qsched"
VERSION = 1
LEAST, MOST = 0.1, 10.0
"""Bounds of a factor. Searches stay within 0.8 to 1.2; values outside the bounds are damage."""


class CoefficientsError(UserError, ValueError):
    """Error for unusable factors or an unreadable configuration."""


@dataclass(frozen=True)
class Coefficients:
    """Factors of a scheduler's two inputs at each of N steps, noise first.

    Attributes:
        sample: factors of the noisy latents, the paper's c_x.
        model_output: factors of the denoiser's prediction, the paper's c_epsilon.
    """

    sample: tuple[float, ...]
    model_output: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sample) != len(self.model_output) or not self.sample:
            raise CoefficientsError(
                f"need as many factors of sample ({len(self.sample)}) as of model_output "
                f"({len(self.model_output)}): one per step"
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
        """Return whether all factors are 1."""
        return all(v == 1 for v in (*self.sample, *self.model_output))

    @classmethod
    def ones(cls, steps: int) -> Coefficients:
        """Return factors of 1, the original scheduler."""
        return cls((1.0,) * steps, (1.0,) * steps)

    @classmethod
    def ramp(cls, sample: float, model_output: float, steps: int) -> Coefficients:
        """Return factors that change linearly from the first step's to 1 at the last step.

        The first step's two numbers are the search space of the published search.
        """

        def line(start: float) -> tuple[float, ...]:
            return tuple(start + (1 - start) * i / max(1, steps - 1) for i in range(steps))

        return cls(line(sample), line(model_output))

    @classmethod
    def from_vector(cls, values: Sequence[float]) -> Coefficients:
        """Return the coefficients of a `vector`."""
        half = len(values) // 2
        return cls(tuple(map(float, values[:half])), tuple(map(float, values[half:])))

    @property
    def vector(self) -> list[float]:
        """Return 2 N numbers: all factors of the latents, then all of the predictions."""
        return [*self.sample, *self.model_output]


@dataclass(frozen=True)
class Tables:
    """Factors that a configuration stores, with their origin.

    Attributes:
        steps: coefficients by number of steps.
        fingerprint: fingerprint of the denoiser of the search; None if unknown.
        scheduler: class and settings of the scheduler of the search; None if unknown.
    """

    steps: Mapping[int, Coefficients]
    fingerprint: str | None = None
    scheduler: Mapping[str, Any] | None = None

    def to_config(self) -> dict[str, Any]:
        """Return the tables as plain JSON."""
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
        """Read what `to_config` wrote.

        Args:
            raw: value of a configuration under `KEY`, or None.

        Raises:
            CoefficientsError: the value is damaged or of another version.
        """
        if raw is None:
            return cls({})
        if not isinstance(raw, Mapping) or raw.get("version") != VERSION:
            raise CoefficientsError(
                f"the scheduler's configuration holds {KEY!r} in a form that this version does not read; expected "
                f"version {VERSION}. Update diffalign, or remove {KEY!r} from scheduler_config.json."
            )
        try:
            steps = {
                int(n): Coefficients(tuple(c["sample"]), tuple(c["model_output"]))
                for n, c in raw["steps"].items()
            }
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CoefficientsError(
                f"the scheduler's configuration holds damaged factors under {KEY!r}: {error}. Remove {KEY!r} from "
                "scheduler_config.json."
            ) from error
        for n, c in steps.items():
            if n != len(c):
                raise CoefficientsError(
                    f"{KEY!r} holds {len(c)} factors for {n} steps. Remove it from scheduler_config.json."
                )
        scheduler = raw.get("scheduler")
        if not isinstance(scheduler, Mapping | None):
            raise CoefficientsError(
                f"{KEY!r} holds a damaged scheduler: {scheduler!r}. Remove it from scheduler_config.json."
            )
        return cls(steps, raw.get("fingerprint"), scheduler)
