"""Locks on folders: one launch at a time, whatever ended the one before."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from processes import start

from diffalign.core import files, locks
from diffalign.core.errors import UsageError
from diffalign.core.files import check_target, contents
from diffalign.core.locks import LockError, hold
from diffalign.data.shard_cache import CacheError, ShardCache


@pytest.fixture
def holder(tmp_path):
    process = start("lock_holder", tmp_path / "run")
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_that_is_in_use_is_refused_with_the_process(tmp_path, holder):
    for _ in range(2):  # the first refusal does not spoil the second
        with pytest.raises(LockError, match=rf"run is in use by process {holder.pid}\. Wait"):
            hold(tmp_path / "run").__enter__()
    with pytest.raises(LockError, match="choose another pairs.cache"):
        hold(tmp_path / "run", setting="pairs.cache").__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with hold(tmp_path / "run"):
        assert contents(tmp_path / "run") == []


def test_of_many_that_start_at_once_exactly_one_wins(tmp_path):
    all_of_them = [start("lock_holder", tmp_path / "a" / "run") for _ in range(5)]
    lines = [p.stdout.readline() for p in all_of_them]
    (winner,) = [p for p, line in zip(all_of_them, lines, strict=True) if line == "held\n"]
    losers = [line for line in lines if line != "held\n"]
    assert all(f"is in use by process {winner.pid}." in line for line in losers)
    winner.communicate()  # the end of its input
    assert sorted({p.wait() for p in all_of_them}) == [0, 2]
    assert list(tmp_path.iterdir()) == []  # what was made for nothing is gone


def test_a_lock_leaves_only_what_its_holder_wrote(tmp_path):
    folder = tmp_path / "a" / "run"
    with hold(folder), hold(folder):
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []
    with hold(folder):
        (folder / "config.yaml").write_text("x")
    assert [p.name for p in folder.iterdir()] == ["config.yaml"]
    with pytest.raises(ValueError, match="mine"), hold(folder):
        raise ValueError("mine")
    with hold(folder):  # it was let go
        pass


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    (tmp_path / ".1.config.yaml").write_text("half")
    (tmp_path / ".22.pipeline").mkdir()
    (tmp_path / ".22.pipeline" / "part").write_text("half")
    (tmp_path / ".writing-000004").mkdir()
    mine = [".gitignore", ".12", "1.txt", ".cache"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    assert sorted(p.name for p in contents(tmp_path)) == sorted(mine)
    with hold(tmp_path):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(mine)


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def flock(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with hold(tmp_path / "run"):
        assert "this file system has no locks" in caplog.text
    assert not (tmp_path / "run").exists()


class Cache(ShardCache):
    rows, setting = "pairs", "pairs.cache"


def test_a_cache_without_a_shard_has_claimed_nothing(tmp_path):
    cache = Cache(tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".77.manifest.json").write_text("{")  # killed while it began
    cache.claim({"source": "a"})
    cache.claim({"source": "b"})
    assert json.loads((cache.folder / "manifest.json").read_text()) == {"key": {"source": "b"}}
    cache.write_shard(0, {"x": torch.zeros(1)}, {})
    with pytest.raises(CacheError, match="made from something else"):
        cache.claim({"source": "a"})
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("dear")
    with pytest.raises(
        CacheError, match=r"was not created by diffalign. Choose another pairs\.cache"
    ):
        Cache(tmp_path / "thesis").claim({})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file", "output_dir: .*file is a file. Choose a folder"),
        ("file/run", "output_dir: .*file is a file, so .*run cannot be made below it"),
        ("x" * 300, "output_dir: .*File name too long"),
    ],
)
def test_targets_that_cannot_be_are_refused_before_anything_is_made(tmp_path, path, message):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=message):
        check_target(tmp_path / path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_targets_that_can_be_leave_no_trace(tmp_path):
    check_target(tmp_path / "a" / "b")
    check_target(tmp_path)
    check_target(tmp_path / "x.json", folder=False)
    with pytest.raises(UsageError, match="--output: .* is a folder. Choose a file"):
        check_target(tmp_path, setting="--output", folder=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "message"),
    [(30, "Read-only file system.*that can be written"), (13, "Permission denied.*permissions")],
)
def test_what_the_system_refuses_is_said_with_what_helps(tmp_path, monkeypatch, number, message):
    """A read-only file system, and a folder of somebody else's: as root nothing is refused."""

    def refuse(**options):
        raise OSError(number, os.strerror(number), str(options["dir"]))

    monkeypatch.setattr(files.tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(UsageError, match=message):
        check_target(tmp_path / "run")


def test_a_deleted_working_directory_is_said(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(UsageError, match="current directory does not exist any more"):
        check_target(Path("run"))
