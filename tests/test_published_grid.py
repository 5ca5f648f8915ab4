"""bench qsched: searches against the published grid, judged by images that none of them has seen."""

import pytest
from test_tuning import PROMPTS, brightness, drawing, flux

from diffalign.bench import published_grid
from diffalign.bench.published_grid import HeldOut, against_grid, leaders, summary
from diffalign.schedulers import Coefficients
from diffalign.tuning.tune import Settings


def test_leaders_are_better_than_all_before_them():
    history = [{"value": v} for v in (0.0, -1.0, 0.3, 0.3, 0.2, 0.5)]
    assert [row["value"] for row in leaders(history)] == [0.0, 0.3, 0.5]


def test_a_rival_counts_where_it_matched():
    found = [{r: {"ratio": ratio} for r in published_grid.RIVALS} for ratio in (12.0, None, 40.0)]
    assert summary(found)["cma"] == {"ratio": 26.0, "matched": "2 of 3"}
    assert summary(found[1:2])["ramp"] == {"ratio": None, "matched": "0 of 1"}


@pytest.mark.parametrize(
    ("gains", "rows"),
    [
        ([0.0, 0.5, 0.6], 20),  # from the second on
        ([0.6, 0.2, 0.6], 30),  # lucky at first: only what lasts counts
        ([0.0, 0.6, 0.1], None),
        ([0.5, 0.5, 0.5], 10),
    ],
)
def test_matched_is_as_good_from_there_on(gains, rows):
    vectors = [[1.0, 1.0 + i / 10] for i in range(3)]
    history = [
        {"coefficients": v, "value": float(i), "rows": 10 * (i + 1)} for i, v in enumerate(vectors)
    ]
    told = {tuple(v): gain for v, gain in zip(vectors, gains, strict=True)}

    class Result:
        pass

    result = Result()
    result.history = history
    found = published_grid._matched(result, lambda c: told[tuple(c.vector)], 0.5, 300)
    assert found == {"rows_to_match": rows, "ratio": rows and 300 / rows}


def test_against_the_grid_on_a_tiny_model():
    settings = Settings({"light": 1.0}, held_out=0.5, seed=0)
    found = against_grid(flux(), PROMPTS, brightness, settings, drawing(), side=5)
    assert found["images"] == found["held_out"] == 3
    # the first prediction once, then two forwards an image and candidate; the schedule as it is is one of the grid's
    assert found["grid"]["rows"] == 3 + 3 * 2 * 25
    for rival in published_grid.RIVALS:
        assert found[rival]["rows"] <= 3 + 3 * 2 * 3
        low, high = found[rival]["interval"]
        assert low <= found[rival]["held_out_value"] <= high


def test_held_out_images_are_others_and_the_schedule_as_it_is_gains_nothing():
    model = flux()
    settings = Settings({"light": 1.0})
    gains = HeldOut(model, PROMPTS[3:], brightness, settings, drawing(seed=4))
    ones = Coefficients.ones(3)
    assert gains(ones) == 0.0
    assert gains.drawn.drawing.seed == 5
    better = Coefficients((1.1, 1.0, 1.0), (1.0, 1.0, 1.0))
    gain, (low, high) = gains.interval(better)
    assert gain == pytest.approx(gains(better))
    assert low <= gain <= high
