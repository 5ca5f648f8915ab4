"""Forwards that images share, padded to few sizes, and halved when memory runs out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.core.errors import out_of_memory
from diffalign.pipelines.base import TextToImageModel
from diffalign.serving.observer import Observer
from diffalign.serving.row import Row
from diffalign.types import PromptEmbeds


class Batches:
    """Forwards of the denoiser for images at different steps.

    Attributes:
        limit: largest number of images in a forward.
        buckets: numbers of images that a forward may have, in ascending order; others are padded to the next one. Empty
            for any number.
    """

    def __init__(
        self,
        model: TextToImageModel,
        *,
        limit: int,
        buckets: Sequence[int] = (),
        observer: Observer | None = None,
    ) -> None:
        self.model, self.limit = model, limit
        self.buckets = tuple(sorted(buckets))
        self._observer = observer or Observer()

    def run(self, rows: Sequence[Row]) -> list[tuple[Row, Exception]]:
        """Take one step of images with equal keys, and return those that failed.

        Each failed image comes with its error.

        After a forward that ran out of memory, the limit is half of its rows, and its halves are tried in turn.
        """
        failed: list[tuple[Row, Exception]] = []
        waiting = [list(rows[i : i + self.limit]) for i in range(0, len(rows), self.limit)]
        while waiting:
            part = waiting.pop(0)
            try:
                predictions = self._forward(part)
            except Exception as error:
                exhausted = out_of_memory(error)
                if exhausted:
                    # the frames of the traceback hold what the forward computed
                    error.with_traceback(None)
                    self._observer.out_of_memory()
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                if not exhausted or len(part) == 1:
                    failed += [(row, error) for row in part]
                    continue
                half = len(part) // 2
                self.limit = max(1, half)
                waiting[:0] = [part[:half], part[half:]]
                continue
            for row, (positive, negative) in zip(part, predictions, strict=True):
                # no other row is tried again for it, which would take a step twice
                try:
                    row.finish(positive, negative)
                except Exception as error:
                    failed.append((row, error))
        return failed

    def _forward(self, rows: list[Row]) -> list[tuple[Tensor, Tensor | None]]:
        """Return the positive and the negative prediction (1, C, H, W) of each row."""
        size = self.padded(len(rows))
        filled = rows + [rows[0]] * (size - len(rows))
        latents, timesteps = (torch.cat(column) for column in _columns(filled))
        embeds = PromptEmbeds.cat([row.embeds for row in filled])
        both = rows[0].computes_both
        if both:
            negatives = PromptEmbeds.cat([r.negative for r in filled if r.negative is not None])
            prediction = self.model.forward(
                torch.cat([latents] * 2),
                torch.cat([timesteps] * 2),
                PromptEmbeds.cat([negatives, embeds]),
            )
            negative, positive = prediction.chunk(2)
        else:
            positive = self._positive(filled, latents, timesteps, embeds)
        self._observer.forward(len(rows))
        return [
            (positive[i : i + 1], negative[i : i + 1] if both else None) for i in range(len(rows))
        ]

    def _positive(
        self, rows: list[Row], latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds
    ) -> Tensor:
        """Return the predictions without a negative half."""
        if not self.model.guidance_is_embedded:
            return self.model.forward(latents, timesteps, embeds)
        values = [row.ticket.settings.guidance_scale for row in rows]
        scales = [self.model.embedded_guidance if s is None else s for s in values]
        return self.model.predict(
            latents,
            timesteps,
            embeds,
            guidance_scale=torch.tensor(scales, device=latents.device),
        )

    def padded(self, rows: int) -> int:
        """Return the number of rows that a forward of so many images has."""
        return next((b for b in self.buckets if b >= rows), rows)


def _columns(rows: list[Row]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the latents and the timesteps of all rows."""
    inputs = [row.inputs() for row in rows]
    return [latents for latents, _ in inputs], [timestep for _, timestep in inputs]
