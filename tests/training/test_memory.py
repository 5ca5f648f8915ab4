"""The memory forecast against what a real step keeps."""

from functools import cache

import pytest
import tiny
import tiny_runs
import torch
from accelerate import Accelerator
from marks import slow_except
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from benchmarks.awm.phases import published
from diffalign import lora
from diffalign.config import load, recipes
from diffalign.core.precision import compute
from diffalign.data.prompts import load_prompts
from diffalign.methods.online.trainer import OnlineTrainer
from diffalign.pipelines.registry import load_meta_model
from diffalign.training.memory import MemoryForecast, adapted, forecast, saved_bytes, size_of
from diffalign.training.run_folder import RunFolder

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
FAMILIES = {**tiny.MODELS, **tiny.UNETS}


@pytest.fixture(scope="module", params=["sd3", "flux", "sana", "sd", "sdxl"])
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = FAMILIES[request.param]()
    model.pipeline.to(torch.bfloat16)
    model.pipeline.save_pretrained(folder)
    return request.param, folder, model


def configuration(folder, *more, algorithm=("--algorithm.timesteps_per_image=2",)):
    side = 32 if folder.name.startswith("sana") else 16
    return load(
        None,
        [
            f"--model.name={folder}",
            "--model.max_sequence_length=16",
            "--lora.rank=4",
            "--lora.alpha=8",
            f"--rollout.height={side}",
            f"--rollout.width={side}",
            "--training.micro_batch_size=8",
            *algorithm,
            *more,
        ],
    )


@pytest.mark.parametrize("mixed_precision", ["bf16", "no"])
def test_forecast_agrees_with_a_real_step(family, mixed_precision):
    kind, folder, _ = family
    config = configuration(folder, f"--training.mixed_precision={mixed_precision}")
    found = forecast(load_meta_model(str(folder), max_sequence_length=16), config)

    model = FAMILIES[kind]()
    model.pipeline.to(torch.bfloat16)
    assert found.denoiser == size_of(model.denoiser)
    assert found.autoencoder == size_of(model.pipeline.vae)
    everything = [c for c in model.pipeline.components.values() if isinstance(c, torch.nn.Module)]
    assert found.denoiser + found.text_encoders + found.autoencoder == sum(map(size_of, everything))
    parameters = lora.attach(model.denoiser, rank=4, alpha=8, targets=model.lora_targets)
    trained = sum(p.numel() * p.element_size() for p in parameters)
    assert found.adapters == found.optimizer == 3 * trained

    if mixed_precision == "bf16":
        lora.keep_input_dtype(model.denoiser)

    embeds = model.encode_prompt(["a cat"] * 16)
    assert model.prompt_shape() == (
        *embeds.prompt_embeds.shape[1:],
        0 if embeds.pooled_prompt_embeds is None else embeds.pooled_prompt_embeds.shape[1],
    )
    latents, times = torch.randn(16, 4, 8, 8).bfloat16(), torch.full((16,), 500.0)

    def step():
        with compute("cpu", mixed_precision), sdpa_kernel(FUSED):
            return model.predict(latents, times, embeds).float().square().mean()

    measured = saved_bytes(model.denoiser, step)
    assert found.activations == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("kind", FAMILIES)
def test_adapters_that_share_their_input_keep_less_and_compute_the_same(kind):
    model = FAMILIES[kind]()
    model.pipeline.to(torch.bfloat16)
    lora.attach(model.denoiser, rank=4, alpha=8, targets=model.lora_targets)
    embeds = model.encode_prompt(["a cat"] * 2)
    shape = model.latent_shape(model.default_size)
    latents, times = torch.randn(2, *shape), torch.full((2,), 500.0)
    found = []

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model.predict(latents, times, embeds))
        return found[-1]

    apart = saved_bytes(model.denoiser, forward)
    lora.keep_input_dtype(model.denoiser)
    assert saved_bytes(model.denoiser, forward) < 0.97 * apart
    assert torch.equal(*found)


