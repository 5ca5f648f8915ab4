"""Human Preference Score v3 (Ma et al. 2025).

Qwen2-VL-7B reads a questionnaire about an image, and a head on one token predicts mean and variance of the score. The
file `hpsv3.txt` is the exact questionnaire that the weights were trained with (MizzenAI/HPSv3, MIT). Images are resized
to about 200,704 pixels in multiples of 28, as in the release. Only transformers is needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

from diffalign.judges.local import plain
from diffalign.rewards.base import Metadata, Reward, RewardCard, RewardError
from diffalign.rewards.preprocessing import Preprocessing, resize
from diffalign.rewards.weights import (
    REVISIONS,
    device,
    file_of,
    loading,
    revision_of,
    tower_dtype,
)
from diffalign.types import RewardOutput

MODEL_ID, FILE = "MizzenAI/HPSv3", "HPSv3.safetensors"
BASE = "Qwen/Qwen2-VL-7B-Instruct"
QUESTIONNAIRE = Path(__file__).with_name("hpsv3.txt").read_text(encoding="utf-8")
REWARD_TOKEN, IMAGE_TOKEN = "<|Reward|>", "<|image_pad|>"
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|>{image}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)
HEAD = (1024, 16)
MICRO_BATCH = 8


class RewardModel(nn.Module):
    """Qwen2-VL with a float32 head on the reward token instead of its vocabulary head."""

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        self.base = Qwen2VLModel(config)
        width = config.text_config.hidden_size
        self.head = nn.Sequential(
            nn.Linear(width, HEAD[0]),
            nn.ReLU(),
            # a dropout in training
            nn.Identity(),
            nn.Linear(*HEAD),
            nn.ReLU(),
            nn.Linear(HEAD[1], 2),
        )

    def forward(self, inputs: Mapping[str, Tensor], reward_token: int) -> Tensor:
        """Return mean and logarithm of the variance, (B, 2)."""
        hidden = self.base(**inputs).last_hidden_state
        output: Tensor = self.head(hidden[inputs["input_ids"] == reward_token].float())
        return output


class HPSv3Reward(Reward):
    """Mean of HPSv3's score, which is unbounded and 0 to 12 for ordinary images."""

    needs_prompt = True
    card = RewardCard(
        name="hpsv3",
        description="mean of HPS v3, about 0 - 12",
        model_id=MODEL_ID,
        revision=REVISIONS[MODEL_ID],
        auxiliary={BASE: REVISIONS[BASE]},
        input_size=448,
        raw_range=(-10.0, 15.0),
        scale=1 / 10,
        license="MIT (code), Apache-2.0 (weights)",
    )

    def __init__(
        self,
        model: RewardModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer

    def prepare(self) -> None:
        if self._model is not None:
            return
        with loading(f"{MODEL_ID}/{FILE}"):
            where = {"revision": revision_of(BASE)}
            config = Qwen2VLConfig.from_pretrained(BASE, **where)
            self._tokenizer = with_reward_token(AutoTokenizer.from_pretrained(BASE, **where))
            self._model = build(config, load_file(file_of(MODEL_ID, FILE)), tower_dtype())

    @torch.no_grad()
    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardOutput:
        self.prepare()
        model, tokenizer = self._model, self._tokenizer
        assert model is not None
        assert tokenizer is not None
        where = next(model.parameters()).device
        token = tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        means = []
        for start in range(0, len(prompts), MICRO_BATCH):
            part = slice(start, start + MICRO_BATCH)
            inputs = encode(tokenizer, model.base.config, images[part].to(where), prompts[part])
            inputs["pixel_values"] = inputs["pixel_values"].to(model.base.dtype)
            means.append(model({k: v.to(where) for k, v in inputs.items()}, token)[:, 0])
        return RewardOutput(torch.cat(means).cpu().numpy())


def with_reward_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Add the token that the head reads to a tokenizer, and return the tokenizer."""
    tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
    tokenizer.padding_side = "right"
    return tokenizer


def build(config: Qwen2VLConfig, state: Mapping[str, Tensor], dtype: torch.dtype) -> RewardModel:
    """Build the model from the released tensors.

    Their names are those of several versions of transformers.

    Raises:
        RewardError: tensors are missing, or do not belong to HPSv3.
    """
    renamed = {}
    for name, value in state.items():
        if name.startswith("lm_head."):
            continue
        new = re.sub(r"^(model\.)?visual\.", "base.visual.", name)
        new = re.sub(r"^model\.(language_model\.)?", "base.language_model.", new)
        new = re.sub(r"^rm_head\.", "head.", new)
        if not new.startswith(("base.", "head.")):
            raise RewardError(f"{name} is no tensor of HPSv3")
        renamed[new] = value
    words = renamed.get("base.language_model.embed_tokens.weight")
    if words is None:
        raise RewardError("the checkpoint of HPSv3 has no embeddings of tokens")
    # the reward token has enlarged the vocabulary
    config.text_config.vocab_size = len(words)
    # initialising seven billion random numbers would take minutes and 28 GB
    with torch.device("meta"):
        model = RewardModel(config)
    missing, unexpected = model.load_state_dict(renamed, strict=False, assign=True)
    if missing or unexpected:
        raise RewardError(
            f"the checkpoint of HPSv3 lacks {missing[:3]} or has too many tensors: {unexpected[:3]}"
        )
    # these tensors are computed, not stored
    base = model.base
    base.language_model.rotary_emb = type(base.language_model.rotary_emb)(config.text_config)
    base.visual.rotary_pos_emb = type(base.visual.rotary_pos_emb)(config.vision_config)
    left = [name for name, x in model.named_buffers() if x.is_meta]
    assert not left, left
    base.to(dtype)
    model.head.float()
    return model.eval().requires_grad_(False).to(device())


def encode(
    tokenizer: PreTrainedTokenizerBase,
    config: Qwen2VLConfig,
    images: Tensor,
    prompts: Sequence[str],
) -> dict[str, Tensor]:
    """Return the inputs of Qwen2-VL: the questionnaire's tokens and the images' patches."""
    vision = config.vision_config
    pixels, grid = picture(images, vision)
    pads = IMAGE_TOKEN * (grid[0] * grid[1] // vision.spatial_merge_size**2)
    captions = [plain(tokenizer, p) for p in prompts]
    texts = [CHAT.format(image=pads, text=QUESTIONNAIRE.format(text_prompt=c)) for c in captions]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return {
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
        "mm_token_type_ids": (tokens["input_ids"] == image_token).int(),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, *grid]] * len(prompts)),
    }


def picture(images: Tensor, vision: Qwen2VLVisionConfig) -> tuple[Tensor, tuple[int, int]]:
    """Return the patches of images, and the grid (rows, columns) of each image.

    Args:
        images: (B, 3, H, W) uint8.

    Returns:
        Patches (B * rows * columns, values per patch), and the grid.
    """
    unit = vision.patch_size * vision.spatial_merge_size
    height, width = resized(*images.shape[-2:], unit=unit)
    pixels = Preprocessing().normalize(resize(images, height, width).float() / 255)
    rows = patches(pixels, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    return rows, (height // vision.patch_size, width // vision.patch_size)


def resized(height: int, width: int, *, unit: int) -> tuple[int, int]:
    """Return height and width in multiples of `unit`, close to the image's proportions.

    Their product is about 256 units squared.

    Raises:
        RewardError: one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise RewardError(f"an image of {height} x {width} is too narrow for HPSv3")
    pixels = 256 * unit * unit
    h, w = (max(unit, round(side / unit) * unit) for side in (height, width))
    if h * w > pixels:
        shrink = math.sqrt(height * width / pixels)
        h, w = (max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width))
    elif h * w < pixels:
        grow = math.sqrt(pixels / (height * width))
        h, w = (math.ceil(side * grow / unit) * unit for side in (height, width))
    return h, w


def patches(pixels: Tensor, size: int, merge: int, frames: int) -> Tensor:
    """Cut images into patches, in square groups of `merge`^2 patches.

    Every image is repeated for `frames` frames.

    Args:
        pixels: (B, 3, H, W).

    Returns:
        Patches (B * H/size * W/size, 3 * frames * size^2).
    """
    b, c, h, w = pixels.shape
    rows, columns = h // size // merge, w // size // merge
    x = pixels.view(b, c, rows, merge, size, columns, merge, size)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # B, rows, columns, merge, merge, C, size, size
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, frames, -1, -1)
    return x.reshape(b * rows * columns * merge**2, c * frames * size**2)
