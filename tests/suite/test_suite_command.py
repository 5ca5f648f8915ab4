"""`diffalign evaluate suite` as a user runs it, on Shapes."""

import json
import re

import pytest

from diffalign import cli
from diffalign.evaluation.suite import summarize


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(summarize, "RESAMPLES", 200)


def command(*words):
    return cli.main(["evaluate", "suite", *map(str, words)])


def test_a_suite_is_drawn_judged_compared_and_shown(tmp_path, capsys):
    words = ["--model", "shapes-sd3", "--num_inference_steps", 2, "--quick", 6]
    assert command(*words, "--benchmarks", "shapes:checklist", "--output_dir", tmp_path / "a") == 0
    seed = [*words, "--seed", 7, "--output_dir", tmp_path / "b", "--against", tmp_path / "a"]
    seed += ["--benchmarks", "shapes:checklist"]
    assert command(*seed, "--export", tmp_path / "official", "--json") == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    names = [entry["benchmark"] for entry in result["benchmarks"]]
    assert names == ["shapes:checklist"]
    page = (tmp_path / "b" / "report.html").read_text()
    assert "How many" in page
    assert "Drawn in another way: seed: 7, 1000 there" in page


def test_images_of_others_and_recorded_replies(tmp_path, capsys):
    words = ["--model", "shapes-sd3", "--num_inference_steps", 2, "--quick", 4]
    words += ["--benchmarks", "shapes:checklist"]
    assert command(*words, "--output_dir", tmp_path / "a") == 0
    pictures = tmp_path / "a" / "shapes-checklist" / "images"
    own = [*words, "--images", pictures, "--output_dir", tmp_path / "b"]
    assert command(*own) == 0
    assert command(*words, "--judge", "recorded", "--output_dir", tmp_path / "a") == 0
    scores = [
        json.loads((tmp_path / n / "summary.json").read_text())["benchmarks"][0]["score"]
        for n in "ab"
    ]
    assert scores[0] == scores[1]
    next(pictures.rglob("*.png")).unlink()
    assert command(*own) == 2
    assert "less than 98 %" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--against", "base"], "--against=base: needs a `lora`|needs a --lora"),
        (["--against", "nowhere"], "there is no such folder"),
        (["--benchmarks", "genevall2"], "did you mean 'geneval2'"),
        (["--benchmarks", "wise"], "HF_HUB_OFFLINE|could not be downloaded"),
        (["--judge", "nowhere"], "there is no such folder"),
        (["--judge", "recorded"], "has no replies"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, words, message):
    assert command(*words, "--output_dir", tmp_path / "out") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("diffalign: error: ")
    assert re.search(message, lines[-1])


def test_benchmarks_are_listed(capsys):
    assert cli.main(["list", "benchmarks"]) == 0
    assert "geneval2" in capsys.readouterr().out
