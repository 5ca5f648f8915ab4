"""bench qsched: what it makes of its cells, and its weights in all forms, on tiny inputs."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from benchmarks.common.record import BenchOptions
from benchmarks.qsched import folding, qsched, weights
from benchmarks.qsched import student as students
from benchmarks.qsched.forms import COARSE, FORMS, PLAIN, Form
from benchmarks.qsched.rounding import RoundedStudent, compare, gain_over_nearest, headline
from diffalign import cli
from diffalign.core.errors import UsageError
from diffalign.quantization.accounting import report
from diffalign.quantization.backends import BACKENDS
from diffalign.quantization.integer import IntegerLinear
from diffalign.quantization.layers import PackedLinear
from diffalign.tuning.objective import PRESETS
from diffalign.tuning.tune import Settings, split


def test_forms_say_whether_they_are_calibrated():
    assert not Form().calibrated
    assert not Form("int8").calibrated
    assert Form("int4", svd_rank=16).calibrated
    assert Form("int8-static").calibrated
    assert Form("int4", gptq=True).calibrated
    assert not Form("int4", gptq=True).by_steps
    assert Form("int4", svd_rank=16).by_steps
    assert FORMS["bf16"].backend is None
    assert FORMS.items() <= PLAIN.items()
    assert all(form.backend in BACKENDS for form in PLAIN.values() if form.backend)
    assert students.OBJECTIVE in PRESETS


def cell(plain, best, *, accepted=True):
    return {
        "plain": {"geneval": plain},
        "best": {"geneval": best},
        "qsched": {"geneval": best if accepted else plain},
        "search": {"accepted": accepted},
    }


def test_a_table_tells_what_was_accepted_from_what_was_best():
    found = qsched.table([cell(0.4, 0.6), cell(0.5, 0.3, accepted=False), cell(0.6, 0.7)])
    assert found["plain"]["geneval"]["median"] == 0.5
    assert found["best"]["geneval"]["values"] == [0.6, 0.3, 0.7]
    assert found["qsched"]["geneval"]["values"] == [0.6, 0.5, 0.7]
    assert [s["accepted"] for s in found["searches"]] == [True, False, True]


def student(full, small):
    """Of two tables of cells by number of steps."""
    return {
        "forms": {
            form: {"steps": {n: qsched.table(cells) for n, cells in steps.items()}}
            for form, steps in (("bf16", full), ("int4", small))
        }
    }


def test_what_is_recovered_is_a_share_of_what_was_lost():
    """By hand: quantising takes 0.3 and 0.1, factors give back 0.15 and 0.05, and 0.02 to the control."""
    one = student({"2": [cell(0.8, 0.8)]}, {"2": [cell(0.5, 0.65)]})
    other = student({"2": [cell(0.6, 0.62)]}, {"2": [cell(0.5, 0.55)]})
    found = qsched.recovered([one, other], "geneval", "int4")
    assert found["share"] == 0.5
    assert found["means"] == {"lost": 0.2, "gained": 0.1, "control": 0.01}


def test_what_is_recovered_at_some_steps():
    two = {"2": [cell(0.8, 0.8)], "4": [cell(0.9, 0.9)]}
    small = {"2": [cell(0.6, 0.7)], "4": [cell(0.5, 0.5)]}
    found = qsched.recovered([student(two, small)], "geneval", "int4", steps=["2"])
    assert found["share"] == 0.5
    assert found["means"]["lost"] == pytest.approx(0.2)


def test_a_form_with_a_branch_stands_in_for_the_one_without():
    """By hand: rounding takes 0.4; of that the branch gives back 0.2 and the factors that it carries 0.1."""
    found = student({"2": [cell(0.8, 0.8)]}, {"2": [cell(0.4, 0.4)]})
    branched = student({"2": [cell(0.8, 0.8)]}, {"2": [cell(0.6, 0.7)]})["forms"]["int4"]
    found["forms"]["branched"] = branched
    got = qsched.recovered([found], "geneval", "int4", repaired="branched")
    assert got["share"] == 0.75
    assert got["means"]["gained"] == pytest.approx(0.3)


def keep(student, arm, seed, found, key):
    """A finished cell in the work folder."""
    assert student.options.cached(arm, seed, lambda: found, key=key) == found


def test_a_larger_search_has_cells_of_its_own(tmp_path):
    options = BenchOptions(quick=False, work=tmp_path, seeds=2)
    name, sizes = "shapes-sd-lcm", ("budget", "prompts", "images_per_task", "by_task")
    usual = students.Student(name, options)
    more = students.Student(name, options, students.LARGER["more"])
    for made, form, found, searched in (
        (usual, "bf16", cell(0.6, 0.6), ""),
        (usual, "int4 rows", cell(0.5, 0.5), ""),
        (more, "int4 rows", cell(0.4, 0.55), " 48x384"),
    ):
        for how in ("plain", "best", "qsched"):
            found[how]["verifier"] = found[how]["geneval"]
        for steps in (2, 4):
            for seed in range(2):
                keep(made, f"{name} {form} {steps}{searched}", seed, found, made.key(form, *sizes))
    found = qsched.larger(options, students.LARGER["more"])
    assert found["recovered"]["2"]["geneval"]["share"] == 0.75
    assert found["recovered"]["4"]["verifier"]["means"]["lost"] == pytest.approx(0.2)
    assert found["size"]["budget"] == 48


def test_prompts_by_task_are_as_many_of_each():
    size = students.LARGER["more by task"]
    found = students.training_prompts(size)
    assert len(found) == size.prompts
    tasks = Counter(p.task for p in found)
    assert set(tasks.values()) == {size.prompts // 6}
    halves = split(found, Settings({}).held_out)
    for half in halves:
        counts = Counter(p.task for p in half)
        assert len(counts) == 6
        assert max(counts.values()) - min(counts.values()) <= 8
    assert {p.text for p in halves[0]}.isdisjoint(p.text for p in halves[1])
    by_list = Counter(p.task for p in students.training_prompts(students.FULL))
    assert by_list["color_attr"] > 0.8 * students.FULL.prompts


@pytest.mark.parametrize("size", [students.FULL, students.QUICK])
def test_what_the_grid_is_held_against_has_prompts_of_its_own(size):
    seen, held_out = students.by_task(size.grid_images, size.grid_held_out)
    assert (len(seen), len(held_out)) == (size.grid_images, size.grid_held_out)
    for prompts in (seen, held_out):
        assert set(Counter(p.task for p in prompts).values()) == {len(prompts) // 6}
    assert {p.text for p in seen}.isdisjoint(p.text for p in held_out)
    by_text = Counter(p.text for p in seen if p.task == "color_attr")
    assert max(by_text.values()) == 1  # where there are enough, none is asked for twice


def test_nothing_lost_is_no_share():
    one = student({"2": [cell(0.5, 0.5)]}, {"2": [cell(0.6, 0.7)]})
    found = qsched.recovered([one], "geneval", "int4")
    assert found["share"] is None
    assert found["means"]["lost"] == pytest.approx(-0.1)


def test_psnr_by_hand():
    black = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    grey = black + torch.tensor([51, 0], dtype=torch.uint8).view(2, 1, 1, 1)
    equal = 10 * math.log10(255**2 / 1e-3)
    assert students.psnr(black, black) == pytest.approx(equal, abs=1e-3)
    assert students.psnr(grey, black) == pytest.approx((20 * math.log10(5) + equal) / 2, abs=1e-3)


def test_cells_are_taken_from_the_work_folder(tmp_path):
    options = BenchOptions(quick=True, work=tmp_path, seeds=1)
    made = students.Student("shapes-flux-schnell", options)
    assert made.size == students.QUICK
    sizes = ("budget", "prompts", "images_per_task", "by_task")
    for name, key in (
        ("shapes-flux-schnell int4 2", made.key("int4", *sizes)),
        (
            "shapes-flux-schnell published grid",
            made.key(COARSE, "grid", "grid_images", "grid_held_out"),
        ),
    ):
        keep(made, name, 0, {"name": name}, key)
    assert made.cell("int4", 2, 0) == {"name": "shapes-flux-schnell int4 2"}
    assert made.grid(0) == {"name": "shapes-flux-schnell published grid"}
    assert not made.models  # nothing was loaded


def rounded(**psnr):
    """A student's formats with one PSNR by form, at 2 and 4 steps."""
    return {
        form.replace("_", " "): {
            "steps": {
                n: {"psnr": {"median": value - int(n)}, "geneval": {"median": int(n) / 10}}
                for n in ("2", "4")
            }
        }
        for form, value in psnr.items()
    }


