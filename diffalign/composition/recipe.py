"""Recipes of a composition: a base, its stages in order, and how each stage is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffalign.config import ConfigError, loading, nearest
from diffalign.config.checks import at_least, check, check_numbers, one_of
from diffalign.config.files import parse_yaml, read_recipe
from diffalign.config.loading import decode_group
from diffalign.config.overrides import split_flags

FOLDER = "compose"
"""Folder of the recipes that ship."""
FILES = ("recipe", "lora", "prompts")
"""Settings of a group whose value may be a file beside the recipe."""
PSNR, FID, GENEVAL = "psnr", "fid", "geneval"
"""Floors that are no rewards."""


@dataclass
class DrawingSettings:
    """Settings of the base's images; null is the value of the base's card.

    A student draws with its own number of steps, and an aligned model with the guidance of its run.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        at_least(self, ("num_inference_steps", "height", "width", "batch_size"), "drawing")


@dataclass
class MeasureSettings:
    """Settings of the measurement that follows every stage, always with the same seeds."""

    prompts: str = "shapes:held_out"
    """Prompts that are held out from all stages."""
    max_prompts: int | None = None
    """Largest number of prompts, spread over the set."""
    images_per_prompt: int = 1
    images_per_task: int | None = None
    """Images of each task, which replaces `images_per_prompt`."""
    seed: int = 1000
    rewards: list[str] = field(default_factory=lambda: ["verifier"])
    """Rewards that are measured; name at least one that no stage trains on."""
    reference: str | None = None
    """Reference of FID and CMMD: a folder, statistics (.npz) or shapes:held_out; null for none."""
    network: str | None = None
    """Network of the features; null for shapes_clip on Shapes and inception otherwise."""
    repeats: int = 5
    """Number of timed calls."""

    def __post_init__(self) -> None:
        names = ("max_prompts", "images_per_prompt", "images_per_task", "repeats")
        at_least(self, names, "measure")
        check(bool(self.rewards), "measure.rewards", "name at least one reward")


@dataclass
class ModelCardSettings:
    """Facts of the model card that no measurement shows."""

    license: str = "other"
    """Licence of the composed model in the Hub's notation, which the base's licence decides."""
    data: str = ""
    """Data of the stages in a sentence."""


@dataclass
class Recipe:
    """Recipe of a composition."""

    output_dir: str = "runs/composed"
    """Folder of the stages and of the composed model. The same command goes on."""
    model: str = "shapes-flux"
    """Base: name of `diffalign list models`, folder, or hub id."""
    dtype: str = "bfloat16"
    """Dtype of the weights of every stage."""
    stages: dict[str, Any] = field(default_factory=dict)
    """Settings of each stage, in the order of the stages.

    Null leaves a stage out.
    """
    drawing: DrawingSettings = field(default_factory=DrawingSettings)
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    floors: dict[str, float] = field(default_factory=dict)
    """Limits that every stage must keep, see `composition.floors`."""
    card: ModelCardSettings = field(default_factory=ModelCardSettings)

    def __post_init__(self) -> None:
        check_numbers(self)
        one_of(self.dtype, ("bfloat16", "float16", "float32"), "dtype")
        check_floors(self.floors, "floors", self.measure)
        for name in [n for n, settings in self.stages.items() if settings is None]:
            del self.stages[name]
        check(bool(self.stages), "stages", "there is no stage. Name at least one")

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain JSON values."""
        return asdict(self)


def check_floors(floors: Mapping[str, float], setting: str, measure: MeasureSettings) -> None:
    """Check that each floor is measured, and that an image could keep it.

    Raises:
        ConfigError: a floor has another name, or no stage can meet it.
    """
    names = [GENEVAL, PSNR, FID, *measure.rewards]
    for name, value in floors.items():
        path = f"{setting}.{name}"
        check(name in names, path, f"nothing of this name is measured{nearest(name, names)}")
        check(math.isfinite(value), path, f"must be a finite number, got {value}")
        if name == FID:
            check(
                measure.reference is not None,
                path,
                "there is no reference. Name one in measure.reference",
            )
            check(
                value >= 0, path, f"is the largest rise over the base. Set 0 or more, got {value}"
            )
        elif name == PSNR:
            # equal images of 8 bits have 78 dB (`evaluation.likeness`)
            check(0 < value <= 78, path, f"no stage can meet {value} dB. Set at most 78")
        elif name == GENEVAL:
            check(
                -1 <= value <= 1,
                path,
                f"is the least difference to the base. Set -1 to 1, got {value}",
            )


def recipes() -> dict[str, Path]:
    """Return name and file of every recipe of a composition that ships with the suite."""
    return loading.recipes(FOLDER)


def describe_recipes() -> dict[str, str]:
    """Return name and first comment line of every recipe of a composition."""
    return loading.describe_recipes(FOLDER)


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by name or file, and apply overrides.

    Args:
        recipe: name of a recipe that ships, or a YAML file.
        overrides: flags such as `stages.quantize.backend=int4`, with two dashes in front.

    Raises:
        ConfigError: the recipe cannot be read, or a setting is unknown or invalid.
    """
    file = _find(str(recipe))
    raw = _beside(read_recipe(file), file.parent)
    for path, text in split_flags(overrides):
        _assign(raw, path.split("."), parse_yaml(text, f"{path}={text}"))
    settings: Recipe = decode_group(Recipe, raw)
    return settings


def _find(name: str) -> Path:
    files = recipes()
    if name in files:
        return files[name]
    if Path(name).suffix in (".yaml", ".yml"):
        if Path(name).is_file():
            return Path(name)
        raise ConfigError(f"recipe file {name} does not exist. Check the path")
    hint = nearest(name, list(files), otherwise=f"choose from {', '.join(files)}")
    raise ConfigError(f"unknown recipe {name!r}{hint}")


def _beside(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the settings with the files that lie beside the recipe named in full."""
    groups = [raw.get("measure"), *(raw.get("stages") or {}).values()]
    for group in groups:
        for name in FILES if isinstance(group, dict) else ():
            value = group.get(name)
            if isinstance(value, str) and value and (folder / value).exists():
                group[name] = str(folder / value)
    return raw


def _assign(raw: dict[str, Any], steps: Sequence[str], value: Any) -> None:
    """Set one setting in a nested mapping."""
    for number, step in enumerate(steps[:-1]):
        inner = raw.get(step)
        if inner is None:
            inner = raw[step] = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                "is not a group of settings. Check the name",
                setting=".".join(steps[: number + 1]),
            )
        raw = inner
    raw[steps[-1]] = value


def flags_of(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return nested settings as the overrides of a recipe of `diffalign train`."""
    import json

    flags: list[str] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flags += flags_of(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            flags.append(f"--{prefix}{name}={text}")
    return flags
