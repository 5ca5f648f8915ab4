"""Second moments: equal to their definition, shared where inputs are, in parts; and models that are rounded by them."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from marks import slow
from torch import nn

from diffalign.core.errors import UsageError
from diffalign.data.prompts import load_prompts
from diffalign.pipelines.registry import load_model
from diffalign.quantization import moments as measuring
from diffalign.quantization.apply import quantize_model
from diffalign.quantization.layers import PackedLayer, PackSpec
from diffalign.quantization.moments import Moments, collect_moments
from diffalign.quantization.packed import pack_model, packable
from diffalign.tuning.calibration import Calibration
from diffalign.tuning.evaluator import Drawing

CONVOLUTIONS = [
    {"padding": 1},
    {"padding": 1, "stride": 2},
    {"padding": 2, "dilation": 2},
    {"padding": "same", "dilation": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": (0, 1), "bias": False},
]


def collected(model, layers, run, **options):
    return {
        n: m for part in collect_moments(model, layers, run, **options) for n, m in part.items()
    }


class Attention(nn.Module):
    """Three layers that read one tensor, one that reads a copy, one that reads it after a change in place."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.copy, self.changed, self.unused = (
            nn.Linear(6, 4) for _ in range(6)
        )

    def forward(self, x):
        x = x + 0
        out = self.q(x) + self.k(x) + self.v(x) + self.copy(x.clone())
        return out + self.changed(x.add_(1))


def layers_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6)])
def test_linear_layers_by_definition(shape):
    model = nn.Sequential(nn.Linear(6, 4))
    first, second = torch.randn(shape), 3 * torch.randn(shape)

    def run():
        model(first)
        model(second)

    (measured,) = collected(model, layers_of(model), run).values()
    rows = torch.cat([first.reshape(-1, 6), second.reshape(-1, 6)])
    torch.testing.assert_close(measured.second, rows.mT @ rows / len(rows))
    torch.testing.assert_close(measured.input_scale, rows.square().mean(0).sqrt())
    assert measured.rows == len(rows)
    assert not model[0]._forward_pre_hooks
    assert not model._forward_hooks


