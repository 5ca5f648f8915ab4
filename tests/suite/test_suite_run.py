"""Whole benchmarks on Shapes: equal to the verifier, resumable, comparable, and honest about what is missing."""

import json
import os
import signal

import numpy as np
import pytest
from PIL import Image

from diffalign.core.interruption import Interrupted
from diffalign.evaluation.geneval import sample_path
from diffalign.evaluation.suite import answers, run, summarize
from diffalign.evaluation.suite.base import SuiteError
from diffalign.evaluation.suite.compare import compare
from diffalign.evaluation.suite.known import check_judge
from diffalign.evaluation.suite.registry import available, benchmark
from diffalign.evaluation.suite.run import Plan, evaluate, prompts_of
from diffalign.judges.base import Judge, JudgeCard, JudgeError, Reply
from diffalign.judges.exact import ExactJudge
from diffalign.judges.recorded import RecordedJudge
from diffalign.shapes.verifier import detect
from diffalign.shapes.world import render, sample_scene


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Intervals have tests of their own."""
    monkeypatch.setattr(summarize, "RESAMPLES", 200)


CHECKLIST = benchmark("shapes:checklist")
QUICK = Plan(quick=16)


def draw(folder, prompts, count):
    """Scenes instead of a model's images; every third is of another prompt."""
    rng = np.random.default_rng(0)
    for p, prompt in enumerate(prompts):
        for k in range(count):
            entry = prompts[0].metadata if (p + k) % 3 == 0 else prompt.metadata
            place = sample_path(folder, p, k)
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.is_file():
                Image.fromarray(render(sample_scene(entry, rng))).save(place)


def exact(bench, place):
    return dict.fromkeys(("words", "text"), ExactJudge())


def suite(folder, name="shapes:checklist", plan=QUICK, judges=exact, **more):
    return evaluate(benchmark(name), plan, folder, open_judges=judges, **{"draw": draw, **more})


class Counting(ExactJudge):
    """The exact judge that counts its questions, and dies after some."""

    at_once = 5

    def __init__(self, last=None):
        self.number, self.last = 0, last

    def answer(self, tasks):
        if self.last is not None and self.number >= self.last:
            raise JudgeError("gone")
        self.number += len(tasks)
        return super().answer(tasks)


def counted(judge):
    return lambda bench, place: dict.fromkeys(("words", "text"), judge)


def test_the_checklist_is_the_verifiers_share(tmp_path):
    result = suite(tmp_path)
    prompts = prompts_of(CHECKLIST, QUICK)[0]
    shares, whole = [], []
    for p, prompt in enumerate(prompts):
        path = sample_path(tmp_path / CHECKLIST.folder / run.IMAGES, p, 0)
        objects = detect(np.asarray(Image.open(path)))
        right = []
        for clause in prompt.metadata["include"]:
            mine = [o for o in objects if o.name == clause["class"]]
            right += [len(mine) == clause["count"], bool(mine)]
            if "color" in clause:
                right.append(bool(mine) and all(o.color == clause["color"] for o in mine))
            if "position" in clause:
                right.append(None)
        if None not in right:
            shares.append(np.mean(right))
            whole.append(all(right))
    rows = run.read_rows(tmp_path / CHECKLIST.folder / run.ROWS)
    am = [m.low for row in rows for m in row.measures if m.name == "am"]
    plain = [i for i, p in enumerate(prompts) if p.metadata["tag"] != "position"]
    np.testing.assert_allclose([am[i] for i in plain], shares, rtol=0, atol=1e-12)
    gm = [m.low for row in rows for m in row.measures if m.name == "gm"]
    assert [gm[i] == 1 for i in plain] == whole
    assert result["score"] == pytest.approx(np.mean(gm))
    assert result["answered"] == 1
    assert result["judge_check"]["right"] == result["judge_check"]["asked"] == 64
    assert result["chance"]["value"] < result["score"]


def test_a_killed_suite_ends_with_the_same_result(tmp_path):
    whole = suite(tmp_path / "whole")
    total = whole["asked"]
    dying = Counting(last=64 + 20)
    with pytest.raises(JudgeError, match="gone"):
        suite(tmp_path / "cut", judges=counted(dying))
    place = tmp_path / "cut" / CHECKLIST.folder
    [file] = place.glob("answers-*.jsonl")
    content = file.read_bytes()
    assert content.count(b"\n") == 20
    file.write_bytes(content[:-7])  # a process that was killed while it wrote
    second = Counting()
    result = suite(tmp_path / "cut", judges=counted(second))
    assert second.number == total - 19
    text = (tmp_path / "whole" / CHECKLIST.folder / run.RESULT).read_text()
    assert (place / run.RESULT).read_text() == text
    assert result["figures"] == whole["figures"]
    third = Counting()
    assert suite(tmp_path / "cut", judges=counted(third))["asked"] == third.number == 0


def test_another_rule_asks_nothing_where_questions_are_the_same(tmp_path):
    suite(tmp_path, "shapes:rubric")
    judge = Counting()
    plan = Plan(quick=16, variant="corrected")
    assert suite(tmp_path, "shapes:rubric", plan, counted(judge))["variant"] == "corrected"
    assert judge.number == 0


