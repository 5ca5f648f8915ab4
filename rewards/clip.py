"""Cosines of CLIP's image and text embeddings, which rewards are computed from.

Images are preprocessed without Pillow, and each distinct prompt is embedded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, PreTrainedModel

from diffalign.rewards.base import Metadata, Reward, RewardError
from diffalign.rewards.preprocessing import Preprocessing
from diffalign.rewards.weights import device, loading, revision_of, tower_dtype
from diffalign.types import RewardOutput

MICRO_BATCH = 64
TEXTS = 4096
"""Largest number of cached prompt embeddings."""


class ClipScorer:
    """CLIP model with its tokenizer and its preprocessing."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, preprocessing: Preprocessing | None = None
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing or Preprocessing(
            size=model.config.vision_config.image_size
        )
        self.scale = model.logit_scale.float().exp().item()
        """Factor exp(logit_scale) of the cosines in CLIP's training."""
        self._texts: dict[str, Tensor] = {}

    @classmethod
    @lru_cache(maxsize=4)  # rewards on the same model share it
    def from_pretrained(
        cls,
        model_id: str,
        *,
        revision: str | None = None,
        processor_id: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ClipScorer:
        """Load a model, its tokenizer and its preprocessing.

        Args:
            revision: commit of the weights; None for that in `weights.REVISIONS`.
            processor_id: repository of tokenizer and preprocessing, if it is another one.
            dtype: dtype of the model; None for `tower_dtype`.

        Raises:
            RewardError: the weights are not on this machine and cannot be downloaded.
        """
        processor = processor_id or model_id
        commit = revision_of(model_id, revision)
        where = {"revision": commit if processor_id is None else revision_of(processor_id)}
        with loading(model_id):
            model = CLIPModel.from_pretrained(model_id, revision=commit, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(processor, **where)
            config = CLIPImageProcessor.get_image_processor_dict(processor, **where)[0]
            return cls(model, tokenizer, preprocessing(config)).place(dtype)

    def place(self, dtype: torch.dtype | None = None) -> ClipScorer:
        """Move the model to this process's device, in `dtype` or `tower_dtype`.

        The attribute `scale` was computed in float32 before.
        """
        self.model.to(device(), dtype or tower_dtype())
        return self

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Return embeddings (B, D) float32 of length 1, of images (B, 3, H, W) uint8."""
        return torch.cat([self._embed(self._pixels(part)) for part in images.split(MICRO_BATCH)])

    @torch.no_grad()
    def crop_features(self, crops: Sequence[Tensor]) -> Tensor:
        """Return embeddings (B, D) float32 of length 1, of images of any sizes.

        Args:
            crops: B images (3, H, W) uint8.
        """
        pixels = torch.cat([self._pixels(crop[None]) for crop in crops])
        return torch.cat([self._embed(part) for part in pixels.split(MICRO_BATCH)])

    @torch.no_grad()
    def pooled_features(self, images: Tensor) -> Tensor:
        """Return the vision tower's pooled output (B, W) float32, before the projection.

        Args:
            images: (B, 3, H, W) uint8.
        """
        parts = [self._pixels(part) for part in images.split(MICRO_BATCH)]
        vision = self.model.vision_model
        return torch.cat([vision(pixel_values=p).pooler_output.float() for p in parts])

    def _pixels(self, images: Tensor) -> Tensor:
        return self.preprocessing(images.to(self.model.device)).to(self.model.dtype)

    def _embed(self, pixels: Tensor) -> Tensor:
        return _unit(self.model.get_image_features(pixel_values=pixels).pooler_output)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Return embeddings (B, D) float32 of length 1, of B prompts.

        Prompts are truncated to the model's context.
        """
        new = [p for p in dict.fromkeys(prompts) if p not in self._texts]
        if len(self._texts) + len(new) > TEXTS:
            self._texts, new = {}, list(dict.fromkeys(prompts))
        for start in range(0, len(new), MICRO_BATCH):
            part = new[start : start + MICRO_BATCH]
            tokens = self.tokenizer(
                part,
                padding="max_length",
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.model.device)
            features = _unit(self.model.get_text_features(**tokens).pooler_output)
            self._texts |= dict(zip(part, features, strict=True))
        return torch.stack([self._texts[p] for p in prompts])

    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosines (B,) float32 between each image and its prompt."""
        return (self.image_features(images) * self.text_features(prompts)).sum(-1)


class ClipReward(Reward):
    """Base class of rewards on a CLIP model.

    Subclasses load the model (`load`) and compute raw scores (`raw`).
    """

    needs_prompt: ClassVar[bool] = True

    def __init__(self, scorer: ClipScorer | None = None) -> None:
        self._scorer = scorer

    @property
    def scorer(self) -> ClipScorer:
        if self._scorer is None:
            self._scorer = self.load()
        return self._scorer

    def prepare(self) -> None:
        _ = self.scorer

    def load(self) -> ClipScorer:
        """Load the model that the card names."""
        assert self.card.model_id is not None
        return ClipScorer.from_pretrained(self.card.model_id, revision=self.card.revision)

    def raw(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return raw scores (B,)."""
        raise NotImplementedError

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardOutput:
        return RewardOutput(self.raw(images, prompts).float().cpu().numpy().astype(np.float32))


def preprocessing(config: dict[str, Any]) -> Preprocessing:
    """Return the preprocessing that a preprocessor_config.json of CLIP describes.

    Raises:
        RewardError: the configuration has steps that CLIP does not have.
    """
    size, crop = config.get("size", 224), config.get("crop_size", 224)
    size = size.get("shortest_edge") if isinstance(size, dict) else size
    crop = crop.get("height") if isinstance(crop, dict) else crop
    if not isinstance(size, int) or size != crop or config.get("resample", 3) != 3:
        raise RewardError(f"preprocessing other than CLIP's: {config}")
    return Preprocessing(size, tuple(config["image_mean"]), tuple(config["image_std"]))


def _unit(features: Tensor) -> Tensor:
    features = features.float()
    unit: Tensor = features / features.norm(dim=-1, keepdim=True)
    return unit
