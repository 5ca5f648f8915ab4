"""SVDQuant's layout: each value where the matrix units look for it, and a folder that diffusers accepts strictly."""

import importlib
import json
import sys
import types

import diffusers
import pytest
import tiny
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import nn

from diffalign import cli
from diffalign.cli import quantize
from diffalign.core.errors import UsageError
from diffalign.quantization import svdquant
from diffalign.quantization.layers import PackedLinear, PackSpec
from diffalign.quantization.packed import pack_model
from diffalign.tuning import quantising

N, K, RANK = 256, 384, 32


def address(row, column):
    """Return the byte and the nibble of a weight, as PTX numbers the registers of mma.m16n8k64.

    A thread of 32 holds, for a tile of 16 x 64, four registers of eight values: of its row and the row eight below,
    for the columns' first and second half.
    """
    tile, inner = divmod(row, 128)
    pack, inner = divmod(inner, 16)
    below, lane = divmod(inner, 8)
    depth, inner = divmod(column, 64)
    half, inner = divmod(inner, 32)
    thread, value = divmod(inner, 8)
    register = (
        (((tile * (K // 64) + depth) * 8 + pack) * 32 + lane * 4 + thread) * 2 + below
    ) * 2 + half
    return register * 4 + value // 2, value % 2


def branch_address(row, column, *, down, rows, columns):
    """Return the place of a branch's value: two neighbours a register, four registers a thread of a 16 x 16 tile."""
    (r, i), (c, j) = divmod(row, 16), divmod(column, 16)
    below, lane = divmod(i, 8)
    half, inner = divmod(j, 8)
    thread, value = divmod(inner, 2)
    tile = c * (rows // 16) + r if down else r * (columns // 16) + c
    return (((tile * 32 + lane * 4 + thread) * 2 + below) * 2 + half) * 2 + value


def linear(rows=N, columns=K, bias=True):
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows, bias=bias)
    nn.init.normal_(layer.weight)
    return layer


def test_weights_lie_in_the_order_of_registers():
    values = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    flat = svdquant.weight_order(values).flatten().to(torch.int32) & 255
    for row, column in [(0, 0), (7, 3), (8, 40), (127, 383), (128, 64), (255, 200), (77, 129)]:
        byte, high = address(row, column)
        assert (flat[byte] >> 4 * high) & 15 == int(values[row, column]) & 15
    assert svdquant.weight_order(values).shape == (N, K // 2)


def test_scales_lie_in_the_order_of_lanes():
    scales = torch.arange(N * 6).reshape(N, 6).bfloat16().float()
    ordered = svdquant.scale_order(scales)
    assert ordered.shape == (6, N)
    flat = ordered.flatten()
    for row, group in [(0, 0), (1, 0), (2, 5), (9, 1), (130, 2), (255, 5)]:
        tile, inner = divmod(row, 128)
        pack, inner = divmod(inner, 16)
        below, inner = divmod(inner, 8)
        lane, pair = divmod(inner, 2)
        place = ((((tile * 6 + group) * 8 + pack) * 4 + lane) * 2 + below) * 2 + pair
        assert flat[place] == scales[row, group]
    small = torch.rand(N, 24).to(torch.float8_e4m3fn)
    flat = svdquant.small_scale_order(small).view(torch.uint8).flatten()
    for row, group in [(0, 0), (5, 3), (33, 4), (200, 23), (255, 7)]:
        tile, inner = divmod(row, 128)
        pack, inner = divmod(inner, 32)
        quarter, lane = divmod(inner, 8)
        depth, rest = divmod(group, 4)
        place = (((tile * 6 + depth) * 8 + lane) * 4 + quarter) * 16 + pack * 4 + rest
        assert flat[place] == small.view(torch.uint8)[row, group]


@pytest.mark.parametrize("down", [True, False])
def test_branches_lie_in_the_order_of_registers(down):
    matrix = torch.randn(RANK, K) if down else torch.randn(N, RANK)
    ordered = svdquant.branch_order(matrix, down=down)
    assert ordered.shape == ((K, RANK) if down else (N, RANK))
    flat, (rows, columns) = ordered.flatten(), matrix.shape
    for row, column in [(0, 0), (1, 3), (9, 20), (31, 31), (17, 8)]:
        place = branch_address(row, column, down=down, rows=rows, columns=columns)
        assert flat[place] == matrix[row, column]


def unordered(state):
    """Return values (N, K) and groups' scales (N, G), read back by the addresses."""
    flat = state["qweight"].flatten().to(torch.int32) & 255
    places = [[address(r, c) for c in range(K)] for r in range(N)]
    bytes_ = torch.tensor([[p[0] for p in row] for row in places])
    highs = torch.tensor([[p[1] for p in row] for row in places])
    values = (flat[bytes_] >> 4 * highs) & 15
    index = torch.arange(N * K // 64).reshape(N, K // 64)
    groups = state["wscales"].shape[0]
    order = svdquant.scale_order if groups == K // 64 else None
    if order is None:
        index = torch.arange(N * groups).reshape(N, groups)
        tile, inner = index.div(groups, rounding_mode="floor"), index % groups
        pack, rest = tile % 128 // 32, tile % 32
        place = (((tile // 128 * (groups // 4) + inner // 4) * 8 + rest % 8) * 4 + rest // 8) * 16
        return values, state["wscales"].float().flatten()[place + pack * 4 + inner % 4]
    back = torch.empty(N * groups, dtype=torch.long)
    back[order(index).flatten()] = torch.arange(N * groups)
    return values, state["wscales"].float().flatten()[back].reshape(N, groups)


def test_int4_is_the_weight_of_the_packed_layer():
    layer = PackedLinear(linear(), PackSpec(4, 64, RANK))
    layer.fill(linear().weight, name="layer")
    values, scales = unordered(svdquant.int4_state(layer))
    signed = torch.where(values > 7, values - 16, values).float()
    plain = signed * scales.repeat_interleave(64, 1)
    branch = layer.svd_up.bfloat16().float() @ layer.svd_down.bfloat16().float()
    exact = layer.dequantize() - layer.svd_up @ layer.svd_down
    torch.testing.assert_close(plain, exact, rtol=1e-6, atol=1e-6)
    error = (plain + branch - linear().weight).norm() / linear().weight.norm()
    assert error < 0.12


def test_nvfp4_is_close_to_the_weight():
    layer = linear()
    state = svdquant.nvfp4_state(layer, rank=RANK)
    values, scales = unordered(state)
    sizes = torch.tensor(svdquant.E2M1)[values & 7] * (1 - 2 * (values >> 3))
    plain = sizes * scales.repeat_interleave(16, 1) * state["wtscale"].float()
    up, down = (
        part.bfloat16().float() for part in svdquant.truncated_svd(layer.weight.detach(), RANK)
    )
    assert (plain + up @ down - layer.weight).norm() / layer.weight.norm() < 0.1


@pytest.fixture
def strict(monkeypatch):
    """diffusers' module of SVDQuant, which a machine without its kernels cannot import."""
    kernels = types.ModuleType("kernels")
    kernels.get_kernel = lambda *args, **kwargs: types.SimpleNamespace(ops=None)
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    name = "diffusers.quantizers.nunchaku.utils"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr("diffusers.utils.import_utils._kernels_available", True)
    monkeypatch.setattr("diffusers.utils.import_utils._kernels_version", "0.14.0")
    monkeypatch.setattr("diffusers.utils.constants.DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    module = importlib.import_module(name)
    yield module
    sys.modules.pop(name, None)


def flux(width=128):
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=width // 2,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        axes_dims_rope=(width // 4, width // 8, width // 8),
    ).bfloat16()


class Pipe:
    """Pipeline of nothing but a denoiser."""

    def __init__(self, transformer):
        self.transformer, self.components = transformer, {"transformer": transformer}

    def save_config(self, folder):
        folder.mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_diffusers_loads_the_folder_strictly(tmp_path, strict, monkeypatch, precision):
    model = flux()
    if precision == "int4":
        pack_model(model, spec=PackSpec(4, 64, RANK))
    export = svdquant.export_pipeline(Pipe(model), tmp_path, precision=precision, rank=RANK)
    assert "transformer_blocks.0.attn.to_q" in export.targets
    assert not any("norm" in name for name in export.targets)
    assert ("transformer_blocks.0.norm1.linear" in export.dense) == (precision == "int4")
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert config["quantization_config"]["svdq_w4a4"]["precision"] == precision
    quantizer = diffusers.quantizers.nunchaku.NunchakuLiteQuantizer
    monkeypatch.setattr(quantizer, "validate_environment", lambda *args, **kwargs: None)
    loaded = FluxTransformer2DModel.from_pretrained(
        tmp_path / "transformer", torch_dtype=torch.bfloat16
    )
    tensors, _, _ = svdquant.denoiser_state(model, precision=precision, rank=RANK)
    strict.check_strict_state_dict_match(loaded, tensors)
    with pytest.raises(ValueError, match="Missing keys"):
        strict.check_strict_state_dict_match(loaded, dict(list(tensors.items())[1:]))
    for name, tensor in loaded.state_dict().items():
        assert tensor.shape == tensors[name].shape, name
        assert tensor.dtype == tensors[name].dtype, name
        assert torch.equal(
            tensor.view(torch.uint8), tensors[name].contiguous().view(torch.uint8)
        ), name


@pytest.fixture
def wide(tmp_path):
    """Folder of a tiny pipeline with layers that the kernels take."""
    pipeline = tiny.flux_pipeline()
    config = dict(pipeline.transformer.config) | {
        "attention_head_dim": 64,
        "axes_dims_rope": (32, 16, 16),
    }
    torch.manual_seed(0)
    pipeline.register_modules(transformer=FluxTransformer2DModel.from_config(config))
    pipeline.save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


@pytest.mark.parametrize(
    ("layout", "flags"),
    [
        ("int4", ("--backend=int4", "--prompts=shapes:train", "--max_prompts=1")),
        ("nvfp4", ()),
    ],
)
def test_the_command_line_writes_what_diffusers_accepts(
    tmp_path, wide, strict, monkeypatch, capsys, layout, flags
):
    folder, size = tmp_path / "small", ("--height=16", "--width=16", "--num_inference_steps=2")
    arguments = (f"--model={wide}", f"--layout=svdquant-{layout}", f"--svd_rank={RANK}", *size)
    assert cli.main(["quantize", "--json", f"--output_dir={folder}", *arguments, *flags]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert f"{result['layers_in_4_bits']} layers in 4 bits" in printed.err
    assert json.loads((folder / "quantization.json").read_text())["layout"] == f"svdquant-{layout}"
    assert result["rounding"] == ("gptq" if flags else "nearest")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    targets = config["quantization_config"]["svdq_w4a4"]["targets"]
    assert len(targets) == result["layers_in_4_bits"] > 8
    quantizer = diffusers.quantizers.nunchaku.NunchakuLiteQuantizer
    monkeypatch.setattr(quantizer, "validate_environment", lambda *args, **kwargs: None)
    pipeline = diffusers.FluxPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    saved = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    strict.check_strict_state_dict_match(pipeline.transformer, saved)
    assert saved[f"{targets[0]}.qweight"].dtype == torch.int8


def test_the_command_line_offers_every_layout():
    assert tuple(quantising.LAYOUTS) == quantize.LAYOUTS


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ("--layout=svdquant-int4", "--svd_rank=16"),
            "Set --backend to int4 and --group_size to 64",
        ),
        (
            ("--layout=svdquant-int4", "--backend=int4", "--svd_rank=16", "--group_size=32"),
            "of int4 in groups of 64",
        ),
        (("--layout=svdquant-int4", "--backend=int4"), "--svd_rank=0: the kernels"),
        (("--layout=svdquant-nvfp4", "--svd_rank=24"), "take multiples of 16"),
        (("--layout=svdquant-nvfp4", "--svd_rank=16", "--backend=int4"), "original weights"),
        (
            ("--layout=svdquant-nvfp4", "--svd_rank=16", "--components", "text_encoder"),
            "for denoisers alone",
        ),
    ],
)
def test_the_command_line_refuses_what_the_layout_cannot_hold(tmp_path, capsys, flags, words):
    output = f"--output_dir={tmp_path / 'small'}"
    assert cli.main(["quantize", "--model=shapes-flux", output, *flags]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spec", "precision", "words"),
    [
        (None, "int4", "no int4 weights in groups of 64"),
        (PackSpec(4, 32, RANK), "int4", "no int4 weights in groups of 64"),
        (PackSpec(4, 64, 0), "int4", "multiples of 16"),
        (PackSpec(4, 64, 8), "int4", "multiples of 16"),
        (PackSpec(4, 64, RANK), "nvfp4", "quantised already"),
        (None, "int8", "no such precision"),
    ],
)
def test_what_the_kernels_cannot_read_is_refused(tmp_path, spec, precision, words):
    model = nn.Sequential(linear(128, 128))
    if spec is not None:
        pack_model(model, spec=spec)
    with pytest.raises(UsageError, match=words):
        svdquant.export_pipeline(Pipe(model), tmp_path / "out", precision=precision)
    assert not (tmp_path / "out").exists()


def test_layers_of_other_sizes_and_an_old_diffusers_are_refused(tmp_path, monkeypatch):
    model = Pipe(nn.Sequential(linear(96, 128)))
    with pytest.raises(UsageError, match="multiples of 128"):
        svdquant.export_pipeline(model, tmp_path, precision="nvfp4")
    empty = types.ModuleType("diffusers")
    empty.__version__ = "0.40.0"
    monkeypatch.setitem(sys.modules, "diffusers", empty)
    with pytest.raises(UsageError, match=r"diffusers 0\.40\.0 has no .* Install diffusers 0\.42"):
        svdquant.export_pipeline(model, tmp_path, precision="nvfp4")
