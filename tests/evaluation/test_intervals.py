"""Intervals: known formulas, coverage on simulated images, evidence by prompt, differences within noise."""

import numpy as np
import pytest
from scipy import stats

from diffalign.data.prompts import Prompt
from diffalign.evaluation import intervals
from diffalign.evaluation.preference import win_rate
from diffalign.evaluation.score import summarize_scores
from diffalign.types import RewardOutput


def names(groups, each=1, prefix=""):
    return [f"{prefix}{i}" for i in range(groups) for _ in range(each)]


def test_a_share_of_independent_images_has_wilsons_interval():
    """As scipy computes it, for every number of successes."""
    for right in range(11):
        found = intervals.mean(np.array([1.0] * right + [0.0] * (10 - right)), names(10))
        expected = stats.binomtest(right, 10).proportion_ci(method="wilson")
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert (found.value, found.n, found.prompts) == (right / 10, 10, 10)


def test_a_mean_of_independent_images_has_students_interval():
    x = np.random.default_rng(0).normal(3, 2, 12)
    found = intervals.mean(x, names(12))
    low, high = stats.t.interval(0.95, 11, x.mean(), stats.sem(x))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_images_that_are_copies_add_no_evidence():
    x = np.random.default_rng(1).normal(0, 1, 9)
    once, often = intervals.mean(x, names(9)), intervals.mean(x.repeat(7), names(9, 7))
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    assert (often.n, often.prompts) == (63, 9)
    # of correct and wrong images as well: as wide as for one image per prompt, or wider
    right = np.array([1.0] * 20 + [0.0] * 30)
    once, often = (intervals.mean(right.repeat(k), names(50, k)) for k in (1, 40))
    assert often.high - often.low >= 0.99 * (once.high - once.low)


def test_of_one_prompt_the_images_are_the_evidence():
    x = np.random.default_rng(4).normal(0, 1, 9)
    one, many = intervals.mean(x, ["a"] * 9), intervals.mean(x, names(9))
    assert (one.low, one.high) == (many.low, many.high)
    assert (one.n, one.prompts, one.units) == (9, 1, 9)
    better = intervals.difference(x + 1 + 0.1 * x, x, ["a"] * 9)
    assert not better.within_noise
    assert win_rate(x, x - np.abs(x) + 0.1, ["a"] * 9).low < 1
    # two or three prompts are no evidence for prompts like them, however many images they have
    assert intervals.difference(np.ones(300), np.zeros(300), names(3, 100)).within_noise


def test_of_one_image_there_is_no_interval():
    found = intervals.mean(np.array([0.2]), ["a"])
    assert (found.low, found.high) == (None, None)
    assert intervals.difference(np.array([0.2]), np.array([0.1]), ["a"]).within_noise
    assert intervals.mean(np.array([np.nan]), ["a"]) is None
    assert intervals.difference(np.array([np.nan]), np.array([1.0]), ["a"]) is None


def test_a_paired_difference_is_students_of_the_pairs():
    rng = np.random.default_rng(2)
    before = rng.normal(0, 5, 30)
    after = before + rng.normal(0.5, 0.3, 30)
    found = intervals.difference(after, before, names(30))
    low, high = stats.t.interval(0.95, 29, (after - before).mean(), stats.sem(after - before))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert not found.within_noise
    # far from noise only because the pairs are the same: two separate means overlap
    assert intervals.mean(before, names(30)).high > intervals.mean(after, names(30)).low


@pytest.mark.parametrize("pairs", [1, 2, 3, 5])
def test_a_few_pairs_that_agree_are_within_noise(pairs):
    found = intervals.difference(np.ones(pairs), np.zeros(pairs), names(pairs))
    assert found.value == 1
    assert found.within_noise


def test_no_change_is_within_noise_and_many_equal_changes_are_not():
    same = np.random.default_rng(3).random(40)
    assert intervals.difference(same, same, names(40)).within_noise
    found = intervals.difference(np.ones(40), np.zeros(40), names(40))
    assert not found.within_noise
    assert found.low < 1 <= found.high


def simulated(rng, groups, each, spread):
    """Means of prompts, and images around them."""
    centre = rng.normal(0, spread, (groups, 1))
    return (centre + rng.normal(0, 1, (groups, each))).ravel()


