"""Factors on stock schedulers: identity is the stock step bit for bit, and everything else is the affine update."""

import copy
import inspect
import json
import logging
import pickle

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    FluxImg2ImgPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    TCDScheduler,
)
from tiny import flux_pipeline, sd_pipeline

from diffalign.core.errors import UsageError
from diffalign.schedulers import Coefficients, QSched
from diffalign.schedulers.coefficients import CoefficientsError

DDPM = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CASES = {
    "flow": (FlowMatchEulerDiscreteScheduler, {}, {}),
    "flow shifted": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, {}),
    "flow stochastic": (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}, {}),
    "flow lcm": (FlowMatchLCMScheduler, {}, {}),
    "euler": (EulerDiscreteScheduler, DDPM, {}),
    "euler v": (EulerDiscreteScheduler, DDPM | {"prediction_type": "v_prediction"}, {}),
    "euler sample": (EulerDiscreteScheduler, DDPM | {"prediction_type": "sample"}, {}),
    "ancestral": (EulerAncestralDiscreteScheduler, DDPM, {}),
    "ancestral v": (
        EulerAncestralDiscreteScheduler,
        DDPM | {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {},
    ),
    "ddim": (DDIMScheduler, DDPM | {"clip_sample": False}, {}),
    "ddim eta": (DDIMScheduler, DDPM | {"clip_sample": False}, {"eta": 0.6}),
    "ddim v": (
        DDIMScheduler,
        DDPM | {"clip_sample": False, "prediction_type": "v_prediction"},
        {"eta": 0.3},
    ),
    "ddim sample": (
        DDIMScheduler,
        DDPM | {"clip_sample": False, "prediction_type": "sample"},
        {},
    ),
    "tcd 0": (TCDScheduler, DDPM, {"eta": 0.0}),
    "tcd": (TCDScheduler, DDPM, {"eta": 0.3}),
    "tcd v": (TCDScheduler, DDPM | {"prediction_type": "v_prediction"}, {"eta": 0.8}),
    "tcd sample": (TCDScheduler, DDPM | {"prediction_type": "sample"}, {"eta": 0.3}),
    "lcm": (LCMScheduler, DDPM, {}),
    "lcm v": (LCMScheduler, DDPM | {"prediction_type": "v_prediction"}, {}),
}
each = pytest.mark.parametrize("case", CASES)


def made(case, steps=4):
    cls, config, kwargs = CASES[case]
    scheduler = cls(**config)
    scheduler.set_timesteps(steps)
    return scheduler, kwargs


def wrapped(case, coefficients, steps=4):
    scheduler, kwargs = made(case, steps)
    found = QSched.wrap(scheduler)
    found.set_coefficients(coefficients)
    found.set_timesteps(steps)
    return found, kwargs


