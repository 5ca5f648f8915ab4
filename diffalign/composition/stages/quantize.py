"""Quantisation, calibrated on the steps that the model draws with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.composition.stage import Forecast, Stage, StageSettings, State, device, held_bytes
from diffalign.core.errors import UsageError
from diffalign.data.prompts import Prompt, load_prompts, spread
from diffalign.pipelines.registry import load_model
from diffalign.quantization.backends import BACKENDS, check_name, resolve
from diffalign.quantization.packed import packable
from diffalign.training.inputs import digest
from diffalign.training.memory import size_of
from diffalign.tuning.quantising import SmallerSettings
from diffalign.tuning.smaller import make_smaller

BITS = 16


@dataclass
class QuantizeSettings(StageSettings):
    """Settings of the quantisation; see `diffalign quantize --help`."""

    backend: str = "int8"
    prompts: str | None = None
    """Prompts of calibration images, which are drawn with the model's own steps; null without calibration."""
    max_prompts: int = 32
    components: list[str] = field(default_factory=list)
    group_size: int = 64
    svd_rank: int = 0
    rounding: str | None = None
    tune_steps: int | None = None
    bits_per_weight: float | None = None
    seed: int = 0
    """Seed of the calibration images."""


class QuantizeStage(Stage):
    """Quantisation of the denoiser, and of other parts by name."""

    name = "quantize"
    title = "quantisation"
    kind = QuantizeSettings
    settings: QuantizeSettings
    keeps_images = True
    precedes = {
        "qsched": "factors repair what rounding changed",
        "accelerate": "a plan belongs to the weights that it was made for",
    }

    def check(self, state: State) -> State:
        s = self.settings
        if state.is_quantised:
            raise UsageError(
                f"{state.source} is quantised already. Leave the stage out, or start from the model before it was "
                "quantised",
                setting="stages.quantize",
            )
        check_name(s.backend)
        self.prompts: list[Prompt] = []
        if s.prompts is not None:
            self.prompts = spread(load_prompts(s.prompts), s.max_prompts)
        self.smaller = SmallerSettings(
            s.backend,
            s.components,
            s.group_size,
            s.svd_rank,
            latency=0,
            rounding=s.rounding,
            tune_steps=s.tune_steps,
            bits_per_weight=s.bits_per_weight,
        )
        self.smaller.check(self.prompts)
        model = state.model
        # raises for a backend whose library or device is missing
        self.backend = resolve(self.smaller.method, device=device(), model=model.denoiser)
        if BACKENDS[self.backend].is_packed:
            try:
                packable(model.denoiser)
            except UsageError as error:
                kind = type(model.denoiser).__name__
                raise UsageError(
                    f"no layer of this {kind} is large enough to be packed. Leave the stage out",
                    setting="stages.quantize",
                ) from error
        parts = model.pipeline.components
        for name in s.components:
            if parts.get(name) is None:
                raise UsageError(
                    f"the pipeline has no part {name}. Choose from {', '.join(sorted(parts))}",
                    setting="stages.quantize.components",
                )
        ratio = (s.bits_per_weight or BACKENDS[self.backend].bits) / BITS
        return state.after(is_quantised=True, weights_ratio=ratio)

    def key(self) -> Any:
        return [self.choices, self.backend, digest(self.prompts)]

    def forecast(self, state: State) -> Forecast:
        model = state.model
        memory = held_bytes(model)
        rows = model.forward_rows(len(self.prompts), state.card.guidance_scale)
        # the images are drawn for statistics, and before and after for the PSNR
        return Forecast(memory + size_of(model.denoiser), 2 * rows * state.card.num_inference_steps)

    def make(self, state: State, after: State, target: Path, place: Path) -> dict[str, Any]:
        smaller = make_smaller(
            load_model(state.source, dtype=self.dtype, device=device()),
            state.source,
            self.smaller,
            target,
            drawing=self.drawing(state.card, seed=self.settings.seed),
            dtype=self.dtype,
            prompts=self.prompts or None,
        )
        after.card.save(target)
        return dict(smaller.result)


STAGE = QuantizeStage
