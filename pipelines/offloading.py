"""Keep parts of a pipeline in CPU memory while they do not work.

Results do not change: a part computes on the same device, with the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from diffusers.hooks import apply_group_offloading
from torch import nn

from diffalign.pipelines.compiled import blocks

CPU = torch.device("cpu")


def text_encoders(pipeline: Any) -> dict[str, nn.Module]:
    """Return the text encoders of a pipeline by name."""
    parts = pipeline.components.items()
    return {n: p for n, p in parts if n.startswith("text_encoder") and isinstance(p, nn.Module)}


class Resting:
    """Text encoders and autoencoder of a pipeline, on the device only while they work.

    A text encoder comes to the device for its forward, and stays until the denoiser's next one. The autoencoder comes
    for one batch of images.

    Args:
        pipeline: pipeline of diffusers.
        denoiser: module whose forward needs the room.
        device: device on which the parts work.
    """

    def __init__(self, pipeline: Any, denoiser: nn.Module, device: torch.device) -> None:
        self._device = device
        self._vae = pipeline.vae
        self._encoders = list(text_encoders(pipeline).values())
        self._present: list[nn.Module] = []
        for part in (*self._encoders, self._vae):
            part.to(CPU)
        for encoder in self._encoders:
            encoder.register_forward_pre_hook(self._fetch, with_kwargs=True)
        denoiser.register_forward_pre_hook(self._rest)

    def _fetch(
        self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if encoder not in self._present:
            encoder.to(self._device)
            self._present.append(encoder)
        # tokens may follow the device on which the encoder was before
        moved = send_to_device((args, kwargs), self._device)
        return moved[0], moved[1]

    def _rest(self, denoiser: nn.Module, args: Any) -> None:
        while self._present:
            self._present.pop().to(CPU)

    @contextmanager
    def autoencoder(self) -> Iterator[None]:
        """Have the autoencoder on the device in this context."""
        self._vae.to(self._device)
        try:
            yield
        finally:
            self._vae.to(CPU)


def offload_blocks(denoiser: nn.Module, device: torch.device) -> None:
    """Move each layer of a denoiser's blocks to the device for its forward only.

    All other layers move to the device and stay. Adapters must be attached afterwards, so that they stay, too.
    A backward needs checkpointed blocks, whose weights it brings again.

    Args:
        denoiser: denoiser in CPU memory.
        device: device on which the denoiser computes.
    """
    moving = blocks(denoiser)
    inside = {id(p) for block in moving for p in (*block.parameters(), *block.buffers())}
    for module in denoiser.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and id(tensor) not in inside:
                    tensor.data = tensor.data.to(device)
    for block in moving:
        # layers and not blocks, because a block that was moved as one would take its adapters along
        apply_group_offloading(block, device, CPU, offload_type="leaf_level")
