"""Two real processes, of which one dies."""

import json
import os

import pytest
import torch
from processes import fork, program, result_in, results_of, run

from diffalign.core import locks


@pytest.mark.slow
def test_a_peer_that_dies_ends_the_others_and_the_run_goes_on_from_its_checkpoint(tmp_path):
    whole = results_of(2, "dying_peer", tmp_path / "whole", "live")
    folder = tmp_path / "cut"
    folder.mkdir()
    done = run(2, program("dying_peer"), folder, "die")  # and does not hang
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    assert [p.name for p in (folder / "run" / "checkpoints").iterdir()] == ["000002"]
    assert not (folder / "result.pt").exists()
    done = fork(2, "dying_peer", folder, "live", output=folder)
    assert not any(done.returncodes), done.stderr[-2000:]
    assert torch.equal(result_in(folder, 2), whole)


def test_processes_leave_their_group_before_the_interpreter_ends(tmp_path):
    """Otherwise about half of all launches on CPUs end in an abort of one process."""
    done = run(2, program("leaving_peer"), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["left", "left"]


def test_a_signal_to_one_process_saves_the_update_of_all(base, prompts, tmp_path):
    """And while another launch holds the folder, all processes of a second end with one line."""
    folder = tmp_path / "run"
    arguments = ("signalled_peer", base, prompts, folder)
    with locks.hold(folder):
        done = fork(2, *arguments, output=tmp_path)
    assert done.returncodes == [2, 2]
    line = f"diffalign: error: {folder} is in use by process {os.getpid()}. Wait"
    assert sum(text.startswith(line) for text in done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert not folder.exists()
    done = fork(2, *arguments, output=tmp_path)
    assert done.returncodes == [143, 143]
    assert "updates up to 2 are saved in" in done.stderr
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["000002"]
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [1, 2]


@pytest.mark.slow
def test_a_peer_that_hangs_is_waited_for_so_long_and_no_longer(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFALIGN_PEER_TIMEOUT", "5")
    done = run(2, program("hanging_peer"))
    assert done.returncode != 0
    assert "another process of this launch does not answer" in done.stdout
