"""Whole benchmarks: prompts, images, questions, rule, figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from diffalign.core import processes
from diffalign.core.files import write_json_lines, write_text
from diffalign.core.fingerprint import of_json
from diffalign.core.text import read_json, read_json_lines
from diffalign.core.versions import versions
from diffalign.data.prompts import Prompt, spread, told
from diffalign.evaluation.fill import read_made
from diffalign.evaluation.suite import chance
from diffalign.evaluation.suite.answers import AnswerBook, Ask, ask_missing
from diffalign.evaluation.suite.base import OFFICIAL, QUICK, Benchmark, Measure, SuiteError
from diffalign.evaluation.suite.known import check_judge
from diffalign.evaluation.suite.sources import check_language, locate
from diffalign.evaluation.suite.summarize import LEAST_ANSWERED, Row, answered, summarize
from diffalign.judges.base import Judge, JudgeCard, JudgeError
from diffalign.judges.recorded import RecordedJudge

IMAGES, RESULT, ROWS = "images", "result.json", "rows.jsonl"
CARDS, CHECK = "judges.json", "check.json"
Draw = Callable[[Path, Sequence[Prompt], int], None]
"""Function of folder, prompts and images per prompt that draws the missing images."""
OpenJudges = Callable[[Benchmark, Path], dict[str, Judge]]
"""Function of benchmark and folder that returns the judge of each kind."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """Settings of a suite.

    Attributes:
        variant: rule, `official` or `corrected`.
        quick: number of prompts, spread evenly; 0 for an eighth, None for all.
        data: folder with the benchmarks' files; None downloads them.
        allow_other_data: accept files of another digest.
        images_per_prompt: images of each prompt; None for the benchmark's own number.
        chance: measure the chance line.
        trust_judge: go on with a judge that fails the known-answer check.
        trained_on: names of rewards that the model was trained on.
        training_texts: training prompts of the model, normalised.
    """

    variant: str = OFFICIAL
    quick: int | None = None
    data: Path | None = None
    allow_other_data: bool = False
    images_per_prompt: int | None = None
    chance: bool = True
    trust_judge: bool = False
    trained_on: tuple[str, ...] = ()
    training_texts: frozenset[str] = frozenset()


def normalised(text: str) -> str:
    """Return a prompt in lower case, with letters and digits only."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def prompts_of(benchmark: Benchmark, plan: Plan) -> tuple[list[Prompt], list[dict[str, Any]]]:
    """Return the prompts of a benchmark, and what is recorded of their files.

    Raises:
        SuiteError: a file is not usable, or the model was trained on the prompts.
    """
    paths, records = locate(benchmark, plan.data, allow_other=plan.allow_other_data)
    prompts = benchmark.load(paths)
    texts = [p.text for p in prompts]
    check_language(texts, benchmark.language, benchmark.name)
    seen = sum(normalised(text) in plan.training_texts for text in texts)
    if seen:
        raise SuiteError(
            f"benchmarks={benchmark.name}: {seen} of {len(prompts)} prompts are training prompts of the model, so "
            "that its figures would say nothing. Choose another benchmark"
        )
    limit = plan.quick if plan.quick else -(-len(prompts) // QUICK)
    return (prompts if plan.quick is None else spread(prompts, limit)), records


def evaluate(
    benchmark: Benchmark,
    plan: Plan,
    folder: Path,
    *,
    open_judges: OpenJudges,
    draw: Draw | None = None,
    images: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a benchmark in a folder, all processes together, and return its result.

    What is there already, images and replies, is used.

    Args:
        folder: folder of the suite; the benchmark has a folder below it.
        draw: draws missing images; None takes them as they are.
        images: folder of images in GenEval's layout; None for the one below `folder`.

    Returns:
        The result on the main process, an empty dictionary on the others.

    Raises:
        SuiteError: prompts or files are not usable.
        JudgeError: a judge is away, or fails the known-answer check.
    """
    prompts, records = prompts_of(benchmark, plan)
    count = plan.images_per_prompt or benchmark.images_per_prompt
    place = folder / benchmark.folder
    pictures = images or place / IMAGES
    own = {number: number for number in range(len(prompts))}
    asks = chance.asks_of(benchmark, prompts, own, pictures, count, plan.variant)
    judges = _judges(benchmark, open_judges(benchmark, place), asks)
    # before the first image is drawn
    checks = _checks(judges, place, trust=plan.trust_judge)
    if draw is not None:
        draw(pictures, prompts, count)
    others = chance.shuffled(benchmark, prompts, plan.variant) if plan.chance else {}
    chance_asks = chance.asks_of(benchmark, prompts, others, pictures, count, plan.variant)
    with processes.hold(place):
        book, number = _ask_all([*asks, *chance_asks], judges, place, progress)
        if not processes.current().is_main_process:
            return {}
        book.read()
        cards = {kind: judge.card for kind, judge in judges.items()}
        rows = _rows(benchmark, prompts, asks, book, cards, variant=plan.variant)
        write_rows(place / ROWS, rows)
        result = _result(benchmark, plan, rows, asks, book, cards)
        if others:
            rows = _rows(benchmark, prompts, chance_asks, book, cards, variant=plan.variant)
            figure = summarize(rows, benchmark.combine).get(benchmark.headline, {})
            result["chance"] = {"value": figure.get("value"), "prompts": len(others)}
        facts = {"per_prompt": count, "made": read_made(pictures)}
        facts["folder"] = IMAGES if images is None else str(images)
        result["images"] = _found(asks, book) | facts
        result |= {"files": records, "judge_check": checks}
        result |= _facts(benchmark, plan, prompts, cards)
        write_text(place / RESULT, json.dumps(result, indent=1))
    return result | {"asked": number}


def _ask_all(
    asks: Sequence[Ask], judges: Mapping[str, Judge], place: Path, progress: Progress | None
) -> tuple[AnswerBook, int]:
    """Ask this process's share of what has no answer.

    Return the answers and the number that all processes asked.
    """
    state = processes.current()
    if state.is_main_process:
        cards = {kind: asdict(judge.card) for kind, judge in judges.items()}
        write_text(place / CARDS, json.dumps(cards))
    book = AnswerBook(place, process=state.process_index)
    mine = asks[state.process_index :: state.num_processes]
    number = ask_missing(mine, judges, book, store=not _recorded(judges), progress=progress)
    # also waits for everyone
    return book, sum(gather_object([number]))


def _judges(
    benchmark: Benchmark, judges: Mapping[str, Judge], asks: Sequence[Ask]
) -> dict[str, Judge]:
    """Return the judges of the kinds that are asked for."""
    kinds = dict.fromkeys(ask.question.kind for ask in asks)
    for kind in kinds:
        if kind not in judges:
            raise JudgeError(
                f"benchmarks={benchmark.name}: it asks for {kind}, which no judge answers. Name a `judge` that does"
            )
        judges[kind].check_kind(kind)
    return {kind: judges[kind] for kind in kinds}


def _recorded(judges: Mapping[str, Judge]) -> bool:
    return any(isinstance(judge, RecordedJudge) for judge in judges.values())


def _checks(judges: Mapping[str, Judge], place: Path, *, trust: bool) -> dict[str, Any]:
    """Return the known-answer check of the judge, measured once for a folder and a judge."""
    judge = next((judges[kind] for kind in ("words", "text") if kind in judges), None)
    file = place / CHECK
    if judge is None:
        return {}
    identity = judge.card.to_dict()
    if file.is_file():
        kept_check: dict[str, Any] = read_json(file, error=SuiteError)
        if kept_check.get("judge") == identity or _recorded(judges):
            return kept_check
    if _recorded(judges):
        return {}
    check = {"judge": identity, **check_judge(judge, trust=trust)}
    place.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(check, indent=1))
    return check


def recorded_cards(place: Path) -> dict[str, JudgeCard]:
    """Return the cards of the judges whose replies are in a benchmark's folder.

    Raises:
        JudgeError: no judge has been asked there.
    """
    file = place / CARDS
    if not file.is_file():
        raise JudgeError(f"judge=recorded: {place} has no replies. Name a judge that can be asked")
    cards = read_json(file, error=SuiteError)
    return {
        kind: JudgeCard(c["name"], c["revision"], tuple(c["kinds"]), c["how"])
        for kind, c in cards.items()
    }


def _rows(
    benchmark: Benchmark,
    prompts: Sequence[Prompt],
    asks: Sequence[Ask],
    book: AnswerBook,
    cards: Mapping[str, JudgeCard],
    *,
    variant: str,
) -> list[Row]:
    """Return the measures of every prompt that has questions."""
    replies: dict[int, dict[int, dict[str, Any]]] = {}
    for ask in asks:
        images = replies.setdefault(ask.prompt, {})
        reply = book.reply(ask, cards[ask.question.kind])
        images.setdefault(ask.image, {})[ask.question.key] = reply
    return [
        Row(
            prompts[p].text,
            benchmark.measures(prompts[p], [images[k] for k in sorted(images)], variant),
        )
        for p, images in sorted(replies.items())
    ]


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Write the measures of every prompt."""
    write_json_lines(
        file,
        (
            {
                "prompt": row.prompt,
                "measures": [[m.name, m.low, m.high, m.weight, m.image] for m in row.measures],
            }
            for row in rows
        ),
    )


def read_rows(file: Path) -> list[Row]:
    """Read the measures that `write_rows` wrote."""
    try:
        return [
            Row(entry["prompt"], [Measure(*values) for values in entry["measures"]])
            for entry in read_json_lines(file, error=SuiteError)
        ]
    except (KeyError, TypeError) as error:
        raise SuiteError(f"{file} is damaged ({error!r}). Score the folder again") from error


def _result(
    benchmark: Benchmark,
    plan: Plan,
    rows: Sequence[Row],
    asks: Sequence[Ask],
    book: AnswerBook,
    cards: Mapping[str, JudgeCard],
) -> dict[str, Any]:
    figures = summarize(rows, benchmark.combine)
    share = answered(figures, benchmark.headline)
    errors = [
        reply.error
        for ask in asks
        if (reply := book.reply(ask, cards[ask.question.kind])).error is not None
    ]
    headline = figures.get(benchmark.headline, {})
    return {
        "benchmark": benchmark.name,
        "variant": plan.variant,
        "headline": benchmark.headline,
        "scale": benchmark.scale,
        "score": headline.get("value") if share >= LEAST_ANSWERED else None,
        "answered": share,
        "figures": figures,
        "prompts": len(rows),
        "questions": len(asks),
        "unanswered": len(errors),
        "first_error": errors[0] if errors else None,
        "judges": {kind: card.to_dict() for kind, card in cards.items()},
        "questions_digest": of_json([ask.question.digest() for ask in asks])[:16],
        "official_judge": benchmark.judge,
        "published": {name: list(entry) for name, entry in benchmark.published.items()},
        "note": benchmark.note,
    }


def _found(asks: Sequence[Ask], book: AnswerBook) -> dict[str, int]:
    paths = {ask.path for ask in asks}
    present = sum(path.exists() for path in paths)
    readable = sum(book.content(path) is not None for path in paths)
    return {
        "found": readable,
        "unreadable": present - readable,
        "missing": len(paths) - present,
    }


def _facts(
    benchmark: Benchmark, plan: Plan, prompts: Sequence[Prompt], cards: Mapping[str, JudgeCard]
) -> dict[str, Any]:
    """Return what a comparison with another result needs to know."""
    return {
        "prompts_digest": of_json(told(prompts))[:16],
        "trained_on": _trained_on(benchmark, plan, cards),
        "versions": versions(),
    }


def _trained_on(benchmark: Benchmark, plan: Plan, cards: Mapping[str, JudgeCard]) -> list[str]:
    """Return the rewards of the run that this benchmark judges by."""
    names = {*benchmark.rewards, *(card.name for card in cards.values())}
    own = {benchmark.name, benchmark.name.partition(":")[0]}
    judged = {"words", "text"} & set(cards)
    models = {"p_yes", "vlm_judge"} if judged else set()
    return [
        name
        for name in plan.trained_on
        if name.partition(":")[2] in names or name in names | own | models
    ]
