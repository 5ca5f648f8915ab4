"""A process that dies, a disk that is full: nothing finished is lost, and the resumed run is the uninterrupted one."""

import errno
import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from processes import fork
from safetensors import SafetensorError
from tiny_runs import trainer

from diffalign import lora
from diffalign.core.errors import UsageError, full_disk
from diffalign.core.files import aside
from diffalign.training import checkpoint, optimizers

UPDATES = 4


def everything(run):
    """All state of a run: adapters and optimizer."""
    state = {f"optimizer.{k}": v for k, v in optimizers.state_tensors(run.optimizer).items()}
    for name in (lora.CURRENT, lora.LAGGED, lora.AVERAGED):
        adapter = lora.adapter_state(run.model.denoiser, name)
        state |= {f"{name}.{k}": v for k, v in adapter.items()}
    return state


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = trainer(tmp_path_factory.mktemp("whole"), training={"micro_batch_size": 5})
    rows = [run.train_update() for _ in range(UPDATES)]
    return everything(run), [r["reward"] for r in rows]


@pytest.mark.parametrize("moment", ["rollout", "update", "checkpoint"])
def test_killed_and_resumed_is_bit_identical(tmp_path, uninterrupted, moment):
    (tmp_path / "run").mkdir()
    died = fork(1, "killed_run", moment, tmp_path / "run", output=tmp_path)
    assert died.returncodes == [-signal.SIGKILL], died.stderr
    run = trainer(tmp_path / "run", training={"micro_batch_size": 5})
    assert run.resume()
    assert run.progress.update == 2
    while run.progress.update < UPDATES:
        run.folder.append_log(run.train_update())
        run.save()
    state, rewards = uninterrupted
    found = everything(run)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], state[k]) for k in state)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["update"] for row in log] == [1, 2, 3, 4]
    assert [row["reward"] for row in log] == rewards


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_file_that_cannot_grow_leaves_the_last_checkpoint(tmp_path):
    """The operating system's own refusal in the middle of a write, as on a full disk."""
    folder = tmp_path / "checkpoints"
    done = fork(1, "limited_files", folder, output=tmp_path)
    assert "000002 could not be written" in done.stdout, done.stderr
    assert "the last good one is" in done.stdout
    assert [p.name for p in folder.iterdir()] == ["000001"]
    checkpoint.load(folder / "000001")


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
