"""Moved denoisers share what is not theirs, and the pipelines over them are drop-in."""

import copy
import json

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from processes import python
from tiny_moves import deep_autoencoder, moved_model

from diffalign import lora
from diffalign.core.errors import UsageError, UserError
from diffalign.latents.alignment import LinearFit
from diffalign.latents.codec import CodecError, LatentCodec
from diffalign.latents.move import MoveError, layer, load_ends, matrix, save_ends, set_layer
from diffalign.latents.shift import moved_scheduler
from diffalign.pipelines.moving import load_autoencoder, move_model
from diffalign.pipelines.registry import load_meta_model, load_model

PROMPTS = ["a photo of a red circle", "two blue squares"]
every_family = pytest.mark.parametrize("family", sorted(tiny.MOVABLE))


def draw(pipeline, seed=0, **kwargs):
    options = {"num_inference_steps": 2, "output_type": "np", "max_sequence_length": 16}
    generator = torch.Generator().manual_seed(seed)
    return pipeline(PROMPTS, generator=generator, **options | kwargs).images


@every_family
def test_all_but_the_ends_is_shared(family):
    base, model = moved_model(family)
    ends = (model.ends.embedder, model.ends.head)
    old = dict(base.denoiser.named_parameters())
    for name, parameter in model.denoiser.named_parameters():
        mine = name.startswith(tuple(f"{e}." for e in ends))
        assert mine or parameter is old[name], name
    assert not any(t.is_meta for t in model.denoiser.state_dict().values())
    assert type(model.denoiser) is type(base.denoiser)
    height, width = base.default_size
    k = model.pixels_per_token // base.pixels_per_token
    assert model.image_seq_len((height, width)) * k**2 == base.image_seq_len((height, width))


@every_family
def test_the_base_draws_as_before(family):
    base = tiny.MODELS[family]()
    size = {"height": base.default_size[0], "width": base.default_size[1]}
    if family == "sana":
        size["use_resolution_binning"] = False
    before = draw(base.pipeline, **size)
    move_model(base, deep_autoencoder(), size=base.default_size)
    np.testing.assert_array_equal(before, draw(base.pipeline, **size))


def test_the_same_latents_are_the_same_model():
    """Moving to an autoencoder with the same tokens, with the old ends put in, is the identity."""
    base = tiny.flux_model()
    vae = deep_autoencoder(channels=16)
    vae.spatial_compression_ratio = (
        4  # as many pixels a token as the base's; nothing is encoded here
    )
    model = move_model(base, vae, size=(16, 16))
    for end in (model.ends.embedder, model.ends.head):
        old = layer(base.denoiser, end)
        set_layer(layer(model.denoiser, end), LinearFit(matrix(old), old.bias, 1, 0))
    latents, times, embeds = base.random_inputs(2, (16, 16))
    from diffalign.latents.codec import pack, unpack

    with torch.no_grad():
        wanted = base.predict(latents, times, embeds)
        moved = unpack(pack(latents, 2), 1, height=4, width=4)
        found = model.predict(moved, times, embeds)
    assert torch.equal(pack(wanted, 2), pack(found, 1))


@every_family
def test_our_rollout_is_the_pipelines(family):
    _, model = moved_model(family)
    options = {"guidance_scale": 1.0}
    found = tiny.rollout(model, PROMPTS, generator=torch.Generator().manual_seed(3), **options)
    options |= {"num_inference_steps": 4, "output_type": "np", "max_sequence_length": 16}
    images = model.pipeline(PROMPTS, generator=torch.Generator().manual_seed(3), **options).images
    np.testing.assert_array_equal(found, (images * 255).round().astype("uint8"))


@every_family
def test_any_legal_size_and_given_latents(family):
    _, model = moved_model(family)
    f = model.pixels_per_token
    height, width = (2 * f, 3 * f) if family != "sana" else (32, 64)
    sizes = {"height": height, "width": width}
    if family == "sana":
        sizes["use_resolution_binning"] = False
    assert draw(model.pipeline, **sizes).shape[1:] == (height, width, 3)
    c, h, w = model.latent_shape((height, width))
    noise = torch.randn(2, c, h, w)
    given = noise.flatten(2).transpose(1, 2) if family == "flux" else noise
    a = draw(model.pipeline, latents=given, **sizes)
    np.testing.assert_array_equal(a, draw(model.pipeline, seed=5, latents=given, **sizes))
    with pytest.raises(ValueError, match="`latents` must have the shape"):
        draw(model.pipeline, latents=given[:, :, 1:], **sizes)
    with pytest.raises(ValueError, match="multiples of"):
        draw(model.pipeline, **sizes | {"height": height + 1})
    with pytest.raises(UsageError):
        model.latent_shape((height + 1, width))
    with pytest.raises(ValueError, match="trained with 16 text tokens"):
        draw(model.pipeline, max_sequence_length=20)


