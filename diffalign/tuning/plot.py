"""Plot of a search: its candidates, and the best value over time."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from diffalign.core.errors import UsageError
from diffalign.core.files import aside, check_target
from diffalign.tuning.tune import TuneResult

KINDS = (".png", ".svg", ".pdf")


def check_plot(file: Path) -> None:
    """Check that a plot can be written, before the search.

    Raises:
        UsageError: matplotlib is missing, the file does not end in one of `KINDS`, or it cannot be written.
    """
    if find_spec("matplotlib") is None:
        raise UsageError("plot: matplotlib is missing. Install it: pip install 'diffalign[plots]'")
    if file.suffix.lower() not in KINDS:
        raise UsageError(
            f"plot={file}: this kind of file is not supported. Use {', '.join(KINDS)}."
        )
    check_target(file, setting="plot", folder=False)


def plot_history(result: TuneResult, file: Path) -> None:
    """Plot candidates by their first factors, and the best value over candidates.

    Colours show the objective. The second axis counts candidates and not denoiser rows, so that it is the same for a
    resumed search.
    """
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
