"""Reward hacking: the detector on planted courses, and what a run does when it sees one."""

import json
import math

import numpy as np
import pytest
from marks import slow_except
from tiny_runs import settings, trainer, weights
from whole_runs import train

from diffalign.config import ConfigError
from diffalign.evaluation.score import Evaluation
from diffalign.methods.online.hacking import (
    ALIKE,
    FALL,
    NORM,
    Bounds,
    Hacking,
    alarms,
    find_hacking,
    find_unscored,
)
from diffalign.methods.online.trainer import KL_RAISE, MOST_KL_RAISES, MOST_ROLLBACKS
from diffalign.rewards import registry
from diffalign.training.best import BestKeeper
from diffalign.training.run_folder import RunFolder

HALF = 0.03
"""Half of the 95 % interval of an evaluation's mean, in these courses."""


def evaluation(**means):
    bounds = {n: {"low": m - HALF, "high": m + HALF} for n, m in means.items()}
    return {"means": means, "intervals": {"means": bounds}}


BEFORE = evaluation(reward=0.4, other=0.5)


def course(*looks, every=5, diversity=None, norm=None):
    """Return a log whose evaluations after every few updates have the means (reward, other)."""
    rows = []
    for i, (reward, other) in enumerate(looks):
        for k in range(every):
            row = {"update": i * every + k + 1, "reward": reward, "diversity": 0.7}
            if diversity is not None:
                row["diversity"] = diversity[i]
            if norm is not None:
                row["norm_ratio"] = norm[i]
            rows.append(row)
        rows[-1]["evaluation"] = evaluation(reward=reward, other=other)
    return rows


def verdicts(rows, before=BEFORE):
    """Return the update and the verdict of every row at which an alarm is raised."""
    found = [find_hacking(rows[: n + 1], before, ["other"]) for n in range(len(rows))]
    return [v for v in found if v is not None]


def test_an_alarm_is_raised_after_some_looks_and_ends_at_a_lower_level():
    bounds = Bounds(raised=1.0, cleared=0.5, looks=2, pause=3)
    assert alarms([0, 2, 0, 2, 2], bounds) == [False] * 4 + [True]
    # between the bounds nothing changes: one alarm, not many
    assert alarms([2, 2, 0.9, 1.1, 0.9], bounds).count(True) == 1
    # an alarm that ends can be raised again, and needs its looks again
    assert alarms([2, 2, 0.4, 2, 2], bounds) == [False, True, False, False, True]
    # one that does not end is raised again after a pause
    assert alarms([2] * 8, bounds) == [False, True, False, False, True, False, False, True]
    # a look without a level changes nothing
    assert alarms([2, math.nan, 2], bounds) == [False, False, True]
    assert alarms([], bounds) == []
    assert all(b.cleared < b.raised for b in (FALL, ALIKE, NORM))


def planted(kind):
    """Return a course of 12 evaluations in which a planted reward is gamed from the third on."""
    rng = np.random.default_rng(0)
    steps = np.arange(12)
    gamed = np.clip(steps - 2, 0, None)
    noise = 0.01 * rng.standard_normal(12)
    other = 0.5 + 0.04 * np.minimum(steps, 2) + noise
    spread, norm = np.full(12, 0.7), np.full(12, 1.05)
    if kind == "flat":  # images lose their content, and resemble each other
        other, spread = other - 0.05 * gamed, 0.7 * 0.8**gamed
    elif kind == "watermark":  # all images get the same mark, slowly
        other = other - 0.02 * gamed
    elif kind == "spam":  # text or objects everywhere: predictions grow
        other, norm = other - 0.03 * gamed, 1.05 + 0.06 * gamed
    reward = 0.4 + 0.05 * (steps + 1)
    looks = list(zip(reward.tolist(), other.tolist(), strict=True))
    return course(*looks, diversity=spread.tolist(), norm=norm.tolist())


@pytest.mark.parametrize("kind", ["flat", "watermark", "spam"])
def test_planted_hacks_are_seen_and_their_good_update_is_before_them(kind):
    first = verdicts(planted(kind))[0]
    assert 0 < first.good <= 20 < first.update <= 45
    assert "looks gamed since update" in str(first)
    assert "other, which is only looked at, fell from" in str(first)


def test_an_honest_course_has_no_verdict():
    assert verdicts(planted("none")) == []
    # noise of half an interval around a plateau
    rng = np.random.default_rng(1)
    looks = [(0.6, 0.6 + HALF / 2 * rng.standard_normal()) for _ in range(40)]
    assert verdicts(course(*looks)) == []


