"""Checks of models before their weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from diffalign.pipelines import hub
from diffalign.pipelines.base import set_timesteps
from diffalign.pipelines.loading import Folder, open_folder
from diffalign.pipelines.places import Place, UnknownModel, look
from diffalign.pipelines.registry import ModelSpec, family_of, resolve, source_of
from diffalign.schedulers.stock import scheduler_like

NOTHING: Mapping[str, Any] = MappingProxyType({})


def check_pipeline(
    spec: ModelSpec, *, revision: str | None = None, arguments: Mapping[str, Any] = NOTHING
) -> None:
    """Check that a pipeline is supported, by its class and scheduler.

    Raises:
        UnknownModel: the family is not supported, or files are missing.
        UsageError: models of the family cannot be used with the scheduler.
    """
    place = _place(spec)
    if place is None:
        return
    folder = open_folder(place, {**arguments, "revision": revision})
    family = family_of(folder.class_name)
    scheduler = _scheduler(folder, spec)
    if scheduler is not None:
        family.path_of(scheduler)


def check_steps(name: str, num_inference_steps: int) -> None:
    """Check that a model's scheduler supports a number of steps.

    The hub is not queried, so a model that is not on this machine yet is not checked.

    Raises:
        UsageError: the scheduler does not support the number; the message gives the reason.
    """
    spec = resolve(name)
    place = _place(spec)
    if place is None:
        return
    if place.kind == "hub" and not hub.cached_files(place.source, spec.revision):
        return
    try:
        folder = open_folder(place, {"revision": spec.revision, "local_files_only": True})
    # the cache may hold a part of a model only
    except UnknownModel:
        if place.kind == "hub":
            return
        raise
    scheduler = _scheduler(folder, spec)
    if scheduler is None:
        return
    shifts = scheduler.config.get("use_dynamic_shifting")
    set_timesteps(scheduler, num_inference_steps, **({"mu": 1.0} if shifts else {}))


def _place(spec: ModelSpec) -> Place | None:
    """Return the folder or hub id of a model, or None for a single file."""
    place = look(source_of(spec))
    return None if place is None or place.kind == "file" else place


def _scheduler(folder: Folder, spec: ModelSpec) -> Any:
    """Return the scheduler that a model samples with, or None for an unknown class."""
    scheduler = folder.scheduler()
    if scheduler is None or not spec.scheduler:
        return scheduler
    return scheduler_like(spec.scheduler, scheduler)
