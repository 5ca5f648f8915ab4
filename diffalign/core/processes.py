"""Rank and world size of a launch: `accelerate launch` on GPUs, `torchrun` on CPUs as well.

Verbs that share work between processes read both from this module, so that no process believes to be the only one. The
command line refuses to launch any other verb more than once.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, parse_flag_from_env

from diffalign.core import locks
from diffalign.core.errors import ReportedError, UsageError, UserError, explain

T = TypeVar("T")
PEER_TIMEOUT = "DIFFALIGN_PEER_TIMEOUT"
"""Environment variable with the seconds that processes wait for each other (default 1800)."""
SHARDED = {
    DistributedType.DEEPSPEED,
    DistributedType.FSDP,
    DistributedType.MEGATRON_LM,
    DistributedType.XLA,
}
"""Launch types of accelerate that shard a model over processes.

They are refused: each process holds the whole model, and gradients of LoRAs are summed.
"""


def launched() -> int | None:
    """Return the number of processes that a launcher started, or None without a launcher."""
    # WORLD_SIZE alone proves nothing: a cluster may export it to every job
    world = os.environ.get("WORLD_SIZE")
    return int(world) if "LOCAL_RANK" in os.environ and world is not None else None


def current() -> PartialState:
    """Return this process's rank and world size.

    The first call joins the process group. Only `make_accelerator` can tell if the model would be sharded.

    Raises:
        UsageError: the launched processes are not connected to each other.
    """
    state = PartialState(cpu=_on_cpus(), timeout=_timeout())
    _check(state.num_processes, state.distributed_type)
    return state


def make_accelerator(**options: Any) -> Accelerator:
    """Return accelerate's `Accelerator`, made with these options.

    Raises:
        UsageError: the launched processes are not connected, or the model would be sharded (FSDP, DeepSpeed).
    """
    # joins the process group with the timeout of this module
    current()
    accelerator = Accelerator(cpu=_on_cpus(), **options)
    _check(accelerator.num_processes, accelerator.distributed_type)
    return accelerator


@contextmanager
def hold(folder: Path, *, setting: str = "output_dir") -> Iterator[None]:
    """Lock a folder against other launches until the block ends.

    The main process locks it for all processes of this launch.

    Raises:
        UserError: another launch holds the folder, or it cannot be made; raised in all processes.
    """
    with ExitStack() as stack:

        def enter() -> None:
            try:
                stack.enter_context(locks.hold(folder, setting=setting))
            except OSError as error:
                raise UsageError(
                    f"{folder} cannot be written. {explain(error) or error}", setting=setting
                ) from error

        on_main(enter)
        yield


def on_main(function: Callable[[], T]) -> T:
    """Call a function in the main process, and return its value in every process.

    Raises:
        UserError: raised by the function, in the main process. The other processes raise a `ReportedError`, because
            they would otherwise wait forever.
    """
    state = current()
    value: T | None = None
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
    return cast(T, value)


def highest(value: int) -> int:
    """Return the largest of all processes' values."""
    state = current()
    if state.num_processes == 1:
        return value
    table = torch.tensor([value], device=state.device)
    torch.distributed.all_reduce(table, op=torch.distributed.ReduceOp.MAX)
    return int(table)


@atexit.register
def _leave() -> None:
    """Leave the process group before the interpreter ends."""
    # the interpreter aborts if gloo's threads outlive it, and the launcher then kills processes that still write
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _timeout() -> timedelta:
    """Return the time that a process waits for a hanging one before it fails.

    Raises:
        UsageError: the environment variable holds no number of seconds.
    """
    text = os.environ.get(PEER_TIMEOUT, "1800")
    try:
        seconds = float(text)
        if not 0 < seconds < 1e7:
            raise ValueError
    except ValueError:
        raise UsageError(
            f"{PEER_TIMEOUT}: {text!r} is no number of seconds above 0. Give one, or unset it"
        ) from None
    return timedelta(seconds=seconds)


def _on_cpus() -> bool:
    # without this flag accelerate does not connect processes on a machine without an accelerator
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def _check(processes: int, kind: DistributedType) -> None:
    if launched() not in (None, processes):
        raise UsageError(
            f"{launched()} processes were launched (WORLD_SIZE), and accelerate knows of {processes}. Launch them "
            "with `accelerate launch`, or unset WORLD_SIZE"
        )
    if kind in SHARDED:
        raise UsageError(
            f"{kind.value} spreads a model over processes, and here each has all of it: choose multi-GPU without it in "
            "`accelerate config`"
        )
