"""A second device without hardware: tensors of the CPU that say they are on CUDA, and are held to its rules.

`with SecondDevice():` lets `.to("cuda")`, `.cuda()` and `device="cuda"` work anywhere. What was moved is an ordinary
CPU tensor whose storage bears a mark. Marks pass on from what an operation is given to what it makes, forward and
backward, and an operation that CUDA would refuse (two devices, a generator of the other, `.numpy()`) is refused here in
the same words. By CUDA's rules a CPU tensor without dimensions, CPU indices and copies between devices are allowed.

For modules of diffalign `torch.cuda` is there as well, and does nothing. What cannot be seen: kernels, streams, memory,
the device's own generator, what several processes say to each other, tensors of other libraries' classes (torchao's
weights), and what is computed outside torch's dispatcher.
"""

from __future__ import annotations

import sys
import threading
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
INDEXING = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
COPIES = {aten.copy_.default, aten.copy.default, aten._foreach_copy_.default}
JOINS = {aten.cat.default, aten.stack.default}
"""Here not even a tensor without dimensions may be on the other device."""
STUBS = {
    **dict.fromkeys(("set_device", "synchronize", "empty_cache", "Stream"), lambda *_: None),
    **dict.fromkeys(("memory_allocated", "max_memory_allocated"), lambda *_: 0),
    "reset_peak_memory_stats": lambda *_: None,
    "current_device": lambda: CUDA.index,
    "get_device_name": lambda *_: "a second device",
    "get_device_capability": lambda *_: (8, 0),
    "stream": lambda _: nullcontext(),
}


def is_on(tensor: Tensor) -> bool:
    """Whether a tensor is on the second device."""
    with torch._C.DisableTorchFunction():
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return is_on(torch._C._functorch.get_unwrapped(tensor))
        return not tensor.is_mkldnn and getattr(tensor.untyped_storage(), "on_second_device", False)


def _mark(tensor: Tensor, on: bool) -> Tensor:
    with torch._C.DisableTorchFunction():
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            _mark(torch._C._functorch.get_unwrapped(tensor), on)
        elif tensor.device.type == "cpu":
            tensor.untyped_storage().on_second_device = on
    return tensor


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class _Move(torch.autograd.Function):
    """A copy on the other device; its gradient comes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, on: bool) -> Tensor:
        ctx.on = on
        return _mark(tensor.clone(), on)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _mark(gradient.clone(), not ctx.on), None


def _moved(tensor: Tensor, on: bool) -> Tensor:
    return tensor if is_on(tensor) == on else _Move.apply(tensor, on)


class _Operations(TorchDispatchMode):
    """Every operation of the dispatcher: may it be, and where is what it makes?"""

    def __init__(self) -> None:
        super().__init__()
        self.inside = False
        """Within a call that was given something on the device: what is made of nothing is scratch on it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = _tensors(args, kwargs)
        on = any(is_on(t) for t in given)
        if on and func not in COPIES:
            self._check(func, args, kwargs, given)
        result = func(*args, **kwargs)
        if on or (self.inside and not given):
            known = {t.untyped_storage()._cdata for t in given}
            for made in _tensors(result):
                if made.untyped_storage()._cdata not in known:
                    _mark(made, True)
        return result

    def _check(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> None:
        if func in INDEXING:
            if not is_on(args[0]) and any(is_on(t) for t in _tensors(args[1])):
                raise RuntimeError(
                    "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
                )
            given = _tensors(args[0], args[2:])
        held = [t for t in given if t.ndim or func in JOINS]
        if len({is_on(t) for t in held}) > 1 or (held and not any(is_on(t) for t in held)):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found cuda:0 and cpu, in {func}: "
                + ", ".join(f"{tuple(t.shape)} {'cuda' if is_on(t) else 'cpu'}" for t in given)
            )
        _check_generator(kwargs.get("generator"))


def _check_generator(generator: Any) -> None:
    if isinstance(generator, torch.Generator):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


