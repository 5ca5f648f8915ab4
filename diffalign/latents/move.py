"""A denoiser for another latent space: its own blocks, a new first and a new last layer.

Nothing of the blocks is copied: old and new denoiser share them, and adapters that are attached to one are seen by the
other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign.core.errors import UserError
from diffalign.latents.alignment import LinearFit

CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")
"""Attributes of a diffusers model that say whether and how it recomputes activations."""


class MoveError(UserError, ValueError):
    """A denoiser that cannot be moved, or first and last layers that do not fit."""


@dataclass(frozen=True)
class Ends:
    """Names of a denoiser's patch embedder and of its last layer: a linear layer, or a convolution as wide as its
    stride."""

    embedder: str
    head: str


def layer(denoiser: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    """The plain layer of that name, under whatever adapters it carries."""
    found = denoiser.get_submodule(name)
    plain: Any = getattr(found, "base_layer", found)
    return plain


def matrix(found: nn.Linear | nn.Conv2d) -> Tensor:
    """(D, C p p): what a patch in the order (channel, row, column) is multiplied by."""
    return found.weight.flatten(1)


def moved(denoiser: Any, ends: Ends, **changes: Any) -> Any:
    """A denoiser with these changes of its configuration, that shares all modules with the old one but its ends, whose
    numbers are still to be set (`set_layer`).

    Raises:
        MoveError: more than the ends would differ.
    """
    with torch.device("meta"):
        new = type(denoiser).from_config(denoiser.config, **changes)
    own = {name.partition(".")[0] for name in (ends.embedder, ends.head)}
    for name, child in denoiser.named_children():
        if name not in own:
            setattr(new, name, child)
    for name, parameter in denoiser.named_parameters(recurse=False):
        new.register_parameter(name, parameter)
    for name in own:
        _take_over(new, denoiser, name, ends)
    old = dict([*denoiser.named_parameters(), *denoiser.named_buffers()])
    different = [
        name
        for name, tensor in [*new.named_parameters(), *new.named_buffers()]
        if not name.startswith((f"{ends.embedder}.", f"{ends.head}."))
        and (name not in old or tensor.shape != old[name].shape)
    ]
    if different:
        raise MoveError(f"{type(denoiser).__name__}: {different[0]} would have another shape")
    for end in (ends.embedder, ends.head):
        found = new.get_submodule(end)
        found.to_empty(device=denoiser.device).to(denoiser.dtype).requires_grad_(False)
        nn.init.zeros_(found.weight)
        nn.init.zeros_(found.bias)
    for setting in CHECKPOINTING:
        if hasattr(denoiser, setting):
            setattr(new, setting, getattr(denoiser, setting))
    return new.train(denoiser.training)


def _take_over(new: nn.Module, old: nn.Module, name: str, ends: Ends) -> None:
    """What is beside an end in the module that holds it, such as SD3's table of positions."""
    beside = old.get_submodule(name)
    for part, tensor in [*beside.named_parameters(), *beside.named_buffers()]:
        full = f"{name}.{part}"
        if full.startswith((f"{ends.embedder}.", f"{ends.head}.")):
            continue
        holder, _, leaf = full.rpartition(".")
        module = new.get_submodule(holder)
        if getattr(module, leaf).shape == tensor.shape:
            table = module._buffers if leaf in module._buffers else module._parameters
            table[leaf] = tensor  # type: ignore[assignment]


@torch.no_grad()
def set_layer(found: nn.Linear | nn.Conv2d, fit: LinearFit) -> None:
    """Weight (D, d) and bias (D,) of a fit into a layer.

    Raises:
        MoveError: it is of another size.
    """
    if fit.weight.shape != matrix(found).shape:
        raise MoveError(
            f"a fit of {tuple(fit.weight.shape)} is not for {tuple(matrix(found).shape)}"
        )
    found.weight.copy_(fit.weight.view_as(found.weight))
    if found.bias is not None:
        found.bias.copy_(fit.bias)


def save_ends(denoiser: nn.Module, ends: Ends, file: Path) -> None:
    """Both layers as they are, for `load_ends`."""
    tensors = {
        f"{end}.{part}": getattr(layer(denoiser, end), part).detach().contiguous().cpu()
        for end in (ends.embedder, ends.head)
        for part in ("weight", "bias")
    }
    save_file(tensors, file)


@torch.no_grad()
def load_ends(denoiser: nn.Module, ends: Ends, file: Path) -> None:
    """Take both layers from a file.

    Raises:
        MoveError: it is damaged, or of another model.
    """
    try:
        with safe_open(file, "pt") as stored:
            tensors = {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise MoveError(f"{file} is damaged ({error}); delete it to align again") from error
    for end in (ends.embedder, ends.head):
        for part in ("weight", "bias"):
            here, there = getattr(layer(denoiser, end), part), tensors.get(f"{end}.{part}")
            if there is None or there.shape != here.shape:
                raise MoveError(f"{file} is of another model: {end}.{part} does not fit")
            here.copy_(there)
