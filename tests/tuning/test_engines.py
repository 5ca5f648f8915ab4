"""The search for factors: what is maximised, and how."""

import numpy as np
import pytest
import torch

from diffalign.core.errors import UsageError
from diffalign.data.prompts import load_prompts
from diffalign.rewards.composition import CompositeReward
from diffalign.rewards.registry import BUILT_IN
from diffalign.schedulers import Coefficients
from diffalign.shapes.world import render, sample_scene
from diffalign.tuning.engines import ENGINES, Space
from diffalign.tuning.objective import PRESETS, Objective, ObjectiveError, parse

# --- objective


def test_objective_is_a_sum_of_z_scores():
    base = {"a": np.array([1.0, 2.0, 3.0]), "b": np.array([10.0, 10.0, 40.0])}
    objective = Objective({"a": 1.0, "b": 2.0}, base, penalty=3.0)
    scores = {"a": base["a"] + 0.5, "b": base["b"] - 7.0}
    expected = 0.5 / np.std(base["a"]) - 2 * 7 / np.std(base["b"])
    c = Coefficients((0.9, 1.0), (1.0, 1.2))
    assert objective(c, scores) == pytest.approx(expected - 3 * (0.01 + 0.04))
    assert objective(Coefficients.ones(2), base) == 0


def test_the_objective_decides_and_not_its_first_term():
    """The released search ranks by the first entry of its scores, CLIPScore, whatever the criterion."""
    base = {"clip_score": np.array([0.2, 0.3]), "hpsv2.1": np.array([0.5, 0.7])}
    objective = Objective({"clip_score": 1.0, "hpsv2.1": 2.0}, base)
    clip_likes = {"clip_score": base["clip_score"] + 0.05, "hpsv2.1": base["hpsv2.1"] - 0.2}
    jaq_likes = {"clip_score": base["clip_score"] - 0.01, "hpsv2.1": base["hpsv2.1"] + 0.1}
    ones = Coefficients.ones(1)
    assert objective(ones, jaq_likes) > 0 > objective(ones, clip_likes)


def test_images_without_a_score_are_left_out_and_no_way_to_win():
    base = {"a": np.array([1.0, 2.0, 3.0, np.nan])}
    objective = Objective({"a": 1.0}, base)
    ones = Coefficients.ones(1)
    assert objective(ones, {"a": np.array([1.0, 2.0, np.nan, 9.0])}) == 0
    assert objective(ones, {"a": np.array([9.0, np.nan, np.nan, np.nan])}) == -np.inf
    with pytest.raises(ObjectiveError, match="a gave no score"):
        Objective({"a": 1.0}, {"a": np.array([np.nan, np.nan])})
    with pytest.raises(ObjectiveError, match="a is 2 for every"):
        Objective({"a": 1.0}, {"a": np.array([2.0, 2.0])})


def test_objectives_by_name_and_by_weights():
    assert parse("jaq") == {"clip_score": 1.0, "hpsv2.1": 2.0}
    assert parse("jaq-lcm") == {"clip_score": 1.0, "clip_iqa": 2.0}
    assert set(parse("jaq-shapes")) == {"verifier", "flatness"}
    assert all(name in BUILT_IN for terms in PRESETS.values() for name in terms)
    assert parse("pickscore=2, ocr") == {"pickscore": 2.0, "ocr": 1.0}
    for text in ("pickscore=x", "=1", "a=inf"):
        with pytest.raises(UsageError, match="reward=weight"):
            parse(text)


