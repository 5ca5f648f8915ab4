"""A run scores its base once: the evaluation is kept beside it, and made again where it is of something else."""

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from processes import fork
from safetensors.torch import load_file, save_file
from whole_runs import train

from diffalign.data.prompts import Prompt
from diffalign.evaluation import report
from diffalign.evaluation.kept import keep, kept
from diffalign.evaluation.score import summarize_scores
from diffalign.training.run import Run
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


def test_a_resumed_run_does_not_score_its_base_again(
    base,
    prompts,
    tmp_path,
    capsys,
    monkeypatch,
):
    monkeypatch.setattr(report, "EXAMPLES", 2)
    mine = shutil.copytree(base, tmp_path / "base")
    folder, told = tmp_path / "run", f"scoring {mine} before training"

    def run(updates):
        assert train(mine, prompts, folder, f"--training.num_updates={updates}") == 0
        return json.loads((folder / "summary.json").read_text()), told in capsys.readouterr().out

    first, scored = run(1)
    assert scored
    again, scored = run(2)
    assert not scored
    assert (again["before"], again["updates"]) == (first["before"], 2)
    assert again["win_rate"] is not None
    file = folder / "before.safetensors"
    images = load_file(file)["images"].clone()
    assert len(images) == 2 < first["before"]["images"]

    file.write_bytes(file.read_bytes()[:100])
    again, scored = run(2)
    assert scored
    assert again["before"] == first["before"]
    assert torch.equal(load_file(file)["images"], images)

    weights = mine / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({k: -v for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    assert train(mine, prompts, folder, "--training.num_updates=2") == 2
    assert "base weights" in capsys.readouterr().err


def test_what_a_reward_could_not_score_is_asked_again(
    base,
    prompts,
    tmp_path,
    monkeypatch,
):
    counts = itertools.count()
    monkeypatch.setattr(Run, "failures", property(lambda self: {"jpeg": next(counts)}))
    assert train(base, prompts, tmp_path / "run", "--training.num_updates=1") == 0
    assert not (tmp_path / "run" / "before.safetensors").exists()


@pytest.mark.slow
def test_two_processes_know_of_it_together(base, prompts, tmp_path):
    """The second does not score alone what the first has found."""
    befores = []
    for updates, scored in (("1", True), ("2", False)):
        done = fork(2, "whole_run", base, prompts, tmp_path / "run", updates, output=tmp_path)
        assert not any(done.returncodes), done.stderr[-2000:]
        assert (f"scoring {base} before training" in done.stdout) == scored
        befores.append(json.loads((tmp_path / "run" / "summary.json").read_text())["before"])
    assert befores[0] == befores[1]
