"""Two factors a step on stock schedulers: x' = A c_x x + B c_e m + C z, where the scheduler's own step has c = 1.

A step of these schedulers is affine in the noisy latents x and in the denoiser's prediction m, with numbers A and B
that depend on the step alone. So none of them is written again: A and B are read off the stock `step` by asking it
about zeros and ones, and the noise C z is its answer to zeros. (Frumkin & Marculescu 2025, "Q-Sched")
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
"""Of diffusers: a step depends on nothing but its two inputs and is linear in both."""
NONLINEAR_SETTINGS = ("thresholding", "clip_sample", "scale_factors")


@dataclass(frozen=True)
class Update:
    """One output of a step is `sample` x + `model_output` m + noise."""

    sample: float
    model_output: float


class QSched:
    """What a wrapped scheduler has besides its own methods; `QSched.wrap` makes one.

    Its class bears the stock class's name, so that `save_pretrained` writes a pipeline that stock diffusers loads: it
    then runs without the factors, which stay in `scheduler_config.json` under "qsched". `diffalign.load` applies them.
    """

    stock: ClassVar[type]
    _active: Coefficients | None
    _trial: tuple[Tensor, Tensor] | None = None
    _updates: dict[Any, dict[str, Update]]
    _warned: set[Any]
    _denoiser: str | None = None

    @staticmethod
    def wrap(scheduler: Any, *, fingerprint: str | None = None) -> Any:
        """The same scheduler, ready for factors; those that its configuration holds are in force. With a warning they
        are not where they were found for another class of scheduler, for other settings, or with another denoiser.

        Args:
            fingerprint: of the denoiser that the scheduler serves; None: any.

        Raises:
            UsageError: its step is not linear in both inputs.
            CoefficientsError: its configuration holds damaged factors.
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
        """All that the configuration holds."""
        return Tables.from_config(self.config.get(KEY))  # type: ignore[attr-defined]

    @tables.setter
    def tables(self, tables: Tables) -> None:
        raw = tables.to_config() if tables.steps else None
        self.register_to_config(**{KEY: raw})  # type: ignore[attr-defined]
        self._look_up()

    def set_coefficients(
        self, coefficients: Coefficients, *, fingerprint: str | None = None
    ) -> None:
        """Keep factors for len(coefficients) steps in the configuration. Those for other numbers of steps stay, unless
        they were found with another denoiser or another scheduler."""
        known = self.tables
        denoiser = fingerprint or self._denoiser
        if self._foreign(known, denoiser):
            known = Tables({})
        steps = {**known.steps, len(coefficients): coefficients}
        self.tables = Tables(steps, denoiser or known.fingerprint, self.settings)

    def has_coefficients(self, steps: int) -> bool:
        """Whether the configuration holds factors for so many steps that would be in force."""
        tables = self.tables
        return steps in tables.steps and self._foreign(tables, self._denoiser) is None

    def clear_coefficients(self) -> None:
        """Forget all factors."""
        self.tables = Tables({})

    @property
    def settings(self) -> dict[str, Any]:
        """What decides about its updates, as plain JSON: its class, and its configuration but for the factors."""
        own = {
            name: value
            for name, value in self.config.items()  # type: ignore[attr-defined]
            if name in _parameters(self.stock, "__init__") and name != KEY
        }
        return {"_class_name": self.stock.__name__, **json.loads(json.dumps(own, default=str))}

    def _foreign(self, tables: Tables, denoiser: str | None) -> str | None:
        """Why factors are not this scheduler's or this denoiser's, in words."""
        own = self.settings
        for name, value in (tables.scheduler or {}).items():
            if name in own and own[name] != value:
                what = name.replace("_class_name", "a scheduler of class")
                return f"{what} {value}, this is {own[name]}"
        if None not in (denoiser, tables.fingerprint) and denoiser != tables.fingerprint:
            return "other weights than this pipeline's"
        return None

    @property
    def coefficients(self) -> Coefficients:
        """Those in force since the last `set_timesteps`."""
        return self._active or Coefficients.ones(len(self.timesteps))  # type: ignore[attr-defined]

    @contextmanager
    def trial(self, sample: Tensor, model_output: Tensor) -> Iterator[None]:
        """Other factors for a while, a candidate for every row of the batch: both (N, B)."""
        self._trial = sample, model_output
        try:
            yield
        finally:
            self._trial = None

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """As the stock method; factors follow the number of steps."""
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
        # a scheduler has its training timesteps until it is asked for steps
        asked = number != self.config.num_train_timesteps  # type: ignore[attr-defined]
        if steps and asked and number not in {*steps, *self._warned}:
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
        """As the stock method, with the factors of this step. Where both are 1 it is the stock method; otherwise sums
        are float32 and rounded once."""
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
        found = {}
        for name, rest in noise.items():
            update = updates[name]
            value = rest.float() + (update.sample * of_sample) * sample.float()
            value = value + (update.model_output * of_output) * model_output.float()
            found[name] = value.to(rest.dtype)
        return type(noise)(**found) if return_dict else tuple(found.values())

    def linear_update(self, timestep: Any, *args: Any, **kwargs: Any) -> Update:
        """A and B of the step at `timestep`, for the same further arguments as those of `step`."""
        index = self._index(timestep)
        device = self.timesteps.device  # type: ignore[attr-defined]  # where a flow's sigmas are, too
        return self._update(index, timestep, device, args, kwargs)["prev_sample"]

    def _index(self, timestep: Any) -> int:
        """The number of the step, of image-to-image too, where the first ones are left out."""
        if hasattr(self, "_init_step_index"):
            if self.step_index is None:  # type: ignore[attr-defined]
                self._init_step_index(timestep)
            return int(self.step_index)  # type: ignore[attr-defined]
        return int((self.timesteps == timestep).nonzero()[0])  # type: ignore[attr-defined]

    def _factors(self, index: int, sample: Tensor) -> tuple[Any, Any] | None:
        """Of one step: numbers, or tensors (B, 1, ..., 1); None where both are 1."""
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
        """A and B of every output of a step, from the stock step's answers to numbers."""
        plain = {k: v for k, v in kwargs.items() if isinstance(v, int | float | str)}
        if args:
            raise TypeError("pass further arguments of step by name")
        key = (index, tuple(sorted(plain.items())))
        if key not in self._updates:
            self._updates[key] = _read_off(self, timestep, device, plain)
        return self._updates[key]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made on the fly: copies and pickles name the stock one."""
        return _restore, (self.stock, self.__dict__)


@functools.cache
def _wrapped(stock: type) -> type:
    """A subclass that saves itself as the stock class, and whose methods have the stock signatures: pipelines look at
    those to see what they may pass."""

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
    found: Any = object.__new__(kind)
    found.__dict__.update(state)
    found._updates = {}
    found._warned = set(state.get("_warned", ()))
    found._look_up()
    return found


def _check_linear(scheduler: Any) -> None:
    name = type(scheduler).__name__
    if not any(type(scheduler) is getattr(diffusers, known, None) for known in LINEAR_SCHEDULERS):
        raise UsageError(
            f"Q-Sched needs a scheduler whose step is linear, and {name} is none that is known to be; use one of "
            f"{', '.join(LINEAR_SCHEDULERS)} (for instance EulerDiscreteScheduler.from_config(pipe.scheduler.config))"
        )
    for setting in NONLINEAR_SETTINGS:
        if scheduler.config.get(setting):
            raise UsageError(
                f"Q-Sched needs a linear step, and this {name} has {setting}={scheduler.config[setting]!r}"
            )


def _read_off(
    scheduler: Any, timestep: Any, device: torch.device, kwargs: dict[str, Any]
) -> dict[str, Update]:
    """Differences between answers to zeros and ones, with the same noise in each.

    Raises:
        CoefficientsError: the answers are not affine.
    """

    def ask(model_output: float, sample: float) -> dict[str, float]:
        probe = scheduler.stock.__new__(scheduler.stock)
        probe.__dict__.update(scheduler.__dict__)
        given = dict(kwargs)
        if "generator" in _parameters(scheduler.stock):
            given["generator"] = torch.Generator().manual_seed(0)
        full = torch.ones(1, 1, 1, 1, device=device)
        answer = probe.step(model_output * full, timestep, sample * full, **given)
        return {name: float(value) for name, value in answer.items()}

    nothing, one_sample, one_output, both = ask(0, 0), ask(0, 1), ask(1, 0), ask(1, 1)
    found = {}
    for name, rest in nothing.items():
        found[name] = Update(one_sample[name] - rest, one_output[name] - rest)
        gap = both[name] - one_sample[name] - one_output[name] + rest
        if abs(gap) > 1e-4 * max(1.0, abs(both[name])):
            raise CoefficientsError(f"{scheduler.stock.__name__}.step is not affine in its inputs")
    return found


@functools.cache
def _parameters(stock: type, method: str = "step") -> frozenset[str]:
    return frozenset(inspect.signature(getattr(stock, method)).parameters)
