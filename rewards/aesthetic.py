"""LAION's aesthetic predictor v2 (Schuhmann 2022): a small head on CLIP ViT-L/14 image embeddings; 1 to 10."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from diffalign.rewards.base import RewardCard
from diffalign.rewards.clip import ClipReward, ClipScorer
from diffalign.rewards.weights import CLIP_L, REVISIONS, device, file_of, loading

HEAD_ID, HEAD_FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"


class AestheticHead(nn.Module):
    """Head `sac+logos+ava1-l14-linearMSE`: linear layers with dropout and no activation."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        sizes = (width, 1024, 128, 64, 16, 1)
        parts: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(sizes)):
            parts.append(nn.Linear(a, b))
            if i < 3:  # the released indices count dropouts, which do nothing here
                parts.append(nn.Identity())
        self.layers = nn.Sequential(*parts)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return scores (B,) of embeddings (B, D) of length 1."""
        scores: Tensor = self.layers(embeddings)
        return scores.squeeze(-1)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> AestheticHead:
        """Build the head from the released tensors `layers.N.weight` and `layers.N.bias`."""
        head = cls(width=state["layers.0.weight"].shape[1])
        head.load_state_dict(dict(state))
        return head.eval().requires_grad_(False)


class AestheticReward(ClipReward):
    """Aesthetic score of an image, independent of its prompt.

    The head's weights are those that TRL's DDPO used.
    """

    needs_prompt = False
    card = RewardCard(
        name="aesthetic",
        description="LAION aesthetic predictor v2, 1 - 10",
        model_id=CLIP_L,
        revision=REVISIONS[CLIP_L],
        auxiliary={HEAD_ID: REVISIONS[HEAD_ID]},
        input_size=224,
        raw_range=(1.0, 10.0),
        scale=1 / 10,
        license="Apache-2.0 (head), MIT (CLIP)",
    )

    def __init__(self, scorer: ClipScorer | None = None, head: AestheticHead | None = None) -> None:
        super().__init__(scorer)
        self._head = head

    @property
    def head(self) -> AestheticHead:
        if self._head is None:
            with loading(f"{HEAD_ID}/{HEAD_FILE}"):
                path = file_of(HEAD_ID, HEAD_FILE)
                state = torch.load(path, map_location="cpu", weights_only=True)
                self._head = AestheticHead.from_state(state).to(device())
        return self._head

    def prepare(self) -> None:
        super().prepare()
        _ = self.head

    @torch.no_grad()
    def raw(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores: Tensor = self.head(self.scorer.image_features(images))
        return scores
