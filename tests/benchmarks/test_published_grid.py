"""bench qsched: searches against the published grid, on the images they saw and on those that none has seen."""

from types import SimpleNamespace

import pytest
from test_tuning import PROMPTS, brightness, drawing, flux

from benchmarks.qsched import published_grid
from benchmarks.qsched.published_grid import against_grid, matched, summary
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
    grid = SimpleNamespace(value=best, network_rows=300)
    found = matched(SimpleNamespace(history=history), grid)
    assert found == {"rows_to_match": rows, "ratio": rows and 300 / rows}


def test_against_the_grid_on_a_tiny_model():
    settings = Settings({"light": 1.0}, seed=0)
    model, held_out = flux(), PROMPTS[3:]
    found = against_grid(
        model, PROMPTS[:3], held_out, brightness, settings, drawing(seed=4), side=5
    )
    assert found["images"] == found["held_out"] == 3
    # the first prediction once, then two forwards an image and candidate; the schedule as it is is one of the grid's
    assert found["grid"]["rows"] == 3 + 3 * 2 * 25
    drawn = Evaluator(model, held_out, brightness, ["light"], drawing(seed=5))
    base = drawn([Coefficients.ones(3)])[0]["light"]
    for engine in (published_grid.GRID, *published_grid.RIVALS):
        row = found[engine]
        best = drawn([Coefficients.from_vector(row["best"])])[0]["light"]
        gain = float(((best - base) / base.std()).mean())
        assert row["held_out_value"]["mean"] == pytest.approx(gain, abs=1e-3)
    for rival in published_grid.RIVALS:
        row = found[rival]
        assert row["rows"] <= 3 + 3 * 2 * 3
        more = row["held_out_value"]["mean"] - found["grid"]["held_out_value"]["mean"]
        assert row["held_out_more"]["mean"] == pytest.approx(more, abs=2e-4)
        assert row["held_out_more"]["low"] <= row["held_out_more"]["mean"]
