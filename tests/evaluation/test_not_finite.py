"""Models that make NaN: such images are counted, and neither scored, compared nor written."""

import json
import logging

import numpy as np
import pytest
import torch

from diffalign import cli
from diffalign.data.prompts import load_prompts
from diffalign.evaluation import fid, geneval
from diffalign.evaluation.score import evaluate_model
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.sampler import Sampler
from diffalign.types import RewardOutput

DRAWING = Drawing(1, images_per_prompt=2, micro_batch_size=3, mixed_precision="no")


@pytest.fixture
def broken(monkeypatch):
    """Every third image of a batch has a NaN among its latents."""
    real = Sampler.images

    def images(*args, **kwargs):
        samples = real(*args, **kwargs)
        samples.latents[::3, 0, 0, 0] = torch.nan
        return samples

    monkeypatch.setattr(Sampler, "images", images)


def constant(images, texts, metadata):
    """A reward that notices nothing."""
    ones = np.ones(len(texts), np.float32)
    return RewardOutput(ones, {"correct": ones})


def test_they_have_no_reward(sd3, broken):
    prompts = load_prompts("shapes:held_out", limit=3)
    found = evaluate_model(sd3, prompts, constant, DRAWING)
    assert np.isnan(found.rewards).tolist() == [True, False, False] * 2
    told = found.to_dict()
    assert (told["images"], told["scored"], told["failed"], told["not_finite"]) == (6, 4, 2, 2)
    assert told["means"]["reward"] == 1


def test_they_are_in_no_distance(sd3, broken):
    prompts, about = load_prompts("shapes:held_out", limit=3), {}
    batches = list(fid.model_batches(sd3, prompts, about, DRAWING))
    assert [len(images) for images, _ in batches] == [2, 2]
    assert [group for _, group in batches] == [[0, 1], [2, 2]]
    assert about == {"images": 4, "not_finite": 2}


def test_they_are_not_written_and_count_as_missing(sd3, broken, tmp_path, caplog):
    prompts = load_prompts("shapes:held_out", limit=3)
    geneval.write_prompts(tmp_path, prompts)
    with caplog.at_level(logging.WARNING):
        geneval.generate_samples(sd3, prompts, tmp_path, DRAWING)
    assert caplog.text.count("made no finite image") == 2
    names = [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*.png"))]
    assert names == [
        *("00000/samples/0001.png", "00001/samples/0000.png"),
        *("00002/samples/0000.png", "00002/samples/0001.png"),
    ]
    images, empty = geneval.read_samples(tmp_path)
    rows = geneval.score_samples(images, lambda x, entries: [[] for _ in x], batch_size=4)
    assert geneval.summary(rows, empty=empty)["missing"] == 2


def test_the_command_counts_them(broken, capsys):
    flags = ["--max_prompts=3", "--num_inference_steps=1", "--batch_size=3"]
    assert cli.main(["evaluate", "--json", "--model=shapes-sd3", *flags]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (found["scored"], found["not_finite"]) == (2, 1)


def test_batches_are_shown_in_order_as_they_are_drawn(sd3):
    shown = []
    prompts = load_prompts("shapes:held_out", limit=2)
    found = evaluate_model(
        sd3, prompts, constant, DRAWING, on_images=lambda rows, x: shown.append((rows, x))
    )
    assert [rows.start for rows, _ in shown] == [0, 3]
    assert torch.equal(torch.cat([x for _, x in shown]), found.images)
