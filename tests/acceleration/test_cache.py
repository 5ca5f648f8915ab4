"""The static cache: schedules, the interception, and images on tiny models of every family."""

import copy
import itertools
import json
import logging

import numpy as np
import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounter

from diffalign.acceleration.cache import Cache, Recorder
from diffalign.acceleration.calibration import calibrate, moments_of
from diffalign.acceleration.conditions import why_no_cache
from diffalign.acceleration.drawing import Call, draw, guidance_of, psnr
from diffalign.acceleration.request import is_same, request_of
from diffalign.acceleration.schedule import (
    Moments,
    Schedule,
    _gap_costs,
    choose,
    fewest,
    weights_for,
)
from diffalign.acceleration.tap import IMPLEMENTATION, Tap
from diffalign.core.errors import UsageError
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.sampling import Sampling

FAMILIES = {**tiny.MODELS, **tiny.UNETS}
STEPS = 12


def a_call(model, n=2, **kwargs):
    length = {} if "sd" in model.family and model.family != "sd3" else {"max_sequence_length": 16}
    return Call(STEPS, *model.default_size, arguments={**length, **kwargs}).take(n)


def smooth_moments(steps=10, inputs=True):
    """Of outputs that are cubic in time plus noise, so that no extrapolation is exact."""
    rng = np.random.default_rng(0)
    times = np.linspace(0, 1, steps)
    outputs = np.stack([times**k for k in range(4)], 1) @ rng.normal(size=(4, 50))
    outputs += 0.01 * rng.normal(size=outputs.shape)
    rows = np.concatenate([outputs, np.cumsum(outputs, 0) / steps])
    return Moments((rows @ rows.T,), np.full(steps, 1 / steps), inputs)


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return FAMILIES[request.param]()


def test_the_chosen_set_is_the_best_of_all():
    moments = smooth_moments()
    costs = _gap_costs(moments)

    def cost(steps):
        gaps = zip(steps, steps[1:], [*steps[2:], moments.steps], strict=False)
        return sum(costs[d - c - 1, b, c] if d - c - 1 < len(costs) else np.inf for b, c, d in gaps)

    sets = [(0, 1, *rest) for rest in itertools.combinations(range(2, 10), 3)]
    assert choose(moments, 5) == min(sets, key=cost)


@pytest.mark.parametrize("computed", [2, 5, 12])
def test_a_linear_trajectory_is_extrapolated_without_error(computed):
    times = np.linspace(0, 1, 8)
    line = np.stack([np.ones(8), times], 1) @ np.random.default_rng(0).normal(size=(2, 20))
    moments = Moments((np.pad(line @ line.T, (0, 8)),), np.ones(8), False)
    if computed > 8:
        with pytest.raises(UsageError, match="between 2 and 8"):
            choose(moments, computed)
        return
    chosen = choose(moments, computed)
    assert len(chosen) == computed
    for step, (weights,) in weights_for(moments, chosen).items():
        last, before = [k for k in chosen if k < step][:-3:-1]
        mixed = weights.outputs[0] * line[last] + weights.outputs[1] * line[before]
        assert np.allclose(mixed, line[step])


def test_the_fewest_steps_leave_no_gap_too_long():
    for steps in range(9, 60):
        chosen = choose(smooth_moments(steps), fewest(steps))
        assert max(np.diff([*chosen, steps])) <= 7


def test_a_schedule_survives_json_and_damage_is_an_error():
    moments = smooth_moments()
    chosen = choose(moments, 5)
    schedule = Schedule({"num_inference_steps": 10}, 10, chosen, weights_for(moments, chosen))
    record = json.loads(json.dumps(schedule.to_json()))
    assert Schedule.from_json(record) == schedule
    for damage in ({"format": 9}, {"computed": [0, 1]}, {"weights": 3}, {"weights": {"2": [{}]}}):
        with pytest.raises(UsageError, match="schedule"):
            Schedule.from_json({**record, **damage})


