"""Compiled blocks give what plain ones give, for every policy, size and mode, with few compilations."""

import pytest
import tiny
import tiny_runs
import torch
from compilation import counted
from marks import slow_except

from diffalign import lora
from diffalign.pipelines import compiled
from diffalign.pipelines.compiled import CompiledSizes


@pytest.fixture
def counter(monkeypatch):
    """A counter of graphs that run as they were captured, which takes seconds less than to differentiate them."""
    with counted(monkeypatch, "eager") as counter:
        yield counter


@pytest.fixture
def differentiated(monkeypatch):
    """A counter of graphs whose backward passes are compiled, too."""
    with counted(monkeypatch, "aot_eager") as counter:
        yield counter


def predictions(model, rows):
    generator = torch.Generator().manual_seed(rows)
    embeds = model.encode_prompt(["a photo of a red circle"] * rows)
    channels, height, width = model.latent_shape(model.default_size)
    noisy = torch.randn(rows, channels, height, width, generator=generator)
    return model.predict(noisy, torch.full((rows,), 500.0), embeds)


@pytest.mark.parametrize("model", slow_except(["sd3", "flux"], sorted(tiny.MODELS)), indirect=True)
def test_every_policy_and_size_as_before(model, counter):
    for seed, name in enumerate((lora.CURRENT, lora.LAGGED)):
        if seed == 0:
            lora.attach(model.denoiser, rank=2, alpha=4, targets=model.lora_targets, seed=0)
        for _, parameter in lora.adapter_parameters(model.denoiser, name):
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(seed))

    def everything(*sizes):
        found = []
        for rows in sizes:
            for name in (lora.CURRENT, lora.LAGGED, lora.REFERENCE):
                with lora.policy(model.denoiser, name), torch.no_grad():
                    found.append(predictions(model, rows))
            with lora.merged(model.denoiser, lora.CURRENT), torch.no_grad():
                found.append(predictions(model, rows))
            pred = predictions(model, rows)
            pred.square().sum().backward()
            found += [pred.detach(), *(p.grad.clone() for p in lora.trainable(model.denoiser))]
            model.denoiser.zero_grad()
        return found

    before = everything(4, 6, 1)
    assert compiled.compile_blocks(model.denoiser, CompiledSizes({6}, {6}))
    everything(6)
    compilations = counter.frame_count
    assert compilations > 0
    torch.testing.assert_close(everything(4, 6, 1), before, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == compilations  # whatever the size


@pytest.mark.slow
def test_a_run_compiles_once_a_mode_whatever_is_dropped(tmp_path, differentiated):
    counter = differentiated
    run = tiny_runs.trainer(tmp_path, training={"micro_batch_size": 5})
    sizes = run.full_batches()
    assert sizes == CompiledSizes({10}, {5, 12})
    assert compiled.compile_blocks(run.model.denoiser, sizes)
    plain = tiny_runs.trainer(tmp_path / "plain", training={"micro_batch_size": 5})
    for number in range(3):  # of 12 images: micro-batches of 5, 5 and 2
        row, expected = run.train_update(), plain.train_update()
        for key in ("reward", "kl", "grad_norm", "forwards_per_image"):
            assert row[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6)
        if number == 0:
            compilations = counter.frame_count
    assert counter.frame_count == compilations


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({"algorithm": {"reference_guidance_scale": 3.0}}, CompiledSizes({10}, {10, 5, 12})),
        ({"algorithm": {"kl_beta": 0.0, "ema_kl_beta": 0.0}}, CompiledSizes({10}, {12})),
        ({"training": {"updates_per_rollout": 2}}, CompiledSizes({10}, {10, 5, 12})),
        ({"evaluation": {"guidance_scale": 4.0}}, CompiledSizes({10}, {5, 12, 24})),
        (
            {
                "algorithm": {"type": "flow_grpo", "dynamics": "cps", "window_size": 2},
                "rollout": {"num_inference_steps": 6},
            },
            CompiledSizes({10}, {10, 12}),
        ),
    ],
)
def test_full_batches(tmp_path, groups, expected):
    groups = {**groups, "training": {"micro_batch_size": 5, **groups.get("training", {})}}
    assert tiny_runs.trainer(tmp_path, **groups).full_batches() == expected


@pytest.mark.parametrize("family", slow_except(["sd"], tiny.UNETS))
def test_u_nets_with_all_their_conditions(family, counter):
    """(All of a U-Net at once is another matter: under autocast torch 2.13 gives most of it no gradient on CPUs.)"""
    model = tiny.UNETS[family]()
    lora.attach(model.denoiser, rank=2, alpha=4, targets=model.lora_targets, seed=0)
    disturbed = lora.trainable(model.denoiser)
    for parameter in disturbed:
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))

    def everything():
        pred = predictions(model, 3)
        pred.square().sum().backward()
        found = [pred.detach(), *(p.grad.clone() for p in disturbed)]
        model.denoiser.zero_grad()
        return found

    before = everything()
    assert compiled.compile_blocks(model.denoiser, CompiledSizes({4}, {4}))
    torch.testing.assert_close(everything(), before, rtol=1e-3, atol=1e-4)
    assert counter.frame_count > 0


def test_a_guided_prediction_is_cut_where_it_was_filled_up(counter):
    model = tiny.MODELS["sd3"]()
    embeds = model.encode_prompt(["a photo of a red circle"] * 3)
    negative = model.encode_prompt([""] * 3)
    noisy = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def guided():
        with torch.no_grad():
            return model.predict(
                noisy,
                torch.full((3,), 500.0),
                embeds,
                guidance_scale=4.0,
                negative_embeds=negative,
            )

    expected = guided()
    compiled.compile_blocks(model.denoiser, CompiledSizes(set(), {8}))
    torch.testing.assert_close(guided(), expected, rtol=1e-4, atol=1e-5)


def test_without_a_compiler_it_goes_on_with_a_warning(model, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setattr(torch, "compile", _fails)
    expected = predictions(model, 2)
    assert not compiled.compile_blocks(model.denoiser, CompiledSizes(set(), set()))
    assert "no C++ compiler" in caplog.text
    torch.testing.assert_close(predictions(model, 2), expected)


def _fails(function):
    def call(*args):
        raise RuntimeError("no C++ compiler\nmore")

    return call