@every_family
def test_a_folder_loads_everywhere(family, tmp_path):
    """C9: our class, our loader, stock diffusers with the folder's own code."""
    _, model = moved_model(family)
    folder = tmp_path / "pipeline"
    options = {"use_resolution_binning": False} if family == "sana" else {}
    wanted = draw(model.pipeline, **options)
    model.pipeline.save_pretrained(folder)
    assert "shift_factor" not in json.loads((folder / "vae" / "config.json").read_text())
    code = (folder / "pipeline_dcgen.py").read_text()
    (folder / "pipeline_dcgen.py").write_text("raise RuntimeError('code of a stranger')")
    again = type(model.pipeline).from_pretrained(folder)  # runs none of the folder's
    np.testing.assert_array_equal(wanted, draw(again, **options))
    loaded = load_model(str(folder), dtype=torch.float32)
    assert type(loaded) is type(model)
    assert loaded.max_sequence_length == 16
    assert loaded.default_size == model.default_size
    np.testing.assert_array_equal(wanted, draw(loaded.pipeline, **options))
    (folder / "pipeline_dcgen.py").write_text(code)
    stock = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    np.testing.assert_array_equal(wanted, draw(stock, **options))
    stock.save_pretrained(tmp_path / "again")  # it still brings its code
    assert (tmp_path / "again" / "pipeline_dcgen.py").is_file()


@pytest.mark.slow
def test_a_folder_loads_without_this_suite(tmp_path):
    _, model = moved_model("flux")
    model.pipeline.save_pretrained(tmp_path / "pipeline")
    variables = {"HF_HOME": str(tmp_path / "home"), "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = python("stock_folder", tmp_path / "pipeline", env=variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-3:] == ["DCGenFluxPipeline", "8", "2"]


def test_another_autoencoder_is_refused(tmp_path):
    _, model = moved_model("flux")
    model.pipeline.save_pretrained(tmp_path)
    deep_autoencoder(1).save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="was trained with another autoencoder"):
        load_model(str(tmp_path))
    deep_autoencoder().save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="was trained with 16 text tokens, not 20"):
        load_model(str(tmp_path), max_sequence_length=20)
    with pytest.raises(ValueError, match="it is another autoencoder"):
        type(model.pipeline)(**model.pipeline.components | {"vae": deep_autoencoder(channels=4)})


@every_family
def test_a_lora_of_the_moved_model_loads(family, tmp_path):
    _, model = moved_model(family)
    options = {"use_resolution_binning": False} if family == "sana" else {}
    plain = copy.deepcopy(model.pipeline)
    lora.attach(model.denoiser, rank=2, alpha=2, targets=model.lora_targets)
    with torch.no_grad():
        for parameter in lora.trainable(model.denoiser):
            parameter.normal_(0, 0.3)
    wanted = draw(model.pipeline, **options)
    lora.export_lora(model.denoiser, model.pipeline, tmp_path)
    assert np.abs(wanted - draw(plain, **options)).max() > 1e-3
    plain.load_lora_weights(tmp_path)
    np.testing.assert_allclose(wanted, draw(plain, **options), atol=1e-5)


@every_family
def test_folding_an_adapter_gives_the_same_model_without_it(family):
    """C5."""
    _, model = moved_model(family)
    targets = [*model.lora_targets, model.ends.embedder, model.ends.head]
    lora.attach(model.denoiser, rank=2, alpha=2, targets=targets)
    with torch.no_grad():
        for parameter in lora.trainable(model.denoiser):
            parameter.normal_(0, 0.3)
    inputs = model.random_inputs(2, model.default_size)
    with torch.no_grad():
        wanted = model.predict(*inputs)
        plain = lora.folded(model.denoiser, lora.CURRENT)
        assert not any("lora_" in name or "base_layer" in name for name in plain.state_dict())
        assert torch.equal(wanted, model.predict(*inputs)), "the one with adapters is as it was"
        model.pipeline.register_modules(transformer=plain)
        torch.testing.assert_close(model.predict(*inputs), wanted, atol=1e-4, rtol=1e-4)


def test_callbacks_tiling_and_attention_backends():
    _, model = moved_model("flux")
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append(tuple(tensors["latents"].shape))
        return tensors

    draw(model.pipeline, callback_on_step_end=callback)
    assert seen == [(2, 4, 8)] * 2
    model.pipeline.vae.enable_slicing()
    model.pipeline.vae.enable_tiling()
    model.pipeline.transformer.set_attention_backend("native")
    assert draw(model.pipeline).shape == (2, 16, 16, 3)


