"""Parts in CPU memory and quantised bases: the same numbers, on a device that is held to its rules."""

import pytest
import tiny
import tiny_runs
import torch
from accelerate import Accelerator
from second_device import CUDA, SecondDevice, is_on

from diffalign.config import ConfigError, OptimizerConfig, load
from diffalign.data.prompts import load_prompts
from diffalign.methods.online.trainer import OnlineTrainer
from diffalign.pipelines.compiled import blocks
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.embed_folder import EmbedFolder
from diffalign.pipelines.offloading import Resting, offload_blocks
from diffalign.pipelines.sampler import Sampler
from diffalign.training import optimizers
from diffalign.training.denoise import prepare_model
from diffalign.training.quantized import check_quantization
from diffalign.training.run_folder import RunFolder

FAMILIES = {**tiny.MODELS, **tiny.UNETS}
CPU = torch.device("cpu")


@pytest.fixture
def cuda():
    with SecondDevice():
        yield CUDA


def drawn(model, kind):
    side = 32 if kind == "sana" else 16
    drawing = Drawing(2, 3.0, (side, side), micro_batch_size=2, mixed_precision="no")
    return Sampler(model, drawing).images(["a cat", "a dog", "a cow"], [1, 2, 3]).images


@pytest.mark.parametrize("kind", FAMILIES)
def test_parts_that_rest_draw_the_same_images(kind, cuda):
    expected = drawn(FAMILIES[kind]().to(cuda), kind)
    model = FAMILIES[kind]()
    model.denoiser.to(cuda)
    model.resting = Resting(model.pipeline, model.denoiser, cuda)
    assert torch.equal(drawn(model, kind), expected)
    parts = [p for n, p in model.pipeline.components.items() if n.startswith("text_encoder")]
    resting = [t for p in (*parts, model.pipeline.vae) if p is not None for t in p.parameters()]
    assert not any(is_on(t) for t in resting)
    assert all(is_on(p) for p in model.denoiser.parameters())


@pytest.mark.parametrize("kind", FAMILIES)
def test_blocks_that_rest_draw_the_same_images(kind, cuda):
    expected = drawn(FAMILIES[kind]().to(cuda), kind)
    model = FAMILIES[kind]()
    offload_blocks(model.denoiser, cuda)
    for part in model.pipeline.components.values():
        if isinstance(part, torch.nn.Module) and part is not model.denoiser:
            part.to(cuda)
    assert torch.equal(drawn(model, kind), expected)
    weights = [p for block in blocks(model.denoiser) for p in block.parameters()]
    assert weights
    assert not any(is_on(p) for p in weights)


def trained(folder, model):
    run = OnlineTrainer(
        tiny_runs.settings(folder),
        model,
        Accelerator(cpu=True),
        RunFolder(folder),
        tiny_runs.redness,
        load_prompts("shapes:train")[:8],
    )
    for _ in range(2):
        run.train_update()
    return tiny_runs.weights(run)


# on the CPU, because the second device sees no forward within a backward
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_training_over_parts_that_rest_gives_the_same_weights(kind, tmp_path):
    plain = FAMILIES[kind]()
    plain.denoiser.enable_gradient_checkpointing()
    expected = trained(tmp_path / "plain", plain)
    model = FAMILIES[kind]()
    offload_blocks(model.denoiser, CPU)
    model.denoiser.enable_gradient_checkpointing()
    model.resting = Resting(model.pipeline, model.denoiser, CPU)
    assert torch.equal(trained(tmp_path / "resting", model), expected)


