"""Weights of reward models: their commits, files, devices and dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download

from diffalign.rewards.base import RewardError

CLIP_L = "openai/clip-vit-large-patch14"
CLIP_L_336 = "openai/clip-vit-large-patch14-336"
LAION_CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Repository of the tokenizer and preprocessing of models on CLIP ViT-H/14."""
REVISIONS = {
    CLIP_L: "32bd64288804d66eefd0ccbe215aa642df71cc41",
    CLIP_L_336: "ce19dc912ca5cd21c8a653c79e251e808ccabcd1",
    LAION_CLIP_H: "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    "yuvalkirstain/PickScore_v1": "a4e4367c6dfa7288a00c550414478f865b875800",
    "xswu/HPSv2": "697403c78157020a1ae59d23f111aa58ced35b0a",
    "zai-org/ImageReward": "5736be03b2652728fb87788c9797b0570450ab72",
    "google-bert/bert-base-uncased": "86b5e0934494bd15c9632b12f734a8a67f723594",
    "MizzenAI/HPSv3": "4f81e3e09edd82fe3c5f636444c721b592a735ca",
    "Qwen/Qwen2-VL-7B-Instruct": "eed13092ef92e448dd6875b2a00151bd3f7db0ac",
    "trl-lib/ddpo-aesthetic-predictor": "cf4bd10345610935a80a5d3be9a3133c50f121e4",
}
"""Pinned commits of repositories on the hub, so that later pushes change no score."""


def revision_of(model_id: str, revision: str | None = None) -> str | None:
    """Return the commit to load from the hub: `revision`, else the one in REVISIONS.

    Return None for a folder on this machine, and for repositories without either.
    """
    return None if Path(model_id).is_dir() else revision or REVISIONS.get(model_id)


def file_of(model_id: str, name: str) -> Path:
    """Return the path of a file in a local folder or a hub repository.

    A hub repository is read at its pinned commit.
    """
    if Path(model_id).is_dir():
        return Path(model_id) / name
    return Path(hf_hub_download(model_id, name, revision=revision_of(model_id)))


def newest(model_id: str) -> str | None:
    """Return the newest commit of a repository, or None for a folder.

    Without a network it is the commit that was read last.
    """
    if Path(model_id).is_dir():
        return None
    # the path ends in snapshots/COMMIT/config.json
    return Path(hf_hub_download(model_id, "config.json")).parent.name


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Convert every error in this block into a RewardError.

    Causes are a missing network or file, and a file that is truncated or of another kind.
    """
    try:
        yield
    except RewardError:
        raise
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        raise RewardError(f"the weights of {what} could not be loaded: {text}") from error


def device() -> torch.device:
    """Return the device that rewards run on: this process's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def tower_dtype() -> torch.dtype:
    """Return the dtype of large networks: bfloat16 on CUDA, else float32.

    Logit scales, normalisation and heads stay in float32.
    """
    return torch.bfloat16 if device().type == "cuda" else torch.float32
