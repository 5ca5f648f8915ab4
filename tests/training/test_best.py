"""The best policy by held-out rewards: what counts as better, and that it outlives everything else."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import trainer
from whole_runs import train

from diffalign import lora
from diffalign.core.errors import UsageError
from diffalign.evaluation.report import best_told, earlier_best
from diffalign.evaluation.score import Evaluation
from diffalign.rewards import registry
from diffalign.training import checkpoint
from diffalign.training.best import BestKeeper, gain, held_out_names
from diffalign.training.run_folder import RunFolder

WATCHED = {"evaluation": {"rewards": ["flatness", "jpeg2"]}}


def scored(**means):
    """Return an evaluation of two images; the standard deviation of every reward is 0.1."""
    scores = {n: np.array([m - 0.1, m + 0.1]) for n, m in means.items()}
    return Evaluation([], None, np.zeros(2), dict(means), {}, failed=0, scores=scores)


def test_gains_are_means_over_rewards_in_standard_deviations_of_the_base():
    before, names = scored(a=1.0, b=0.0), ("a", "b")
    assert gain(before, before, names) == 0.0
    assert gain(scored(a=1.2, b=0.1), before, names) == pytest.approx((2 + 1) / 2)
    # a reward on a scale of its own counts as much
    wide = Evaluation([], None, np.zeros(2), {"a": 10.0}, {}, 0, scores={"a": np.array([0, 20])})
    now = Evaluation([], None, np.zeros(2), {"a": 15.0}, {}, 0, scores={})
    assert gain(now, wide, ("a",)) == pytest.approx(0.5)
    # a reward that scored nothing makes an evaluation incomparable; a constant one says nothing
    assert gain(scored(a=1.2), before, names) is None
    flat = Evaluation([], None, np.zeros(2), {"a": 1.0, "b": 0}, {}, 0, scores={"a": np.ones(2)})
    assert gain(scored(a=1.2), flat, ("a",)) is None
    flat.scores["b"] = np.array([-0.1, 0.1])
    assert gain(scored(a=9, b=0.1), flat, names) == pytest.approx(1.0)


def test_the_best_policy_is_kept_whatever_follows(tmp_path):
    run = trainer(tmp_path, **WATCHED, training={"keep_checkpoints": 1})
    names = held_out_names(run.config)
    assert names == ("flatness", "jpeg2")
    keeper = BestKeeper(run, scored(flatness=0.5, jpeg2=0.5))
    assert keeper.summary()["update"] == 0
    assert not run.folder.best.exists()
    states = []
    for value in (0.4, 0.6, 0.55):
        run.train_update()
        run.save()
        keeper.consider(scored(flatness=value, jpeg2=0.5))
        state = lora.adapter_state(run.model.denoiser, run.policy)
        states.append({k: v.clone() for k, v in state.items()})
    assert [p.name for p in run.folder.checkpoints.iterdir()] == ["000003"]
    best = run.folder.best
    assert {p.name for p in best.iterdir()} == {"000002", "lora", "best.json"}
    _, tensors, state = checkpoint.load(best / "000002")
    assert all(torch.equal(v, states[1][k]) for k, v in tensors[run.policy].items())
    assert state["step"] == 2

    # a later sitting knows it; one that was scored no better changes nothing
    other = trainer(tmp_path, **WATCHED)
    assert other.resume()
    again = BestKeeper(other, scored(flatness=0.5, jpeg2=0.5))
    assert again.summary() == keeper.summary()
    again.consider(scored(flatness=0.6, jpeg2=0.5))
    assert again.best.update == 2
    again.consider(scored(flatness=0.7, jpeg2=0.5))
    assert {p.name for p in best.iterdir()} == {"000003", "lora", "best.json"}
    # a record without its checkpoint does not count
    checkpoint.shutil.rmtree(best / "000003")
    assert run.folder.read_best() is None


def test_a_policy_before_the_best_replaces_it(tmp_path):
    """After a rollback a better policy can have a lower number."""
    run = trainer(tmp_path, **WATCHED)
    keeper = BestKeeper(run, scored(flatness=0.5, jpeg2=0.5))
    for value in (0.5, 0.6):
        run.train_update()
        keeper.consider(scored(flatness=value, jpeg2=0.5))
    run.progress.update = 1
    keeper.consider(scored(flatness=0.8, jpeg2=0.5))
    assert {p.name for p in run.folder.best.iterdir()} == {"000001", "lora", "best.json"}


def test_without_a_held_out_reward_there_is_no_best(tmp_path):
    run = trainer(tmp_path)
    keeper = BestKeeper(run, scored(reward=0.5))
    keeper.consider(scored(reward=0.9))
    assert keeper.summary() is None
    assert not run.folder.best.exists()
    assert best_told({"updates": 3}) == best_told({"updates": 3, "best": None}) == ""


def test_a_sentence_says_which_is_best():
    best = {"update": 2, "by": ["flatness"], "gain": 0.5}
    told = best_told({"updates": 3, "best": best})
    assert "update 2 of 3 (best/lora): +0.50 standard deviations" in told
    assert earlier_best({"updates": 3, "best": best})
    assert "(the last)" in best_told({"updates": 2, "best": best})
    assert not earlier_best({"updates": 2, "best": best})
    assert "no evaluated update is better" in best_told(
        {"updates": 2, "best": best | {"update": 0}}
    )


def test_a_run_names_its_best_policy(base, prompts, tmp_path, capsys, monkeypatch):
    """The evaluated brightness is made to fall after the first update."""
    monkeypatch.setitem(registry.BUILT_IN, "brightness", "tiny:Brightness")
    values = iter((0.0, 2.0, 1.0, 0.5))
    monkeypatch.setattr("diffalign.training.best.gain", lambda *a: next(values), raising=True)
    folder = tmp_path / "run"
    more = ("--training.num_updates=3", "--training.eval_every=1", "--training.keep_checkpoints=1")
    assert train(base, prompts, folder, *more, "--evaluation.rewards=brightness") == 0
    printed = capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["best"]["update"], summary["best"]["by"]) == (1, ["brightness"])
    assert (
        f"next: diffalign generate 'a cat' --model {base} --lora {folder / 'best' / 'lora'}"
        in printed
    )
    assert "the best policy is that of update 1 of 3 (best/lora)" in printed
    page = (folder / "report.html").read_text()
    assert "the best policy is that of update 1 of 3 (best/lora)" in page
    assert "best/lora/pytorch_lora_weights.safetensors" in page
    assert (folder / "best" / "000001").is_dir()
    assert (folder / "checkpoints" / "000003").is_dir()
    files = [folder / p / "lora" / "pytorch_lora_weights.safetensors" for p in ("best", ".")]
    one, two = map(load_file, files)
    assert any(not torch.equal(v, two[k]) for k, v in one.items())
    assert RunFolder(folder).read_best()["update"] == 1


def test_a_run_folder_of_another_base_is_told_in_a_sentence(tmp_path):
    run = trainer(tmp_path)
    run.train_update()
    run.save()
    with pytest.raises(UsageError, match="put that one back, or choose another output_dir"):
        trainer(tmp_path, family="flux").resume()
