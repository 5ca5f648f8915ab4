"""ImageReward v1.0 (Xu et al. 2023): a small head on BLIP's text encoder.

The text encoder attends to the image. The released checkpoint has BLIP's own layout (timm's names for the image tower)
and is converted to transformers' BLIP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BlipTextConfig,
    BlipVisionConfig,
    BlipVisionModel,
    PreTrainedTokenizerBase,
)
from transformers.models.blip.modeling_blip_text import BlipTextModel

from diffalign.rewards.aesthetic import AestheticHead
from diffalign.rewards.base import Metadata, Reward, RewardCard, RewardError
from diffalign.rewards.preprocessing import Preprocessing
from diffalign.rewards.weights import (
    REVISIONS,
    device,
    file_of,
    loading,
    revision_of,
    tower_dtype,
)
from diffalign.types import RewardOutput

MODEL_ID, FILE = "zai-org/ImageReward", "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the head's output on the authors' validation set.

Scores are therefore about standard normal.
"""
MAX_LENGTH = 35
VISION_HEADS, TEXT_HEADS = 16, 12
MICRO_BATCH = 32
_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)\.(weight|bias)$")
BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}


class ImageRewardModel(nn.Module):
    """BLIP's image tower and text encoder, with a head on the first token.

    The text encoder attends to the image.
    """

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        # the head has the same layers, including dropouts
        self.head = AestheticHead(text.hidden_size)

    def forward(self, pixels: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        """Return scores (B,); the head computes in float32.

        Args:
            pixels: (B, 3, 224, 224), normalised.
            tokens: B tokenised prompts.
        """
        seen = self.vision(pixel_values=pixels.to(self.vision.dtype)).last_hidden_state
        x = self.text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], device=seen.device, dtype=torch.long),
        ).last_hidden_state[:, 0]
        scores: Tensor = (self.head(x.float()) - MEAN) / STD
        return scores

    def place(self, dtype: torch.dtype | None = None) -> ImageRewardModel:
        """Move the model to this process's device, its towers in `dtype` or `tower_dtype`."""
        for tower in (self.vision, self.text):
            tower.to(dtype or tower_dtype())
        return self.to(device())


class ImageReward(Reward):
    """ImageReward's raw score, about -2 to 2."""

    needs_prompt = True
    card = RewardCard(
        name="image_reward",
        description="ImageReward v1.0, about standard normal",
        model_id=MODEL_ID,
        revision=REVISIONS[MODEL_ID],
        auxiliary={TOKENIZER: REVISIONS[TOKENIZER]},
        input_size=224,
        raw_range=(-3.0, 3.0),
        license="Apache-2.0",
    )

    def __init__(
        self,
        model: ImageRewardModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer

    def prepare(self) -> None:
        if self._model is not None:
            return
        with loading(f"{MODEL_ID}/{FILE}"):
            state = torch.load(file_of(MODEL_ID, FILE), map_location="cpu", weights_only=True)
            self._tokenizer = AutoTokenizer.from_pretrained(
                TOKENIZER, revision=revision_of(TOKENIZER)
            )
            self._model = build(state).place()

    @torch.no_grad()
    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardOutput:
        self.prepare()
        model, tokenizer = self._model, self._tokenizer
        assert model is not None
        assert tokenizer is not None
        where = next(model.parameters()).device
        preprocess = Preprocessing(model.vision.config.image_size)
        scores = []
        for start in range(0, len(prompts), MICRO_BATCH):
            part = slice(start, start + MICRO_BATCH)
            tokens = tokenizer(
                list(prompts[part]),
                padding="max_length",
                truncation=True,
                max_length=MAX_LENGTH,
                return_tensors="pt",
            ).to(where)
            scores.append(model(preprocess(images[part].to(where)), tokens))
        return RewardOutput(torch.cat(scores).cpu().numpy())


def build(
    state: Mapping[str, Tensor], *, vision_heads: int = VISION_HEADS, text_heads: int = TEXT_HEADS
) -> ImageRewardModel:
    """Build the model from the released tensors.

    All sizes but the numbers of heads follow from the tensors.

    Raises:
        RewardError: tensors are missing, or do not belong to ImageReward.
    """
    converted = convert_names(state)
    # random initial weights would be replaced
    with init_empty_weights(include_buffers=False):
        model = ImageRewardModel(*_configs(converted, vision_heads, text_heads))
    model.load_state_dict(converted, strict=True, assign=True)
    return model.float().eval().requires_grad_(False)


def convert_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the release's names to those of transformers; drop tensors of BLIP's training."""
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("blip.visual_encoder."):
            converted[f"vision.{_vision_name(name.removeprefix('blip.visual_encoder.'))}"] = value
        elif name.startswith("blip.text_encoder."):
            rest = name.removeprefix("blip.text_encoder.")
            if not rest.endswith("position_ids"):  # a buffer
                converted[f"text.{rest}"] = value
        elif name.startswith("mlp.layers."):
            converted[f"head.{name.removeprefix('mlp.')}"] = value
        elif not name.startswith("blip."):
            raise RewardError(f"{name} is no tensor of ImageReward")
    return converted


def _vision_name(name: str) -> str:
    if name in VISION:
        return VISION[name]
    match = _BLOCK.match(name)
    if match is None or match[2] not in BLOCK:
        raise RewardError(f"blip.visual_encoder.{name} is no tensor of ImageReward")
    return f"encoder.layers.{match[1]}.{BLOCK[match[2]]}.{match[3]}"


def _configs(
    state: Mapping[str, Tensor], vision_heads: int, text_heads: int
) -> tuple[BlipVisionConfig, BlipTextConfig]:
    def layers(pattern: str) -> int:
        return sum(bool(re.fullmatch(pattern, name)) for name in state)

    try:
        patch = state["vision.embeddings.patch_embedding.weight"]
        places = state["vision.embeddings.position_embedding"].shape[1]
        words = state["text.embeddings.word_embeddings.weight"]
        cross = state["text.encoder.layer.0.crossattention.self.key.weight"]
        sizes: dict[str, Any] = {
            "vision": len(state["vision.encoder.layers.0.mlp.fc1.weight"]),
            "text": len(state["text.encoder.layer.0.intermediate.dense.weight"]),
            "positions": len(state["text.embeddings.position_embeddings.weight"]),
        }
    except KeyError as error:
        raise RewardError(f"the checkpoint of ImageReward lacks {error}") from error
    vision = BlipVisionConfig(
        hidden_size=len(patch),
        intermediate_size=sizes["vision"],
        num_hidden_layers=layers(r"vision\.encoder\.layers\.\d+\.mlp\.fc1\.weight"),
        num_attention_heads=vision_heads,
        image_size=patch.shape[-1] * round((places - 1) ** 0.5),
        patch_size=patch.shape[-1],
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=len(words),
        hidden_size=words.shape[1],
        encoder_hidden_size=cross.shape[1],
        intermediate_size=sizes["text"],
        num_hidden_layers=layers(r"text\.encoder\.layer\.\d+\.intermediate\.dense\.weight"),
        num_attention_heads=text_heads,
        max_position_embeddings=sizes["positions"],
        layer_norm_eps=1e-12,
        bos_token_id=None,
        sep_token_id=None,
    )
    return vision, text