@pytest.mark.parametrize("settings", CONVOLUTIONS)
def test_convolutions_err_as_their_moments_say(settings):
    """The squared error of a convolution's outputs is tr(E H E^T) times the rows."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3, **settings)
    model, value = nn.Sequential(layer), torch.randn(2, 3, 9, 8)
    (measured,) = collected(model, layers_of(model), lambda: model(value)).values()
    error = torch.randn_like(layer.weight)
    outputs = model(value)
    layer.weight.data += error
    expected = (model(value) - outputs).square().sum()
    flat = error.flatten(1)
    assert measured.rows == outputs[:, 0].numel()
    torch.testing.assert_close((flat @ measured.second * flat).sum() * measured.rows, expected)


def test_convolutions_equal_unfold():
    torch.manual_seed(0)
    model, value = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, stride=2)), torch.randn(2, 3, 8, 8)
    (measured,) = collected(model, layers_of(model), lambda: model(value)).values()
    rows = F.unfold(value, 3, padding=1, stride=2).movedim(1, -1).flatten(0, 1)
    torch.testing.assert_close(measured.second, rows.mT @ rows / len(rows))


def test_layers_that_read_one_tensor_share_one_matrix():
    torch.manual_seed(0)
    model, value = Attention(), torch.randn(3, 6)
    measured = collected(model, layers_of(model), lambda: model(value))
    assert set(measured) == {"q", "k", "v", "copy", "changed"}
    assert measured["q"] is measured["k"] is measured["v"]
    assert measured["copy"] is not measured["q"]
    torch.testing.assert_close(measured["copy"].second, measured["q"].second)
    moved = value + 1
    torch.testing.assert_close(measured["changed"].second, moved.mT @ moved / 3)


def test_parts_are_the_whole_bit_for_bit():
    model = tiny.flux_model()
    embeds = model.encode_prompt(["a photo of a ring"])
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    runs = []

    def run():
        runs.append(0)
        for t in (500.0, 900.0):
            model.predict(noisy, torch.tensor([t]), embeds)

    layers = packable(model.denoiser, min_weights=64)
    whole = collected(model.denoiser, layers, run)
    assert len(runs) == 2  # up to the end of one forward, and once whole
    assert set(whole) == set(layers)
    distinct = {id(m) for m in whole.values()}
    assert len(distinct) < 0.7 * len(whole)
    del runs[:]
    parts = list(collect_moments(model.denoiser, layers, run, memory=1))
    assert len(parts) == len(distinct)
    assert len(runs) == len(parts) + 1
    for part in parts:
        assert len({id(m) for m in part.values()}) == 1
        assert all(torch.equal(m.second, whole[n].second) for n, m in part.items())
    middle = sum(m.second.numel() * 4 for m in {id(m): m for m in whole.values()}.values()) // 2
    assert len(list(collect_moments(model.denoiser, layers, run, memory=middle))) in (2, 3)


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 1)])
def test_many_rows_are_sampled_without_torchs_generator(monkeypatch, layer):
    monkeypatch.setattr(measuring, "ROWS", 100)
    model = nn.Sequential(layer)
    value = torch.randn(40, 6, 5, 5) if isinstance(layer, nn.Conv2d) else torch.randn(40, 25, 6)
    state = torch.get_rng_state()
    first, again = (collected(model, layers_of(model), lambda: model(value)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first["0"].second, again["0"].second)
    assert first["0"].rows == 100
    # each mean of 100 squares is off by 0.14 at most times
    assert (first["0"].second.diagonal() - 1).abs().max() < 0.6


def test_layers_that_share_at_first_and_not_later_are_refused():
    model, values = Attention(), [torch.randn(2, 6), torch.randn(2, 6)]

    def run():
        model(values[0])
        model.q(values[1])
        model.k(values[0])

    with pytest.raises(UsageError, match="k and q read the same tensor in the first forward and"):
        collected(model, layers_of(model), run)
    assert not model.q._forward_pre_hooks


def test_memory_that_ends_and_values_that_overflow_are_named():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    calls = []

    def run():
        calls.append(0)
        model(torch.randn(2, 6))
        if len(calls) == 3:
            raise MemoryError("DefaultCPUAllocator: not enough memory")

    with pytest.raises(UsageError, match=r"calibration_memory=.*: memory ended in pass 2 of 2"):
        collected(model, layers_of(model), run, memory=1)
    huge = torch.full((2, 6), 1e30)
    with pytest.raises(UsageError, match="moments of 0 are not finite"):
        collected(model, layers_of(model), lambda: model(huge))
    with pytest.raises(ZeroDivisionError):
        collected(model, layers_of(model), lambda: 1 / 0)
    assert not model[0]._forward_pre_hooks


def test_grouped_convolutions_and_missed_layers_are_rounded_to_nearest(caplog):
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "grouped": nn.Conv2d(8, 8, 3, groups=2),
            "used": nn.Linear(16, 8),
            "missed": nn.Linear(16, 8),
        }
    )
    twin = nn.ModuleDict(
        {
            n: type(m)(8, 8, 3, groups=2) if n == "grouped" else nn.Linear(16, 8)
            for n, m in model.items()
        }
    )
    twin.load_state_dict(model.state_dict())
    value = torch.randn(4, 16) @ torch.randn(16, 16)
    run = lambda: (model["used"](value), model["grouped"](torch.randn(1, 8, 4, 4)))  # noqa: E731
    parts = collect_moments(model, layers_of(model), run)
    pack_model(model, spec=PackSpec(4), min_weights=0, moments=parts)
    pack_model(twin, spec=PackSpec(4), min_weights=0)
    same = {n: torch.equal(model[n].weight, twin[n].weight) for n in model}
    assert same == {"grouped": True, "used": False, "missed": True}
    assert "no prompt reached 1 of 3 layers, for instance missed" in caplog.text
    assert (
        "1 of 3 layers have fewer rows than inputs, at worst used with 4 rows for 16 inputs"
        in caplog.text
    )


def test_the_model_stays_as_it_is_until_all_parts_are_through():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    value = torch.randn(64, 16)
    expected = model(value)

    def run():
        assert torch.equal(model(value), expected)

    layers = layers_of(model)
    pack_model(model, min_weights=0, moments=collect_moments(model, layers, run, memory=1))
    assert all(isinstance(layer, PackedLayer) for layer in model)


def test_a_pass_that_fails_leaves_the_model():
    model = tiny.flux_model()

    def parts():
        yield {}
        raise MemoryError

    with pytest.raises(MemoryError):
        quantize_model(model.denoiser, "int4", min_weights=64, moments=parts())
    assert not any(isinstance(m, PackedLayer) for m in model.denoiser.modules())
    assert not getattr(model.denoiser, "is_quantized", False)


def test_backends_that_round_to_nearest_take_no_moments():
    pytest.importorskip("torchao")
    model = tiny.flux_model()
    wrong = {"0": Moments(torch.eye(2), 1)}
    with pytest.raises(UsageError, match="torchao-int8wo: this backend rounds to nearest"):
        quantize_model(model.denoiser, "torchao-int8wo", moments=[wrong])


@pytest.mark.parametrize(
    ("name", "svd_rank"),
    [
        ("shapes-flux-schnell", 0),
        slow("shapes-sd-lcm", 0),
        slow("shapes-flux-schnell", 4),
        slow("shapes-sd-lcm", 4),
    ],
)
def test_trained_students_err_less_at_the_same_size(name, svd_rank, tmp_path):
    """Squared errors of predictions on prompts and noise that calibration did not see, with a few prompts."""
    prompts = load_prompts("shapes:train", limit=6)
    errors, folders = [], []
    for by_gptq in (False, True):
        model = load_model(name)
        embeds = model.encode_prompt(["a photo of a red circle", "a photo of two blue squares"])
        noisy = torch.randn(
            2, *model.latent_shape((64, 64)), generator=torch.Generator().manual_seed(9)
        )
        t = model.scheduler_at(2, (64, 64)).timesteps[0].expand(2)
        calibration = Calibration(model, prompts, Drawing(2))
        options = {}
        if svd_rank:
            options = {"svd_rank": svd_rank, "input_scales": calibration.input_scales()}
        if by_gptq:
            options = {"svd_rank": svd_rank, "moments": calibration.moments()}
        with torch.no_grad():
            before = model.predict(noisy.bfloat16(), t, embeds).float()
            quantize_model(model.denoiser, "int4", **options)
            after = model.predict(noisy.bfloat16(), t, embeds).float()
        errors.append(float((after - before).square().sum()))
        folders.append(tmp_path / str(by_gptq))
        model.denoiser.save_pretrained(folders[-1])
    assert errors[1] < 0.7 * errors[0]
    # the release before reads the folder: nothing but the values of codes differs
    configs = [(f / "config.json").read_bytes() for f in folders]
    assert configs[0] == configs[1]
    again = type(model.denoiser).from_pretrained(folders[1], torch_dtype=torch.bfloat16)
    state = model.denoiser.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())
