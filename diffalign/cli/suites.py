"""Run of `diffalign evaluate suite`. The module imports torch, so the verb imports it inside `run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffalign.cli import suite
from diffalign.cli.models import fill, settle_drawing
from diffalign.cli.output import print_table, suggest, write_result
from diffalign.core import console, processes
from diffalign.core.errors import UsageError
from diffalign.data.prompts import Prompt, load_prompts
from diffalign.evaluation.suite.base import Benchmark
from diffalign.evaluation.suite.compare import compare, read_result
from diffalign.evaluation.suite.export import LAYOUTS, export
from diffalign.evaluation.suite.page import figure_rows, scaled, write_page
from diffalign.evaluation.suite.registry import benchmark
from diffalign.evaluation.suite.run import (
    IMAGES,
    OpenJudges,
    Plan,
    evaluate,
    normalised,
    prompts_of,
    recorded_cards,
)
from diffalign.judges.base import Judge
from diffalign.judges.opening import RECORDED, open_judge
from diffalign.judges.recorded import RecordedJudge

BASE = "base"
PAGE = "report.html"


def run_suite(flags: suite.Flags) -> None:
    """Run the benchmarks of a command, and print and write their figures.

    Raises:
        UsageError: flags conflict, or less than 98 % of a benchmark could be judged.
    """
    shapes = flags.model.startswith("shapes-")
    names = flags.benchmarks or (suite.SHAPES if shapes else suite.DEFAULT).split(",")
    chosen_benchmarks = [benchmark(name) for name in names]
    _check(flags)
    plan = _plan(flags)
    # what is missing is an error before anything is drawn
    if flags.against not in (None, BASE):
        for b in chosen_benchmarks:
            read_result(Path(str(flags.against)), b)
    prompts = [prompts_of(b, plan)[0] for b in chosen_benchmarks]
    if flags.images is None and flags.judge != RECORDED:
        settle_drawing(flags)
    judges = _opener(flags, chosen_benchmarks)
    folder = flags.output_dir
    results = [_evaluate(b, plan, folder, flags, judges) for b in chosen_benchmarks]
    against = _against(flags, chosen_benchmarks, plan, judges)
    if not processes.current().is_main_process:
        return
    if against is not None:
        for result, b in zip(results, chosen_benchmarks, strict=True):
            result["difference"] = compare(folder, against, b)
    pairs = list(zip(chosen_benchmarks, prompts, strict=True))
    _export(flags, pairs)
    _finish(flags, results, pairs, against)


def _check(flags: suite.Flags) -> None:
    if flags.against == BASE and flags.lora is None:
        raise UsageError("needs a `lora` to compare with the base", setting="against", value=BASE)
    if flags.against not in (None, BASE) and not Path(str(flags.against)).is_dir():
        raise UsageError(
            "there is no such folder. Name a suite's folder, or base",
            setting="against",
            value=flags.against,
        )
    if flags.images is not None and flags.lora is not None:
        raise UsageError(
            "draws nothing, so that `lora` has no effect; leave one out", setting="images"
        )


def _plan(flags: suite.Flags) -> Plan:
    trained_on, texts = _training(flags.lora)
    return Plan(
        variant=flags.variant,
        quick=flags.quick,
        data=flags.data,
        allow_other_data=flags.allow_other_data,
        images_per_prompt=flags.images_per_prompt,
        chance=not flags.no_chance,
        trust_judge=flags.trust_judge,
        trained_on=trained_on,
        training_texts=texts,
    )


def _training(lora: str | None) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the rewards and prompts of a LoRA's run, as far as its folder tells."""
    from diffalign.training.rerun import read_config, run_of

    folder = run_of(lora)
    if folder is None:
        return (), frozenset()
    config: Any = read_config(folder)
    rewards = tuple(getattr(config, "rewards", None) or ())
    source = getattr(getattr(config, "prompts", None), "train", None)
    try:
        prompts = load_prompts(source) if isinstance(source, str) else []
    except ValueError:
        # the run's file of prompts is gone
        prompts = []
    return rewards, frozenset(normalised(p.text) for p in prompts)


def _opener(flags: suite.Flags, benchmarks: Sequence[Benchmark]) -> OpenJudges:
    """Return the function that opens the judges of a benchmark, each model once."""
    opened: dict[str, Judge] = {}

    def open_judges(benchmark: Benchmark, place: Path) -> dict[str, Judge]:
        if flags.judge == RECORDED:
            return {kind: RecordedJudge(card) for kind, card in recorded_cards(place).items()}
        name = flags.judge or benchmark.judge
        if benchmark.judge:
            if name not in opened:
                opened[name] = open_judge(name)
            return dict.fromkeys(("words", "text"), opened[name])
        return _scorers(flags, benchmark, opened)

    return open_judges


