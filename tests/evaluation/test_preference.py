"""Win rates: known pairs, the interval's coverage, folders that do not match."""

import json

import numpy as np
import pytest
from PIL import Image

from diffalign import cli
from diffalign.data.images import read_folder
from diffalign.evaluation.preference import win_rate


def test_known_pairs():
    a, b = np.array([1.0, 2.0, 3.0, 4.0, np.nan]), np.array([0.0, 2.0, 5.0, 1.0, 0.0])
    found = win_rate(a, b, list("abcde"))
    assert (found.rate, found.pairs, found.ties) == (2.5 / 4, 4, 1)
    assert found.difference == pytest.approx((1 + 0 - 2 + 3) / 4)
    assert found.low <= found.rate <= found.high
    turned = win_rate(b, a, list("abcde"))
    assert turned.rate == pytest.approx(1 - found.rate)
    assert turned.low == pytest.approx(1 - found.high, abs=0.02)
    assert win_rate(np.array([np.nan]), np.array([1.0]), ["a"]) is None


@pytest.mark.slow
def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for i in range(100):
        a = rng.random(60) < 0.7  # A wins seven times in ten
        found = win_rate(a.astype(float), 0.5 * np.ones(60), [str(k) for k in range(60)], seed=i)
        held += found.low <= 0.7 <= found.high
    assert 0.90 <= held / 100 <= 0.99


def test_images_of_one_prompt_are_one_piece_of_evidence():
    """The same ten outcomes, once each and a hundred times each: as sure as before, and no surer."""
    a = np.array([1.0] * 7 + [0.0] * 3)
    b = np.full(10, 0.5)
    once = win_rate(a, b, [str(i) for i in range(10)])
    often = win_rate(a.repeat(100), b.repeat(100), [str(i // 100) for i in range(1000)])
    assert often.rate == once.rate
    assert often.high - often.low == pytest.approx(once.high - once.low, rel=0.05)


def folder(path, shades, prompt="x"):
    path.mkdir()
    for i, shade in enumerate(shades):
        pixels = np.random.default_rng(i).integers(0, max(shade, 1), (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(f"{prompt} {i}")


def test_wins_from_the_command_line(tmp_path, capsys):
    """jpeg likes what is flat: A is flatter in three of four pairs."""
    folder(tmp_path / "a", [10, 10, 10, 200])
    folder(tmp_path / "b", [200, 200, 200, 10, 10])
    flags = ["evaluate", "wins", "--json", f"--images={tmp_path / 'a'}", "--rewards=jpeg"]
    assert cli.main([*flags, f"--against={tmp_path / 'b'}"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["win_rate"]["jpeg"]["rate"] == 0.75
    assert (found["pairs"], found["without_partner"]) == (4, 1)

    (tmp_path / "b" / "1.png").write_bytes(b"broken")
    assert cli.main([*flags, f"--against={tmp_path / 'b'}"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["win_rate"]["jpeg"]["pairs"] == 3
    assert found["unreadable"] == 1
    assert found["counts"] == {
        str(tmp_path / "a"): {"jpeg": {"scored": 4, "not_scored": 0}},
        str(tmp_path / "b"): {"jpeg": {"scored": 3, "not_scored": 1}},
    }

    folder(tmp_path / "c", [10, 10], prompt="another")
    assert cli.main([*flags, f"--against={tmp_path / 'c'}"]) == 2
    assert "'x 0' in one folder and 'another 0' in another" in capsys.readouterr().err
    assert cli.main(flags) == 2
    (tmp_path / "d").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "d" / "z.png")
    assert cli.main([*flags, f"--against={tmp_path / 'd'}"]) == 2
    assert "no image of the same name" in capsys.readouterr().err


def test_genevals_folders_have_captions(tmp_path):
    place = tmp_path / "00000" / "samples"
    place.mkdir(parents=True)
    (tmp_path / "00000" / "metadata.jsonl").write_text(
        '{"prompt": "a photo of a cow", "tag": "x"}\n'
    )
    Image.new("RGB", (4, 4)).save(place / "0000.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "00000" / "grid.png")  # a collage, no sample
    [image] = read_folder(tmp_path)
    assert image.prompt.text == "a photo of a cow"
    assert image.prompt.task == "x"
