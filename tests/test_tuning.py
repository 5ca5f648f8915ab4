"""The search for factors: closed form, shared work, and what is accepted."""

import dataclasses
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchLCMScheduler,
    TCDScheduler,
)
from tiny import flux_model, sd_model

from diffalign.config import EvaluationConfig
from diffalign.data.prompts import Prompt
from diffalign.errors import UsageError
from diffalign.evaluation.score import render
from diffalign.schedulers import Coefficients, QSched
from diffalign.schedulers.closed_form import best_factors
from diffalign.tuning.evaluator import Drawing, Evaluator
from diffalign.tuning.objective import ObjectiveError
from diffalign.tuning.plot import check_plot, plot_history
from diffalign.tuning.start import closed_form
from diffalign.tuning.tune import Settings, accept, split, tune
from diffalign.types import RewardOutput

PROMPTS = [Prompt(f"a photo of {n} things") for n in range(6)]


def brightness(images, prompts, metadata):
    """Two terms that a step's factors move."""
    values = images.float().mean((1, 2, 3)).numpy()
    spread = images.float().std((1, 2, 3)).numpy()
    return RewardOutput(values, {"light": values, "spread": spread})


def drawing(**kwargs):
    return Drawing(
        **{"num_inference_steps": 3, "micro_batch_size": 4, "mixed_precision": "no"} | kwargs
    )


def flux():
    model = flux_model()
    model.pipeline.scheduler = QSched.wrap(model.pipeline.scheduler)
    return model


def evaluator(model, **kwargs):
    options = {k: kwargs.pop(k) for k in ("file", "key") if k in kwargs}
    terms = ["light", "spread"]
    return Evaluator(model, PROMPTS[:3], brightness, terms, drawing(**kwargs), **options)


# --- closed form


def test_closed_form_of_a_scaled_prediction():
    u, m = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    v = -0.3 * m
    assert best_factors(u, v, u + v) == pytest.approx((1, 1))
    assert best_factors(u, 1.25 * v, u + v) == pytest.approx((1, 0.8))
    assert best_factors(u, 1.25 * v, u + v, ridge=1e6) == pytest.approx((1, 1), abs=1e-3)
    expected = np.linalg.lstsq(torch.stack([u, v], 1).numpy(), (0.9 * u + 0.2).numpy(), rcond=None)[
        0
    ]
    assert best_factors(u, v, 0.9 * u + 0.2) == pytest.approx(tuple(expected), abs=1e-5)
    assert best_factors(u, 0 * v, u) == (1.0, 1.0)  # nothing to learn from


@pytest.mark.parametrize("family", ["flux", "flux lcm", "sd", "sd ancestral", "sd tcd"])
def test_closed_form_undoes_a_scaled_denoiser(family):
    """A denoiser whose output is kappa times the reference's: factors (1, 1 / kappa) at every step, and (1, 1) for the
    reference itself."""
    make = flux_model if family.startswith("flux") else sd_model
    model, reference = make(), make()
    if family == "flux lcm":
        model.pipeline.scheduler = FlowMatchLCMScheduler.from_config(
            model.pipeline.scheduler.config
        )
    elif family == "sd ancestral":
        model.pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(
            model.pipeline.scheduler.config
        )
    elif family == "sd tcd":
        model.pipeline.scheduler = TCDScheduler.from_config(model.pipeline.scheduler.config)
    elif family == "sd":
        model.pipeline.scheduler = DDIMScheduler.from_config(
            model.pipeline.scheduler.config, clip_sample=False
        )
    model.pipeline.scheduler = QSched.wrap(model.pipeline.scheduler)
    same = closed_form(evaluator(model), reference, ridge=0.0)
    assert same.vector == pytest.approx([1] * 6, abs=2e-3)
    model.denoiser.register_forward_hook(lambda module, args, out: (out[0] * 0.8,))
    found = closed_form(evaluator(model), reference, ridge=0.0)
    assert found.sample == pytest.approx((1, 1, 1), abs=5e-3)
    assert found.model_output == pytest.approx((1.25,) * 3, abs=1e-2)


