"""Reward models with random weights for measurements: tiny, or of the published sizes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    SwinConfig,
)

from diffalign.rewards import hpsv3, vlm_judge
from diffalign.rewards.aesthetic import AestheticHead, AestheticReward
from diffalign.rewards.base import Reward
from diffalign.rewards.clip import ClipReward, ClipScorer
from diffalign.rewards.clip_iqa import ClipIqaReward
from diffalign.rewards.clip_score import ClipScoreReward
from diffalign.rewards.flatness import FlatnessReward
from diffalign.rewards.geneval import GenEvalCompatReward, GenEvalReward
from diffalign.rewards.hpsv2 import HPSv2Reward, HPSv21Reward
from diffalign.rewards.hpsv3 import HPSv3Reward
from diffalign.rewards.image_reward import ImageReward, ImageRewardModel
from diffalign.rewards.jpeg import JpegReward
from diffalign.rewards.mask2former import ObjectDetector
from diffalign.rewards.ocr import OcrReward
from diffalign.rewards.pickscore import PickScoreReward
from diffalign.rewards.preprocessing import LetterboxPreprocessing
from diffalign.rewards.shapes_clip import ShapesClipReward
from diffalign.rewards.verifier import VerifierReward
from diffalign.rewards.vlm_judge import VlmJudgeReward
from diffalign.rewards.weights import device, tower_dtype
from diffalign.shapes.text import build_clip_tokenizer


@dataclass(frozen=True)
class Sizes:
    """Sizes of a reward model's towers.

    Attributes:
        vision: width, layers and heads of the image tower.
        text: width, layers and heads of the text tower.
        patch: pixels per side of a patch.
        projection: width of the common embedding.
    """

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
QWEN = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584},
}
TINY_QWEN = {
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
}
QWEN_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def clip_model(sizes: Sizes, tokenizer: PreTrainedTokenizerBase) -> CLIPModel:
    """Build a random CLIP of these sizes for 224 pixels."""

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
    """Build a random BLIP of ImageReward with these sizes."""
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
    """Build GenEval's detector with random weights."""
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


def qwen_tokenizer() -> PreTrainedTokenizerBase:
    """Build a tokenizer from the words of HPSv3's questionnaire and Qwen's special tokens.

    It makes about as many tokens as Qwen's own tokenizer.
    """
    words = dict.fromkeys(re.findall(r"\w+|[^\w\s]+", hpsv3.QUESTIONNAIRE))
    vocabulary = {word: i for i, word in enumerate(["<|endoftext|>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN_SPECIAL)})
    return hpsv3.with_reward_token(tokenizer)


def qwen_model(tokenizer: PreTrainedTokenizerBase, *, real: bool) -> hpsv3.RewardModel:
    """Build HPSv3's Qwen2-VL with random weights."""
    sizes = QWEN if real else TINY_QWEN
    text = sizes["text_config"]
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    config = Qwen2VLConfig(
        text_config={
            **text,
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "mrope_section": sections},
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config=sizes["vision_config"],
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
    )
    with device():
        model = hpsv3.RewardModel(config)
    model.base.to(tower_dtype())
    return model.eval().requires_grad_(False)


class Judge(BaseHTTPRequestHandler):
    """Stub of a vision-language model that answers at once, to time only the request path."""

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "judge"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._answer({"choices": [{"message": {"content": "Score: 7"}}]})

    def _answer(self, message: Any) -> None:
        content = json.dumps(message).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Suppress the log line of a request."""


def judged() -> Reward:
    """Start a judge on loopback for this process and return `vlm_judge` for it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    Thread(target=server.serve_forever, daemon=True).start()
    os.environ[vlm_judge.URL] = f"http://127.0.0.1:{server.server_port}/v1"
    os.environ[vlm_judge.MODEL] = "judge"
    return VlmJudgeReward()


PUBLISHED_SIZE = "pickscore of the published size"


def builders(*, real: bool) -> dict[str, Callable[[], Reward]]:
    """Return the builders of all registered rewards, by name.

    The weights are random and in this device's precision.
    """
    tokenizer = build_clip_tokenizer()
    sizes = PUBLISHED if real else TINY

    def scorer(kind: Sizes, preprocessing: Any = None) -> ClipScorer:
        return ClipScorer(clip_model(kind, tokenizer), tokenizer, preprocessing).place()

    def on_clip(reward: type[ClipReward], kind: str, preprocessing: Any = None) -> Any:
        return lambda: reward(scorer(sizes[kind], preprocessing))

    def aesthetic() -> Reward:
        head = AestheticHead(sizes["vit_l"].projection).to(device()).requires_grad_(False)
        return AestheticReward(scorer(sizes["vit_l"]), head)

    def geneval(reward: type[GenEvalReward]) -> Any:
        def make() -> Reward:
            model = detector(real=real).to(device())
            return reward(ObjectDetector(model, dtype=tower_dtype()), scorer(sizes["vit_l"]))

        return make

    def hps3() -> Reward:
        words = qwen_tokenizer()
        return HPSv3Reward(qwen_model(words, real=real), words)

    return {
        "verifier": VerifierReward,
        "flatness": FlatnessReward,
        "shapes_clip": ShapesClipReward,
        "jpeg": JpegReward,
        "ocr": OcrReward,
        "clip_score": on_clip(ClipScoreReward, "vit_l"),
        "clip_iqa": on_clip(ClipIqaReward, "vit_l"),
        "aesthetic": aesthetic,
        "pickscore": on_clip(PickScoreReward, "vit_h"),
        PUBLISHED_SIZE: lambda: PickScoreReward(scorer(PUBLISHED["vit_h"])),
        "hpsv2": on_clip(HPSv2Reward, "vit_h", LetterboxPreprocessing()),
        "hpsv2.1": on_clip(HPSv21Reward, "vit_h", LetterboxPreprocessing()),
        "image_reward": lambda: ImageReward(
            blip_model(sizes["blip"], tokenizer).place(), tokenizer
        ),
        "hpsv3": hps3,
        "vlm_judge": judged,
        "geneval": geneval(GenEvalReward),
        "geneval_compat": geneval(GenEvalCompatReward),
    }
