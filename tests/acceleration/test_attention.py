"""Attention backends: equal to the stock processors on every path, and undone to the very processors."""

import threading

import pytest
import tiny
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
    SanaLinearAttnProcessor2_0,
)
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from torch._dynamo.testing import CompileCounter

import diffalign
from diffalign.acceleration import attention
from diffalign.acceleration.drawing import Call, draw, psnr
from diffalign.acceleration.state import state_of
from diffalign.acceleration.undo import Undo
from diffalign.core.errors import UsageError

FAMILIES = {**tiny.MODELS, **tiny.UNETS}
BACKENDS = ("native", "_native_math")
STEPS = 4
JOINT = {"added_kv_proj_dim": 32, "context_pre_only": False, "qk_norm": "rms_norm"}
ADDED = {"added_kv_proj_dim": 24, "norm_num_groups": 4, "cross_attention_norm": "group_norm"}
ADDED |= {"cross_attention_norm_num_groups": 4, "bias": True}
CROSS = {"cross_attention_dim": 24}
# processor, further arguments of the layer, tokens of the context (None without), tokens that the mask leaves
PATHS = {
    "self attention": (AttnProcessor2_0, {"residual_connection": True}, None, None),
    "self attention, group norm": (AttnProcessor2_0, {"norm_num_groups": 4}, None, None),
    "self attention, mask": (AttnProcessor2_0, {}, None, 6),
    "cross attention": (AttnProcessor2_0, CROSS, 7, None),
    "cross attention, mask": (AttnProcessor2_0, {**CROSS, "rescale_output_factor": 2.0}, 7, 4),
    "fused projections": (FusedAttnProcessor2_0, {}, None, None),
    "added keys": (AttnAddedKVProcessor2_0, ADDED, 7, None),
    "added keys, mask": (AttnAddedKVProcessor2_0, ADDED, 7, 4),
    "added keys only": (AttnAddedKVProcessor2_0, {**ADDED, "only_cross_attention": True}, 7, None),
    "joint": (JointAttnProcessor2_0, JOINT, 7, None),
    "joint without context": (JointAttnProcessor2_0, {"qk_norm": "rms_norm"}, None, None),
    "joint, context only read": (
        JointAttnProcessor2_0,
        {**JOINT, "context_pre_only": True},
        7,
        None,
    ),
    "joint, fused": (FusedJointAttnProcessor2_0, {**JOINT, "qk_norm": None}, 7, None),
    "SANA, mask": (SanaAttnProcessor2_0, {**CROSS, "qk_norm": "rms_norm_across_heads"}, 7, 4),
}


def layer_of(path):
    """Return a layer, and the arguments of its call."""
    processor, extra, tokens, kept = PATHS[path]
    torch.manual_seed(0)
    if extra.get("qk_norm") == "rms_norm_across_heads":
        extra = {**extra, "kv_heads": 4}
    layer = Attention(32, heads=4, dim_head=8, processor=processor(), **extra).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer.requires_grad_(False)
    if "used" in path and "fused" in path.lower():
        layer.fuse_projections()
    spatial = processor is AttnAddedKVProcessor2_0
    inputs = {"hidden_states": torch.randn(2, 32, 3, 2) if spatial else torch.randn(2, 6, 32)}
    width = extra.get("cross_attention_dim") or extra.get("added_kv_proj_dim")
    if tokens is not None:
        inputs["encoder_hidden_states"] = torch.randn(2, tokens, width)
    if kept is not None:
        mask = torch.zeros(2, 1, tokens or 6)
        mask[1, :, kept - 2 :] = -10000.0
        inputs["attention_mask"] = mask
    return layer, inputs


def outputs_of(layer, inputs):
    result = layer(**inputs)
    return list(result) if isinstance(result, tuple) else [result]


