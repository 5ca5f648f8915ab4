"""LoRAs of an accelerated pipeline: loaded in the order that works, swapped without compiling again, or refused."""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import nn

from diffalign.acceleration.parts import Inapplicable, denoiser_of
from diffalign.acceleration.undo import Undo, replace_method
from diffalign.core.errors import UsageError, first_line
from diffalign.lora.policies import check_mergeable

logger = logging.getLogger(__name__)
HOTSWAP = "_prepare_lora_hotswap_kwargs"
"""Attribute by which diffusers pads the first LoRA for its successors."""
REPLACED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""Layers of an attention that each of its fused projections replaces."""
NOT_FUSED = "Leave the LoRA as an adapter; or call `restore`, fuse it, and call `accelerate` then."
"""Advice for a LoRA that cannot be fused with quantised weights."""


def guard_loras(pipeline: Any, undo: Undo, *, rank: int | None, compiled: bool) -> None:
    """Watch over the LoRAs that are loaded onto an accelerated pipeline.

    Args:
        pipeline: pipeline of diffusers.
        undo: gets the steps that end it.
        rank: largest rank of the LoRAs that are swapped without compiling again; None for no preparation.
        compiled: whether the denoiser's blocks are compiled.
    """
    if not hasattr(pipeline, "load_lora_weights"):
        return
    load, fuse = pipeline.load_lora_weights, pipeline.fuse_lora
    if rank is not None:
        prepare(denoiser_of(pipeline), rank, undo)

    @functools.wraps(load)
    def load_and_check(*args: Any, **kwargs: Any) -> Any:
        before = names_of(denoiser_of(pipeline))
        swaps = bool(kwargs.get("hotswap"))
        if compiled and not swaps and (rank is None or before):
            logger.warning(_advice(rank, before))
        if rank is not None and not before:
            # diffusers forgets the preparation after the first LoRA
            setattr(denoiser_of(pipeline), HOTSWAP, _settings(rank))
        try:
            result = load(*args, **kwargs)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise UsageError(_refusal(error, rank, before, denoiser_of(pipeline))) from error
        names = names_of(denoiser_of(pipeline)) - before
        _check_loaded(pipeline, {str(kwargs["adapter_name"])} if swaps else names, swaps=swaps)
        return result

    @functools.wraps(fuse)
    def check_and_fuse(*args: Any, **kwargs: Any) -> Any:
        for layer in denoiser_of(pipeline).modules():
            if hasattr(layer, "lora_B"):
                check_mergeable(layer.base_layer, advice=NOT_FUSED)
        return fuse(*args, **kwargs)

    replace_method(pipeline, "load_lora_weights", load_and_check, undo)
    replace_method(pipeline, "fuse_lora", check_and_fuse, undo)


def prepare(denoiser: Any, rank: int, undo: Undo) -> None:
    """Let diffusers pad the first LoRA to the rank of its successors.

    Raises:
        UsageError: the denoiser carries a LoRA already.
    """
    if names_of(denoiser):
        names = ", ".join(sorted(names_of(denoiser)))
        raise UsageError(
            f"lora_rank={rank}: the denoiser carries the LoRA {names} already, and a LoRA is padded when it is loaded. "
            "Call `unload_lora_weights`, then `accelerate`, and load the LoRA then."
        )
    before = vars(denoiser).get(HOTSWAP)

    def put_back() -> None:
        vars(denoiser).pop(HOTSWAP, None)
        if before is not None:
            setattr(denoiser, HOTSWAP, before)

    undo.add(put_back)
    setattr(denoiser, HOTSWAP, _settings(rank))


def load_for_guidance(pipeline: Any, source: str, undo: Undo) -> None:
    """Load a LoRA that draws without guidance.

    Raises:
        Inapplicable: the denoiser carries a LoRA already.
        UsageError: the LoRA does not fit the pipeline, or has no effect.
    """
    from diffalign.lora.files import load_lora

    denoiser = denoiser_of(pipeline)
    if names_of(denoiser):
        why = "the denoiser carries a LoRA already"
        raise Inapplicable("guidance", source, why, "Merge the other one first (`diffalign merge`)")
    undo.add(denoiser.unload_lora)
    load_lora(pipeline, source)
    check_effect(denoiser, names_of(denoiser))


def names_of(denoiser: Any) -> set[str]:
    """Return the names of a denoiser's LoRAs."""
    return set(getattr(denoiser, "peft_config", None) or {})