def draw(scheduler, kwargs, *, dtype=torch.float32, seed=0, size=16):
    """All states and the generator after sampling with a made-up denoiser."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, size, size, generator=generator).to(dtype)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    states = []
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        m = (torch.sin(3 * given.float()) + 0.1 * given.float().roll(1, -1)).to(dtype)
        out = scheduler.step(m, t, x, generator=generator, return_dict=False, **kwargs)
        states.append(out)
        x = out[0]
    return states, generator.get_state()


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_identity_is_the_stock_step_bit_for_bit(case, dtype, steps):
    stock, kwargs = made(case, steps)
    found, _ = wrapped(case, Coefficients.ones(steps), steps)
    expected, state = draw(stock, kwargs, dtype=dtype)
    here, state_here = draw(found, kwargs, dtype=dtype)
    for a, b in zip(expected, here, strict=True):
        assert len(a) == len(b)
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))
    assert torch.equal(state, state_here)


@each
def test_a_step_scales_the_inputs_of_the_stock_step(case):
    """In float32 it must be the stock step of scaled inputs, in every output."""
    coefficients = Coefficients((0.9, 1.1, 0.95, 1.02), (1.05, 0.9, 1.1, 0.97))
    found, kwargs = wrapped(case, coefficients)
    stock, _ = made(case)
    x, m = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for i, t in enumerate(found.timesteps):
        g, h = (torch.Generator().manual_seed(i) for _ in range(2))
        if hasattr(stock, "scale_model_input"):
            stock.scale_model_input(x, t), found.scale_model_input(x, t)
        here = found.step(m, t, x, generator=g, **kwargs)
        cx, ce = coefficients.sample[i], coefficients.model_output[i]
        there = stock.step(ce * m, t, cx * x, generator=h, **kwargs)
        assert type(here) is type(there)
        for name, value in there.items():
            torch.testing.assert_close(here[name], value, rtol=1e-5, atol=2e-6)
        assert torch.equal(g.get_state(), h.get_state())
        assert found.step_index == stock.step_index if hasattr(stock, "step_index") else True


@each
def test_states_are_affine_in_every_coefficient(case):
    """Second differences vanish: at c, c + h and c + 2 h with the same prediction and noise."""
    x, m = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    for which in ("sample", "model_output"):
        found = []
        for value in (0.8, 1.0001, 1.2002):
            pair = {"sample": (0.95,) * 4, "model_output": (1.05,) * 4} | {which: (value,) * 4}
            scheduler, kwargs = wrapped(case, Coefficients(**pair))
            t = scheduler.timesteps[0]
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            generator = torch.Generator().manual_seed(3)
            out = scheduler.step(m, t, x, generator=generator, return_dict=False, **kwargs)
            found.append(out[0].double())
        second = found[0] - 2 * found[1] + found[2]
        assert second.abs().max() < 1e-5 * max(1.0, found[0].abs().max().item())
        assert (found[0] - found[1]).abs().max() > 1e-3  # and the coefficient matters


def test_half_precision_rounds_once():
    """Its error against float64 is that of rounding the result."""
    c = Coefficients((0.93, 1.07), (1.04, 0.96))
    scheduler, _ = wrapped("flow", c, 2)
    x, m = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    s, s2 = scheduler.sigmas[:2].double()
    exact = 0.93 * x.double() + (s2 - s) * 1.04 * m.double()
    here = scheduler.step(m, scheduler.timesteps[0], x, return_dict=False)[0]
    assert here.dtype == torch.bfloat16
    assert ((here.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001).all()


@each
def test_noise_is_the_stock_schedulers_for_all_coefficients(case):
    stock, kwargs = made(case)
    found, _ = wrapped(case, Coefficients((0.9,) * 4, (1.1,) * 4))
    for dtype in (torch.float32, torch.bfloat16):
        for scheduler in (stock, found):
            scheduler.set_timesteps(4)
        x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
        t = found.timesteps[0]
        for scheduler in (stock, found):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
        noise, states = [], []
        for scheduler in (stock, found):
            generator = torch.Generator().manual_seed(7)
            zero = torch.zeros_like(x)
            noise.append(scheduler.step(zero, t, zero, generator=generator, **kwargs).prev_sample)
            states.append(generator.get_state())
        assert torch.equal(*noise)
        assert torch.equal(*states)


def test_tables_follow_the_number_of_steps(caplog):
    scheduler = QSched.wrap(FlowMatchEulerDiscreteScheduler())
    two, four = Coefficients((0.9, 1.0), (1.1, 1.0)), Coefficients.ramp(0.95, 1.05, 4)
    scheduler.set_coefficients(two)
    scheduler.set_coefficients(four)
    for steps, expected in ((2, two), (4, four), (2, two)):
        scheduler.set_timesteps(steps)
        assert scheduler.coefficients == expected
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        scheduler.set_timesteps(8)
        scheduler.set_timesteps(8)
    assert [r.message for r in caplog.records] == [
        "Q-Sched has no factors for 8 steps (only for 2, 4): the schedule stays as it is"
    ]
    assert scheduler.coefficients == Coefficients.ones(8)
    stock = FlowMatchEulerDiscreteScheduler()
    stock.set_timesteps(8)
    assert torch.equal(draw(stock, {})[0][-1][0], draw(scheduler, {})[0][-1][0])


def test_factors_of_another_denoiser_are_forgotten():
    scheduler = QSched.wrap(FlowMatchEulerDiscreteScheduler())
    scheduler.set_coefficients(Coefficients.ramp(0.9, 1, 2), fingerprint="a")
    scheduler.set_coefficients(Coefficients.ramp(0.9, 1, 4), fingerprint="a")
    assert set(scheduler.tables.steps) == {2, 4}
    scheduler.set_coefficients(Coefficients.ramp(0.9, 1, 8), fingerprint="b")
    assert set(scheduler.tables.steps) == {8}
    scheduler.clear_coefficients()
    assert not scheduler.tables.steps


def test_factors_found_with_other_weights_leave_the_schedule_as_it_is(caplog):
    tuned = QSched.wrap(FlowMatchEulerDiscreteScheduler())
    tuned.set_coefficients(Coefficients.ramp(0.9, 1.1, 4), fingerprint="a")
    for denoiser, expected in (("a", 0.9), (None, 0.9), ("b", 1.0)):
        stock = FlowMatchEulerDiscreteScheduler.from_config(tuned.config)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = QSched.wrap(stock, fingerprint=denoiser)
            found.set_timesteps(4)
        assert found.coefficients.sample[0] == expected
        assert bool(caplog.records) == (denoiser == "b")
    assert [r.message for r in caplog.records] == [
        "Q-Sched's factors were found with other weights than this pipeline's: the schedule stays as it is"
    ]
    plain, _ = made("flow")
    assert torch.equal(draw(plain, {})[0][-1][0], draw(found, {})[0][-1][0])
    assert found.tables == tuned.tables  # kept for those whose they are
    found.set_coefficients(Coefficients.ramp(1.1, 0.9, 2))
    assert set(found.tables.steps) == {2}
    assert found.tables.fingerprint == "b"


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (EulerDiscreteScheduler, {}, "a scheduler of class LCMScheduler, this is EulerDis"),
        (TCDScheduler, {}, "a scheduler of class LCMScheduler, this is TCDScheduler"),
        (LCMScheduler, {"prediction_type": "v_prediction"}, "prediction_type epsilon, this is v_"),
        (LCMScheduler, {"timestep_spacing": "trailing"}, "timestep_spacing leading, this is trai"),
        (LCMScheduler, {"beta_end": 0.02}, "beta_end 0.012, this is 0.02"),
    ],
)
def test_factors_are_of_a_scheduler_and_its_settings(make, changes, message, caplog):
    """diffusers' from_config hands unknown keys on to any other class."""
    tuned, _ = wrapped("lcm", Coefficients.ramp(0.9, 1.1, 4))
    other = make.from_config(tuned.config, **changes)
    with caplog.at_level(logging.WARNING):
        found = QSched.wrap(other)
    assert message in caplog.text
    found.set_timesteps(4)
    assert found.coefficients.identity
    stock = make(**{k: v for k, v in other.config.items() if k != "qsched"})
    stock.set_timesteps(4)
    assert torch.equal(draw(stock, {})[0][-1][0], draw(found, {})[0][-1][0])
    found.set_coefficients(Coefficients.ramp(1.1, 0.9, 4))
    assert found.coefficients == Coefficients.ramp(1.1, 0.9, 4)


