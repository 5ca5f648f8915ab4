"""bench qsched: searches against the published grid, on the images they saw and on those that none has seen."""

from types import SimpleNamespace

import numpy as np
import pytest
from test_tuning import PROMPTS, brightness, drawing, flux

from diffalign.bench import published_grid
from diffalign.bench.published_grid import against_grid, held_out_gains, matched, summary
from diffalign.schedulers import Coefficients
from diffalign.tuning.evaluator import Evaluator
from diffalign.tuning.tune import Settings


def test_a_rival_counts_where_it_matched():
    found = [
        {
            rival: {"ratio": ratio, "held_out_more": {"mean": high - 1, "high": high}}
            for rival in published_grid.RIVALS
        }
        for ratio, high in ((12.0, 0.1), (None, -0.1), (40.0, 0.5))
    ]
    assert summary(found)["cma"] == {"ratio": 26.0, "matched": "2 of 3", "worse_on_held_out": 1}
    assert summary(found[1:2])["ramp"] == {
        "ratio": None,
        "matched": "0 of 1",
        "worse_on_held_out": 1,
    }


@pytest.mark.parametrize(("best", "rows"), [(0.4, 20), (0.5, 20), (0.6, 40), (0.7, None)])
def test_matched_is_the_first_that_is_as_good(best, rows):
    values = (0.0, 0.5, 0.3, 0.6)
    history = [{"value": v, "rows": 10 * (i + 1)} for i, v in enumerate(values)]
    grid = SimpleNamespace(calibration_value=best, network_rows=300)
    found = matched(SimpleNamespace(history=history), grid)
    assert found == {"rows_to_match": rows, "ratio": rows and 300 / rows}


def test_against_the_grid_on_a_tiny_model():
    settings = Settings({"light": 1.0}, held_out=0.5, seed=0)
    found = against_grid(flux(), PROMPTS, brightness, settings, drawing(), side=5)
    assert found["images"] == found["held_out"] == 3
    # the first prediction once, then two forwards an image and candidate; the schedule as it is is one of the grid's
    assert found["grid"]["rows"] == 3 + 3 * 2 * 25
    for rival in published_grid.RIVALS:
        row = found[rival]
        assert row["rows"] <= 3 + 3 * 2 * 3
        more = row["held_out_value"]["mean"] - found["grid"]["held_out_value"]["mean"]
        assert row["held_out_more"]["mean"] == pytest.approx(more, abs=2e-4)
        assert row["held_out_more"]["low"] <= row["held_out_more"]["mean"]


def test_held_out_gains_are_over_the_schedule_as_it_is():
    """On images of other noise; by hand from the images of both."""
    model, settings = flux(), Settings({"light": 1.0})
    ones, other = Coefficients.ones(3), Coefficients((1.1, 1.0, 1.0), (1.0, 1.0, 1.0))
    options = (PROMPTS[3:], brightness, settings)
    same, gains = held_out_gains(model, *options, drawing(seed=4), [ones, other])
    assert np.array_equal(same, np.zeros(3))
    drawn = Evaluator(model, PROMPTS[3:], brightness, ["light"], drawing(seed=5))
    base, found = (s["light"] for s in drawn([ones, other]))
    np.testing.assert_allclose(gains, (found - base) / base.std(), rtol=1e-5)
