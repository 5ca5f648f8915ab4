"""Weight formats of the Q-Sched benchmark, and how a student gets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffalign.pipelines.base import TextToImageModel
from diffalign.quantization.apply import quantize_model
from diffalign.quantization.backends import BACKENDS
from diffalign.quantization.packed import packable
from diffalign.tuning.allocation import choose_bits
from diffalign.tuning.calibration import Calibration
from diffalign.tuning.scales import Trajectories, tune_scales

CALIBRATION_STEPS = 4
"""Steps of the samples by which GPTQ rounds.

The model is drawn with other numbers of steps, too.
"""


@dataclass(frozen=True)
class Form:
    """Weight format of a denoiser: a backend and options of `quantize_model`.

    Without a backend the weights are bfloat16.
    """

    backend: str | None = None
    svd_rank: int = 0
    group_size: int | None = 64
    everywhere: bool = False
    """True if first, last, time embedding and small layers are quantized, too."""
    gptq: bool = False
    """True if codes are rounded by GPTQ."""
    tune_steps: int = 0
    """Updates of the scales on the predictions in full precision."""
    bits_per_weight: float | None = None
    """Mean bits of the weights, for bits by layer."""

    @property
    def by_steps(self) -> bool:
        """Return whether the format is calibrated for the timesteps that are drawn."""
        is_static = self.backend is not None and BACKENDS[self.backend].activations
        # coarse codes have to fit the few steps that are drawn
        is_coarse = self.gptq and self.everywhere
        return (self.svd_rank > 0 and not self.gptq) or is_static or is_coarse

    @property
    def calibrated(self) -> bool:
        """Return whether the format is calibrated on the model's own samples."""
        return self.by_steps or self.gptq or self.tune_steps > 0

    @property
    def selection(self) -> dict[str, Any]:
        """Options that select the layers."""
        return {"skip": (), "min_weights": 0} if self.everywhere else {}


ROWS: dict[str, Any] = {"group_size": None, "everywhere": True}
FORMS = {
    "bf16": Form(),
    "int8": Form("int8"),
    "int4": Form("int4"),
    "int4 svd": Form("int4", svd_rank=16),
    "int4 rows": Form("int4", **ROWS),
    "int4 rows svd": Form("int4", svd_rank=16, **ROWS),
    "int4 rows svd 32": Form("int4", svd_rank=32, **ROWS),
    "int4 gptq": Form("int4", gptq=True),
    "int3 gptq": Form("int3", gptq=True),
    "int2 gptq tuned": Form("int2", gptq=True, tune_steps=60),
    "int4 rows gptq": Form("int4", gptq=True, **ROWS),
}
"""Formats for which factors are searched."""
PLAIN = FORMS | {
    "int8 gptq": Form("int8", gptq=True),
    "int3": Form("int3"),
    "int2 gptq": Form("int2", gptq=True),
    "mixed 3.0 gptq": Form("mixed", gptq=True, bits_per_weight=3.0),
    "int8-static": Form("int8-static"),
    "int8-dynamic": Form("int8-dynamic"),
    "int4a8 gptq": Form("int4a8", gptq=True),
}
"""Formats that are drawn with the original schedule, searched ones among them."""
BITS = (
    *("bf16", "int4", "int4 gptq", "int3", "int3 gptq", "int2 gptq", "int2 gptq tuned"),
    *("mixed 3.0 gptq", "int4 rows", "int4 rows gptq"),
)
"""Formats of the shortest comparison."""
COARSE, BRANCHED = "int4 rows", ("int4 rows svd", "int4 rows svd 32")
"""Coarse format, and the same format with full-precision branches.

The coarse format has one scale per output and spares no layer. A careful quantizer avoids it; it loses enough quality
for factors, or factors with a branch, to repair.
"""


def built(model: TextToImageModel, form: Form, calibration: Calibration) -> None:
    """Quantize a model's denoiser in place."""
    assert form.backend is not None
    options: dict[str, Any] = {"svd_rank": form.svd_rank, "group_size": form.group_size}
    trajectories = None
    if form.tune_steps or form.bits_per_weight is not None:
        trajectories = Trajectories.record(calibration)
    if form.gptq:
        moments = list(calibration.moments(**form.selection))
        options["moments"] = moments
        if form.bits_per_weight is not None and trajectories is not None:
            options["bits"] = choose_bits(
                packable(model.denoiser, **form.selection),
                moments,
                trajectories,
                bits_per_weight=form.bits_per_weight,
                group_size=form.group_size,
            )
    elif form.svd_rank:
        options["input_scales"] = calibration.input_scales()
    if BACKENDS[form.backend].activations:
        options["activations"] = calibration.activation_scales()
    quantize_model(model.denoiser, form.backend, **options, **form.selection)
    if form.tune_steps and trajectories is not None:
        tune_scales(trajectories, steps=form.tune_steps)
