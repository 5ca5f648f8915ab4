"""Registry of stages by name, in the usual order.

Entries are strings until one is used, so that a recipe is read without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffalign.config import ConfigError, nearest
from diffalign.config.methods import imported

if TYPE_CHECKING:
    from diffalign.composition.stage import Stage

STAGES = {
    name: f"diffalign.composition.stages.{name}:STAGE"
    for name in ("dcgen", "align", "distill", "quantize", "qsched", "accelerate")
}


def stage_class(name: str) -> type[Stage]:
    """Return the class of a stage.

    Raises:
        ConfigError: no stage has this name.
    """
    if name not in STAGES:
        raise ConfigError(
            f"there is no such stage{nearest(name, list(STAGES))}", setting=f"stages.{name}"
        )
    kind: type[Stage] = imported(STAGES[name])
    return kind
