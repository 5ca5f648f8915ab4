"""The suite's rules: closed forms, the hand tables of published rules, and invariants."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.evaluation.suite import base, checklist, diversity, rubric, summarize, words
from diffalign.evaluation.suite.base import Measure, no_combination
from diffalign.evaluation.suite.checklist import ChecklistError
from diffalign.evaluation.suite.summarize import Row

ALL = (checklist.NONE, checklist.RAW, checklist.PROPAGATED, checklist.IN_FILE_ORDER)


def share(answers, parents, zeroing):
    spans = {key: (float(v), float(v)) for key, v in answers.items()}
    low, high = checklist.mean_span(
        list(checklist.checklist(spans, parents, zeroing=zeroing).values())
    )
    assert low == high
    return low


def test_zeroing_follows_each_release():
    """A chain 1 <- 2 <- 3 whose first answer is no."""
    answers = {"1": 0, "2": 1, "3": 1}
    chain = {"1": [], "2": ["1"], "3": ["2"]}
    assert [share(answers, chain, z) for z in ALL] == pytest.approx([2 / 3, 1 / 3, 0, 0])
    # written with the child first, a release that walks through the file sees the parent too late
    backwards = {"3": ["2"], "2": ["1"], "1": []}
    assert [share(answers, backwards, z) for z in ALL] == pytest.approx([2 / 3, 1 / 3, 0, 1 / 3])


def test_parents_must_exist_and_form_no_circle():
    with pytest.raises(ChecklistError, match="parent 9, which does not exist"):
        checklist.check_parents({"1": ["9"]}, "file (x)")
    with pytest.raises(ChecklistError, match="lead back"):
        checklist.check_parents({"1": ["2"], "2": ["1"]}, "file (x)")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_stricter_zeroing_is_never_more(data):
    n = data.draw(st.integers(1, 7))
    parents = {str(i): [str(j) for j in range(i) if data.draw(st.booleans())] for i in range(n)}
    answers = {key: data.draw(st.integers(0, 1)) for key in parents}
    none, raw, propagated = (share(answers, parents, z) for z in ALL[:3])
    assert propagated <= raw <= none


def test_an_unknown_parent_leaves_bounds():
    spans = {"1": (0.0, 1.0), "2": (1.0, 1.0)}
    zeroed = checklist.checklist(spans, {"1": [], "2": ["1"]}, zeroing=checklist.PROPAGATED)
    assert zeroed["2"] == (0.0, 1.0)


def test_soft_tifa():
    (am, _), (gm, _) = checklist.soft_tifa([(1, 1), (0.01, 0.01)])
    assert am == pytest.approx(0.505)
    assert gm == pytest.approx(0.1)
    _, gm = checklist.soft_tifa([(1, 1), (0, 1)])
    assert gm == (0, 1)  # a question without an answer is no 0


def test_bags_of_words():
    score = words.compare_texts("a b c", "a a b")
    assert (score.hits, score.target, score.read) == (2, 3, 3)
    assert score.recall == score.precision == score.f1 == pytest.approx(2 / 3)
    # case, punctuation and order do not count; junk costs precision only
    score = words.compare_texts("Morning: FRESH, brews! junk junk", ["Fresh brews", "morning"])
    assert score.recall == 1
    assert score.precision == pytest.approx(3 / 5)
    assert words.compare_texts("", "a").precision == 0
    assert words.compare_texts("你好", "你们好", words.CHARACTERS).recall == pytest.approx(2 / 3)


def test_diversity_and_vendi():
    same = np.ones((4, 3))
    assert diversity.vendi(same) == pytest.approx(1)
    assert diversity.pairwise_distance(same) == pytest.approx(0)
    assert diversity.vendi(np.eye(5)) == pytest.approx(5)
    assert diversity.pairwise_distance(np.eye(5)) == pytest.approx(1)
    assert diversity.vendi(np.repeat(np.eye(3), 2, axis=0)) == pytest.approx(3)


@given(st.integers(2, 6), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_vendi_lies_between_one_and_n(n, seed):
    features = np.random.default_rng(seed).normal(size=(n, 4))
    assert 1 - 1e-9 <= diversity.vendi(features) <= n + 1e-9


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("<score>[1, 0]</score>", [1, 0]),
        ("it's fine\n```<score>[1,0]</score>```", [1, 0]),
        ("<think><score>[0,0]</score></think> so <score>[1,1]</score>", [1, 1]),
        ("<score>[1, 0, 1]</score>", None),
        ("<score>[1, N/A]</score>", None),
        ("<score>[1, 2]</score>", None),
        ("scores: 1, 0", None),
        ("", None),
    ],
)
def test_lists_of_scores(text, scores):
    assert rubric.tagged_list(text, 2) == scores


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Style Score (1-5): 3.5", 3.5),
        ("**Style Score (1-5)**: 4", 4),
        ("Style Score (1-5)：2", 2),
        ("Style Score: 9", None),
        ("I like its Style Score", None),
        ("<think>Style Score: 1</think>\nStyle Score: 2", 2),
    ],
)
def test_named_numbers(text, value):
    assert rubric.named_number(text, "Style Score", 1, 5) == value


def test_sections():
    text = "1. Text Faithfulness:\n## Score: 3.2\n2. Quality:\n## Score: 2\n3. Text Rendering:\n## Score: N/A"
    heads = ("Text Faithfulness", "Quality", "Text Rendering")
    found = [rubric.section_number(text, h, heads, 1, 4) for h in heads]
    assert found == [3.2, 2, None]


def rows_of(values):
    return [Row(f"p{i}", [Measure("x", v, v)]) for i, v in enumerate(values)]


def test_means_bounds_and_intervals():
    rows = [*rows_of([0.0, 1.0, 1.0] * 10), Row("unknown", [Measure("x", 0, 1)])]
    figure = summarize.summarize(rows, no_combination)["x"]
    assert figure["value"] == pytest.approx(2 / 3)
    assert figure["least"] == pytest.approx(20 / 31)
    assert figure["most"] == pytest.approx(21 / 31)
    assert (figure["n"], figure["known"], figure["prompts"]) == (31, 30, 30)
    assert figure["low"] < 2 / 3 < figure["high"]
    assert summarize.answered({"x": figure}, "x") == pytest.approx(30 / 31)
    # the bootstrap's width is that of a binomial share
    assert figure["high"] - figure["low"] == pytest.approx(
        2 * 1.96 * math.sqrt(2 / 9 / 30), rel=0.1
    )


def test_figures_that_all_agree_are_not_certain():
    figure = summarize.summarize(rows_of([1.0] * 10), no_combination)["x"]
    assert figure["value"] == figure["high"] == 1
    assert figure["low"] == pytest.approx(0.7225, abs=1e-3)  # Wilson's


def test_weights_pool_over_images():
    rows = [
        Row("a", [Measure("recall", 0.5, 0.5, weight=2)]),
        Row("b", [Measure("recall", 1, 1, weight=6)]),
    ]
    assert summarize.summarize(rows, no_combination)["recall"]["value"] == 7 / 8


def test_paired_differences_are_sharper():
    rng = np.random.default_rng(0)
    levels = rng.uniform(size=60)
    before, after = rows_of(levels), rows_of(levels + 0.02 + 0.001 * rng.normal(size=60))
    result = summarize.differences(after, before, no_combination)["x"]
    assert result["value"] == pytest.approx(0.02, abs=1e-3)
    assert not result["within_noise"]
    assert (result["won"], result["lost"]) == (60, 0)
    equal = summarize.differences(before, before, no_combination)["x"]
    assert equal["value"] == 0
    assert equal["within_noise"]
    assert equal["tied"] == 60


def test_rewards_have_win_rates():
    rows = [Row(f"p{i}", [Measure("reward/a", i, i, image=0)]) for i in range(8)]
    base = [Row(f"p{i}", [Measure("reward/a", i - 1, i - 1, image=0)]) for i in range(8)]
    result = summarize.differences(rows, base, no_combination)["reward/a"]
    assert result["win_rate"]["rate"] == 1


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.randoms())
@settings(max_examples=10, deadline=None)
def test_the_order_of_prompts_is_irrelevant(values, shuffle):
    """Floats differ in their last digits only."""
    rows = rows_of(values)
    value = summarize.summarize(rows, no_combination)["x"]["value"]
    shuffle.shuffle(rows)
    assert summarize.summarize(rows, no_combination)["x"]["value"] == pytest.approx(value)


def test_mean_of_equal_parts():
    assert base.mean_of(["primary/a", "primary/b", "sub/c"], "primary/") == {
        "primary/a": 0.5,
        "primary/b": 0.5,
    }