def _scorers(
    flags: suite.Flags, benchmark: Benchmark, opened: dict[str, Judge]
) -> dict[str, Judge]:
    """Return rewards and feature network as judges of a benchmark."""
    from diffalign.rewards.composition import CompositeReward
    from diffalign.rewards.features import load_network
    from diffalign.rewards.judging import FeatureJudge, RewardJudge

    names = flags.rewards or list(benchmark.rewards)
    key = f"rewards {','.join(names)}"
    if key not in opened:
        composite = CompositeReward.from_config(dict.fromkeys(names, 1.0), setting="rewards")
        composite.prepare()
        opened[key] = RewardJudge(composite)
    network = flags.features or benchmark.features
    if network not in opened:
        opened[network] = FeatureJudge(load_network(network))
    return {"reward": opened[key], "features": opened[network]}


def _evaluate(
    benchmark: Benchmark, plan: Plan, folder: Path, flags: suite.Flags, judges: OpenJudges
) -> dict[str, Any]:
    """Run one benchmark with progress bars."""

    def draw(place: Path, prompts: Sequence[Prompt], count: int) -> None:
        mine = replace(
            flags, images_per_prompt=count, prompts=benchmark.name, max_prompts=len(prompts)
        )
        fill(mine, place, prompts, bar=f"{benchmark.name} images")

    own = _images(flags, benchmark)
    no_drawing = own is not None or flags.judge == RECORDED
    with console.counting(f"{benchmark.name} questions", unit="question") as progress:
        return evaluate(
            benchmark,
            plan,
            folder,
            open_judges=judges,
            draw=None if no_drawing else draw,
            images=own,
            progress=progress,
        )


def _against(
    flags: suite.Flags, benchmarks: Sequence[Benchmark], plan: Plan, judges: OpenJudges
) -> Path | None:
    """Return the folder to compare with, which is filled first for the base."""
    if flags.against is None:
        return None
    if flags.against != BASE:
        return Path(flags.against)
    folder = flags.output_dir / BASE
    base_flags = replace(flags, lora=None)
    for b in benchmarks:
        _evaluate(b, plan, folder, base_flags, judges)
    return folder


def _export(flags: suite.Flags, benchmarks: Sequence[tuple[Benchmark, list[Prompt]]]) -> None:
    """Write the images of benchmarks with an official layout."""
    if flags.export is None:
        return
    for b, prompts in benchmarks:
        if b.layout not in LAYOUTS:
            print(f"{b.name} has no official layout")
            continue
        images = _images(flags, b) or flags.output_dir / b.folder / IMAGES
        number = export(b, prompts, images, flags.export)
        print(f"{b.name}: {number} files in the official layout, {flags.export / b.folder}")


def _images(flags: suite.Flags, benchmark: Benchmark) -> Path | None:
    """Return the user's folder of a benchmark's images, or None."""
    if flags.images is None:
        return None
    own = flags.images / benchmark.folder
    return own if own.is_dir() else flags.images


def _finish(
    flags: suite.Flags,
    results: Sequence[dict[str, Any]],
    benchmarks: Sequence[tuple[Benchmark, list[Prompt]]],
    against: Path | None,
) -> None:
    """Print and write the results.

    Raises:
        UsageError: less than 98 % of a benchmark could be judged.
    """
    folder = flags.output_dir
    for result in results:
        _print(result)
    sides = {"here" if against else folder.name: folder}
    if against is not None:
        sides["against"] = against
    page = folder / PAGE
    title = f"{flags.model}{f' + {flags.lora}' if flags.lora else ''}"
    write_page(page, title, results, sides, benchmarks, flags.variant)
    summary = {"model": flags.model, "lora": flags.lora, "benchmarks": list(results)}
    write_result(flags.output or folder / "summary.json", summary)
    print(f"page: {page}")
    if against is None and flags.lora is not None:
        suggest(
            "evaluate", "suite", "--model", flags.model, "--lora", flags.lora, "--against", BASE
        )
    unsure = [r for r in results if r["score"] is None]
    if unsure:
        first = unsure[0]
        raise UsageError(
            f"{first['answered']:.1%} of {first['benchmark']} could be judged, less than 98 %, so that it has "
            f"bounds and no score ({first['first_error']}). Run the same command again; it asks what is missing"
        )


def _print(result: dict[str, Any]) -> None:
    judge = ", ".join(dict.fromkeys(card["name"] for card in result["judges"].values()))
    rows = []
    compared = "difference" in result
    for row in figure_rows(result):
        cells = (row["name"], row["value"], row["interval"], row["n"])
        rows.append((*cells, row["difference"], row["change"], row["noise"]) if compared else cells)
    columns: tuple[str, ...] = ("", "score", "95 % interval", "n")
    if compared:
        columns = (*columns, "change", "95 % interval", " ")
    marks = f", trained on {', '.join(result['trained_on'])}" if result["trained_on"] else ""
    print_table(
        f"{result['benchmark']}, {result['variant']} rule, judged by {judge}{marks}",
        columns,
        [rows],
    )
    if result.get("chance"):
        figure = scaled(result["chance"]["value"], result["scale"])
        print(f"chance (questions of other prompts): {figure}")
