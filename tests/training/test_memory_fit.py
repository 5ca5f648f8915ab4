"""A forecast beside the free memory: what fits, and with which settings, with the forecast that those give."""

import re
from functools import cache

import pytest
import yaml

from diffalign.config import decode, dump, load
from diffalign.training.forecast import forecast_of
from diffalign.training.memory import GIB
from diffalign.training.memory_fit import Room, describe, fits, free_memory, summary


def count(config):
    return count_text(dump(config))


@cache
def count_text(text):
    """The forecast of a configuration's YAML; the tests ask for some of them again and again."""
    return forecast_of(decode(yaml.safe_load(text)), processes=1)


@pytest.fixture(scope="module")
def config():
    return load("awm-shapes-sd3")


def test_a_run_that_fits_says_so(config):
    lines = describe(config, [Room("RAM", 64 * GIB)], count)
    assert lines[0].startswith("memory forecast, GiB for a process: ")
    assert lines[1:] == ["free memory, GiB: 64.00 on RAM", "the run fits"]
    assert "What helps" not in summary(config, [Room("RAM", 64 * GIB)], count)


def test_settings_that_are_advised_fit_with_the_forecast_they_give(config):
    free = int(0.3 * GIB)
    found = fits(config, free, count)
    assert found
    for settings, size in found:
        assert size <= free
        changed = load("awm-shapes-sd3", [f"--{s}" for s in settings.split()])
        assert count(changed).total == size
    lines = describe(config, [Room("cuda:0", 64 * GIB), Room("cuda:1", free)], count)
    assert "64.00 on cuda:0, 0.30 on cuda:1" in lines[1]
    which = "any of" if len(found) > 1 else "this setting"
    assert lines[2] == f"the run does not fit; it does with {which}:"
    assert re.fullmatch(r"  training\.micro_batch_size=\d+: 0\.\d\d GiB", lines[3])
    assert found[0][0] in summary(config, [Room("RAM", free)], count)


def test_where_nothing_fits_the_least_is_told(config):
    lines = describe(config, [Room("RAM", GIB // 100)], count)
    assert "does not fit with any setting; least is" in lines[2]
    assert "int4 base of `diffalign quantize`" in lines[3]


def test_free_memory_is_shared_by_processes():
    (one,), (two,) = free_memory(), free_memory(processes=2)
    assert 0 < two.free < one.free


@pytest.mark.parametrize(
    ("recipe", "denoiser", "encoders"),
    [
        ("awm-sd3.5-medium", 2.47e9, 5.6e9),
        ("awm-flux.1-dev", 11.9e9, 4.9e9),
        pytest.param("inversion-dpo-sdxl", 2.6e9, 0.8e9, marks=pytest.mark.slow),
        ("inversion-dpo-sd1.5", 0.86e9, 0.12e9),
        ("awm-sana", 1.6e9, 2.6e9),
    ],
)
def test_published_models_are_forecast_without_the_hub(recipe, denoiser, encoders):
    """Parameters and buffers as published, two bytes each; SD3.5 has a table of positions."""
    found = count(load(recipe))
    assert found.denoiser / 2 == pytest.approx(denoiser, rel=0.1)
    assert found.text_encoders / 2 == pytest.approx(encoders, rel=0.1)
    assert found.activations > 0
