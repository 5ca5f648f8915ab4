"""A forecast beside the free memory: what fits, and with which settings, with the forecast that those give."""

import pytest
import tiny
from marks import slow

from diffalign.config import decode, load, to_dict
from diffalign.training.forecast import forecast_of
from diffalign.training.memory import GIB
from diffalign.training.memory_fit import (
    SPARE,
    Room,
    cheapest,
    describe,
    free_memory,
    summary,
)
from diffalign.training.memory_settings import changed, combinations, spelt


def count(config, most=None):
    return forecast_of(config, processes=1)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    tiny.sd3_pipeline().save_pretrained(folder)
    return configuration(folder)


def configuration(folder, *more):
    return load(
        None,
        [
            f"--model.name={folder}",
            "--model.max_sequence_length=16",
            "--lora.rank=4",
            "--lora.alpha=8",
            "--rollout.height=16",
            "--rollout.width=16",
            "--rollout.micro_batch_size=4",
            "--rollout.prompts_per_update=2",
            "--training.micro_batch_size=8",
            *more,
        ],
    )


def test_a_run_that_fits_says_so(config):
    lines = describe(config, [Room("RAM", 64 * GIB)], count)
    assert lines[0].startswith("memory forecast, GiB for a process: ")
    assert lines[1].startswith("free memory, GiB: 64.00 on RAM; a run may take 90 % of it")
    assert lines[2:] == ["the run fits"]
    assert "What helps" not in summary(config, [Room("RAM", 64 * GIB)], count)


@pytest.mark.parametrize("share", [0.8, 0.6])
def test_settings_that_are_chosen_fit_with_the_forecast_they_give(config, share):
    free = share * count(config).total
    fit = cheapest(config, free, count)
    assert fit.forecast.total <= free < count(config).total
    again = configuration(config.model.name, *(f"--{s}" for s in spelt(fit.changes).split()))
    assert count(again).total == fit.forecast.total
    lines = describe(
        config, [Room("cuda:0", 64 * GIB), Room("cuda:1", int(free / (1 - SPARE)) + 1)], count
    )
    assert "64.00 on cuda:0, 0.00 on cuda:1" in lines[1]
    assert lines[2].split()[:2] == ["GiB", "denoiser"]
    assert lines[3].endswith("as it is")
    assert lines[-1].endswith(f"model.memory=auto sets {spelt(fit.changes)}")
    assert "model.memory=auto" in summary(config, [Room("RAM", int(free))], count)


def test_the_cheapest_is_found_first(config):
    """No combination of a lower cost fits where one is chosen."""
    free = 0.6 * count(config).total
    fit = cheapest(config, free, count)
    for lever in combinations(config):
        if lever.changes == {k: v for k, v in fit.changes.items() if "micro_batch" not in k}:
            break
        assert count(changed(config, lever.changes)).total > free


def test_combinations_can_be_run(config):
    merging = configuration(config.model.name, "--rollout.merge_lora=true")
    for run in (config, merging):
        levers = combinations(run)
        assert levers[0].changes == {}
        assert [lever.cost for lever in levers] == sorted(lever.cost for lever in levers)
        for lever in levers:
            decode(to_dict(changed(run, lever.changes)))
    assert len(combinations(merging)) > len(combinations(config))


def test_where_nothing_fits_the_least_is_told(config):
    lines = describe(config, [Room("RAM", 2**20)], count)
    assert lines[-1] == "the run does not fit with any of these settings"
    assert any("model.offload_blocks=true" in line for line in lines)


def test_each_setting_needs_less(config):
    sizes = [count(config).total]
    changes = {}
    for name, value in {
        "model.offload_encoders": True,
        "model.gradient_checkpointing": True,
        "model.offload_blocks": True,
        "training.micro_batch_size": 1,
    }.items():
        changes[name] = value
        sizes.append(count(changed(config, changes)).total)
    assert sizes == sorted(sizes, reverse=True)


def test_a_quantised_denoiser_is_as_large_as_its_bits(tmp_path):
    run = load("awm-shapes-sd3", ["--rollout.merge_lora=false"])
    sizes = {
        kind: forecast_of(changed(run, {"model.quantization": kind}), processes=1, most=0).denoiser
        for kind in (None, "int8", "fp8", "int4", "nf4")
    }
    # a few layers at both ends stay as they are
    expected = {"int8": 8.25, "fp8": 8, "int4": 4.25, "nf4": 4.5}
    for kind, bits in expected.items():
        assert sizes[kind] / sizes[None] == pytest.approx(bits / 16, abs=0.06)


def test_free_memory_is_shared_by_processes():
    (one,), (two,) = free_memory(), free_memory(processes=2)
    assert 0 < two.free < one.free


@pytest.mark.parametrize(
    ("recipe", "denoiser", "encoders"),
    [
        ("awm-sd3.5-medium", 2.47e9, 5.6e9),
        slow("awm-flux.1-dev", 11.9e9, 4.9e9),
        slow("inversion-dpo-sdxl", 2.6e9, 0.8e9),
        ("inversion-dpo-sd1.5", 0.86e9, 0.12e9),
        ("awm-sana", 1.6e9, 2.6e9),
    ],
)
def test_published_models_are_forecast_without_the_hub(recipe, denoiser, encoders):
    """Parameters and buffers as published, two bytes each; SD3.5 has a table of positions."""
    found = forecast_of(load(recipe), processes=1, most=0)
    assert found.denoiser / 2 == pytest.approx(denoiser, rel=0.1)
    assert found.text_encoders / 2 == pytest.approx(encoders, rel=0.1)
