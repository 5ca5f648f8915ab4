"""Is the text of the prompt in the image? Read by PP-OCR through rapidocr, whose models are in its wheel."""

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
    """The text is `text` of the metadata, else what stands between the first double quotes of the prompt.

    1 where it is in what was read, else 1 - min(edits, n) / n for n letters: the score of Flow-GRPO and AWM, without
    spaces and capitals. Theirs reads with PaddleOCR 2.9.1: values compare within one reader only.
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

            # every process of this machine has an engine of its own
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
        """NaN for a prompt that asks for no text."""
        self.prepare()
        values = []
        for pixels, prompt, entry in zip(
            images.permute(0, 2, 3, 1).cpu().numpy(), prompts, metadata, strict=True
        ):
            target = wanted_text(prompt, entry)
            values.append(similarity(self.read(pixels), target) if target else np.nan)
        return RewardOutput(np.array(values, np.float32))

    def read(self, pixels: np.ndarray) -> str:
        """All text of a (H, W, 3) uint8 image, line after line."""
        found = self._engine(np.ascontiguousarray(pixels[:, :, ::-1]))  # the engine's order is BGR
        return " ".join(found.txts or ())


def wanted_text(prompt: str, metadata: Metadata) -> str:
    """The text that the image should show; empty where there is none."""
    if metadata.get("text"):
        return _plain(str(metadata["text"]))
    match = _QUOTED.search(prompt)
    return _plain(match[1]) if match else ""


def similarity(read: str, target: str) -> float:
    """0..1; `target` is plain and not empty."""
    read = _plain(read)
    if target in read:
        return 1.0
    return 1 - min(Levenshtein.distance(read, target), len(target)) / len(target)


def _plain(text: str) -> str:
    return "".join(text.split()).lower()