def test_calibrated_on_every_family_and_close_to_plain(family):
    pipe, call = family.pipeline, a_call(family)
    plain = draw(pipe, call)
    schedule = calibrate(pipe, call, target=0, computed=7)
    assert len(schedule.computed) == 7
    assert schedule.steps == STEPS
    forwards = []
    handle = pipe_denoiser(pipe).register_forward_pre_hook(lambda *_: forwards.append(1))
    tap = Tap(pipe, Cache([schedule]))
    fast = draw(pipe, call)
    again = draw(pipe, call)
    tap.remove()
    handle.remove()
    # the pipeline of [klein] calls the denoiser for each side of guidance
    sides = 2 if family.family == "flux2" else 1
    assert len(forwards) == 2 * 7 * sides
    assert torch.equal(fast, again)
    assert min(psnr(fast, plain)) > 20
    # nothing of it is left
    assert torch.equal(draw(pipe, call), plain)
    assert IMPLEMENTATION not in vars(pipe_denoiser(pipe))
    assert not {"set_timesteps", "step"} & set(vars(pipe.scheduler))


def pipe_denoiser(pipe):
    return getattr(pipe, "transformer", None) or pipe.unet


def test_recording_changes_no_pixel(family):
    call = a_call(family)
    plain = draw(family.pipeline, call)
    recorder = Recorder(guidance_of(family.pipeline))
    tap = Tap(family.pipeline, recorder)
    assert torch.equal(draw(family.pipeline, call), plain)
    tap.remove()
    assert moments_of(family.pipeline.scheduler, recorder).steps == STEPS


@pytest.fixture
def cached(sd3):
    call = a_call(sd3)
    schedule = calibrate(sd3.pipeline, call, target=0, computed=6)
    cache = Cache([schedule])
    tap = Tap(sd3.pipeline, cache)
    yield sd3.pipeline, call, cache
    tap.remove()


def test_an_image_is_the_same_alone_and_in_a_batch(cached):
    pipe, call, _ = cached
    together = draw(pipe, call)
    for i, prompt in enumerate(call.prompts):
        alone = Call(STEPS, call.height, call.width, (prompt,), call.arguments, call.seed + i)
        assert torch.allclose(draw(pipe, alone)[0], together[i], atol=1e-5)


def test_an_aborted_call_leaves_no_trace(cached):
    pipe, call, _ = cached
    fresh = draw(pipe, call)

    def abort(pipe, step, timestep, kwargs):
        if step == 7:
            raise KeyboardInterrupt
        return kwargs

    broken = Call(STEPS, 16, 16, call.prompts, {**call.arguments, "callback_on_step_end": abort}, 9)
    with pytest.raises(KeyboardInterrupt):
        draw(pipe, broken)
    assert torch.equal(draw(pipe, call), fresh)


def test_other_steps_are_computed_with_a_warning(cached, caplog):
    pipe, call, cache = cached
    other = Call(9, 16, 16, call.prompts, call.arguments)
    with caplog.at_level(logging.WARNING):
        images = draw(pipe, other)
        draw(pipe, other)
    assert len([r for r in caplog.records if "every step is computed" in r.message]) == 1
    cache.enabled = False
    assert torch.equal(draw(pipe, other), images)


def test_a_replaced_scheduler_is_computed_with_a_warning(cached, caplog):
    pipe, call, _ = cached
    draw(pipe, call)
    old = pipe.scheduler
    pipe.scheduler = type(old).from_config(old.config)
    with caplog.at_level(logging.WARNING):
        images = draw(pipe, call)
    assert any("was replaced" in r.message for r in caplog.records)
    fresh = tiny.sd3_pipeline()
    assert torch.equal(draw(fresh, call), images)
    pipe.scheduler = old


