"""Rewards in a thread of their own: the same values in the same order, and a hang is not for ever."""

import math
import threading

import numpy as np
import pytest
import tiny_runs
import torch

from diffalign.evaluation.scoring import BackgroundScorer, RewardTimeout
from diffalign.training.trainer import TrainingError
from diffalign.types import RewardOutput


def mean(images, prompts, metadata):
    return RewardOutput(
        images.float().mean((1, 2, 3)).numpy(), {"n": np.full(len(prompts), len(prompts))}
    )


def pictures(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)


def test_values_come_in_the_order_of_submission():
    images = pictures(7)
    scorer = BackgroundScorer(mean)
    for _ in range(2):  # and again after a collection
        for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
            scorer.submit(images[part], ["a"] * len(images[part]), [{}] * len(images[part]))
        found = scorer.collect()
        np.testing.assert_array_equal(found.values, mean(images, ["a"] * 7, []).values)
        np.testing.assert_array_equal(found.details["n"], [3, 3, 3, 1, 3, 3, 3])


def test_scoring_runs_while_the_caller_goes_on():
    go = threading.Event()

    def waits(images, prompts, metadata):
        assert go.wait(10)
        return mean(images, prompts, metadata)

    scorer = BackgroundScorer(waits)
    scorer.submit(pictures(2), ["a"] * 2, [{}] * 2)  # returns although nothing is scored yet
    go.set()
    assert len(scorer.collect().values) == 2


def test_an_error_of_a_reward_is_the_callers():
    def broken(images, prompts, metadata):
        raise ValueError("no such thing")

    scorer = BackgroundScorer(broken)
    scorer.submit(pictures(1), ["a"], [{}])
    with pytest.raises(ValueError, match="no such thing"):
        scorer.collect()


def test_no_gradient_is_recorded():
    def score(images, prompts, metadata):
        assert not torch.is_grad_enabled()
        return mean(images, prompts, metadata)

    scorer = BackgroundScorer(score)
    scorer.submit(pictures(1), ["a"], [{}])
    assert len(scorer.collect().values) == 1


def test_a_hanging_reward_ends_in_an_error_and_a_new_thread():
    release = threading.Event()
    hang = [True]

    def sometimes(images, prompts, metadata):
        if hang[0]:
            release.wait(30)
        return mean(images, prompts, metadata)

    scorer = BackgroundScorer(sometimes, timeout=0.2)
    scorer.submit(pictures(1), ["a"], [{}])
    with pytest.raises(RewardTimeout, match=r"0\.2 seconds"):
        scorer.collect()
    hang[0] = False
    scorer._timeout = 30
    scorer.submit(pictures(2), ["a", "b"], [{}, {}])
    assert len(scorer.collect().values) == 2
    release.set()


def test_a_timeout_of_the_reward_itself_is_its_own_error():
    def refused(images, prompts, metadata):
        raise TimeoutError("the server")

    for timeout in (None, 30.0):
        scorer = BackgroundScorer(refused, timeout=timeout)
        with pytest.raises(TimeoutError, match="the server"):
            scorer(pictures(1), ["a"], [{}])


def test_without_overlap_a_part_is_done_when_it_is_submitted():
    done = []
    scorer = BackgroundScorer(
        lambda *part: done.append(1) or mean(*part), timeout=30, overlap=False
    )
    for count in (1, 2):
        scorer.submit(pictures(1), ["a"], [{}])
        assert len(done) == count
    assert len(scorer.collect().values) == 2


def test_the_thread_ends_with_the_collection():
    before = set(threading.enumerate())
    scorer = BackgroundScorer(mean)
    for _ in range(3):
        scorer(pictures(1), ["a"], [{}])
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize(("overlap", "waited"), [(True, False), (False, True), (None, True)])
def test_overlapped_rewards_do_not_hold_up_the_next_images(tmp_path, overlap, waited):
    seen = []

    def slow(images, prompts, metadata):
        if not seen:
            seen.append("first")
            drawn.wait(0.3 if waited else 30)
            seen.append("the next images came" if drawn.is_set() else "waited for")
        return tiny_runs.redness(images, prompts, metadata)

    drawn = threading.Event()
    settings = {"micro_batch_size": 2, "overlap_rewards": overlap}
    run = tiny_runs.trainer(tmp_path, slow, rollout=settings)
    submit, parts = run.rollouts.scorer.submit, []

    def note(*part):
        parts.append(part)
        if len(parts) == 2:
            drawn.set()
        submit(*part)

    run.rollouts.scorer.submit = note
    row = run.train_update()
    assert seen[1] == ("waited for" if waited else "the next images came")
    assert math.isfinite(row["reward"])


def test_a_run_with_a_hanging_reward_stops_with_everything_saved(tmp_path):
    calls, end = [], threading.Event()

    def third_hangs(images, prompts, metadata):
        calls.append(len(prompts))
        if len(calls) > 2:
            end.wait(60)
        return tiny_runs.redness(images, prompts, metadata)

    run = tiny_runs.trainer(tmp_path, third_hangs, rollout={"reward_timeout": 1.0})
    run.train_update()
    run.train_update()
    with pytest.raises(TrainingError, match="reward_timeout.*up to update 2 is saved"):
        run.train_update()
    end.set()
    again = tiny_runs.trainer(tmp_path)
    assert again.resume()
    assert again.progress.update == 2


def test_details_that_a_part_lacks_are_nan():
    parts = [
        RewardOutput(np.ones(2, np.float32), {"a": np.ones(2)}),
        RewardOutput(np.zeros(1, np.float32), {"b": np.zeros(1)}),
    ]
    whole = RewardOutput.cat(parts)
    np.testing.assert_array_equal(whole.values, [1, 1, 0])
    np.testing.assert_array_equal(whole.details["a"], [1, 1, np.nan])
    np.testing.assert_array_equal(whole.details["b"], [np.nan, np.nan, 0])
