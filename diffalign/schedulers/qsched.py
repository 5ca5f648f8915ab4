"""Two factors per step on stock schedulers: x' = A c_x x + B c_e m + C z.

The scheduler's own step has c = 1. A step of these schedulers is affine in the noisy latents x and the denoiser's
prediction m, with numbers A and B that depend on the step alone. So no step is implemented again: A and B are computed
from the stock `step` on zeros and ones, and the noise C z is its result on zeros. (Frumkin & Marculescu 2025,
"Q-Sched")
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor

from diffalign.core.errors import UsageError
from diffalign.schedulers.coefficients import KEY, Coefficients, CoefficientsError, Tables

logger = logging.getLogger(__name__)

LINEAR_SCHEDULERS = (
    "DDIMScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
"""Schedulers of diffusers whose step depends only on its two inputs, linearly."""
NONLINEAR_SETTINGS = ("thresholding", "clip_sample", "scale_factors")


@dataclass(frozen=True)
class Update:
    """Coefficients of one output of a step: `sample` x + `model_output` m + noise."""

    sample: float
    model_output: float


class QSched:
    """Additional methods of a wrapped scheduler, created by `QSched.wrap`.

    The wrapped class has the stock class's name, so that `save_pretrained` writes a pipeline that stock diffusers
    loads. Stock diffusers ignores the factors, which stay in `scheduler_config.json` under "qsched"; `diffalign.load`
    applies them.
    """

    stock: ClassVar[type]
    _active: Coefficients | None
    _trial: tuple[Tensor, Tensor] | None = None
    _updates: dict[Any, dict[str, Update]]
    _warned: set[Any]
    _denoiser: str | None = None

    @staticmethod
    def wrap(scheduler: Any, *, fingerprint: str | None = None) -> Any:
        """Return the scheduler with support for factors, and apply those of its configuration.

        Factors from another scheduler class, other settings or another denoiser are not applied, with a warning.

        Args:
            scheduler: scheduler of diffusers.
            fingerprint: fingerprint of the denoiser that the scheduler serves; None accepts any.

        Raises:
            UsageError: the scheduler's step is not linear in both inputs.
            CoefficientsError: the configuration holds damaged factors.
        """
        if isinstance(scheduler, QSched):
            if fingerprint is not None:
                scheduler._denoiser = fingerprint
                scheduler._look_up()
            return scheduler
        _check_linear(scheduler)
        state = copy.copy(scheduler.__dict__)
        return _restore(type(scheduler), state | {"_denoiser": fingerprint})

    @property
    def tables(self) -> Tables:
        """Factors of all numbers of steps in the configuration."""
        return Tables.from_config(self.config.get(KEY))  # type: ignore[attr-defined]

    @tables.setter
    def tables(self, tables: Tables) -> None:
        raw = tables.to_config() if tables.steps else None
        self.register_to_config(**{KEY: raw})  # type: ignore[attr-defined]
        self._look_up()

    def set_coefficients(
        self, coefficients: Coefficients, *, fingerprint: str | None = None
    ) -> None:
        """Store factors for len(coefficients) steps in the configuration.

        Factors for other numbers of steps stay, unless they belong to another denoiser or another scheduler.
        """
        tables = self.tables
        denoiser = fingerprint or self._denoiser
        if self._foreign(tables, denoiser):
            tables = Tables({})
        steps = {**tables.steps, len(coefficients): coefficients}
        self.tables = Tables(steps, denoiser or tables.fingerprint, self.settings)

    def has_coefficients(self, steps: int) -> bool:
        """Return whether the configuration has applicable factors for this number of steps."""
        tables = self.tables
        return steps in tables.steps and self._foreign(tables, self._denoiser) is None

    def clear_coefficients(self) -> None:
        """Remove all factors."""
        self.tables = Tables({})

    @property
    def settings(self) -> dict[str, Any]:
        """Class and configuration of the scheduler without factors, as plain JSON.

        They determine its updates.
        """
        own = {
            name: value
            for name, value in self.config.items()  # type: ignore[attr-defined]
            if name in _parameters(self.stock, "__init__") and name != KEY
        }
        return {"_class_name": self.stock.__name__, **json.loads(json.dumps(own, default=str))}

    def _foreign(self, tables: Tables, denoiser: str | None) -> str | None:
        """Describe why factors belong to another scheduler or denoiser; None if they do not."""
        own = self.settings
        for name, value in (tables.scheduler or {}).items():
            if name in own and own[name] != value:
                setting = name.replace("_class_name", "a scheduler of class")
                return f"{setting} {value}, this is {own[name]}"
        if None not in (denoiser, tables.fingerprint) and denoiser != tables.fingerprint:
            return "other weights than this pipeline's"
        return None

    @property
    def coefficients(self) -> Coefficients:
        """Coefficients selected by the last `set_timesteps`; ones if there are none."""
        return self._active or Coefficients.ones(len(self.timesteps))  # type: ignore[attr-defined]

    @contextmanager
    def trial(self, sample: Tensor, model_output: Tensor) -> Iterator[None]:
        """Apply other factors (N, B) inside the context, one candidate per row of the batch."""
        self._trial = sample, model_output
        try:
            yield
        finally:
            self._trial = None

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Set the timesteps like the stock method, and select the factors for their number."""
        super().set_timesteps(*args, **kwargs)  # type: ignore[misc]
        self._updates = {}
        self._look_up()

    def _look_up(self) -> None:
        tables, number = self.tables, len(self.timesteps)  # type: ignore[attr-defined]
        foreign = self._foreign(tables, self._denoiser) if tables.steps else None
        if foreign is not None:
            self._active = None
            if foreign not in self._warned:
                self._warned.add(foreign)
                logger.warning(
                    "Q-Sched's factors were found with %s: the schedule stays as it is", foreign
                )
            return
        steps = tables.steps
        self._active = steps.get(number)
        if self._active is not None and self._active.identity:
            self._active = None
        # Until set_timesteps is called, a scheduler has its training timesteps.
        is_set = number != self.config.num_train_timesteps  # type: ignore[attr-defined]
        if steps and is_set and number not in {*steps, *self._warned}:
            self._warned.add(number)
            logger.warning(
                "Q-Sched has no factors for %d steps (only for %s): the schedule stays as it is",
                number,
                ", ".join(map(str, sorted(steps))),
            )

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Take a step like the stock method, with the factors of this step.

        If both factors are 1 it is the stock method. Otherwise sums are computed in float32 and rounded once.
        """
        stock = super().step  # type: ignore[misc]
        index = self._index(timestep)
        factors = self._factors(index, sample)
        if factors is None:
            return stock(model_output, timestep, sample, *args, return_dict=return_dict, **kwargs)
        updates = self._update(index, timestep, sample.device, args, kwargs)
        noise = stock(
            torch.zeros_like(model_output),
            timestep,
            torch.zeros_like(sample),
            *args,
            return_dict=True,
            **kwargs,
        )
        of_sample, of_output = factors
        outputs = {}
        for name, rest in noise.items():
            update = updates[name]
            value = rest.float() + (update.sample * of_sample) * sample.float()
            value = value + (update.model_output * of_output) * model_output.float()
            outputs[name] = value.to(rest.dtype)
        return type(noise)(**outputs) if return_dict else tuple(outputs.values())

    def linear_update(self, timestep: Any, *args: Any, **kwargs: Any) -> Update:
        """Return A and B of the step at `timestep`. Further arguments are those of `step`."""
        index = self._index(timestep)
        device = self.timesteps.device  # type: ignore[attr-defined]  # where a flow's sigmas are, too
        return self._update(index, timestep, device, args, kwargs)["prev_sample"]

    def _index(self, timestep: Any) -> int:
        """Return the number of the step, also for image-to-image, which omits the first steps."""
        if hasattr(self, "_init_step_index"):
            if self.step_index is None:  # type: ignore[attr-defined]
                self._init_step_index(timestep)
            return int(self.step_index)  # type: ignore[attr-defined]
        return int((self.timesteps == timestep).nonzero()[0])  # type: ignore[attr-defined]

    def _factors(self, index: int, sample: Tensor) -> tuple[Any, Any] | None:
        """Return the factors of one step, or None if both are 1.

        They are numbers, or tensors (B, 1, ..., 1) inside `trial`.
        """
        if self._trial is not None:
            shape = (-1, *[1] * (sample.ndim - 1))
            a, b = (part[index].to(sample.device).view(shape) for part in self._trial)
            return a, b
        if self._active is None:
            return None
        pair = self._active.sample[index], self._active.model_output[index]
        return None if pair == (1, 1) else pair

    def _update(
        self, index: int, timestep: Any, device: torch.device, args: Any, kwargs: Any
    ) -> dict[str, Update]:
        """Return A and B of every output of a step."""
        plain = {k: v for k, v in kwargs.items() if isinstance(v, int | float | str)}
        if args:
            raise TypeError("Further arguments of step must be passed by name.")
        key = (index, tuple(sorted(plain.items())))
        if key not in self._updates:
            self._updates[key] = _read_off(self, timestep, device, plain)
        return self._updates[key]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Name the stock class in copies and pickles, since this class is created dynamically."""
        return _restore, (self.stock, self.__dict__)