def changed(layer, backend):
    undo = Undo.__new__(Undo)
    undo._steps = []
    layer.device, layer.dtype = torch.device("cpu"), torch.float32
    attention.set_attention(layer, backend, undo)
    return undo


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", sorted(PATHS))
def test_a_layer_computes_what_its_stock_processor_computes(path, backend):
    layer, inputs = layer_of(path)
    stock, plain = layer.processor, outputs_of(layer, inputs)
    undo = changed(layer, backend)
    assert isinstance(layer.processor, type(stock))
    calls = counted(lambda: outputs_of(layer, inputs))
    assert calls == [backend]
    for ours, theirs in zip(outputs_of(layer, inputs), plain, strict=True):
        assert torch.equal(ours, theirs) or backend != "native"
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    undo.back()
    assert layer.processor is stock


def counted(call):
    """Return the backends that a call dispatches to, in order."""
    names, true = [], attention_dispatch.dispatch_attention_fn

    def dispatch(*args, backend=None, **kwargs):
        names.append(backend.value)
        return true(*args, backend=backend, **kwargs)

    attention_dispatch.dispatch_attention_fn = dispatch
    try:
        call()
    finally:
        attention_dispatch.dispatch_attention_fn = true
    return names


def test_a_mask_changes_the_output():
    layer, inputs = layer_of("cross attention, mask")
    changed(layer, "_native_math")
    masked = layer(**inputs)
    assert not torch.allclose(masked, layer(**inputs | {"attention_mask": None}), atol=1e-3)


@pytest.mark.parametrize("path", ["cross attention, mask", "joint"])
def test_a_compiled_layer_keeps_one_graph(path):
    layer, inputs = layer_of(path)
    plain = outputs_of(layer, inputs)
    changed(layer, "_native_math")
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(2):
        for ours, theirs in zip(outputs_of(compiled, inputs), plain, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def a_call(name, model):
    length = {} if name in tiny.UNETS else {"max_sequence_length": 16}
    return Call(STEPS, *model.default_size, ("a red circle", "a cat"), length, 5)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_reaches_the_backend_and_comes_back(name):
    model, other = FAMILIES[name](), FAMILIES[name](seed=1)
    pipe, call = model.pipeline, a_call(name, model)
    plain, others = draw(pipe, call), draw(other.pipeline, call)
    before, active = state_of(pipe), _AttentionBackendRegistry._active_backend
    diffalign.accelerate(
        pipe,
        "lossless",
        attention="_native_math",
        steps=STEPS,
        sizes=(model.default_size,),
        arguments=call.arguments,
        check=1,
    )
    assert diffalign.acceleration(pipe).applied == {"attention": "_native_math"}
    assert min(psnr(draw(pipe, call), plain)) > 90
    assert _AttentionBackendRegistry._active_backend == active
    assert torch.equal(draw(other.pipeline, call), others)
    diffalign.restore(pipe)
    assert torch.equal(draw(pipe, call), plain)
    assert state_of(pipe) == before


def test_a_shared_processor_of_another_model_stays():
    model, other = tiny.sd3_model(), tiny.sd3_model(seed=1)
    processor = JointAttnProcessor2_0()
    for part in (model, other):
        part.denoiser.set_attn_processor(processor)
    changed(model.denoiser.transformer_blocks[0], "_native_math")
    assert other.denoiser.transformer_blocks[0].attn.processor is processor
    assert not hasattr(processor, attention.BACKEND)


def test_the_rerouting_ends_with_an_error_and_holds_for_its_own_thread():
    layer, _ = layer_of("self attention")
    changed(layer, "_native_math")
    plain = torch.nn.functional.scaled_dot_product_attention
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 6, 31))
    assert counted(lambda: plain(q, q, q)) == []
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with attention._Rerouting(AttentionBackendName.NATIVE):
            entered.set()
            leave.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(20)
    names = counted(lambda: plain(q, q, q))
    leave.set()
    thread.join()
    assert names == []


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("flash", "lacks it. To use it: `pip install flash-attn`"),
        ("_flash_3", "FlashAttention 3 from source, or take `_flash_3_hub`"),
        ("_flash_3_hub", "`pip install kernels`"),
        ("sage", "PyPI has version 1"),
        ("sage_hub", "`pip install kernels`"),
        ("xformers", "`pip install xformers`"),
        ("_native_npu", "torch_npu"),
        ("_native_cudnn", "CUDA only"),
        ("_native_efficient", "CUDA only"),
        ("flash_5", "no such attention backend"),
    ],
)
def test_a_backend_that_the_machine_lacks_is_refused(sd3, backend, words):
    before = state_of(sd3.pipeline)
    with pytest.raises(UsageError, match=words) as caught:
        diffalign.accelerate(sd3.pipeline, "lossless", attention=backend, check=0)
    assert f"attention={backend!r}" in str(caught.value)
    assert state_of(sd3.pipeline) == before


