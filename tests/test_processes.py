"""Which of a launch's processes this is, and what is refused."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from diffalign import cli
from diffalign.core import processes
from diffalign.core.errors import UsageError


def test_one_process_is_the_main_one():
    state = processes.current()
    assert state.is_main_process
    assert state.num_processes == processes.make_accelerator().num_processes == 1


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    """Each would take itself for the only one, and write what the others write."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes.current()  # not launched: a cluster says how many there are
    monkeypatch.setenv("LOCAL_RANK", "1")
    for ask in (processes.current, processes.make_accelerator):
        with pytest.raises(UsageError, match=r"2 processes were launched.*accelerate knows of 1"):
            ask()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_model_that_is_spread_over_processes_is_refused(kind, monkeypatch):
    made = SimpleNamespace(num_processes=1, distributed_type=DistributedType[kind])
    monkeypatch.setattr(processes, "Accelerator", lambda **options: made)
    with pytest.raises(UsageError, match="spreads a model over processes"):
        processes.make_accelerator()


def test_verbs_that_share_no_work_are_started_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    flags = ["--model=shapes-sd3", f"--output_dir={tmp_path / 'images'}"]
    assert cli.main(["generate", "a cat", *flags]) == 2
    assert "generate shares no work: start one process" in capsys.readouterr().err
    assert not (tmp_path / "images").exists()
