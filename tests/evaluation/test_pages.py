"""Pictures, charts and pages: what people look at."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from whole_runs import train

from benchmarks.common import before_after
from diffalign import cli
from diffalign.data.images import CaptionedImage
from diffalign.data.prompts import Prompt
from diffalign.evaluation import charts, pictures
from diffalign.evaluation.comparison import CORRECT, Compared, table


def pixels(image):
    return np.asarray(image.convert("RGB"))


def test_tiny_images_are_enlarged_by_a_whole_factor_and_have_captions():
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    plain = pixels(pictures.image_grid(images, columns=2))
    told = pixels(pictures.image_grid(images, columns=2, captions=["a red circle"] * 3))
    assert plain.shape == (2 * (192 + 2) + 2, 2 * (192 + 2) + 2, 3)
    assert told.shape[0] > plain.shape[0] + 20
    tile = plain[2:194, 2:194]
    assert np.array_equal(tile[::3, ::3], images[0].permute(1, 2, 0).numpy())
    assert np.array_equal(tile, tile[::3, ::3].repeat(3, 0).repeat(3, 1))
    text = told[194:212, 2:194]
    assert (text < 100).any()
    assert (told[194:212, 0:2] == 255).all()


def test_large_images_stay_and_very_many_shrink(monkeypatch):
    images = torch.zeros(4, 3, 200, 300, dtype=torch.uint8)
    assert pictures.image_grid(images, columns=4, gap=0).size == (1200, 200)
    monkeypatch.setattr(pictures, "LARGEST", 4 * 100 * 150)
    assert pictures.image_grid(images, columns=4, gap=0).size == (600, 100)


@pytest.mark.parametrize("text", ["", "word " * 80, "x" * 500, "zwei\nlines", "日本 😀"])
def test_any_caption_fits_its_image(text):
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    picture = pictures.image_grid(images, columns=1, captions=[text])
    assert picture.size[0] == 196
    assert picture.size[1] < 196 + 5 * 20


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0, 145, [0, 50, 100, 150]), (-3, 4, [-4, -2, 0, 2, 4])],
)
def test_ticks_are_round_and_cover_the_values(low, high, marks):
    assert charts.ticks(low, high) == pytest.approx(marks)


@pytest.mark.parametrize("values", [[0.5] * 30, [0.0, 0.0], [1e9, 2e9], [1e-7, 3e-7], [-1.0, 1.0]])
def test_any_values_make_a_chart_within_its_axes(values):
    chart = charts.chart("x", list(range(1, len(values) + 1)), [*values[:-1], values[-1]])
    numbers = [tuple(map(float, p.split(","))) for p in chart.raw.split()]
    assert all(chart.left <= x <= chart.right + 0.1 for x, _ in numbers)
    assert all(chart.top - 0.1 <= y <= chart.bottom + 0.1 for _, y in numbers)
    labels = [t.label for t in chart.y_ticks]
    assert len(set(labels)) == len(labels) >= 2


def test_a_smoothed_line_keeps_the_mean_of_noise_and_skips_what_is_missing():
    values = [0.5, None, float("nan"), *np.random.default_rng(0).normal(0, 1, 200)]
    chart = charts.chart("x", list(range(1, len(values) + 1)), values)
    assert chart.smooth.count(",") == chart.raw.count(",") == 201
    assert charts.smoothed(np.ones(50)) == pytest.approx(np.ones(50))
    assert charts.chart("x", [1, 2], [0.5, None]) is None


@pytest.fixture
def page(base, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"<b>{i}</b> & a cat", "tag": "pets"} for i in range(4)]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "run"
    assert train(base, prompts, folder, "--training.num_updates=2") == 0
    table = capsys.readouterr().out
    assert "95 % interval" in table
    assert "too few prompts (3)" in table
    assert "reward (" in table
    return folder, (folder / "report.html").read_text()


def test_a_report_has_axes_intervals_links_and_commands(page):
    folder, text = page
    assert "too few prompts (3)" in text
    assert "within noise<" not in text
    assert "with its evaluations" in text
    assert "95 %" in text
    assert "<details><summary>Configuration" in text
    links = re.findall(r'href="([^"]+)"', text)
    assert "lora/pytorch_lora_weights.safetensors" in links
    assert all((folder / link).exists() for link in links)
    assert f"--lora {folder}/lora" in text
    assert "&lt;b&gt;0&lt;/b&gt; &amp; a cat" in text
    assert "<b>" not in text
    assert "://" not in text.replace("http://www.w3.org", "")
    assert text.count('class="raw') == text.count('aria-label="') > 0
    assert text.count(">update</text>") == text.count("<svg")
    summary = json.loads((folder / "summary.json").read_text())
    change = summary["differences"]["means"]["reward"]
    assert change["n"] == 3
    assert change["within_noise"]
    assert summary["win_rate"]["within_noise"]
    assert summary["after"]["intervals"]["means"]["reward"]["n"] == 3
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_a_run_is_evaluated_as_it_evaluated_itself(page, capsys):
    """The figure of the run's end, to the bit: the same policy, prompts, seeds, steps and rewards."""
    folder, _ = page
    after = json.loads((folder / "summary.json").read_text())["after"]
    capsys.readouterr()
    assert cli.main(["evaluate", "--run", str(folder), f"--output={folder / 'again.json'}"]) == 0
    assert "as the run measured it" in capsys.readouterr().out
    again = json.loads((folder / "again.json").read_text())
    assert again["means"] == after["means"]
    assert again["images"] == after["images"]
    assert cli.main(["evaluate", "--run", str(folder), "--num_inference_steps=3"]) == 2
    assert "leave out --num_inference_steps" in capsys.readouterr().err
    (folder / "lora" / "pytorch_lora_weights.safetensors").unlink()
    assert cli.main(["evaluate", "--run", str(folder)]) == 2
    assert "the run has not ended" in capsys.readouterr().err
    assert cli.main(["evaluate", "--run", str(folder / "samples")]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_generate_writes_images_of_their_own_size_and_a_grid_with_captions(base, tmp_path):
    flags = [f"--model={base}", "--dtype=float32", "--num_inference_steps=1"]
    more = ["--images_per_prompt=2", "--height=16", "--width=16", f"--output_dir={tmp_path}"]
    assert cli.main(["generate", "a cat", "", *flags, *more]) in (0, 2)
    if (tmp_path / "grid.png").exists():
        assert Image.open(tmp_path / "0000-a-cat.png").size == (16, 16)
        assert Image.open(tmp_path / "grid.png").size[0] == 2 * 162 + 2


def compared(tmp_path, name, correct):
    prompts = [Prompt(f"{i}", {"tag": "ab"[i % 2]}) for i in range(len(correct))]
    images = {f"{i}": CaptionedImage(tmp_path, p) for i, p in enumerate(prompts)}
    scores = {f"{i}": float(c) for i, c in enumerate(correct)}
    tasks = {t: float(np.mean(correct[k::2])) for k, t in enumerate("ab")}
    summary = {"tasks": tasks | {"overall": float(np.mean(list(tasks.values())))}}
    return Compared(name, tmp_path, images, summary, scores={CORRECT: scores})


def test_only_the_best_beyond_noise_is_bold(tmp_path):
    good, same = compared(tmp_path, "good", [1, 1] * 20), compared(tmp_path, "same", [1, 1] * 20)
    bad, near = (
        compared(tmp_path, "bad", [1, 0] * 20),
        compared(tmp_path, "near", [1, 1] * 19 + [0, 1]),
    )
    bold = {row["name"]: row["bold"] for row in table([bad, good])}
    assert bold == {"a": [False, False], "b": [False, True], "overall": [False, True]}
    assert not any(table([good, same])[i]["bold"][k] for i in range(3) for k in range(2))
    assert not any(table([good, near])[i]["bold"][k] for i in range(3) for k in range(2))
    assert table([bad, good, same])[2]["bold"] == [False, False, False]


def test_folders_of_one_name_are_shown_in_rows_with_their_prompts(tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("base", "moved"):
        (tmp_path / folder).mkdir()
        for i in range(5):
            pixels_ = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels_).save(tmp_path / folder / f"{i}.png")
            (tmp_path / folder / f"{i}.txt").write_text(f"prompt {i}")
    sides = [f"{name}={tmp_path / name}" for name in ("base", "moved")]
    before_after.main([*sides, "--columns=3", f"--output={tmp_path / 'rows.png'}"])
    picture = Image.open(tmp_path / "rows.png")
    assert before_after.GREEN not in {color for _, color in picture.getcolors(2**20)}
    results = [
        {"filename": str(tmp_path / "base" / f"{i}.png"), "correct": i == 0} for i in range(5)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in results)
    (tmp_path / "base" / "results.jsonl").write_text(lines)
    before_after.main([*sides, "--columns=3", f"--output={tmp_path / 'rows.png'}"])
    picture = Image.open(tmp_path / "rows.png")
    areas = {color: count for count, color in picture.getcolors(2**20)}
    assert 2 * areas[before_after.GREEN] == areas[before_after.RED] > 0
    assert picture.size[0] > 3 * 192
    assert picture.size[1] > 2 * 192 + 15
    with pytest.raises(ValueError, match="other lengths"):
        pictures.labelled_rows({"a": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, ["x"])


def test_a_lora_of_a_run_that_is_drawn_otherwise_is_noted(page, base, tmp_path, capsys):
    folder, _ = page
    flags = [f"--model={base}", "--dtype=float32", f"--lora={folder / 'lora'}", "--rewards=jpeg"]
    more = [f"--prompts={tmp_path / 'prompts.jsonl'}", "--num_inference_steps=1"]
    assert cli.main(["evaluate", *flags, *more]) == 0
    told = capsys.readouterr().out
    assert "num_inference_steps: 2, 1 here" in told
    assert "images_per_task: 3, none here" in told
    assert f"`diffalign evaluate --run {folder}` draws as the run did" in told
