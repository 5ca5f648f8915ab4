"""Several processes on one machine, as `accelerate launch` starts them."""

from __future__ import annotations

import os
import subprocess
import sys

import torch


def results_of(world, source, folder, *arguments):
    """What a script's main process saved as `result.pt` in `folder`, which is its first argument."""
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(source)
    launch(world, script, folder, *arguments)
    return torch.load(folder / "result.pt", weights_only=False)


def launch(world, *arguments):
    """Run a script (or `-m` and a module) in `world` processes on the CPU; returns what it printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines=1"]
    command += [f"--num_processes={world}", "--mixed_precision=no", "--dynamo_backend=no"]
    command += ["--main_process_port=0"] if world > 1 else []
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
