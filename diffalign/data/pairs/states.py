"""Recorded sampler states of a model's own images, in files beside the images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffalign.core.files import aside
from diffalign.data.pairs.tables import PairsError


@dataclass(frozen=True)
class RecordedStates:
    """Recorded states of one image, in the sampler's own dtype, so that nothing is rounded.

    Attributes:
        latents: (C, H, W), clean.
        states: (K, C, H, W), at rising timesteps.
        timesteps: (K,).
        made_by: weights and settings that generated the image.
        reference_error: (K,), the model's error at the states, for the target that leads straight to the latents; None
            if the image was generated with guidance.
    """

    latents: Tensor
    states: Tensor
    timesteps: Tensor
    made_by: dict[str, str]
    reference_error: Tensor | None = None


def states_path(image: Path) -> Path:
    """Return the path of an image's states in GenEval's layout."""
    return image.parent.parent / "states" / f"{image.stem}.safetensors"


def has_states(image: Path | bytes) -> bool:
    """Return True if an image has a file of recorded states."""
    return isinstance(image, Path) and states_path(image).is_file()


def write_states(image: Path, recorded: RecordedStates) -> None:
    """Write the states of an image atomically."""
    place = states_path(image)
    place.parent.mkdir(exist_ok=True)
    columns = {k: v.contiguous() for k, v in vars(recorded).items() if isinstance(v, Tensor)}
    with aside(place) as file:
        save_file(columns, file, metadata=recorded.made_by)


def read_states(image: Path | bytes) -> RecordedStates:
    """Read the recorded states of an image.

    Raises:
        PairsError: the image has no file of states, or the file is damaged.
    """
    name = str(image) if isinstance(image, Path) else "an image in a table"
    place = states_path(image) if isinstance(image, Path) else None
    if place is None or not place.is_file():
        raise PairsError(
            f"pairs.inversion.solver: recorded, and there are no states of {name}: `diffalign pairs` records "
            "them while it draws (record_states); images without them are inverted with fireflow (flows) or midpoint"
        )
    try:
        with safe_open(place, framework="pt") as file:
            columns = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            return RecordedStates(**columns, made_by=dict(file.metadata() or {}))
    except (OSError, SafetensorError, TypeError) as error:
        raise PairsError(
            f"{place} is damaged ({error}): delete it, and the same `diffalign pairs` draws its image again"
        ) from error
