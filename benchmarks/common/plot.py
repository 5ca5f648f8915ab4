"""Plot benchmark results for the docs with matplotlib (`pip install diffalign[plots]`).

Usage: python -m benchmarks.common.plot benchmarks/results/awm.json docs/images/awm.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

UNITS = {"seconds": ("minutes of training", 60), "images": ("thousand images", 1000)}
SCORES = {"win_rate": "win rate over the base", "geneval": "held-out GenEval"}


def learning_curves(result: Mapping[str, Any], names: Sequence[str], file: Path) -> None:
    """Plot the held-out score over training time and over images."""
    figure, axes = plt.subplots(1, len(UNITS), figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, (unit, (label, per)) in zip(axes, UNITS.items(), strict=True):
        curves = {name: result["arms"][name]["curves"] for name in names}
        draw(axis, curves, unit=unit, per=per, order=names)
        axis.set_xlabel(label)
    axes[0].set_ylabel("held-out GenEval")
    axes[-1].legend(frameon=False, fontsize="small")
    figure.savefig(file)
    plt.close(figure)


def preference_curves(result: Mapping[str, Any], names: Sequence[str] | None, file: Path) -> None:
    """Plot win rate and score over time including precomputation; one row per model."""
    models = result["models"]
    order = list(dict.fromkeys(arm for model in models.values() for arm in model["arms"]))
    unknown = set(names or ()) - set(order)
    if unknown:
        raise SystemExit(f"--arms={','.join(sorted(unknown))}: no such arm. Choose from {order}.")
    figure, rows = plt.subplots(
        len(models),
        len(SCORES),
        figsize=(9, 3.4 * len(models)),
        squeeze=False,
        layout="constrained",
    )
    for axes, (title, model) in zip(rows, models.items(), strict=True):
        selected = [n for n in model["arms"] if names is None or n in names]
        for axis, (score, label) in zip(axes, SCORES.items(), strict=True):
            curves = {name: model["arms"][name]["curves"][score] for name in selected}
            draw(axis, curves, unit="seconds", per=60, order=order)
            axis.set_xlabel("minutes of precomputing and training")
            axis.set_ylabel(f"{title}: {label}")
        axes[-1].legend(frameon=False, fontsize="small")
    figure.savefig(file)
    plt.close(figure)


def quality_of_forms(result: Mapping[str, Any], file: Path) -> None:
    """Plot score and distance by number of steps; one row per student.

    A colour is a weight format. Dashed lines are the original schedules, solid lines the schedules with Q-Sched's
    factors.
    """
    students = result["students"]
    figure, rows = plt.subplots(
        len(students),
        2,
        figsize=(9, 3.4 * len(students)),
        squeeze=False,
        layout="constrained",
    )
    for axes, (student, figures) in zip(rows, students.items(), strict=True):
        for axis, score in zip(axes, ("geneval", "fid"), strict=True):
            for i, (form, cells) in enumerate(figures["forms"].items()):
                steps = list(cells["steps"])
                for how, line in (("plain", "--"), ("qsched", "-")):
                    values = [cells["steps"][s][how][score]["median"] for s in steps]
                    label = form if how == "qsched" else None
                    axis.plot(steps, values, line, color=f"C{i}", marker="o", label=label)
            axis.set_xlabel("steps; dashed: original schedule")
            axis.set_ylabel(f"{student}: {score}")
        axes[-1].legend(frameon=False, fontsize="small")
    figure.savefig(file)
    plt.close(figure)


def moved_model(result: Mapping[str, Any], file: Path) -> None:
    """Plot the moved model's score over training time, and a batch's time by part."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    base = result["quality"]["base"]["geneval"]["median"]
    for seed, run in enumerate(result["runs"]):
        minutes = [s / 60 for s in run["curve"]["seconds"]]
        left.plot(minutes, run["curve"]["score"], marker="o", color="C0", lw=1)
        left.axhline(
            result["quality"]["base"]["geneval"]["values"][seed], color="C1", lw=0.7, alpha=0.5
        )
    left.plot([], [], color="C0", label="moved, one line per seed")
    left.axhline(base, color="C1", label="base")
    left.set_xlabel("minutes of training")
    left.set_ylabel("held-out GenEval")
    left.legend(frameon=False, fontsize="small")
    seconds = result["latency"]["seconds"]
    bottom = dict.fromkeys(seconds, 0.0)
    for part in ("text", "denoise", "decode", "host"):
        values = [seconds[name][part]["median"] for name in seconds]
        right.bar(list(seconds), values, bottom=list(bottom.values()), label=part)
        bottom = {n: bottom[n] + v for n, v in zip(seconds, values, strict=True)}
    right.set_ylabel(f"seconds for {result['latency']['images']} images")
    right.legend(frameon=False, fontsize="small")
    figure.savefig(file)
    plt.close(figure)


def draw(
    axis: Any,
    arms: Mapping[str, Sequence[Any]],
    *,
    unit: str,
    per: float,
    order: Sequence[str],
) -> None:
    """Draw one thin line per seed and a thick median line.

    Arms are coloured by their position in `order`. The median ends where one of the seeds has no further evaluation.
    """
    for name, curves in arms.items():
        color = f"C{order.index(name)}"
        for curve in curves:
            cost = [c / per for c in curve["cost"][unit]]
            axis.plot(cost, curve["score"], color=color, lw=0.7, alpha=0.5)
        # Seeds are scored after the same updates except for the last score, which comes when the seed's time ends.
        together = min(len(c["score"]) for c in curves)
        if len(curves) > 1:
            cost = _medians([c["cost"][unit][:together] for c in curves])
            score = _medians([c["score"][:together] for c in curves])
            axis.plot([c / per for c in cost], score, color=color, lw=2, label=name)
        else:
            axis.plot([], [], color=color, label=name)
    axis.grid(alpha=0.3)


def _medians(rows: Sequence[Sequence[float]]) -> list[float]:
    return [median(column) for column in zip(*rows, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "result", type=Path, help="JSON of `diffalign bench` awm, inversion-dpo, qsched or dcgen"
    )
    parser.add_argument("output", type=Path, help="plot to write, .svg or .png")
    parser.add_argument(
        "--arms", default=None, help="comma-separated arms; default: all arms of the result"
    )
    args = parser.parse_args()
    # The same result gives the same file.
    mpl.rcParams["svg.hashsalt"] = "diffalign"
    result = json.loads(args.result.read_text(encoding="utf-8"))
    names = [n.strip() for n in args.arms.split(",")] if args.arms else None
    if "quality" in result:
        moved_model(result, args.output)
    elif "students" in result:
        quality_of_forms(result, args.output)
    elif "models" in result:
        preference_curves(result, names, args.output)
    else:
        learning_curves(result, names or list(result["arms"]), args.output)


if __name__ == "__main__":
    main()
