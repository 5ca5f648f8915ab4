"""Pipelines from folders and hub ids, packed weights and Q-Sched's factors among them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, DiffusionPipeline
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError

from diffalign.core.errors import UsageError, UserError
from diffalign.core.fingerprint import UnknownWeights, of_denoiser
from diffalign.lora.files import merge_lora
from diffalign.pipelines import dcgen, folders, hub
from diffalign.pipelines.places import INDEX, Place, UnknownModel, class_name, read_index
from diffalign.quantization.backends import missing_for
from diffalign.schedulers import QSched
from diffalign.schedulers.coefficients import KEY
from diffalign.schedulers.stock import scheduler_like

logger = logging.getLogger(__name__)
QUANTISED = ("transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Components that may be."""
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")
"""Arguments of `from_pretrained` that say where files are."""


UNREADABLE = (
    *(OSError, SafetensorError, ImportError, NotImplementedError, ValueError, UnpicklingError),
    *(RuntimeError, AttributeError, KeyError, IndexError, TypeError),
)
"""Errors of the libraries at files that are missing, damaged or of another model."""


class _ModelConfig(ConfigMixin):
    config_name = "config.json"


class _SchedulerConfig(ConfigMixin):
    config_name = "scheduler_config.json"


@dataclass(frozen=True)
class Folder:
    """A pipeline in diffusers' layout before its weights are read: `source` is a folder or a hub id."""

    source: str
    index: dict[str, Any]
    options: dict[str, Any]
    """Arguments of `from_pretrained`: what the folder calls for and what was given."""

    @property
    def where(self) -> dict[str, Any]:
        """The arguments that say where files are."""
        return {k: v for k, v in self.options.items() if k in HUB_OPTIONS}

    @property
    def class_name(self) -> str:
        return class_name(self.index, f"{self.source}/{INDEX}")

    def component_config(self, part: str) -> dict[str, Any] | None:
        """A component's `config.json`; None where there is none."""
        kind = _SchedulerConfig if part == "scheduler" else _ModelConfig
        try:
            config = kind.load_config(self.source, subfolder=part, **self.where)
        except (OSError, ValueError):
            return None
        return config if isinstance(config, dict) else None

    def scheduler(self) -> Any:
        """Make the scheduler from its configuration; None where that names no class of diffusers."""
        config = self.component_config("scheduler") or {}
        entry = self.index.get("scheduler") or [None, None]
        kind = getattr(diffusers, str(config.get("_class_name") or entry[1]), None)
        if kind is None or not config:
            return None
        settings = inspect.signature(kind).parameters
        return kind.from_config({k: v for k, v in config.items() if k in settings})


def open_folder(place: Place, arguments: Mapping[str, Any]) -> Folder:
    """Look at a pipeline's folder or hub id, and at what its loading needs.

    Args:
        arguments: of `from_pretrained`, components among them.

    Raises:
        UnknownModel: it is not there, not shown, damaged or not complete.
    """
    revision = arguments.get("revision") or place.revision
    if place.kind == "folder":
        index, files = read_index(place.source), folders.files_of(place.source)
        extra: dict[str, Any] = {}
    else:
        access = {k: arguments.get(k) for k in ("token", "cache_dir")}
        if arguments.get("local_files_only"):
            files = hub.cached_files(place.source, revision, access["cache_dir"])
            repo = hub.Repository(files, reachable=False)
        else:
            repo = hub.repository(place.source, revision, **access)
        index = read_index(hub.fetch_index(place.source, revision, repo=repo, **access).parent)
        files, extra = repo.files, {"revision": revision, **repo.options}
    extra |= folders.options(index, files, where=place.source, passed=arguments)
    rest = {k: v for k, v in arguments.items() if k != "revision" or v is not None}
    return Folder(place.source, index, extra | rest)


def check_backends(folder: Folder) -> None:
    """Refuse weights that nothing here can run, before they are read: what diffusers says of them depends on the
    backend and seldom names a package.

    Raises:
        UsageError: a package or a device is missing; the message says which.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for part in set(QUANTISED) & set(folder.index) - set(folder.options):
        method = (folder.component_config(part) or {}).get("quantization_config") or {}
        missing = missing_for(method, device=device)
        if missing:
            raise UsageError(
                f"{folder.source} could not be loaded: its {part} is quantised with {method.get('quant_method')}, "
                f"which needs {missing}"
            )


def pipeline_class(name: str) -> Any:
    """A class by its name: of this suite, else of diffusers."""
    return getattr(dcgen, name, None) or getattr(diffusers, name)


def from_folder(folder: Folder) -> Any:
    """Load the pipeline.

    Where the folder names a class of this suite, that one is taken: no code that lies there is run.

    Raises:
        UnknownModel: its files cannot be read.
    """
    loader = getattr(dcgen, folder.class_name, DiffusionPipeline)
    with readable(folder.source):
        return loader.from_pretrained(folder.source, **folder.options)


@contextmanager
def readable(source: str) -> Iterator[None]:
    """Errors of the libraries that read a model as one line.

    Raises:
        UnknownModel: instead of them.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnpicklingError) or "weights_only" in reason:
            reason = (
                "weights in a pickle (.bin) hold more than tensors, and such a file can run code when it is read: take "
                "the model's .safetensors files"
            )
        elif hub.status(error) is not None or isinstance(error, LocalEntryNotFoundError):
            reason = hub.refusal(error, source)
        raise UnknownModel(f"{source} could not be loaded: {reason}") from error


def as_student(pipeline: Any, *, lora: str | None = None, scheduler: str | None = None) -> None:
    """Make a few-step model of a base: a LoRA, added into the denoiser's weights, and another scheduler, as
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
