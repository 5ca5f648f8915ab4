"""The search for factors: closed form, shared work, and what is accepted."""

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

from diffalign.core.errors import UsageError
from diffalign.data.prompts import Prompt
from diffalign.schedulers import Coefficients, QSched
from diffalign.schedulers.closed_form import best_factors
from diffalign.tuning.evaluator import Drawing, Evaluator
from diffalign.tuning.start import closed_form
from diffalign.tuning.tune import Settings, tune
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


def calls(model):
    """Of a denoiser, counted."""
    count = []
    model.denoiser.register_forward_hook(lambda *_: count.append(1))
    return count


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


def test_half_precision_scores_do_not_depend_on_what_encoded_the_prompts():
    candidate = Coefficients((1.0,) * 3, (0.9,) * 3)
    scores = []
    for start in (False, True):
        scorer = evaluator(flux(), mixed_precision="bf16")
        if start:
            closed_form(scorer, flux_model())
        scores += scorer([candidate])
    assert np.array_equal(scores[0]["light"], scores[1]["light"])
    assert np.array_equal(scores[0]["spread"], scores[1]["spread"])


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
    assert again.scored == 2
    again([Coefficients.ramp(1.1, 1, 3)])  # and the cut line does not swallow what follows
    assert evaluator(model, file=file).scored == 3
    again = evaluator(model, file=file)
    assert again([Coefficients.ones(3)])[0]["light"].tolist() == known[0]["light"].tolist()
    assert again.network_rows == 0
    assert evaluator(model, file=file, key="another model").scored == 0
    assert evaluator(model, file=file, seed=1).scored == 0


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
    assert evaluator(model, file=file).scored == 1


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
    assert second.scored == 0
    assert np.isfinite(second(ones)[0]["light"]).all()
    assert search().scored == 1


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
