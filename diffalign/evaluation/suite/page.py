"""Page of a suite: figures, differences, what could not be judged, and pictures with questions and replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.core.files import write_text
from diffalign.data.prompts import Prompt
from diffalign.evaluation.comparison import thumbnail
from diffalign.evaluation.figures import between, number, told
from diffalign.evaluation.geneval import sample_path
from diffalign.evaluation.intervals import NOTE, too_few
from diffalign.evaluation.pictures import evenly
from diffalign.evaluation.report import render_page
from diffalign.evaluation.suite.answers import AnswerBook, Ask
from diffalign.evaluation.suite.base import Benchmark
from diffalign.evaluation.suite.compare import read_result
from diffalign.evaluation.suite.run import IMAGES, recorded_cards

EXAMPLES, QUESTIONS, LONGEST = 8, 12, 200


def figure_rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the figures of a result as texts: value, interval, bounds, numbers and difference."""
    scale = result["scale"]
    compared = (result.get("difference") or {}).get("figures", {})
    rows = []
    for name, figure in result["figures"].items():
        row = {
            "name": name,
            "value": scaled(figure["value"], scale),
            "interval": too_few(figure["prompts"], figure["prompts"])
            or _span(figure["low"], figure["high"], scale),
            "bounds": "",
            "n": str(figure["known"]),
            "prompts": str(figure["prompts"]),
            "difference": "",
            "change": "",
            "noise": "",
        }
        if figure["known"] < figure["n"]:
            row["n"] = f"{figure['known']} of {figure['n']}"
            row["bounds"] = _span(figure["least"], figure["most"], scale)
        if name in compared:
            row |= _difference(compared[name], scale)
        rows.append(row)
    return rows


def _difference(entry: Mapping[str, Any], scale: float) -> dict[str, str]:
    prompts = entry["prompts"]
    low, high = (None if v is None else v * scale for v in (entry["low"], entry["high"]))
    interval, noise = told(low, high, n=prompts, prompts=prompts)
    rate = entry.get("win_rate")
    wins = f"; wins {number(100 * rate['rate'])} % of {rate['pairs']} pairs" if rate else ""
    return {
        "difference": number(entry["value"] * scale, sign=True),
        "change": interval + wins,
        "noise": noise,
    }


def scaled(value: float | None, scale: float) -> str:
    """Return a figure as text."""
    return "unknown" if value is None else number(value * scale)


def _span(low: float | None, high: float | None, scale: float) -> str:
    if low is None or high is None:
        return "unknown"
    return between(low * scale, high * scale)


def write_page(
    file: Path,
    title: str,
    results: Sequence[Mapping[str, Any]],
    sides: Mapping[str, Path],
    benchmarks: Sequence[tuple[Benchmark, list[Prompt]]],
    variant: str,
) -> None:
    """Write the page of a suite.

    Args:
        results: results of the benchmarks, with their differences.
        sides: folders of suites by name, whose pictures stand beside each other.
        benchmarks: benchmarks with their prompts, in the order of the results.
    """
    sections = []
    for result, (benchmark, prompts) in zip(results, benchmarks, strict=True):
        sections.append(
            {
                "result": dict(result) | {n: result.get(n) for n in ("chance", "difference")},
                "rows": figure_rows(result),
                "chance": scaled((result.get("chance") or {}).get("value"), result["scale"]),
                "examples": _examples(benchmark, prompts, sides, variant),
                "summary": benchmark.summary,
            }
        )
    page = render_page("suite.html", title=title, sections=sections, sides=list(sides), note=NOTE)
    write_text(file, page)


def _examples(
    benchmark: Benchmark, prompts: Sequence[Prompt], sides: Mapping[str, Path], variant: str
) -> list[dict[str, Any]]:
    books = {name: AnswerBook(folder / benchmark.folder) for name, folder in sides.items()}
    cards = {name: recorded_cards(folder / benchmark.folder) for name, folder in sides.items()}
    pictures = {name: _pictures(folder, benchmark) for name, folder in sides.items()}
    examples = []
    for p in evenly(range(len(prompts)), EXAMPLES):
        cells = []
        for name in sides:
            path = sample_path(pictures[name], p, 0)
            replies = [
                _line(benchmark, ask, books[name].reply(ask, cards[name][ask.question.kind]))
                for question in benchmark.questions(prompts[p], variant)[:QUESTIONS]
                for ask in [Ask(path, p, 0, question)]
            ]
            cells.append({"image": thumbnail(path), "replies": [r for r in replies if r]})
        examples.append({"prompt": prompts[p].text, "cells": cells})
    return examples


def _pictures(folder: Path, benchmark: Benchmark) -> Path:
    """Return the folder of a benchmark's images, which may be the user's own."""
    place = read_result(folder, benchmark)["images"]["folder"]
    return folder / benchmark.folder / IMAGES if place == IMAGES else Path(place)


def _line(benchmark: Benchmark, ask: Ask, reply: Any) -> str:
    question = ask.question
    if question.kind == "features":
        return ""
    first = question.text.partition("\n")[0][:LONGEST] if question.kind == "words" else question.key
    if reply.error is not None:
        return f"{first} not answered: {reply.error[:LONGEST]}"
    if question.kind in ("words", "reward"):
        exact = reply.low == reply.high
        values = [number(v) for v in (reply.low if exact else (*reply.low, *reply.high))]
        word = f" ({reply.text})" if reply.text else ""
        return f"{first} {' to '.join(values)}{word}"
    return f"{first}: {(reply.text or '')[:LONGEST]}"