def test_the_headline_of_rounding_is_that_of_the_worse_student():
    forms = {"int4_gptq": 44.0, "int3_gptq": 40.0, "int2_gptq_tuned": 33.0, "int4_rows_gptq": 36.0}
    results = {
        "shapes-flux-schnell": rounded(**forms, int4=38.0),
        "shapes-sd-lcm": rounded(**{**forms, "int4_gptq": 43.0}, int4=39.0),
    }
    assert headline(results) == {
        "psnr_int4": 39.0,
        "psnr_int3": 36.0,
        "psnr_int2": 29.0,
        "geneval_int4_rows": 0.2,
    }
    assert gain_over_nearest(results, "int4") == {"2": 5.0, "4": 5.0}


def test_rounded_cells_are_taken_from_the_work_folder(tmp_path, monkeypatch):
    options = BenchOptions(quick=True, work=tmp_path, seeds=1)
    monkeypatch.setattr(RoundedStudent, "scores", lambda *a: {"psnr": 40.0, "geneval": 0.5})
    monkeypatch.setattr(
        RoundedStudent, "model", lambda *a: SimpleNamespace(denoiser=nn.Linear(2, 2))
    )
    first = compare("shapes-sd-lcm", options)
    assert set(first) == set(PLAIN)
    assert first["int4 gptq"]["steps"]["2"]["psnr"]["median"] == 40.0
    monkeypatch.setattr(RoundedStudent, "scores", lambda *a: 1 / 0)
    assert compare("shapes-sd-lcm", options) == first


