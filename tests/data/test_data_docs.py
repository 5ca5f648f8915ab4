"""Every example of docs/data.md is read as it stands there."""

import re
from pathlib import Path

import pytest
from PIL import Image

from diffalign.config import PairsConfig
from diffalign.data.images import read_folder
from diffalign.data.pairs.make import comparable
from diffalign.data.pairs.records import PreferencePair, read_pairs
from diffalign.data.prompts import load_prompts

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
TXT, JSONL, GENEVAL, CSV, PAIR, CAPTIONS = re.findall(r"```(?:text|json)\n(.*?)```", PAGE, re.S)


@pytest.mark.parametrize(
    ("name", "text", "tasks"),
    [
        ("a.txt", TXT, ["all", "all"]),
        ("a.jsonl", JSONL, ["signs"]),
        ("evaluation_metadata.jsonl", GENEVAL, ["position"]),
    ],
)
def test_prompts(tmp_path, name, text, tasks):
    (tmp_path / name).write_text(text)
    assert [p.task for p in load_prompts(str(tmp_path / name))] == tasks


@pytest.mark.parametrize(("name", "text"), [("metadata.csv", CSV), ("metadata.jsonl", CAPTIONS)])
def test_captions(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    (tmp_path / "cats").mkdir()
    images = read_folder(tmp_path)
    for image in images:
        Image.new("RGB", (8, 8)).save(image.path)
    assert [i.prompt.text for i in read_folder(tmp_path)] == [i.prompt.text for i in images]
    if name == "metadata.csv":
        assert [i.prompt.text for i in images] == ["a red, round ball", "a cat"]
    else:
        assert len(comparable(images, tmp_path)) == 2


def test_pairs(tmp_path):
    (tmp_path / "prefs.jsonl").write_text(PAIR)
    (pair,) = read_pairs(PairsConfig(source=str(tmp_path / "prefs.jsonl")))
    assert isinstance(pair, PreferencePair)
    assert pair.images == (tmp_path / "good" / "1.png", tmp_path / "bad" / "1.png")