@every_family
@pytest.mark.parametrize(
    "how",
    [
        {"offload_type": "leaf_level"},
        {"offload_type": "block_level", "num_blocks_per_group": 1},
    ],
    ids=lambda how: how["offload_type"],
)
def test_offloading(family, how):
    base, model = moved_model(family)
    plain = draw(model.pipeline)
    device = torch.device("cpu")
    model.pipeline.enable_group_offload(onload_device=device, offload_device=device, **how)
    np.testing.assert_array_equal(draw(model.pipeline), plain)
    assert model.pipeline.model_cpu_offload_seq == base.pipeline.model_cpu_offload_seq


def test_ends_are_kept_and_refused(tmp_path):
    _, model = moved_model("sd3")
    file = tmp_path / "ends.safetensors"
    save_ends(model.denoiser, model.ends, file)
    kept = {
        e: layer(model.denoiser, e).weight.clone() for e in (model.ends.embedder, model.ends.head)
    }
    for end in kept:
        torch.nn.init.zeros_(layer(model.denoiser, end).weight)
    load_ends(model.denoiser, model.ends, file)
    assert all(torch.equal(layer(model.denoiser, e).weight, w) for e, w in kept.items())
    _, other = moved_model("sd3", channels=4)
    with pytest.raises(MoveError, match="of another model"):
        load_ends(other.denoiser, other.ends, file)
    file.write_bytes(b"cut")
    with pytest.raises(MoveError, match="damaged"):
        load_ends(model.denoiser, model.ends, file)
    with pytest.raises(MoveError, match="is not for"):
        set_layer(
            layer(model.denoiser, model.ends.head),
            LinearFit(torch.zeros(3, 3), torch.zeros(3), 1, 0),
        )


@every_family
def test_a_prefix_of_the_channels(family, tmp_path):
    """As DC-AE 1.5 is read: what is left out is zero to the decoder."""
    base = tiny.MODELS[family]()
    model = move_model(base, deep_autoencoder(), size=base.default_size, channels=5)
    assert model.codec.channels == model.latent_shape(model.default_size)[0] == 5
    images = torch.randint(0, 256, (2, 3, *model.default_size), dtype=torch.uint8)
    latents = model.encode(images)
    whole = LatentCodec(deep_autoencoder())
    assert torch.equal(latents, whole.encode(images)[:, :5])
    zeros = torch.zeros(2, 3, *latents.shape[2:])
    assert torch.equal(model.decode(latents), whole.decode(torch.cat([latents, zeros], 1)))
    options = {"use_resolution_binning": False} if family == "sana" else {}
    wanted = draw(model.pipeline, **options)
    model.pipeline.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), dtype=torch.float32)
    np.testing.assert_array_equal(wanted, draw(again.pipeline, **options))
    with pytest.raises(CodecError, match="latents.channels=9: the autoencoder has 8 channels"):
        move_model(base, deep_autoencoder(), size=base.default_size, channels=9)


# --- the shift


@pytest.mark.parametrize("signal", [1.0, 1.7])
@pytest.mark.parametrize("kind", ["static", "exponential", "linear"])
def test_one_rule_for_training_evaluation_and_pipeline(kind, signal):
    """C8: what training draws its noise levels by is what the pipeline's scheduler does."""
    base, model = moved_model("flux")
    config = {
        "static": {"shift": 3.0},
        "exponential": {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
        "linear": {
            "use_dynamic_shifting": True,
            "base_shift": 1.5,
            "max_shift": 3.0,
            "time_shift_type": "linear",
        },
    }[kind]
    base.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**config)
    model.pipeline.scheduler = moved_scheduler(base.pipeline.scheduler, ratio=2, signal=signal)
    size = (64, 32)
    steps = 8
    ours = model.shifted(torch.linspace(1, 1 / steps, steps), size)
    theirs = model.scheduler_at(steps, size).sigmas[:-1]
    if kind == "static":
        theirs = torch.as_tensor(
            FlowMatchEulerDiscreteScheduler.from_config(
                model.pipeline.scheduler.config
            ).config.shift
        )
        assert theirs == pytest.approx(3 * signal)
    else:
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    plain = base.shifted(torch.linspace(1, 1 / steps, steps), size)
    torch.testing.assert_close(ours, signal * plain / (1 + (signal - 1) * plain))


