"""A run scores its base once: the evaluation is kept beside it, and made again where it is of something else."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_run import base, prompts, train  # noqa: F401

from diffalign.data.prompts import Prompt
from diffalign.evaluation.kept import keep, kept
from diffalign.evaluation.score import summarize_scores
from diffalign.types import RewardOutput

ASKED = [Prompt("a cat", {"tag": "pets"}), Prompt("a dog", {"tag": "pets"}), Prompt("a bird", {})]


def evaluation():
    images = torch.arange(3 * 3 * 4 * 4, dtype=torch.uint8).view(3, 3, 4, 4)
    correct = np.array([1.0, 0.0, np.nan], np.float32)
    rewards = np.array([0.25, np.nan, 1 / 3], np.float32)
    return summarize_scores(ASKED, images, RewardOutput(rewards, {"verifier/correct": correct}))


def test_what_is_kept_comes_back(tmp_path):
    found = replace(evaluation(), not_finite=1)
    keep(found.thinned([0, 2]), tmp_path / "file", key=[1, "a"])
    again = kept(tmp_path / "file", ASKED, key=[1, "a"])
    assert again.to_dict() == found.to_dict()
    assert np.array_equal(again.rewards, found.rewards, equal_nan=True)
    assert again.rewards.dtype == np.float32
    assert again.images.shape == (2, 3, 4, 4)
    for row in (0, 2):
        assert torch.equal(again.image(row), found.image(row))
    with pytest.raises(ValueError, match="not in tuple"):
        again.image(1)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_of_something_else_or_cut_it_is_not_taken(tmp_path):
    file = tmp_path / "file"
    assert kept(file, ASKED, key=1) is None
    keep(evaluation(), file, key=1)
    assert kept(file, ASKED, key=1).rows == (0, 1, 2)
    assert kept(file, ASKED, key=2) is None
    assert kept(file, ASKED[:2], key=1) is None
    assert kept(file, [*ASKED[:2], Prompt("a bird", {"tag": "pets"})], key=1) is None
    for length in (0, 5, 200, file.stat().st_size - 1):
        (tmp_path / "cut").write_bytes(file.read_bytes()[:length])
        assert kept(tmp_path / "cut", ASKED, key=1) is None


def test_a_resumed_run_does_not_score_its_base_again(base, prompts, tmp_path, capsys):  # noqa: F811
    folder, told = tmp_path / "run", f"scoring {base} before training"
    assert train(base, prompts, folder, "--training.num_updates=1") == 0
    assert told in capsys.readouterr().out
    first = json.loads((folder / "summary.json").read_text())
    assert train(base, prompts, folder, "--training.num_updates=2") == 0
    assert told not in capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["before"], summary["updates"]) == (first["before"], 2)
    assert summary["win_rate"] is not None
    assert (folder / "report.html").read_text().count("data:image/png") >= 6  # three pairs
    images = load_file(folder / "before.safetensors")["images"].clone()
    assert len(images) == 3

    file = folder / "before.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert train(base, prompts, folder, "--training.num_updates=3") == 0
    assert told in capsys.readouterr().out
    assert json.loads((folder / "summary.json").read_text())["before"] == first["before"]
    assert torch.equal(load_file(file)["images"], images)