@pytest.mark.parametrize("scale", [0.01, -1.0, float("nan")])
def test_closed_form_of_a_broken_denoiser_is_still_factors(scale):
    """Where least squares would take a factor out of all sense, or there is nothing to solve."""
    model = flux()
    model.denoiser.register_forward_hook(lambda module, args, out: (out[0] * scale,))
    found = closed_form(evaluator(model), flux_model(), ridge=0.0)
    assert all(0.1 <= v <= 10 for v in found.vector)
    if np.isnan(scale):
        assert found.identity


def test_closed_form_wants_the_same_kind_of_model():
    with pytest.raises(UsageError, match="sd model cannot stand for a flux"):
        closed_form(evaluator(flux()), sd_model())


# --- evaluator


def test_scores_are_those_of_the_plain_pipeline_with_the_factors():
    """Shared batches and the reused first prediction change nothing."""
    model = flux()
    candidates = [
        Coefficients.ones(3),
        Coefficients.ramp(0.9, 1.1, 3),
        Coefficients.ramp(1.1, 0.8, 3),
    ]
    found = evaluator(model)(candidates)
    for candidate, scores in zip(candidates, found, strict=True):
        model.pipeline.scheduler.set_coefficients(candidate)
        check = evaluator(model)
        run, generators = check.batch(range(3))
        images = model.decode(run.draw(generators))
        np.testing.assert_allclose(scores["light"], brightness(images, [], []).values, rtol=1e-5)
        model.pipeline.scheduler.clear_coefficients()


@pytest.mark.parametrize("make", [flux_model, sd_model])
def test_the_reused_first_prediction_changes_no_bit(make, monkeypatch):
    """In batches that hold the same images with it and without."""
    candidates = [Coefficients.ones(3), Coefficients.ramp(0.9, 1.1, 3)]
    found = []
    stock = Evaluator._images
    for reused in (True, False):
        model = make()
        if make is sd_model:
            model.pipeline.scheduler = DDIMScheduler.from_config(
                model.pipeline.scheduler.config, clip_sample=False
            )
        model.pipeline.scheduler = QSched.wrap(model.pipeline.scheduler)
        counted = calls(model)
        if not reused:
            monkeypatch.setattr(
                Evaluator, "_images", lambda self, images, first: stock(self, images, None)
            )
        found.append(evaluator(model, micro_batch_size=3)(candidates))
        assert len(counted) == 1 + 2 * (2 if reused else 3)
    for a, b in zip(*found, strict=True):
        for term in ("light", "spread"):
            assert np.array_equal(a[term], b[term])


def test_batches_do_not_matter():
    model = flux()
    candidates = [
        Coefficients.ones(3),
        Coefficients.ramp(0.9, 1.1, 3),
        Coefficients.ramp(1.1, 0.8, 3),
    ]
    a = evaluator(model, micro_batch_size=2)(candidates)
    b = evaluator(model, micro_batch_size=64)(candidates)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x["light"], y["light"], rtol=1e-4)


def test_network_rows_are_counted():
    model = flux()
    found = evaluator(model)
    found([Coefficients.ones(3)])
    assert found.network_rows == 3 * 3
    found([Coefficients.ramp(0.9, 1, 3), Coefficients.ramp(0.9, 1, 3), Coefficients.ones(3)])
    assert found.network_rows == 3 * 3 + 3 * 2  # the first call is known, and so are two candidates


def test_a_search_goes_on_where_it_was(tmp_path):
    model, file = flux(), tmp_path / "scores.jsonl"
    first = evaluator(model, file=file)
    known = first([Coefficients.ones(3), Coefficients.ramp(0.9, 1, 3)])
    with file.open("a") as f:
        f.write('{"key": "cut')  # by a crash
    again = evaluator(model, file=file)
    assert again.known == 2
    again([Coefficients.ramp(1.1, 1, 3)])  # and the cut line does not swallow what follows
    assert evaluator(model, file=file).known == 3
    again = evaluator(model, file=file)
    assert again([Coefficients.ones(3)])[0]["light"].tolist() == known[0]["light"].tolist()
    assert again.network_rows == 0
    assert evaluator(model, file=file, key="another model").known == 0
    assert evaluator(model, file=file, seed=1).known == 0


