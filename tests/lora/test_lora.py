"""Policies as adapters, and LoRA files that load with nothing of ours."""

import json

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, QuantoConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign import lora
from diffalign.core.errors import UsageError

RANK, ALPHA = 4, 12.0


def attach(model, **kwargs):
    return lora.attach(model.denoiser, rank=RANK, alpha=ALPHA, targets=model.lora_targets, **kwargs)


def predict(model, name=lora.CURRENT):
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, *model.latent_shape(model.default_size), generator=generator)
    embeds = model.encode_prompt(["a photo of a circle", "a photo of a ring"])
    with lora.policy(model.denoiser, name):
        return model.predict(noisy, torch.tensor([300.0, 800.0]), embeds)


def last_bit(model):
    """Tolerances between policies that hold the same numbers: torch folds a product where a weight wants gradients, and
    on the transposed output of SANA's linear attention that is another sum."""
    return {"rtol": 1e-4, "atol": 1e-5} if model.family == "sana" else {"rtol": 0, "atol": 0}


def read(model, parameters):
    """Leave out the parameters that the prediction does not depend on: Qwen-Image drops its last text tokens."""
    if model.family != "qwen_image":
        return parameters
    last = f"transformer_blocks.{len(model.denoiser.transformer_blocks) - 1}.attn."
    unread = (f"{last}to_add_out.", f"{last}add_q_proj.")
    named = lora.policies.adapter_parameters(model.denoiser, lora.CURRENT)
    return [p for name, p in named if not name.startswith(unread)]


def perturb(parameters, scale=0.3):
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * scale)


def test_fresh_lora_is_the_base_exactly(model):
    with torch.no_grad():
        before = predict_base(model)
        attach(model)
        for name in (lora.CURRENT, lora.LAGGED, lora.AVERAGED, lora.REFERENCE):
            torch.testing.assert_close(predict(model, name), before, rtol=0, atol=0)


def predict_base(model):
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, *model.latent_shape(model.default_size), generator=generator)
    embeds = model.encode_prompt(["a photo of a circle", "a photo of a ring"])
    return model.predict(noisy, torch.tensor([300.0, 800.0]), embeds)


