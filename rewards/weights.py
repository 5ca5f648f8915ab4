"""Weights of reward models: of which commit, from a folder or the hub, in which precision, or one clear error."""

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
"""Whose tokenizer and preprocessing models on CLIP ViT-H/14 were trained with."""
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
"""Commits of the hub's repositories that are read: what others push there later changes no number here."""


def revision_of(model_id: str, given: str | None = None) -> str | None:
    """The commit to ask the hub for: the `given` one, else the known one; None for a folder of this machine, which has
    none, and for repositories that are not in REVISIONS."""
    return None if Path(model_id).is_dir() else given or REVISIONS.get(model_id)


def file_of(model_id: str, name: str) -> Path:
    """A file of a folder of this machine, or of a repository of the hub at its known commit."""
    if Path(model_id).is_dir():
        return Path(model_id) / name
    return Path(hf_hub_download(model_id, name, revision=revision_of(model_id)))


def newest(model_id: str) -> str | None:
    """The commit of a repository's newest state (without network: of what was read last); None for a folder."""
    if Path(model_id).is_dir():
        return None
    return Path(hf_hub_download(model_id, "config.json")).parent.name  # .../snapshots/COMMIT/


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


def tower_dtype() -> torch.dtype:
    """Of the large networks: bfloat16 on CUDA. Logit scales, normalisation and heads stay in float32."""
    return torch.bfloat16 if device().type == "cuda" else torch.float32