@pytest.mark.parametrize(
    "line",
    [
        "12",
        "[]",
        '{"key": "KEY"}',
        '{"key": "KEY", "candidate": "a", "scores": {"light": 1}}',
        "\ufffd",
    ],
)
def test_damaged_lines_are_left_out(line, tmp_path):
    model, file = flux(), tmp_path / "scores.jsonl"
    first = evaluator(model, file=file)
    first([Coefficients.ones(3)])
    with file.open("a") as f:
        f.write(line.replace("KEY", first.key) + "\n")
    assert evaluator(model, file=file).known == 1


def test_what_could_not_be_scored_is_tried_again_by_the_next_search(tmp_path):
    model, file = flux(), tmp_path / "scores.jsonl"
    away = True

    def score(images, prompts, metadata):
        found = brightness(images, prompts, metadata)
        if away:
            found.details["light"][-1] = np.nan
        return found

    def search():
        terms = ["light", "spread"]
        return Evaluator(model, PROMPTS[:3], score, terms, drawing(), file=file)

    ones = [Coefficients.ones(3)]
    first = search()
    assert np.isnan(first(ones)[0]["light"][-1])
    spent = first.network_rows
    first(ones)
    assert first.network_rows == spent  # not within one search
    away = False
    second = search()
    assert second.known == 0
    assert np.isfinite(second(ones)[0]["light"]).all()
    assert search().known == 1


@pytest.mark.parametrize("other", [None, 3.0])
def test_scores_of_another_schedule_are_no_scores_of_this(other, tmp_path):
    """The same weights and class of scheduler, but a setting that moves its timesteps."""
    file, settings = tmp_path / "scores.jsonl", Settings({"spread": 1.0}, engine="grid", budget=4)
    rows = []
    for shift in (1.0, 1.0 if other is None else other):
        model = flux_model()
        config = model.pipeline.scheduler.config
        model.pipeline.scheduler = type(model.pipeline.scheduler).from_config(
            config, shift=shift, use_dynamic_shifting=False
        )
        rows.append(tune(model, PROMPTS, brightness, settings, drawing(), file=file).network_rows)
    assert (rows[1] == 0) == (other is None)


def test_no_prompts_is_an_error():
    with pytest.raises(UsageError, match="no prompt"):
        Evaluator(flux(), [], brightness, ["light"], drawing())


# --- the whole


def test_split_keeps_prompts_apart():
    a, b = split(PROMPTS, 0.5)
    assert len(a) == len(b) == 3
    assert {p.text for p in a}.isdisjoint(p.text for p in b)
    with pytest.raises(UsageError, match="cannot be split"):
        split(PROMPTS[:1], 0.5)


def test_a_text_that_is_asked_for_twice_stays_on_one_side():
    """Otherwise the best would be accepted by what the search has seen, with other noise."""
    twice = [*PROMPTS, *PROMPTS[:4]]
    a, b = split(twice, 0.5)
    assert len(a) + len(b) == 10
    assert {p.text for p in a}.isdisjoint(p.text for p in b)
    with pytest.raises(UsageError, match="1 prompts cannot be split"):
        split(PROMPTS[:1] * 8, 0.5)


def test_acceptance_is_sure_or_it_is_not():
    rng = np.random.default_rng(0)
    base = {"a": rng.normal(size=40)}
    prompts = [str(i) for i in range(40)]
    gain, (low, high) = accept({"a": 1.0}, base, {"a": base["a"] + 0.5}, prompts)
    assert low > 0
    assert low <= gain <= high
    _, (low, high) = accept({"a": 1.0}, base, {"a": base["a"] + rng.normal(size=40)}, prompts)
    assert low < 0.5
    few = np.where(np.arange(40) < 19, base["a"] + 0.5, np.nan)  # as in a search: half are needed
    for scores in (np.full(40, np.nan), few):
        with pytest.raises(ObjectiveError, match="of 40 held-out images"):
            accept({"a": 1.0}, base, {"a": scores}, prompts)
    few[19] = base["a"][19] + 0.5
    assert accept({"a": 1.0}, base, {"a": few}, prompts)[0] == pytest.approx(0.5 / base["a"].std())


