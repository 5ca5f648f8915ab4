"""A run's budget of time: what is planned, on clocks of any speed, and that a resumed run follows the plan."""

import itertools
import json
from functools import partial

import pytest
from whole_runs import train

from diffalign.config import OptimizerConfig
from diffalign.methods.online.trainer import OnlineTrainer
from diffalign.training import pace
from diffalign.training.budget import BUDGET, MEASURED, RESERVE, WARM_UP, Budget, TimePlan
from diffalign.training.learning_rate import lr_factor


class Clock:
    """A clock that moves when it is told to."""

    now = 100.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


def whole_run(folder, clock, *, update, image, start=20.0, compilation=30.0, report=5.0, **budget):
    """Live through a run of 145 updates at most and 768 images an evaluation; return the budget."""
    budget = Budget(folder, **{"seconds": 600.0, "most": 145, "clock": clock, **budget})
    clock.spend(start)
    budget.plan_images(768, seconds_per_image=image)
    evaluation = image * 768 * budget.plan.images
    clock.spend(evaluation)
    budget.measure_evaluation(evaluation)
    done = 0
    while done < (budget.plan.updates or budget.most):
        clock.spend(update + (compilation if done == 0 else 0))
        done += 1
        budget.finish_update(done)
    clock.spend(evaluation + report)
    return budget, done


@pytest.mark.parametrize(
    ("update", "image"), [(1.0, 0.02), (3.2, 0.05), (6.0, 0.2), (14.0, 1.0), (40.0, 0.5)]
)
def test_ten_minutes_are_ten_minutes_on_machines_of_any_speed(tmp_path, update, image):
    budget, done = whole_run(tmp_path, Clock(), update=update, image=image)
    assert budget.spent <= 600
    if done < 145:
        assert budget.spent > 600 * (1 - RESERVE) - update - 6, (
            "what is left is less than an update"
        )
    else:
        assert update == 1.0, "a fast machine makes all updates, no more"


def test_slow_evaluations_are_smaller_and_fast_ones_are_whole(tmp_path):
    budget = Budget(tmp_path, 600.0, 10, Clock())
    budget.plan_images(768, seconds_per_image=0.01)
    assert budget.plan.images == 1.0
    budget.plan_images(768, seconds_per_image=0.5)
    assert 2 * 768 * 0.5 * budget.plan.images == pytest.approx(0.3 * 600)


def test_the_first_updates_are_not_measured(tmp_path):
    """They compile, and a single slow one is no measure."""
    clock = Clock()
    budget = Budget(tmp_path, 1000.0, 999, clock)
    planned = []
    for number, seconds in enumerate([200.0, 90.0, 10.0, 10.0, 50.0, 10.0], 1):
        clock.spend(seconds)
        planned.append(budget.finish_update(number))
    assert planned == [False] * (WARM_UP + MEASURED - 1) + [True]
    assert budget.plan.planned_after == 6
    assert budget.plan.updates == 6 + int((960 - 370) / 10)


def test_a_resumed_run_follows_the_plan_on_any_clock(tmp_path):
    clock = Clock()
    budget, _ = whole_run(tmp_path, clock, update=5.0, image=0.05)
    budget.save()
    clock.spend(1e6)  # between two sittings no time is spent
    again = Budget(tmp_path, 600.0, 145, clock)
    again.resume()
    assert again.plan == budget.plan
    assert again.spent == pytest.approx(budget.plan.seconds)
    for number in range(7, 20):
        clock.spend(77.0)
        assert not again.finish_update(number)
    assert again.plan.updates == budget.plan.updates
    assert json.loads((tmp_path / BUDGET).read_text())["updates"] == budget.plan.updates


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("per_update", [1, 2])
def test_the_learning_rate_ends_where_training_ends(name, per_update):
    plan = TimePlan(updates=40, planned_after=6)
    config = OptimizerConfig(lr_scheduler=name)

    def rate(step):
        virtual = plan.scheduled(step, per_update=per_update, most=145)
        return lr_factor(virtual, config, total=145 * per_update)

    rates = [rate(s) for s in range(40 * per_update + 1)]
    before = [lr_factor(s, config, total=145 * per_update) for s in range(6 * per_update + 1)]
    assert rates[: 6 * per_update + 1] == pytest.approx(before), "what was done is as it was"
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert all(a >= b for a, b in itertools.pairwise(rates))
    unplanned = TimePlan()
    assert unplanned.scheduled(17, per_update=1, most=145) == 17


def test_a_run_with_a_budget_of_time_plans_its_updates(
    base, prompts, tmp_path, capsys, monkeypatch
):
    """A minute is 60 ticks of a clock that advances five with each update."""
    ticks, make = [0.0], OnlineTrainer.train_update

    def update(self):
        ticks[0] += 5
        return make(self)

    monkeypatch.setattr(OnlineTrainer, "train_update", update)
    monkeypatch.setattr(pace, "Budget", partial(Budget, clock=lambda: ticks[0]))
    flags = ["--training.num_updates=40", "--training.total_minutes=1", "--lr_scheduler=linear"]
    folder = tmp_path / "run"
    assert train(base, prompts, folder, *flags) == 0
    plan = json.loads((folder / "budget.json").read_text())
    assert plan["planned_after"] == WARM_UP + MEASURED
    assert plan["updates"] == 6 + int((60 * (1 - RESERVE) - 30) / 5)
    assert "11 of 40 updates are planned" in "".join(capsys.readouterr())
    assert json.loads((folder / "summary.json").read_text())["updates"] == 11
