"""Stages that are runs of `diffalign train`: a recipe on the model of the stage before."""

from __future__ import annotations

import copy
import gc
from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from diffalign.composition.digests import of_listing
from diffalign.composition.recipe import flags_of
from diffalign.composition.stage import Forecast, Stage, StageSettings, State
from diffalign.composition.work import rows_of_run
from diffalign.config import AnyRunConfig, ConfigError, load, to_dict
from diffalign.config.methods import METHODS, trainer_class
from diffalign.config.settings import free_settings
from diffalign.core.errors import UsageError
from diffalign.core.files import folder_aside
from diffalign.lora.files import read_lora
from diffalign.lora.policies import unresolved
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.merging import merge
from diffalign.pipelines.registry import load_model
from diffalign.pipelines.saving import save_pipeline
from diffalign.training.inputs import Inputs, read_inputs
from diffalign.training.memory import forecast
from diffalign.training.run import run

RESULT = {
    *("training.num_updates", "training.max_minutes", "training.on_collapse"),
    *("training.on_hacking", "training.max_idle_updates"),
}
"""Settings that a resumed run may change, and that change its result."""
PLACES = ("latents.images", "latents.autoencoder", "pairs.source")
"""Settings that may name local files, whose content counts."""


@dataclass
class TrainedSettings(StageSettings):
    """Settings of a stage that trains."""

    recipe: str | None = None
    """Recipe of `diffalign list recipes`, or a YAML file; null if `settings` say everything."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the recipe that differ, in groups."""


class TrainedStage(Stage):
    """Stage that trains a recipe."""

    kind = TrainedSettings
    settings: TrainedSettings
    methods: ClassVar[tuple[str, ...]]
    """Folders of `diffalign.methods` whose recipes fit the stage."""

    def config(self, state: State) -> AnyRunConfig:
        """Return the settings of the run.

        Raises:
            ConfigError: the recipe cannot be read, or is of another method than the stage.
        """
        flags = flags_of(self.settings.settings)
        name = load(self.settings.recipe, flags).algorithm.type
        method = METHODS.get(name)
        # a method of another package may train anything
        folder = self.methods[0] if method is None else method.trainer.split(".")[2]
        if folder not in self.methods:
            raise ConfigError(
                f"{self.settings.recipe} is a recipe of {name}, and this stage needs one of "
                f"{' or '.join(self.methods)}. Name another recipe",
                setting=f"stages.{self.name}.recipe",
            )
        flags += [*self.overrides(state), *flags_of({"model": {"name": str(state.source)}})]
        config: AnyRunConfig = load(self.settings.recipe, flags)
        return config

    def overrides(self, state: State) -> list[str]:
        """Return settings that follow from the model before.

        Those that the stage's own settings name are left out.
        """
        return []

    def check(self, state: State) -> State:
        if state.is_quantised:
            raise UsageError(
                f"{state.source} is quantised, and what is trained cannot be merged into its weights. Start from the "
                "model before it was quantised",
                setting="model",
            )
        config = self.config(state)
        model = state.build()
        length = config.model.max_sequence_length
        if state.is_moved and length not in (None, model.max_sequence_length):
            raise UsageError(
                f"the model was moved with {model.max_sequence_length} text tokens. Leave the setting out",
                setting=f"stages.{self.name}.settings.model.max_sequence_length",
                value=length,
            )
        self.inputs: Inputs = read_inputs(config)
        trained = self._trained(config, model)
        targets = config.lora.targets or trained.lora_targets
        if missing := unresolved(trained.denoiser, targets):
            raise UsageError(
                f"no layer of this {type(trained.denoiser).__name__} ends with {', '.join(missing)}. Name endings of "
                "its layers",
                setting=f"stages.{self.name}.settings.lora.targets",
            )
        self.run_config = config
        return self.after(config, state, trained)

    def _trained(self, config: AnyRunConfig, model: TextToImageModel) -> TextToImageModel:
        kind = trainer_class(config.algorithm.type)
        trained: TextToImageModel = kind.trained_model(config, model)
        return trained

    @abstractmethod
    def after(self, config: AnyRunConfig, state: State, trained: TextToImageModel) -> State:
        """Return the state after the run.

        Args:
            config: settings of the run.
            state: model before the run.
            trained: model of the run on the meta device.
        """

    def key(self) -> Any:
        config = self.run_config
        free = free_settings(type(config)) - RESULT
        settings = _without(to_dict(config), free | {"output_dir", "model.name"})
        places = {name: of_listing(_setting(settings, name)) for name in PLACES}
        return [settings, self.inputs.digests, places]

    def forecast(self, state: State) -> Forecast:
        model = state.build()
        rows = rows_of_run(self.run_config, model)
        model = self._trained(self.run_config, model)
        return Forecast(forecast(model, self.run_config).total, rows)

    def train(self, place: Path) -> dict[str, Any]:
        """Run or continue the training, and return facts from its summary.

        Args:
            place: folder of the stage.
        """
        self.run_config.output_dir = str(place / "run")
        summary = run(self.run_config, earlier=self.inputs)
        # the run's model is not needed any more, and the next one is as large
        gc.collect()
        names = ("updates", "training_seconds", "geneval_before", "geneval_after", "device")
        return {
            "algorithm": self.run_config.algorithm.type,
            "recipe": self.settings.recipe,
            **{name: summary[name] for name in names if name in summary},
        }

    def merge(
        self,
        state: State,
        after: State,
        target: Path,
        *,
        lora: str | None = None,
        scheduler: str | None = None,
    ) -> dict[str, Any]:
        """Save the model before with a LoRA in its weights, and return facts.

        Args:
            lora: LoRA to merge; None for that of the stage's run.
            scheduler: folder of a new scheduler; None keeps the model's.
        """
        adapter = lora or str(self.run_folder / "lora")
        pipeline = load_model(state.source, dtype=self.dtype).pipeline
        merge(pipeline, read_lora(adapter), scheduler=scheduler)
        with folder_aside(target) as folder:
            save_pipeline(pipeline, folder, card=after.card)
        return {"scheduler": type(pipeline.scheduler).__name__}

    @property
    def run_folder(self) -> Path:
        """Folder of the stage's run."""
        return Path(self.run_config.output_dir)


def _without(settings: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Return nested settings without those of some paths."""
    rest = copy.deepcopy(settings)
    for name in names:
        *groups, last = name.split(".")
        inner: Any = rest
        for group in groups:
            inner = inner.get(group) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner.pop(last, None)
    return rest


def _setting(settings: dict[str, Any], path: str) -> str | None:
    """Return the text of a setting, or None if the run has no such setting."""
    value: Any = settings
    for step in path.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value if isinstance(value, str) else None
