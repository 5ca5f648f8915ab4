"""The bench of the semantic map: prompts with exchanged relations, and a short run."""

import numpy as np
import pytest

from benchmarks import alignment
from benchmarks.common.record import BenchOptions
from diffalign.shapes.prompts import prompts
from diffalign.shapes.verifier import verify
from diffalign.shapes.world import render, sample_scene


@pytest.mark.parametrize("task", alignment.REPEATS)
def test_an_image_of_the_exchanged_prompt_is_wrong_under_the_prompt(task):
    rng = np.random.default_rng(0)
    everything = {p["prompt"]: p for split in ("train", "held_out") for p in prompts(split)}
    entries = [p for p in prompts("held_out") if p["tag"] == task]
    for entry in entries:
        other = everything[alignment.swapped(entry)["prompt"]]
        assert other["prompt"] != entry["prompt"]
        assert not verify(render(sample_scene(other, rng)), entry).correct
        assert alignment.swapped(other)["prompt"] == entry["prompt"]


@pytest.mark.slow
def test_a_short_run_has_probes_of_both_arms(tmp_path):
    result = alignment.run(BenchOptions(quick=True, work=tmp_path, seeds=1))
    for arm in alignment.ARMS:
        cell = result["arms"][arm]["seeds"][0]
        assert [row["step"] for row in cell["probes"]] == [1, 3, 4, 6]
        assert all(0 <= row["position"] <= 1 for row in cell["probes"])
        assert 0 <= cell["geneval"]["overall"] <= 1