class _Calls(TorchFunctionMode):
    """Every call from Python: what names a device, or asks for one."""

    def __init__(self, operations: _Operations) -> None:
        super().__init__()
        self.operations = operations

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        me = args[0] if args and isinstance(args[0], Tensor) else None
        if me is not None and is_on(me):
            if func == Tensor.device.__get__:
                return CUDA
            if func in (Tensor.is_cuda.__get__, Tensor.is_cpu.__get__):
                return func == Tensor.is_cuda.__get__
            if func == Tensor.get_device:
                return 0
            if func in (Tensor.numpy, Tensor.__array__):
                raise TypeError(
                    "can't convert cuda:0 device type tensor to numpy. "
                    "Use Tensor.cpu() to copy the tensor to host memory first."
                )
        if func is Tensor.backward:  # whose graph may call back what is recomputed
            with self:
                kwargs["grad_tensors"] = kwargs.pop("gradient", None)
                return torch.autograd.backward(me, **kwargs)
        if func == Tensor.grad.__set__ and args[1] is not None and is_on(args[1]) != is_on(me):
            raise RuntimeError("assigned grad has data located on a different device")
        if func is Tensor.cuda or func is Tensor.cpu:
            return _moved(me, func is Tensor.cuda)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if kwargs.get("device") is not None:
            return self._made(func, args, kwargs)
        result = self._call(func, args, kwargs)
        if func in (Tensor.new_tensor, Tensor.__deepcopy__) and is_on(me):
            _mark(result, True)
        return result

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        before = self.operations.inside
        self.operations.inside = any(is_on(t) for t in _tensors(args, kwargs))
        try:
            return func(*args, **kwargs)
        finally:
            self.operations.inside = before

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        like = args[0] if args and isinstance(args[0], Tensor) else kwargs.pop("other", None)
        if like is not None:
            device, dtype, layout = CUDA if is_on(like) else like.device, like.dtype, None
        else:
            device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        options = {} if layout is None else {"memory_format": layout}
        if device is not None and device.type not in ("cpu", "cuda"):
            return tensor.to(device, dtype or tensor.dtype, copy=copy, **options)
        source = "cpu" if device is not None else tensor.device  # meta to a real one is an error
        result = tensor.to(source, dtype or tensor.dtype, copy=copy, **options)
        return result if device is None else _moved(result, device.type == "cuda")

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Of a factory, or what follows one: on the device that it names."""
        device = torch.device(kwargs["device"])
        if device.type not in ("cpu", "cuda"):
            return func(*args, **kwargs)
        if device.type == "cuda":
            _check_generator(kwargs.get("generator"))
        result = func(*args, **kwargs | {"device": "cpu"})
        known = {t.untyped_storage()._cdata for t in _tensors(args, kwargs)}
        if isinstance(result, Tensor) and result.untyped_storage()._cdata in known:
            return _moved(result, device.type == "cuda")
        for made in _tensors(result):
            _mark(made, device.type == "cuda")
        return result


class SecondDevice:
    """Within it there is a second device, in new threads too; autocast for it is the CPU's."""

    def __enter__(self) -> SecondDevice:
        self._stack = ExitStack()
        run, init = threading.Thread.run, torch.autocast.__init__
        available = torch.cuda.is_available

        def run_on(thread: threading.Thread) -> None:
            with _modes():
                run(thread)

        def cast(context: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
            init(context, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

        def is_available() -> bool:
            asking = sys._getframe(1).f_globals.get("__name__", "")
            return asking.startswith("diffalign.") or available()

        self._stack.enter_context(mock.patch.object(threading.Thread, "run", run_on))
        self._stack.enter_context(mock.patch.object(torch.autocast, "__init__", cast))
        self._stack.enter_context(
            mock.patch.multiple(torch.cuda, is_available=is_available, **STUBS)
        )
        self._stack.enter_context(_modes())
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


def _modes() -> ExitStack:
    stack = ExitStack()
    operations = stack.enter_context(_Operations())
    stack.enter_context(_Calls(operations))
    return stack
