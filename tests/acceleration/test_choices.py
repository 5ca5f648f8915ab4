"""Choices of the presets: from the rules, for the schedules of the published pipelines."""

import inspect
import json

import diffusers
import pytest

from diffalign.acceleration.choices import DEVICES, LAYOUTS, choices
from diffalign.acceleration.options import CHOICES, PRESETS
from diffalign.cli import listing
from diffalign.core import checkout
from diffalign.pipelines.registry import available

PIPELINES = {
    "SD1.5": diffusers.StableDiffusionPipeline,
    "SDXL": diffusers.StableDiffusionXLPipeline,
    "SD3.5": diffusers.StableDiffusion3Pipeline,
    "FLUX.1-dev": diffusers.FluxPipeline,
    "SANA": diffusers.SanaPipeline,
}


@pytest.mark.parametrize("family", sorted(PIPELINES))
def test_the_steps_are_those_of_the_pipeline(family):
    parameters = inspect.signature(PIPELINES[family].__call__).parameters
    assert LAYOUTS[family].steps == parameters["num_inference_steps"].default


def test_every_family_has_every_preset_on_every_device():
    rows = list(choices())
    assert [(r.family, r.preset) for r in rows] == [(f, p) for f in LAYOUTS for p in PRESETS]
    for row in rows:
        assert set(row.options) == set(DEVICES)
        assert all(set(options) <= set(CHOICES) for options in row.options.values())
    assert {layout.stand_in for layout in LAYOUTS.values()} - {None} <= set(available())


def test_the_rules_decide():
    by_name = {(r.family, r.preset): r for r in choices()}
    assert "cache" not in by_name["FLUX.1-schnell", "fast"].options["GPU"]
    assert "guidance" not in by_name["FLUX.1-dev", "fast"].options["GPU"]
    assert by_name["SD1.5", "lossless"].text("CPU") == "nothing"
    assert "cache for 50 dB" in by_name["SD3.5", "balanced"].text("CPU")


def a_record(psnr, **more):
    figures = {"ratio": {"median": 2.25}, "psnr": {"median": psnr}}
    return {"arms": {"shapes-sd3": {"presets": {"fast": figures}}}, "machine": {}, **more}


def test_the_list_prints_them_and_what_was_measured(capsys, monkeypatch, tmp_path):
    file = tmp_path / "benchmarks" / "results" / "acceleration.json"
    file.parent.mkdir(parents=True)
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    counts = []
    for record in (None, a_record(41.2, quick=True), a_record(41.2, quick=False)):
        if record is not None:
            file.write_text(json.dumps(record), encoding="utf-8")
        listing.run(listing.Flags(what="presets"))
        printed = capsys.readouterr().out
        assert printed.count("GPU: ") == len(LAYOUTS) * len(PRESETS)
        counts.append(printed.count("measured: no"))
    assert counts == [24, 24, 23]
    assert "measured: shapes-sd3, CPU: 2.25 times as fast, 41.2 dB" in printed


def test_equal_images_and_the_device_are_told():
    choice = next(c for c in choices() if (c.family, c.preset) == ("SD3.5", "fast"))
    machine = {"device": "NVIDIA L4"}
    words = choice.measured(a_record(150.0, machine=machine))
    assert words == "shapes-sd3, NVIDIA L4: 2.25 times as fast, the same images"
