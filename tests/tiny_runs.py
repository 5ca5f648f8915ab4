"""Runs of a few tiny updates, in process."""

from __future__ import annotations

import numpy as np
import tiny
import torch
from accelerate import Accelerator

from diffalign.config import RunConfig, decode
from diffalign.config.methods import available, run_class
from diffalign.data.prompts import load_prompts
from diffalign.methods.online.trainer import OnlineTrainer
from diffalign.training.run_folder import RunFolder
from diffalign.types import RewardOutput

ONLINE = [name for name in available() if run_class(name) is RunConfig]
FEW = {"flow_grpo": {}, "flow_dppo": {"window_size": 2, "dynamics": "cps"}}
"""Settings with which an algorithm fits into a rollout of three steps; TWO for the others."""
TWO = {"timesteps_per_image": 2}


def settings(folder, **groups):
    base = {
        "output_dir": str(folder),
        "lora": {"rank": 4, "alpha": 8},
        "rewards": {"jpeg": 1.0},
        "rollout": {
            "prompts_per_update": 3,
            "group_size": 4,
            "num_inference_steps": 3,
            "micro_batch_size": 12,
        },
        "algorithm": {"timesteps_per_image": 2, "kl_timesteps": 1},
        "optimizer": {"learning_rate": 0.01},
        "training": {"mixed_precision": "no", "micro_batch_size": 12},
    }
    if groups.get("algorithm", {}).get("type", "awm") != "awm":
        base["algorithm"] = {}
    for group, values in groups.items():
        base.setdefault(group, {}).update(values)
    return decode(base)


def redness(images, prompts, metadata):
    """More red, less blue: a reward that any model can learn."""
    values = (images[:, 0].float() - images[:, 2].float()).mean((1, 2)) / 255
    return RewardOutput(values.numpy().astype(np.float32))


def trainer(folder, score=redness, family="sd3", *, train=None, by_group=False, **groups):
    return OnlineTrainer(
        settings(folder, **groups),
        tiny.MODELS[family](),
        Accelerator(cpu=True),
        RunFolder(folder),
        score,
        train or load_prompts("shapes:train"),
        by_group=by_group,
    )


def weights(run):
    """All that a run trains, as one vector."""
    return torch.cat([p.detach().flatten() for p in run.parameters])