@pytest.mark.parametrize("name", [lora.CURRENT, lora.LAGGED, lora.REFERENCE])
def test_merged_weights_draw_the_same_and_leave_no_trace(model, name):
    parameters = attach(model)
    perturb(parameters)
    lora.blend(model.denoiser, lora.LAGGED, decay=0.5)
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    expected = predict(model, name)
    with lora.merged(model.denoiser, name), torch.no_grad():
        torch.testing.assert_close(predict_base(model), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(KeyboardInterrupt), lora.merged(model.denoiser, name):
        raise KeyboardInterrupt
    after = model.denoiser.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    predict(model).square().mean().backward()
    assert all(p.grad is not None for p in read(model, parameters))


def test_policies_differ_after_training_and_the_reference_does_not_move(model):
    with torch.no_grad():
        before = predict_base(model)
        parameters = attach(model)
        perturb(parameters)
        assert (predict(model) - before).abs().max() > 1e-3
        for name in (lora.LAGGED, lora.AVERAGED, lora.REFERENCE):
            torch.testing.assert_close(predict(model, name), before, rtol=0, atol=0)
        lora.blend(model.denoiser, lora.LAGGED, decay=0.0)
        torch.testing.assert_close(predict(model, lora.LAGGED), predict(model), **last_bit(model))


def test_blend_is_the_moving_average(model):
    parameters = attach(model)
    start = [p.detach().clone() for _, p in lora.adapter_parameters(model.denoiser, lora.LAGGED)]
    perturb(parameters)
    lora.blend(model.denoiser, lora.LAGGED, decay=0.9)
    after = [p for _, p in lora.adapter_parameters(model.denoiser, lora.LAGGED)]
    for a, b, current in zip(after, start, parameters, strict=True):
        torch.testing.assert_close(a.detach(), 0.9 * b + 0.1 * current.detach())


def test_only_the_current_adapter_is_trainable_and_float32(model):
    model.pipeline.to(torch.bfloat16)
    parameters = attach(model)
    trainable = [p for p in model.denoiser.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in parameters}
    assert {p.dtype for p in parameters} == {torch.float32}


@pytest.mark.parametrize("name", [lora.LAGGED, lora.REFERENCE])
def test_the_current_policy_is_back_after_an_exception(model, name):
    parameters = attach(model)
    perturb(parameters)
    with torch.no_grad():
        expected = predict(model)
    with pytest.raises(RuntimeError, match="inside"), lora.policy(model.denoiser, name):
        raise RuntimeError("inside")
    assert all(p.requires_grad for p in parameters)
    with torch.no_grad():
        torch.testing.assert_close(predict(model), expected, rtol=0, atol=0)


@pytest.mark.parametrize("outer", [lora.CURRENT, lora.LAGGED, lora.REFERENCE])
@pytest.mark.parametrize("inner", [lora.CURRENT, lora.LAGGED, lora.REFERENCE])
def test_policies_can_be_nested(model, outer, inner):
    parameters = attach(model)
    perturb(parameters)
    lora.blend(model.denoiser, lora.LAGGED, decay=0.5)
    with torch.no_grad():
        alone = {name: predict(model, name) for name in (lora.CURRENT, outer, inner)}
        with lora.policy(model.denoiser, outer):
            with lora.policy(model.denoiser, inner):
                assert torch.equal(predict_base(model), alone[inner])
            assert torch.equal(predict_base(model), alone[outer])
        assert torch.equal(predict_base(model), alone[lora.CURRENT])
    assert all(p.requires_grad for p in parameters)


def test_a_policy_inside_training_does_not_disturb_the_gradient(model):
    every = attach(model)
    perturb(every)
    parameters = read(model, every)
    predict(model).square().mean().backward()
    expected = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    pred = predict(model)
    with torch.no_grad():
        predict(model, lora.REFERENCE)
        predict(model, lora.LAGGED)
    pred.square().mean().backward()
    for p, grad in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_targets_that_do_not_exist_are_named(model):
    with pytest.raises(ValueError, match="match no layer of .*: attn.to_x"):
        lora.attach(model.denoiser, rank=2, alpha=2, targets=[model.lora_targets[0], "attn.to_x"])


def test_exported_lora_loads_into_the_stock_pipeline(model, tmp_path):
    parameters = attach(model)
    perturb(parameters)
    file = lora.export_lora(model.denoiser, model.pipeline, tmp_path / "lora")
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert header["transformer.lora_alpha"] == header["transformer.r"] == RANK

    stock = tiny.MODELS[model.family]()  # the same base, nothing attached
    stock.pipeline.save_pretrained(tmp_path / "base")
    fresh = DiffusionPipeline.from_pretrained(tmp_path / "base")
    fresh.load_lora_weights(tmp_path / "lora")
    (config,) = fresh.transformer.peft_config.values()
    assert (config.r, config.lora_alpha) == (RANK, RANK)
    stock.pipeline = fresh
    with torch.no_grad():
        torch.testing.assert_close(predict_base(stock), predict(model), rtol=1e-4, atol=1e-4)


def test_adapter_state_goes_back_and_a_foreign_one_is_refused(model):
    parameters = attach(model)
    perturb(parameters)
    state = lora.adapter_state(model.denoiser, lora.CURRENT)
    lora.load_adapter_state(model.denoiser, lora.AVERAGED, state)
    with torch.no_grad():
        torch.testing.assert_close(predict(model, lora.AVERAGED), predict(model), **last_bit(model))
    state.pop(next(iter(state)))
    with pytest.raises(ValueError, match="does not fit"):
        lora.load_adapter_state(model.denoiser, lora.CURRENT, state)


def test_an_exported_lora_loads_on_a_quantised_base(tmp_path):
    """Stock classes alone: int8 weights by quanto, then `load_lora_weights`, alpha and all. (diffusers' FLUX loader
    looks for the names of plain weights and refuses any LoRA on a base of quanto's.)"""
    pytest.importorskip("optimum.quanto")
    model = tiny.MODELS["sd3"]()
    base, folder = tmp_path / "base", tmp_path / "lora"
    model.pipeline.save_pretrained(base)
    perturb(attach(model))
    lora.export_lora(model.denoiser, model.pipeline, folder)
    kind = type(model.denoiser)
    transformer = kind.from_pretrained(
        base,
        subfolder="transformer",
        torch_dtype=torch.float32,
        quantization_config=QuantoConfig(weights_dtype="int8"),
    )
    pipeline = DiffusionPipeline.from_pretrained(base, transformer=transformer)
    quantised = type(model)(pipeline, max_sequence_length=16)
    weight = next(m for n, m in transformer.named_modules() if n.endswith("attn.to_q")).weight
    assert type(weight).__name__ == "WeightQBytesTensor"
    with torch.no_grad():
        plain = predict_base(quantised)
        pipeline.load_lora_weights(folder)
        adapted = predict_base(quantised)
        expected = predict(model)
    assert (adapted - plain).square().mean() > 100 * (adapted - expected).square().mean()
    (adapter,) = transformer.peft_config.values()
    assert (adapter.r, adapter.lora_alpha) == (RANK, RANK)
    with pytest.raises(UsageError, match=r"rollout\.merge_lora"), lora.merged(transformer, "x"):
        pass


def exported(folder, family, rank=RANK):
    model = tiny.MODELS[family]()
    perturb(lora.attach(model.denoiser, rank=rank, alpha=ALPHA, targets=model.lora_targets))
    lora.export_lora(model.denoiser, model.pipeline, folder)
    return model


def test_a_lora_of_ours_is_loaded_and_works(tmp_path, model):
    trained = exported(tmp_path, model.family)
    plain = predict_base(model)
    lora.load_lora(model.pipeline, str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(predict_base(model), predict(trained), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(predict_base(model), plain, atol=1e-3)


def test_a_lora_of_another_model_is_named_and_nothing_is_loaded(tmp_path, model):
    other = "sd3" if model.family == "flux" else "flux"
    exported(tmp_path / "other", other)
    with pytest.raises(UsageError, match="LoRA of another model: this .* has no "):
        lora.load_lora(model.pipeline, str(tmp_path / "other"))
    exported(tmp_path / "size", model.family)
    file = tmp_path / "size" / "pytorch_lora_weights.safetensors"
    state = {k: torch.cat([v, v], 1) if ".lora_A." in k else v for k, v in load_file(file).items()}
    save_file(state, file)
    with pytest.raises(UsageError, match=r"has (\d+) features there, \d+ here"):
        lora.load_lora(model.pipeline, str(tmp_path / "size"))
    save_file({"something.else": torch.zeros(1)}, tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match="LoRA"):
        lora.load_lora(model.pipeline, str(tmp_path / "none.safetensors"))
    assert not getattr(model.denoiser, "peft_config", {})


def test_convolutions_carry_adapters_too(tmp_path):
    """As LCM-LoRA's do: the same merged and exported, for stock `load_lora_weights`."""
    model = tiny.sd_model()
    parameters = lora.attach(
        model.denoiser, rank=2, alpha=4, targets=("to_q", "conv1", "conv_shortcut")
    )
    lora.keep_input_dtype(model.denoiser)
    assert any(p.ndim == 4 for p in parameters)
    perturb(parameters)
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, *model.latent_shape((16, 16)), generator=generator)
    embeds, times = model.encode_prompt(["a ring", "a circle"]), torch.tensor([300.0, 800.0])
    with torch.no_grad():
        expected = model.predict(noisy, times, embeds)
        with lora.merged(model.denoiser, lora.CURRENT):
            torch.testing.assert_close(
                model.predict(noisy, times, embeds), expected, rtol=1e-4, atol=1e-5
            )
        lora.export_lora(model.denoiser, model.pipeline, tmp_path)
        other = tiny.sd_model()
        assert not torch.allclose(other.predict(noisy, times, embeds), expected, atol=1e-3)
        lora.load_lora(other.pipeline, str(tmp_path))
        found = other.predict(noisy, times, embeds)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