def test_images_that_become_alike_are_a_sign_of_their_own():
    spread = [0.7, 0.7, 0.6, 0.3, 0.3, 0.3]
    looks = [(0.4 + 0.02 * i, 0.5) for i in range(6)]
    (found,) = verdicts(course(*looks, diversity=spread))
    assert (found.update, found.good) == (25, 15)
    assert "fell from 0.700 to 0.300" in str(found)
    # with a reward that has not risen the policy is worse, but nothing is gamed
    fallen = [(0.4 - 0.02 * i, 0.5) for i in range(6)]
    assert verdicts(course(*fallen, diversity=spread)) == []


def test_predictions_that_grow_are_a_sign_of_their_own():
    looks = [(0.5, 0.5)] * 6
    (found,) = verdicts(course(*looks, norm=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5]))
    assert (found.update, found.good) == (25, 10)
    assert "1.40 times as large" in str(found)
    assert verdicts(course(*looks, norm=[1.1, 1.2, 1.24, 1.2, 1.24, 1.2])) == []


def test_a_fall_of_both_rewards_is_no_hacking():
    assert verdicts(course((0.6, 0.6), (0.5, 0.4), (0.45, 0.3), (0.42, 0.2))) == []
    assert verdicts(course((0.3, 0.4), (0.3, 0.3), (0.3, 0.2))) == []


def test_without_intervals_a_fall_is_one_below_the_base():
    def plain(*looks):
        rows = course(*looks)
        for row in rows:
            row.get("evaluation", {}).pop("intervals", None)
        return verdicts(rows, {"means": BEFORE["means"]})

    (found,) = plain((0.5, 0.45), (0.6, 0.44))
    assert "other, which is only looked at, fell from 0.500 to 0.440" in str(found)
    assert found.good == 0
    assert "since the base model" in str(found)
    assert plain((0.5, 0.45)) == []  # once may be chance
    assert plain((0.5, 0.7), (0.5, 0.6), (0.5, 0.55)) == []
    assert plain((0.4, 0.4), (0.4, 0.3)) == []  # the trained one did not rise


def test_a_held_out_reward_without_scores_is_no_look_and_is_told():
    rows = course((0.5, 0.4), (0.6, 0.3), (0.7, 0.2))
    del rows[-1]["evaluation"]["means"]["other"]
    assert find_hacking(rows, BEFORE, ["other"]) is None
    assert "could score no image" in find_unscored(rows, BEFORE, ["other"])["other unscored"]
    assert find_unscored(rows[:-1], BEFORE, ["other"]) == {}
    assert "other unscored" in find_unscored([], {"means": {"reward": 1.0}}, ["other"])
    assert find_hacking([], BEFORE, ["other"]) is None


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"training": {"on_hacking": "rolback"}}, "did you mean 'rollback'"),
        ({"training": {"on_hacking": "stop"}}, "Name one in evaluation.rewards"),
        (
            {
                "training": {"on_hacking": "stop", "eval_every": 0},
                "evaluation": {"rewards": ["flatness"]},
            },
            "training.eval_every above 0",
        ),
        (
            {
                "training": {"on_hacking": "raise_kl"},
                "evaluation": {"rewards": ["flatness"]},
                "algorithm": {"kl_beta": 0},
            },
            "Set algorithm.kl_beta above 0",
        ),
    ],
)
def test_a_reaction_without_what_it_needs_is_refused(tmp_path, groups, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, **groups)


WATCHED = {"evaluation": {"rewards": ["flatness"]}}


def scored(value):
    """Return an evaluation of two images whose held-out reward has this mean."""
    scores = {"flatness": np.array([value - 0.1, value + 0.1])}
    means = {"flatness": value, "reward": 0.0}
    return Evaluation([], None, np.zeros(2), means, {}, failed=0, scores=scores)


def test_a_raised_distance_counts_more_and_survives_a_restart(tmp_path):
    groups = {**WATCHED, "training": {"on_hacking": "raise_kl"}, "algorithm": {"kl_beta": 0.1}}
    run = trainer(tmp_path, **groups)
    run.train_update()
    before = run.progress.update
    run.answer(Hacking(1, 0, ("planted",)))
    assert (run.progress.kl_raises, run.progress.update) == (1, before)
    other = trainer(tmp_path, **groups)
    assert other.resume()
    assert other.progress.kl_raises == 1
    assert other.train_update()["kl_factor"] == KL_RAISE
    assert other.policy_update.kl_factor == KL_RAISE
    for _ in range(MOST_KL_RAISES + 2):
        other.answer(Hacking(2, 0, ("planted",)))
    assert other.progress.kl_raises == MOST_KL_RAISES
    assert other.facts()["kl_raises"] == MOST_KL_RAISES


