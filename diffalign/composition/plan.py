"""Plan of a composition: the stages in order, checked one after the other before the first one runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diffalign.composition.digests import LENGTH, of_base
from diffalign.composition.recipe import Recipe
from diffalign.composition.registry import stage_class
from diffalign.composition.stage import Stage, State
from diffalign.config import ConfigError
from diffalign.core.errors import UsageError
from diffalign.core.fingerprint import of_json
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.cards import card_of
from diffalign.pipelines.checks import check_steps
from diffalign.pipelines.registry import load_meta_model
from diffalign.schedulers.coefficients import KEY

STAGES, MODEL = "stages", "model"
"""Names of the folder of all stages, and of the folder of a stage's model."""


@dataclass(frozen=True)
class Step:
    """Stage of a plan, with the states before and after it, and its folder."""

    stage: Stage
    before: State
    after: State
    place: Path

    @property
    def name(self) -> str:
        return self.stage.name


@dataclass(frozen=True)
class Plan:
    """Checked stages of a recipe."""

    recipe: Recipe
    base: State
    steps: list[Step]

    @property
    def folder(self) -> Path:
        """Folder of the composition."""
        return Path(self.recipe.output_dir)


def check_order(names: Sequence[str]) -> None:
    """Check that no stage undoes one that runs before it.

    Raises:
        ConfigError: a stage does not exist, or stands behind one that it must precede.
    """
    kinds = {name: stage_class(name) for name in names}
    for place, name in enumerate(names):
        for earlier in names[:place]:
            if reason := kinds[name].precedes.get(earlier):
                raise ConfigError(
                    f"{name} cannot follow {earlier}: {reason}. Put {name} before {earlier}",
                    setting="stages",
                    value=", ".join(names),
                )


def make_plan(recipe: Recipe) -> Plan:
    """Check all stages of a recipe, and return them with their folders.

    Models are built on the meta device, and no weights are read.

    Raises:
        UserError: a stage cannot work on what the stages before it make.
    """
    check_order(list(recipe.stages))
    base = base_state(recipe)
    steps: list[Step] = []
    earlier: dict[str, State] = {}
    state = base
    for name, raw in recipe.stages.items():
        stage = stage_class(name).of(raw, recipe)
        stage.earlier = dict(earlier)
        after = stage.check(state)
        digest = of_json([state.digest, name, stage.key(), _card(after)])
        place = Path(recipe.output_dir) / STAGES / f"{name}-{digest[:LENGTH]}"
        after = after.after(digest=digest, source=str(place / MODEL))
        steps.append(Step(stage, state, after, place))
        earlier[name] = state
        state = after
    return Plan(recipe, base, steps)


def base_state(recipe: Recipe) -> State:
    """Return the state of the base.

    Raises:
        UserError: the base does not exist, or has factors that the stages would invalidate.
    """
    dtype = getattr(torch, recipe.dtype)

    def build() -> TextToImageModel:
        return load_meta_model(recipe.model, dtype=dtype)

    card = card_of(recipe.model).updated(vars(recipe.drawing) | {"dtype": recipe.dtype})
    model = build()
    if model.pipeline.scheduler.config.get(KEY):
        raise UsageError(
            "its scheduler has factors of Q-Sched, which belong to its present weights. Start from a model without "
            "factors",
            setting="model",
            value=recipe.model,
        )
    # raises for a size or a number of steps that the model does not have
    size = model.image_size((card.height, card.width))
    model.latent_shape(size)
    check_steps(recipe.model, card.num_inference_steps)
    is_quantised = bool(model.denoiser.config.get("quantization_config"))
    digest = of_base(recipe.model, recipe.dtype)
    return State(recipe.model, build, card, digest, is_quantised=is_quantised)


def _card(state: State) -> dict[str, Any]:
    """Return what a card says about images; its batch size changes none."""
    return {k: v for k, v in asdict(state.card).items() if k != "batch_size"}
