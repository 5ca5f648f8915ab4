"""Rewards of one's own: a file or a module, a class or a function, from the command line, a recipe and Python."""

import json
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign import cli, config
from diffalign.rewards import own, registry
from diffalign.rewards.base import RewardError
from diffalign.rewards.composition import CompositeReward
from diffalign.rewards.function import RewardShapeError
from diffalign.rewards.registry import UnknownReward
from diffalign.training.inputs import read_inputs

MINE = '''
"""My rewards."""
from pathlib import Path

import numpy as np

from diffalign.rewards.base import Reward, RewardCard
from diffalign.types import RewardOutput


def brightness(images, prompts, metadata):
    """The mean of all pixels, 0 to 1."""
    return images.float().mean((1, 2, 3)) / 255


class Darkness(Reward):
    card = RewardCard(name="darkness", description="the opposite")

    def score(self, images, prompts, metadata):
        return RewardOutput(1 - (images.float().mean((1, 2, 3)) / 255).numpy())


class Plain(Reward):
    """Without a card, and with a list."""

    def score(self, images, prompts, metadata):
        return [len(p) for p in prompts]


ready = Darkness()


def of_metadata(images, prompts, metadata):
    return [m["value"] for m in metadata]
'''
IMAGES = torch.stack([torch.full((3, 8, 8), v, dtype=torch.uint8) for v in (0, 51, 255)])


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder to be in, with my_reward.py, and with a package on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (tmp_path / "my_reward.py").write_text(MINE)
    (tmp_path / "site" / "my_package").mkdir(parents=True)
    (tmp_path / "site" / "my_package" / "__init__.py").write_text("")
    (tmp_path / "site" / "my_package" / "module.py").write_text(MINE)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("my_reward.py:brightness", [0, 0.2, 1]),
        ("my_reward.py:Darkness", [1, 0.8, 0]),
        ("my_reward.py:ready", [1, 0.8, 0]),
        ("my_reward.py:Plain", [1, 2, 3]),
        ("./my_reward.py:brightness", [0, 0.2, 1]),
        ("my_package.module:brightness", [0, 0.2, 1]),
        ("my_package.module:Darkness", [1, 0.8, 0]),
    ],
)
def test_a_class_a_function_and_an_instance_score(mine, name, expected):
    reward = CompositeReward.from_config({name: 2.0})
    reward.prepare()
    output = reward.score(IMAGES, ["a", "bb", "ccc"], [{}] * 3)
    np.testing.assert_allclose(output.values, 2 * np.array(expected), rtol=1e-6)
    assert output.values.dtype == np.float32
    np.testing.assert_allclose(output.details[name], expected, rtol=1e-6)
    card = reward.rewards[name].card
    assert card.description
    assert (card.revision is None) == name.startswith("my_package")


def test_from_python_a_function_is_a_reward():
    def half(images, prompts, metadata):
        return np.full(len(prompts), 0.5)

    reward = CompositeReward({"half": half}, {"half": 3.0})
    assert reward.score(IMAGES, ["a"] * 3, [{}] * 3).values.tolist() == [1.5] * 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_rewards.py:brightness", "cannot be read .No such file"),
        ("my_reward.py:britness", "did you mean 'brightness'"),
        ("my_reward.py:xyz", "it has Darkness, "),
        ("my_reward.py", "expected FILE.py:NAME"),
        ("my_reward.py:", "expected FILE.py:NAME"),
        ("my_package.modul:brightness", "there is no module 'my_package.modul'"),
        ("nowhere:brightness", "there is no module 'nowhere'"),
        ("my_package.module:britness", "did you mean 'brightness'"),
    ],
)
def test_a_wrong_name_is_one_line(mine, name, message, capsys):
    with pytest.raises(UnknownReward, match=message):
        CompositeReward.from_config({name: 1.0})
    assert cli.main(["train", "awm-shapes-sd3", "--dry-run", f"--rewards.{name}=1"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def broken(:", "is no Python"),
        ("broken = 1 / 0", r"raised ZeroDivisionError as it was imported: .*line 1"),
        ("import nowhere_at_all\ndef broken(): pass", "raised ModuleNotFoundError"),
        ("broken = 3", "is a int; expected a Reward class"),
        ("class broken: pass", "is no subclass of diffalign.rewards.base.Reward"),
    ],
)
def test_a_broken_file_is_one_line(mine, text, message):
    (mine / "broken.py").write_text(text)
    with pytest.raises((UnknownReward, RewardError), match=message):
        registry.create("broken.py:broken")


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], r"shape \(1,\) for 3 images \(a list\)"),
        (np.zeros((3, 2)), r"shape \(3, 2\)"),
        (torch.zeros(3, 1), r"shape \(3, 1\)"),
        (0.5, r"shape \(\) for 3 images"),
        (None, r"shape \(\)"),
        (["a", "b", "c"], "is not 3 numbers"),
        ({"score": 1}, "is not 3 numbers"),
    ],
)
def test_an_answer_that_breaks_the_contract_is_an_error(result, message):
    reward = CompositeReward({"f": lambda *_: result}, {"f": 1.0})
    with pytest.raises(RewardShapeError, match=message):
        reward.score(IMAGES, ["a"] * 3, [{}] * 3)