@functools.cache
def _wrapped(stock: type) -> type:
    """Return a subclass that saves itself as the stock class.

    Its methods have the stock signatures, which pipelines inspect to choose the arguments that they pass.
    """

    @functools.wraps(stock.step)  # type: ignore[attr-defined]
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return QSched.step(self, *args, **kwargs)

    @functools.wraps(stock.set_timesteps)  # type: ignore[attr-defined]
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        QSched.set_timesteps(self, *args, **kwargs)

    methods = {"step": step, "set_timesteps": set_timesteps}
    names = {"stock": stock, "__module__": stock.__module__, "__doc__": stock.__doc__}
    return type(stock.__name__, (QSched, stock), methods | names)


def _restore(stock: type, state: dict[str, Any]) -> Any:
    kind = _wrapped(stock)
    scheduler: Any = object.__new__(kind)
    scheduler.__dict__.update(state)
    scheduler._updates = {}
    scheduler._warned = set(state.get("_warned", ()))
    scheduler._look_up()
    return scheduler


def _check_linear(scheduler: Any) -> None:
    name = type(scheduler).__name__
    if not any(type(scheduler) is getattr(diffusers, kind, None) for kind in LINEAR_SCHEDULERS):
        raise UsageError(
            f"scheduler {name}: Q-Sched needs a scheduler with a linear step. Use one of "
            f"{', '.join(LINEAR_SCHEDULERS)}, for instance EulerDiscreteScheduler.from_config(pipe.scheduler.config)."
        )
    for setting in NONLINEAR_SETTINGS:
        if scheduler.config.get(setting):
            raise UsageError(
                f"scheduler {name}: {setting}={scheduler.config[setting]!r} makes its step nonlinear. Q-Sched needs a "
                f"linear step. Set {setting} to False or None."
            )


