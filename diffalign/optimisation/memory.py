"""Peak memory of a call, and the machine that measured it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""Files of Linux with a process's memory, and the one that sets its peak back."""
RESET_PEAK = "5"
"""Value that sets the peak back (man 5 proc)."""
FIELD = "VmHWM:"
"""Field of `STATUS` with the peak of the resident memory."""


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Make a call, and return the peak bytes of memory during it.

    On CUDA it is the memory that torch allocated on the device. On a CPU it is the resident memory of the whole
    process, which Linux tells; None on other systems.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return int(torch.cuda.max_memory_allocated(device))
    can_tell = _set_back()
    call()
    return _resident_peak() if can_tell else None


def tells_memory(device: torch.device) -> bool:
    """Return whether this machine tells the peak memory of a call."""
    return device.type == "cuda" or (_set_back() and _resident_peak() is not None)


def _set_back() -> bool:
    try:
        RESET.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def _resident_peak() -> int | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    values = [int(line.split()[1]) for line in lines if line.startswith(FIELD)]
    return 1024 * values[0] if values else None


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a measured time depends on: the device, the processor, and the number of threads."""
    facts = {
        "device": device.type,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        facts["name"] = torch.cuda.get_device_name(device)
    return facts
