"""Search for a plan: limits, candidates, the search on a fake clock, acceptance, and its files."""

import json
import os
import shutil
import signal
from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch

import diffalign
from diffalign.acceleration.drawing import Call, draw
from diffalign.acceleration.state import differences, state_of
from diffalign.cli import main
from diffalign.cli import optimise as verb
from diffalign.core.errors import UsageError
from diffalign.core.interruption import Interrupted
from diffalign.data.prompts import Prompt
from diffalign.evaluation import intervals
from diffalign.evaluation.front import Mark, scatter
from diffalign.optimisation import candidates, measuring, saving
from diffalign.optimisation import run as run_module
from diffalign.optimisation.acceptance import Verdict, check_power, compare, estimate
from diffalign.optimisation.candidates import AXES, Candidate, Level, check_axes, levels_of
from diffalign.optimisation.choice import choose, distance, keeps_budget, nearest
from diffalign.optimisation.kept import Kept
from diffalign.optimisation.limits import Limits
from diffalign.optimisation.memory import peak_bytes
from diffalign.optimisation.run import Settings, optimise, parts_of
from diffalign.optimisation.search import Point, front, search
from diffalign.pipelines.drawing import Drawing
from diffalign.types import RewardOutput, no_reward

ANIMALS = ("cat", "dog", "bird", "fox", "cow", "hen")
PROMPTS = [Prompt(f"a {animal}", {"tag": "colors"}) for animal in ANIMALS]
STEPS = 12
QUALITY = "psnr>=5,bright>=-0.5"


def shorten(monkeypatch):
    """Repeat less of what is measured; times of the fake clock do not vary."""
    monkeypatch.setattr(measuring, "ROUNDS", 2)
    monkeypatch.setattr(intervals, "RESAMPLES", 100)
    monkeypatch.setattr(candidates, "RATIOS", (1.5, 2.4))
    monkeypatch.setattr(candidates, "SHARES", (0.5,))


@pytest.fixture
def quick(monkeypatch):
    """Shortened measurements."""
    shorten(monkeypatch)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """One search: its folder, result, model, and the model's state before."""
    folder, model = tmp_path_factory.mktemp("found"), tiny.sd3_model()
    clock = RowClock(model)
    before = state_of(model.pipeline)
    with pytest.MonkeyPatch.context() as monkeypatch:
        shorten(monkeypatch)
        result = run(folder, model, clock=clock, quality=QUALITY, score=brightness)
    return folder, result, model, before


@pytest.fixture
def folder(found, tmp_path):
    """Copy of the folder of the search."""
    shutil.copytree(found[0], tmp_path / "copy")
    return tmp_path / "copy"


class RowClock:
    """Clock whose seconds are the rows that the denoiser computed."""

    def __init__(self, model):
        self.now = 0.0
        model.denoiser.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.now += len(args[0] if args else kwargs["hidden_states"])

    def __call__(self):
        return self.now


def drawing(**kwargs):
    return Drawing(
        **{"num_inference_steps": STEPS, "guidance_scale": 4.0, "micro_batch_size": 4, **kwargs}
    )


def settings(quality="psnr>=5", budget=None, **kwargs):
    given = {"axes": ("steps", "cache", "guidance"), "images": 3, "minutes": None}
    return Settings(Limits.parse(budget, quality), **given | kwargs)


def brightness(images, prompts, metadata):
    values = images.float().mean((1, 2, 3)).numpy() / 255
    correct = (values > 0.5).astype(np.float32)
    return RewardOutput(values, {"bright": values, "bright/correct": correct})


def run(folder, model=None, **kwargs):
    model = model or tiny.sd3_model()
    score = kwargs.pop("score", no_reward)
    clock = kwargs.pop("clock", None) or RowClock(model)
    given = settings(**kwargs)
    return optimise(model, PROMPTS, score, given, drawing(), folder, clock=clock)


