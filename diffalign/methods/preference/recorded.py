"""Read the states that `diffalign pairs --record_states` recorded while it sampled.

An inversion estimates these states from an image; the recorded states are exact.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.config import PreferenceRunConfig
from diffalign.core.errors import UsageError
from diffalign.core.fingerprint import of_pipeline
from diffalign.data.pairs.records import PreferencePair, read_pairs
from diffalign.data.pairs.states import RecordedStates, has_states, read_states
from diffalign.data.pairs.tables import PairsError
from diffalign.diffusion.paths import RectifiedFlow
from diffalign.pipelines.base import TextToImageModel
from diffalign.training.denoise import image_size

logger = logging.getLogger(__name__)
RECORDED = "recorded"
SAME_TIMESTEP = 0.01


@dataclass
class RecordedSource:
    """Reader of the recorded states of pairs.

    States of another model, image size or grid are errors. `grid` is the rising grid (N + 1,) of the inversion.
    """

    config: PreferenceRunConfig
    model: TextToImageModel
    grid: Tensor

    def __post_init__(self) -> None:
        if self.config.pairs.random_flip:
            raise UsageError(
                f"pairs.random_flip=true cannot be combined with pairs.inversion.solver={RECORDED}: the recorded "
                "states are those of unflipped images. Set it to false"
            )
        self.weights = of_pipeline(self.model.pipeline)
        self.shape = tuple(self.model.latent_shape(image_size(self.config, self.model)))
        c = self.config
        self.settings = {
            "guidance_scale": str(c.pairs.inversion.guidance_scale),
            "mixed_precision": c.training.mixed_precision,
            "dtype": str(self.model.denoiser.dtype),
        }

    def read(self, pairs: list[PreferencePair]) -> list[RecordedStates]:
        """Read the recorded states of both images of n pairs, 2 n records.

        Raises:
            PairsError: an image has no states or too few, they were recorded with another model or size, or the
                timesteps of a pair's images differ.
        """
        records = []
        for pair in pairs:
            both = [read_states(image) for image in pair.images]
            for recorded in both:
                self._check(recorded, pair)
            if not torch.equal(both[0].timesteps, both[1].timesteps):
                raise PairsError(
                    f"{pair.place}: the states of its two images have different timesteps. Sample both images with the "
                    "same number of steps, or choose another pairs.inversion.solver"
                )
            records += both
        return records

    def _check(self, recorded: RecordedStates, pair: PreferencePair) -> None:
        weights = recorded.made_by.get("model")
        if weights != self.weights:
            raise PairsError(
                f"{pair.place}: its states were recorded with other weights ({weights}, here {self.weights}), or "
                "another `dtype`; draw the pairs with this model, or invert them with another pairs.inversion.solver"
            )
        if tuple(recorded.latents.shape) != self.shape:
            raise PairsError(
                f"{pair.place}: its recorded latents are {tuple(recorded.latents.shape)}, and this run's are "
                f"{self.shape}: another size. Train with the pairs' size, or choose another pairs.inversion.solver"
            )
        usable = len(self.usable(recorded))
        if usable < self.config.states:
            raise PairsError(
                f"{pair.place}: {usable} states with at least pairs.inversion.min_noise were recorded of an image, "
                f"fewer than pairs.inversion.states ({self.config.states}). Lower that setting, or record more states"
            )

    def usable(self, recorded: RecordedStates) -> Tensor:
        """Return the indices of the recorded states that have at least `pairs.inversion.min_noise`."""
        noise = self.model.noise.scales(recorded.timesteps)[1]
        return (noise >= self.config.pairs.inversion.min_noise).nonzero().flatten()

    def places(self, pair: PreferencePair, recorded: RecordedStates, order: Tensor) -> Tensor:
        """Return the indices (K,) on the grid of an image's states.

        Args:
            order: indices (K,) of the states among the recorded ones.

        Raises:
            PairsError: a state's timestep is not on the grid.
        """
        times = recorded.timesteps[order]
        distance = (self.grid - times[:, None]).abs()
        if (distance.amin(1) > SAME_TIMESTEP).any():
            wrong = float(times[distance.amin(1).argmax()])
            raise PairsError(
                f"{pair.place}: a state at timestep {wrong:g} is not on the grid of pairs.inversion.steps="
                f"{self.config.pairs.inversion.steps}. Set it to the num_inference_steps of `diffalign pairs`"
            )
        return distance.argmin(1)

    def states(
        self, records: list[RecordedStates], pairs: list[PreferencePair], orders: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return K states of each image of n pairs.

        Args:
            records: recorded states of both images of each pair (2 n).
            pairs: the pairs (n).
            orders: indices (K,) of the states to return, for each pair.

        Returns:
            Indices on the grid (n, K), states (2 n, K, C, H, W), and errors of the reference (2 n, K). An error is NaN
            if it was not recorded, or if the image was sampled with another guidance, precision or dtype than this
            run's.
        """
        index, states, errors = [], [], []
        for i, (pair, order) in enumerate(zip(pairs, orders, strict=True)):
            index.append(self.places(pair, records[2 * i], order))
            for recorded in records[2 * i : 2 * i + 2]:
                states.append(recorded.states[order])
                reference_error = recorded.reference_error
                if reference_error is None or any(
                    recorded.made_by.get(k) != v for k, v in self.settings.items()
                ):
                    reference_error = torch.full((len(recorded.timesteps),), math.nan)
                errors.append(reference_error[order])
        return torch.stack(index), torch.stack(states), torch.stack(errors)


def default_solver(model: TextToImageModel) -> str:
    """Return the solver that inverts images of a model's family if the settings name none."""
    return "fireflow" if isinstance(model.noise, RectifiedFlow) else "midpoint"


def with_solver(
    config: PreferenceRunConfig, model: TextToImageModel, grid: Tensor, *, say: bool = True
) -> PreferenceRunConfig:
    """Return the configuration with a solver of the inversion.

    If none is named, recorded states are used if those of the first pair fit the model; otherwise the family's solver.

    Args:
        say: log a warning if images are inverted, with the reason.
    """
    inversion = config.pairs.inversion
    if inversion.solver is not None or not config.states:
        return config
    pairs = read_pairs(config.pairs)
    first = next((p for p in pairs if isinstance(p, PreferencePair)), None)
    solver, why = default_solver(model), "no states of them were recorded"
    if first is not None and any(has_states(image) for image in first.images):
        try:
            source = RecordedSource(config, model, grid)
            states = source.read([first])[0]
            source.places(first, states, source.usable(states))
            solver, why = RECORDED, ""
        except (PairsError, UsageError) as error:
            why = f"the recorded ones do not fit ({error})"
    if why and say:
        logger.warning("pairs.inversion.solver: images are inverted with %s: %s", solver, why)
    inversion = replace(inversion, solver=solver)
    return replace(config, pairs=replace(config.pairs, inversion=inversion))
