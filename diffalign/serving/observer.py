"""Listener to an engine's work."""

from __future__ import annotations

from diffalign.serving.tickets import Finished, ImageSettings


class Observer:
    """Listener to an engine's work that does nothing.

    The engine's thread calls it.
    """

    def forward(self, rows: int) -> None:
        """Take note of one forward of the denoiser with so many images."""

    def steps(self, computed: int, skipped: int) -> None:
        """Take note of steps of images."""

    def finished(self, settings: ImageSettings, image: Finished) -> None:
        """Take note of a finished image."""

    def cancelled(self, cause: str) -> None:
        """Take note of an image that is not drawn."""

    def out_of_memory(self) -> None:
        """Take note of a forward that ran out of memory."""
