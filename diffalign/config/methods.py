"""Registry of methods: import paths of settings, run and trainer of each algorithm.

Entries are strings, so that listing methods imports neither torch nor a trainer. An installed package adds a method by
an entry point of the group "diffalign.algorithms" that names a `Method`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from diffalign.config.checks import ConfigError
from diffalign.core.nearest import nearest

ENTRY_POINT_GROUP = "diffalign.algorithms"
DEFAULT = "awm"


@dataclass(frozen=True)
class Method:
    """Entry of the registry; every path is "module:Class" or "module:function"."""

    config: str
    """Path of the algorithm's dataclass; its `type` is the method's name."""
    run: str
    """Path of the dataclass of the whole run."""
    trainer: str
    """Path of a subclass of `training.trainer.Trainer`."""
    title: str
    """Title above the method's recipes in `diffalign list recipes`."""
    cache: str | None = None
    """Path of a function (config, model, accelerator) that fills the cache of images.

    None for methods without a cache.
    """
    loss: str | None = None
    """Path of the loss of an online method: a `ForwardLoss` or a `TrajectoryLoss` of `diffalign.algorithms`.

    None for methods whose trainer has its own loss.
    """
    source: str | None = None
    """Path of a function (config) that checks the pairs or images to train on.

    It is called before a model is loaded. None for methods that train on prompts.
    """


def _method(
    kind: str, config: str, title: str, *, loss: str | None = None, trainer: str | None = None
) -> Method:
    """Return the entry of a built-in algorithm. Its kind decides the run, and the trainer if none is given.

    Args:
        config: "module:Class" in `diffalign.config`.
        loss: name of the module in `diffalign.algorithms` that has the loss of an online method.
        trainer: "module:Class" in the kind's folder of `diffalign.methods`.
    """
    run, common, *images = _KINDS[kind]
    trainer = common if trainer is None else f"diffalign.methods.{kind}.{trainer}"
    path = None if loss is None else f"diffalign.algorithms.{loss}:LOSS"
    cache, source = images or (None, None)
    return Method(f"diffalign.config.{config}", run, trainer, title, cache, path, source)


_KINDS: dict[str, tuple[str, ...]] = {
    "online": (
        "diffalign.config.online:RunConfig",
        "diffalign.methods.online.trainer:OnlineTrainer",
    ),
    "preference": (
        "diffalign.config.preference:PreferenceRunConfig",
        "diffalign.methods.preference.trainer:PreferenceTrainer",
        "diffalign.methods.preference.precompute:precompute",
        "diffalign.methods.preference.precompute:check_source",
    ),
    "distillation": (
        "diffalign.config.distillation:DistillationRunConfig",
        "diffalign.methods.distillation.reflow:ReflowTrainer",
    ),
    "dcgen": (
        "diffalign.config.latents:LatentRunConfig",
        "diffalign.methods.dcgen.trainer:LatentTrainer",
        "diffalign.methods.dcgen.maker:precompute_latents",
        "diffalign.methods.dcgen.maker:check_source",
    ),
}
"""Paths of run and trainer of each folder of `diffalign.methods`.

Methods that train on pairs or images have two more paths: `Method.cache` and `Method.source`.
"""
METHODS = {
    "awm": _method("online", "algorithms:AWMConfig", "AWM (online RL)", loss="awm"),
    "diffusion_nft": _method(
        "online", "algorithms:DiffusionNFTConfig", "DiffusionNFT (online RL)", loss="diffusion_nft"
    ),
    "crd": _method("online", "algorithms:CRDConfig", "CRD (online RL)", loss="crd"),
    "dgpo": _method("online", "algorithms:DGPOConfig", "DGPO (online RL)", loss="dgpo"),
    "fdfo": _method("online", "fdfo:FDFOConfig", "FDFO (online RL)", loss="fdfo"),
    "flow_grpo": _method(
        "online", "algorithms:FlowGRPOConfig", "Flow-GRPO (online RL)", loss="flow_grpo"
    ),
    "flow_dppo": _method(
        "online", "algorithms:FlowDPPOConfig", "Flow-DPPO (online RL)", loss="flow_dppo"
    ),
    "inversion_dpo": _method(
        "preference", "preference:InversionDPOConfig", "Inversion-DPO (preference pairs)"
    ),
    "diffusion_dpo": _method(
        "preference", "preference:DiffusionDPOConfig", "Diffusion-DPO (preference pairs)"
    ),
    "reflow": _method(
        "distillation", "distillation:ReflowConfig", "Piecewise rectified flow (few-step student)"
    ),
    "consistency": _method(
        "distillation",
        "distillation:ConsistencyConfig",
        "Latent consistency (few-step student)",
        trainer="consistency:ConsistencyTrainer",
    ),
    "dcgen": _method("dcgen", "latents:DCGenConfig", "DC-Gen (deeply compressed latents)"),
}


@cache
def available() -> dict[str, Method]:
    """Return all methods by name: built-in methods and those of installed packages."""
    methods = dict(METHODS)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name not in methods:
            methods[point.name] = point.load()
    return methods


def method(name: Any) -> Method:
    """Return the method of this name.

    Raises:
        ConfigError: no method has this name; the message names the nearest one.
    """
    methods = available()
    if not isinstance(name, str) or name not in methods:
        hint = nearest(str(name), list(methods))
        raise ConfigError(f"algorithm.type: unknown value {name!r}{hint}")
    return methods[name]


def kind_of(algorithm: Any) -> Any:
    """Return the `type` in a mapping of an algorithm's settings, or the default type."""
    return algorithm.get("type", DEFAULT) if isinstance(algorithm, Mapping) else DEFAULT


def imported(place: str) -> Any:
    """Return the class or function at "module:name"."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def algorithm_class(name: Any) -> Any:
    """Return the dataclass of an algorithm's settings."""
    return imported(method(name).config)


def run_class(name: Any) -> Any:
    """Return the dataclass of the settings of a method's run."""
    return imported(method(name).run)


def trainer_class(name: Any) -> Any:
    """Return the trainer class of a method; the import loads torch."""
    return imported(method(name).trainer)


def cache_filler(name: Any) -> Any:
    """Return the function that fills a method's cache, or None; the import loads torch."""
    place = method(name).cache
    return None if place is None else imported(place)


def loss(name: Any) -> Any:
    """Return the loss of an online method; the import loads torch.

    Raises:
        ConfigError: the method has no loss in the registry.
    """
    place = method(name).loss
    if place is None:
        raise ConfigError(
            f"algorithm.type: the method {name} names no loss. Give its `Method` the path of a ForwardLoss or a "
            "TrajectoryLoss as `loss`"
        )
    return imported(place)


def source_check(name: Any) -> Any:
    """Return the function that checks a method's pairs or images, or None."""
    place = method(name).source
    return None if place is None else imported(place)
