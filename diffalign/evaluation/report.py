"""`report.html`: one self-contained page that shows what a run did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from diffalign.config import AnyRunConfig, dump
from diffalign.core.commands import command
from diffalign.core.files import write_text
from diffalign.data.prompts import Prompt
from diffalign.evaluation.charts import Chart, chart
from diffalign.evaluation.figures import between, number, score_rows, times_told, told
from diffalign.evaluation.intervals import NOTE, Difference, Estimate, verdict
from diffalign.evaluation.pictures import evenly, page_image
from diffalign.evaluation.score import Evaluation

EXAMPLES = 18
CURVES = {
    "reward": "reward (training rollouts)",
    "loss": "loss",
    "accuracy": "accuracy on pairs",
    "relative_error": "relative error",
    "reward_group_std": "reward spread within a group",
    "kl": "distance to the base model",
    "kl_lagged": "distance to the lagged policy",
    "grad_norm": "gradient norm",
    "images_per_second": "images per second",
}
FILES = (
    "lora/pytorch_lora_weights.safetensors",
    "best/lora/pytorch_lora_weights.safetensors",
    "pipeline/model_index.json",
    "scheduler/scheduler_config.json",
    "summary.json",
    "config.yaml",
    "log.jsonl",
    "samples",
)
"""Files of a run folder that its report links to, where they exist."""


def render_page(template: str, **content: Any) -> str:
    """Return the HTML of a template of this package. A missing name is an error."""
    environment = Environment(
        loader=PackageLoader("diffalign.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(template).render(**content)


def shown(images: int) -> list[int]:
    """Return which images of an evaluation a report shows: spread evenly, not picked."""
    return evenly(range(images), EXAMPLES)


def write_report(
    folder: Path,
    *,
    config: AnyRunConfig,
    summary: dict[str, Any],
    log: list[dict[str, Any]],
    prompts: Sequence[Prompt],
    before: Evaluation,
    after: Evaluation,
) -> Path:
    """Write `folder/report.html` and return its path."""
    tables = _tables(before, after)
    page = render_page(
        "report.html",
        config=config,
        yaml=dump(config),
        summary=summary,
        charts=_charts(log),
        examples=_examples(before, after),
        headline=_headline(tables),
        tables=tables,
        wins=_wins(summary.get("win_rate")),
        drawing=_drawing(config),
        usage=usage(folder, config, prompts[0].text, best=earlier_best(summary)),
        best=best_told(summary),
        files=[name for name in FILES if (folder / name).exists()],
        images=len(before.prompts),
        note=NOTE,
        times=times_told(summary),
        held_out=len({p.text for p in prompts}),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def earlier_best(summary: Mapping[str, Any]) -> bool:
    """Return whether an earlier policy than the last is the best by held-out rewards."""
    best: Mapping[str, Any] = summary.get("best") or {"update": 0}
    return bool(0 < best["update"] < summary["updates"])


def best_told(summary: Mapping[str, Any]) -> str:
    """Return a sentence on the best policy by held-out rewards; empty without one."""
    best = summary.get("best")
    if not best:
        return ""
    rewards = ", ".join("the rewards" if name == "reward" else name for name in best["by"])
    if best["update"] == 0:
        return (
            f"By {rewards}, which are held out, no evaluated update is better than the base model."
        )
    where = "best/lora" if earlier_best(summary) else "the last"
    return (
        f"By {rewards}, held out, the best policy is that of update {best['update']} of {summary['updates']} "
        f"({where}): {best['gain']:+.2f} standard deviations of the base model's images."
    )


def usage(folder: Path, config: AnyRunConfig, prompt: str, *, best: bool = False) -> list[str]:
    """Return the commands that draw a prompt with a run's policy, and evaluate the policy.

    Args:
        folder: the run folder.
        config: settings of the run.
        prompt: prompt to draw.
        best: draw with the best policy by held-out rewards first, then with the last.
    """
    c = config.evaluation
    lora, pipeline, scheduler = (folder / n for n in ("lora", "pipeline", "scheduler"))
    commands = []
    model: dict[str, object] = {"model": config.model.name, "lora": lora}
    if pipeline.exists():
        model = {"model": pipeline}
    elif scheduler.exists():
        # a student draws with its own
        student = folder / "student"
        commands.append(command("merge", **model, scheduler=scheduler, output_dir=student))
        model = {"model": student}
    drawing = {"num_inference_steps": c.num_inference_steps, "guidance_scale": c.guidance_scale}
    if best:
        of_best = model | {"lora": folder / "best" / "lora"}
        commands.append(command("generate", prompt, **of_best, **drawing))
    commands.append(command("generate", prompt, **model, **drawing))
    commands.append(command("evaluate", run=folder))
    return commands


def _drawing(config: AnyRunConfig) -> str:
    """Return in words how the images of an evaluation were drawn."""
    c = config.evaluation
    guidance = "no guidance" if c.guidance_scale is None else f"guidance {c.guidance_scale:g}"
    solver = "" if c.solver == "default" else f", solver {c.solver}"
    return f"{c.num_inference_steps} steps, {guidance}{solver}, seed {c.seed}"


def _charts(log: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return the learning curves that the log has."""
    updates = [float(row.get("update", i)) for i, row in enumerate(log, 1)]
    scores = [row.get("evaluation") or {} for row in log]
    columns = {
        "GenEval (held-out prompts)": [s.get("tasks", {}).get("overall") for s in scores],
        "reward (held-out prompts)": [s.get("means", {}).get("reward") for s in scores],
        **{title: [row.get(key) for row in log] for key, title in CURVES.items()},
    }
    charts = (chart(title, updates, values) for title, values in columns.items())
    return [c for c in charts if c is not None]


