"""Evaluate a finished run again, exactly as the run did at its end.

Base model, policy, prompts, seeds and sizes are the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from diffalign import lora
from diffalign.config import AnyRunConfig, ConfigError, decode
from diffalign.core.versions import versions
from diffalign.evaluation.score import Evaluation, evaluate_model
from diffalign.lora.files import load_lora, merge_lora, read_lora
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.merging import read_scheduler
from diffalign.pipelines.registry import load_model
from diffalign.pipelines.sampler import OnImages
from diffalign.training.denoise import evaluation_drawing, image_size, set_attention_backend
from diffalign.training.inputs import held_out_prompts, held_out_rewards, score_with
from diffalign.training.run_folder import CONFIG, LOG, SUMMARY, RunFolderError

WEIGHTS = Path("lora") / lora.WEIGHT_NAME


@dataclass(frozen=True)
class FinishedRun:
    """Folder of a finished run, which has exported a policy.

    The field `config` is the run's configuration. The field `summary` has the run's own figures, or is empty.
    """

    folder: Path
    config: AnyRunConfig
    summary: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> FinishedRun:
        """Read a run folder, before a model is loaded.

        Raises:
            RunFolderError: the folder has no run, or its run has not exported a policy.
        """
        config = read_config(folder)
        if not (folder / "pipeline").is_dir() and not (folder / WEIGHTS).is_file():
            raise RunFolderError(
                f"{folder} has no {WEIGHTS}: the run has not ended. Continue it with the command that began it"
            )
        try:
            summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            summary = {}
        return cls(folder, config, summary)

    def load(self, device: str) -> TextToImageModel:
        """Load the base model with the policy, and for students their scheduler.

        The LoRA is merged into the weights if the run sampled with merged weights.
        """
        c = self.config.model
        moved = (self.folder / "pipeline").is_dir()
        model = load_model(
            str(self.folder / "pipeline") if moved else c.name,
            dtype=getattr(torch, c.dtype),
            revision=None if moved else c.revision,
            max_sequence_length=c.max_sequence_length,
            device=device,
        )
        if moved:
            return model
        if c.attention_backend is not None:
            set_attention_backend(model, c.attention_backend)
        adapters = read_lora(str(self.folder / "lora"))
        if self.config.drawing.merge_lora:
            merge_lora(model.pipeline, adapters)
        else:
            load_lora(model.pipeline, adapters)
            if self.config.training.mixed_precision != "no":
                lora.keep_input_dtype(model.denoiser)
        if (self.folder / "scheduler").is_dir():
            scheduler = read_scheduler(str(self.folder / "scheduler"), model.pipeline.scheduler)
            model.pipeline.register_modules(scheduler=scheduler)
        return model

    def evaluate(self, device: str, *, on_images: OnImages | None = None) -> Evaluation:
        """Sample the held-out prompts and score the images, as the run did at its end.

        Blocks are not compiled. If the run compiled them, pixels may differ by rounding.
        """
        reward, watched = held_out_rewards(self.config)
        prompts = held_out_prompts(self.config)
        for part in (reward, watched):
            part.check_metadata([p.metadata for p in prompts])
            part.prepare()
        model = self.load(device)
        drawing = evaluation_drawing(self.config, image_size(self.config, model))
        return evaluate_model(
            model, prompts, score_with(reward, watched), drawing, on_images=on_images
        )

    def result(self, scores: Evaluation) -> dict[str, Any]:
        """Return the result of `evaluate` with its settings, and the run's own figures."""
        config, own = self.config, self.summary.get("after", {})
        return {
            "run": str(self.folder),
            "model": config.model.name,
            "prompts": config.prompts.evaluation,
            **vars(config.evaluation),
            "rewards": dict(config.rewards),
            **scores.to_dict(),
            "of_the_run": {part: own.get(part, {}) for part in ("tasks", "means")},
            "versions": versions(),
        }


def read_config(folder: Path) -> AnyRunConfig:
    """Return the configuration of a run folder.

    Raises:
        RunFolderError: the folder has no run, or its configuration cannot be read.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise RunFolderError(
            f"{folder} is no run folder: it has no {CONFIG}. Name the output_dir of a run"
        )
    try:
        config: AnyRunConfig = decode(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError, ConfigError) as error:
        raise RunFolderError(f"{file} cannot be read by this version: {error}") from error
    return config


def run_of(lora_source: str | None) -> Path | None:
    """Return the run folder that a LoRA's place is, or lies in. Return None if there is none."""
    if lora_source is None:
        return None
    place = Path(lora_source).absolute()
    for folder in (place, *place.parents):
        if (folder / CONFIG).is_file() and (folder / LOG).is_file():
            return folder
    return None


def drawn_otherwise(config: AnyRunConfig, drawing: Drawing, prompts: str) -> list[str]:
    """Return the sampling settings that differ from a run's, as "name: VALUE_OF_RUN, VALUE here"."""
    names = (
        *("num_inference_steps", "guidance_scale", "solver", "seed"),
        *("images_per_prompt", "images_per_task"),
    )
    pairs = {n: (getattr(config.evaluation, n), getattr(drawing, n)) for n in names}
    pairs["prompts"] = (config.prompts.evaluation, prompts)
    if config.evaluation.images_per_task is not None and drawing.images_per_task is not None:
        del pairs["images_per_prompt"]
    return [
        f"{name}: {'none' if of_run is None else of_run}, {'none' if own is None else own} here"
        for name, (of_run, own) in pairs.items()
        if of_run != own
    ]
