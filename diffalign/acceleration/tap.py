"""Interception of a pipeline's denoiser and scheduler, without a change of their classes.

The denoiser's call is intercepted outside of its hooks and its compilation, so that no graph sees the interception.
The scheduler tells when a call begins and which step it is at.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from diffalign.acceleration.request import Request, request_of
from diffalign.core.errors import UsageError

logger = logging.getLogger(__name__)
DENOISERS = ("transformer", "unet")
"""Names of the denoiser among a pipeline's components."""
METHODS = ("set_timesteps", "step")
"""Methods of a scheduler that tell where a call is."""
IMPLEMENTATION = "_compiled_call_impl"
"""Attribute of a module that torch calls in place of its forward."""

Inner = Callable[..., Any]


class Handler(Protocol):
    """Answer to the intercepted calls of a denoiser."""

    def begin(self, request: Request) -> None:
        """Start a call of the pipeline, whatever became of the call before it."""

    def end_step(self, step: int) -> None:
        """Finish a step of the scheduler."""

    def forward(
        self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any], place: tuple[int, int]
    ) -> Any:
        """Return the denoiser's output; `place` is the step and the forward within it."""


class Chain:
    """Handler of several handlers; the first one is asked first and calls the next."""

    def __init__(self, handlers: tuple[Handler, ...]) -> None:
        self.handlers = handlers

    def begin(self, request: Request) -> None:
        for handler in self.handlers:
            handler.begin(request)

    def end_step(self, step: int) -> None:
        for handler in self.handlers:
            handler.end_step(step)

    def forward(
        self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any], place: tuple[int, int]
    ) -> Any:
        for handler in reversed(self.handlers):
            inner = _bound(handler, inner, place)
        return inner(*args, **kwargs)


def _bound(handler: Handler, inner: Inner, place: tuple[int, int]) -> Inner:
    def call(*args: Any, **kwargs: Any) -> Any:
        return handler.forward(inner, args, kwargs, place)

    return call


def denoiser_name(pipeline: Any) -> str | None:
    """Return the name of a pipeline's denoiser, or None without one."""
    for name in DENOISERS:
        if isinstance(getattr(pipeline, name, None), nn.Module):
            return name
    return None


class _Signal:
    """Method of a scheduler that reports its calls to a tap."""

    def __init__(self, scheduler: Any, name: str, tap: Tap) -> None:
        self._scheduler, self._name, self._tap = scheduler, name, tap
        self.__name__ = name
        self.previous: Inner | None = vars(scheduler).get(name)
        # pipelines look for `sigmas`, `eta` and `generator` in the signature
        self.__signature__ = inspect.signature(getattr(scheduler, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inner = self.previous or getattr(type(self._scheduler), self._name).__get__(self._scheduler)
        result = inner(*args, **kwargs)
        self._tap.heard(self._scheduler, self._name, args, kwargs)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> _Signal:
        # a copied scheduler reports to the same tap, about itself
        twin = copy.copy(self)
        twin._scheduler = copy.deepcopy(self._scheduler, memo)
        twin.previous = copy.deepcopy(self.previous, memo)
        return twin


class _Interception:
    """Replacement of a module's call, which hands it to a tap."""

    def __init__(self, module: nn.Module, tap: Tap) -> None:
        self._tap = tap
        self.previous: Inner | None = vars(module).get(IMPLEMENTATION)
        self._plain = module._call_impl

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module as it would be called without the interception."""
        return (self.previous or self._plain)(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tap.answer(self.inner, args, kwargs)


class Tap:
    """Connection of a handler with a pipeline's denoiser and scheduler.

    The state begins anew with every `set_timesteps`, so that a call that was aborted leaves no trace in the next.
    """

    def __init__(self, pipeline: Any, handler: Handler) -> None:
        self._pipeline = pipeline
        self.handler = handler
        self._module: nn.Module | None = None
        self._scheduler: Any = None
        self.step: int | None = None
        """Number of the current step; None before the first call."""
        self._forwards = 0
        self._warned = False
        if any(isinstance(vars(pipeline.scheduler).get(n), _Signal) for n in METHODS):
            raise UsageError(
                f"{type(pipeline).__name__}: this pipeline is accelerated already. Call `restore` first."
            )
        self._attach()

    def heard(self, scheduler: Any, name: str, args: tuple[Any, ...], kwargs: Any) -> None:
        """Take note of a call of a scheduler's method."""
        if name == "step":
            if self.step is not None:
                self.handler.end_step(self.step)
                self.step += 1
            self._forwards = 0
            return
        # the denoiser may have been compiled or replaced since the last call
        self._attach()
        self.step, self._forwards = 0, 0
        self.handler.begin(request_of(scheduler, args, kwargs))

    def answer(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the output of the denoiser for one call."""
        if self._pipeline.scheduler is not self._scheduler:
            if not self._warned:
                logger.warning(
                    "acceleration: the scheduler was replaced by %s, and the cache is out of force until "
                    "`accelerate` is called again",
                    type(self._pipeline.scheduler).__name__,
                )
            self._warned = True
            return inner(*args, **kwargs)
        if self.step is None:
            return inner(*args, **kwargs)
        place = self.step, self._forwards
        self._forwards += 1
        return self.handler.forward(inner, args, kwargs, place)

    def remove(self) -> None:
        """Give the denoiser and the scheduler back as they would be without the tap."""
        self._detach_module()
        if self._scheduler is not None:
            for name in METHODS:
                signal = vars(self._scheduler).get(name)
                if isinstance(signal, _Signal):
                    _put(self._scheduler, name, signal.previous)
        self._scheduler, self.step = None, None

    def _attach(self) -> None:
        name = denoiser_name(self._pipeline)
        assert name is not None
        module = getattr(self._pipeline, name)
        if module is not self._module:
            self._detach_module()
            self._module = module
        if not isinstance(vars(module).get(IMPLEMENTATION), _Interception):
            setattr(module, IMPLEMENTATION, _Interception(module, self))
        if self._scheduler is None:
            self._scheduler = self._pipeline.scheduler
            for method in METHODS:
                setattr(self._scheduler, method, _Signal(self._scheduler, method, self))

    def _detach_module(self) -> None:
        if self._module is None:
            return
        interception = vars(self._module).get(IMPLEMENTATION)
        if isinstance(interception, _Interception):
            _put(self._module, IMPLEMENTATION, interception.previous)
        self._module = None


def _put(target: Any, name: str, value: Any) -> None:
    """Set an attribute of an instance, or remove it for None."""
    if value is None:
        vars(target).pop(name, None)
    else:
        setattr(target, name, value)
