"""Cost to reach a score, in closed form."""

import math

import pytest

from benchmarks.awm import awm
from benchmarks.common.curves import Curve, finite, read_curve, speedup


def line(slope, n=5):
    """Score 0.4 + slope * hour, evaluated every hour; ten images and 200 forwards an hour."""
    hours = [float(i) for i in range(n)]
    return Curve(
        [0.4 + slope * h for h in hours],
        {"seconds": [3600 * h for h in hours], "images": [10 * h for h in hours]},
    )


def test_cost_is_linear_between_evaluations():
    assert line(0.1).to_reach(0.65, "seconds") == pytest.approx(2.5 * 3600)
    assert line(0.1).to_reach(0.65, "images") == pytest.approx(25)
    assert line(0.1).to_reach(0.4, "images") == 0
    assert line(0.1).to_reach(0.81, "images") is None


def test_the_first_time_counts():
    curve = Curve([0.4, 0.6, 0.5, 0.7], {"seconds": [0.0, 10.0, 20.0, 30.0]})
    assert curve.to_reach(0.55, "seconds") == pytest.approx(7.5)


def test_twice_the_slope_is_twice_as_fast():
    # both reach 0.6: the slow one at its end, the fast one half way
    assert speedup(line(0.1), line(0.05), "seconds") == pytest.approx(2)
    assert speedup(line(0.05), line(0.1), "seconds") == pytest.approx(0.5)


def test_what_never_learns_is_infinitely_slow():
    assert speedup(line(0.1), line(-0.01), "seconds") == math.inf
    assert speedup(line(-0.01), line(0.1), "seconds") == 0
    assert math.isnan(speedup(line(-0.01), line(-0.02), "seconds"))


def test_a_beginning_that_was_scored_more_often_joins_its_curve():
    def row(seconds, score=None):
        found = {} if score is None else {"evaluation": {"tasks": {"overall": score}}}
        return {"seconds": seconds, "forwards_per_image": 10.0, **found}

    log = [row(5), row(10), row(15), row(20, 0.5), row(25)]
    early = [row(7), row(14, 0.44), row(21)]  # on a slower day
    summary = {"before": {"tasks": {"overall": 0.4}}, "after": {"tasks": {"overall": 0.6}}}
    joined = read_curve(log, summary, 2, early=early)
    assert joined.score == [0.4, 0.44, 0.5, 0.6]
    assert joined.cost["seconds"] == [0, 10, 20, 25]
    assert joined.cost["images"] == [0, 4, 8, 10]
    assert joined.to_reach(0.44, "forwards") == pytest.approx(40)
    # what comes after the first evaluation of its own is left out
    late = [row(5), row(10), row(15), row(20, 0.7)]
    assert read_curve(log, summary, 2, early=late) == read_curve(log, summary, 2)


def test_json_has_finite_numbers():
    assert finite(1.23456) == 1.235
    assert finite(math.inf) is None
    assert finite(math.nan) is None
    assert finite(None) is None


def test_a_curve_is_read_from_a_run():
    log = [
        {"seconds": 10.0, "forwards_per_image": 8.0},
        {"seconds": 20.0, "forwards_per_image": 8.0, "evaluation": {"tasks": {"overall": 0.5}}},
        {"seconds": 31.0, "forwards_per_image": 4.0},
    ]
    summary = {"before": {"tasks": {"overall": 0.4}}, "after": {"tasks": {"overall": 0.6}}}
    curve = read_curve(log, summary, 3)
    assert curve.score == [0.4, 0.5, 0.6]
    assert curve.cost == {
        "seconds": [0.0, 20.0, 31.0],
        "images": [0.0, 6.0, 9.0],
        "forwards": [0.0, 48.0, 60.0],
    }


def test_arms_are_compared_seed_by_seed_and_alike_where_one_is_scored_more_often():
    def curve(*points):
        cost = [float(at) for at, _ in points]
        return Curve([score for _, score in points], dict.fromkeys(awm.UNITS, cost))

    slow = curve((0, 0.4), (100, 0.5))
    close, rare = curve((0, 0.4), (10, 0.5), (50, 0.6)), curve((0, 0.4), (50, 0.6))
    arms = {
        "awm": {"curves": [close, close], "alike": [rare, rare]},
        "flow_grpo": {"curves": [slow]},
        "released awm": {"curves": [rare, rare]},
        "released flow_grpo": {"curves": [slow, slow]},
    }
    found = awm.compare(arms)
    assert set(found["awm over flow_grpo"]) == set(awm.UNITS)
    assert found["awm over flow_grpo"]["seconds"] == [pytest.approx(10)]
    assert found["awm over flow_grpo, scored alike"]["seconds"] == [pytest.approx(4)]
    assert found["released awm over released flow_grpo"]["images"] == [pytest.approx(4)] * 2
    assert len(found) == 7
