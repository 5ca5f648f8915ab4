"""Align the embedder and the last layer of a moved denoiser, in closed form.

The embedder is fitted to paired latents (of both latent spaces), the last layer ("head") to the denoiser's own
features. Every process sums the statistics of its share of the images; the sums are then added over processes.
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
from diffalign.methods.dcgen.task import DenoisingTask
from diffalign.pipelines.base import TextToImageModel

# Many features of the last layer are nearly the same, so that least squares without a ridge is ill-conditioned.
RIDGE = 1e-4
"""Ridge of the last layer's least squares, relative to its features' mean variance."""


@dataclass
class Alignment:
    """Alignment of a model in a new latent space with its base model.

    Attributes:
        base: base model, in the old latent space.
        moved: model in the new latent space, to be aligned.
        cache: cache of the images' latents.
        images: indices of cached images that have latents in both spaces.
        objective: see `latents.alignment.aligned_rows`.
        mode: see `latents.alignment.aligned_rows`.
        facts: figures of the alignment for the run's summary.
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
        """Yield micro-batches of this process's share of the images: their indices and their latents.

        Args:
            paired: read the latents of the base model's space, too.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = self.images[rank::world]
        for at in range(0, len(mine), self.micro_batch_size):
            part = mine[at : at + self.micro_batch_size]
            yield part, self.cache.batch(part, self.moved.device, paired=paired)

    @torch.no_grad()
    def rows(self, batch: LatentBatch) -> tuple[Tensor, Tensor]:
        """Return the rows of the embedder's least squares: inputs (new latents) and targets (old tokens)."""
        return self._rows(self._old_tokens(batch), batch.latents)

    def _rows(self, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        return aligned_rows(old, new, objective=self.objective, mode=self.mode)

    def _old_tokens(self, batch: LatentBatch) -> Tensor:
        """Return the base model's tokens (B, D, h, w) of a batch."""
        assert self.base.ends is not None
        assert batch.base_latents is not None
        latents = batch.base_latents
        old = layer(self.base.denoiser, self.base.ends.embedder)
        p = self.base.patch_size
        assert old.bias is not None
        tokens = pack(latents, p) @ matrix(old).float().T + old.bias.float()
        grid = latents.shape[2] // p, latents.shape[3] // p
        maps: Tensor = tokens.transpose(1, 2).unflatten(2, grid)
        return maps

    @torch.no_grad()
    def align_embedder(self, *, sigmas: Tensor | None = None) -> LinearFit:
        """Set the moved embedder to its least-squares fit, and return the fit.

        The facts are `aligned_images`, `embedder_r2`, `embedder_error` and `signal_shift`. The last is the shift of
        noise levels at which the new tokens have the signal-to-noise ratio of the old ones.

        Args:
            sigmas: noise levels (N,) of training, for which the fit is optimal. None fits clean latents.
        """
        assert self.moved.ends is not None
        embedder = layer(self.moved.denoiser, self.moved.ends.embedder)
        width, numbers = matrix(embedder).shape
        statistics = Statistics(numbers, width)
        # over the old tokens: the sum of each channel (D), the sum of squares, the number of tokens
        sums = torch.zeros(width + 2, dtype=torch.float64)
        for _, batch in self.batches(paired=True):
            old = self._old_tokens(batch)
            statistics.add(*self._rows(old, batch.latents))
            tokens = old.movedim(1, -1).flatten(0, -2)
            squares, count = tokens.square().sum()[None], tokens.new_tensor([len(tokens)])
            sums += torch.cat([tokens.sum(0), squares, count]).double().cpu()
        self._add_up([*statistics.tensors(), sums])
        fit = statistics.solve(ridge=0.0 if sigmas is None else noise_ridge(sigmas))
        set_layer(embedder, fit)
        self.facts |= {
            "aligned_images": len(self.images),
            "embedder_r2": fit.r2,
            "embedder_error": fit.error,
            "signal_shift": self._signal_shift(sums, statistics, fit.weight.double()),
        }
        return fit

    def _signal_shift(self, sums: Tensor, statistics: Statistics, weight: Tensor) -> float:
        """Return the shift that equalises the signal-to-noise ratios of new and old tokens."""
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
    def align_head(self, task: DenoisingTask) -> LinearFit:
        """Set the moved last layer to its least-squares fit, and return the fit.

        The fit maps the layer's features to the target velocities of training batches, under the guidance of training.
        The facts are `head_r2` and `head_error`.
        """
        assert self.moved.ends is not None
        head = layer(self.moved.denoiser, self.moved.ends.head)
        width, numbers = matrix(head).shape[::-1]
        statistics = Statistics(width, numbers)
        with lora.policy(self.moved.denoiser, lora.REFERENCE):
            for images, batch in self.batches(paired=False):
                seeds = [stream(ALIGNMENT, image) for image in images]
                features, target = task.features(batch, seeds, watched(self.moved))
                statistics.add(features.flatten(0, 1), pack(target, 1).flatten(0, 1))
        self._add_up(statistics.tensors())
        variance = statistics.xx.diagonal()[:-1].sum() / statistics.xx[-1, -1] / width
        fit = statistics.solve(ridge=RIDGE * float(variance))
        set_layer(head, fit)
        self.facts |= {"head_r2": fit.r2, "head_error": fit.error}
        return fit

    def _add_up(self, tensors: Iterable[Tensor]) -> None:
        """Sum CPU tensors over all processes, in place."""
        if self.accelerator.num_processes > 1:
            for tensor in tensors:
                total = tensor.to(self.accelerator.device)
                torch.distributed.all_reduce(total)
                tensor.copy_(total)


def watched(model: TextToImageModel) -> Callable[[Callable[[], Tensor]], Tensor]:
    """Return a function that runs a forward and records the last layer's inputs.

    The function returns these inputs, (B, N, D) float32.
    """
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
