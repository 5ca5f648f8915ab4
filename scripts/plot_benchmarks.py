"""Plots of benchmark results for the docs; needs matplotlib (`pip install diffalign[plots]`).

python -m diffalign.scripts.plot_benchmarks benchmarks/results/awm.json docs/images/awm.svg
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


def learning_curves(result: Mapping[str, Any], names: Sequence[str], file: Path) -> None:
    """Held-out score over time and over images: a thin line a seed, a thick one their median where all have been
    scored."""
    figure, axes = plt.subplots(1, len(UNITS), figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, (unit, (label, per)) in zip(axes, UNITS.items(), strict=True):
        for number, name in enumerate(names):
            curves = result["arms"][name]["curves"]
            color = f"C{number}"
            for curve in curves:
                cost = [c / per for c in curve["cost"][unit]]
                axis.plot(cost, curve["score"], color=color, lw=0.7, alpha=0.5)
            # every seed is scored after the same updates, up to where its time ended
            together = min(len(c["score"]) for c in curves)
            if len(curves) > 1:
                cost = _medians([c["cost"][unit][:together] for c in curves])
                score = _medians([c["score"][:together] for c in curves])
                axis.plot([c / per for c in cost], score, color=color, lw=2, label=name)
            else:
                axis.plot([], [], color=color, label=name)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out GenEval")
    axes[-1].legend(frameon=False, fontsize="small")
    figure.savefig(file)
    plt.close(figure)


def _medians(rows: Sequence[Sequence[float]]) -> list[float]:
    return [median(column) for column in zip(*rows, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="JSON of `diffalign bench awm`")
    parser.add_argument("output", type=Path, help=".svg or .png")
    parser.add_argument("--arms", default=None, help="between commas; default: all of the result")
    args = parser.parse_args()
    mpl.rcParams["svg.hashsalt"] = "diffalign"  # the same result, the same file
    result = json.loads(args.result.read_text(encoding="utf-8"))
    names = [n.strip() for n in args.arms.split(",")] if args.arms else list(result["arms"])
    learning_curves(result, names, args.output)


if __name__ == "__main__":
    main()
