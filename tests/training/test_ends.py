"""How whole runs end before their planned end: signals, no memory, nothing to learn from, a folder in use."""

import json
import os
import signal
import sys
from dataclasses import replace

import pytest
import torch
from marks import slow_except
from safetensors.torch import load_file
from tiny_runs import trainer
from whole_runs import train

from diffalign.config import load
from diffalign.core import locks
from diffalign.core.files import LOCK
from diffalign.core.interruption import SIGNALS
from diffalign.methods.online.trainer import OnlineTrainer
from diffalign.training import checkpoint
from diffalign.training.run_folder import RunFolder
from diffalign.training.trainer import TrainingError


def during_updates(monkeypatch, do):
    """Call `do` with the number of each update while its images are drawn."""
    own = OnlineTrainer.rollout

    def rollout(run, plan, number):
        do(number)
        return own(run, plan, number)

    monkeypatch.setattr(OnlineTrainer, "rollout", rollout)


@pytest.mark.parametrize("number", slow_except([signal.SIGTERM], SIGNALS))
def test_a_signal_saves_the_update_in_hand_and_the_run_goes_on(
    number, base, prompts, tmp_path, capfd, monkeypatch, signals
):
    """Long before a checkpoint is due; without the update's evaluation, for there may be no time."""
    folder = tmp_path / "run"
    more = ["--training.num_updates=3", "--training.checkpoint_every=50", "--training.eval_every=2"]

    def send(update):
        if update == 2:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        during_updates(patch, send)
        assert train(base, prompts, folder, *more) == 128 + number
    error = capfd.readouterr().err
    assert "the update in hand is finished and saved; a second one ends at once" in error
    assert f"updates up to 2 are saved in {folder / 'checkpoints' / '000002'}; the same" in error
    assert "command goes on with update 3" in error
    assert "Traceback" not in error
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [("evaluation" in r, r["update"]) for r in rows] == [(False, 1), (False, 2)]
    if number != SIGNALS[0]:
        return
    whole = tmp_path / "whole"
    assert train(base, prompts, whole, *more) == 0
    assert train(base, prompts, folder, *more) == 0
    printed = capfd.readouterr().out
    assert "resumed after update 2" in printed
    assert "in all sittings; this one, after update 2" in printed
    one, two = (load_file(f / "lora" / "pytorch_lora_weights.safetensors") for f in (whole, folder))
    assert all(torch.equal(v, two[k]) for k, v in one.items())


def test_a_signal_before_the_first_update_says_that_nothing_is_saved(
    base, prompts, tmp_path, capfd, monkeypatch, signals
):
    def prepare(config, device):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("diffalign.training.run.prepare_model", prepare)
    assert train(base, prompts, tmp_path / "run") == 143
    assert "no update of" in (error := capfd.readouterr().err)
    assert "begins with the first" in error
    assert not (tmp_path / "run").exists()


def test_a_run_that_failed_before_its_first_update_can_be_corrected(
    base, prompts, tmp_path, capsys, monkeypatch
):
    """Whatever it was: here memory, which is one line with the settings that help."""
    folder = tmp_path / "run"

    def full(update):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 400000000000 bytes. Error code 12 (Cannot allocate memory)"
        )

    with monkeypatch.context() as patch:
        during_updates(patch, full)
        assert train(base, prompts, folder, "--training.num_updates=1") == 2
    error = capsys.readouterr().err
    assert "out of memory: DefaultCPUAllocator: can't allocate memory: you tried to" in error
    assert "training.micro_batch_size (now " in error
    assert "rollout.micro_batch_size (now " in error
    assert "model.gradient_checkpointing=true" in error
    assert "Traceback" not in error
    more = ["--training.num_updates=1", "--rollout.prompts_per_update=1", "--learning_rate=0.002"]
    assert train(base, prompts, folder, *more) == 0


