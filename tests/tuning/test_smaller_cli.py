"""The verbs quantize and qsched: folders that load, reports that are true, and what they refuse."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from marks import slow

import diffalign
import diffalign.tuning.smaller as quantizing
import diffalign.tuning.tune as verb
from diffalign import cli
from diffalign.data.prompts import load_prompts
from diffalign.pipelines.registry import load_model
from diffalign.quantization.accounting import folder_bytes, report
from diffalign.quantization.branches import BranchLinear
from diffalign.quantization.integer import IntegerLinear
from diffalign.quantization.layers import PackedLinear
from diffalign.schedulers import Coefficients, QSched
from diffalign.shapes import CHECKPOINTS

MODEL = "--model=shapes-flux"


def image(pipeline, steps=2):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"output_type": "np", "generator": generator, "num_inference_steps": steps}
    return pipeline("a photo of a red circle", height=64, width=64, **options).images[0]


def quantize(folder, *flags):
    flags = (MODEL, "--latency=0", f"--output_dir={folder}", *flags)
    return cli.main(["quantize", "--json", *flags])


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        slow(("--backend=int4", "--svd_rank=4", "--prompts=shapes:train"), PackedLinear),
        (("--backend=int4", "--prompts=shapes:train", "--calibration_memory=0.001"), PackedLinear),
        slow(("--backend=int2", "--prompts=shapes:train", "--tune_steps=2"), PackedLinear),
        slow(("--bits_per_weight=3", "--prompts=shapes:train"), PackedLinear),
        (("--backend=int4a8", "--prompts=shapes:train"), IntegerLinear),
        (("--backend=int4", "--components", "text_encoder_2"), PackedLinear),
        (("--backend=int8-static", "--prompts=shapes:train"), IntegerLinear),
        slow(("--backend=torchao-int8wo", "--svd_rank=4", "--prompts=shapes:train"), BranchLinear),
    ],
)
def test_a_quantised_folder_loads_and_its_report_is_true(flags, kind, tmp_path, capsys):
    folder = tmp_path / "new" / "small"
    assert quantize(folder, "--max_prompts=2", "--num_inference_steps=2", *flags) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    saved = json.loads((folder / "quantization.json").read_text())
    assert saved.items() >= told.items()
    pipeline = diffalign.load(folder, torch_dtype=torch.bfloat16)
    assert any(isinstance(m, kind) for m in pipeline.transformer.modules())
    weight = report(pipeline.transformer)
    drawn = image(pipeline)
    # a calibrated model has drawn, so its second copy of integers is counted
    used = report(pipeline.transformer).bytes if "psnr" in told else weight.bytes
    assert told["memory_bytes"] == used
    assert told["memory_bytes_before"] == weight.bf16_bytes
    assert told["quantised_fraction"] == pytest.approx(weight.quantised_fraction, abs=1e-4)
    assert told["disk_bytes"] == folder_bytes(folder / "transformer")
    assert told["disk_ratio_to_bf16"] == pytest.approx(weight.ratio, rel=0.03)
    assert set(told["backends"]) == {"transformer", *(f for f in flags if f == "text_encoder_2")}
    assert ("tuning" in told) == ("--tune_steps=2" in flags)
    assert ("psnr" in told) == ("--prompts=shapes:train" in flags)
    assert told.get("psnr", 30) > 10
    packed = kind is not BranchLinear and "--prompts=shapes:train" in flags
    assert told["rounding"] == ("gptq" if packed else "nearest")
    assert np.array_equal(drawn, image(load_model(str(folder)).pipeline))
    assert [p.name for p in folder.parent.iterdir()] == ["small"]  # nothing hidden is left


@pytest.mark.parametrize(
    ("backend", "note"), [("int8", "(both eager)"), ("torchao-int8", "torch.compile)")]
)
def test_the_latency_beside_bfloat16_is_told(backend, note, tmp_path, capsys, monkeypatch):
    """In milliseconds, with the other model in bfloat16 whatever the dtype of this, which is freed before."""
    timed = []

    def forward_seconds(model, rows, size):
        if timed:
            assert timed[0].pipeline.transformer is None
            assert list(tmp_path.rglob("diffusion_pytorch_model*"))  # saved by then
            assert model.pipeline.vae is timed[0].pipeline.vae  # only the denoiser is read again
        timed.append(model)
        dtypes.append(model.denoiser.dtype)
        return stock(model, rows, size)

    dtypes = []
    stock = quantizing.forward_seconds
    monkeypatch.setattr(quantizing, "forward_seconds", forward_seconds)
    flags = (f"--backend={backend}", "--latency=1", "--dtype=float32")
    assert quantize(tmp_path / "small", *flags) == 0
    assert dtypes == [torch.float32, torch.bfloat16]
    out, text = capsys.readouterr()
    told, lines = json.loads(out), text.splitlines()
    assert told["latency_ms"] > 0
    assert told["bf16_latency_ms"] > 0
    assert told["latency_ratio"] > 0
    line = next(x for x in lines if " ms per forward with 1 image, " in x)
    assert f"{told['latency_ms']:.1f} ms" in line
    assert " times the " in line
    assert line.endswith(note)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--backend=int5",),
            "--backend: no quantisation backend is named 'int5'; did you mean 'int",
        ),
        (("--backend=int8-static",), "--backend=int8-static needs calibration images"),
        (
            ("--backend=int4", "--prompts=shapes:train", "--rounding=nearest"),
            "--prompts: backend=int4 with these settings is not calibrated",
        ),
        (
            ("--backend=torchao-int8wo", "--prompts=shapes:train"),
            "--prompts: backend=torchao-int8wo with these settings is not calibrated",
        ),
        (("--backend=int2",), "rounding to nearest leaves the weights 2 bits in name only"),
        (("--bits_per_weight=3",), "--bits_per_weight=3.0 needs calibration images"),
        (("--backend=int4", "--bits_per_weight=3"), "bits_per_weight belongs to mixed alone"),
        (("--backend=mixed",), "bits_per_weight belongs to mixed alone"),
        (
            ("--bits_per_weight=3", "--prompts=shapes:train", "--rounding=nearest"),
            "--rounding=nearest: backend=mixed rounds by GPTQ",
        ),
        (
            ("--bits_per_weight=2.1", "--prompts=shapes:train", "--max_prompts=2"),
            "--bits_per_weight=2.1 is below 2.2",
        ),
        (("--backend=int4", "--tune_steps=2"), "--tune_steps=2 needs calibration images"),
        (
            (
                "--backend=torchao-int8wo",
                "--svd_rank=2",
                "--prompts=shapes:train",
                "--tune_steps=2",
            ),
            "--tune_steps=2: backend=torchao-int8wo has no scales to tune",
        ),
        (("--backend=int4", "--rounding=gptq"), "--rounding=gptq needs calibration images"),
        (
            ("--backend=torchao-int8wo", "--prompts=shapes:train", "--rounding=gptq"),
            "--rounding=gptq: backend=torchao-int8wo rounds to nearest",
        ),
        (
            ("--backend=int4", "--calibration_memory=0"),
            "--calibration_memory must be greater than 0",
        ),
        (("--backend=torchao-fp8",), "compute capability 8.9"),
        (("--backend=bnb-nf4",), "bnb-nf4 needs"),
        (("--backend=torchao-int8", "--svd_rank=4"), "neither group_size nor svd_rank"),
        (("--backend=torchao-fp8wo", "--svd_rank=4", "--group_size=32"), "has no group_size"),
        (
            ("--components", "text_encoder_9"),
            "--components=text_encoder_9: the pipeline has no such component",
        ),
        (("--lora=somewhere",), "`diffalign merge` first"),
        (("--backend=int4", "--group_size=0"), "--group_size must be at least 1, got 0"),
        (("--backend=int4", "--latency=-1"), "--latency must be at least 0, got -1"),
        (
            ("--backend=int4", "--svd_rank=2", "--prompts=shapes:train", "--max_prompts=0"),
            "--max_prompts must be at least 1",
        ),
    ],
)
def test_quantize_says_what_it_cannot_do_and_leaves_nothing(flags, message, tmp_path, capsys):
    assert quantize(tmp_path / "small", *flags) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_touched(tmp_path, capsys):
    (tmp_path / "small").mkdir()
    assert quantize(tmp_path / "small") == 2
    assert "exists already" in capsys.readouterr().err


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch, capsys):
    def fail(self, folder, **kwargs):
        (folder / "half").mkdir()
        raise OSError("No space left on device")

    monkeypatch.setattr(DiffusionPipeline, "save_pretrained", fail)
    assert quantize(tmp_path / "small", "--backend=int8") == 2
    assert "error: No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- qsched


@pytest.fixture
def own(tmp_path):
    return shutil.copytree(CHECKPOINTS / "shapes-flux", tmp_path / "own")


def qsched(model, tmp_path, *flags):
    settings = (
        "--budget=3",
        "--max_prompts=4",
        "--num_inference_steps=2",
        "--objective=verifier",
        "--guidance_scale=1",
    )
    work = f"--work={tmp_path / 'work'}"
    return cli.main(["qsched", "--json", f"--model={model}", work, *settings, *flags])


def test_factors_go_into_the_schedulers_configuration_alone(own, tmp_path, capsys, monkeypatch):
    """And stock diffusers loads the folder, and draws without them."""
    before = {p: p.read_bytes() for p in own.rglob("*") if p.is_file()}
    found = []

    def accepting(*args, **kwargs):
        result = stock_tune(*args, **kwargs)
        result.best, result.accepted = Coefficients((0.9, 1.1), (1.1, 0.9)), True
        found.append(result)
        return result

    stock_tune = verb.tune
    monkeypatch.setattr(verb, "tune", accepting)
    assert qsched(own, tmp_path, "--prompts=shapes:train") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["coefficients"]["sample"] == [0.9, 1.1]
    assert json.loads((own / "qsched.json").read_text())["accepted"]
    changed = [p for p, content in before.items() if p.read_bytes() != content]
    assert changed == [own / "scheduler" / "scheduler_config.json"]

    stock = DiffusionPipeline.from_pretrained(own, torch_dtype=torch.float32)
    assert type(stock.scheduler) is FlowMatchEulerDiscreteScheduler
    ours = diffalign.load(own, torch_dtype=torch.float32)
    assert isinstance(ours.scheduler, QSched)
    assert np.abs(image(stock) - image(ours)).max() > 0.01
    assert np.array_equal(image(stock, steps=3), image(ours, steps=3))


def test_a_named_model_gets_a_folder_of_its_own(tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "\n".join(json.dumps(p.metadata) for p in load_prompts("shapes:train", limit=4))
    )
    flags = (f"--prompts={prompts}", "--engine=grid", f"--output_dir={tmp_path / 'tuned'}")
    assert qsched("shapes-flux", tmp_path, *flags) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["evaluations"] == 5  # the schedule as it is, and two by two
    assert (tmp_path / "tuned" / "qsched.json").is_file()
    assert image(diffalign.load(tmp_path / "tuned")).std() > 0


@pytest.mark.parametrize("spelling", ["{}/", "{}/../own", "{}/transformer/..", "link", "relative"])
def test_a_folder_is_itself_however_it_is_spelled(spelling, own, tmp_path, capsys, monkeypatch):
    (tmp_path / "link").symlink_to(own)
    monkeypatch.chdir(own.parent)
    other = {"link": tmp_path / "link", "relative": own.name}.get(spelling, spelling.format(own))
    for model, output in ((own, other), (other, own)):
        (own / "qsched.json").unlink(missing_ok=True)
        flags = ("--prompts=shapes:train", "--engine=grid", f"--output_dir={output}")
        assert qsched(model, tmp_path, *flags) == 0
        assert (own / "qsched.json").is_file()
    capsys.readouterr()


def test_a_models_name_is_no_folder_of_that_name(tmp_path, monkeypatch, capsys):
    (tmp_path / "shapes-flux").mkdir()
    monkeypatch.chdir(tmp_path)
    assert qsched("shapes-flux", tmp_path, "--prompts=shapes:train") == 2
    assert "--output_dir must be given, because shapes-flux" in capsys.readouterr().err


def test_the_picture_of_a_search_is_written(own, tmp_path, capsys):
    plot = tmp_path / "pictures" / "search.png"
    assert qsched(own, tmp_path, "--prompts=shapes:train", f"--plot={plot}") == 0
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize("verb", ["quantize", "qsched"])
def test_verbs_that_draw_with_the_models_own_scheduler_take_no_solver(verb, tmp_path, capsys):
    flags = [f"--output_dir={tmp_path / 'new'}", "--prompts=shapes:train", "--solver=default"]
    with pytest.raises(SystemExit):
        cli.main([verb, MODEL, *flags])
    assert "unrecognized arguments: --solver" in capsys.readouterr().err


def test_qsched_says_what_it_cannot_do(own, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    words = tmp_path / "words.txt"
    words.write_text("a photo of a red circle\na photo of a blue ring\n")
    asked = "--prompts=shapes:train"
    cases = [
        ("shapes-flux", (asked,), "--output_dir must be given, because shapes-flux"),
        (own, (f"--prompts={empty}",), "holds no prompt"),
        (own, (f"--prompts={tmp_path / 'none.txt'}",), "none.txt"),
        (own, (f"--prompts={words}",), "verifier"),
        (own, (asked, "--engine=annealing"), "annealing"),
        (own, (asked, "--objective=nonsense"), "nonsense"),
        (own, (asked, "--objective=verifier=many"), "is not reward=weight"),
        (own, (asked, "--box", "1.1", "1.2"), "--box=1.1,1.2: the bounds must differ"),
        (own, (asked, "--box", "0.8", "inf"), "--box=0.8,inf: the bounds must differ"),
        (own, (asked, "--box", "1", "1"), "--box=1,1: the bounds must differ"),
        (
            own,
            (asked, f"--plot={tmp_path / 'a.docx'}"),
            "a.docx: this kind of file is not supported",
        ),
        (own, (asked, "--lora=somewhere"), "`diffalign merge`"),
        (own, (asked, f"--output_dir={tmp_path}"), "exists already"),
        (own, (asked, "--max_prompts=1"), "cannot be split"),
        (own, (asked, "--max_prompts=0"), "--max_prompts must be at least 1, got 0"),
        (own, (asked, "--batch_size=0"), "--batch_size must be at least 1, got 0"),
        (own, (asked, "--images_per_prompt=0"), "--images_per_prompt must be at least 1, got 0"),
        (own, (asked, "--num_inference_steps=0"), "--num_inference_steps must be at least 1"),
        (own, (asked, "--seed=-1"), "--seed must be at least 0, got -1"),
        (own, (asked, "--penalty=nan"), "--penalty must be at least 0, got nan"),
        (own, (asked, "--engine=none"), "needs a --reference"),
        (own, (asked, f"--work={words}"), "words.txt is a file"),
        (own, (asked, f"--plot={words / 'a.png'}"), "a.png cannot be made below it"),
        (tmp_path / "gone", (asked,), "gone"),
    ]
    before = (own / "scheduler" / "scheduler_config.json").read_bytes()
    for model, flags, message in cases:
        try:
            code = qsched(model, tmp_path, *flags)
        except SystemExit as stopped:  # argparse's own
            code = stopped.code
        assert (code, message in capsys.readouterr().err) == (2, True), flags
    assert (own / "scheduler" / "scheduler_config.json").read_bytes() == before


def test_a_scheduler_that_is_not_linear_is_refused(own, tmp_path, capsys):
    file = own / "scheduler" / "scheduler_config.json"
    index = json.loads((own / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchHeunDiscreteScheduler"]
    (own / "model_index.json").write_text(json.dumps(index))
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "_class_name": "FlowMatchHeunDiscreteScheduler"}))
    assert qsched(own, tmp_path, "--prompts=shapes:train") == 2
    assert "FlowMatchHeunDiscreteScheduler" in capsys.readouterr().err


def generate(folder, tmp_path):
    flags = (f"--model={folder}", f"--output_dir={tmp_path / 'images'}", "--images_per_prompt=1")
    return cli.main(["generate", "a photo of a ring", "--num_inference_steps=1", *flags])


def test_a_folder_whose_backend_is_missing_is_refused(own, tmp_path, capsys):
    file = own / "transformer" / "config.json"
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = {**json.loads(file.read_text()), "quantization_config": method}
    file.write_text(json.dumps(config))
    assert generate(own, tmp_path) == 2
    told = capsys.readouterr().err
    assert f"{own} could not be loaded" in told
    assert "bitsandbytes" in told


@pytest.mark.parametrize("damage", ["cut", "gone", "factors"])
def test_a_damaged_folder_is_refused(damage, tmp_path, capsys):
    folder = tmp_path / "small"
    assert quantize(folder, "--backend=int4") == 0
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "gone":
        weights.unlink()
    else:
        file = folder / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "qsched": {"version": 99}}))
    assert generate(folder, tmp_path) == 2
    told = capsys.readouterr().err
    assert ("qsched" if damage == "factors" else f"{folder} could not be loaded") in told
    assert not (tmp_path / "images").exists()
