"""What a folder of this suite holds besides what stock diffusers reads: quantised weights, and Q-Sched's factors."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, DiffusionPipeline

from diffalign.core.errors import UsageError
from diffalign.core.fingerprint import UnknownWeights, of_denoiser
from diffalign.lora.files import merge_lora
from diffalign.pipelines import dcgen
from diffalign.quantization.backends import missing_for
from diffalign.schedulers import QSched
from diffalign.schedulers.coefficients import KEY
from diffalign.schedulers.stock import scheduler_like

logger = logging.getLogger(__name__)
QUANTISED = ("transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Components that may be."""
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")
"""Of `from_pretrained`, that say where files are."""


class _ModelConfig(ConfigMixin):
    config_name = "config.json"


def check_backends(source: str, given: Mapping[str, Any]) -> None:
    """Refuse weights that nothing here can run, before they are read: what diffusers says of them depends on the
    backend and seldom names a package.

    Args:
        source: a folder or a hub id.
        given: arguments of `from_pretrained`; components among them are not looked at.

    Raises:
        UsageError: a package or a device is missing; the message says which.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = {k: v for k, v in given.items() if k in HUB_OPTIONS}
    try:
        index = DiffusionPipeline.load_config(source, **where)
    except (OSError, ValueError):  # from_pretrained says what is wrong
        return
    for part in set(QUANTISED) & set(index) - set(given):
        try:
            config = _ModelConfig.load_config(source, subfolder=part, **where)
        except (OSError, ValueError):
            continue
        method = config.get("quantization_config") or {}
        missing = missing_for(method, device=device)
        if missing:
            raise UsageError(
                f"{source} could not be loaded: its {part} is quantised with {method.get('quant_method')}, which "
                f"needs {missing}"
            )


def class_name(index: Mapping[str, Any]) -> str:
    """Of a pipeline's `model_index.json`: a folder that brings its own code names file and class."""
    name = index["_class_name"]
    return str(name if isinstance(name, str) else name[1])


def pipeline_class(name: str) -> Any:
    """A class by its name: of this suite, else of diffusers."""
    return getattr(dcgen, name, None) or getattr(diffusers, name)


def loader_of(source: str, given: Mapping[str, Any]) -> Any:
    """What loads a folder or hub id: the class of this suite itself where it names one, so that no code that lies there
    is run."""
    where = {k: v for k, v in given.items() if k in HUB_OPTIONS}
    try:
        name = class_name(DiffusionPipeline.load_config(source, **where))
    except (OSError, ValueError, KeyError):  # from_pretrained says what is wrong
        return DiffusionPipeline
    return getattr(dcgen, name, DiffusionPipeline)


def as_student(pipeline: Any, *, lora: str | None = None, scheduler: str | None = None) -> None:
    """What makes a few-step model of a base: a LoRA, added into the denoiser's weights, and another scheduler, as
    `schedulers.stock` reads it."""
    if lora is not None:
        merge_lora(pipeline, lora)
    if scheduler is not None:
        pipeline.register_modules(scheduler=scheduler_like(scheduler, pipeline.scheduler))


def apply_factors(pipeline: Any) -> None:
    """Wrap a scheduler whose configuration holds Q-Sched's factors. Those of other weights stay out of force, with a
    warning."""
    if pipeline.scheduler.config.get(KEY) is None:
        return
    try:
        found = of_denoiser(pipeline)
    except UnknownWeights as error:
        logger.warning("Q-Sched's factors are in force unchecked: %s", error)
        found = None
    pipeline.scheduler = QSched.wrap(pipeline.scheduler, fingerprint=found)
