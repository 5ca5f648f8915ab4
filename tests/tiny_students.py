"""Distillation runs of a few tiny updates, in process."""

from __future__ import annotations

import tiny
from accelerate import Accelerator

from diffalign.config import decode, methods
from diffalign.data.prompts import load_prompts
from diffalign.training.run_folder import RunFolder

MODELS = {**tiny.MODELS, **tiny.UNETS}


def settings(folder, **groups):
    base = {
        "output_dir": str(folder),
        "algorithm": {"type": "reflow", "states_per_image": 4},
        "lora": {"rank": 4, "alpha": 8},
        "rewards": {"jpeg": 1.0},
        "teacher": {"prompts_per_update": 4, "num_inference_steps": 8, "micro_batch_size": 4},
        "optimizer": {"learning_rate": 0.01},
        "training": {"mixed_precision": "no", "micro_batch_size": 4, "num_updates": 3},
        "evaluation": {"num_inference_steps": 2},
    }
    for group, values in groups.items():
        base.setdefault(group, {}).update(values)
    return decode(base)


def trainer(folder, family="flux", *, train=None, **groups):
    config = settings(folder, **groups)
    return methods.trainer_class(config.algorithm.type)(
        config,
        MODELS[family](),
        Accelerator(cpu=True),
        RunFolder(folder),
        train or load_prompts("shapes:train"),
    )
