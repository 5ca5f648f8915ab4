"""Write down what a run did: the content of its `summary.json`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from diffalign.config import to_dict
from diffalign.core.versions import versions
from diffalign.evaluation.score import Evaluation, as_dicts

if TYPE_CHECKING:
    from diffalign.training.run import Run


def summary_of(run: Run, after: Evaluation, seconds: float) -> dict[str, Any]:
    """Return the content of `summary.json`.

    Args:
        run: the run, after training.
        after: evaluation after training.
        seconds: seconds of this sitting.
    """
    device = run.accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    before = run.before
    summary = {
        "before": before.to_dict(),
        "after": after.to_dict() | run.trainer.validate(),
        "differences": as_dicts(after.differences(before)),
        **run.wins(after),
        "best": run.best.summary(),
        "updates": run.trainer.progress.update,
        "resumed_after": run.resumed_after,
        "training_seconds": round(run.trainer.progress.seconds, 1),
        "seconds": round(seconds, 1),
        "device": name,
        "processes": run.accelerator.num_processes,
        **run.trainer.facts(),
        "failed_rewards": run.failures,
        "rewards": {n: vars(r.card) for n, r in run.reward.rewards.items()},
        "held_out_rewards": {n: vars(r.card) for n, r in run.held_out_reward.rewards.items()},
        "versions": versions(),
        "config": to_dict(run.config),
    }
    if before.tasks and after.tasks:
        summary = {
            "geneval_before": round(before.tasks["overall"], 4),
            "geneval_after": round(after.tasks["overall"], 4),
            **summary,
        }
    return summary