@pytest.mark.parametrize(("groups", "each"), [(10, 1), (24, 4)])
@pytest.mark.parametrize("kind", ["mean", "share", "difference", "share difference"])
def test_intervals_hold_the_truth_as_often_as_they_say(kind, groups, each):
    rng = np.random.default_rng([groups, each])
    texts = names(groups, each)
    held = 0
    for _ in range(400):
        x = simulated(rng, groups, each, spread=1.0 if each > 1 else 0.0)
        shift = simulated(rng, groups, each, spread=0.3) + 0.5
        if kind == "mean":
            found, truth = intervals.mean(x, texts), 0.0
        elif kind == "share":
            found, truth = intervals.mean((x > 0).astype(float), texts), 0.5
        elif kind == "difference":
            found, truth = intervals.difference(x + shift, x, texts), 0.5
        else:
            # a third of the images turn right, a tenth turn wrong
            u = rng.random(groups * each)
            after, before = (u < 1 / 3), (u >= 1 / 3) & (u < 1 / 3 + 0.1)
            found = intervals.difference(after.astype(float), before.astype(float), texts)
            truth = 1 / 3 - 0.1
        held += found.low <= truth <= found.high
    assert 0.92 <= held / 400 <= 0.995


def test_the_mean_of_tasks_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(7)
    rates = np.array([0.95, 0.5, 0.2])
    tasks = [t for t in "abc" for _ in range(12)]
    texts = [t + str(i) for t in "abc" for i in range(12)]
    held, moved = 0, 0
    for _ in range(400):
        u = rng.random((3, 12))
        after, before = u < (rates + 0.04)[:, None], u < rates[:, None]
        found = intervals.task_mean(before.ravel().astype(float), texts, tasks)["overall"]
        held += found.low <= rates.mean() <= found.high
        change = intervals.task_difference(
            after.ravel().astype(float), before.ravel().astype(float), texts, tasks
        )["overall"]
        moved += change.low <= 0.04 <= change.high
    assert 0.92 <= held / 400 <= 0.995
    assert moved / 400 >= 0.93


def test_the_mean_of_tasks_is_genevals():
    tasks, texts = ["a"] * 4 + ["b"], names(5)
    found = intervals.task_mean(np.array([1.0, 1, 0, 0, 1]), texts, tasks)
    assert found["overall"].value == pytest.approx((0.5 + 1) / 2)
    assert (found["overall"].n, found["overall"].prompts) == (5, 5)
    assert found["overall"].low < 0.75 < found["overall"].high
    # one task alone is that task
    single = intervals.task_mean(np.array([1.0, 0, 0]), names(3), ["a"] * 3)
    assert single["overall"].low == pytest.approx(single["a"].low)
    one = intervals.task_difference(np.ones(9), np.zeros(9), names(9), ["a"] * 9)
    assert vars(one["overall"]) == pytest.approx(vars(one["a"]))


def test_a_side_that_wins_every_pair_is_not_certain():
    """A bootstrap of equal values has no width; Wilson's interval has."""
    found = win_rate(np.ones(8), np.zeros(8), names(8))
    expected = stats.binomtest(8, 8).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert not found.within_noise
    assert win_rate(np.ones(3), np.zeros(3), names(3)).within_noise
    ties = win_rate(np.ones(8), np.ones(8), names(8))
    assert (ties.rate, ties.ties, ties.within_noise) == (0.5, 8, True)


def evaluation(correct):
    prompts = [Prompt(f"{i}", {"tag": "ab"[i % 2]}) for i in range(len(correct))]
    values = np.asarray(correct, np.float32)
    return summarize_scores(prompts, None, RewardOutput(values, {"verifier/correct": values}))


def test_an_evaluation_knows_its_intervals_and_differences():
    before, after = evaluation([0, 0, 0, 1] * 8), evaluation([1, 0, 1, 1] * 8)
    told = after.to_dict()
    overall = told["intervals"]["tasks"]["overall"]
    assert overall["value"] == pytest.approx(told["tasks"]["overall"])
    assert overall["low"] < overall["value"] < overall["high"]
    assert (overall["n"], overall["prompts"]) == (32, 32)
    assert told["intervals"]["means"]["reward"]["n"] == 32
    found = after.differences(before)
    assert found["tasks"]["a"].value == pytest.approx(1.0)
    assert not found["tasks"]["a"].within_noise
    assert found["tasks"]["b"].value == 0
    assert found["tasks"]["b"].within_noise
    assert found["means"]["reward"].to_dict()["within_noise"] is False
    assert after.differences(evaluation([0] * 30)) == {"means": {}, "tasks": {}}
