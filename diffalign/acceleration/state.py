"""State of a pipeline that an acceleration must bring back, and how two states differ."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from diffalign.acceleration.tap import DENOISERS, IMPLEMENTATION, METHODS
from diffalign.core.fingerprint import UnknownWeights, checksum

PRIVATE = ("_diffusers_hook", "_hf_hook", "forward", IMPLEMENTATION)
"""Attributes by which hooks and compilation change a module."""
NAMED = 3
"""Number of weights or modules that a difference names."""
ADAPTER = "lora_"
"""Part of the names of a LoRA's modules and weights."""
State = dict[str, Any]


def state_of(pipeline: Any) -> State:
    """Return what an acceleration may change, by a name for messages.

    Weights are compared by all of their bits. The state holds no weights and keeps no module alive.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    state: State = {"attention backend": _AttentionBackendRegistry._active_backend}
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            state |= _module_state(name, part)
    scheduler = pipeline.scheduler
    state["scheduler"] = weakref.ref(scheduler)
    state["settings of scheduler"] = dict(scheduler.config)
    state["hooks of scheduler"] = set(METHODS) & set(vars(scheduler))
    vae = getattr(pipeline, "vae", None)
    state["tiling of vae"] = [getattr(vae, n, None) for n in ("use_slicing", "use_tiling")]
    return state


def weights_of(pipeline: Any) -> dict[str, Any]:
    """Return the weights and LoRAs of a pipeline as JSON values.

    Any change of a bit changes them.
    """
    parts = pipeline.components.items()
    return {
        name: [_weights(part), _adapters(part)]
        for name, part in parts
        if isinstance(part, nn.Module)
    }


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return what differs between two states, in words.

    Weights, modules and hooks of a component that was replaced are not compared.
    """
    different: list[str] = []
    replaced: set[str] = set()
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        component = name.rpartition(" of ")[2]
        if old == new or component in replaced:
            continue
        if isinstance(old, weakref.ref) or isinstance(new, weakref.ref):
            replaced.add(component)
            different.append(f"{name} (another object)")
        elif isinstance(old, dict) and isinstance(new, dict):
            different.append(f"{name} ({_named(old, new)})")
        else:
            different.append(name)
    return different


def _named(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = [n for n in dict.fromkeys([*old, *new]) if old.get(n) != new.get(n)]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(n or "itself" for n in names[:NAMED]) + more


def _module_state(name: str, part: nn.Module) -> State:
    state: State = {
        name: weakref.ref(part),
        f"LoRA of {name}": _adapters(part),
        f"weights of {name}": _weights(part),
        f"modules of {name}": {n: (weakref.ref(m), m.training) for n, m in _modules(part)},
        f"device of {name}": _device(part),
    }
    if isinstance(config := getattr(part, "config", None), Mapping):
        state[f"settings of {name}"] = dict(config)
    # transformers puts hooks of its own into text encoders in their first call
    if name in (*DENOISERS, "vae"):
        state[f"hooks of {name}"] = hooks_of(part)
    return state


def _plain(name: str) -> str:
    """Return the name that a module or weight has without a LoRA."""
    return name.replace(".base_layer", "")


def _modules(part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules by name; of a layer with a LoRA the layer alone."""
    for name, module in part.named_modules():
        if ADAPTER not in name and not hasattr(module, "base_layer"):
            yield _plain(name), module


def _adapters(part: Any) -> dict[str, Any]:
    """Return the adapters by name: whether each is active, and its weights."""
    names = getattr(part, "peft_config", None) or {}
    if not names:
        return {}
    active = part.active_adapters() if hasattr(part, "active_adapters") else ()
    on = [active] if isinstance(active, str) else list(active)
    weights = [(n, w) for n, w in part.state_dict().items() if ADAPTER in n]
    disabled = [getattr(m, "disable_adapters", False) for m in part.modules()]
    return {
        adapter: (
            adapter in on,
            any(disabled),
            {n: checksum(w) for n, w in weights if f".{adapter}." in n},
        )
        for adapter in names
    }


def _weights(part: nn.Module) -> dict[str, str]:
    """Return dtype, shape and checksum of each weight, LoRAs left out.

    A weight that is not in memory has no checksum.
    """
    rows: dict[str, str] = {}
    for name, tensor in part.state_dict().items():
        if ADAPTER in name or not isinstance(tensor, torch.Tensor):
            continue
        try:
            digits = checksum(tensor)
        except UnknownWeights:
            digits = "not in memory"
        rows[_plain(name)] = f"{tensor.dtype} {tuple(tensor.shape)} {digits}"
    return rows


def _device(part: nn.Module) -> str:
    """Return the devices of a module's weights."""
    return " ".join(sorted({str(p.device) for p in part.parameters()}))


def _changes(module: nn.Module, attribute: str) -> bool:
    """Return whether an attribute of a module changes its calls."""
    value = vars(module).get(attribute)
    if attribute == "_diffusers_hook":
        return bool(getattr(value, "hooks", None))
    # a removed hook leaves the class's own method on the instance
    is_own = getattr(value, "__func__", None) is getattr(type(module), attribute, value)
    return value is not None and not is_own


def hooks_of(module: nn.Module) -> list[tuple[str, ...]]:
    """Return the hooks, compilations and attention processors of a module and its parts."""
    rows: list[tuple[str, ...]] = []
    for name, part in module.named_modules():
        if ADAPTER in name:
            continue
        for attribute in PRIVATE:
            if _changes(part, attribute):
                rows.append((_plain(name), attribute))
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        rows += [(_plain(name), "hook", str(id(hook))) for hook in hooks]
        processor = getattr(part, "processor", None)
        if processor is not None:
            backend = getattr(processor, "_attention_backend", None)
            rows.append((_plain(name), type(processor).__name__, str(id(processor)), str(backend)))
    return rows
