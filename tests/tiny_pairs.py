"""Preference runs of a few tiny updates, in process."""

from __future__ import annotations

import json

import numpy as np
import tiny
from accelerate import Accelerator
from PIL import Image

from diffalign.config import decode
from diffalign.methods.preference.trainer import PreferenceTrainer
from diffalign.training.run_folder import RunFolder

FAMILIES = {**tiny.MODELS, **tiny.UNETS}
ALGORITHMS = {
    "chord": {"type": "inversion_dpo"},
    "dpo": {"type": "diffusion_dpo"},
    "figure": {"type": "inversion_dpo", "variant": "figure"},
    "released": {"type": "inversion_dpo", "variant": "released"},
    "kto": {"type": "diffusion_dpo", "loss_type": "kto"},
    "mapo": {"type": "diffusion_dpo", "loss_type": "mapo", "beta": 0.1},
    "sft": {"type": "inversion_dpo", "loss_type": "sft"},
}


def write_pairs(folder, n=12, *, seed=0, size=tiny.SIZE, **changes):
    """`n` pairs of noise: the better images are red, the others blue; `changes` are columns of some rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        for k in range(2):
            pixels = rng.integers(0, 120, (size, size, 3), dtype=np.uint8)
            pixels[..., 2 * k] += 100
            Image.fromarray(pixels).save(folder / f"{i}-{k}.png")
        row = {"prompt": f"a photo of a red square {i}", "label": 1.0}
        row |= {"image_0": f"{i}-0.png", "image_1": f"{i}-1.png"}
        rows.append(row | changes.get(f"row_{i}", {}))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "pairs.jsonl").write_text(text)
    return folder


def settings(source, folder, **groups):
    base = {
        "output_dir": str(folder / "run"),
        "algorithm": {"type": "inversion_dpo", "beta": 50},
        "lora": {"rank": 4, "alpha": 8},
        "rewards": {"jpeg": 1.0},
        "optimizer": {"learning_rate": 0.005},
        "pairs": {
            "source": str(source),
            "dtype": "float32",
            "micro_batch_size": 8,
            "validation": 0.0,
            "inversion": {"steps": 6, "states": 3},
        },
        "training": {"mixed_precision": "no", "pairs_per_update": 6, "micro_batch_size": 6},
    }
    for group, values in groups.items():
        base.setdefault(group, {}).update(values)
    return decode(base)


def trainer(source, folder, family="sd3", **groups):
    """With its cache made."""
    config = settings(source, folder, **groups)
    found = PreferenceTrainer(
        config, FAMILIES[family](), Accelerator(cpu=True), RunFolder(config.output_dir)
    )
    found.prepare()
    return found


def build(source, folder, name="chord", family="sd3", **groups):
    """A run of one of `ALGORITHMS`, with its cache made."""
    algorithm = {"timesteps_per_pair": 2, **ALGORITHMS[name], **groups.pop("algorithm", {})}
    return trainer(source, folder, family, algorithm=algorithm, **groups)