def test_the_objective_of_shapes_weighs_obedience_and_quality():
    """On rendered scenes, asked for by their own prompts, and worse ones."""
    rng = np.random.default_rng(0)
    entries = [p.metadata for p in load_prompts("shapes:train", limit=8)]
    pixels = np.stack([render(sample_scene(e, rng)) for e in entries])
    right = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    reward = CompositeReward.from_config(parse("jaq-shapes"))

    def scores(images):
        return reward.score(images, [e["prompt"] for e in entries], entries).details

    wrong, dirty = right.roll(1, 0), right.clone()
    dirty[:, :, ::2] //= 2
    base = scores(torch.cat([right[:4], wrong[4:]]))
    objective = Objective(parse("jaq-shapes"), base)
    ones = Coefficients.ones(1)
    assert objective(ones, base) == 0
    assert objective(ones, scores(right)) > 0 > objective(ones, scores(wrong))
    gain = objective(ones, scores(dirty)) - objective(ones, scores(right))
    lost = (scores(dirty)["flatness"] - scores(right)["flatness"]).mean()
    told = (scores(dirty)["verifier"] - scores(right)["verifier"]).mean()
    weight = parse("jaq-shapes")["flatness"]
    expected = weight * lost / base["flatness"].std() + told / base["verifier"].std()
    assert gain == pytest.approx(expected, rel=1e-4)


# --- engines


def maximise(engine, space, function, budget, seed=0):
    """The best candidate, its value, and how many were tried."""
    run = ENGINES[engine](space, budget=budget, seed=seed)
    best, tried, values = (None, -np.inf), 0, None
    while True:
        try:
            candidates = next(run) if values is None else run.send(values)
        except StopIteration:
            return *best, tried
        values = [function(np.array(c.vector)) for c in candidates]
        tried += len(candidates)
        for c, v in zip(candidates, values, strict=True):
            assert all(space.low <= x <= space.high for x in c.vector)
            best = (c, v) if v > best[1] else best


@pytest.mark.parametrize("engine", ["cma", "coordinate"])
def test_engines_find_the_top_of_a_hill_in_a_tenth_of_the_grids_evaluations(engine):
    top = np.array([0.93, 1.02, 1.08, 1.1, 0.97, 1.0])

    def hill(x):
        return -(((x - top) / 0.1) ** 2).sum() - ((x[0] - top[0]) / 0.1) * ((x[3] - top[3]) / 0.1)

    best, value, tried = maximise(engine, Space(3), hill, 250)
    assert tried <= 260
    assert value > -0.05, best
    again = maximise(engine, Space(3), hill, 250)
    assert again[0] == best  # seeded


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("budget", [1, 7, 50])
def test_engines_keep_to_their_budget(engine, budget):
    _, _, tried = maximise(engine, Space(2), lambda x: -abs(x - 1.1).sum(), budget)
    assert tried <= max(budget + 2, 4)


def test_two_numbers_are_found_among_ramps():
    top = np.array(Coefficients.ramp(0.91, 1.13, 4).vector)
    best, value, tried = maximise("ramp", Space(4), lambda x: -abs(x - top).sum(), 120)
    assert tried <= 120
    assert value > -0.05
    a, b = best.sample[0], best.model_output[0]
    assert best == Coefficients.ramp(a, b, 4)
    assert next(ENGINES["ramp"](Space(2), budget=9, seed=0)) == [Coefficients.ones(2)]


def test_coordinate_search_goes_on_where_a_side_cannot_be_scored():
    best, _, _ = maximise(
        "coordinate", Space(1), lambda x: -np.inf if x[0] < 1 else -abs(x[1] - 1.1), 60
    )
    assert best.model_output[0] == pytest.approx(1.1, abs=0.02)


def test_the_grid_is_the_published_one():
    run = ENGINES["grid"](Space(3, 0.8, 1.2), budget=9)
    found = next(run)
    assert len(found) == 9
    assert found[0] == Coefficients.ramp(0.8, 0.8, 3)
    assert found[5] == Coefficients.ramp(1.0, 1.2, 3)


@pytest.mark.parametrize(
    ("low", "high"),
    [(1.1, 1.2), (0.8, np.inf), (1, 1), (0.8, np.nan), (0.01, 1.2), (-1, 1), (0.8, 20)],
)
def test_boxes_that_cannot_be(low, high):
    with pytest.raises(
        UsageError, match=r"the bounds must differ, contain 1 and lie in 0\.1\.\.10"
    ):
        Space(3, low, high)
