"""Other processes that run the programs of the tests, one or several as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parent


def program(name):
    """The file of a program of the tests."""
    return TESTS / "programs" / f"{name}.py"


def environment():
    """Variables of this process, with which another one finds the helpers of the tests."""
    return {**os.environ, "PYTHONPATH": str(TESTS)}


def python(name, *arguments, **options):
    """Run a program in one process, and return what became of it."""
    options = {"timeout": 300, "env": environment(), **options}
    command = [sys.executable, program(name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def start(name, *arguments, **options):
    """Start a program with pipes to its input and from its output."""
    options = {"env": environment(), "text": True, **options}
    command = [sys.executable, program(name), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)


def save_result(folder, result):
    """Write the main process's result and the number of processes for `results_of`."""
    # the other programs do not set up a group of processes by an import
    from diffalign.core import processes

    here = processes.current()
    if here.is_main_process:
        torch.save({"world": here.num_processes, "result": result}, Path(folder) / "result.pt")


def result_in(folder, world):
    """What `world` processes saved in `folder`."""
    saved = torch.load(folder / "result.pt", weights_only=False)
    assert saved["world"] == world
    return saved["result"]


def results_of(world, name, folder, *arguments):
    """What a program saved in `folder`, which is its first argument."""
    folder.mkdir()
    launch(world, program(name), folder, *arguments)
    return result_in(folder, world)


def launch(world, *arguments):
    """Run a script (or `-m` and a module) in `world` processes on the CPU; returns what the first printed.

    By torchrun: `accelerate launch --cpu` starts one process on one machine, whatever number it is given."""
    done = run(world, *arguments)
    assert done.returncode == 0, done.stderr[-9000:]
    return done.stdout


def run(world, *arguments):
    """The same, whatever comes of it."""
    command = [sys.executable]
    if world > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**environment(), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
