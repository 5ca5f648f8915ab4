"""Several processes on one machine, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

WHO = """
from diffalign.core import processes
if processes.current().is_main_process:
    open(sys.argv[1] + "/world", "w").write(str(processes.current().num_processes))
"""


def environment():
    """Variables of this process, with which another one finds the helpers of the tests."""
    helpers = [path for path in sys.path if Path(path).is_relative_to(Path(__file__).parent)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(helpers)}


def results_of(world, source, folder, *arguments):
    """What a script's main process saved as `result.pt` in `folder`, which is its first argument."""
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(source + WHO)
    launch(world, script, folder, *arguments)
    assert (folder / "world").read_text() == str(world)
    return torch.load(folder / "result.pt", weights_only=False)


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
