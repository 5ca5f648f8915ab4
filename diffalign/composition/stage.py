"""Stage of a composition: what it needs, what it makes, and what its model is like."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from diffalign.composition.recipe import Recipe, check_floors
from diffalign.config import ConfigError
from diffalign.config.loading import decode_group
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.cards import DrawingCard
from diffalign.pipelines.drawing import Drawing
from diffalign.training.memory import size_of


@dataclass(frozen=True)
class State:
    """Model between two stages, as far as it is known before anything runs.

    Attributes:
        source: name or folder of the model; the folder need not exist yet.
        build: function that returns a new model on the meta device, which the caller may change.
        card: settings with which the model draws.
        digest: digest of all that the model was made from.
        is_moved: True after a move into other latents.
        is_quantised: True if the denoiser's weights are no floats any more.
        weights_ratio: bytes of the denoiser, relative to those of the meta model.
    """

    source: str
    build: Callable[[], TextToImageModel]
    card: DrawingCard
    digest: str
    is_moved: bool = False
    is_quantised: bool = False
    weights_ratio: float = 1.0

    @cached_property
    def model(self) -> TextToImageModel:
        """Model on the meta device, which is built once and only read."""
        return self.build()

    def after(self, **changes: Any) -> State:
        """Return a copy with changes."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Forecast:
    """Forecast of one stage.

    Attributes:
        memory: bytes on the device; None if they cannot be told.
        forwards: rows of the denoiser that the stage computes; a backward counts as two.
    """

    memory: int | None
    forwards: float


@dataclass
class StageSettings:
    """Settings that every stage has."""

    floors: dict[str, float] = field(default_factory=dict)
    """Limits that this stage must keep besides those of the recipe."""


class Stage(ABC):
    """Stage of a composition. A subclass is one file of `composition.stages`.

    Args:
        settings: settings of the stage, from the recipe.
        recipe: the whole recipe.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    """Name for people."""
    kind: ClassVar[type[StageSettings]]
    """Dataclass of the settings."""
    precedes: ClassVar[Mapping[str, str]] = {}
    """Stages that cannot run before this one, with the reason."""
    keeps_images: ClassVar[bool] = False
    """True if images of the same seed resemble those of the stage before."""
    earlier: Mapping[str, State] = {}
    """State before each earlier stage, which the plan sets."""

    def __init__(self, settings: Any, recipe: Recipe) -> None:
        self.settings, self.recipe = settings, recipe

    @classmethod
    def of(cls, raw: Any, recipe: Recipe) -> Stage:
        """Read the settings of a recipe's group, and return the stage.

        Raises:
            ConfigError: a setting is unknown or invalid.
        """
        path = f"stages.{cls.name}"
        if not isinstance(raw, Mapping):
            raise ConfigError(
                f"expected a group of settings, got {raw!r}. Write {{}} for the defaults",
                setting=path,
            )
        settings = decode_group(cls.kind, raw, ("stages", cls.name))
        check_floors(settings.floors, f"{path}.floors", recipe.measure)
        return cls(settings, recipe)

    @property
    def floors(self) -> dict[str, float]:
        """Limits of the recipe and of the stage."""
        return {**self.recipe.floors, **self.settings.floors}

    @cached_property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.recipe.dtype)
        return dtype

    @property
    def choices(self) -> dict[str, Any]:
        """Settings that determine the result: all but the floors."""
        return {**vars(self.settings), "floors": None}

    def drawing(self, card: DrawingCard, **others: Any) -> Drawing:
        """Return the settings of drawing with a card, in the recipe's precision."""
        return drawing_of(card, self.recipe.dtype, **others)

    @abstractmethod
    def check(self, state: State) -> State:
        """Check the stage before anything runs, and return the state after it.

        The digest and the source of the result are set by the caller.

        Args:
            state: model before the stage.

        Raises:
            UserError: the stage cannot work on this model.
        """

    @abstractmethod
    def key(self) -> Any:
        """Return all that determines the result besides the model before (JSON); `check` comes first."""

    @abstractmethod
    def forecast(self, state: State) -> Forecast:
        """Forecast memory and work of the stage on a model; `check` comes first."""

    @abstractmethod
    def make(self, state: State, after: State, target: Path, place: Path) -> dict[str, Any]:
        """Make the model of the stage as a new folder, and return facts.

        An interrupted call is repeated, and goes on from what it left in `place`.

        Args:
            state: model before the stage.
            after: state that `check` returned.
            target: folder to make; it does not exist.
            place: folder of the stage.
        """


def drawing_of(card: DrawingCard, dtype: str, **others: Any) -> Drawing:
    """Return the settings of drawing with a model's card.

    Args:
        others: further fields of `Drawing`, such as `seed`.
    """
    return Drawing(
        card.num_inference_steps,
        card.guidance_scale,
        (card.height, card.width),
        micro_batch_size=card.batch_size,
        mixed_precision="bf16" if dtype == "bfloat16" else "no",
        **others,
    )


def held_bytes(model: TextToImageModel) -> int:
    """Return the bytes of all networks of a model."""
    parts = model.pipeline.components.values()
    return sum(size_of(part) for part in parts if isinstance(part, torch.nn.Module))


def device() -> str:
    """Return the device on which stages run."""
    return "cuda" if torch.cuda.is_available() else "cpu"
