"""Two real processes, of which one dies."""

import os

import torch
from processes import WHO, results_of, run

SCRIPT = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
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
    source = SCRIPT.format(tests=os.path.dirname(__file__))
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