def test_a_scheduler_without_a_shift_keeps_its_noise_levels():
    from diffusers import DDIMScheduler

    kept = moved_scheduler(DDIMScheduler(), ratio=2)
    assert kept.config.num_train_timesteps == 1000
    with pytest.raises(UsageError, match="has no shift"):
        moved_scheduler(DDIMScheduler(), ratio=2, signal=2.0)


# --- what cannot be moved


def test_what_cannot_be_moved_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no patch embedder"):
        move_model(tiny.sd_model(), deep_autoencoder(), size=(16, 16))
    with pytest.raises(UsageError, match="do not fit an autoencoder"):
        move_model(tiny.flux_model(), deep_autoencoder(), size=(12, 16))
    with pytest.raises(UsageError, match="latents.autoencoder: .*could not be loaded"):
        load_autoencoder(str(tmp_path / "nothing"))
    deep_autoencoder().save_pretrained(tmp_path / "ae" / "vae")
    assert load_autoencoder(str(tmp_path / "ae")).config.latent_channels == 8
    assert next(load_autoencoder(str(tmp_path / "ae"), meta=True).parameters()).is_meta


def test_a_schedule_by_tokens_is_that_of_as_many_tokens():
    """f64 at 4K has as many tokens as the base at 1K."""
    base = tiny.flux_model()
    model = move_model(base, deep_autoencoder(), size=(16, 16), shift="tokens")
    sigmas = torch.linspace(1, 0.1, 5)
    found = model.shifted(sigmas, (32, 32))
    torch.testing.assert_close(found, base.shifted(sigmas, (16, 16)))


def test_recomputing_activations_goes_along():
    base = tiny.flux_model()
    base.denoiser.enable_gradient_checkpointing()
    model = move_model(base, deep_autoencoder(), size=(16, 16))
    assert model.denoiser.gradient_checkpointing
    lora.attach(model.denoiser, rank=2, alpha=2, targets=model.lora_targets)
    model.denoiser.train()
    model.predict(*model.random_inputs(2, (16, 16))).sum().backward()
    assert all(p.grad is not None for p in lora.trainable(model.denoiser))


def test_a_moved_model_on_the_meta_device_knows_its_size(tmp_path):
    _, model = moved_model("flux")
    model.pipeline.save_pretrained(tmp_path)
    found = load_meta_model(str(tmp_path))
    assert (found.default_size, found.max_sequence_length) == ((16, 16), 16)
    with pytest.raises(ValueError, match="another autoencoder: scale was 1.1, not 1.3"):
        type(model.pipeline)(
            **model.pipeline.components | {"vae": deep_autoencoder(scale=1.3)},
            codec=model.codec.to_dict(),
        )


# --- what goes on top


def test_a_lora_of_the_base_goes_along(tmp_path):
    """Its layers are the same layers."""
    base, model = moved_model("flux")
    plain = draw(model.pipeline)
    other = tiny.flux_model()
    lora.attach(other.denoiser, rank=2, alpha=2, targets=other.lora_targets)
    with torch.no_grad():
        for parameter in lora.trainable(other.denoiser):
            parameter.normal_(0, 0.3)
    lora.export_lora(other.denoiser, other.pipeline, tmp_path)
    lora.load_lora(model.pipeline, str(tmp_path))
    assert np.abs(draw(model.pipeline) - plain).max() > 1e-3
    assert base.denoiser.transformer_blocks is model.denoiser.transformer_blocks


def test_caches_of_blocks_work():
    from diffusers import FirstBlockCacheConfig

    _, model = moved_model("flux")
    plain = draw(model.pipeline)
    model.pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    np.testing.assert_allclose(draw(model.pipeline), plain, atol=1e-5)
    model.pipeline.transformer.disable_cache()


def test_its_schedule_is_tuned_like_any_other(tmp_path, capsys):
    from diffalign import cli

    _, model = moved_model("flux")
    model.pipeline.save_pretrained(tmp_path / "moved")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a photo of {i} circles" for i in range(6)))
    tune = ["qsched", f"--model={tmp_path / 'moved'}", f"--prompts={prompts}"]
    tune += ["--objective=jpeg", "--engine=coordinate", "--budget=3", "--dtype=float32"]
    tune += ["--num_inference_steps=2", f"--output_dir={tmp_path / 'tuned'}"]
    assert cli.main(tune) == 0
    capsys.readouterr()
    loaded = load_model(str(tmp_path / "tuned"), dtype=torch.float32)
    assert type(loaded.pipeline).__name__ == "DCGenFluxPipeline"
    assert loaded.max_sequence_length == 16
    assert loaded.pipeline.config.codec == model.codec.to_dict()