def test_recorded_replies_need_no_judge(tmp_path):
    first = suite(tmp_path)

    def recorded(bench, place):
        return {kind: RecordedJudge(c) for kind, c in run.recorded_cards(place).items()}

    again = suite(tmp_path, judges=recorded, draw=None)
    assert again["figures"] == first["figures"]
    # without replies there are bounds and no score
    for file in (tmp_path / CHECKLIST.folder).glob("answers-*"):
        file.unlink()
    empty = suite(tmp_path, judges=recorded, draw=None)
    assert empty["score"] is None
    assert empty["figures"]["am"]["value"] is None
    assert (empty["figures"]["am"]["least"], empty["figures"]["am"]["most"]) == (0, 1)
    with pytest.raises(JudgeError, match="has no replies"):
        run.recorded_cards(tmp_path)


def test_missing_and_broken_images_are_counted_and_never_scored(tmp_path):
    pictures = tmp_path / "images"
    prompts = prompts_of(CHECKLIST, QUICK)[0]
    draw(pictures, prompts, 1)
    sample_path(pictures, 3, 0).unlink()
    sample_path(pictures, 4, 0).write_bytes(b"\x89PNG broken")
    result = suite(tmp_path / "suite", draw=None, images=pictures)
    counts = {k: result["images"][k] for k in ("found", "missing", "unreadable")}
    assert counts == {"found": 14, "missing": 1, "unreadable": 1}
    assert result["figures"]["gm"]["known"] == 14
    assert result["figures"]["gm"]["least"] < result["figures"]["gm"]["most"]
    assert result["score"] is None  # 14 of 16 are less than 98 %
    assert result["first_error"] == answers.MISSING


class Yes(Judge):
    """A judge that says yes to everything."""

    card = JudgeCard("yes-sayer", None, ("words", "text"))

    def answer(self, tasks):
        return [
            Reply("Yes", *[tuple(float("Yes" in group) for group in q.words)] * 2) for q, _ in tasks
        ]


def test_a_judge_that_only_says_yes_is_refused(tmp_path):
    with pytest.raises(JudgeError, match="24 of 48 known yes/no questions are right"):
        check_judge(Yes())
    with pytest.raises(JudgeError, match="trust_judge"):
        suite(tmp_path, judges=counted(Yes()))
    assert not (tmp_path / CHECKLIST.folder / run.IMAGES).exists()  # before the first image
    assert check_judge(Yes(), trust=True)["yes_rate"] == 1


def test_chance_shows_a_judge_that_says_yes(tmp_path):
    result = suite(tmp_path, plan=Plan(quick=16, trust_judge=True), judges=counted(Yes()))
    attribute = result["figures"]["skill/attribute"]["value"]
    assert attribute == 1
    assert "value" in result["chance"]


def test_differences_are_paired_and_judges_are_never_mixed(tmp_path):
    suite(tmp_path / "a")

    def better(folder, prompts, count):
        rng = np.random.default_rng(0)
        for p, prompt in enumerate(prompts):
            place = sample_path(folder, p, 0)
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(render(sample_scene(prompt.metadata, rng))).save(place)

    suite(tmp_path / "b", draw=better)
    found = compare(tmp_path / "b", tmp_path / "a", CHECKLIST)["figures"]["gm"]
    assert found["value"] > 0
    assert found["lost"] == 0
    suite(tmp_path / "c", plan=Plan(quick=16, trust_judge=True), judges=counted(Yes()))
    with pytest.raises(SuiteError, match="another judge there"):
        compare(tmp_path / "c", tmp_path / "a", CHECKLIST)
    suite(tmp_path / "d", plan=Plan(quick=12))
    with pytest.raises(SuiteError, match="another questions there|another prompts there"):
        compare(tmp_path / "d", tmp_path / "a", CHECKLIST)
    with pytest.raises(SuiteError, match="has no result"):
        compare(tmp_path / "a", tmp_path / "nowhere", CHECKLIST)


def test_training_prompts_are_no_test():
    prompts = prompts_of(CHECKLIST, Plan())[0]
    text = run.normalised(prompts[0].text.upper() + "!")
    with pytest.raises(SuiteError, match="1 of 98 prompts are training prompts"):
        prompts_of(CHECKLIST, Plan(training_texts=frozenset({text})))


def test_trained_rewards_are_marked(tmp_path):
    plan = Plan(quick=16, trained_on=("p_yes", "jpeg", "shapes:checklist"))
    assert suite(tmp_path, plan=plan)["trained_on"] == ["p_yes", "shapes:checklist"]


def test_names_are_checked():
    assert "geneval2" in available()
    with pytest.raises(SuiteError, match="did you mean 'geneval2'"):
        benchmark("geneval-2")


def test_an_interrupted_suite_keeps_its_answers(tmp_path, signals):
    class Stopping(Counting):
        def answer(self, tasks):
            replies = super().answer(tasks)
            if self.number > 64 + 10:
                os.kill(os.getpid(), signal.SIGINT)
            return replies

    with pytest.raises(Interrupted, match="the same command asks the others"):
        suite(tmp_path, judges=counted(Stopping()))
    [file] = (tmp_path / CHECKLIST.folder).glob("answers-*.jsonl")
    assert all(json.loads(line) for line in file.read_text().splitlines())
