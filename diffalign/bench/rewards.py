"""How fast images are scored, and how much of it is preprocessing: ours on tensors, and the original processors on
Pillow images. Random weights: tiny on a CPU, of the published sizes on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    PreTrainedTokenizerBase,
    SwinConfig,
)

from diffalign.bench.record import BenchOptions
from diffalign.rewards.aesthetic import AestheticHead, AestheticReward
from diffalign.rewards.base import Reward
from diffalign.rewards.clip import ClipScorer
from diffalign.rewards.clip_score import ClipScoreReward
from diffalign.rewards.geneval import GenEvalReward
from diffalign.rewards.hpsv2 import HPSv21Reward
from diffalign.rewards.image_reward import ImageReward, ImageRewardModel
from diffalign.rewards.jpeg import JpegReward
from diffalign.rewards.mask2former import ObjectDetector
from diffalign.rewards.ocr import OcrReward
from diffalign.rewards.pickscore import PickScoreReward
from diffalign.rewards.preprocessing import LetterboxPreprocessing
from diffalign.rewards.weights import device
from diffalign.shapes.text import build_clip_tokenizer

SIZE = 512
"""Pixels per side of the images."""


@dataclass(frozen=True)
class Sizes:
    """Widths, layers and heads of the towers; `patch` pixels."""

    vision: tuple[int, int, int]
    text: tuple[int, int, int]
    patch: int
    projection: int


PUBLISHED = {
    "vit_l": Sizes((1024, 24, 16), (768, 12, 12), 14, 768),
    "vit_h": Sizes((1280, 32, 16), (1024, 24, 16), 14, 1024),
    "blip": Sizes((1024, 24, 16), (768, 12, 12), 16, 256),
}
TINY = dict.fromkeys(PUBLISHED, Sizes((64, 2, 2), (48, 2, 2), 28, 32))
SWIN = {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]}
TINY_SWIN = {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
PUBLISHED_SIZE = "pickscore of the published size"
SLOW = {"geneval": 4, "ocr": 4, PUBLISHED_SIZE: 8}
"""Arms that get so many times fewer images."""
PROMPT: dict[str, Any] = {
    "prompt": 'a photo of a red car with "HELLO"',
    "tag": "colors",
    "include": [{"class": "car", "count": 1, "color": "red"}],
}


def clip_model(sizes: Sizes, tokenizer: PreTrainedTokenizerBase) -> CLIPModel:
    """A CLIP of these sizes for 224 pixels, random."""

    def tower(numbers: tuple[int, int, int]) -> dict[str, int]:
        width, layers, heads = numbers
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        }

    text = {**tower(sizes.text), "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    config = CLIPConfig(
        projection_dim=sizes.projection,
        vision_config={**tower(sizes.vision), "image_size": 224, "patch_size": sizes.patch},
        text_config={**text, "eos_token_id": tokenizer.eos_token_id},
    )
    return CLIPModel(config)


def blip_model(sizes: Sizes, tokenizer: PreTrainedTokenizerBase) -> ImageRewardModel:
    """ImageReward's BLIP of these sizes, random."""
    (width, layers, heads), (text_width, text_layers, text_heads) = sizes.vision, sizes.text
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=224,
        patch_size=sizes.patch,
    )
    text = BlipTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=text_width,
        encoder_hidden_size=width,
        intermediate_size=4 * text_width,
        num_hidden_layers=text_layers,
        num_attention_heads=text_heads,
        bos_token_id=None,
        sep_token_id=None,
    )
    return ImageRewardModel(vision, text).eval().requires_grad_(False)


def detector(*, real: bool) -> Mask2FormerForUniversalSegmentation:
    """GenEval's detector, random."""
    backbone = SwinConfig(
        **(SWIN if real else TINY_SWIN),
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    small = {} if real else {"hidden_dim": 64, "feature_size": 64, "mask_feature_size": 64}
    layers = {} if real else {"encoder_layers": 1, "decoder_layers": 2, "dim_feedforward": 128}
    return Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=backbone, num_labels=80, **small, **layers)
    )


