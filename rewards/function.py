"""Functions as rewards, and conversion of any reward's return value."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.rewards.base import Metadata, Reward, RewardCard, RewardError
from diffalign.types import RewardOutput

logger = logging.getLogger(__name__)


class FunctionReward(Reward):
    """Reward that calls a function of (images, prompts, metadata).

    The function receives images (B, 3, H, W) uint8 RGB on the CPU or the model's device, B texts, and B mappings, which
    are empty if a prompt file has no metadata. It returns B numbers (a list, an array or a tensor): higher is better,
    and NaN marks an image that it cannot score. The numbers are not normalised; the recipe weights them.
    """

    def __init__(self, function: Callable[..., Any], *, name: str | None = None) -> None:
        self.function = function
        name = name or str(getattr(function, "__name__", type(function).__name__))
        self.card = RewardCard(  # type: ignore[misc]
            name=name,
            description=(inspect.getdoc(function) or "a function of images, prompts and metadata")
            .partition("\n")[0]
            .strip(),
            raw_range=None,
            license="its author's",
        )

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardOutput:
        """Return the function's values for B images; see the class."""
        return as_output(
            self.function(images, prompts, metadata), n=len(prompts), name=self.card.name
        )


def as_output(value: Any, *, n: int, name: str) -> RewardOutput:
    """Convert a reward's return value for n images to a `RewardOutput` of float32.

    Raises:
        RewardShapeError: the value does not consist of n numbers.
    """
    if isinstance(value, RewardOutput):
        values, details = value.values, value.details
    else:
        values, details = value, {}
    columns = {"": _column(values, n=n, name=name)}
    columns |= {k: _column(v, n=n, name=f"{name}/{k}") for k, v in details.items()}
    return RewardOutput(columns.pop(""), columns)


def _column(value: Any, *, n: int, name: str) -> np.ndarray:
    if isinstance(value, Sequence) and any(isinstance(v, Tensor) for v in value):
        value = [v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for v in value]
    if isinstance(value, Tensor):
        value = value.detach().to("cpu", torch.float32).numpy()
    try:
        array = np.asarray(value, np.float32)
    except (TypeError, ValueError) as error:
        raise RewardShapeError(
            f"reward {name!r} returned {type(value).__name__} that is not {n} numbers: {error}"
        ) from error
    if array.shape != (n,):
        kind = type(value).__name__
        raise RewardShapeError(
            f"reward {name!r} returned shape {array.shape} for {n} images (a {kind}); expected one number per image"
        )
    return array


class RewardShapeError(RewardError):
    """Return value of a reward that is not one number per image.

    It is a mistake in the reward's code and occurs for all images.
    """


def as_reward(value: Any, *, name: str) -> Reward:
    """Return an instance of a reward from a class, an instance or a function.

    Raises:
        RewardError: the value is none of these, or its class needs arguments.
    """
    if isinstance(value, Reward):
        return value
    if isinstance(value, type):
        if not issubclass(value, Reward):
            raise RewardError(
                f"reward {name!r}: the class {value.__name__} is no subclass of diffalign.rewards.base.Reward"
            )
        try:
            reward = value()
        # a user's code may raise any error
        except Exception as error:
            raise RewardError(
                f"reward {name!r}: {value.__name__}() raised {type(error).__name__}: {error}"
            ) from error
        if not isinstance(getattr(reward, "card", None), RewardCard):
            text = (inspect.getdoc(value) or value.__name__).partition("\n")[0]
            reward.card = RewardCard(name=value.__name__, description=text)  # type: ignore[misc]
        return reward
    if callable(value):
        return FunctionReward(value, name=name.rpartition(":")[2])
    raise RewardError(
        f"reward {name!r} is a {type(value).__name__}; expected a Reward class, an instance of one or a function "
        "of images, prompts and metadata"
    )


def score_all(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
    *,
    name: str,
) -> tuple[RewardOutput, Exception | None]:
    """Score all images at once, or unit by unit if that fails.

    Returns:
        The scores, and the error that made the reward score its units apart, or None.

    Raises:
        RewardShapeError: the reward returns another number of scores than images, which is a fault of its code.
    """
    try:
        value = reward.score(images, prompts, metadata)
        return as_output(value, n=len(prompts), name=name), None
    except RewardShapeError:
        raise
    except Exception as error:
        return _by_unit(reward, images, prompts, metadata), error


def _by_unit(
    reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> RewardOutput:
    """Score each unit of the reward alone, with NaN for those that fail."""
    parts, order = [], []
    for rows in reward.units(prompts):
        order += rows
        texts, entries = [prompts[i] for i in rows], [metadata[i] for i in rows]
        try:
            value = reward.score(images[rows], texts, entries)
            parts.append(as_output(value, n=len(rows), name=reward.card.name))
        except Exception as error:
            logger.debug("images %s: %s", rows, error)
            parts.append(RewardOutput(np.full(len(rows), np.nan, np.float32)))
    output, back = RewardOutput.cat(parts), np.argsort(order)
    return RewardOutput(output.values[back], {k: v[back] for k, v in output.details.items()})
