"""The choice of memory settings at the start of a run."""

import pytest
from whole_runs import train

from diffalign.config import load
from diffalign.training import memory_auto
from diffalign.training.run_folder import RunFolder


@pytest.mark.parametrize("changes", [{}, {"model.gradient_checkpointing": True}])
def test_a_run_that_goes_on_chooses_nothing_again(changes, tmp_path, monkeypatch):
    flags = [f"--output_dir={tmp_path}", "--model.memory=auto"]
    monkeypatch.setattr(memory_auto, "_choice", lambda config: changes)
    chosen = memory_auto.settled(load("awm-shapes-sd3", flags))
    assert chosen.model.gradient_checkpointing == bool(changes)
    folder = RunFolder(tmp_path)
    folder.claim(chosen)
    folder.append_log({"update": 1})
    monkeypatch.setattr(memory_auto, "_choice", None)  # would fail
    assert memory_auto.settled(load("awm-shapes-sd3", flags)) == chosen


def test_a_choice_is_made_once(base, prompts, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train(base, prompts, folder, "--training.num_updates=1", "--model.memory=auto") == 0
    assert capsys.readouterr().out.count("model.memory=auto: ") == 1
