"""Captions of ten thousand characters under every reward that reads them, on tiny weights."""

import numpy as np
import pytest
import torch
from marks import slow_except
from test_clip_rewards import checkpoint, fresh  # noqa: F401 - fixtures
from test_hpsv3 import config, state, tokenizer  # noqa: F401
from test_image_reward import HEADS, released
from test_image_reward import tokenizer as words  # noqa: F401
from test_vlm_judge import judge  # noqa: F401

from diffalign.rewards import registry
from diffalign.rewards.clip import ClipScorer
from diffalign.rewards.clip_score import ClipScoreReward
from diffalign.rewards.composition import CompositeReward
from diffalign.rewards.hpsv2 import HPSv2Reward, HPSv21Reward
from diffalign.rewards.hpsv3 import HPSv3Reward
from diffalign.rewards.hpsv3 import build as build_hpsv3
from diffalign.rewards.image_reward import ImageReward, build
from diffalign.rewards.judged import Asking
from diffalign.rewards.pickscore import PickScoreReward

LONG = ("a photo of a red circle left of a blue square, " * 250)[:10_000]
ON_CLIP = {
    "clip_score": ClipScoreReward,
    "pickscore": PickScoreReward,
    "hpsv2": HPSv2Reward,
    "hpsv2.1": HPSv21Reward,
}


@pytest.fixture
def build_reward(checkpoint, state, tokenizer, words, judge):  # noqa: F811
    """A reward by name, with small weights."""

    def make(name):
        if name in ON_CLIP:
            return ON_CLIP[name](ClipScorer.from_pretrained(str(checkpoint)))
        if name == "image_reward":
            return ImageReward(build(released(), vision_heads=HEADS, text_heads=HEADS), words)
        if name == "hpsv3":
            model = build_hpsv3(config(tokenizer), state, torch.float32)
            return HPSv3Reward(model, tokenizer)
        return registry.create(name)

    return make


# tests of rewards that ask a judge say what they send
TEXT_REWARDS = [
    name
    for name in registry.BUILT_IN
    if registry.create(name).needs_prompt and not isinstance(registry.create(name), Asking)
]


def test_all_of_them_are_tried():
    known = {*ON_CLIP, "image_reward", "hpsv3", "vlm_judge", "shapes_clip"}
    assert set(TEXT_REWARDS) == known


@pytest.mark.parametrize("name", slow_except(set(TEXT_REWARDS) - {"hpsv3"}, TEXT_REWARDS))
def test_a_long_caption_is_scored_beside_a_short_one_and_none(build_reward, name):
    images = torch.randint(
        0, 256, (3, 3, 40, 52), generator=torch.Generator().manual_seed(0)
    ).byte()
    reward = CompositeReward({name: build_reward(name)}, {name: 1.0})
    found = reward.score(images, [LONG, "a photo of a red circle", ""], [{}] * 3)
    assert found.mask.tolist() == [True, True, False]
    assert reward.last_error is None  # it was no failure that was mended


def test_a_long_text_is_looked_for():
    reward = registry.create("ocr")
    image = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    found = reward.score(image, [f'a wall that says "{LONG}"'], [{}])
    np.testing.assert_array_equal(found.values, [0])
