"""A picture of a search: what was tried, and how the best came to be."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from diffalign.core.errors import UsageError
from diffalign.core.files import aside
from diffalign.tuning.tune import TuneResult

KINDS = (".png", ".svg", ".pdf")


def check_plot(file: Path) -> None:
    """Before a search, whose picture would be lost.

    Raises:
        UsageError: matplotlib is not there, the file is of another kind than `KINDS`, or it could not be written.
    """
    if find_spec("matplotlib") is None:
        raise UsageError("plot: needs matplotlib: pip install 'diffalign[plots]'")
    if file.suffix.lower() not in KINDS:
        raise UsageError(f"plot: {file} must end in {', '.join(KINDS)}")
    if file.is_dir():
        raise UsageError(f"plot: {file} is a folder")
    there = next(p for p in file.absolute().parents if p.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UsageError(f"plot: {file} cannot be written, see {there}")


def plot_history(result: TuneResult, file: Path) -> None:
    """Candidates at their first step's factors, coloured by the objective, and the best over the number of candidates,
    which, unlike the work, is the same for a search that went on from scores of an earlier one."""
    from matplotlib.figure import Figure

    rows = [(i, r) for i, r in enumerate(result.history) if np.isfinite(r["value"])]
    values = np.array([r["value"] for _, r in rows])
    table = np.array([r["coefficients"] for _, r in rows])
    steps = len(result.best)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    dots = left.scatter(table[:, 0], table[:, steps], c=values, s=14, cmap="viridis")
    left.scatter(result.best.sample[0], result.best.model_output[0], marker="*", s=140, c="red")
    left.set(xlabel="sample, first step", ylabel="model_output, first step")
    figure.colorbar(dots, ax=left, label="objective")
    right.plot([i for i, _ in rows], values, ".", color="0.7", label="candidate")
    right.step([i for i, _ in rows], np.maximum.accumulate(values), where="post", label="best")
    right.set(xlabel="candidate", ylabel="objective")
    right.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    with aside(file) as hidden:
        figure.savefig(hidden)
