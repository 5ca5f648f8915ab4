"""Collapse: found in a recorded one, not in healthy runs, and undone on request."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import trainer

from diffalign import lora
from diffalign.methods.online.health import find_collapse, find_idle, find_warnings
from diffalign.training import checkpoint
from diffalign.training.trainer import TrainingError

RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "demo-collapse.json"


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


def course(*parts, **more):
    """Rows of updates: (how many, values), numbered from 1."""
    values = [v for count, v in parts for v in [v] * count]
    return [{"update": i + 1, **more, **v} for i, v in enumerate(values)]


ALIVE = {"reward": 0.5, "grad_norm": 0.02, "reward_group_std": 0.1}


def healthy(count, seed=0):
    rng = np.random.default_rng(seed)
    return [(1, {**ALIVE, "reward": 0.5 + 0.02 * rng.standard_normal()}) for _ in range(count)]


@pytest.mark.parametrize(
    "dead",
    [
        {"reward": 0.0},  # no group has different rewards: no step, no gradient
        {"reward": 0.0, "reward_group_std": 0.0},
        {"reward": 0.0, "reward_group_std": 0.0, "grad_norm": 1e-4},  # a KL term goes on
        {"reward": 0.02, "reward_group_std": 0.004, "grad_norm": 0.01},  # an odd image differs
    ],
)
def test_a_dead_policy_is_a_collapse(dead):
    for length in (20, 40):
        rows = course(*healthy(length), (100, dead))
        seen = [n for n in range(len(rows) + 1) if find_collapse(rows[:n])]
        assert length + 1 < seen[0] <= length + 5
        assert seen[-1] == len(rows)  # and later, when most rows are of the dead policy
        collapse = find_collapse(rows)
        assert length - 5 < collapse.good <= length
        assert collapse.gradient_rise is None
        assert "all images of a prompt get the same reward" in str(collapse)


@pytest.mark.parametrize("alive", [1, 2, 4])
def test_a_policy_that_dies_in_its_first_updates_is_a_collapse(alive):
    """There is no window of healthy updates to compare with."""
    rows = course(*healthy(alive), (60, {"reward": 0.0, "reward_group_std": 0.0}))
    seen = [n for n in range(len(rows) + 1) if find_collapse(rows[:n])]
    assert seen == list(range(15, len(rows) + 1))
    assert find_collapse(rows).good == alive
    idle = find_idle(rows, 20)
    assert (idle.learnt, idle.fallen) == (False, True)
    assert "the policy is lost" in str(idle)
    solved = course(*healthy(alive), (60, {"reward": 1.0, "reward_group_std": 0.0}))
    assert not any(find_collapse(solved[:n]) for n in range(len(solved)))
    assert find_idle(solved, 20).learnt


@pytest.mark.parametrize("last", [1.0, 0.97, 0.9])
def test_a_policy_that_has_learnt_all_there_is_did_not_collapse(last):
    """Equal rewards at the height that was reached, or little below its luckiest window."""
    rng = np.random.default_rng(0)
    rise = [
        (1, {**ALIVE, "reward": min(1.0, 0.5 + 0.01 * i + 0.04 * rng.standard_normal())})
        for i in range(45)
    ]
    rows = course(*rise, (60, {"reward": last, "reward_group_std": 0.0}))
    seen = [n for n in range(len(rows) + 1) if find_collapse(rows[:n])]
    assert not seen or last == 0.9
    idle = find_idle(rows, 20)
    assert "training ends here" in str(idle) if idle.learnt else last == 0.9


def test_a_constant_reward_is_no_reward():
    rows = course((30, {"reward": 0.25, "reward_group_std": 0.0}))
    assert find_idle(rows[:19], 20) is None
    idle = find_idle(rows, 20)
    assert (idle.updates, idle.learnt) == (20, False)
    assert "rollout.group_size" in str(idle)
    assert "training.max_idle_updates=0 goes on" in str(idle)
    assert find_idle(rows, 0) is None
    assert find_idle(course((30, ALIVE)), 20) is None
    assert find_idle(course((29, {"reward": 0.25}), (1, ALIVE)), 20) is None
    assert not find_idle(course(*healthy(40), (20, {"reward": 0.0})), 20).learnt


def test_images_that_become_noise_are_warned_of():
    rows = course(
        (20, {"reward": 0.5, "diversity": 0.39}), (10, {"reward": 0.0, "diversity": 0.88})
    )
    assert "perhaps into noise" in find_warnings(rows)["diversity"]
    assert find_warnings(rows[:20]) == {}


def row(update, **values):
    return {"update": update, "diversity": 1.0, **values}


def test_images_that_become_alike_are_warned_of():
    rows = [row(i + 1, diversity=1.0 - 0.03 * i) for i in range(30)]
    first = next(n for n in range(31) if find_warnings(rows[:n]))
    assert np.median([r["diversity"] for r in rows[first - 5 : first]]) < 0.5 * 0.94
    assert "become alike" in find_warnings(rows)["diversity"]
    steady = [row(i, diversity=0.8 + 0.2 * (i % 2)) for i in range(30)]
    assert find_warnings(steady) == {}
    assert find_warnings([]) == {}


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
    spent = run.progress.seconds
    run.roll_back(3)
    assert run.progress.seconds == spent, "time that was spent stays spent"
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
