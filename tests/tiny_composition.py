"""Recipes of a composition of tiny pipelines: every stage in a second or two."""

from __future__ import annotations

import copy
from typing import Any

import tiny
import torch
import yaml
from diffusers import FluxTransformer2DModel
from tiny_moves import deep_autoencoder, image_folder

LOOP = {"num_updates": 2, "mixed_precision": "no", "checkpoint_every": 1, "eval_every": 0}
LOOP |= {"sample_every": 0}
RUN: dict[str, Any] = {
    "model": {"dtype": "float32"},
    "lora": {"rank": 4, "alpha": 8},
    "rewards": '{"jpeg": 1}',
    "optimizer": {"learning_rate": 0.01},
    "evaluation": {"num_inference_steps": 4, "max_prompts": 2, "guidance_scale": 2.0},
}
REWARD = """
def brightness(images, prompts, metadata):
    return images.float().mean((1, 2, 3)) / 255
"""
PROMPTS = [f"a photo of {i} red circles" for i in range(8)]
STAGES: dict[str, Any] = {
    "dcgen": {
        "settings": {
            **RUN,
            "algorithm": {"type": "dcgen", "max_guidance": 4.0},
            "latents": {"alignment_images": 12, "dtype": "float32", "validation": 0.4},
            "training": {**LOOP, "micro_batch_size": 4, "images_per_update": 6},
        }
    },
    "align": {
        "settings": {
            **RUN,
            "algorithm": {"type": "awm", "timesteps_per_image": 2, "kl_timesteps": 1},
            "rollout": {
                "prompts_per_update": 2,
                "group_size": 3,
                "num_inference_steps": 2,
                "guidance_scale": 2.0,
            },
            "training": {**LOOP, "micro_batch_size": 6},
        }
    },
    "distill": {
        "settings": {
            **RUN,
            "algorithm": {"type": "reflow", "states_per_image": 2},
            "teacher": {"prompts_per_update": 2, "num_inference_steps": 4, "micro_batch_size": 4},
            "training": {**LOOP, "micro_batch_size": 4},
            "evaluation": {**RUN["evaluation"], "num_inference_steps": 2},
        }
    },
    "quantize": {"backend": "int8", "max_prompts": 4},
    "qsched": {"max_prompts": 4, "budget": 4},
    "accelerate": {"preset": "lossless", "options": {"vae": "slicing"}},
}


def wide_flux():
    """Return a tiny FLUX whose layers are large enough to be quantised."""
    pipeline = tiny.flux_pipeline()
    settings = {k: v for k, v in pipeline.transformer.config.items() if not k.startswith("_")}
    torch.manual_seed(0)
    wide = FluxTransformer2DModel(
        **{**settings, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}
    )
    pipeline.register_modules(transformer=wide.eval())
    return pipeline


def recipe(folder, *names: str) -> dict[str, Any]:
    """Return a recipe on tiny FLUX with all stages, or those named, in `folder`."""
    base = folder / "base"
    if not base.exists():
        wide_flux().save_pretrained(base)
        deep_autoencoder().save_pretrained(folder / "autoencoder")
        image_folder(folder / "images")
        (folder / "prompts.txt").write_text("\n".join(PROMPTS))
        (folder / "reward.py").write_text(REWARD)
    stages = {name: copy.deepcopy(STAGES[name]) for name in names or STAGES}
    prompts = str(folder / "prompts.txt")
    for name, stage in stages.items():
        if "settings" in stage:
            own = (
                {"evaluation": prompts}
                if name == "dcgen"
                else {"evaluation": prompts, "train": prompts}
            )
            stage["settings"]["prompts"] = own
        elif name != "accelerate":
            stage["prompts"] = prompts
    if "qsched" in stages:
        stages["qsched"]["objective"] = f"{folder / 'reward.py'}:brightness"
    if "dcgen" in stages:
        stages["dcgen"]["settings"]["latents"] |= {
            "autoencoder": str(folder / "autoencoder"),
            "images": str(folder / "images"),
        }
    return {
        "output_dir": str(folder / "composed"),
        "model": str(base),
        "dtype": "float32",
        "stages": stages,
        "drawing": {
            "num_inference_steps": 6,
            "guidance_scale": 2.0,
            "height": 16,
            "width": 16,
            "batch_size": 4,
        },
        "measure": {"prompts": prompts, "rewards": ["jpeg"], "repeats": 1},
    }


def write(folder, raw: dict[str, Any], name: str = "recipe.yaml"):
    """Write a recipe, and return its file."""
    file = folder / name
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    return file