def _read_off(
    scheduler: Any, timestep: Any, device: torch.device, kwargs: dict[str, Any]
) -> dict[str, Update]:
    """Compute A and B from results on zeros and ones, all with the same noise.

    Raises:
        CoefficientsError: the results are not affine.
    """

    def ask(model_output: float, sample: float) -> dict[str, float]:
        probe = scheduler.stock.__new__(scheduler.stock)
        probe.__dict__.update(scheduler.__dict__)
        options = dict(kwargs)
        if "generator" in _parameters(scheduler.stock):
            options["generator"] = torch.Generator().manual_seed(0)
        full = torch.ones(1, 1, 1, 1, device=device)
        answer = probe.step(model_output * full, timestep, sample * full, **options)
        return {name: float(value) for name, value in answer.items()}

    nothing, one_sample, one_output, both = ask(0, 0), ask(0, 1), ask(1, 0), ask(1, 1)
    updates = {}
    for name, rest in nothing.items():
        updates[name] = Update(one_sample[name] - rest, one_output[name] - rest)
        gap = both[name] - one_sample[name] - one_output[name] + rest
        if abs(gap) > 1e-4 * max(1.0, abs(both[name])):
            raise CoefficientsError(
                f"{scheduler.stock.__name__}.step is not affine in its inputs. Use another scheduler."
            )
    return updates


@functools.cache
def _parameters(stock: type, method: str = "step") -> frozenset[str]:
    return frozenset(inspect.signature(getattr(stock, method)).parameters)
