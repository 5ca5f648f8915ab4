"""Weights of reward models: from a folder or the hub, onto this process's device, or one clear error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffalign.rewards.base import RewardError

LAION_CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Whose tokenizer and preprocessing models on CLIP ViT-H/14 were trained with."""


@contextmanager
def loading(what: str) -> Iterator[None]:
    """RewardError for anything that goes wrong inside: no network, no such file, a file that is cut or of another
    kind."""
    try:
        yield
    except RewardError:
        raise
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        raise RewardError(f"the weights of {what} could not be loaded: {text}") from error


def device() -> torch.device:
    """Where rewards are computed: this process's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
