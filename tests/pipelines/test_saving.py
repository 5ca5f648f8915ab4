"""Every folder that the suite saves loads with plain diffusers, without arguments, and draws."""

import json
import shutil

import pytest
import tiny
import tiny_moves
import torch
from diffusers import DiffusionPipeline
from tiny_moves import deep_autoencoder

import diffalign
import diffalign.quantization.quantizer
from diffalign.cli.main import main
from diffalign.lora import policies as lora
from diffalign.lora.files import export_lora
from diffalign.pipelines.cards import CARD, DrawingCard
from diffalign.pipelines.moving import move_model
from diffalign.pipelines.registry import MODELS, load_model
from diffalign.pipelines.saving import save_pipeline
from diffalign.shapes import CHECKPOINTS

PROMPT = "a photo of a red circle"
PIPELINES = {f: getattr(tiny, f"{f}_pipeline") for f in ("sd3", "flux", "sana", "sd", "sdxl")}


def draws(folder, **options):
    """One dtype throughout, and an image, from `from_pretrained(folder)` alone."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    parts = {n: p for n, p in pipeline.components.items() if isinstance(p, torch.nn.Module)}
    assert {p.dtype for p in parts.values()} == {torch.float32}, {
        n: p.dtype for n, p in parts.items()
    }
    if "unet" not in parts:
        options = {"max_sequence_length": 16, **options}
    image = pipeline(PROMPT, num_inference_steps=1, output_type="np", **options).images[0]
    assert image.std() > 0.01
    return image


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", PIPELINES)
def test_a_pipeline_in_any_dtype(family, dtype, tmp_path):
    pipeline = PIPELINES[family]().to(dtype)
    save_pipeline(pipeline, tmp_path)
    size = {"height": 32, "width": 32} if family == "sana" else {"height": 16, "width": 16}
    binned = {"use_resolution_binning": False} if family == "sana" else {}
    draws(tmp_path, **size, **binned)
    asked = DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in asked.components.values() if hasattr(p, "dtype")} == {torch.bfloat16}


@pytest.mark.parametrize("name", [n for n, s in MODELS.items() if s.source.startswith("package:")])
def test_what_ships(name):
    """At the size that the folder remembers, where the stock class asks it."""
    size = {"height": 64, "width": 64} if "flux" in name else {}
    assert draws(CHECKPOINTS / name, **size).shape == (64, 64, 3)
    pipeline = diffalign.load(name)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(PROMPT, num_inference_steps=1).images[0].size == (64, 64)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base as makers publish them: text encoders that name their dtype."""
    folder = tmp_path_factory.mktemp("base")
    tiny.flux_pipeline().to(torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    return folder


@pytest.fixture
def merged(base, tmp_path):
    model = load_model(str(base), dtype=torch.float32, max_sequence_length=16)
    lora.attach(model.denoiser, rank=2, alpha=2, targets=model.lora_targets, seed=0)
    export_lora(model.denoiser, model.pipeline, tmp_path / "lora")
    return tmp_path / "merged"


def merge(base, folder, *flags):
    lora_folder = folder.parent / "lora"
    where = [f"--model={base}", f"--lora={lora_folder}", f"--output_dir={folder}"]
    return main(["merge", *where, *flags])


def test_merged(base, merged):
    assert not merge(base, merged)
    draws(merged, height=16, width=16)


def test_a_student_remembers_its_steps(base, merged, tmp_path):
    scheduler = tmp_path / "scheduler"
    shutil.copytree(base / "scheduler", scheduler)
    DrawingCard(2, None).save(scheduler)
    assert not merge(base, merged, f"--scheduler={scheduler}", "--fold_guidance=3.5")
    draws(merged, height=16, width=16)
    card = DrawingCard.load(merged / CARD)
    assert (card.num_inference_steps, card.guidance_scale) == (2, None)


@pytest.mark.parametrize("backend", ["int8", "int4"])
def test_quantised(backend, tmp_path):
    """With the import that packed weights need."""
    folder = tmp_path / "small"
    flags = [f"--backend={backend}", "--latency=1", "--components", "text_encoder_2"]
    assert not main(["quantize", "--model=shapes-flux-schnell", f"--output_dir={folder}", *flags])
    draws(folder, height=64, width=64)
    assert json.loads((folder / "quantization.json").read_text())["bf16_latency_ms"] > 0
    assert DrawingCard.load(folder / CARD).num_inference_steps == 4


def test_moved(tmp_path):
    model = move_model(tiny.flux_model(), deep_autoencoder(), size=(16, 16))
    model.pipeline.to(torch.bfloat16)
    save_pipeline(model.pipeline, tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert {p.dtype for p in pipeline.components.values() if hasattr(p, "dtype")} == {torch.float32}
    assert pipeline(PROMPT, num_inference_steps=1).images[0].size == (16, 16)
    assert tiny_moves.DEPTH == 3
