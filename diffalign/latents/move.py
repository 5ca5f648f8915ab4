"""Denoiser for another latent space: the base model's blocks with new first and last layers.

The blocks are not copied. Old and new denoiser share them, and adapters that are attached to one are attached to the
other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign.core.errors import UserError
from diffalign.latents.alignment import LinearFit

CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")
"""Attributes of a diffusers model for gradient checkpointing."""


class MoveError(UserError, ValueError):
    """Error for a denoiser that cannot be moved, or for ends that do not fit."""


@dataclass(frozen=True)
class Ends:
    """Names of a denoiser's patch embedder and of its last layer.

    Each is a linear layer, or a convolution as wide as its stride.
    """

    embedder: str
    head: str


def layer(denoiser: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    """Return the layer of a name without its adapters."""
    module = denoiser.get_submodule(name)
    return cast(nn.Linear | nn.Conv2d, getattr(module, "base_layer", module))


def matrix(end: nn.Linear | nn.Conv2d) -> Tensor:
    """Return the matrix (D, C p p) of an end, with columns as in `codec.pack`."""
    return end.weight.flatten(1)


def moved(denoiser: Any, ends: Ends, **changes: Any) -> Any:
    """Return a denoiser with changed configuration that shares all modules but its ends.

    The ends are zero until `set_layer`.

    Args:
        denoiser: the old denoiser.
        ends: names of its first and last layer.
        changes: settings of the new configuration.

    Raises:
        MoveError: more than the ends would change.
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
        raise MoveError(
            f"{type(denoiser).__name__} cannot be moved: {different[0]} would have another shape. Only the first and "
            "last layer may change."
        )
    for end in (ends.embedder, ends.head):
        module = new.get_submodule(end)
        module.to_empty(device=denoiser.device).to(denoiser.dtype).requires_grad_(False)
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    for setting in CHECKPOINTING:
        if hasattr(denoiser, setting):
            setattr(new, setting, getattr(denoiser, setting))
    return new.train(denoiser.training)


def _take_over(new: nn.Module, old: nn.Module, name: str, ends: Ends) -> None:
    """Share the parameters beside an end in its module, such as SD3's position table."""
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
def set_layer(end: nn.Linear | nn.Conv2d, fit: LinearFit) -> None:
    """Copy weight (D, d) and bias (D,) of a fit into a layer.

    Raises:
        MoveError: the layer has another size.
    """
    if fit.weight.shape != matrix(end).shape:
        raise MoveError(
            f"a fit of {tuple(fit.weight.shape)} is not for {tuple(matrix(end).shape)}. Align the layers again."
        )
    end.weight.copy_(fit.weight.view_as(end.weight))
    if end.bias is not None:
        end.bias.copy_(fit.bias)


def save_ends(denoiser: nn.Module, ends: Ends, file: Path) -> None:
    """Save both layers for `load_ends`."""
    tensors = {
        f"{end}.{part}": getattr(layer(denoiser, end), part).detach().contiguous().cpu()
        for end in (ends.embedder, ends.head)
        for part in ("weight", "bias")
    }
    save_file(tensors, file)


@torch.no_grad()
def load_ends(denoiser: nn.Module, ends: Ends, file: Path) -> None:
    """Load both layers from a file.

    Raises:
        MoveError: the file is damaged or of another model.
    """
    try:
        with safe_open(file, "pt") as stored:
            tensors = {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise MoveError(f"{file} is damaged ({error}). Delete it to align again.") from error
    for end in (ends.embedder, ends.head):
        for part in ("weight", "bias"):
            own, saved = getattr(layer(denoiser, end), part), tensors.get(f"{end}.{part}")
            if saved is None or saved.shape != own.shape:
                raise MoveError(
                    f"{file} is of another model: {end}.{part} does not fit. Delete it to align again."
                )
            own.copy_(saved)
