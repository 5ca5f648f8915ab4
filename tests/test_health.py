"""Collapse: found in a recorded one, not in healthy runs, and undone on request."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import trainer

from diffalign import lora
from diffalign.methods.online.health import find_collapse, find_warnings
from diffalign.training import checkpoint
from diffalign.training.trainer import TrainingError

RECORDED = Path(__file__).parents[1] / "benchmarks" / "results" / "demo-collapse.json"


def test_a_recorded_collapse_is_found_soon_after_its_beginning():
    rows = json.loads(RECORDED.read_text())["updates"]
    found = [n for n in range(len(rows) + 1) if find_collapse(rows[:n])]
    assert 39 <= found[0] <= 45  # the reward turns at update 38
    assert set(range(52, 59)) <= set(found)
    collapse = find_collapse(rows[: found[0]])
    assert 28 <= collapse.good <= 38
    assert "lower optimizer.learning_rate" in str(collapse)


@pytest.mark.parametrize("seed", range(20))
def test_noise_drift_and_a_growing_gradient_alone_are_no_collapse(seed):
    rng = np.random.default_rng(seed)
    for slope, growth in ((0.0, 1.0), (0.002, 1.0), (0.001, 1.03)):
        rows = [
            {
                "update": i + 1,
                "reward": 0.6 + slope * i + 0.03 * rng.standard_normal(),
                "grad_norm": 1e-3 * growth**i * np.exp(0.3 * rng.standard_normal()),
            }
            for i in range(150)
        ]
        assert not any(find_collapse(rows[:n]) for n in range(151))


def test_short_runs_and_rows_without_an_update_say_nothing():
    assert find_collapse([]) is None
    assert find_collapse([{"update": i, "reward": float("nan")} for i in range(99)]) is None


def row(update, **values):
    return {"update": update, "diversity": 1.0, **values}


def test_images_that_become_alike_are_warned_of():
    rows = [row(i + 1, diversity=1.0 - 0.03 * i) for i in range(30)]
    first = next(n for n in range(31) if find_warnings(rows[:n], {}, []))
    assert np.median([r["diversity"] for r in rows[first - 5 : first]]) < 0.5 * 0.94
    assert "become alike" in find_warnings(rows, {}, [])["diversity"]
    steady = [row(i, diversity=0.8 + 0.2 * (i % 2)) for i in range(30)]
    assert find_warnings(steady, {}, []) == {}
    assert find_warnings([], {}, []) == {}


def test_a_reward_that_is_only_looked_at_and_falls_is_warned_of():
    def seen(*means):
        rows = [row(i) for i in range(9)]
        for at, (reward, other) in zip((2, 5, 8), means, strict=False):
            rows[at]["evaluation"] = {"means": {"reward": reward, "other": other}}
        return find_warnings(rows, {"reward": 0.5, "other": 0.5}, ["other"])

    assert (
        "other, which is only looked at, fell from 0.500 to 0.300"
        in seen((0.6, 0.4), (0.7, 0.3))["other"]
    )
    nothing = [row(1), row(2, evaluation={"means": {}}), row(3, evaluation={"means": {}})]
    assert find_warnings(nothing, {"reward": 0.5, "other": 0.5}, ["other"]) == {}  # none was scored
    assert seen((0.6, 0.4)) == {}  # once may be chance
    assert seen((0.6, 0.6), (0.7, 0.4)) == {}
    assert seen((0.4, 0.4), (0.4, 0.3)) == {}  # the trained one fell as well: that is no gaming
    assert seen((0.6, 0.4), (0.7, 0.3), (0.8, 0.6)) == {}


def test_rolling_back_restores_the_good_policy_and_halves_the_rate(tmp_path):
    run = trainer(tmp_path, training={"keep_checkpoints": 9})
    rates, kept = [], []
    for _ in range(4):
        run.folder.append_log(run.train_update())
        run.save()
        state = lora.adapter_state(run.model.denoiser, lora.CURRENT)
        kept.append({name: value.clone() for name, value in state.items()})
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates == [0.01] * 4
    good = {name: state.clone() for name, state in kept[2].items()}
    run.roll_back(3)
    found = lora.adapter_state(run.model.denoiser, lora.CURRENT)
    assert all(torch.equal(found[name], good[name]) for name in good)
    assert (run.progress.update, run.progress.rollbacks) == (3, 1)
    assert checkpoint.latest(tmp_path / "checkpoints").name == "000003"
    assert [r["update"] for r in run.folder.read_log()] == [1, 2, 3]
    run.train_update()
    assert run.optimizer.param_groups[0]["lr"] == 0.005

    other = trainer(tmp_path, training={"keep_checkpoints": 9})  # a process that starts anew
    assert other.resume()
    assert (other.progress.update, other.progress.rollbacks) == (3, 1)
    with pytest.raises(TrainingError, match="keep_checkpoints"):
        run.roll_back(0)
