"""A process that dies, a disk that is full: nothing finished is lost, and the resumed run is the uninterrupted one."""

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import environment
from safetensors import SafetensorError
from tiny_runs import trainer

from diffalign import lora
from diffalign.core.errors import UsageError, full_disk
from diffalign.core.files import aside
from diffalign.training import checkpoint

UPDATES = 4
# Kills itself, as an operator or a machine would (SIGKILL: nothing can be cleaned up), in the middle of update 3.
CHILD = """
import os, signal, sys
from pathlib import Path
from tiny_runs import redness, trainer
from diffalign.training import checkpoint
from diffalign.methods.online.forward_update import ForwardProcessUpdate
from diffalign.evaluation.scoring import BackgroundScorer

moment, folder = sys.argv[1], Path(sys.argv[2])
run = trainer(folder, training={"micro_batch_size": 5})

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def at_the_second_call(function):
    calls = []
    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            die()
        return function(*args, **kwargs)
    return wrapper

run.resume()
for number in range(1, 5):
    if number == 3:
        if moment == "rollout":
            run.rollouts.scorer = BackgroundScorer(die)
        elif moment == "update":
            ForwardProcessUpdate.micro_batch = at_the_second_call(ForwardProcessUpdate.micro_batch)
        else:
            checkpoint.save_file = at_the_second_call(checkpoint.save_file)
    run.folder.append_log(run.train_update())
    run.save()
"""


def everything(run):
    """All state of a run: adapters and optimizer."""
    state = {f"optimizer.{k}": v for k, v in checkpoint.optimizer_tensors(run.optimizer).items()}
    for name in (lora.CURRENT, lora.LAGGED, lora.AVERAGED):
        adapter = lora.adapter_state(run.model.denoiser, name)
        state |= {f"{name}.{k}": v for k, v in adapter.items()}
    return state


def child(code, *arguments):
    env = {**environment(), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = trainer(tmp_path_factory.mktemp("whole"), training={"micro_batch_size": 5})
    rows = [run.train_update() for _ in range(UPDATES)]
    return everything(run), [r["reward"] for r in rows]


@pytest.mark.parametrize("moment", ["rollout", "update", "checkpoint"])
def test_killed_and_resumed_is_bit_identical(tmp_path, uninterrupted, moment):
    died = child(CHILD, moment, tmp_path)
    assert died.returncode == -signal.SIGKILL, died.stderr
    run = trainer(tmp_path, training={"micro_batch_size": 5})
    assert run.resume()
    assert run.progress.update == 2
    while run.progress.update < UPDATES:
        run.folder.append_log(run.train_update())
        run.save()
    state, rewards = uninterrupted
    found = everything(run)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], state[k]) for k in state)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["update"] for row in log] == [1, 2, 3, 4]
    assert [row["reward"] for row in log] == rewards


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from diffalign.training import checkpoint

folder = Path(sys.argv[1])
checkpoint.save(folder, 1, {"default": {"w": torch.zeros(8)}}, {}, keep=2)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    checkpoint.save(folder, 2, {"default": {"w": torch.zeros(100_000)}}, {}, keep=2)
except checkpoint.CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_file_that_cannot_grow_leaves_the_last_checkpoint(tmp_path):
    """The operating system's own refusal in the middle of a write, as on a full disk."""
    done = child(FULL, tmp_path)
    assert "000002 could not be written" in done.stdout, done.stderr
    assert "the last good one is" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["000001"]
    checkpoint.load(tmp_path / "000001")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_is_known_in_every_form(tmp_path):
    """As Python, torch and safetensors report it; an error of the suite speaks for itself."""
    tensors = {"w": torch.zeros(100_000)}
    errors = []
    for write in (lambda file: file.write(b"x" * 100_000), lambda file: torch.save(tensors, file)):
        try:
            with Path("/dev/full").open("wb") as file:
                write(file)
        except Exception as error:
            errors.append(error)
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    errors.append(SafetensorError(text))  # what save_file raises on a full tmpfs
    assert [full_disk(e) for e in errors] == ["No space left on device"] * 3
    quota = OSError(errno.EDQUOT, "Disk quota exceeded")
    with pytest.raises(OSError, match="quota") as caught, aside(tmp_path / "a.png"):
        raise quota
    assert full_disk(caught.value) == f"Disk quota exceeded: {tmp_path / 'a.png'}"
    told = UsageError("said better")
    told.__cause__ = quota
    for error in (told, OSError(errno.ENOENT, "no such file"), ValueError(28), None):
        assert full_disk(error) is None