def test_a_backend_that_fails_in_a_draw_is_refused_at_once():
    sana = tiny.sana_model()
    # SANA's attention has a mask, which torch's flash kernel does not take
    before = state_of(sana.pipeline)
    options = {"steps": 2, "sizes": (sana.default_size,), "check": 1}
    options["arguments"] = {"max_sequence_length": 16}
    with pytest.raises(UsageError, match="masks, head size or precision .*attn_mask"):
        diffalign.accelerate(sana.pipeline, "lossless", attention="_native_flash", **options)
    assert state_of(sana.pipeline) == before


def test_attention_that_is_no_softmax_of_torch_is_left_out(sd3):
    sana = tiny.sana_model()
    parts = attention.parts_of(sana.denoiser)
    assert len(parts) == len(sana.denoiser.transformer_blocks)
    assert not attention.calls_kernel(SanaLinearAttnProcessor2_0())
    sd = tiny.sd_model()
    sd.denoiser.set_attn_processor(AttnProcessor())
    assert attention.parts_of(sd.denoiser) == []
    with pytest.raises(UsageError, match="no attention of this denoiser"):
        diffalign.accelerate(sd.pipeline, "lossless", attention="native", check=0)
    assert len(attention.parts_of(sd3.denoiser)) == 2


def test_auto_says_why(sd3, monkeypatch):
    given = {"steps": STEPS, "sizes": ((16, 16),), "check": 0}
    diffalign.accelerate(sd3.pipeline, "lossless", **given)
    (dropped,) = [
        d for d in diffalign.acceleration(sd3.pipeline).dropped if d.option == "attention"
    ]
    assert "on cpu torch chooses" in dropped.why
    diffalign.restore(sd3.pipeline)
    monkeypatch.setattr(
        "diffalign.acceleration.trial.pick", lambda _: attention.Pick("_native_math", "of a test")
    )
    diffalign.accelerate(sd3.pipeline, "lossless", **given)
    report = diffalign.acceleration(sd3.pipeline)
    assert "attention = _native_math (of a test)" in str(report)
    assert report.to_json()["reasons"] == {"attention": "of a test"}


class OnDevice:
    """Denoiser of a device that this machine need not have."""

    def __init__(self, dtype):
        self.device, self.dtype = torch.device("cuda"), dtype


@pytest.mark.parametrize(
    ("dtype", "capability", "installed", "backend", "words"),
    [
        (torch.float32, (9, 0), True, None, "16 bits"),
        (torch.bfloat16, (9, 0), True, "_flash_3", "made for this device"),
        (torch.bfloat16, (9, 0), False, None, "not installed"),
        (torch.bfloat16, (8, 9), True, None, "by itself"),
    ],
)
def test_the_pick_for_a_gpu(monkeypatch, dtype, capability, installed, backend, words):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN_3", installed)
    choice = attention.pick(OnDevice(dtype))
    assert choice.backend == backend
    assert words in choice.why


def test_a_quantised_attention_counts_as_lossy():
    assert attention.is_lossy("sage_hub")
    assert not attention.is_lossy("_flash_3")
    assert attention.needs_half("_flash_3")
    assert not attention.needs_half("native")