def test_a_run_goes_back_to_its_best_policy_or_to_the_base(tmp_path):
    """Retention has deleted the checkpoints before the hack; the best one and the base's are kept."""
    reactions = {"on_hacking": "rollback", "keep_checkpoints": 1}
    run = trainer(tmp_path, **WATCHED, training=reactions)
    keeper = BestKeeper(run, scored(0.5))
    assert [p.name for p in run.folder.best.iterdir() if p.is_dir()] == ["000000"]
    for value in (0.6, 0.4, 0.3):
        run.folder.append_log(run.train_update())
        run.save()
        keeper.consider(scored(value))
    assert keeper.best.update == 1
    run.answer(Hacking(3, 1, ("planted",)))
    assert (run.progress.update, run.progress.rollbacks) == (1, 1)
    assert [p.name for p in run.folder.checkpoints.iterdir()] == ["000001"]
    assert [r["update"] for r in run.folder.read_log()] == [1]
    # a sign that began earlier leads to the best policy, too: nothing older is kept
    run.train_update()
    run.answer(Hacking(2, 0, ("planted",)))
    assert (run.progress.update, run.progress.rollbacks) == (1, 2)
    for _ in range(MOST_ROLLBACKS):
        run.answer(Hacking(2, 0, ("planted",)))
    assert run.progress.rollbacks == MOST_ROLLBACKS
    assert "looks gamed" in run.ended([{"update": 2, "warnings": {"hacking": "planted"}}])

    fresh = trainer(tmp_path / "fresh", **WATCHED, training=reactions)
    BestKeeper(fresh, scored(0.5))
    fresh.train_update()
    fresh.answer(Hacking(1, 0, ("planted",)))
    assert fresh.progress.update == 0
    assert (weights(fresh) == weights(trainer(tmp_path / "new", **WATCHED))).all()


@pytest.mark.parametrize("algorithm", ["awm", "flow_grpo"])
def test_the_factor_scales_the_distance_alone(tmp_path, algorithm):
    """With a factor of 4 the gradient is that of four times the weight."""
    norms = {}
    for name, beta, raises in (("raised", 0.1, 1), ("larger", 0.4, 0), ("plain", 0.1, 0)):
        run = trainer(
            tmp_path / name,
            algorithm={"type": algorithm, "kl_beta": beta},
            optimizer={"learning_rate": 0.001},
        )
        run.train_update()
        run.progress.kl_raises = raises
        norms[name] = run.train_update()["grad_norm"]
    assert norms["raised"] == pytest.approx(norms["larger"], rel=1e-2)
    assert norms["raised"] != norms["plain"]


GAMED = (
    "--rewards={redness: 1}",
    "--evaluation.rewards=blueness",
    "--evaluation.images_per_task=8",
    "--rollout.prompts_per_update=4",
    "--rollout.group_size=8",
    "--algorithm.reference_guidance_scale=null",
    "--algorithm.kl_beta=0.001",
    "--algorithm.weight=uniform",
    "--algorithm.ema_kl_beta=0.1",
    "--learning_rate=0.03",
    "--training.ema_max=0",
    "--training.eval_every=1",
    "--training.sample_every=0",
    "--training.total_minutes=null",
    "--training.keep_checkpoints=1",
)
"""A run that trains on a reward and holds out its opposite: whatever rises is gamed."""


@pytest.fixture
def many(tmp_path):
    """Eight prompts in a file, as many as an interval needs."""
    file = tmp_path / "many.txt"
    names = "cat dog bird cow horse sheep bear zebra"
    file.write_text("".join(f"a {name}\n" for name in names.split()))
    return file


@pytest.fixture
def opposites(monkeypatch):
    monkeypatch.setitem(registry.BUILT_IN, "redness", "tiny:Redness")
    monkeypatch.setitem(registry.BUILT_IN, "blueness", "tiny:Blueness")


@pytest.mark.parametrize(
    "reaction",
    slow_except(["stop"], ["stop", "warn", "raise_kl", "rollback"]),
)
def test_a_planted_hack_is_answered_as_configured(
    base, many, tmp_path, capsys, opposites, reaction
):
    folder = tmp_path / "run"
    more = (f"--training.on_hacking={reaction}", "--training.num_updates=8")
    assert train(base, many, folder, *GAMED, *more) == 0
    printed = capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    log = RunFolder(folder).read_log()
    noted = [r["update"] for r in log if "hacking" in r.get("warnings", {})]
    assert "blueness, which is only looked at, fell" in printed
    assert summary["best"]["by"] == ["blueness"]
    if reaction == "stop":
        assert summary["updates"] == noted[0] < 8
        assert "because the trained reward looks gamed" in printed
    else:
        assert summary["updates"] == 8 or summary["rollbacks"] == MOST_ROLLBACKS
    if reaction == "raise_kl":
        assert summary["kl_raises"] > 0
        assert "the weight of the distance to the reference is now" in printed
        assert any("kl_factor" in r for r in log)
    if reaction == "rollback":
        assert summary["rollbacks"] > 0
        good = summary["best"]["update"]
        assert f"rolled back to update {good}, learning rate times 0.5" in printed
    else:
        assert summary["rollbacks"] == 0
