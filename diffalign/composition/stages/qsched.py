"""Repair of the schedule: two factors per step (Q-Sched)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffalign.composition.stage import Forecast, Stage, StageSettings, State, device, held_bytes
from diffalign.core.errors import UsageError
from diffalign.data.prompts import load_prompts, spread
from diffalign.pipelines.registry import load_model
from diffalign.rewards import own
from diffalign.rewards.composition import CompositeReward
from diffalign.schedulers import QSched
from diffalign.training.inputs import digest
from diffalign.tuning.objective import parse
from diffalign.tuning.saving import save
from diffalign.tuning.tune import Settings, split, tune


@dataclass
class QSchedSettings(StageSettings):
    """Settings of the search; see `diffalign qsched --help`."""

    objective: str = "jaq"
    prompts: str = "shapes:train"
    """Prompts of the search and of its acceptance, which no measurement uses."""
    max_prompts: int = 50
    images_per_prompt: int = 1
    engine: str = "cma"
    budget: int = 100
    box: tuple[float, float] = (0.8, 1.2)
    penalty: float = 0.0
    held_out: float = 0.5
    reference: bool = True
    """Start from the closed form against the model before the quantisation, if that is better."""
    seed: int = 0


class QSchedStage(Stage):
    """Search of two factors per step, on the steps that the model draws with."""

    name = "qsched"
    title = "Q-Sched"
    kind = QSchedSettings
    settings: QSchedSettings
    keeps_images = True
    precedes = {"accelerate": "a plan keeps the scheduler's settings that it was made for"}

    def check(self, state: State) -> State:
        s = self.settings
        self.search = Settings(
            parse(s.objective),
            engine=s.engine,
            budget=s.budget,
            low=s.box[0],
            high=s.box[1],
            penalty=s.penalty,
            held_out=s.held_out,
            seed=s.seed,
        )
        if s.engine == "none" and self._reference is None:
            raise UsageError(
                "none is the closed form alone, which needs the model before a quantisation. Choose another engine",
                setting="stages.qsched.engine",
            )
        self.prompts = spread(load_prompts(s.prompts), s.max_prompts)
        split(self.prompts, s.held_out)
        self.reward = CompositeReward.from_config(
            self.search.objective, setting="stages.qsched.objective"
        )
        self.reward.check_metadata([p.metadata for p in self.prompts])
        scheduler = copy.deepcopy(state.model.pipeline.scheduler)
        try:
            QSched.wrap(scheduler)
        except UsageError as error:
            raise UsageError(
                f"the model draws with a scheduler that Q-Sched does not know. {error}. Or distil a student with "
                "algorithm.type=consistency",
                setting="stages.qsched",
            ) from error
        return state

    @property
    def _reference(self) -> State | None:
        """State of the model before the quantisation; None without one."""
        return self.earlier.get("quantize") if self.settings.reference else None

    def key(self) -> Any:
        place = self._reference
        files = [own.digest(name) for name in self.search.objective]
        before = None if place is None else place.digest
        return [self.choices, digest(self.prompts), files, before]

    def forecast(self, state: State) -> Forecast:
        model = state.model
        memory = held_bytes(model)
        images = len(self.prompts) * self.settings.images_per_prompt
        rows = model.forward_rows(images, state.card.guidance_scale)
        # the original schedule is one more candidate
        rows *= state.card.num_inference_steps * (self.settings.budget + 1)
        return Forecast(
            memory * (1 if self._reference is None else 2), rows * (1 - self.search.held_out)
        )

    def make(self, state: State, after: State, target: Path, place: Path) -> dict[str, Any]:
        self.reward.prepare()
        model = load_model(state.source, dtype=self.dtype, device=device())
        reference = self._reference
        result = tune(
            model,
            self.prompts,
            self.reward.score,
            self.search,
            self.drawing(
                state.card,
                seed=self.settings.seed,
                images_per_prompt=self.settings.images_per_prompt,
            ),
            reference=None
            if reference is None
            else load_model(reference.source, dtype=self.dtype, device=device()),
            file=place / "work" / "scores.jsonl",
        )
        result.apply(model.pipeline)
        # seconds and rows are those of this sitting, and the folder's bytes do not depend on sittings
        history = [{**row, "rows": 0} for row in result.history]
        timeless = replace(result, seconds=0.0, network_rows=0, history=history)
        save(model.pipeline, timeless, target, whole=True, card=after.card)
        names = ("accepted", "gain", "interval", "evaluations", "seconds", "coefficients")
        record = result.to_dict()
        return {name: record[name] for name in names}


STAGE = QSchedStage
