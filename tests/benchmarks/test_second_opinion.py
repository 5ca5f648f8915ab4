"""A reward that was not trained on, asked of finished runs."""

from dataclasses import replace

import pytest

from benchmarks.awm import arms as awm_arms
from benchmarks.common.record import BenchOptions
from benchmarks.common.second_opinion import IMAGES_PER_TASK, REWARD, SecondOpinion, lora_left
from diffalign import lora
from diffalign.pipelines.registry import load_model


@pytest.fixture
def config(tmp_path):
    """Of a run with a few images."""
    options = BenchOptions(quick=True, work=tmp_path)
    return awm_arms.configuration("awm", awm_arms.Arm(awm_arms.AWM), 0, options)


def test_it_depends_on_weights_prompts_and_noise(config):
    opinion = SecondOpinion()
    file = lora_left(config) / lora.WEIGHT_NAME
    file.parent.mkdir(parents=True)
    file.write_bytes(b"some")
    known = opinion.key(config)
    assert known == opinion.key(config)
    file.write_bytes(b"others")
    assert opinion.key(config) != known
    file.write_bytes(b"some")
    assert opinion.key(config) == known
    other = replace(config, evaluation=replace(config.evaluation, seed=7))
    assert opinion.key(other) != known


def test_many_images_are_not_needed(config):
    many = replace(config, evaluation=replace(config.evaluation, images_per_task=128))
    assert SecondOpinion().how(many).images_per_task == IMAGES_PER_TASK
    assert SecondOpinion().how(config).images_per_task == config.evaluation.images_per_task


@pytest.mark.slow
def test_a_lora_that_does_nothing_is_as_good_as_the_base(config, monkeypatch):
    """And the base is drawn once for all runs of a seed."""
    model = load_model(config.model.name)
    lora.attach(model.denoiser, rank=2, alpha=2, targets=["attn.to_q"])
    lora.export_lora(model.denoiser, model.pipeline, lora_left(config))
    opinion, drawn = SecondOpinion(), []
    evaluate = opinion.evaluate
    monkeypatch.setattr(
        opinion, "evaluate", lambda c, path: drawn.append(path) or evaluate(c, path)
    )
    found = [opinion(config) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0]["before"] == found[0]["after"]
    assert found[0]["win_rate"] == 0.5
    assert found[0]["interval"] == [0.5, 0.5]
    assert [path is None for path in drawn] == [True, False, False]
    assert set(opinion.evaluate(config, None).means) >= {REWARD}