def test_arms_are_checked_and_only_those_are_run(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="arms=sises: no such arm; did you mean 'sizes'"):
        qsched.run(BenchOptions(quick=True, work=tmp_path, arms=("sises",)))
    monkeypatch.setattr(qsched, "published_sizes", lambda: {"a": {"int4": {"ratio": 3.7}}})
    found = qsched.run(BenchOptions(quick=True, work=tmp_path, arms=("sizes",)))
    assert found["headline"] == {"bytes_ratio": {"a": 3.7}}
    assert found["students"] == {}
    assert cli.main(["bench", "qsched", "--arms=nothing", f"--work={tmp_path}"]) == 2


def test_published_sizes_count_what_packing_makes(monkeypatch):
    layout = weights.LAYOUTS["sd1.5"]
    monkeypatch.setattr(weights, "LAYOUTS", {"sd1.5": layout})
    found = weights.published_sizes()["sd1.5"]
    assert found["bf16_bytes"] == 2 * found["weights"]
    assert 1.8 < found["int8"]["ratio"] < 2
    assert 2.8 < found["int4 svd 32"]["ratio"] < found["int4"]["ratio"] < 4
    assert found["int4"]["bytes"] * found["int4"]["ratio"] == pytest.approx(
        found["bf16_bytes"], rel=1e-3
    )


@pytest.fixture
def flux():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    )
    return model.to(torch.bfloat16).eval()


@pytest.mark.parametrize(
    ("form", "kind"),
    [("int8", PackedLinear), ("int4", PackedLinear), ("int8-static", IntegerLinear)],
)
def test_a_model_in_a_form_still_takes_its_inputs(form, kind, flux):
    inputs = weights.flux_inputs(flux, tokens=16, text=4)
    assert inputs["hidden_states"].shape == (1, 16, 64)
    with torch.no_grad():
        before = flux(**inputs)[0].float()
        small = weights.in_form(flux, form, inputs)
        assert report(small).ratio > 1.3
        after = small(**inputs)[0].float()
    assert any(isinstance(m, kind) for m in small.modules())
    assert (after - before).norm() < 0.3 * before.norm()


def test_ratios_are_paired():
    class Model(nn.Module):
        device = torch.device("cpu")

        def forward(self, **inputs):
            return inputs["x"]

    found = weights._ratios(Model(), Model(), {"x": torch.ones(1)}, compiled=False)
    assert len(found) > 1
    assert all(r > 0 for r in found)


def test_the_speed_is_the_fastest_form_of_integers(monkeypatch, flux):
    """Of forms that multiply integers: int8 that multiplies unpacked weights does not count."""
    ratios = {
        **{"int8": 0.1, "int4": 0.2, "int8-static": 0.9, "int8-dynamic": 1.0},
        **{"int4a8": 0.3, "torchao-int8": 1.4},
    }
    current = []

    def in_form(model, form, inputs):
        current.append(form)
        return model

    monkeypatch.setattr(weights, "denoiser", lambda *a, **k: flux)
    monkeypatch.setattr(weights, "in_form", in_form)
    monkeypatch.setattr(weights, "flux_inputs", lambda *a, **k: {"hidden_states": torch.ones(1, 4)})
    monkeypatch.setattr(weights, "report", lambda model: SimpleNamespace(ratio=2.0))
    monkeypatch.setattr(
        weights,
        "_ratios",
        lambda a, b, i, *, compiled: [ratios[current[-1]] - (0.6 if compiled else 0)],
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = weights.speeds(quick=True)
    assert found["int8_latency_vs_bf16"] == pytest.approx(0.8)  # torchao-int8, compiled
    assert list(found["forms"]) == list(ratios)
    assert set(found["forms"]["int8"]) == {"bytes_ratio", "eager"}
    assert set(found["forms"]["torchao-int8"]) == {"bytes_ratio", "eager", "compiled"}


def test_folded_channels_leave_the_prediction_as_it_is():
    model = tiny.flux_model().denoiser.float()
    inputs = weights.flux_inputs(model, tokens=4, text=3)
    inputs["guidance"] = torch.ones(1)
    with torch.no_grad():
        expected = model(**inputs)[0]
        all_places = list(folding.places(model))
        assert len(all_places) == 5
        for place in all_places:
            folding.fold(place, torch.rand(place.modulation.in_features) + 0.5)
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