def test_embeddings_are_encoded_once_for_all_runs(tmp_path, monkeypatch):
    model = tiny.MODELS["sd3"]()
    model.embed_folder = EmbedFolder(tmp_path, model)
    expected = drawn(tiny.MODELS["sd3"](), "sd3")
    assert torch.equal(drawn(model, "sd3"), expected)
    again = tiny.MODELS["sd3"]()
    again.embed_folder = EmbedFolder(tmp_path, again)
    monkeypatch.setattr(type(again), "encode_prompt", None)  # would fail
    assert torch.equal(drawn(again, "sd3"), expected)
    # a file that is cut short is written again
    monkeypatch.undo()
    for file in again.embed_folder.folder.iterdir():
        file.write_bytes(file.read_bytes()[:20])
    assert torch.equal(drawn(again, "sd3"), expected)
    assert again.embed_folder.read("a cat") is not None


def test_embeddings_of_other_encoders_stand_in_another_folder(tmp_path):
    model, other = tiny.MODELS["sd3"](), tiny.MODELS["sd3"]()
    with torch.no_grad():
        next(other.pipeline.text_encoder.parameters()).mul_(2)
    half = tiny.MODELS["sd3"]()
    half.pipeline.to(torch.bfloat16)
    folders = {EmbedFolder(tmp_path, m).folder for m in (model, other, half)}
    assert len(folders) == 3


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_base_is_quantised_while_it_loads(kind, tmp_path):
    run = load(
        "awm-shapes-sd3",
        ["--rollout.merge_lora=false", f"--model.quantization={kind}", "--model.dtype=float32"],
    )
    model = prepare_model(run, CPU)
    plain = prepare_model(load("awm-shapes-sd3", ["--model.dtype=float32"]), CPU)
    assert model.denoiser.is_quantized
    latents, times, embeds = plain.random_inputs(2, (64, 64))
    with torch.no_grad():
        a, b = (m.predict(latents, times, embeds) for m in (model, plain))
    error = float((a - b).norm() / b.norm())
    assert 0 < error < {"int8": 0.02, "int4": 0.4}[kind]


def test_what_a_device_lacks_is_said_in_a_line(tmp_path):
    run = load("awm-shapes-sd3", ["--rollout.merge_lora=false", "--model.quantization=nf4"])
    with pytest.raises(ConfigError, match=r"model.quantization=nf4: needs .* Set int8 or int4"):
        check_quantization(run, CPU)
    with pytest.raises(
        ConfigError, match=r"optimizer.type=adamw8bit: needs CUDA or a CPU.* Set adamw"
    ):
        optimizers.check_optimizer(OptimizerConfig(type="adamw8bit"), "mps")


def eight_bit():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(64, 64)), torch.nn.Parameter(torch.randn(5))]
    config = OptimizerConfig(type="adamw8bit", learning_rate=0.01)
    return weights, optimizers.make_optimizer(config, weights)


def stepped(weights, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    optimizers.take_step(optimizer, 0.01)


def test_moments_of_8_bits_follow_those_of_32(tmp_path):
    pytest.importorskip("torchao")
    weights, optimizer = eight_bit()
    others = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    adamw = optimizers.make_optimizer(OptimizerConfig(learning_rate=0.01), others)
    before = [w.detach().clone() for w in weights]
    for seed in range(5):
        stepped(weights, optimizer, seed)
        stepped(others, adamw, seed)
    # small parameters keep float32 moments
    assert torch.allclose(weights[1], others[1], atol=1e-6)
    moved = (weights[0] - before[0]).norm()
    assert (weights[0] - others[0]).norm() < 0.1 * moved
    tensors = optimizers.state_tensors(optimizer)
    size = sum(t.numel() * t.element_size() for n, t in tensors.items() if "step" not in n)
    assert size == optimizers.moment_bytes(weights, "adamw8bit")


def test_moments_of_8_bits_resume(tmp_path):
    pytest.importorskip("torchao")
    weights, optimizer = eight_bit()
    for seed in range(3):
        stepped(weights, optimizer, seed)
    tensors = optimizers.state_tensors(optimizer)
    again, other = eight_bit()
    with torch.no_grad():
        for a, b in zip(again, weights, strict=True):
            a.copy_(b)
    optimizers.restore(other, tensors)
    for run in ((weights, optimizer), (again, other)):
        stepped(*run, 7)
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