def test_configurations_that_do_not_say_whose_they_are_count_as_ours():
    tuned, _ = wrapped("lcm", Coefficients.ramp(0.9, 1.1, 4))
    del tuned.config["qsched"]["scheduler"]
    found = QSched.wrap(LCMScheduler.from_config(tuned.config))
    found.set_timesteps(4)
    assert found.coefficients == Coefficients.ramp(0.9, 1.1, 4)


@each
def test_saved_configurations_come_back_byte_for_byte(case, tmp_path):
    scheduler, _ = wrapped(case, Coefficients.ramp(0.97, 1.03, 4))
    cls = CASES[case][0]
    scheduler.save_pretrained(tmp_path / "a")
    text = (tmp_path / "a" / "scheduler_config.json").read_text()
    assert json.loads(text)["_class_name"] == cls.__name__
    stock = cls.from_pretrained(tmp_path / "a")
    assert type(stock) is cls
    stock.save_pretrained(tmp_path / "b")  # stock diffusers keeps what it does not know
    assert (tmp_path / "b" / "scheduler_config.json").read_text() == text
    again = QSched.wrap(stock)
    again.set_timesteps(4)
    assert again.coefficients == Coefficients.ramp(0.97, 1.03, 4)
    again.save_pretrained(tmp_path / "c")
    assert (tmp_path / "c" / "scheduler_config.json").read_text() == text
    plain = cls.from_config(again.config)  # and so do both ways between the classes
    assert type(plain) is cls
    assert plain.config["qsched"] == again.config["qsched"]
    for made_of in (plain.config, type(again).from_config(plain.config).config):
        found = QSched.wrap(cls.from_config(made_of))
        found.set_timesteps(4)
        assert found.coefficients == Coefficients.ramp(0.97, 1.03, 4)


def test_copies_and_pickles_keep_the_factors():
    scheduler, _ = wrapped("ancestral", Coefficients.ramp(0.97, 1.03, 4))
    expected, _ = draw(scheduler, {})
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        other.set_timesteps(4)
        assert isinstance(other, QSched)
        assert torch.equal(draw(other, {})[0][-1][0], expected[-1][0])
        other.set_coefficients(Coefficients.ones(4))
    scheduler.set_timesteps(4)
    assert torch.equal(draw(scheduler, {})[0][-1][0], expected[-1][0])


IMAGE_TO_IMAGE = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "ancestral": (EulerAncestralDiscreteScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "tcd": (TCDScheduler, {}),
    "flow": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    "flow lcm": (FlowMatchLCMScheduler, {"shift": 3.0}),
}