def test_limits_are_read_in_seconds_and_bytes():
    limits = Limits.parse("latency<1500ms, memory<=16GiB", "psnr>=30,clip_score>=-0.005,a.py:f>=0")
    assert limits == Limits(1.5, 16 * 2**30, 30.0, {"clip_score": -0.005, "a.py:f": 0.0})
    assert Limits.parse("memory<2GB", "geneval>=-0.01") == Limits(
        memory=2e9, differences={"geneval": -0.01}
    )
    assert str(limits) == "latency<1.5s, memory<16GiB, psnr>=30, clip_score>=-0.005, a.py:f>=0"


@pytest.mark.parametrize(
    ("budget", "quality", "words"),
    [
        ("latency<1.5", "psnr>=30", "has no unit"),
        ("latency<1.5GiB", "psnr>=30", "unit 'GiB'"),
        ("latency>1.5s", "psnr>=30", "is no limit of latency or memory"),
        ("speed<3s", "psnr>=30", "is no limit of latency or memory"),
        ("latency<0s", "psnr>=30", "no positive number"),
        ("latency<nans", "psnr>=30", "no positive number"),
        ("latency<1s,latency<2s", "psnr>=30", "two limits"),
        ("latency<1s,,", "psnr>=30", "empty"),
        ("", "psnr>=30", "empty"),
        (None, "psnr", "is not NAME>=VALUE"),
        (None, "psnr<=30", "is not NAME>=VALUE"),
        (None, "psnr>=high", "'high' is no number"),
        (None, "psnr>=-3", "positive number of dB"),
        (None, "psnr>=3,psnr>=4", "two limits"),
        (None, "clip_score>=0.3", "asks for a gain"),
    ],
)
def test_a_wrong_limit_says_what_to_write(budget, quality, words):
    with pytest.raises(UsageError, match=words) as error:
        Limits.parse(budget, quality)
    assert "Write for instance" in str(error.value)
    assert str(error.value).startswith(("budget=", "quality="))


def test_unknown_options_are_refused_with_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'guidance'"):
        check_axes(["guidence"])
    with pytest.raises(UsageError, match="no option to try"):
        check_axes([])
    assert verb.AXES == AXES


def test_levels_extend_a_candidate_once_each():
    plain = Candidate(28)
    half = Level("steps", 0.5).on(plain, plain_steps=28)
    assert half == Candidate(14)
    assert Level("steps", 0.75).on(half, plain_steps=28) is None
    cached = Level("cache", 2.0).on(plain, plain_steps=28)
    assert cached.computed == 14
    assert Level("cache", 1.5).on(cached, plain_steps=28) is None
    assert Level("steps", 0.5).on(cached, plain_steps=28) == Candidate(14, (), 7)
    # too few steps for a cache, whichever comes first
    assert Level("cache", 2.0).on(Candidate(8), plain_steps=28) is None
    assert Level("steps", 0.5).on(Candidate(16, (), 8), plain_steps=16) is None
    assert Level("steps", 0.36).on(Candidate(4), plain_steps=4) is None
    both = Level("quantize", "int8").on(Candidate(28, (("guidance", "reuse"),)), plain_steps=28)
    assert both.options == (("quantize", "int8"), ("guidance", "reuse"))
    assert both.text(28) == "quantize int8, guidance reuse"
    assert plain.text(28) == "plain"


def test_options_that_gain_nothing_on_a_cpu_are_not_tried():
    assert {v.axis for v in levels_of("cpu", memory=False)} == {"steps", "cache", "guidance"}
    assert {v.axis for v in levels_of("cpu", memory=True)} >= {"quantize", "vae"}
    assert {v.axis for v in levels_of("cuda", memory=True)} == set(AXES)


def points_of(ratios):
    """Points of a model in which times multiply and errors add."""

    def measure(candidate):
        gains = dict(candidate.options) | {"cache": candidate.computed, "steps": candidate.steps}
        if gains["steps"] == 10:
            return Point(candidate, problem="broken")
        ratio = float(np.prod([ratios.get((k, v), 1.0) for k, v in gains.items()]))
        return Point(candidate, ratio, 1 / ratio, None, 60 - 20 * np.log(ratio))

    return measure


