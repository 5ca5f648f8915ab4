"""Which of a launch's processes this is, and what is refused."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from diffalign import cli
from diffalign.core import processes
from diffalign.core.errors import ReportedError, UsageError


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


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_time_to_wait_for_peers_is_a_number_of_seconds(text, monkeypatch):
    monkeypatch.setenv("DIFFALIGN_PEER_TIMEOUT", text)
    with pytest.raises(UsageError, match="DIFFALIGN_PEER_TIMEOUT: .* is no number of seconds"):
        processes.current()


def test_what_the_main_process_finds_wrong_ends_the_others_as_well(monkeypatch):
    """They would wait for it in vain; only the main one says why."""
    state = SimpleNamespace(is_main_process=False, num_processes=2)
    monkeypatch.setattr(processes, "current", lambda: state)
    monkeypatch.setattr(processes, "broadcast_object_list", lambda objects: [True, None])
    with pytest.raises(ReportedError):
        processes.on_main(lambda: pytest.fail("called"))
    monkeypatch.setattr(processes, "broadcast_object_list", lambda objects: [False, 7])
    assert processes.on_main(lambda: pytest.fail("called")) == 7
    state.is_main_process, state.num_processes = True, 1
    assert processes.on_main(lambda: 8) == 8


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
    assert "`generate` runs in one process. Start it" in capsys.readouterr().err
    assert not (tmp_path / "images").exists()
