"""Which of the processes of a launch this is: `accelerate launch` on GPUs, `torchrun` on CPUs as well.

Verbs that share work ask here, so that no process takes itself for the only one; the command line refuses to start
others more than once. accelerate looks for processes without an accelerator only where it is told that they run on
CPUs.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, parse_flag_from_env

from diffalign.core import locks
from diffalign.core.errors import ReportedError, UsageError, UserError, explain

T = TypeVar("T")
PEER_TIMEOUT = "DIFFALIGN_PEER_TIMEOUT"
"""The environment variable with the seconds that processes wait for each other; default 1800."""
SHARDED = {
    DistributedType.DEEPSPEED,
    DistributedType.FSDP,
    DistributedType.MEGATRON_LM,
    DistributedType.XLA,
}
"""They spread a model over processes; here each has all of it, and gradients of LoRAs are added up."""


def launched() -> int | None:
    """How many processes a launcher has started; None without one. (A cluster may export WORLD_SIZE to whatever is
    started there.)"""
    world = os.environ.get("WORLD_SIZE")
    return int(world) if "LOCAL_RANK" in os.environ and world is not None else None


def current() -> PartialState:
    """This process among all; the first call joins them. Whether a model is spread over them, only an accelerator
    knows."""
    state = PartialState(cpu=_on_cpus(), timeout=_timeout())
    _check(state.num_processes, state.distributed_type)
    return state


def make_accelerator(**options: Any) -> Accelerator:
    """The same as accelerate's `Accelerator`, with its options.

    Raises:
        UsageError: of several processes each would be alone, or they share a model.
    """
    current()  # joins the processes, with the timeout
    accelerator = Accelerator(cpu=_on_cpus(), **options)
    _check(accelerator.num_processes, accelerator.distributed_type)
    return accelerator


@contextmanager
def hold(folder: Path, *, setting: str = "output_dir") -> Iterator[None]:
    """Keep other launches out of a folder until the block ends: the main process locks it for all of this launch.

    Raises:
        UserError: another launch holds the folder, or it cannot be made; in all processes.
    """
    with ExitStack() as stack:

        def enter() -> None:
            try:
                stack.enter_context(locks.hold(folder, setting=setting))
            except OSError as error:
                raise UsageError(
                    f"{setting}: {folder} cannot be written. {explain(error) or error}"
                ) from error

        on_main(enter)
        yield


def on_main(function: Callable[[], T]) -> T:
    """Return in every process what the function returns in the main process, which alone calls it.

    Raises:
        UserError: the function's own, in the main process; the others, which would wait in vain, get a `ReportedError`.
    """
    state = current()
    value: Any = None
    problem: UserError | None = None
    if state.is_main_process:
        try:
            value = function()
        except UserError as error:
            problem = error
    failed = problem is not None
    if state.num_processes > 1:
        failed, value = broadcast_object_list([failed, value])
    if problem is not None:
        raise problem
    if failed:
        raise ReportedError("the main process reports what is wrong")
    return value


def highest(value: int) -> int:
    """Return the largest value of all processes."""
    state = current()
    if state.num_processes == 1:
        return value
    table = torch.tensor([value], device=state.device)
    torch.distributed.all_reduce(table, op=torch.distributed.ReduceOp.MAX)
    return int(table)


@atexit.register
def _leave() -> None:
    """Before the interpreter ends: where gloo's threads outlive it, it aborts, and the launcher then ends the others,
    which may be writing still."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _timeout() -> timedelta:
    """Return how long a process waits for another one that hangs, before it ends with an error.

    Raises:
        UsageError: the environment names no time.
    """
    text = os.environ.get(PEER_TIMEOUT, "1800")
    try:
        seconds = float(text)
        if not 0 < seconds < 1e7:
            raise ValueError
    except ValueError:
        raise UsageError(f"{PEER_TIMEOUT}: {text!r} is no number of seconds above 0") from None
    return timedelta(seconds=seconds)


def _on_cpus() -> bool:
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def _check(processes: int, kind: DistributedType) -> None:
    if launched() not in (None, processes):
        raise UsageError(
            f"{launched()} processes were launched (WORLD_SIZE), and accelerate knows of {processes}: each would write "
            "what the others write"
        )
    if kind in SHARDED:
        raise UsageError(
            f"{kind.value} spreads a model over processes, and here each has all of it: choose multi-GPU without it in "
            "`accelerate config`"
        )