def test_the_search_combines_what_gains_alone():
    ratios = {
        ("cache", 10): 2.0,
        ("guidance", "interval"): 1.5,
        ("guidance", "reuse"): 0.9,
        ("steps", 14): 1.8,
        ("cache", 5): 1.9,
    }
    levels = [
        *(Level("steps", share) for share in (0.5, 0.36)),
        Level("cache", 2.8),
        *(Level("guidance", kind) for kind in ("interval", "reuse")),
    ]
    plain, asked = Point(Candidate(28), 1.0, 1.0, None, 150.0), []
    measure = points_of(ratios)

    def noting(candidate):
        asked.append(candidate)
        return measure(candidate)

    points = search(plain, levels, noting, ends=lambda: False)
    assert len(asked) == len(set(asked))
    best = max(points, key=lambda p: p.ratio).candidate
    assert best == Candidate(14, (("guidance", "interval"),), 5)
    # neither what lost time alone nor what was broken is combined
    assert not any(("guidance", "reuse") in c.options and len(c.axes) > 1 for c in asked)
    assert [c for c in asked if c.steps == 11] == [Candidate(11)]
    again = search(plain, levels, measure, ends=lambda: False)
    assert [p.candidate for p in again] == [p.candidate for p in points]
    assert search(plain, levels, measure, ends=lambda: True) == [plain]


def test_the_front_holds_what_no_other_beats():
    places = [(1.0, 150), (0.5, 40), (0.6, 30), (0.3, 20), (0.3, 25)]
    points = [Point(Candidate(i), 1 / x, x, 2, y) for i, (x, y) in enumerate(places)]
    assert [p.candidate.steps for p in front(points)] == [4, 1, 0]
    small = Point(Candidate(9), 1.0, 2.0, 1, 10)
    assert small not in front([*points, small])
    assert small in front([*points, small], memory=True)


def a_point(steps, latency, psnr, *, viable=True):
    refuted = {} if viable else {"psnr": Verdict(30, estimate(np.full(9, 10.0), list("abcdefghi")))}
    return Point(Candidate(steps), 1 / latency, latency, None, psnr, refuted)


@pytest.mark.parametrize("best", range(1, 8))
def test_the_fastest_accepted_point_is_found_by_halving(best):
    points = [a_point(100, 1.0, 150.0)] + [a_point(i, 0.1 * i, 10.0 * i) for i in range(1, 9)]
    tests = []

    def test(point):
        tests.append(point.candidate.steps)
        low = 40.0 if point.candidate.steps >= best else 20.0
        verdict = Verdict(30.0, estimate(np.full(9, low), list("abcdefghi")))
        return Point(
            point.candidate,
            point.ratio,
            point.latency,
            None,
            point.psnr,
            {},
            None,
            {"psnr": verdict},
        )

    best_point, tested = choose(points, Limits(psnr=30.0), test)
    assert best_point.candidate.steps == best
    assert len(tests) <= 4
    assert [p.candidate.steps for p in tested] == tests
    # within a budget the point nearest to the plain images is tested first
    tests.clear()
    best_point, _ = choose(points, Limits(latency=0.75, psnr=30.0), test)
    assert tests[0] == 7
    assert best_point is None or best_point.candidate.steps == 7


def test_what_the_search_refutes_or_the_budget_excludes_is_not_tested():
    points = [a_point(100, 1.0, 150.0), a_point(1, 0.1, 10.0, viable=False), a_point(2, 0.5, 20.0)]
    assert choose(points, Limits(latency=0.3), lambda p: pytest.fail("tested")) == (None, [])
    assert not keeps_budget(points[2], Limits(memory=1.0))
    assert nearest(points, [], Limits(latency=0.45, psnr=30)).candidate == Candidate(2)
    assert distance(points[0], Limits(latency=2.0)) == 0


