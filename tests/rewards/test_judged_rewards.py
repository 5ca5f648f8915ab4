"""Rewards that ask a judge: what they send, how replies are read, and that nothing is guessed."""

import math

import numpy as np
import pytest
import torch

from diffalign.judges.base import Judge, JudgeCard, JudgeError, Reply
from diffalign.rewards import registry
from diffalign.rewards.base import RewardError
from diffalign.rewards.judged import fill
from diffalign.rewards.p_yes import PYesReward
from diffalign.rewards.rational_rewards import RationalReward
from diffalign.rewards.unified_reward import UnifiedPairReward, UnifiedReward, read_pair


class Scripted(Judge):
    card = JudgeCard("scripted", "1", ("words", "text"))

    def __init__(self, reply):
        self.reply, self.tasks = reply, []

    def answer(self, tasks):
        self.tasks += tasks
        return [self.reply(q, images) for q, images in tasks]


def images(n):
    values = torch.zeros(n, 3, 8, 8, dtype=torch.uint8)
    values[:, 0] = torch.arange(n, dtype=torch.uint8).view(-1, 1, 1) * 50
    return values


def red(image):
    return image.getpixel((0, 0))[0] / 255


def values_of(reward, n=1, prompt="a {cat}"):
    return reward.score(images(n), [prompt] * n, [{}] * n).values


def test_p_yes_is_the_share_of_yes():
    judge = Scripted(lambda q, i: Reply("Yes", (0.6, 0.2), (0.6, 0.2)))
    reward = PYesReward(judge)
    np.testing.assert_allclose(values_of(reward), [0.75])
    assert '"a {cat}"' in judge.tasks[0][0].text
    assert reward.card.model_id == "scripted"


@pytest.mark.parametrize(
    "reply",
    [
        Reply(error="away"),
        Reply("x", (0.0, 0.0), (0.0, 0.0)),  # neither word
        Reply("x", (0.1, 0.1), (0.6, 0.6)),  # bounds that say nothing
    ],
)
def test_what_is_unknown_is_nan(reply):
    assert np.isnan(values_of(PYesReward(Scripted(lambda q, i: reply)))).all()


def test_a_judge_that_is_away_leaves_nan():
    def away(question, pictures):
        raise JudgeError("gone")

    assert np.isnan(values_of(PYesReward(Scripted(away)), 2)).all()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Alignment Score (1-5): 4\nCoherence Score (1-5): 3\nStyle Score (1-5): 2.0", 3),
        ("Alignment Score (1-5): 4\nCoherence Score (1-5): 3", None),
        ("Alignment Score (1-5): 9\nCoherence Score (1-5): 3\nStyle Score (1-5): 2", None),
    ],
)
def test_unified_scores(text, value):
    [score] = values_of(UnifiedReward(Scripted(lambda q, i: Reply(text))))
    assert np.isnan(score) if value is None else score == value
    assert UnifiedReward().normalize(5) == 1


def pair_text(first):
    return "\n".join(
        f"{name} Score:\n Image 1: {first:.4f}\n Image 2: {1 - first:.4f}\n"
        for name in ("Alignment", "Coherence", "Style")
    )


def test_pairs_in_both_orders_cancel_a_favoured_place():
    """A judge that adds 0.2 for the first place."""

    def reply(question, pictures):
        a, b = map(red, pictures)
        return Reply(pair_text(0.5 + 0.2 + (a - b) / 4))

    judge = Scripted(reply)
    reward = UnifiedPairReward(judge)
    shown = images(3)
    found = reward.score(shown, ["p"] * 3, [{}] * 3).values
    assert len(judge.tasks) == 6
    gaps = [(i - k) * 50 / 255 / 4 for i in range(3) for k in range(3) if i != k]
    fair = [0.5 + sum(gaps[2 * i : 2 * i + 2]) / 2 for i in range(3)]
    np.testing.assert_allclose(found, fair, atol=1e-3)
    assert found.sum() == pytest.approx(1.5, abs=1e-3)
    # an image without another of its prompt has nothing to be compared with
    assert np.isnan(reward.score(shown[:1], ["p"], [{}]).values).all()


def test_pairs_of_another_form_are_nan():
    assert math.isnan(read_pair(Reply("Image 1 is better")))
    assert math.isnan(read_pair(Reply(error="away")))
    assert read_pair(Reply(pair_text(0.25))) == pytest.approx(0.25)


RATIONAL = (
    "# Detailed Judgement\n1. Text Faithfulness:\n## Justification: Score: great\n## Score: {}\n"
    "2. Physical and Visual Quality:\n## Score: {}\n3. Text Rendering:\n## Score: {}\n# Summary: Score: 1"
)


@pytest.mark.parametrize(
    ("scores", "value"),
    [
        ((4, 2, "N/A"), 3),
        ((4, 2, 3), 3),
        (("N/A", 2, 3), None),
        ((4, "", 3), None),
        ((9, 2, 4), 10 / 3),
    ],
)
def test_rational_rewards(scores, value):
    judge = Scripted(lambda q, i: Reply(RATIONAL.format(*scores)))
    [score] = values_of(RationalReward(judge))
    assert np.isnan(score) if value is None else score == pytest.approx(value)
    [(question, _)] = judge.tasks
    assert question.text.startswith("User Instruction: a {cat}\n")
    assert question.text.count("<image>") == 1


def test_registered_and_needing_a_judge(monkeypatch):
    for name in ("DIFFALIGN_JUDGE", "DIFFALIGN_JUDGE_URL", "DIFFALIGN_JUDGE_MODEL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RewardError, match="DIFFALIGN_JUDGE"):
        registry.create("p_yes").prepare()
    monkeypatch.setenv("DIFFALIGN_JUDGE", "nowhere")
    with pytest.raises(RewardError, match="judge=nowhere"):
        registry.create("unified_reward_pair").prepare()
    assert fill("x {prompt}", "{prompt} {y}") == "x {prompt} {y}"