@pytest.mark.parametrize("learnt", slow_except([False], [False, True]))
def test_a_run_with_nothing_to_learn_from_ends(
    learnt, base, prompts, tmp_path, capsys, monkeypatch
):
    """Never anything: an error with advice. Not any more, at the height that was reached: an early end, with a LoRA."""
    folder = tmp_path / "run"
    more = ["--training.max_idle_updates=2", "--training.num_updates=9"]
    if learnt:
        train(base, prompts, folder, "--training.num_updates=1", more[0])
    rewards = equal_rewards(monkeypatch, 1e3 if learnt else 0.0)
    assert train(base, prompts, folder, *more) == (0 if learnt else 2)
    printed = "".join(capsys.readouterr())
    assert "in 2 updates in a row all images of a prompt had the same reward" in printed
    assert ("training ends here" in printed) == learnt
    assert ("or draw more images of each (rollout.group_size)" in printed) != learnt
    updates = 3 if learnt else 2
    assert checkpoint.latest(folder / "checkpoints").name == f"{updates:06d}"
    assert (folder / "lora").is_dir() == learnt
    assert len(rewards) == 2
    if learnt:  # finished: the same command only evaluates
        assert train(base, prompts, folder, *more) == 0
        assert len(rewards) == 2


def equal_rewards(monkeypatch, value):
    """Make the rewards of every update's images equal; returns the updates' numbers."""
    own, numbers = OnlineTrainer.rollout, []

    def rollout(run, plan, number):
        found = own(run, plan, number)
        numbers.append(number)
        return replace(found, rewards=torch.full_like(found.rewards, value))

    monkeypatch.setattr(OnlineTrainer, "rollout", rollout)
    return numbers


def foreign_message(*_, **__):
    """Write as another library would, and fail: nothing heavy is due before the folder is checked."""
    print("a foreign line", file=sys.stderr)
    raise AssertionError("the forecast was made")


def test_a_second_start_in_the_folder_is_refused(base, prompts, tmp_path, capsys, monkeypatch):
    """Before the forecast, and without a trace; `tests/core/test_locks.py` has the processes."""
    folder = tmp_path / "run"
    monkeypatch.setattr("diffalign.training.forecast.forecast_of", foreign_message)
    monkeypatch.setattr("diffalign.core.console.messages", lambda: ["a foreign line"])
    with locks.hold(folder):
        held, locks._held = locks._held, {}  # as another process sees it
        try:
            assert train(base, prompts, folder) == 2
        finally:
            locks._held = held
        assert [p.name for p in folder.iterdir()] == [LOCK]
    assert f"run is in use by process {os.getpid()}. Wait" in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_the_folder_of_something_else_is_refused_before_the_forecast(
    more, base, prompts, tmp_path, capsys, monkeypatch
):
    (tmp_path / "thesis.tex").touch()
    monkeypatch.setattr("diffalign.training.forecast.forecast_of", foreign_message)
    assert train(base, prompts, tmp_path, *more) == 2
    assert "is not empty and was not created by diffalign" in capsys.readouterr().err


def test_messages_of_a_failed_start_do_not_spoil_the_folder(tmp_path):
    (tmp_path / "messages.log").write_text("a foreign line\n")
    RunFolder(tmp_path).check(load("demo"))


def test_a_signal_during_the_last_update_says_that_training_is_finished(
    base, prompts, tmp_path, capfd, monkeypatch, signals
):
    def send(update):
        if update == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    during_updates(monkeypatch, send)
    assert train(base, prompts, tmp_path / "run", "--training.num_updates=2") == 143
    error = capfd.readouterr().err
    assert "training is finished, and its 2 updates are saved in" in error
    assert "update 3" not in error


def test_a_signal_during_a_dry_run_promises_nothing(
    base, prompts, tmp_path, capfd, monkeypatch, signals
):
    def kill(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("diffalign.training.forecast.forecast_of", kill)
    assert train(base, prompts, tmp_path / "run", "--dry-run") == 143
    assert "nothing is resumed" in capfd.readouterr().err


def test_a_policy_that_draws_nothing_finite_is_not_saved(tmp_path):
    run = trainer(tmp_path)
    run.train_update()
    run.save()
    for parameter in run.parameters:
        parameter.data.fill_(torch.nan)
    with pytest.raises(
        TrainingError, match=r"no finite image any more.*last checkpoint is .*000001"
    ):
        run.train_update()
    _, tensors, _ = checkpoint.load(checkpoint.latest(tmp_path / "checkpoints"))
    assert all(t.isfinite().all() for t in tensors["default"].values())
