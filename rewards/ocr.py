"""Rendering of the prompt's text in the image, read by PP-OCR.

The library rapidocr has the models in its wheel.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from diffalign.rewards.base import Metadata, Reward, RewardCard, RewardError
from diffalign.types import RewardOutput

_QUOTED = re.compile(r'["\u201c]([^"\u201c\u201d]+)["\u201d]')


class OcrReward(Reward):
    """Similarity of the text in an image to the text that the prompt asks for.

    The target is `text` of the metadata, else the text in the first double quotes of the prompt. The score is 1 if the
    image contains the target, else 1 - min(edits, n) / n for n letters, without spaces and capitals. Flow-GRPO and AWM
    use the same score with PaddleOCR 2.9.1; scores of different readers are not comparable.
    """

    card = RewardCard(
        name="ocr",
        description="share of the prompt's quoted text that is read in the image (PP-OCRv6 small)",
        model_id="PP-OCRv6_det_small, PP-OCRv6_rec_small",
        license="Apache-2.0",
    )

    def __init__(self) -> None:
        self._engine: Any = None

    def prepare(self) -> None:
        if self._engine is None:
            from rapidocr import RapidOCR

            # every process of this machine has its own engine
            threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
            self._engine = RapidOCR(
                params={
                    "Global.log_level": "error",
                    "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                }
            )
            self.declare(revision=f"rapidocr {version('rapidocr')}")  # the models are in its wheel

    def check_metadata(self, metadata: Sequence[Metadata]) -> None:
        for row, entry in enumerate(metadata):
            prompt = str(entry.get("prompt", ""))
            if not wanted_text(prompt, entry):
                raise RewardError(
                    f"reward 'ocr' needs the text in double quotes in every prompt, or as `text` in its metadata; "
                    f"prompt {row + 1} ({prompt!r}) has none"
                )

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardOutput:
        """Return scores (B,), NaN for prompts without a target text."""
        self.prepare()
        values = []
        for pixels, prompt, entry in zip(
            images.permute(0, 2, 3, 1).cpu().numpy(), prompts, metadata, strict=True
        ):
            target = wanted_text(prompt, entry)
            values.append(similarity(self.read(pixels), target) if target else np.nan)
        return RewardOutput(np.array(values, np.float32))

    def read(self, pixels: np.ndarray) -> str:
        """Return the text in an image (H, W, 3) uint8, its lines joined by spaces."""
        result = self._engine(np.ascontiguousarray(pixels[:, :, ::-1]))  # the engine's order is BGR
        return " ".join(result.txts or ())


def wanted_text(prompt: str, metadata: Metadata) -> str:
    """Return the text that the image should show, or an empty text."""
    if metadata.get("text"):
        return _plain(str(metadata["text"]))
    match = _QUOTED.search(prompt)
    return _plain(match[1]) if match else ""


def similarity(read: str, target: str) -> float:
    """Return the similarity in 0..1 of two texts; `target` is plain and not empty."""
    read = _plain(read)
    if target in read:
        return 1.0
    return 1 - min(Levenshtein.distance(read, target), len(target)) / len(target)


def _plain(text: str) -> str:
    return "".join(text.split()).lower()
