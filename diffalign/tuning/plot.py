"""A picture of a search: what was tried, and how the best came to be."""

from __future__ import annotations

from pathlib import Path

from diffalign.errors import UsageError
from diffalign.tuning.tune import TuneResult


def plot_history(result: TuneResult, file: Path) -> None:
    """Candidates at their first step's factors, coloured by the objective, and the best over network rows.

    Raises:
        UsageError: matplotlib is not there.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise UsageError("--plot needs matplotlib: pip install diffalign[plots]") from error
    import numpy as np

    rows = [r for r in result.history if np.isfinite(r["value"])]
    values = np.array([r["value"] for r in rows])
    table = np.array([r["coefficients"] for r in rows])
    steps = len(result.best)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    dots = left.scatter(table[:, 0], table[:, steps], c=values, s=14, cmap="viridis")
    left.scatter(result.best.sample[0], result.best.model_output[0], marker="*", s=140, c="red")
    left.set(xlabel="sample, first step", ylabel="model_output, first step")
    figure.colorbar(dots, ax=left, label="objective")
    right.step([r["rows"] for r in rows], np.maximum.accumulate(values), where="post")
    right.set(xlabel="rows of the denoiser's forwards", ylabel="best objective so far")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    pyplot.close(figure)