def why_silent(denoiser: nn.Module, name: str) -> str | None:
    """Return why a LoRA or a part of it changes nothing.

    Return None if all of its layers are in force, or if it is no LoRA.
    """
    layers = [(n, m) for n, m in denoiser.named_modules() if name in getattr(m, "lora_B", {})]
    if not layers:
        return None
    if not any(_moves(layer, name) for _, layer in layers):
        return f"the LoRA {name} has no effect: its {len(layers)} layers add zero"
    fused = _replaced(denoiser)
    ignored = [n for n, _ in layers if n in fused]
    if not ignored:
        return None
    effect = (
        "has no effect"
        if len(ignored) == len(layers)
        else f"has no effect in {len(ignored)} of {len(layers)} layers"
    )
    return f"the LoRA {name} {effect}: attention reads fused projections instead, such as those of {ignored[0]}"


def check_effect(denoiser: nn.Module, names: set[str]) -> None:
    """Check that LoRAs change what a denoiser computes.

    Raises:
        UsageError: a LoRA or some of its layers have no effect.
    """
    for name in sorted(names):
        reason = why_silent(denoiser, name)
        if reason is not None:
            remedy = (
                f"Call `unfuse_qkv_projections` of the {type(denoiser).__name__}"
                if "fused" in reason
                else "Load a LoRA that was trained, or unload this one"
            )
            raise UsageError(f"lora={name!r}: {reason}. {remedy}.")


def _replaced(denoiser: nn.Module) -> set[str]:
    """Return the names of the layers that fused projections replace."""
    return {
        f"{name}.{layer}"
        for name, part in denoiser.named_modules()
        if getattr(part, "fused_projections", False)
        for projection, layers in REPLACED.items()
        if hasattr(part, projection)
        for layer in layers
    }


def _moves(layer: Any, name: str) -> bool:
    """Return whether a layer of a LoRA adds anything but zero."""
    up, down = layer.lora_B[name].weight, layer.lora_A[name].weight
    return bool(layer.scaling[name] != 0) and bool(up.any()) and bool(down.any())


def _check_loaded(pipeline: Any, names: set[str], *, swaps: bool) -> None:
    """Raise UsageError, and unload, if what was loaded changes nothing."""
    denoiser = denoiser_of(pipeline)
    encoders = [p for n, p in pipeline.components.items() if n.startswith("text_encoder")]
    if not names and not any(names_of(part) for part in encoders):
        raise UsageError(
            f"load_lora_weights: the file holds no layer of this {type(pipeline).__name__}. Load a LoRA of its model."
        )
    try:
        check_effect(denoiser, names)
    except UsageError:
        if not swaps:
            pipeline.delete_adapters(sorted(names))
        raise


def _settings(rank: int) -> dict[str, Any]:
    # a cache stands where diffusers looks for a compiled model, and blocks are compiled in the next call
    return {"target_rank": rank, "check_compiled": "ignore"}


def _advice(rank: int | None, before: set[str]) -> str:
    """Return the warning about a LoRA for which compiled blocks are compiled again."""
    if rank is None:
        return (
            "load_lora_weights: the compiled blocks are compiled again in the next call. To swap LoRAs without that, "
            "call `restore`, then `accelerate` with lora_rank=RANK."
        )
    name = sorted(before)[0]
    return (
        f"load_lora_weights: a LoRA beside {name} compiles the blocks again in the next call. To take the place of "
        f"{name} without that, pass adapter_name={name!r}, hotswap=True."
    )


def _refusal(error: BaseException, rank: int | None, before: set[str], denoiser: Any) -> str:
    """Return the message about a LoRA that diffusers could not load."""
    lost = sorted(before - names_of(denoiser))
    unloaded = f" The LoRA {', '.join(lost)} is unloaded." if lost else ""
    setting = "load_lora_weights" if rank is None else f"lora_rank={rank}"
    remedy = (
        "Load a LoRA of the pipeline's model"
        if rank is None
        else "Call `restore`, then `accelerate` with a `lora_rank` that all LoRAs keep to. A LoRA takes the place of "
        "another one if it changes no other layers"
    )
    return f"{setting}: the LoRA cannot be loaded ({first_line(error).rstrip('.')}).{unloaded} {remedy}."
