"""Collapse: found in a recorded one, not in healthy runs, and undone on request."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import trainer

from diffalign.training import checkpoint
from diffalign.training.health import find_collapse
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


def test_rolling_back_restores_the_good_policy_and_halves_the_rate(tmp_path):
    run = trainer(tmp_path, training={"keep_checkpoints": 9})
    rates = []
    for _ in range(4):
        run.folder.append_log(run.train_update())
        run.save()
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates == [0.01] * 4
    run.roll_back(3)
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
