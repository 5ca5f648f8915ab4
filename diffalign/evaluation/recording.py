"""Images that are drawn leave states of their way behind: preference pairs of them need no inversion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffalign.algorithms.forward_process import matching_error
from diffalign.core.errors import UsageError
from diffalign.core.fingerprint import of_pipeline
from diffalign.core.seeds import STATES, stream
from diffalign.data.pairs.states import RecordedStates, write_states
from diffalign.diffusion.paths import chord_target, has_noise_after_step
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.recording import Recorder, Recording


@dataclass
class StateKeeper:
    """Writer of `count` states of each image, at the same timesteps for a prompt's images.

    Any timestep can be chosen that has noise even one step later (`has_noise_after_step`).
    """

    model: TextToImageModel
    drawing: Drawing
    count: int

    def __post_init__(self) -> None:
        plain = not self.model.costs_a_forward(self.drawing.guidance_scale)
        self.recorder = Recorder(predictions=plain)
        size = self.model.image_size(self.drawing.size)
        scheduler = self.model.scheduler_at(self.drawing.num_inference_steps, size)
        self.timesteps = scheduler.timesteps.float().cpu()
        noise = self.model.noise.scales(self.timesteps)[1]
        self.allowed = has_noise_after_step(noise).nonzero().flatten()
        if not 1 <= self.count <= len(self.allowed):
            raise UsageError(
                f"record_states: must lie in 1..{len(self.allowed)}, the steps after which there is noise left"
            )
        self.made_by = {
            "model": of_pipeline(self.model.pipeline),
            "guidance_scale": str(self.drawing.guidance_scale),
            "mixed_precision": self.drawing.mixed_precision,
            "dtype": str(self.model.denoiser.dtype),
        }

    def chosen(self, prompt: int) -> Tensor:
        """(count,) steps of a prompt's images, the least noisy first."""
        generator = torch.Generator().manual_seed(stream(STATES, self.drawing.seed, prompt))
        order = torch.randperm(len(self.allowed), generator=generator)[: self.count]
        return self.allowed[order].sort(descending=True).values

    def write(self, image: Path, recording: Recording, row: int, *, prompt: int) -> None:
        """States of one image, row `row` of those that were drawn."""
        steps = self.chosen(prompt)
        states, latents = recording.noisy[row, steps], recording.latents[row]
        times = self.timesteps[steps]
        error = None
        if recording.model_pred is not None:
            target = chord_target(
                self.model.noise, latents.float().expand_as(states), states.float(), times
            )
            error = matching_error(recording.model_pred[row, steps], target)
        write_states(image, RecordedStates(latents, states, times, self.made_by, error))
