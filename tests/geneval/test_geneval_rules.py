"""GenEval's rules on a table of boxes; expected values derived by hand from the paper's section 3."""

import pytest

from diffalign.geneval.rules import Detection, judge, relative_position, summarize


@pytest.mark.parametrize(
    ("box", "target", "expected"),
    [
        # offset (30, 0), less 0.1 * (100 + 100) = 20: revised (10, 0), over 30 = 0.33
        ([30, 0, 130, 100], [0, 0, 100, 100], set()),
        # offset (60, 0): revised (40, 0), over 60 = 0.67
        ([60, 0, 160, 100], [0, 0, 100, 100], {"right of"}),
        # offset (15, 0), less 20 (sizes 100 + 100): nothing is left
        ([15, 0, 115, 100], [0, 0, 100, 100], set()),
        ([0, 0, 100, 100], [0, 0, 100, 100], set()),
        ([0, 0, 10, 10], [50, 0, 60, 10], {"left of"}),
        ([0, 50, 10, 60], [0, 0, 10, 10], {"below"}),
        ([0, 0, 10, 10], [0, 50, 10, 60], {"above"}),
        # a diagonal of (50, 50): revised (48, 48) / 70.7 = 0.68 each
        ([50, 50, 60, 60], [0, 0, 10, 10], {"right of", "below"}),
        # (20, 40): revised (18, 38) / 44.7: 0.40 and 0.85
        ([20, 40, 30, 50], [0, 0, 10, 10], {"below"}),
    ],
)
def test_relative_position(box, target, expected):
    assert relative_position(box, target) == expected


def box(x, y=0, size=10):
    return (x, y, x + size, y + size)


A = {"class": "circle", "count": 1}
RED = {"class": "circle", "count": 1, "color": "red"}
TWO = {"include": [{"class": "circle", "count": 2}], "exclude": [{"class": "circle", "count": 3}]}
TWICE_LEFT = {
    "include": [
        {"class": "square", "count": 2},
        {"class": "circle", "count": 2, "position": ["left of", 0]},
    ]
}
LEFT = {
    "include": [
        {"class": "square", "count": 1},
        {"class": "circle", "count": 1, "position": ["left of", 0]},
    ]
}


def circle(x, color="red", score=1.0):
    return Detection("circle", box(x), score, color)


def square(x):
    return Detection("square", box(x), 1.0, "blue")


@pytest.mark.parametrize(
    ("metadata", "found", "correct", "strict", "score"),
    [
        ({"include": [A]}, [circle(0)], True, True, 1.0),
        ({"include": [A]}, [circle(0), circle(30)], True, False, 0.0),
        ({"include": [A]}, [], False, False, 0.0),
        ({"include": [A]}, [circle(0), circle(20), circle(40)], True, False, -1.0),
        (TWO, [circle(0), circle(30)], True, True, 1.0),
        (TWO, [circle(0)], False, False, 0.5),
        (TWO, [circle(0), circle(30), circle(50)], False, False, 0.5),
        ({"include": [RED]}, [circle(0)], True, True, 1.0),
        ({"include": [RED]}, [circle(0, "blue")], False, False, 0.5),
        ({"include": [RED]}, [], False, False, 0.0),
        # the most confident object decides officially; strictly, two are too many
        ({"include": [RED]}, [circle(0, "blue", 0.9), circle(30, "red", 0.8)], False, False, 0.0),
        ({"include": [RED]}, [circle(0, "blue", 0.8), circle(30, "red", 0.9)], True, False, 0.0),
        (LEFT, [circle(0), square(40)], True, True, 1.0),
        # a misplaced object scores 2/3; the released code appends 0 and then 1 and so gives 0.75
        (LEFT, [circle(40), square(0)], False, False, 2 / 3),
        (LEFT, [circle(0)], False, False, 1 / 3),
        # overlaps are not suppressed: two boxes of one thing, nine tenths of them in common, are two objects
        (TWO, [circle(0), circle(0.5)], True, True, 1.0),
        (TWO, [circle(0), circle(0), circle(0)], False, False, 0.5),
        # every pair must hold: two circles left of two squares
        (TWICE_LEFT, [circle(0), circle(12), square(40), square(60)], True, True, 1.0),
        # the second circle is left of one square and not of the other: three pairs of four are not enough
        (TWICE_LEFT, [circle(0), circle(50), square(40), square(80)], False, False, 2 / 3),
        # officially the two best of each class are compared; strictly, three squares are too many: (1 + 1/2 + 0) / 3
        (
            TWICE_LEFT,
            [circle(20), circle(30), square(50), square(70), Detection("square", box(0), 0.5)],
            *(True, False, 0.5),
        ),
    ],
)
def test_judge(metadata, found, correct, strict, score):
    verdict = judge(found, metadata)
    assert (verdict.correct, verdict.strict) == (correct, strict)
    assert verdict.score == pytest.approx(score)
    assert bool(verdict.reasons) != correct


def test_overall_is_the_plain_mean_of_the_tasks():
    result = summarize(["counting", "counting", "colors"], [True, False, True])
    assert result == {"counting": 0.5, "colors": 1.0, "overall": 0.75}


def test_summary_refuses_lists_of_different_length():
    with pytest.raises(ValueError, match="2 tasks but 1 results"):
        summarize(["a", "b"], [True])
