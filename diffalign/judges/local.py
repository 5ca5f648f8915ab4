"""Judge in this process: a vision-language model of Qwen's family, read from a folder or from the hub.

Probabilities are the exact softmax over the whole vocabulary at the last position. Only transformers is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from diffalign.judges.base import Judge, JudgeCard, JudgeError, Question, Reply, Task, parts_of

BATCH = 8
"""Number of questions in one forward."""


class LocalJudge(Judge):
    """Vision-language model in this process.

    Args:
        name: folder, or hub id with an optional @REVISION.
        dtype: format of the weights; None for bfloat16 on CUDA and float32 elsewhere.

    Raises:
        JudgeError: the model cannot be loaded, or is not of Qwen's family.
    """

    at_once = 8 * BATCH

    def __init__(self, name: str, *, dtype: torch.dtype | None = None) -> None:
        place, _, revision = name.partition("@")
        where: dict[str, Any] = (
            {} if Path(place).is_dir() or not revision else {"revision": revision}
        )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, **where)
            self.processor: Any = AutoImageProcessor.from_pretrained(place, backend="pil", **where)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                place, dtype=self.dtype, **where
            )
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            raise JudgeError(
                f"judge={name}: the model could not be loaded ({text}). Name a folder, a hub id, or URL#MODEL"
            ) from error
        config = model.config
        if not hasattr(config, "image_token_id") or not hasattr(self.processor, "merge_size"):
            raise JudgeError(
                f"judge={name}: a local judge must be a model of Qwen's family (Qwen2-VL or later), this is "
                f"{type(model).__name__}. Serve it behind an endpoint, and name URL#MODEL"
            )
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.image_token = self.tokenizer.convert_ids_to_tokens(config.image_token_id)
        self.tokenizer.padding_side = "left"
        commit = revision or getattr(config, "_commit_hash", None)
        if Path(place).is_dir():
            from diffalign.core.fingerprint import of_place

            commit = of_place(place)
        how = f"local {str(self.dtype).removeprefix('torch.')}"
        self.card = JudgeCard(
            Path(place).name if Path(place).is_dir() else place, commit, ("words", "text"), how
        )

    @torch.no_grad()
    def answer(self, tasks: Sequence[Task]) -> list[Reply]:
        """Return the replies to B questions, in batches of one kind."""
        replies: list[Reply] = [Reply(error="not answered")] * len(tasks)
        for rows in _alike(tasks):
            part = [tasks[i] for i in rows]
            questions = [q for q, _ in part]
            inputs = self.inputs(part)
            if questions[0].kind == "words":
                logits = self.model(**inputs, logits_to_keep=1).logits[:, -1].float()
                chances = logits.softmax(-1).cpu()
                made = [self._words(q, c) for q, c in zip(questions, chances, strict=True)]
            else:
                made = self._texts(inputs, questions[0].max_tokens)
            for i, reply in zip(rows, made, strict=True):
                replies[i] = reply
        return replies

    def inputs(self, tasks: Sequence[Task]) -> dict[str, Tensor]:
        """Return the model's inputs for B questions, padded on the left."""
        images = [image.convert("RGB") for _, pictures in tasks for image in pictures]
        pixels = self.processor(images=images, return_tensors="pt")
        patches = pixels["image_grid_thw"].prod(1) // self.processor.merge_size**2
        counts = iter(patches.tolist())
        texts = [self._chat(q, pictures, counts) for q, pictures in tasks]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        ids = tokens["input_ids"]
        kinds = (ids == self.model.config.image_token_id).int()
        inputs = {
            "input_ids": ids,
            "attention_mask": tokens["attention_mask"],
            "mm_token_type_ids": kinds,
            "pixel_values": pixels["pixel_values"].to(self.dtype),
            "image_grid_thw": pixels["image_grid_thw"],
        }
        return {name: value.to(self.device) for name, value in inputs.items()}

    def _chat(
        self, question: Question, pictures: Sequence[Image.Image], counts: Iterator[int]
    ) -> str:
        """Return the text of a chat with as many image tokens as the images have."""
        content: list[dict[str, Any]] = [
            {"type": "text", "text": plain(self.tokenizer, part)}
            if isinstance(part, str)
            else {"type": "image"}
            for part in parts_of(question.text, len(pictures))
        ]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if question.system:
            messages.insert(0, {"role": "system", "content": question.system})
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        parts = str(text).split(self.image_token)
        if len(parts) != len(pictures) + 1:
            raise JudgeError(
                f"judge={self.card.name}: its chat template shows {len(parts) - 1} of {len(pictures)} images; "
                "choose a model whose template takes images"
            )
        filled = parts[0]
        for part in parts[1:]:
            filled += self.image_token * next(counts) + part
        return filled

    def _words(self, question: Question, chances: Tensor) -> Reply:
        values = tuple(
            float(chances[self.first_tokens(forms, space=question.space_token)].sum())
            for forms in question.words
        )
        best = int(chances.argmax())
        return Reply(text=str(self.tokenizer.decode([best])), low=values, high=values)

    def first_tokens(self, forms: Sequence[str], *, space: bool = False) -> list[int]:
        """Return the different first tokens of some forms.

        A first token that is only a space says nothing about the word, and is left out unless `space` is set.
        """
        tokens: list[int] = []
        for form in forms:
            ids = self.tokenizer.encode(form, add_special_tokens=False)
            if ids and (space or str(self.tokenizer.decode([ids[0]])).strip()):
                tokens.append(int(ids[0]))
        return sorted(set(tokens))

    def _texts(self, inputs: dict[str, Tensor], max_tokens: int) -> list[Reply]:
        length = inputs["input_ids"].shape[1]
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        replies = []
        for row in output[:, length:].tolist():
            text = str(self.tokenizer.decode(row, skip_special_tokens=True)).strip()
            cut = len(row) >= max_tokens and not ends & set(row)
            replies.append(Reply(text, error=f"cut after {max_tokens} tokens" if cut else None))
        return replies


def _alike(tasks: Sequence[Task]) -> list[list[int]]:
    """Return the rows of tasks that fit into one batch."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, (question, images) in enumerate(tasks):
        key = (question.kind, question.max_tokens, len(images))
        groups.setdefault(key, []).append(i)
    return [
        rows[start : start + BATCH]
        for rows in groups.values()
        for start in range(0, len(rows), BATCH)
    ]


def plain(tokenizer: PreTrainedTokenizerBase, caption: str) -> str:
    """Return a caption with a space inside every special token, such as "<|Reward|>".

    A second reward token would be scored in place of the first, and a second image token ("<|image_pad|>") has no
    pixels.
    """
    for token in tokenizer.get_added_vocab():
        caption = caption.replace(token, f"{token[0]} {token[1:]}")
    return caption