def test_activations_grow_with_the_micro_batch_and_shrink_with_checkpointing(family):
    _, folder, _ = family
    sizes = {}
    for name, more in {
        "one": ["--training.micro_batch_size=4"],
        "two": ["--training.micro_batch_size=8"],
        "checkpointed": ["--model.gradient_checkpointing=true"],
    }.items():
        model = load_meta_model(str(folder), max_sequence_length=16)
        sizes[name] = forecast(model, configuration(folder, *more)).activations
    assert sizes["two"] == pytest.approx(2 * sizes["one"], rel=0.1)
    assert sizes["checkpointed"] < sizes["two"]


KEPT = {
    "awm": ["--algorithm.timesteps_per_image=2"],
    "awm, states": [
        *("--algorithm.timesteps_per_image=2", "--algorithm.noise=rollout"),
        "--algorithm.timestep_stop=0.5",
    ],
    "flow_grpo": [
        *("--algorithm.type=flow_grpo", "--algorithm.window_size=2", "--algorithm.dynamics=cps")
    ],
}


@pytest.mark.parametrize("kind", tiny.MODELS)
@pytest.mark.parametrize("how", KEPT)
def test_forecast_of_a_rollout_agrees_with_what_an_update_keeps(kind, how, tmp_path):
    folder = tmp_path / kind
    model = FAMILIES[kind]()
    model.pipeline.to(torch.bfloat16)
    model.pipeline.save_pretrained(folder)
    more = [
        *("--rollout.prompts_per_update=3", "--rollout.group_size=4"),
        *("--rollout.num_inference_steps=4", "--rollout.micro_batch_size=5"),
        *("--training.drop_uninformative=false", "--training.num_updates=2"),
    ]
    config = configuration(folder, *more, algorithm=KEPT[how])
    found = forecast(load_meta_model(str(folder), max_sequence_length=16), config)

    trainer = OnlineTrainer(
        config,
        model,
        Accelerator(cpu=True),
        RunFolder(tmp_path / "run"),
        tiny_runs.redness,
        load_prompts("shapes:train"),
    )
    plan = trainer.plan(1)
    rollout = trainer.rollout(plan, 1)
    batch, _ = trainer.make_batch(plan, rollout)
    parts = [rollout.latents, batch.latents]
    embeds = [rollout.embeds.prompt_embeds, rollout.embeds.pooled_prompt_embeds]
    states = [part.trajectory.latents for part in (rollout, batch) if part.trajectory is not None]
    assert found.rollout == stored([*parts, *embeds, *(states if how == "flow_grpo" else [])])
    rest = found.host - stored(states if how == "awm, states" else [])
    assert rest == 2 * stored(embeds)  # of two updates with prompts of their own


def stored(tensors):
    """Bytes of tensors that share none."""
    sizes = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t is not None
    }
    return sum(sizes.values())


def test_processes_share_images_and_not_prompts(tmp_path):
    tiny.sd3_pipeline().save_pretrained(tmp_path)
    config = configuration(tmp_path, "--rollout.prompts_per_update=3", "--rollout.group_size=4")
    one, five = (
        forecast(
            load_meta_model(str(tmp_path), max_sequence_length=16), config, processes=n
        ).rollout
        for n in (1, 5)
    )
    image = 4 * 8 * 8 * 2
    assert one - five == 2 * (12 - 3) * image  # the largest share of 12 images


def test_merged_weights_are_those_that_merging_makes(family):
    kind, folder, _ = family
    config = configuration(folder, "--rollout.merge_lora=true")
    found = forecast(load_meta_model(str(folder), max_sequence_length=16), config)
    model = FAMILIES[kind]()
    model.pipeline.to(torch.bfloat16)
    lora.attach(model.denoiser, rank=4, alpha=8, targets=model.lora_targets)
    before = {p.data_ptr() for p in model.denoiser.parameters()}
    with lora.merged(model.denoiser, lora.CURRENT):
        copies = [p for p in model.denoiser.parameters() if p.data_ptr() not in before]
        made = sum(p.numel() * p.element_size() for p in copies)
    assert found.merged_weights == adapted(model.denoiser) == made > 0
    plain = forecast(load_meta_model(str(folder), max_sequence_length=16), configuration(folder))
    assert plain.merged_weights == 0


def clip(width, layers, kind):
    heads, inner = width // 64, 4 * width
    return kind(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            projection_dim=width,
        )
    )


