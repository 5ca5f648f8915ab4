"""Rewards: registry, normalisation, composition, failures."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.rewards import registry
from diffalign.rewards.base import Reward, RewardCard, RewardError
from diffalign.rewards.composition import CompositeReward
from diffalign.rewards.registry import UnknownReward
from diffalign.shapes.prompts import prompts
from diffalign.shapes.world import BACKGROUND, COLORS, SceneObject, render, sample_scene
from diffalign.types import RewardOutput


def scenes(n=12):
    rng = np.random.default_rng(0)
    entries = prompts("train")[:: len(prompts("train")) // n][:n]
    pixels = np.stack([render(sample_scene(e, rng)) for e in entries])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), entries


class Fake(Reward):
    """Mean of the red channel; raises or gives NaN where told."""

    card = RewardCard(name="fake", description="", raw_range=(0, 255), scale=1 / 255, offset=0)

    def __init__(self, *, broken=(), nan=(), shape=None):
        self.broken, self.nan, self.shape = set(broken), set(nan), shape

    def score(self, images, prompts, metadata):
        if self.broken & set(prompts):
            raise RuntimeError("cannot look at this")
        values = images[:, 0].float().mean((1, 2)).numpy()
        values[[p in self.nan for p in prompts]] = np.nan
        return RewardOutput(values if self.shape is None else np.zeros(self.shape, np.float32))


def composite(weights=None, **kwargs):
    return CompositeReward({"fake": Fake(**kwargs)}, weights or {"fake": 1.0})


def test_built_in_rewards_exist_and_declare_themselves():
    for name in registry.BUILT_IN:
        reward = registry.create(name)
        assert reward.card.name == name
        assert reward.card.license
        assert name in registry.SUMMARIES


def test_unknown_reward_names_the_nearest():
    with pytest.raises(UnknownReward, match="unknown reward 'verifer'; did you mean 'verifier'"):
        registry.create("verifer")


def test_third_parties_add_rewards_by_entry_point(monkeypatch):
    class Point:
        name, value = "theirs", "test_rewards:Fake"

    monkeypatch.setattr(
        registry, "entry_points", lambda group: [Point] if group == "diffalign.rewards" else []
    )
    assert type(registry.create("theirs")).__name__ == "Fake"


def test_verifier_gives_one_to_right_images_and_less_to_shuffled_ones():
    images, entries = scenes()
    reward = registry.create("verifier")
    texts = [e["prompt"] for e in entries]
    right = reward.score(images, texts, entries)
    assert right.values.tolist() == [1.0] * 12
    wrong = reward.score(images.roll(1, 0), texts, entries)
    assert wrong.values.mean() < 0.7
    assert set(wrong.details) == {"score", "correct", "strict"}


def shown(*things):
    """(1, 3, 64, 64) of objects (kind, colour, x, y)."""
    pixels = render([SceneObject(*thing, 14.0) for thing in things])
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


TWO_CIRCLES = [("circle", "red", 16.0, 32.0), ("circle", "red", 48.0, 32.0)]


@pytest.mark.parametrize(
    ("things", "include", "score", "correct", "strict"),
    [
        # two circles of three asked for: 1 - |3 - 2| / 3
        (TWO_CIRCLES, [("circle", 3)], 2 / 3, 0, 0),
        # one too many: 1 - |1 - 2| / 1 = 0, while officially at least one is enough
        (TWO_CIRCLES, [("circle", 1)], 0, 1, 0),
        # the number is right and the colour is not: (1 + 0) / 2
        (TWO_CIRCLES, [("circle", 2, {"color": "blue"})], 0.5, 0, 0),
        # both numbers are right and the place is not: (1 + 1 + 0) / 3
        (
            [("square", "red", 16.0, 32.0), ("circle", "red", 48.0, 32.0)],
            [("square", 1), ("circle", 1, {"position": ["left of", 0]})],
            *(2 / 3, 0, 0),
        ),
    ],
)
def test_the_verifiers_partial_credit_by_hand(things, include, score, correct, strict):
    """The reward is the mean of the continuous score and of the official verdict."""
    clauses = [
        {"class": name, "count": count, **(more[0] if more else {})}
        for name, count, *more in include
    ]
    found = registry.create("verifier").score(shown(*things), ["x"], [{"include": clauses}])
    assert found.details["score"][0] == pytest.approx(score)
    assert (found.details["correct"][0], found.details["strict"][0]) == (correct, strict)
    assert found.values[0] == pytest.approx((score + correct) / 2)


def test_verifier_refuses_prompts_that_it_cannot_judge():
    reward = registry.create("verifier")
    with pytest.raises(RewardError, match=r"'verifier' needs include .* prompt 2 \('x'\)"):
        reward.check_metadata([prompts("train")[0], {"prompt": "x"}])


CIRCLE = {"class": "circle", "count": 1}


@pytest.mark.parametrize(
    ("include", "message"),
    [
        ([], "at least one object"),
        ("circle", "at least one object"),
        (["circle"], "class among circle"),
        ([{"class": "bench", "count": 1}], "class among circle"),
        ([{"class": "circle", "count": 0}], "count of at least 1"),
        ([{"class": "circle"}], "count of at least 1"),
        ([{**CIRCLE, "color": "pink"}], "colours are red"),
        ([{**CIRCLE, "position": ["left of", 0]}], "index of an earlier object"),
        ([CIRCLE, {**CIRCLE, "position": ["beside", 0]}], "a position is one of left of"),
    ],
)
def test_verifier_names_what_it_cannot_judge(include, message):
    with pytest.raises(RewardError, match=f"cannot judge prompt 1 .*{message}"):
        registry.create("verifier").check_metadata([{"prompt": "x", "include": include}])


def test_jpeg_is_the_size_of_the_file():
    images, entries = scenes(3)
    values = registry.create("jpeg").score(images, [""] * 3, entries).values
    buffer = io.BytesIO()
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=95)
    assert values[0] == pytest.approx(-len(buffer.getvalue()) / 1000)
    noise = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    assert registry.create("jpeg").score(noise, [""], [{}]).values[0] < values.min()


def test_composition_is_the_weighted_sum_of_normalised_rewards():
    images, entries = scenes(4)
    both = CompositeReward(
        {"fake": Fake(), "jpeg": registry.create("jpeg")}, {"fake": 2.0, "jpeg": 10.0}
    )
    texts = [e["prompt"] for e in entries]
    output = both.score(images, texts, entries)
    red = images[:, 0].float().mean((1, 2)).numpy() / 255
    jpeg = registry.create("jpeg").score(images, texts, entries).values / 500
    np.testing.assert_allclose(output.values, 2 * red + 10 * jpeg, rtol=1e-5)
    np.testing.assert_allclose(output.details["fake"], red, rtol=1e-6)


def test_nan_is_masked_and_counted():
    images, entries = scenes(4)
    reward = composite(nan=["b"])
    output = reward.score(images, ["a", "b", "c", "d"], entries)
    assert output.mask.tolist() == [True, False, True, True]
    assert reward.failures == {"fake": 1}


def test_a_reward_that_raises_for_one_image_loses_only_that_one(caplog):
    images, entries = scenes(4)
    reward = composite(broken=["c"])
    output = reward.score(images, ["a", "b", "c", "d"], entries)
    expected = composite().score(images, ["a", "b", "c", "d"], entries)
    assert output.mask.tolist() == [True, True, False, True]
    np.testing.assert_allclose(output.values[output.mask], expected.values[output.mask])
    assert reward.failures == {"fake": 1}
    assert "failed on 1 of 4 images" in caplog.text


def test_a_reward_that_fails_on_every_image_is_nan_and_says_why(caplog):
    images, entries = scenes(2)
    reward = composite(broken=["a", "b"])
    assert not reward.score(images, ["a", "b"], entries).mask.any()
    assert reward.last_error == "RuntimeError: cannot look at this"
    assert "failed on 2 of 2 images: RuntimeError: cannot look at this" in caplog.text


def test_details_survive_a_partial_failure():
    images, entries = scenes(3)
    reward = registry.create("verifier")
    both = CompositeReward({"verifier": reward}, {"verifier": 1.0})
    broken = [entries[0], {"include": [{}]}, entries[2]]
    output = both.score(images, ["a", "b", "c"], broken)
    assert output.mask.tolist() == [True, False, True]
    assert output.details["verifier/correct"][[0, 2]].tolist() == [1.0, 1.0]
    assert np.isnan(output.details["verifier/correct"][1])


class Reader(Fake):
    """As Fake, for rewards that judge by the prompt."""

    needs_prompt = True

    def score(self, images, prompts, metadata):
        assert all(p.strip() for p in prompts)  # it is not asked about others
        found = super().score(images, prompts, metadata)
        return RewardOutput(found.values, {"length": np.array([len(p) for p in prompts])})


def test_without_a_prompt_nothing_is_judged_by_it():
    images, entries = scenes(4)
    both = CompositeReward({"fake": Fake(), "reader": Reader()}, {"fake": 1.0, "reader": 1.0})
    output = both.score(images, ["a", "", "bc", " \n"], entries)
    assert output.mask.tolist() == [True, False, True, False]
    assert np.isfinite(output.details["fake"]).all()
    np.testing.assert_array_equal(output.details["reader/length"], [1, np.nan, 2, np.nan])
    expected = both.score(images, list("abcd"), entries).details["reader"]
    np.testing.assert_array_equal(output.details["reader"][[0, 2]], expected[[0, 2]])
    assert both.failures == {"fake": 0, "reader": 2}
    assert not both.score(images[:2], ["", ""], entries[:2]).mask.any()


def test_a_reward_of_the_wrong_shape_is_refused():
    images, entries = scenes(2)
    with pytest.raises(RewardError, match=r"returned shape \(2, 2\) for 2 images"):
        composite(shape=(2, 2)).score(images, ["a", "b"], entries)


def test_flatness_is_a_distance_to_the_nearest_colour():
    """By hand: pure colours have 1, and a pixel that is d away from all of them loses d over the longest distance."""
    flatness = registry.create("flatness")
    palette = np.array([BACKGROUND, *COLORS.values()], float)
    distances = np.linalg.norm(palette[:, None] - palette[None], axis=-1)
    pure = torch.tensor(np.array([BACKGROUND, COLORS["red"]], np.uint8))
    images = pure.view(2, 3, 1, 1).expand(2, 3, 8, 8).clone()
    assert flatness.score(images, ["", ""], [{}, {}]).values.tolist() == [1, 1]
    odd = np.array([100, 30, 200])
    images[1, :, :4] = torch.tensor(odd, dtype=torch.uint8).view(3, 1, 1)
    lost = np.linalg.norm(palette - odd, axis=-1).min() / distances.max() / 2
    found = flatness.score(images, ["", ""], [{}, {}]).values
    np.testing.assert_allclose(found, [1, 1 - lost], rtol=1e-4)


def test_flatness_falls_with_what_coarse_weights_do_to_an_image():
    drawn, entries = scenes(4)
    flatness = registry.create("flatness")
    noise = 20 * torch.randn(drawn.shape, generator=torch.Generator().manual_seed(0))
    noisy = (drawn + noise).clamp(0, 255).to(torch.uint8)
    blurred = torch.nn.functional.avg_pool2d(drawn.float(), 9, 1, 4).to(torch.uint8)
    scores = [flatness.score(x, [""] * 4, entries).values for x in (drawn, blurred, noisy)]
    assert scores[0].min() > 0.98
    assert (scores[1] < scores[0]).all()
    assert (scores[2] < scores[0]).all()


COLUMNS = 8


def test_the_documentation_says_what_the_cards_say():
    lines = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text().splitlines()
    rows = (x.strip("|").split("|") for x in lines if x[:3] == "| `")
    # the table of times has fewer columns
    table = [[c.strip().replace("`", "") for c in row] for row in rows if len(row) == COLUMNS]
    cards = [registry.create(name).card for name in sorted(registry.BUILT_IN)]

    def commits(card):
        known = [card.revision, *card.auxiliary.values()] if card.model_id else []
        return ", ".join("as loaded" if r is None else r[:12] for r in known)

    assert table == [
        [
            c.name,
            ", ".join([c.model_id, *c.auxiliary]) if c.model_id else "",
            commits(c),
            str(c.input_size or ""),
            f"{c.raw_range[0]:g} .. {c.raw_range[1]:g}",
            f"{c.offset:g}",
            f"{c.scale:.4g}",
            c.license,
        ]
        for c in cards
    ]
