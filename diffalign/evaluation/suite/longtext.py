"""LongText-Bench, English: long texts in images (X-Omni, arXiv 2507.22058).

A judge transcribes each image. The official figure is the recall of words, pooled over all images; it is blind to what
should not be there, so that precision, F1 and character errors stand beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffalign.core.text import read_json_lines
from diffalign.data.prompts import Prompt
from diffalign.evaluation.suite.base import Benchmark, DataFile, Measure, Replies, SuiteError
from diffalign.evaluation.suite.words import bag, compare_texts
from diffalign.judges.base import Question

READ = (
    "Transcribe all text that is visible in this image, exactly as it is written. Write only that text, without any "
    "comment; write nothing if there is no text."
)


def load(paths: Sequence[Path]) -> list[Prompt]:
    """Read prompts in LongText-Bench's format: `prompt`, `text` (list), `category`, `prompt_id`.

    Raises:
        SuiteError: a line does not have the format, or asks for no text.
    """
    items = []
    numbers: set[str] = set()
    for n, entry in enumerate(read_json_lines(paths[0], error=SuiteError), 1):
        place = f"{paths[0]}:{n}"
        texts = entry.get("text") if isinstance(entry, dict) else None
        if not isinstance(texts, list) or not isinstance(entry.get("prompt"), str):
            raise SuiteError(f"{place} needs a prompt and a list of texts. Correct that line")
        if not bag(" ".join(map(str, texts)), "word").counts:
            raise SuiteError(f"{place} asks for no text. Correct that line")
        if str(entry.get("prompt_id")) in numbers:
            raise SuiteError(f"{place} has the prompt_id {entry['prompt_id']} of an earlier line")
        numbers.add(str(entry.get("prompt_id")))
        items.append(Prompt(entry["prompt"], dict(entry)))
    return items


def questions(prompt: Prompt, variant: str) -> list[Question]:
    """Return one transcription."""
    return [Question("read", READ, kind="text", max_tokens=1024)]


def measures(prompt: Prompt, images: Sequence[Replies], variant: str) -> list[Measure]:
    """Return recall and precision, weighted by words, F1 and the share of right characters."""
    rows = []
    category = prompt.metadata.get("category", "all")
    for number, replies in enumerate(images):
        reply = replies.get("read")
        if reply is None or (reply.error is not None and not _is_blank(reply.error)):
            target = compare_texts("", prompt.metadata["text"]).target
            rows += [
                Measure("recall", 0, 1, weight=target, image=number),
                Measure(f"category/{category}", 0, 1, weight=target, image=number),
                *(Measure(name, 0, 1, image=number) for name in ("precision", "f1", "characters")),
            ]
            continue
        score = compare_texts(reply.text or "", prompt.metadata["text"])
        recall = Measure("recall", score.recall, score.recall, weight=score.target, image=number)
        rows += [
            recall,
            Measure(f"category/{category}", recall.low, recall.high, recall.weight, number),
            Measure("precision", score.precision, score.precision, image=number),
            Measure("f1", score.f1, score.f1, image=number),
            Measure("characters", 1 - score.errors, 1 - score.errors, image=number),
        ]
    return rows


def _is_blank(error: str) -> bool:
    """Return True for an endpoint's empty answer, which means that there is no text."""
    return error == "the answer is empty"


TABLE = "X-Omni's and later reports' tables"
BENCHMARK = Benchmark(
    name="longtext",
    summary="long texts in images: word recall, precision, F1, characters",
    load=load,
    questions=questions,
    measures=measures,
    headline="recall",
    files=(
        DataFile(
            "X-Omni-Team/X-Omni",
            "2b8237bb3789638c290eeda3e83ed81bd3652c3b",
            "textbench/text_prompts.jsonl",
            "a2130769e72bd8560470a066114cdac87f80f1eb071ba6bc0f7033225a9be0d8",
        ),
    ),
    licence="Apache-2.0",
    images_per_prompt=4,
    judge="Qwen/Qwen2.5-VL-7B-Instruct",
    scale=1.0,
    published={"Qwen-Image": (0.943, TABLE), "FLUX.2-klein-9B": (0.864, TABLE)},
    layout="longtext",
    note="A model that reads texts may complete them: compare with `ocr` where it matters.",
)
