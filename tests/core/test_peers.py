"""Two real processes, of which one dies."""

import json
import os

import torch
from processes import WHO, results_of, run

from diffalign.core import locks

SCRIPT = """
import os, signal, sys, torch
import test_online as t
os.makedirs(sys.argv[1] + "/run", exist_ok=True)
made = t.trainer(sys.argv[1] + "/run")
made.resume()
while made.progress.update < 4:
    if sys.argv[2] == "die" and made.progress.update == 3 and made.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    made.train_update()
    if made.progress.update == 2:
        made.save()
if made.accelerator.is_main_process:
    torch.save(t.weights(made), sys.argv[1] + "/result.pt")
"""


def test_a_peer_that_dies_ends_the_others_and_the_run_goes_on_from_its_checkpoint(tmp_path):
    source = SCRIPT
    whole = results_of(2, source, tmp_path / "whole", "live")
    folder = tmp_path / "cut"
    folder.mkdir()
    (folder / "script.py").write_text(source + WHO)
    done = run(2, folder / "script.py", folder, "die")  # and does not hang
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    assert [p.name for p in (folder / "run" / "checkpoints").iterdir()] == ["000002"]
    assert not (folder / "result.pt").exists()
    done = run(2, folder / "script.py", folder, "live")
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(folder / "result.pt"), whole)


LEAVING = """
import atexit, sys, torch
def note():
    state = "there" if torch.distributed.is_initialized() else "left"
    open(f"{sys.argv[1]}/{rank}", "w").write(state)
atexit.register(note)  # handlers run in reverse: after the suite's
from diffalign.core import processes
rank = processes.current().process_index
torch.distributed.all_reduce(torch.ones(9))
"""


def test_processes_leave_their_group_before_the_interpreter_ends(tmp_path):
    """Otherwise about half of all launches on CPUs end in an abort of one process."""
    (tmp_path / "script.py").write_text(LEAVING)
    done = run(2, tmp_path / "script.py", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["left", "left"]


SIGNALLED = """
import os, signal, sys
from whole_runs import train
from diffalign.methods.online.trainer import OnlineTrainer
base, prompts, folder = sys.argv[1:]
own = OnlineTrainer.rollout
def rollout(run, plan, number):
    if number == 2 and run.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return own(run, plan, number)
OnlineTrainer.rollout = rollout
more = ["--training.num_updates=4", "--training.checkpoint_every=50"]
sys.exit(train(base, prompts, folder, *more))
"""


def test_a_signal_to_one_process_saves_the_update_of_all(base, prompts, tmp_path):
    """And while another launch holds the folder, all processes of a second end with one line."""
    (tmp_path / "script.py").write_text(SIGNALLED)
    folder = tmp_path / "run"
    with locks.hold(folder):
        done = run(2, tmp_path / "script.py", base, prompts, folder)
    assert done.returncode != 0
    # at the beginning of a line; the launcher's report at the end may show it again
    line = f"diffalign: error: {folder} is in use by process {os.getpid()}. Wait"
    assert sum(text.startswith(line) for text in done.stderr.splitlines()) == 1
    assert done.stderr.count("Traceback") == 1  # the launcher's own
    assert not folder.exists()
    done = run(2, tmp_path / "script.py", base, prompts, folder)
    assert "143" in done.stderr
    assert "updates up to 2 are saved in" in done.stderr
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["000002"]
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [1, 2]


HANGING = """
import os, sys, threading, torch
from diffalign.core import processes
from diffalign.core.errors import explain
if processes.current().process_index == 1:
    threading.Event().wait()
try:
    processes.highest(1)
except RuntimeError as error:
    print(explain(error), flush=True)
    os._exit(3)
"""


def test_a_peer_that_hangs_is_waited_for_so_long_and_no_longer(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFALIGN_PEER_TIMEOUT", "5")
    (tmp_path / "script.py").write_text(HANGING)
    done = run(2, tmp_path / "script.py")
    assert done.returncode != 0
    assert "another process of this launch does not answer" in done.stdout
