"""Both ends of a moved denoiser in closed form: its embedder from paired latents, its last layer from its own features.

Every process sums the statistics of its share of the images, and the sums are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign import lora
from diffalign.core.seeds import ALIGNMENT, stream
from diffalign.data.latent_cache import LatentBatch, LatentCache
from diffalign.latents.alignment import (
    LinearFit,
    Moments,
    Statistics,
    aligned_rows,
    noise_ridge,
    signal_shift,
)
from diffalign.latents.codec import pack
from diffalign.latents.move import layer, matrix, set_layer
from diffalign.methods.dcgen.step import Step
from diffalign.pipelines.base import TextToImageModel

RIDGE = 1e-4
"""Of the head's features, in shares of their mean variance: many are nearly the same."""


@dataclass
class Alignment:
    """What it takes to align `moved` to `base`.

    `images` are numbers of images in the cache that have latents in both spaces.
    """

    base: TextToImageModel
    moved: TextToImageModel
    cache: LatentCache
    images: Sequence[int]
    accelerator: Accelerator
    micro_batch_size: int
    objective: str = "downsample"
    mode: str = "bilinear"
    facts: dict[str, Any] = field(default_factory=dict)

    def batches(self, *, paired: bool) -> Iterator[tuple[Sequence[int], LatentBatch]]:
        """This process's share: numbers of images, and they."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = self.images[rank::world]
        for at in range(0, len(mine), self.micro_batch_size):
            part = mine[at : at + self.micro_batch_size]
            yield part, self.cache.batch(part, self.moved.device, paired=paired)

    @torch.no_grad()
    def rows(self, batch: LatentBatch) -> tuple[Tensor, Tensor]:
        """Rows of new latents and old tokens for the embedder."""
        return self._rows(self._old_tokens(batch), batch.latents)

    def _rows(self, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        return aligned_rows(old, new, objective=self.objective, mode=self.mode)

    def _old_tokens(self, batch: LatentBatch) -> Tensor:
        """(B, D, h, w) of the frozen embedder."""
        assert self.base.ends is not None
        assert batch.base_latents is not None
        latents = batch.base_latents
        old = layer(self.base.denoiser, self.base.ends.embedder)
        p = self.base.patch_size
        assert old.bias is not None
        tokens = pack(latents, p) @ matrix(old).float().T + old.bias.float()
        return tokens.transpose(1, 2).unflatten(2, (latents.shape[2] // p, latents.shape[3] // p))

    @torch.no_grad()
    def align_embedder(self, *, sigmas: Tensor | None = None) -> LinearFit:
        """Set the moved embedder to the least-squares map; for noise levels (N,) of training, where they are given.

        Facts: `embedder_r2`, and `signal_shift` of the noise levels at which its tokens carry as much noise for their
        signal as the old ones.
        """
        assert self.moved.ends is not None
        ours = layer(self.moved.denoiser, self.moved.ends.embedder)
        width, numbers = matrix(ours).shape
        statistics = Statistics(numbers, width)
        sums = torch.zeros(width + 2, dtype=torch.float64)  # of old tokens: numbers, squares, count
        for _, batch in self.batches(paired=True):
            old = self._old_tokens(batch)
            statistics.add(*self._rows(old, batch.latents))
            tokens = old.movedim(1, -1).flatten(0, -2)
            squares, count = tokens.square().sum()[None], tokens.new_tensor([len(tokens)])
            sums += torch.cat([tokens.sum(0), squares, count]).double().cpu()
        self._add_up([*statistics.tensors(), sums])
        fit = statistics.solve(ridge=0.0 if sigmas is None else noise_ridge(sigmas))
        set_layer(ours, fit)
        self.facts |= {
            "aligned_images": len(self.images),
            "embedder_r2": fit.r2,
            "embedder_error": fit.error,
            "signal_shift": self._signal_shift(sums, statistics, fit.weight.double()),
        }
        return fit

    def _signal_shift(self, sums: Tensor, statistics: Statistics, weight: Tensor) -> float:
        """Of the old tokens' sums, and of the new latents' covariance under the new embedder."""
        assert self.base.ends is not None
        mean = sums[:-2] / sums[-1]
        old = Moments(
            float(sums[-2] / sums[-1] - mean.square().sum()),
            float(
                matrix(layer(self.base.denoiser, self.base.ends.embedder)).double().square().sum()
            ),
        )
        covariance = statistics.covariance()
        new = Moments(
            float(torch.trace(weight @ covariance @ weight.T)), float(weight.square().sum())
        )
        return signal_shift(old, new)

    @torch.no_grad()
    def align_head(self, step: Step) -> LinearFit:
        """Set the moved head to the least-squares map from its features to the targets of training steps, guided as in
        training; facts: `head_r2`."""
        assert self.moved.ends is not None
        ours = layer(self.moved.denoiser, self.moved.ends.head)
        width, numbers = matrix(ours).shape[::-1]
        statistics = Statistics(width, numbers)
        with lora.policy(self.moved.denoiser, lora.REFERENCE):
            for images, batch in self.batches(paired=False):
                seeds = [stream(ALIGNMENT, image) for image in images]
                features, target = step.features(batch, seeds, watched(self.moved))
                statistics.add(features.flatten(0, 1), pack(target, 1).flatten(0, 1))
        self._add_up(statistics.tensors())
        variance = statistics.xx.diagonal()[:-1].sum() / statistics.xx[-1, -1] / width
        fit = statistics.solve(ridge=RIDGE * float(variance))
        set_layer(ours, fit)
        self.facts |= {"head_r2": fit.r2, "head_error": fit.error}
        return fit

    def _add_up(self, tensors: Iterable[Tensor]) -> None:
        """Over processes, in place."""
        if self.accelerator.num_processes > 1:
            for tensor in tensors:
                total = tensor.to(self.accelerator.device)
                torch.distributed.all_reduce(total)
                tensor.copy_(total)


def watched(model: TextToImageModel) -> Callable[[Callable[[], Tensor]], Tensor]:
    """Runs a forward and gives what the head read in it: (B, N, D) float32."""
    assert model.ends is not None
    head = model.denoiser.get_submodule(model.ends.head)

    def watch(forward: Callable[[], Tensor]) -> Tensor:
        seen: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].float()))
        try:
            forward()
        finally:
            hook.remove()
        return seen[-1]

    return watch
