"""Which of the processes of a launch this is: `accelerate launch` on GPUs, `torchrun` on CPUs as well.

Verbs that share work ask here, so that no process takes itself for the only one; the command line refuses to start
others more than once. accelerate looks for processes without an accelerator only where it is told that they run on
CPUs.
"""

from __future__ import annotations

import atexit
import os
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env

from diffalign.core.errors import UsageError

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
    state = PartialState(cpu=_on_cpus())
    _check(state.num_processes, state.distributed_type)
    return state


def make_accelerator(**options: Any) -> Accelerator:
    """The same as accelerate's `Accelerator`, with its options.

    Raises:
        UsageError: of several processes each would be alone, or they share a model.
    """
    accelerator = Accelerator(cpu=_on_cpus(), **options)
    _check(accelerator.num_processes, accelerator.distributed_type)
    return accelerator


@atexit.register
def _leave() -> None:
    """Before the interpreter ends: where gloo's threads outlive it, it aborts, and the launcher then ends the others,
    which may be writing still."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