CHANGES = {
    "shift": lambda s: s.set_shift(2 * s.shift),
    "setting": lambda s: s.register_to_config(shift_terminal=0.02),
    "levels": lambda s: s.register_to_config(use_exponential_sigmas=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_scheduler_is_computed_with_a_warning(cached, caplog, change):
    pipe, call, cache = cached
    fast = draw(pipe, call)
    shift, config = pipe.scheduler.shift, dict(pipe.scheduler.config)
    CHANGES[change](pipe.scheduler)
    with caplog.at_level(logging.WARNING):
        images = draw(pipe, call)
        draw(pipe, call)
    assert caplog.text.count("not those of the calibration; every step is computed") == 1
    cache.enabled = False
    assert torch.equal(draw(pipe, call), images)
    cache.enabled = True
    pipe.scheduler.register_to_config(**config)
    pipe.scheduler.set_shift(shift)
    assert torch.equal(draw(pipe, call), fast)


def test_a_request_is_compared_up_to_the_last_bits_and_one_of_before_by_its_arguments():
    scheduler = tiny.sd3_pipeline().scheduler
    scheduler.set_timesteps(5)
    request = request_of(scheduler, (5,), {})
    assert is_same(json.loads(json.dumps(request)), request)
    timesteps, sigmas = request["levels"]
    for factor, expected in ((1 + 1e-7, True), (1 + 1e-3, False)):
        levels = [[t * factor for t in timesteps], sigmas]
        assert is_same({**request, "levels": levels}, request) is expected
    assert not is_same({**request, "levels": [timesteps, sigmas[1:]]}, request)
    assert is_same({"num_inference_steps": 5}, request)
    assert not is_same({"num_inference_steps": 6}, request)


def test_our_sampling_uses_the_cache_through_its_own_scheduler(cached, sd3):
    pipe, _, cache = cached
    embeds = sd3.encode_prompt(["a cat"])
    before = dict(cache.forwards)
    with torch.no_grad():
        Sampling(sd3, embeds, Drawing(STEPS, size=(16, 16))).draw()
    assert cache.forwards["extrapolated"] == before["extrapolated"] + 6
    twin = copy.deepcopy(pipe.scheduler)
    twin.set_timesteps(5)
    assert len(twin.timesteps) == 5
    assert len(pipe.scheduler.timesteps) == STEPS


def test_training_computes_every_step(cached):
    pipe, call, cache = cached
    draw(pipe, call)
    count = cache.forwards["extrapolated"]
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 16, pipe.transformer.config.joint_attention_dim),
        "pooled_projections": torch.randn(2, pipe.transformer.config.pooled_projection_dim),
        "timestep": torch.ones(2),
    }
    pipe.scheduler.set_timesteps(STEPS)
    for _ in range(STEPS):
        pipe.transformer(**inputs)
    assert cache.forwards["extrapolated"] == count


def test_two_forwards_a_step_have_their_own_history():
    model = tiny.flux_model()
    call = a_call(model, negative_prompt=["dull"] * 2, true_cfg_scale=2.0)
    plain = draw(model.pipeline, call)
    schedule = calibrate(model.pipeline, call, target=0, computed=8)
    assert {len(w) for w in schedule.weights.values()} == {2}
    tap = Tap(model.pipeline, Cache([schedule]))
    assert min(psnr(draw(model.pipeline, call), plain)) > 20
    tap.remove()


def test_no_graph_breaks_and_none_is_compiled_twice(cached):
    pipe, call, cache = cached
    eager = draw(pipe, call)
    torch._dynamo.reset()
    counter = CompileCounter()
    pipe.transformer.compile(backend=counter, fullgraph=True)
    cache.forwards = dict.fromkeys(cache.forwards, 0)
    assert min(psnr(draw(pipe, call), eager)) > 80
    assert cache.forwards == {"computed": 6, "extrapolated": 6}
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ("EulerAncestralDiscreteScheduler", "adds noise"),
        ("LCMScheduler", "adds noise"),
        ("DDPMScheduler", "adds noise"),
        ("HeunDiscreteScheduler", "second order"),
        ("KDPM2DiscreteScheduler", "second order"),
        ("DDIMScheduler", None),
        ("DPMSolverMultistepScheduler", None),
        ("UniPCMultistepScheduler", None),
    ],
)
def test_schedulers_are_refused_with_the_reason(scheduler, words):
    import diffusers

    pipe = tiny.sd_pipeline()
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    reason = why_no_cache(pipe, steps=20)
    assert reason is None if words is None else words in reason
    assert "too few" in why_no_cache(tiny.sd_pipeline(), steps=4)


def test_a_refusal_says_what_to_do(sd3):
    with pytest.raises(UsageError, match=r"cache: 4 steps .* Leave the cache out"):
        calibrate(sd3.pipeline, Call(4, 16, 16), target=40)
