"""Figures as people read them: digits, intervals and verdicts, rows, times, tables of 80 columns."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from diffalign import config
from diffalign.cli import output
from diffalign.cli.train import results_of
from diffalign.data.prompts import Prompt
from diffalign.evaluation import figures, images
from diffalign.pipelines.drawing import Drawing


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.117, "0.117"),
        (0.9996, "1.00"),
        (-0.00312, "-0.00312"),
        (0.0, "0"),
        (-0.0, "0"),
        (23.456, "23.5"),
        (1234.5, "1234"),
        (2.5e-7, "2.50e-07"),
        (math.nan, "nan"),
    ],
)
def test_numbers_keep_three_digits(value, text):
    assert figures.number(value) == text


@pytest.mark.parametrize(
    ("low", "high", "prompts", "told"),
    [
        (0.070, 0.161, 3, ("too few prompts (3)", "")),
        (0.070, 0.161, 6, ("+0.0700 to +0.161", "")),
        (-0.07, 0.161, 6, ("-0.0700 to +0.161", "within noise")),
        (None, None, 8, ("unknown", "")),
    ],
)
def test_a_verdict_follows_from_the_interval_beside_it(low, high, prompts, told):
    assert figures.told(low, high, n=2 * prompts, prompts=prompts) == told
    assert figures.told(0.2, 0.4, n=4, prompts=1) == ("too few images (4)", "")


def side(tasks, means):
    return {"tasks": tasks, "means": means}


def test_a_quantity_has_one_row():
    same = side({"a": 0.2, "overall": 0.2}, {"reward": 0.1, "jpeg": 0.1, "v/correct": 0.2})
    assert figures.score_rows([same, same]) == {
        "tasks": {"a": "a", "overall": "overall"},
        "means": {"reward": "reward (jpeg)"},
    }
    other = side({"overall": 0.2}, {"reward": 0.1, "jpeg": 0.1, "ocr": 0.3, "v/correct": 0.3})
    assert figures.score_rows([other]) == {
        "tasks": {"overall": "overall (mean over tasks)"},
        "means": {
            "reward": "reward",
            "jpeg": "jpeg",
            "ocr": "ocr",
            "v/correct": "v/correct (mean over images)",
        },
    }


def change(value, low, high, prompts):
    names = ("value", "low", "high", "n", "prompts", "within_noise")
    return dict(zip(names, (value, low, high, 64, prompts, low <= 0 <= high), strict=True))


def test_a_summary_fits_80_columns_unbroken(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    tasks = {"two_object": 0.5, "a_very_long_name_of_a_task": 0.5, "overall": 0.5}
    means = {"reward": -0.00301, "jpeg": -0.00301}
    summary = {
        "updates": 5,
        "device": "cpu",
        "before": side(tasks, means),
        "after": side(tasks, means),
        "differences": {
            "tasks": {
                "two_object": change(0.117, 0.07, 0.161, 3),
                "a_very_long_name_of_a_task": change(-0.117, -0.161, 0.07, 30),
            },
            "means": {"reward": change(-0.00312, -0.00456, -0.00123, 8)},
        },
        "training_seconds": 105,
        "seconds": 66,
        "resumed_after": 3,
    }
    output.print_summary(summary)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[:-2])) <= 80
    for piece in (
        "too few prompts (3)",
        "-0.161 to +0.0700",
        "within noise",
        "-0.00456 to -0.00123",
        "-0.00301",
        "in all sittings; this one, after update 3, 66 s",
    ):
        assert piece in text
    assert text.count("noise") == 3
    assert "…" not in text
    first = [word for line in text.splitlines() for word in line.split()[:1]]
    assert "two_object" in first
    assert "a_very_long_name_of_a_task" in "".join(first)


def test_a_grid_tells_how_an_image_is_drawn_again_and_what_is_replaced(
    monkeypatch, tmp_path, caplog
):
    """The noise of an image depends on the seed and on its number among all images."""
    told = []
    pixels = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)

    def evaluate(*_, on_images, **__):
        on_images(slice(0, 3), pixels)
        return SimpleNamespace(images=pixels)

    def grid(*_, captions, **__):
        told.extend(captions)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(images, "evaluate_model", evaluate)
    monkeypatch.setattr(images, "image_grid", grid)
    drawing = Drawing(images_per_prompt=3, seed=7)
    images.write_images(None, [Prompt("a cat")], tmp_path, drawing)
    assert told == [f"image 000{i} of seed 7: a cat" for i in range(3)]
    assert not caplog.text
    images.write_images(None, [Prompt("a dog")], tmp_path, drawing)
    assert caplog.text.rstrip().endswith("replaced grid.png")
    images.write_images(None, [Prompt("a dog")], tmp_path, drawing)
    assert "replaced 0000-a-dog.png, 0001-a-dog.png, 0002-a-dog.png, grid.png" in caplog.text


def test_own_training_prompts_with_a_built_in_evaluation_are_noted(tmp_path):
    def lines(recipe="awm-shapes-sd3", **prompts):
        flags = [f"--prompts.{key}={value}" for key, value in prompts.items()]
        loaded = config.load(recipe, [*flags, f"--output_dir={tmp_path}"])
        return "".join(results_of(loaded, {}))

    file = tmp_path / "mine.txt"
    file.write_text("a cat\n")
    assert "evaluated on prompts.evaluation=shapes:held_out" in lines(train=file)
    assert "note:" not in lines(train=file, evaluation=file)
    assert "note:" not in lines()
    assert "note:" not in lines("inversion-dpo-shapes")
