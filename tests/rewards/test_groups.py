"""Rewards that compare the images of a prompt: closed forms, whole groups, and what they cannot score."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from tiny_runs import settings, trainer
from whole_runs import train

from diffalign.config import ConfigError
from diffalign.core.errors import UsageError
from diffalign.methods.online import trainer as online
from diffalign.rewards import registry
from diffalign.rewards.base import RewardCard, RewardError
from diffalign.rewards.composition import CompositeReward
from diffalign.rewards.groups import GroupReward, PairwiseReward, RankReward, mean_wins, win_table
from diffalign.training.inputs import held_out_rewards, score_with


def grey(*values):
    """Return images of one brightness each."""
    levels = torch.tensor(values, dtype=torch.uint8)
    return levels.view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()


def scored(reward, images, prompts):
    return reward.score(images, prompts, [{}] * len(prompts))


def test_ranks_are_shares_of_the_others_that_are_beaten():
    assert mean_wins(win_table(np.array([3.0, 1.0, 2.0]))).tolist() == [1, 0, 0.5]
    assert mean_wins(win_table(np.array([1.0, 1.0, 1.0]))).tolist() == [0.5] * 3
    ranks = mean_wins(win_table(np.array([2.0, np.nan, 1.0, 2.0])))
    np.testing.assert_allclose(ranks, [0.75, np.nan, 0, 0.75])
    # the mean of a group is always 1/2, and no scale changes a rank
    values = np.random.default_rng(0).normal(size=7)
    ranks = mean_wins(win_table(values))
    assert ranks.mean() == pytest.approx(0.5)
    np.testing.assert_array_equal(ranks, mean_wins(win_table(np.exp(3 * values))))


def test_a_rank_compares_the_images_of_a_prompt_alone():
    reward = RankReward(tiny.Brightness())
    images, prompts = grey(10, 200, 20, 100, 30, 7), ["a", "b", "a", "b", "a", "c"]
    output = scored(reward, images, prompts)
    np.testing.assert_allclose(output.values, [0, 1, 0.5, 0, 1, np.nan])
    np.testing.assert_allclose(
        output.details["score"], [v / 255 for v in (10, 200, 20, 100, 30, 7)], rtol=1e-5
    )
    assert reward.card.name == "rank:brightness"
    np.testing.assert_allclose(reward.rank(images[:2], "a", {}).values, [0, 1])


class Brighter(PairwiseReward):
    """The brighter image of two is preferred, by the logistic function of the difference."""

    card = RewardCard(name="brighter", description="brighter of two")
    asked = 0

    def prefer(self, first, second, prompts, metadata):
        self.asked += len(prompts)
        gap = (first.float() - second.float()).mean((1, 2, 3)) / 10
        return gap.sigmoid()


class First(Brighter):
    """A judge that favours the first place."""

    def prefer(self, first, second, prompts, metadata):
        return super().prefer(first, second, prompts, metadata) * 0.5 + 0.5


def test_a_pairwise_reward_is_the_mean_preference_over_the_others():
    images, prompts = grey(10, 20, 40), ["a"] * 3
    sigma = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    wanted = [
        (sigma(-1) + sigma(-3)) / 2,
        (sigma(1) + sigma(-2)) / 2,
        (sigma(3) + sigma(2)) / 2,
    ]
    reward = Brighter()
    np.testing.assert_allclose(scored(reward, images, prompts).values, wanted, rtol=1e-5)
    assert reward.asked == 3
    reward.pairs_at_once = 2
    np.testing.assert_allclose(scored(reward, images, prompts).values, wanted, rtol=1e-5)
    # asked in both orders, the place does not count
    biased = scored(First(), images, prompts).values
    assert biased[0] > wanted[0] + 0.1
    fair = First()
    fair.both_orders = True
    values = scored(fair, images, prompts).values
    assert np.argsort(values).tolist() == [0, 1, 2]
    assert values.mean() == pytest.approx(0.5)


def test_a_preference_outside_its_range_is_an_error_with_advice():
    reward = Brighter()
    reward.prefer = lambda first, second, prompts, metadata: [3.0] * len(prompts)
    with pytest.raises(RewardError, match=r"must lie in 0..1, got 3 to 3. Return the probability"):
        scored(reward, grey(1, 2), ["a", "a"])


def test_a_group_that_fails_leaves_the_others_their_scores():
    class Sometimes(GroupReward):
        card = RewardCard(name="sometimes", description="")

        def rank(self, images, prompt, metadata):
            if prompt == "b":
                raise ValueError("no")
            return np.arange(len(images))

    reward = CompositeReward({"sometimes": Sometimes()}, {"sometimes": 1.0})
    output = scored(reward, grey(1, 2, 3, 4, 5), ["a", "b", "a", "b", "a"])
    np.testing.assert_allclose(output.values, [0, np.nan, 1, np.nan, 2])
    assert reward.failures == {"sometimes": 2}
    assert "ValueError: no" in reward.last_error


def test_names_with_the_prefix_are_looked_up():
    reward = registry.create("rank:flatness")
    assert isinstance(reward, RankReward)
    assert reward.card.name == "rank:flatness"
    with pytest.raises(registry.UnknownReward, match="did you mean 'flatness'"):
        registry.check_name("rank:flatnes")


def test_only_rollouts_compare_images():
    with pytest.raises(RewardError, match="compares the images of a prompt"):
        CompositeReward.from_config({"rank:flatness": 1.0}, setting="evaluation.rewards")
    reward = CompositeReward.from_config({"rank:flatness": 2.0, "jpeg": 1.0}, by_group=True)
    assert reward.by_group
    single = reward.pointwise()
    assert (single.weights, single.by_group) == ({"flatness": 2.0, "jpeg": 1.0}, False)


def test_held_out_prompts_are_scored_by_what_scores_single_images(monkeypatch, tmp_path):
    monkeypatch.setitem(registry.BUILT_IN, "brighter", "test_groups:Brighter")
    config = settings(tmp_path)
    config.rewards = {"rank:jpeg": 1.0}
    reward, watched = held_out_rewards(config)
    output = score_with(reward, watched)(grey(1, 2), ["a", "b"], [{}, {}])
    assert "jpeg" in output.details
    assert np.isfinite(output.values).all()
    config.rewards = {"brighter": 1.0}
    with pytest.raises(RewardError, match="evaluation.rewards"):
        held_out_rewards(config)
    config.evaluation.rewards = ["jpeg"]
    output = score_with(*held_out_rewards(config))(grey(1, 2), ["a", "b"], [{}, {}])
    np.testing.assert_array_equal(output.values, output.details["jpeg"])
    with pytest.raises(ConfigError, match="is trained on"):
        settings(tmp_path, rewards={"rank:flatness": 1.0}, evaluation={"rewards": ["flatness"]})


@pytest.mark.parametrize("size", [12, 5])
def test_groups_are_whole_for_any_micro_batch(tmp_path, size):
    """Each group of four is scored at once, though five images are drawn at a time."""
    seen = []

    def score(images, prompts, metadata):
        seen.append(list(prompts))
        return RankReward(tiny.Redness()).score(images, prompts, metadata)

    run = trainer(tmp_path, score, by_group=True, rollout={"micro_batch_size": size})
    row = run.train_update()
    assert [len(part) for part in seen] == [4, 4, 4]
    assert all(len(set(part)) == 1 for part in seen)
    assert row["reward"] == pytest.approx(0.5)
    assert row["failed_rewards"] == 0
    assert row["kept"] == 12


def test_a_process_must_have_whole_groups(tmp_path, monkeypatch):
    several = SimpleNamespace(num_processes=2, is_main_process=True, device=torch.device("cpu"))
    monkeypatch.setattr("tiny_runs.Accelerator", lambda **_: several)
    with pytest.raises(UsageError, match="Choose a multiple of 2"):
        trainer(tmp_path, by_group=True, rollout={"prompts_per_update": 3})
    assert online.RANK == "rank:"


def test_a_run_trains_on_ranks(base, prompts, tmp_path, capsys):
    folder = tmp_path / "run"
    more = ("--rewards={rank:jpeg: 1}", "--training.num_updates=1")
    assert train(base, prompts, folder, *more) == 0
    assert "jpeg" in capsys.readouterr().out
