"""The whole search: what is split, found, accepted and put into a pipeline."""

import dataclasses
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_tuning import PROMPTS, brightness, calls, drawing, flux
from tiny import flux_model

from diffalign.core.errors import UsageError
from diffalign.data.prompts import Prompt
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.sampler import Sampler
from diffalign.schedulers import Coefficients, QSched
from diffalign.tuning.objective import ObjectiveError
from diffalign.tuning.plot import check_plot, plot_history
from diffalign.tuning.tune import Settings, accept, split, tune
from diffalign.types import RewardOutput


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
        drawn[name] = (
            Sampler(other, Drawing(num_inference_steps=3))
            .images([p.text for p in prompts[:2]], [1, 2])
            .images
        )
    assert torch.equal(drawn["applied"], drawn["saved"])
    assert not torch.equal(drawn["applied"], drawn["as it is"])
    config = json.loads((tmp_path / "pipe" / "scheduler" / "scheduler_config.json").read_text())
    assert config["qsched"]["steps"]["3"]["sample"] == list(result.best.sample)
    result.save(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["accepted"] is True


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
    """Progress bar that records its calls."""

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
    monkeypatch.setattr("diffalign.core.console.tqdm", Bar)
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
    monkeypatch.setattr("diffalign.core.console.tqdm", Bar)
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
    with pytest.raises(
        UsageError, match=r"search\.docx: this kind of file is not supported. Use \.png, \.svg"
    ):
        check_plot(tmp_path / "search.docx")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        check_plot(tmp_path / "a.png")
    monkeypatch.setattr("diffalign.tuning.plot.find_spec", lambda name: None)
    with pytest.raises(
        UsageError,
        match=r"plot: matplotlib is missing. Install it: pip install 'diffalign\[plots\]'",
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
        ({"engine": "annealing"}, "engine=annealing: no such engine"),
        ({"budget": 0}, "budget"),
        ({"held_out": 1}, "held_out"),
    ],
)
def test_settings_that_cannot_be(change, message):
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(Settings({"a": 1.0}), **change)
