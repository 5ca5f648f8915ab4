"""Limits of a search: a budget of latency and memory, and the quality that must be kept."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from diffalign.core.errors import UsageError

UNITS: dict[str, dict[str, float]] = {
    "latency": {"s": 1.0, "ms": 1e-3},
    "memory": {
        **{f"{prefix}B": 1000.0**i for i, prefix in enumerate(("", "k", "M", "G", "T"))},
        **{f"{prefix}iB": 1024.0**i for i, prefix in enumerate(("K", "M", "G", "T"), 1)},
    },
}
"""Units of each quantity of a budget, in seconds and bytes."""
PSNR, GENEVAL = "psnr", "geneval"
"""Qualities that are no rewards."""
_BUDGET = re.compile(r"(\w+)\s*<=?\s*((\S*?)\s*([a-zA-Z]*))")
_QUALITY = re.compile(r"(.+?)\s*>=?\s*(\S+)")
BUDGET_EXAMPLE = "latency<1.5s,memory<16GiB"
QUALITY_EXAMPLE = "psnr>=30,clip_score>=-0.005"


@dataclass(frozen=True)
class Limits:
    """Limits that an acceleration must keep.

    Attributes:
        latency: seconds of one call; None for no limit.
        memory: peak bytes of one call; None for no limit.
        psnr: least mean PSNR in dB to the plain images; None for no limit.
        differences: least mean difference of each reward, and of "geneval", to the plain images; 0 or less.
    """

    latency: float | None = None
    memory: float | None = None
    psnr: float | None = None
    differences: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, budget: str | None, quality: str) -> Limits:
        """Read a budget such as "latency<1.5s,memory<16GiB", and a quality such as "psnr>=30,clip_score>=-0.005".

        Raises:
            UsageError: a part is not of this form, comes twice, or can never be kept.
        """
        bounds = _bounds(budget) if budget is not None else {}
        qualities = _qualities(quality)
        psnr = qualities.pop(PSNR, None)
        return cls(bounds.get("latency"), bounds.get("memory"), psnr, qualities)

    def __str__(self) -> str:
        parts = [] if self.latency is None else [f"latency<{self.latency:g}s"]
        parts += [] if self.memory is None else [f"memory<{self.memory / 2**30:.3g}GiB"]
        parts += [] if self.psnr is None else [f"psnr>={self.psnr:g}"]
        return ", ".join([*parts, *(f"{n}>={v:g}" for n, v in self.differences.items())])


def _bounds(text: str) -> dict[str, float]:
    """Return the bounds of a budget, in seconds and bytes."""
    bounds: dict[str, float] = {}
    for part in _parts(text, "budget", BUDGET_EXAMPLE):
        match = _BUDGET.fullmatch(part)
        if match is None or match[1] not in UNITS:
            raise _wrong(
                "budget", text, f"{part!r} is no limit of {' or '.join(UNITS)}", BUDGET_EXAMPLE
            )
        name, text_of_value, number, unit = match.groups()
        value = _number(number)
        if value is None or value <= 0:
            why = f"{text_of_value!r} is no positive number with a unit"
            raise _wrong("budget", text, why, BUDGET_EXAMPLE)
        if unit not in UNITS[name]:
            what = f"has the unit {unit!r}" if unit else "has no unit"
            raise _wrong(
                "budget",
                text,
                f"{part!r} {what}, and {name} is measured in {', '.join(UNITS[name])}",
                BUDGET_EXAMPLE,
            )
        if name in bounds:
            raise _wrong("budget", text, f"{name} has two limits", BUDGET_EXAMPLE)
        bounds[name] = value * UNITS[name][unit]
    return bounds


def _qualities(text: str) -> dict[str, float]:
    """Return the least value of each quality."""
    qualities: dict[str, float] = {}
    for part in _parts(text, "quality", QUALITY_EXAMPLE):
        match = _QUALITY.fullmatch(part)
        if match is None:
            raise _wrong("quality", text, f"{part!r} is not NAME>=VALUE", QUALITY_EXAMPLE)
        name, value = match[1], _number(match[2])
        if value is None:
            raise _wrong("quality", text, f"{match[2]!r} is no number", QUALITY_EXAMPLE)
        if name in qualities:
            raise _wrong("quality", text, f"{name} has two limits", QUALITY_EXAMPLE)
        if name == PSNR and value <= 0:
            raise _wrong("quality", text, "a PSNR is a positive number of dB", QUALITY_EXAMPLE)
        if name != PSNR and value > 0:
            raise _wrong(
                "quality",
                text,
                f"{part!r} asks for a gain, and the value is the difference to the plain images, which an acceleration "
                "does not raise",
                QUALITY_EXAMPLE,
            )
        qualities[name] = value
    return qualities


def _parts(text: str, setting: str, example: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise _wrong(setting, text, "a part between commas is empty", example)
    return parts


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _wrong(setting: str, text: str, why: str, example: str) -> UsageError:
    return UsageError(f"{why}. Write for instance {example}.", setting=setting, value=text)
