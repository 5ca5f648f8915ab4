"""Checkpoints survive what happens to files; run folders belong to one configuration."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from processes import python

from diffalign.config import load
from diffalign.core import locks
from diffalign.training import checkpoint, optimizers
from diffalign.training.checkpoint import CheckpointError
from diffalign.training.run_folder import RunFolder, RunFolderError

TENSORS = {
    "default": {"a.weight": torch.arange(6.0).view(2, 3)},
    "optimizer": {"0.step": torch.tensor(3.0)},
}


def save(folder, update, keep=2):
    return checkpoint.save(folder, update, TENSORS, {"step": update}, keep=keep)


def test_round_trip_and_only_the_newest_are_kept(tmp_path):
    for update in (1, 2, 10):
        save(tmp_path, update)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["000002", "000010"]
    update, tensors, state = checkpoint.load(checkpoint.latest(tmp_path))
    assert (update, state) == (10, {"step": 10})
    torch.testing.assert_close(tensors["default"]["a.weight"], TENSORS["default"]["a.weight"])


@pytest.mark.parametrize("name", ["default.safetensors", "optimizer.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "delete", "flip"])
def test_damage_is_an_error_that_says_what_to_do(tmp_path, name, damage):
    path = save(tmp_path, 5) / name
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "delete":
        path.unlink()
    elif name == "manifest.json":
        path.write_bytes(data.replace(b'"update"', b'"uqdate"'))
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"000005.*(damaged|lacks|no readable)"):
        checkpoint.load(tmp_path / "000005")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint.*000005"):
        checkpoint.load_newest(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["000005"]  # for as long as there is no other


def test_the_one_before_a_damaged_checkpoint_is_used_and_that_is_said(tmp_path, caplog):
    for update in (1, 2, 3):
        save(tmp_path, update, keep=9)
    (tmp_path / "000003" / "default.safetensors").write_bytes(b"cut")
    (tmp_path / "000002" / "manifest.json").write_text("[]")
    assert checkpoint.load_newest(tmp_path).name == "000001"
    assert "000003/default.safetensors is damaged" in caplog.text
    assert "going on from the checkpoint before" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "000001",
        "000002.damaged",
        "000003.damaged",
    ]
    assert checkpoint.load_newest(tmp_path).name == "000001"
    save(tmp_path, 3, keep=9)
    assert checkpoint.load_newest(tmp_path, until=2).name == "000001"


def test_checkpoints_are_numbers_and_other_folders_are_not_ours(tmp_path):
    for update in (999_999, 1_000_000):
        save(tmp_path, update)
    (tmp_path / "000003.bak").mkdir()
    (tmp_path / "2000000").write_text("a file")
    assert checkpoint.latest(tmp_path).name == "1000000"
    checkpoint.drop_after(tmp_path / "999999")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000003.bak", "2000000", "999999"]
    save(tmp_path, 1_000_001, keep=1)
    assert (tmp_path / "000003.bak").is_dir()
    assert checkpoint.load_newest(tmp_path / "nowhere") is None


def test_a_checkpoint_gets_its_name_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    """Killed just before that, it is not there; after it, every file has been written through."""
    synced = []
    monkeypatch.setattr(checkpoint, "sync", lambda path: synced.append(path.name))
    named = Path.rename

    def rename(self, target):
        if target.name == "000007":
            names = {"default.safetensors", "optimizer.safetensors", "manifest.json"}
            assert names | {".writing-000007"} <= set(synced)
            assert {p.name for p in self.iterdir()} == names
            assert not target.exists()
        return named(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    save(tmp_path, 7)
    assert synced[-1] == tmp_path.name


def test_a_write_that_fails_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left.*last good one is .*000001"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["000001"]
    checkpoint.load(tmp_path / "000001")


def test_whatever_latest_names_is_whole_at_every_moment_of_a_write(tmp_path, monkeypatch):
    """Killed before any change to the file system, a run goes on from a checkpoint that loads."""
    save(tmp_path, 1)
    moments = []

    def watched(module, name):
        original = getattr(module, name)

        def changed(*args, **kwargs):
            newest = checkpoint.latest(tmp_path)
            if not moments or moments[-1] != newest:
                checkpoint.load(newest)
            moments.append(newest)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, changed)

    for name in ("rename", "replace", "mkdir", "unlink", "rmdir", "fsync"):
        watched(os, name)
    watched(checkpoint, "save_file")
    save(tmp_path, 2)
    assert len(moments) > 3
    assert {m.name for m in moments[:3]} == {"000001"}
    checkpoint.load(checkpoint.latest(tmp_path))


def test_leftovers_of_a_killed_write_are_ignored(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "000001", tmp_path / ".writing-000002")
    assert checkpoint.latest(tmp_path).name == "000001"
    save(tmp_path, 2)
    assert checkpoint.latest(tmp_path).name == "000002"


def test_optimizer_state_goes_back_exactly():
    def build():
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1)

    def step(layer, optimizer, seed):
        torch.manual_seed(seed)
        layer(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    first, optimizer = build()
    step(first, optimizer, 1)
    second, other = build()
    second.load_state_dict(first.state_dict())
    optimizers.restore(other, optimizers.state_tensors(optimizer))
    for layer, opt in ((first, optimizer), (second, other)):
        step(layer, opt, 2)
    assert torch.equal(first.weight, second.weight)


class TestRunFolder:
    def test_the_same_configuration_may_return(self, tmp_path):
        folder = RunFolder(tmp_path / "run")
        folder.claim(load())
        folder.claim(load(None, ["--training.num_updates=500", "--training.max_minutes=1"]))

    def test_another_configuration_is_refused_and_nothing_lost(self, tmp_path):
        folder = RunFolder(tmp_path / "run")
        folder.claim(load())
        folder.append_log({"update": 1})
        before = (folder.path / "config.yaml").read_text()
        with pytest.raises(RunFolderError, match=r"learning_rate: [0-9.]+, 0.5"):
            folder.claim(load(None, ["--learning_rate=0.5"]))
        assert (folder.path / "config.yaml").read_text() == before

    def test_other_prompts_are_refused_and_old_folders_go_on(self, tmp_path):
        folder = RunFolder(tmp_path / "run")
        old, new = {"prompts.train": "1", "prompts.evaluation": "2"}, {"prompts.train": "3"}
        folder.claim(load())  # by a version that did not look
        folder.claim(load(), old)
        folder.append_log({"update": 1})
        folder.claim(load(), old)
        with pytest.raises(RunFolderError, match=r"other prompts.*: what prompts\.train names has"):
            folder.check(load(), old | new)
        (folder.path / "prompts.json").write_text("{")
        with pytest.raises(RunFolderError, match=r"prompts\.json is not readable"):
            folder.check(load(), old)

    def test_a_run_without_an_update_has_claimed_nothing(self, tmp_path):
        """The corrected command runs in the same folder, and finds nothing that was prepared for the other."""
        folder = RunFolder(tmp_path / "run")
        folder.claim(load(), {"prompts.train": "1"})
        kept = [folder.path / name for name in ("aligned.safetensors", "aligned.json")]
        for file in kept:
            file.write_text("{}")
        folder.claim(load(), {"prompts.train": "1"})
        assert all(file.exists() for file in kept)  # interrupted, and started again
        other = load(None, ["--learning_rate=0.5"])
        folder.claim(other, {"prompts.train": "2"})
        assert not any(file.exists() for file in kept)
        assert "learning_rate: 0.5" in (folder.path / "config.yaml").read_text()
        assert json.loads((folder.path / "prompts.json").read_text()) == {"prompts.train": "2"}
        (folder.path / "config.yaml").write_text("{")  # damaged, and nothing is lost with it
        folder.claim(load())
        save(folder.checkpoints, 1)
        with pytest.raises(RunFolderError, match="another configuration"):
            folder.claim(other)

    @pytest.mark.parametrize("name", [".123.config.yaml", ".123.prompts.json", ".lock"])
    def test_what_a_killed_process_was_writing_is_nothing(self, tmp_path, name):
        (tmp_path / name).write_text("half a conf")
        RunFolder(tmp_path).claim(load("demo"))
        assert (tmp_path / "config.yaml").is_file()

    def test_a_folder_of_something_else_is_refused(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("dear to me")
        with pytest.raises(RunFolderError, match="not empty and was not created by diffalign"):
            RunFolder(tmp_path).claim(load("demo"))

    def test_log_survives_a_cut_line_and_is_rewound(self, tmp_path):
        folder = RunFolder(tmp_path)
        for update in (1, 2, 3):
            folder.append_log({"update": update})
        with (tmp_path / "log.jsonl").open("a") as file:
            file.write('{"update": 4, "rew')
        assert [r["update"] for r in folder.read_log()] == [1, 2, 3]
        folder.rewind_log(2)
        assert [r["update"] for r in folder.read_log()] == [1, 2]


def test_killed_before_the_configuration_has_its_name(tmp_path):
    """Its lock is free again, and the hidden file is no content and is gone at the next start."""
    folder = tmp_path / "run"
    done = python("killed_claim", folder)
    assert done.returncode == -9
    assert len(os.listdir(folder)) == 2  # the lock and half a file
    with locks.hold(folder):
        RunFolder(folder).claim(load())
    assert os.listdir(folder) == ["config.yaml"]