@pytest.mark.parametrize("engine", ["cma", "coordinate", "ramp", "grid"])
def test_tuning_finds_stronger_contrast_and_puts_them_into_the_pipeline(engine, tmp_path):
    model = flux_model()
    settings = Settings({"spread": 1.0}, engine=engine, budget=81, held_out=0.5)
    prompts = [Prompt(f"a photo of {n} things") for n in range(16)]
    options = dict(file=tmp_path / "scores.jsonl")
    result = tune(model, prompts, brightness, settings, drawing(micro_batch_size=64), **options)
    assert result.accepted
    assert result.gain > 0
    assert result.interval[0] > 0
    assert result.held_out["best"]["spread"] > result.held_out["identity"]["spread"]
    assert not model.pipeline.scheduler.tables.steps  # until it is asked for
    again = tune(
        flux_model(), prompts, brightness, settings, drawing(micro_batch_size=64), **options
    )
    assert again.best == result.best
    assert again.network_rows == 0
    result.apply(model.pipeline)
    model.pipeline.save_pretrained(tmp_path / "pipe")
    stock = flux_model().pipeline.scheduler
    saved = type(stock).from_pretrained(tmp_path / "pipe" / "scheduler")
    drawn = {}
    for name, scheduler in (
        ("applied", model.pipeline.scheduler),
        ("saved", QSched.wrap(saved)),
        ("as it is", stock),
    ):
        other = flux_model()
        other.pipeline.scheduler = scheduler
        drawn[name] = render(other, prompts[:2], [1, 2], EvaluationConfig(num_inference_steps=3))[0]
    assert torch.equal(drawn["applied"], drawn["saved"])
    assert not torch.equal(drawn["applied"], drawn["as it is"])
    config = json.loads((tmp_path / "pipe" / "scheduler" / "scheduler_config.json").read_text())
    assert config["qsched"]["steps"]["3"]["sample"] == list(result.best.sample)
    result.save(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["accepted"] is True


def calls(model):
    """Of a denoiser, counted."""
    count = []
    model.denoiser.register_forward_hook(lambda *_: count.append(1))
    return count


@pytest.mark.parametrize("engine", ["cma", "coordinate", "ramp", "grid", "none"])
@pytest.mark.parametrize("good", [True, False])
def test_a_search_starts_at_the_closed_form_where_that_beats_the_schedule(engine, good):
    """The reference predicts twice as much: its trajectories have more contrast, and are either wanted or not."""
    model, reference = flux_model(), flux_model()
    model.denoiser.register_forward_hook(lambda module, args, out: (out[0] * 0.8,))
    asked = calls(reference)
    term = {"spread": 1.0 if good else -1.0}
    result = tune(
        model,
        PROMPTS,
        brightness,
        Settings(term, engine=engine, budget=4),
        drawing(),
        reference=reference,
    )
    if engine in ("grid", "ramp"):  # start nowhere, and so do not pay for a start
        assert not asked
        assert result.start.identity
        return
    assert len(asked) == 3
    closed = result.start.model_output == pytest.approx((1.2,) * 3)  # 1.25, drawn into the box
    assert closed == (good or engine == "none")
    assert result.start.identity == (not closed)
    assert result.history[1]["coefficients"] == result.start.vector
    assert result.calibration_value >= 0


def test_a_search_that_finds_nothing_keeps_what_an_earlier_one_found():
    model = flux_model()
    found = tune(
        model, PROMPTS, brightness, Settings({"spread": 1.0}, budget=9, engine="grid"), drawing()
    )
    earlier = replace(found, best=Coefficients((0.9,) * 3, (1.1,) * 3), accepted=True)
    earlier.apply(model.pipeline)
    tables = model.pipeline.scheduler.tables
    replace(found, accepted=False).apply(model.pipeline)
    assert model.pipeline.scheduler.tables == tables
    other = replace(found, best=Coefficients.ones(2), accepted=False)  # of another number of steps
    other.apply(model.pipeline)
    assert model.pipeline.scheduler.tables.steps == {**tables.steps, 2: Coefficients.ones(2)}


def test_scores_of_another_autoencoder_are_not_taken_for_these(tmp_path):
    settings, file = Settings({"spread": 1.0}, budget=4, engine="grid"), tmp_path / "scores.jsonl"
    described = [Prompt(p.text, {"tag": "counting", "prompt": p.text}) for p in PROMPTS]
    rows = []
    for scale, asked in ((1.0, PROMPTS), (1.0, PROMPTS), (1.5, PROMPTS), (1.0, described)):
        model = flux_model()
        with torch.no_grad():
            for weight in model.pipeline.vae.parameters():
                weight.mul_(scale)
        rows.append(tune(model, asked, brightness, settings, drawing(), file=file).network_rows)
    assert [n == 0 for n in rows] == [False, True, False, False]


class Bar:
    """What the search does with tqdm."""

    def __init__(self, **kwargs):
        self.total, self.n, self.best, self.closed = kwargs["total"], 0, [], False
        bars.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True

    def set_postfix(self, *, best, refresh):
        self.best.append(best)

    def update(self, n):
        self.n += n


bars: list[Bar] = []


def test_progress_shows_the_best_and_counts_what_was_scored_before(tmp_path, monkeypatch):
    monkeypatch.setattr("diffalign.tuning.tune.tqdm", Bar)
    bars.clear()
    settings = Settings({"spread": 1.0}, budget=9, engine="grid")
    for _ in range(2):
        result = tune(
            flux_model(), PROMPTS, brightness, settings, drawing(), file=tmp_path / "scores.jsonl"
        )
    for bar in bars:
        assert bar.n == bar.total == 9
        assert bar.best[-1] == f"{result.calibration_value:+.3f}"
        assert bar.closed


def test_progress_is_closed_by_an_error(monkeypatch):
    monkeypatch.setattr("diffalign.tuning.tune.tqdm", Bar)
    bars.clear()
    drawn = []

    def score(images, prompts, metadata):
        drawn.append(len(images))
        if len(drawn) > 3:
            raise RuntimeError("the service is gone")
        return brightness(images, prompts, metadata)

    with pytest.raises(RuntimeError, match="gone"):
        tune(flux_model(), PROMPTS, score, Settings({"spread": 1.0}, budget=9), drawing())
    assert [bar.closed for bar in bars] == [True]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_of_a_search(suffix, tmp_path):
    settings = Settings({"spread": 1.0}, budget=6)
    file, scores = tmp_path / "new" / f"search.{suffix}", tmp_path / "scores.jsonl"
    check_plot(file)
    sizes = []
    for _ in range(2):  # a search that goes on from its scores has done no work to plot
        result = tune(flux_model(), PROMPTS, brightness, settings, drawing(), file=scores)
        plot_history(result, file)
        sizes.append(file.stat().st_size)
    assert result.network_rows == 0
    assert min(sizes) > 1000
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_a_picture_that_cannot_be_is_refused_before_the_search(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"search\.docx must end in \.png, \.svg"):
        check_plot(tmp_path / "search.docx")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        check_plot(tmp_path / "a.png")
    monkeypatch.setattr("diffalign.tuning.plot.find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"--plot needs matplotlib: pip install 'diffalign\[plots\]'"
    ):
        check_plot(tmp_path / "search.png")


def test_what_does_not_hold_on_other_prompts_is_not_kept():
    """A term that is noise of the image: the best candidate is luck."""

    def noise(images, prompts, metadata):
        seeds = images.long().sum((1, 2, 3)).tolist()
        values = np.array([np.random.default_rng(s).normal() for s in seeds], np.float32)
        return RewardOutput(values, {"noise": values})

    model = flux_model()
    result = tune(model, PROMPTS, noise, Settings({"noise": 1.0}, budget=12), drawing())
    assert not result.accepted
    assert result.coefficients == Coefficients.ones(3)
    result.apply(model.pipeline)
    assert model.pipeline.scheduler.tables.steps[3].identity


def test_scores_that_are_nan_stop_the_search_and_change_nothing():
    def nothing(images, prompts, metadata):
        values = np.full(len(images), np.nan, np.float32)
        return RewardOutput(values, {"a": values})

    model = flux()
    model.pipeline.scheduler.set_coefficients(Coefficients.ramp(0.9, 1, 3))
    with pytest.raises(ObjectiveError, match="no score for any"):
        tune(model, PROMPTS, nothing, Settings({"a": 1.0}), drawing())
    assert model.pipeline.scheduler.tables.steps[3] == Coefficients.ramp(0.9, 1, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "annealing"}, "unknown engine"),
        ({"budget": 0}, "budget"),
        ({"held_out": 1}, "held_out"),
    ],
)
def test_settings_that_cannot_be(change, message):
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(Settings({"a": 1.0}), **change)