@cache
def text_encoders(family):
    """Of published size, on the meta device."""
    with torch.device("meta"):
        t5 = T5EncoderModel(
            T5Config(
                d_model=4096,
                d_ff=10240,
                d_kv=64,
                num_heads=64,
                num_layers=24,
                vocab_size=32128,
                feed_forward_proj="gated-gelu",
            )
        )
        if family == "flux":
            found = {"text_encoder": clip(768, 12, CLIPTextModel), "text_encoder_2": t5}
        else:
            found = {
                "text_encoder": clip(768, 12, CLIPTextModelWithProjection),
                "text_encoder_2": clip(1280, 32, CLIPTextModelWithProjection),
                "text_encoder_3": t5,
            }
    return {name: part.to(torch.bfloat16) for name, part in found.items()}


# the other recipes of these models differ in their rewards
@pytest.mark.parametrize(
    "recipe",
    slow_except(
        ["awm-sd3.5-medium", "awm-flux.1-dev"],
        [r for r in recipes() if r.startswith(("awm-sd3.5-medium", "awm-flux.1-dev"))],
    ),
)
def test_recipes_at_published_sizes(recipe):
    config = load(recipe, ["--rollout.merge_lora=true"])
    model = published(config.model.name)
    model.pipeline.register_modules(**text_encoders(model.family))
    found = forecast(model, config)
    modules = [p for p in model.pipeline.components.values() if isinstance(p, torch.nn.Module)]
    assert all(t.is_meta for m in modules for t in (*m.parameters(), *m.buffers()))

    gib = {name: size / 2**30 for name, size in vars(found).items()}
    flux = model.family == "flux"
    # 11.9 and 2.24 billion parameters (and SD3.5's table of positions), T5 4.76 with CLIP's, the autoencoder 0.084
    assert gib["denoiser"] == pytest.approx(22.17 if flux else 4.60, abs=0.01)
    assert gib["text_encoders"] == pytest.approx(9.10 if flux else 10.41, abs=0.02)
    assert gib["autoencoder"] == pytest.approx(0.156, abs=0.001)
    inner = 3072 if flux else 1536
    matrices = 19 * 8 + 38 * 3 if flux else 24 * 8 - 1
    assert found.adapters == found.optimizer == 3 * matrices * 2 * inner * 32 * 4
    assert found.merged_weights == matrices * inner**2 * 2
    image, prompt = 16 * 64 * 64 * 2, (512 * 4096 + 768 if flux else 333 * 4096 + 2048) * 2
    prompts = config.rollout.prompts_per_update
    assert config.rollout.group_size == 24
    assert found.rollout == prompts * (2 * 24 * image + prompt)
    assert found.host == 4096 * prompt
    assert 1 < gib["activations"] < 20
    parts = [size for name, size in vars(found).items() if name not in ("host", "merged_weights")]
    # a rollout on merged weights and a training step do not meet: FLUX.1's second copy is the larger of the two
    assert (found.merged_weights > found.activations) == flux
    assert found.total == sum(parts) + max(0, found.merged_weights - found.activations)


def test_printed_parts():
    parts = ("denoiser", "text_encoders", "autoencoder", "adapters", "optimizer", "rollout")
    sizes = {name: (i + 1) * 2**30 for i, name in enumerate(parts)}
    text = "denoiser 1.00, text encoders 2.00, autoencoder 3.00, adapters 4.00, optimizer 5.00"
    online = MemoryForecast(**sizes, activations=7 * 2**30, merged_weights=9 * 2**30, host=2**29)
    assert str(online) == (
        f"memory forecast, GiB for a process: 30.00 ({text}, rollout 6.00, activations 7.00 or merged weights 9.00), "
        "and up to 0.50 on the CPU"
    )
    pairs = MemoryForecast(**{**sizes, "rollout": 0}, activations=2**30, merged_weights=0, host=0)
    assert str(pairs) == f"memory forecast, GiB for a process: 16.00 ({text}, activations 1.00)"


def test_printed(family):
    _, folder, _ = family
    text = str(
        forecast(load_meta_model(str(folder), max_sequence_length=16), configuration(folder))
    )
    assert text.startswith("memory forecast, GiB for a process: 0.0")
    assert "activations" in text
