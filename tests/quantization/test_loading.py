"""What load_pipeline refuses and what it puts to use: missing backends, and factors of the right weights alone."""

import json
import logging
import shutil

import pytest
import tiny
import torch
from diffusers import FluxPipeline
from torch import nn

import diffalign
from diffalign.core.errors import UserError
from diffalign.core.fingerprint import UnknownWeights, fingerprint, of_denoiser
from diffalign.quantization import backends
from diffalign.quantization.apply import quantize_model
from diffalign.schedulers import Coefficients, QSched

TORCHAO = {"quant_method": "torchao", "modules_to_not_convert": None}
FP8 = {"default": {"_type": "Float8DynamicActivationFloat8WeightConfig", "_version": 2}}


def described(config, folder, part="transformer"):
    """A folder whose component says that it is quantised so."""
    tiny.flux_pipeline().save_pretrained(folder)
    file = folder / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    return folder


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
@pytest.mark.parametrize(
    ("config", "versions", "message"),
    [
        ({**TORCHAO, "quant_type": FP8}, {"torchao": ()}, r"needs torchao>=0\.16: pip install"),
        ({**TORCHAO, "quant_type": FP8}, {"torchao": (0, 12)}, r"needs torchao>=0\.16: pip"),
        ({**TORCHAO, "quant_type": "int8wo"}, {"torchao": ()}, r"torchao, which needs torchao>="),
        ({**TORCHAO, "quant_type": FP8}, {}, r"capability 8\.9, this is no CUDA device"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            {"bitsandbytes": ()},
            r"bitsandbytes, which needs bitsandbytes>=0\.43\.3: pip install 'bits",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            {"bitsandbytes": (0, 30)},
            r"needs bitsandbytes>=0\.43\.3",
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, {}, "needs CUDA, this is no CUDA"),
    ],
)
def test_a_missing_backend_is_one_line_that_names_the_package(
    config, versions, message, part, tmp_path, monkeypatch
):
    known = {"torchao": (0, 18), "bitsandbytes": (0, 49), **versions}
    monkeypatch.setattr(backends, "_version", lambda library: known[library])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(FluxPipeline, "from_pretrained", None)  # before anything is read
    with pytest.raises(UserError, match=message) as raised:
        diffalign.load(described(config, tmp_path, part))
    assert "\n" not in str(raised.value)
    assert f"its {part} is quantised" in str(raised.value)


def test_an_unknown_method_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"could not be loaded: Unknown quantization type"):
        diffalign.load(described({"quant_method": "seven_bits"}, tmp_path))


def test_a_component_that_is_given_needs_no_backend(tmp_path):
    folder = described({"quant_method": "bitsandbytes", "load_in_4bit": True}, tmp_path)
    transformer = tiny.flux_pipeline().transformer
    assert diffalign.load(folder, transformer=transformer).transformer is transformer


# --- factors and the weights they were found with


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Folders of one pipeline with factors, found in bfloat16: saved so, and in float32."""
    folder = tmp_path_factory.mktemp("tuned")
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = tiny.flux_pipeline().to(dtype)
        pipeline.scheduler = QSched.wrap(pipeline.scheduler)
        half = tiny.flux_pipeline().to(torch.bfloat16)
        pipeline.scheduler.set_coefficients(
            Coefficients.ramp(0.9, 1.1, 4), fingerprint=of_denoiser(half)
        )
        pipeline.save_pretrained(folder / str(dtype).removeprefix("torch."))
    return folder


def in_force(pipeline):
    pipeline.scheduler.set_timesteps(4, mu=0.5)
    return not pipeline.scheduler.coefficients.identity


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("float32", torch.float32),
        ("float32", torch.bfloat16),
        ("bfloat16", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("bfloat16", torch.float16),
    ],
)
def test_the_dtype_of_loading_makes_no_other_weights(saved, loaded, tuned, caplog):
    with caplog.at_level(logging.WARNING, logger="diffalign"):
        pipeline = diffalign.load(tuned / saved, torch_dtype=loaded)
    assert in_force(pipeline)
    assert not [r for r in caplog.records if r.name.startswith("diffalign")]


def test_other_weights_run_on_the_stock_schedule(tuned, tmp_path, caplog):
    shutil.copytree(tuned / "float32", tmp_path / "other")
    tiny.flux_pipeline(seed=1).transformer.save_pretrained(tmp_path / "other" / "transformer")
    with caplog.at_level(logging.WARNING, logger="diffalign"):
        pipeline = diffalign.load(tmp_path / "other")
    assert not in_force(pipeline)
    assert "other weights than this pipeline's: the schedule stays as it is" in caplog.text
    pipeline.save_pretrained(tmp_path / "again")  # and the factors are not lost
    for folder in (tuned / "float32", tmp_path / "again"):
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        assert config["qsched"]["steps"]["4"]["sample"][0] == 0.9


def test_quantised_weights_are_other_weights(tuned, tmp_path):
    pipeline = diffalign.load(tuned / "bfloat16", torch_dtype=torch.bfloat16)
    quantize_model(pipeline.transformer, "int4", min_weights=64)
    pipeline.save_pretrained(tmp_path / "small")
    again = diffalign.load(tmp_path / "small", torch_dtype=torch.bfloat16)
    assert not in_force(again)
    again.scheduler.set_coefficients(Coefficients.ramp(0.8, 1, 4))
    again.save_pretrained(tmp_path / "repaired")
    for dtype in (torch.bfloat16, torch.float32):
        assert in_force(diffalign.load(tmp_path / "repaired", torch_dtype=dtype))


def test_weights_that_are_elsewhere_cannot_be_told(tuned, tmp_path, caplog, monkeypatch):
    with torch.device("meta"):
        meta = nn.Linear(2, 2)
    with pytest.raises(UnknownWeights, match=r"weights of a are offloaded \(bias\)"):
        fingerprint({"a": meta})
    monkeypatch.setattr(
        "diffalign.pipelines.loading.of_denoiser", lambda _: fingerprint({"denoiser": meta})
    )
    with caplog.at_level(logging.WARNING, logger="diffalign"):
        assert in_force(diffalign.load(tuned / "float32"))
    assert "in force unchecked: weights of denoiser are offloaded" in caplog.text


def test_what_must_be_exact_sees_what_rounding_hides():
    """A cache of latents does depend on the last bits of the weights, and a schedule does not."""
    layer = nn.Linear(4, 4)
    exact, rounded = (fingerprint({"a": layer}, rounded=r) for r in (False, True))
    with torch.no_grad():
        layer.weight.copy_(layer.weight.bfloat16())
        layer.bias.copy_(layer.bias.bfloat16())
    assert fingerprint({"a": layer}, rounded=True) == rounded
    assert fingerprint({"a": layer}) != exact
    with torch.no_grad():
        layer.weight.mul_(1.01)
    assert fingerprint({"a": layer}, rounded=True) != rounded