def builders(*, real: bool) -> dict[str, Callable[[], Reward]]:
    """What makes each reward, with random weights of its own kind."""
    tokenizer = build_clip_tokenizer()
    sizes = PUBLISHED if real else TINY
    where = device()

    def scorer(kind: str, preprocessing: Any = None) -> ClipScorer:
        return ClipScorer(clip_model(sizes[kind], tokenizer).to(where), tokenizer, preprocessing)

    def aesthetic() -> Reward:
        head = AestheticHead(sizes["vit_l"].projection).to(where).requires_grad_(False)
        return AestheticReward(scorer("vit_l"), head)

    return {
        "jpeg": JpegReward,
        "ocr": OcrReward,
        "clip_score": lambda: ClipScoreReward(scorer("vit_l")),
        "aesthetic": aesthetic,
        "pickscore": lambda: PickScoreReward(scorer("vit_h")),
        PUBLISHED_SIZE: lambda: PickScoreReward(
            ClipScorer(clip_model(PUBLISHED["vit_h"], tokenizer).to(where), tokenizer)
        ),
        "hpsv2.1": lambda: HPSv21Reward(scorer("vit_h", LetterboxPreprocessing())),
        "image_reward": lambda: ImageReward(
            blip_model(sizes["blip"], tokenizer).to(where), tokenizer
        ),
        "geneval": lambda: GenEvalReward(
            ObjectDetector(detector(real=real).to(where)), scorer("vit_l")
        ),
    }


def run(options: BenchOptions) -> dict[str, Any]:
    """Images a second of every reward; of those on CLIP and of the detector, preprocessing beside the original's."""
    real = torch.cuda.is_available()
    n, repeats = (8, 3) if options.quick else (32, 5)
    values = np.random.default_rng(0).integers(0, 256, (n, 3, SIZE, SIZE), dtype=np.uint8)
    images = torch.from_numpy(values).to(device())
    known = builders(real=real)
    if options.quick and options.arms is None:
        known.pop(PUBLISHED_SIZE)  # minutes on a CPU
    arms = {}
    for name in options.chosen(known):
        part = images[: max(2, n // SLOW.get(name, 1))]
        arms[name] = measure(known[name], part, repeats)
    headline = {
        f"preprocessing_share_{name}": arm["share"] for name, arm in arms.items() if "share" in arm
    }
    return {
        "headline": headline,
        "weights": "published sizes, random" if real else "tiny, random",
        "images": n,
        "pixels": SIZE,
        "arms": arms,
    }


def measure(make: Callable[[], Reward], images: Tensor, repeats: int) -> dict[str, Any]:
    """One reward, alone in memory."""
    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    reward = make()
    reward.prepare()
    seconds = timed(partial(score, reward, images), repeats)
    found: dict[str, Any] = {"images_per_second": round(len(images) / seconds, 2)}
    if torch.cuda.is_available():
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found | preprocessing(reward, images, seconds, repeats)


def score(reward: Reward, images: Tensor) -> None:
    """One batch, for a prompt that every reward can score."""
    reward.score(images, [PROMPT["prompt"]] * len(images), [PROMPT] * len(images))


def preprocessing(reward: Reward, images: Tensor, total: float, repeats: int) -> dict[str, float]:
    """Seconds of preprocessing, its share of the whole, and how much longer the original processor takes from the same
    tensors; nothing for rewards without one."""
    if isinstance(reward, GenEvalReward):
        assert reward._detector is not None
        ours: Callable[[Tensor], Any] = reward._detector.preprocessing
        original: Any = Mask2FormerImageProcessorPil(
            size={"shortest_edge": 800, "longest_edge": 1333}
        )
    elif isinstance(reward, ClipScoreReward | PickScoreReward | AestheticReward):
        ours, original = reward.scorer.preprocessing, CLIPImageProcessorPil()
    else:
        return {}
    seconds = timed(lambda: ours(images), repeats)
    before = timed(lambda: original(images=pictures(images), return_tensors="np"), repeats)
    return {
        "preprocessing_seconds": round(seconds, 4),
        "share": round(seconds / total, 3),
        "original_over_ours": round(before / seconds, 2),
    }


def pictures(images: Tensor) -> Sequence[Image.Image]:
    """What a processor on Pillow has to be given."""
    return [Image.fromarray(x) for x in images.permute(0, 2, 3, 1).cpu().numpy()]


def timed(work: Callable[[], Any], repeats: int) -> float:
    """Median seconds after one round that is not counted."""
    found = []
    for _ in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return median(found[1:])