def test_what_cannot_be_scored_is_nan_and_counted(mine):
    (mine / "moody.py").write_text(
        textwrap.dedent(
            """
            def moody(images, prompts, metadata):
                if "raise" in prompts:
                    raise RuntimeError("not this one")
                return [float(p) for p in prompts]
            """
        )
    )
    reward = CompositeReward.from_config({"moody.py:moody": 1.0})
    output = reward.score(IMAGES, ["1", "raise", "inf"], [{}] * 3)
    assert output.mask.tolist() == [True, False, False]
    assert reward.failures == {"moody.py:moody": 2}


def test_flags_add_and_replace_and_recipes_name_them(mine, monkeypatch):
    added = config.load("awm-shapes-sd3", ["--rewards.my_reward.py:brightness=0.5"])
    assert added.rewards == {"verifier": 1.0, "my_reward.py:brightness": 0.5}
    added = config.load("distill-shapes-flux", ["--rewards.jpeg=1"])  # it has the default
    assert added.rewards == {"verifier": 1.0, "jpeg": 1.0}
    replaced = config.load("awm-shapes-sd3", ["--rewards={my_reward.py:brightness: 0.5}"])
    assert replaced.rewards == {"my_reward.py:brightness": 0.5}
    assert config.load("awm-shapes-sd3", ["--rewards.hpsv2.1=1"]).rewards["hpsv2.1"] == 1.0
    (mine / "mine.yaml").write_text(
        "extends: awm-shapes-sd3\nrewards:\n  my_reward.py:brightness: 2.0\n"
    )
    assert config.load("mine.yaml").rewards["my_reward.py:brightness"] == 2.0
    below = mine / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    (name,) = set(config.load("../mine.yaml").rewards) - {"verifier"}
    assert name == "../my_reward.py:brightness"
    registry.check_name(name)


def test_a_run_knows_the_file_of_its_reward(mine):
    loaded = config.load("awm-shapes-sd3", ["--rewards={my_reward.py:brightness: 1}"])
    before = read_inputs(loaded).digests
    assert before["rewards.my_reward.py:brightness"] == own.digest("my_reward.py:brightness")
    (mine / "my_reward.py").write_text(MINE + "# changed\n")
    assert read_inputs(loaded).digests != before


def test_folders_are_scored_by_the_rewards_that_can(mine, capsys):
    folder = mine / "images"
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16), (i * 200,) * 3).save(folder / f"{i}.png")
    flags = [f"--images={folder}", "--output=scores.json"]
    rewards = "--rewards=ocr,my_reward.py:brightness,verifier"
    assert cli.main(["evaluate", "rewards", *flags, rewards]) == 0
    said = capsys.readouterr().err
    assert "ocr is left out: reward 'ocr' needs the text in double quotes" in said
    assert "verifier is left out" in said
    means = json.loads((mine / "scores.json").read_text())["means"]
    assert means == {"my_reward.py:brightness": pytest.approx(100 / 255)}
    assert cli.main(["evaluate", "rewards", *flags, "--rewards=ocr,verifier"]) == 2
    assert "needs the text in double quotes" in capsys.readouterr().err