def _tables(before: Evaluation, after: Evaluation) -> list[dict[str, Any]]:
    """Return the tables of tasks and of rewards."""
    differences = after.differences(before)
    old, new = before.intervals(), after.intervals()
    titles = score_rows([{"tasks": e.tasks, "means": e.means} for e in (before, after)])
    rows = {
        part: [
            _row(name, title, old[part][name], new[part][name], differences[part].get(name))
            for name, title in titles[part].items()
        ]
        for part in ("tasks", "means")
    }
    return [
        {"title": "Held-out accuracy by task", "first": "task", "rows": rows["tasks"]},
        {"title": "Mean rewards on held-out prompts", "first": "reward", "rows": rows["means"]},
    ]


def _headline(tables: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the row that stands at the top of the page: GenEval, else the reward."""
    tasks, means = (t["rows"] for t in tables)
    for rows, name, title in ((tasks, "overall", "GenEval"), (means, "reward", "mean reward")):
        headline = [row | {"title": title} for row in rows if row["name"] == name]
        if headline:
            return headline
    return []


def _row(
    name: str, title: str, before: Estimate, after: Estimate, change: Difference | None
) -> dict[str, Any]:
    interval, noise, colour = "", "", "noise"
    if change is not None:
        bounds: dict[str, Any] = {
            "low": change.low,
            "high": change.high,
            "n": change.n,
            "prompts": change.prompts,
        }
        interval, noise = told(**bounds)
        colour = verdict(**bounds)
    return {
        "name": name,
        "title": title,
        "n": after.n,
        "prompts": after.prompts,
        "before": number(before.value),
        "before_bounds": between(before.low, before.high),
        "after": number(after.value),
        "after_bounds": between(after.low, after.high),
        "change": "" if change is None else number(change.value, sign=True),
        "change_bounds": interval,
        "noise": noise,
        "verdict": colour,
    }


def _wins(rate: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the win rate for the headline; None where there is none."""
    if not rate:
        return None
    bounds: dict[str, Any] = {"low": rate["low"], "high": rate["high"], "n": rate["pairs"]}
    bounds |= {"prompts": rate["prompts"], "centre": 0.5}
    return {
        "rate": f"{rate['rate']:.0%}",
        "pairs": rate["pairs"],
        "bounds": ", ".join(text for text in told(**bounds) if text),
        "verdict": verdict(**bounds),
    }


def _examples(before: Evaluation, after: Evaluation) -> list[dict[str, Any]]:
    """Return pairs of images of the same prompt and seed."""
    return [
        {
            "prompt": before.prompts[i].text,
            "sides": [
                (
                    name,
                    page_image(e.image(i).permute(1, 2, 0).numpy()),
                    f"reward {number(float(e.rewards[i]))}",
                )
                for name, e in (("before", before), ("after", after))
            ],
        }
        for i in shown(len(before.prompts))
    ]
