"""Loading of pipelines from folders and hub ids, with packed weights and Q-Sched's factors."""

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

from diffalign.core.errors import UsageError, UserError, one_line
from diffalign.core.fingerprint import UnknownWeights, of_denoiser
from diffalign.core.hub import status
from diffalign.lora.files import merge_lora
from diffalign.pipelines import dcgen, folders, hub
from diffalign.pipelines.places import INDEX, Place, UnknownModel, class_name, read_index
from diffalign.quantization.backends import missing_for
from diffalign.schedulers import QSched
from diffalign.schedulers.coefficients import KEY
from diffalign.schedulers.stock import scheduler_like

logger = logging.getLogger(__name__)
QUANTISED = ("transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Components that may have quantised weights."""
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")
"""Arguments of `from_pretrained` that select files on the hub."""


UNREADABLE = (
    *(OSError, SafetensorError, ImportError, NotImplementedError, ValueError, UnpicklingError),
    *(RuntimeError, AttributeError, KeyError, IndexError, TypeError),
)
"""Errors that the libraries raise for files that are missing, damaged or of another model."""


class _ModelConfig(ConfigMixin):
    config_name = "config.json"


class _SchedulerConfig(ConfigMixin):
    config_name = "scheduler_config.json"


@dataclass(frozen=True)
class Folder:
    """Pipeline in diffusers' layout whose weights are not read yet.

    The `source` is a folder or a hub id.
    """

    source: str
    index: dict[str, Any]
    options: dict[str, Any]
    """Arguments of `from_pretrained`: those that the folder needs and those of the caller."""
    missing: tuple[str, ...] = ()
    """Names of optional components that the folder lacks."""

    @property
    def where(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` that select files on the hub."""
        return {k: v for k, v in self.options.items() if k in HUB_OPTIONS}

    @property
    def class_name(self) -> str:
        return class_name(self.index, f"{self.source}/{INDEX}")

    def component_config(self, part: str) -> dict[str, Any] | None:
        """Return a component's configuration, or None if it cannot be read."""
        kind = _SchedulerConfig if part == "scheduler" else _ModelConfig
        try:
            config = kind.load_config(self.source, subfolder=part, **self.where)
        except (OSError, ValueError):
            return None
        return config if isinstance(config, dict) else None

    def scheduler(self) -> Any:
        """Build the scheduler; return None if its configuration names no diffusers class."""
        config = self.component_config("scheduler") or {}
        entry = self.index.get("scheduler") or [None, None]
        kind = getattr(diffusers, str(config.get("_class_name") or entry[1]), None)
        if kind is None or not config:
            return None
        settings = inspect.signature(kind).parameters
        return kind.from_config({k: v for k, v in config.items() if k in settings})


def open_folder(place: Place, arguments: Mapping[str, Any]) -> Folder:
    """Read the index of a pipeline's folder or hub id, and collect its loading arguments.

    Args:
        arguments: arguments of `from_pretrained`, including components.

    Raises:
        UnknownModel: the pipeline does not exist, access is denied, or it is damaged or incomplete.
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
    needed = folders.options(index, files, where=place.source, passed=arguments)
    missing = tuple(k for k, v in needed.items() if v is None and index[k][0] is not None)
    rest = {k: v for k, v in arguments.items() if k != "revision" or v is not None}
    return Folder(place.source, index, extra | needed | rest, missing)


def check_backends(folder: Folder) -> None:
    """Check that quantised weights can run on this machine, before they are read.

    The errors of diffusers depend on the backend and seldom name the missing package.

    Raises:
        UsageError: a package or a device is missing; the message names it.
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
    """Return the pipeline class of this name, from this suite or else from diffusers."""
    return getattr(dcgen, name, None) or getattr(diffusers, name)


def from_folder(folder: Folder) -> Any:
    """Load a pipeline.

    If the folder names a class of this suite, the installed class is used, and no code in the folder runs.

    Raises:
        UnknownModel: the pipeline's files cannot be read.
    """
    for part in folder.missing:
        logger.warning("%s has no folder %s; it is used without", folder.source, part)
    loader = getattr(dcgen, folder.class_name, DiffusionPipeline)
    with readable(folder.source):
        return loader.from_pretrained(folder.source, **folder.options)


@contextmanager
def readable(source: str) -> Iterator[None]:
    """Convert errors of the libraries that read a model into one line.

    Raises:
        UnknownModel: a library failed in this block.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except UNREADABLE as error:
        reason = one_line(error)
        if isinstance(error, UnpicklingError) or "weights_only" in reason:
            reason = (
                "weights in a pickle (.bin) hold more than tensors, and such a file can run code when it is read: take "
                "the model's .safetensors files"
            )
        elif status(error) is not None or isinstance(error, LocalEntryNotFoundError):
            reason = hub.refusal(error, source)
        raise UnknownModel(f"{source} could not be loaded: {reason}") from error


def as_student(pipeline: Any, *, lora: str | None = None, scheduler: str | None = None) -> None:
    """Turn a base model into a few-step model, in place.

    Args:
        lora: LoRA to merge into the denoiser's weights.
        scheduler: name of the new scheduler, in the notation of `schedulers.stock`.
    """
    if lora is not None:
        merge_lora(pipeline, lora)
    if scheduler is not None:
        pipeline.register_modules(scheduler=scheduler_like(scheduler, pipeline.scheduler))


def apply_factors(pipeline: Any) -> None:
    """Wrap a scheduler whose configuration holds Q-Sched's factors.

    Factors of other weights are not applied, with a warning.
    """
    if pipeline.scheduler.config.get(KEY) is None:
        return
    try:
        fingerprint = of_denoiser(pipeline)
    except UnknownWeights as error:
        logger.warning("Q-Sched's factors are in force unchecked: %s", error)
        fingerprint = None
    pipeline.scheduler = QSched.wrap(pipeline.scheduler, fingerprint=fingerprint)
