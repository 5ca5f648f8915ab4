"""Log a run to experiment trackers through accelerate (tensorboard, wandb, trackio, ...).

The run folder's own log is written in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL import Image
from torch import Tensor

from diffalign.config import AnyRunConfig, ConfigError, nearest, to_dict
from diffalign.core import processes

PROJECT = "diffalign"


def make_accelerator(config: AnyRunConfig) -> Accelerator:
    """Return the process's accelerator with the configured trackers.

    The trackers are checked here, because accelerate silently ignores trackers that are not installed.

    Raises:
        ConfigError: a tracker is unknown or not installed.
    """
    names = config.training.trackers
    installed = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            hint = nearest(name, list(LOGGER_TYPE_TO_CLASS))
            raise ConfigError(f"training.trackers: accelerate knows no {name!r}{hint}")
        if name not in installed:
            raise ConfigError(f"training.trackers: {name} is not installed (pip install {name})")
    return processes.make_accelerator(log_with=list(names) or None, project_dir=config.output_dir)


def start(accelerator: Accelerator, config: AnyRunConfig) -> None:
    """Open the trackers, with the whole configuration as the run's parameters."""
    if config.training.trackers:
        accelerator.init_trackers(PROJECT, config=dict(_flat(to_dict(config))))


def log(accelerator: Accelerator, row: Mapping[str, Any]) -> None:
    """Send the numbers of a log row to the trackers; its update is the step."""
    values = {k: float(v) for k, v in row.items() if isinstance(v, int | float)}
    evaluation = row.get("evaluation", {})
    scores = {**evaluation.get("means", {}), **evaluation.get("tasks", {})}
    if evaluation.get("win_rate"):
        scores["win_rate"] = evaluation["win_rate"]["rate"]
    values |= {f"evaluation/{name}": score for name, score in scores.items()}
    values |= {name: score for name, score in evaluation.items() if name.startswith("validation/")}
    accelerator.log(values, step=row["update"])


def log_images(accelerator: Accelerator, images: Tensor, *, grid: Image.Image, update: int) -> None:
    """Send sample images to the trackers that accept images.

    Args:
        images: images (N, 3, H, W) uint8.
        grid: one picture of all images, for trackio, which accepts a single picture.
        update: number of the update.
    """
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            if hasattr(tracker, "log_images"):
                pixels = images.permute(0, 2, 3, 1).numpy()
                values = pixels if tracker.name == "tensorboard" else list(pixels)
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": values}, step=update, **options)
            elif tracker.name == "trackio":
                # an optional dependency
                import trackio

                # trackio ignores a list of images with a warning, so it gets the grid
                tracker.log({"samples": trackio.Image(grid)}, step=update)


def finish(accelerator: Accelerator) -> None:
    """Close the trackers, which writes their buffers."""
    if accelerator.trackers:
        accelerator.end_training()


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Flatten a mapping to dotted keys. The values become numbers and texts, as trackers need."""
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, int | float | str | bool)
            rows.append((f"{prefix}{key}", value if plain else str(value)))
    return rows
