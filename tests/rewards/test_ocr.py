"""The OCR reward: really rendered text, really read."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from diffalign.data.prompts import load_prompts
from diffalign.rewards.base import RewardError
from diffalign.rewards.ocr import OcrReward, similarity, wanted_text


@pytest.fixture(scope="module")
def reward():
    found = OcrReward()
    found.prepare()
    return found


def sign(text, size=160):
    image = Image.new("RGB", (size, size), (240, 240, 230))
    font = ImageFont.load_default(20)
    ImageDraw.Draw(image).text((8, size // 2 - 20), text, fill=(20, 20, 90), font=font)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_rendered_text_is_read(reward):
    texts = ["HELLO WORLD", "two lines\nof text", "", "HELLO WORLD"]
    images = torch.stack([sign(t) for t in texts])
    prompts = [
        'a sign that says "Hello World"',
        'a book titled "two lines of text"',
        'a poster with "anything"',
        'a sign that says "diffusion"',
    ]
    values = reward.score(images, prompts, [{}] * 4).values
    np.testing.assert_allclose(values[:3], [1, 1, 0])
    assert 0 <= values[3] < 0.5


def test_metadata_says_the_text_and_no_text_is_nan(reward):
    images = torch.stack([sign("NEW YORK")] * 2)
    values = reward.score(images, ["a skyline", "a skyline"], [{"text": "New York"}, {}]).values
    assert values[0] == 1
    assert np.isnan(values[1])


@pytest.mark.parametrize(
    ("read", "target", "expected"),
    [
        ("Hello World!", "helloworld", 1.0),
        ("hallo world", "helloworld", 0.9),
        ("", "abcd", 0.0),
        ("a completely different and long text", "abcd", 0.0),
        ("abc", "abcd", 0.75),
    ],
)
def test_similarity(read, target, expected):
    assert similarity(read, target) == pytest.approx(expected)


def test_the_first_quoted_text_is_wanted():
    assert wanted_text('a "Big Sign" beside "another"', {}) == "bigsign"
    assert wanted_text("\u201cFancy\u201d quotes", {}) == "fancy"
    assert wanted_text('an empty "" pair', {}) == ""
    assert wanted_text("it's Tom's", {}) == ""


def test_prompts_without_text_are_refused_before_the_first_image(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text('a sign that says "yes"\na cat\n')
    with pytest.raises(RewardError, match=r"prompt 2 \('a cat'\) has none"):
        OcrReward().check_metadata([p.metadata for p in load_prompts(str(file))])
