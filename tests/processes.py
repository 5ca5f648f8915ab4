"""Other processes that run the programs of the tests.

`run` starts them as torchrun does. `fork` gives the same variables to processes that fork from a server, which has
imported the libraries once: that saves seconds of imports for every process.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

TESTS = Path(__file__).parent
TIMEOUT = 300
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["tiny_moves", "tiny_pairs", "tiny_runs", "whole_runs", "diffalign.training.run"]
)


def program(name):
    """The file of a program of the tests."""
    return TESTS / "programs" / f"{name}.py"


def environment():
    """Variables of this process, with which another one finds the helpers of the tests."""
    return {**os.environ, "PYTHONPATH": str(TESTS)}


def python(name, *arguments, **options):
    """Run a program in one process, and return what became of it."""
    options = {"timeout": TIMEOUT, "env": environment(), **options}
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
    done = fork(world, name, folder, *arguments, output=folder)
    assert not any(done.returncodes), done.stderr[-9000:]
    return result_in(folder, world)


def fork(world, name, *arguments, output):
    """Run a program in `world` processes that fork from the server, and return what became of them.

    Their output and errors are written into the folder `output`.
    """
    variables = {"ACCELERATE_USE_CPU": "true"}
    threads = 1 if world > 1 else torch.get_num_threads()
    if world > 1:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        variables |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    members = []
    for rank in range(world):
        own = variables | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {})
        argv = [str(program(name)), *map(str, arguments)]
        members.append(FORKS.Process(target=member, args=(argv, own, threads, f"{output}/{rank}")))
    for process in members:
        process.start()
    for process in members:
        process.join(TIMEOUT)
        process.kill()
        process.join()
    texts = {
        kind: "".join(Path(f"{output}/{rank}.{kind}").read_text() for rank in range(world))
        for kind in ("stdout", "stderr")
    }
    return SimpleNamespace(returncodes=[p.exitcode for p in members], **texts)


def member(argv, variables, threads, output):
    """Run a program in this process, with its output in files."""
    os.environ.update(variables)
    torch.set_num_threads(threads)
    for number, kind in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{output}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def run(world, *arguments):
    """Run a script in `world` processes on the CPU by torchrun, and return what became of it.

    `accelerate launch --cpu` starts one process on one machine, whatever number it is given.
    """
    command = [sys.executable]
    if world > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
        env={**environment(), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
