"""The memory forecast against the allocator, by torch's profiler."""

from functools import cache

import pytest
import tiny
import tiny_runs
import torch
from accelerate import Accelerator
from marks import slow_except
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
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
from diffalign.training.memory import MemoryForecast, MetaRun, adapted, forecast, size_of
from diffalign.training.peak import LiveBytes, peak_of
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


def resident(folder, config, **options):
    """What is there at all times, without the peaks."""
    model = load_meta_model(str(folder), max_sequence_length=16)
    return MetaRun(model, config).resident(config, **options)


@pytest.mark.parametrize("mixed_precision", ["bf16", "no"])
def test_forecast_agrees_with_a_real_step(family, mixed_precision):
    kind, folder, _ = family
    config = configuration(folder, f"--training.mixed_precision={mixed_precision}")
    found = forecast(load_meta_model(str(folder), max_sequence_length=16), config)
    config.model.gradient_checkpointing = True
    small = forecast(load_meta_model(str(folder), max_sequence_length=16), config)

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
    model.denoiser.train()
    for checkpointed, expected in ((False, found), (True, small)):
        if checkpointed:
            model.denoiser.enable_gradient_checkpointing()

        def step():
            with compute("cpu", mixed_precision), sdpa_kernel(FUSED):
                model.predict(latents, times, embeds).float().square().mean().backward()

        step()  # the gradients are there from now on
        # a CPU's convolutions copy their weights into another layout
        rel = 0.2 if kind in tiny.UNETS else 0.12
        assert expected.activations == pytest.approx(profiled(step), rel=rel)


def profiled(run):
    """The largest number of bytes that the allocator had given out in a call, as torch's profiler saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_drawing_and_decoding_agree_with_the_allocator(family):
    kind, folder, _ = family
    config = configuration(folder, "--rollout.micro_batch_size=16")
    found = forecast(load_meta_model(str(folder), max_sequence_length=16), config)
    model = FAMILIES[kind]()
    model.pipeline.to(torch.bfloat16)
    lora.attach(model.denoiser, rank=4, alpha=8, targets=model.lora_targets)
    lora.keep_input_dtype(model.denoiser)
    side = 32 if kind == "sana" else 16
    latents, times, embeds = model.random_inputs(16, (side, side))

    def drawn():
        with torch.no_grad(), compute("cpu", "bf16"), sdpa_kernel(FUSED):
            model.predict(latents, times, embeds)

    rel = 0.25 if kind in tiny.UNETS else 0.15
    assert found.sampling == pytest.approx(profiled(drawn), rel=rel)

    def decoded():
        with compute("cpu", "bf16"), sdpa_kernel(FUSED):
            model.decode_checked(latents)

    # a CPU's convolutions make copies in other layouts
    assert profiled(decoded) >= 0.85 * found.decoding
    assert found.encoding == 0


def test_live_bytes_of_a_closed_form():
    layer = torch.nn.Linear(1000, 1000, bias=False)

    def run():
        a = layer(torch.ones(10, 1000))  # 40 kB in, 40 kB out
        del a
        return torch.ones(5, 1000)

    assert peak_of(layer.requires_grad_(False), run) == 80_000
    with LiveBytes() as mode:
        kept = torch.zeros(1000)
        view = kept[:10]
        assert (mode.live, mode.peak) == (4000, 4000)
        del kept
        assert mode.live == 4000
        del view
        assert (mode.live, mode.peak) == (0, 4000)


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

    apart = tiny.saved_bytes(model.denoiser, forward)
    lora.keep_input_dtype(model.denoiser)
    assert tiny.saved_bytes(model.denoiser, forward) < 0.97 * apart
    assert torch.equal(*found)


def test_activations_grow_with_the_micro_batch_and_shrink_with_checkpointing(family):
    _, folder, _ = family
    peaks = MetaRun(
        load_meta_model(str(folder), max_sequence_length=16), configuration(folder)
    ).peaks
    sizes = {}
    for name, more in {
        "one": ["--training.micro_batch_size=4"],
        "two": ["--training.micro_batch_size=8"],
        "checkpointed": ["--model.gradient_checkpointing=true"],
    }.items():
        sizes[name] = peaks.training(configuration(folder, *more))
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
    found = resident(folder, config)

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
    one, five = (resident(tmp_path, config, processes=n).rollout for n in (1, 5))
    image = 4 * 8 * 8 * 2
    assert one - five == 2 * (12 - 3) * image  # the largest share of 12 images


def test_merged_weights_are_those_that_merging_makes(family):
    kind, folder, _ = family
    config = configuration(folder, "--rollout.merge_lora=true")
    found = resident(folder, config)
    model = FAMILIES[kind]()
    model.pipeline.to(torch.bfloat16)
    lora.attach(model.denoiser, rank=4, alpha=8, targets=model.lora_targets)
    before = {p.data_ptr() for p in model.denoiser.parameters()}
    with lora.merged(model.denoiser, lora.CURRENT):
        copies = [p for p in model.denoiser.parameters() if p.data_ptr() not in before]
        made = sum(p.numel() * p.element_size() for p in copies)
    assert found.merged_weights == adapted(model.denoiser) == made > 0
    plain = resident(folder, configuration(folder))
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
        ["awm-sd3.5-medium"],
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
    always = sum(found.always.values())
    assert found.total == always + max(found.activations, found.phases["drawing"])
    # a rollout on merged weights and a training step do not meet: FLUX.1's second copy is the larger of the two
    assert (found.merged_weights > found.activations) == flux


def test_printed_parts():
    parts = ("denoiser", "text_encoders", "autoencoder", "adapters", "optimizer", "rollout")
    sizes = {name: (i + 1) * 2**30 for i, name in enumerate(parts)}
    text = "denoiser 1.00, text encoders 2.00, autoencoder 3.00, adapters 4.00, optimizer 5.00"
    online = MemoryForecast(**sizes, activations=7 * 2**30, merged_weights=9 * 2**30, host=2**29)
    assert str(online) == (
        f"memory forecast, GiB for a process: 30.00 ({text}, rollout 6.00, and the largest of training 7.00, drawing "
        "9.00), and up to 0.50 on the CPU"
    )
    resting = MemoryForecast(**sizes, activations=2**30, decoding=2**29, encoders_rest=True)
    assert resting.phases == {"training": 2**30, "drawing": 3.5 * 2**30, "encoding": 2 * 2**30}
    assert resting.total == (1 + 4 + 5 + 6 + 3.5) * 2**30


def test_printed(family):
    _, folder, _ = family
    text = str(
        forecast(load_meta_model(str(folder), max_sequence_length=16), configuration(folder))
    )
    assert text.startswith("memory forecast, GiB for a process: 0.0")
    assert "training" in text
