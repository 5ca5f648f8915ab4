"""Choices of the presets for each family, as the rules make them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffalign.acceleration.options import PRESETS, STATIC, Options
from diffalign.acceleration.rules import Situation, settle

DEVICES: dict[str, tuple[str, tuple[int, int]]] = {"GPU": ("cuda", (9, 0)), "CPU": ("cpu", (0, 0))}
"""Type and compute capability of the devices that are listed."""

IDENTICAL = 150.0
"""PSNR in dB that `drawing.psnr` gives to equal images."""


@dataclass(frozen=True)
class Layout:
    """Facts about a published family that presets depend on.

    Attributes:
        steps: number of steps of its card.
        guides: whether guidance costs a second half of the batch.
        stand_in: model of Shapes with the same architecture, which can be measured anywhere; None without one.
    """

    steps: int
    guides: bool
    stand_in: str | None = None


LAYOUTS = {
    "SD1.5": Layout(50, True, "shapes-sd"),
    "SDXL": Layout(50, True),
    "SD3.5": Layout(28, True, "shapes-sd3"),
    "FLUX.1-dev": Layout(28, False, "shapes-flux"),
    "FLUX.1-schnell": Layout(4, False),
    "SANA": Layout(20, True),
}
"""Published families, with the default schedules of their cards."""


@dataclass(frozen=True)
class Choice:
    """Options that a preset turns on for a family, by device.

    Attributes:
        family: name of the family.
        preset: name of the preset.
        options: value of each option in force, by the device's name in `DEVICES`.
    """

    family: str
    preset: str
    options: Mapping[str, Mapping[str, Any]]

    def measured(self, record: Mapping[str, Any] | None) -> str:
        """Return in words what a record of `diffalign bench acceleration` says of the preset.

        It was measured on the family's stand-in, on the device of the record. Return "no" if it was not.
        """
        stand_in = LAYOUTS[self.family].stand_in
        if record is None or stand_in not in record["arms"]:
            return "no"
        figures = record["arms"][stand_in].get("presets", {}).get(self.preset)
        if figures is None:
            return "no"
        device = record["machine"].get("device", "CPU")
        ratio, level = (figures[name]["median"] for name in ("ratio", "psnr"))
        quality = "the same images" if level >= IDENTICAL else f"{level:.1f} dB"
        return f"{stand_in}, {device}: {ratio:.2f} times as fast, {quality}"

    def text(self, device: str) -> str:
        """Return the options on a device in words."""
        return ", ".join(_words(n, v) for n, v in self.options[device].items()) or "nothing"


def choices() -> Iterator[Choice]:
    """Yield what each preset turns on for each family."""
    for family, layout in LAYOUTS.items():
        for preset in PRESETS:
            options = {name: _options(preset, layout, *DEVICES[name]) for name in DEVICES}
            yield Choice(family, preset, options)


def _options(
    preset: str, layout: Layout, device: str, capability: tuple[int, int]
) -> dict[str, Any]:
    from diffalign.acceleration.conditions import few_steps

    situation = Situation(
        steps=layout.steps,
        device=device,
        capability=capability,
        cache_problem=few_steps(layout.steps),
        guides=layout.guides,
    )
    values = Options().chosen(preset)
    if device != "cuda":
        # `attention.pick` leaves torch's own choice on other devices
        values.pop("attention", None)
    return settle(values, situation)[0]


def _words(name: str, value: Any) -> str:
    if name == "cache":
        return f"cache for {STATIC if value == 'static' else value:g} dB"
    return f"{name} {value}"