def test_an_estimate_is_a_mean_with_a_bootstrap_over_prompts():
    rng = np.random.default_rng(0)
    values, prompts = rng.normal(1, 1, 200), [str(i // 2) for i in range(200)]
    found = estimate(np.append(values, np.nan), [*prompts, "x"])
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.reshape(100, 2).mean(1).std() / 10
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    # a mean of tasks' means, and half pairs that keep a few equal pairs from looking certain
    tasks = ["a"] * 3 + ["b"]
    assert estimate(np.array([1.0, 1, 1, 0]), list("wxyz"), tasks=tasks).value == pytest.approx(0.5)
    equal = estimate(np.zeros(50), [str(i) for i in range(50)], shares=True)
    assert -0.05 < equal.low < -0.02
    assert estimate(np.zeros(50), [str(i) for i in range(50)]).low == 0


def test_too_few_images_for_a_limit_are_refused_at_once():
    limits = Limits(differences={"geneval": -0.01})
    prompts = [Prompt(str(i), {"tag": "colors"}) for i in range(50)]
    with pytest.raises(UsageError, match="cannot show a loss below 0.01") as error:
        check_power(limits, prompts)
    needed = int(str(error.value).split("Draw about ")[1].split()[0])
    more = [Prompt(str(i), {"tag": "colors"}) for i in range(needed + 30)]
    check_power(limits, more)
    check_power(Limits(psnr=30.0), prompts)


def test_a_reward_without_values_is_an_error():
    own = {"psnr": np.full(4, 40.0), "bright": np.full(4, np.nan)}
    with pytest.raises(UsageError, match="0 of 4 pairs"):
        compare(Limits(differences={"bright": -0.1}), own, own, PROMPTS)
    with pytest.raises(UsageError, match="no reward gives this value"):
        compare(Limits(differences={"dark": -0.1}), own, own, PROMPTS)


def test_measurements_are_kept_by_all_that_they_depend_on(tmp_path):
    store = Kept(tmp_path, key=1, clock=iter(range(99)).__next__)
    assert store.get("a", lambda: {"x": (1, 2)}) == {"x": [1, 2]}
    assert store.get("a", lambda: pytest.fail("made again")) == {"x": [1, 2]}
    assert (store.new, store.seconds) == (1, 1)
    assert Kept(tmp_path, key=2, clock=store._clock).get("a", lambda: {"x": 3}) == {"x": 3}
    again = Kept(tmp_path, key=1, clock=store._clock)
    store.file("a", ".json").write_text('{"made"')
    assert again.get("a", lambda: {"x": 4}) == {"x": 4}
    # a measurement inside of another counts once
    outer = Kept(tmp_path / "b", key=1, clock=iter(range(0, 990, 10)).__next__)
    outer.get("o", lambda: outer.get("i", lambda: {}))
    assert outer.seconds == 30
    later = Kept(tmp_path / "b", key=1, clock=store._clock)
    later.get("o", lambda: pytest.fail("made again"))
    assert later.seconds == 30


def test_memory_is_the_peak_of_the_call():
    def large():
        return torch.ones(50_000_000).sum()

    small = peak_bytes(lambda: None, torch.device("cpu"))
    if small is None:
        pytest.skip("this system does not tell")
    assert peak_bytes(large, torch.device("cpu")) - small > 150_000_000


def test_a_plan_is_found_and_the_pipeline_is_plain_again(found, folder):
    _, result, model, before = found
    assert differences(before, state_of(model.pipeline)) == []
    assert result.choice is not None
    assert result.choice.accepted
    # seconds are rows, so that ratios are exact
    assert result.plain.latency == 2 * STEPS
    singles = {result.name(p): p.ratio for p in result.points}
    assert singles["6 steps"] == 2.0
    assert singles["cache 8 of 12"] == 1.5
    assert singles["guidance reuse"] == pytest.approx(24 / 18)
    assert result.choice.ratio >= 2
    record = saving.write(result, folder, model="tiny")
    assert json.loads((folder / saving.RESULT).read_text()) == json.loads(json.dumps(record))
    page = (folder / saving.PAGE).read_text()
    assert result.name(result.choice) in page
    assert "<svg" in page


def test_the_plan_draws_what_was_measured(found, folder):
    _, result, model, _ = found
    result.plan.save(folder)
    clock = RowClock(model)
    call = Call(result.plan.steps, *model.default_size, ("a cat",), dict(result.call.arguments), 3)
    with diffalign.accelerated(model.pipeline, folder):
        draw(model.pipeline, call)
    assert 2 * STEPS / clock.now == pytest.approx(result.choice.ratio)


@pytest.mark.usefixtures("quick")
def test_the_same_measurements_give_the_same_plan(found, folder, monkeypatch):
    first = found[1]
    monkeypatch.setattr(measuring, "draw", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(measuring, "Calibration", lambda *_: pytest.fail("calibrated again"))
    again = run(folder, quality=QUALITY, score=brightness)
    assert again.plan.to_json() == first.plan.to_json()
    assert [p.to_dict(STEPS) for p in again.points] == [p.to_dict(STEPS) for p in first.points]
    assert again.seconds == first.seconds


@pytest.mark.usefixtures("quick")
def test_an_interrupted_search_goes_on(found, folder):
    # as if a kill had come before the last measurements, and in the middle of writing one
    files = sorted((folder / "measurements").glob("*.json"), key=lambda f: f.stat().st_mtime_ns)
    for file in files[-4:]:
        file.unlink()
    files[-5].write_text('{"made": {"psn')
    times = {file: file.stat().st_mtime_ns for file in files[:-5]}
    result = run(folder, quality=QUALITY, score=brightness)
    assert {file: file.stat().st_mtime_ns for file in files[:-5]} == times
    assert result.plan.options == found[1].plan.options
    assert result.plan.steps == found[1].plan.steps


@pytest.mark.usefixtures("quick")
def test_a_signal_ends_after_the_measurement_in_progress(tmp_path, signals, monkeypatch):
    timed = measuring.Meter._timed

    def signalling(self, candidate):
        os.kill(os.getpid(), signal.SIGTERM)
        return timed(self, candidate)

    monkeypatch.setattr(measuring.Meter, "_timed", signalling)
    with pytest.raises(Interrupted, match="1 measurements are kept"):
        run(tmp_path)


@pytest.mark.usefixtures("quick")
def test_an_option_that_fails_is_left_out_and_told(tmp_path, monkeypatch):
    def failing(self, candidate):
        if candidate.computed is not None:
            raise ValueError("no such cache\nsecond line")
        return usual(self, candidate)

    usual = measuring.Meter._timed
    monkeypatch.setattr(measuring.Meter, "_timed", failing)
    result = run(tmp_path, axes=("cache",))
    problems = {result.name(p): p.problem for p in result.points if p.problem is not None}
    assert set(problems.values()) == {"no such cache"}
    assert "left out, no such cache" in str(saving.rows(result))
    assert result.choice is None or result.choice.candidate.computed is None


@pytest.mark.usefixtures("quick")
def test_rules_exclude_before_anything_is_measured(tmp_path):
    model = tiny.flux_model()
    result = run(tmp_path, model, axes=("guidance",))
    assert {p.problem.partition(";")[0] for p in result.points[1:]} == {
        "this call has no second half of the batch for guidance"
    }
    assert result.choice is None
    assert result.nearest.candidate == Candidate(STEPS)


@pytest.mark.usefixtures("quick")
def test_an_impossible_budget_names_the_nearest_point(folder):
    result = run(folder, budget="latency<2s", quality=QUALITY, score=brightness)
    assert result.choice is None
    assert result.plan is None
    error = saving.not_reached(result)
    assert error.exit_code == 1
    for words in ("no point keeps latency<2s", "The nearest is", "fastest point", "Widen the"):
        assert words in str(error)
    (folder / "acceleration.json").write_text("an earlier plan")
    saving.write(result, folder, model="tiny")
    assert not (folder / "acceleration.json").exists()


@pytest.mark.usefixtures("quick")
def test_the_verb_writes_its_files_and_ends_with_its_status(tmp_path, base, prompts, capsys):
    out = tmp_path / "fast"
    words = ["optimise", "--model", str(base), "--prompts", str(prompts), "--output_dir", str(out)]
    words += [
        "--num_inference_steps",
        "10",
        "--height",
        "16",
        "--width",
        "16",
        "--dtype",
        "float32",
    ]
    words += ["--options", "steps", "--search_images", "2", "--guidance_scale", "1"]
    assert main([*words, "--quality", "psnr>=1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["chosen"]["ratio"] > 0
    assert {f.name for f in out.iterdir()} >= {"acceleration.json", "optimise.json", "front.html"}
    assert main([*words, "--quality", "psnr>=149"]) == 1
    error = capsys.readouterr().err
    assert "diffalign: error: no point keeps psnr>=149" in error
    assert "--quality" in error
    assert main([*words, "--budget", "latency<fast"]) == 2
    assert "--budget=latency<fast" in capsys.readouterr().err
    assert main([*words, "--quality", "verifyer>=-1"]) == 2
    assert "verifier" in capsys.readouterr().err


def test_a_scatter_places_marks_by_their_values():
    marks = [
        Mark("a", 1.0, 40.0, "front"),
        Mark("b", 2.0, 100.0, "plain"),
        Mark("c", 2.0, 30.0, "other"),
    ]
    chart = scatter(marks, x_label="s", y_label="dB")
    places = {m.name: (m.x, m.y) for m in chart.marks}
    assert places["a"][0] < places["b"][0]
    assert places["c"][1] > places["a"][1] > places["b"][1]
    assert len(chart.line.split()) == 2
    assert all(a.place < b.place for a, b in pairwise(chart.x_ticks))


def test_parts_share_no_prompt_and_mix_the_tasks():
    prompts = [Prompt(f"{task} {i}", {"tag": task}) for task in "abc" for i in range(40)]
    given = settings(images=12)
    searched, held_out = parts_of(prompts, given, drawing(images_per_task=20))
    assert not {p.text for p in searched.prompts} & {p.text for p in held_out.prompts}
    assert len(searched.prompts) == 12
    assert len(held_out.prompts) == 60
    # any quarter of the held-out images is like all of them
    assert {p.task for p in held_out.prompts[:15]} == {"a", "b", "c"}
    assert parts_of(prompts, given, drawing(images_per_task=20)) == (searched, held_out)
    other = parts_of(prompts, given, drawing(images_per_task=20, seed=1))[1]
    assert other.seed != held_out.seed
    assert other.prompts != held_out.prompts


@pytest.mark.usefixtures("quick")
def test_a_hopeless_point_is_left_before_all_images_are_drawn(folder, monkeypatch):
    monkeypatch.setattr(run_module, "CERTAIN", 0.5)
    model, drawn, told = tiny.sd3_model(), [], []
    many = [Prompt(f"a {animal} {i}") for animal in ANIMALS for i in range(8)]
    usual = measuring.Meter._drawn
    monkeypatch.setattr(
        measuring.Meter, "_drawn", lambda s, c, p: drawn.append(p.name) or usual(s, c, p)
    )
    # as if the images of the search had refuted nothing
    monkeypatch.setattr(Point, "viable", property(lambda point: point.problem is None))
    given = settings(axes=("steps",), images=1, quality="psnr>=140")
    result = optimise(
        model, many, no_reward, given, drawing(), folder, clock=RowClock(model), say=told.append
    )
    assert result.choice is None
    assert len(result.tested) == 1
    held_out = [name for name in drawn if name.startswith("held-out")]
    assert held_out == ["held-out-0", "held-out-1"]
    assert "not accepted" in told[-1]