@pytest.mark.parametrize("case", IMAGE_TO_IMAGE)
def test_image_to_image_counts_steps_from_where_it_begins(case, monkeypatch):
    """Half of the strength leaves out half of the steps; the factors of the others are at their own steps."""
    cls, config = IMAGE_TO_IMAGE[case]
    if case.startswith("flow"):
        pipe, kind, options = flux_pipeline(), FluxImg2ImgPipeline, {"max_sequence_length": 16}
        kept, side = {}, 16
    else:
        pipe, kind, options = sd_pipeline(), StableDiffusionImg2ImgPipeline, {}
        config, kept = DDPM | {"steps_offset": 1} | config, {"requires_safety_checker": False}
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    scheduler = QSched.wrap(cls(**config))
    scheduler.set_coefficients(Coefficients((5.0, 5.0, 0.9, 1.1), (5.0, 5.0, 1.05, 0.95)))
    used = []
    original = QSched._factors

    def spy(self, index, sample):
        used.append((index, original(self, index, sample)))
        return used[-1][1]

    monkeypatch.setattr(QSched, "_factors", spy)
    parts = {**pipe.components, "scheduler": scheduler}
    parts.pop("image_encoder", None)
    image = torch.zeros(1, 3, side, side)
    kind(**parts, **kept)(
        "a", image=image, strength=0.5, num_inference_steps=4, output_type="latent", **options
    )
    assert used == [(2, (0.9, 1.05)), (3, (1.1, 0.95))]


@each
def test_signatures_are_the_stock_ones(case):
    """Pipelines look at them to see whether there is an eta, a generator, or sigmas."""
    scheduler, _ = wrapped(case, Coefficients.ones(4))
    for name in ("step", "set_timesteps"):
        expected = inspect.signature(getattr(CASES[case][0](), name))
        assert inspect.signature(getattr(scheduler, name)) == expected


def test_candidates_share_a_batch():
    """Each row has its own factors, and the same noise as alone."""
    rows = [Coefficients.ramp(0.9, 1.1, 4), Coefficients((1.1, 1, 1, 1), (1, 0.8, 1, 1))]
    together, _ = made("flow lcm")
    together = QSched.wrap(together)
    sample = torch.tensor([c.sample for c in rows]).T
    model_output = torch.tensor([c.model_output for c in rows]).T
    with together.trial(sample, model_output):
        found, _ = draw(together, {})
    for i, c in enumerate(rows):
        alone, _ = wrapped("flow lcm", c)
        torch.testing.assert_close(found[-1][0][i], draw(alone, {})[0][-1][0][i])
    together.set_timesteps(4)
    stock, _ = made("flow lcm")
    assert torch.equal(draw(together, {})[0][-1][0], draw(stock, {})[0][-1][0])


def test_what_is_not_linear_is_refused():
    with pytest.raises(
        UsageError,
        match="DPMSolverMultistepScheduler: Q-Sched needs a scheduler with a linear step",
    ):
        QSched.wrap(DPMSolverMultistepScheduler())
    with pytest.raises(UsageError, match="clip_sample=True"):
        QSched.wrap(DDIMScheduler())
    with pytest.raises(UsageError, match="thresholding"):
        QSched.wrap(LCMScheduler(thresholding=True))


@pytest.mark.parametrize(
    ("sample", "model_output", "message"),
    [
        ((1.0,), (1.0, 1.0), "as many factors"),
        ((), (), "as many factors"),
        ((float("nan"),), (1.0,), "finite"),
        ((1.0,), ("x",), "finite"),
        ((float("inf"),), (1.0,), "finite"),
        ((0.0,), (1.0,), r"must lie in 0\.1\.\.10, got 0\.0"),
        ((1.0,), (-1.0,), r"must lie in 0\.1\.\.10"),
        ((1.0,), (10.5,), r"must lie in 0\.1\.\.10"),
    ],
)
def test_factors_that_cannot_be_used(sample, model_output, message):
    with pytest.raises(CoefficientsError, match=message):
        Coefficients(sample, model_output)


@pytest.mark.parametrize(
    "raw",
    [
        {"version": 2},
        "text",
        {"version": 1},
        {"version": 1, "steps": {"4": {"sample": [1.0]}}},
        {"version": 1, "steps": {"4": {"sample": [1.0], "model_output": [1.0]}}},
        {"version": 1, "steps": {"x": {"sample": [1.0], "model_output": [1.0]}}},
        {"version": 1, "steps": {"1": {"sample": [-1.0], "model_output": [1.0]}}},
        {"version": 1, "steps": {}, "scheduler": "EulerDiscreteScheduler"},
    ],
)
def test_damaged_configurations_are_refused(raw):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.register_to_config(qsched=raw)
    with pytest.raises(CoefficientsError):
        QSched.wrap(scheduler)


def test_ramp_is_the_published_search_space():
    assert Coefficients.ramp(0.8, 1.2, 3) == Coefficients((0.8, 0.9, 1.0), (1.2, 1.1, 1.0))
    assert Coefficients.ramp(0.8, 1.2, 1) == Coefficients((0.8,), (1.2,))
    assert Coefficients.from_vector([0.8, 0.9, 1.2, 1.1]).vector == [0.8, 0.9, 1.2, 1.1]
