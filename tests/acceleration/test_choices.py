"""Choices of the presets: from the rules, for the schedules of the published pipelines."""

import inspect

import diffusers
import pytest

from diffalign.acceleration.choices import DEVICES, LAYOUTS, choices
from diffalign.acceleration.options import CHOICES, PRESETS
from diffalign.cli import listing
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


def test_the_list_prints_them(capsys):
    listing.run(listing.Flags(what="presets"))
    printed = capsys.readouterr().out
    assert printed.count("GPU: ") == len(LAYOUTS) * len(PRESETS)
