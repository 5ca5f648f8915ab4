"""The page that compares folders."""

import json

import numpy as np
from PIL import Image

from diffalign import cli
from diffalign.data.prompts import load_prompts
from diffalign.evaluation.comparison import Compared, table
from diffalign.shapes.world import render, sample_scene


def geneval_folder(path, n, *, wrong=()):
    for i, prompt in enumerate(load_prompts("shapes:held_out", limit=n)):
        samples = path / f"{i:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(prompt.metadata))
        pixels = render(sample_scene(prompt.metadata, np.random.default_rng(i)))
        Image.fromarray(pixels * 0 + 255 if i in wrong else pixels).save(samples / "0000.png")


def test_folders_are_compared_on_one_page(tmp_path, capsys):
    geneval_folder(tmp_path / "good", 12)
    geneval_folder(tmp_path / "bad", 12, wrong=range(0, 12, 2))
    for name in ("good", "bad"):
        assert cli.main(["evaluate", "geneval", f"--images={tmp_path / name}"]) == 0
    (tmp_path / "bad/00011/samples/0000.png").write_bytes(b"broken since")
    capsys.readouterr()
    page = tmp_path / "page.html"
    folders = [f"the <base>={tmp_path / 'bad'}", str(tmp_path / "good")]
    flags = ["evaluate", "report", "--json", "--folders", *folders, f"--output={page}"]
    flags += ["--rewards=jpeg"]
    assert cli.main(flags) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["overall"]["good"] == 1
    assert found["overall"]["the <base>"] < 0.8
    assert set(found["jpeg"]) == {"the <base>", "good"}
    assert found["counts"]["the <base>"] == {"jpeg": {"scored": 11, "not_scored": 1}}
    assert found["counts"]["good"] == {"jpeg": {"scored": 12, "not_scored": 0}}
    text = page.read_text()
    assert "11 scored, 1 not" in text
    assert text.count("data:image/png;base64,") == 23  # one of 24 cannot be read
    assert "the &lt;base&gt;" in text
    assert "http" not in text  # self-contained

    assert cli.main(["evaluate", "report", f"--output={page}"]) == 2
    assert cli.main(["evaluate", "report", "--folders", *folders[:1] * 2, f"--output={page}"]) == 2
    assert "two are called the same" in capsys.readouterr().err
    (tmp_path / "good/results.jsonl").write_text("{}\n")
    assert cli.main(flags) == 2
    assert "score the folder again" in capsys.readouterr().err


def test_folders_without_a_common_image_are_refused(tmp_path, capsys):
    geneval_folder(tmp_path / "a", 2)
    (tmp_path / "b").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "b" / "x.png")
    flags = [
        "--folders",
        str(tmp_path / "a"),
        str(tmp_path / "b"),
        f"--output={tmp_path / 'p.html'}",
    ]
    assert cli.main(["evaluate", "report", *flags]) == 2
    assert "no image of the same name" in capsys.readouterr().err


def test_bars_are_shares_or_relative_to_the_best(tmp_path):
    a = Compared("a", tmp_path, {}, {"tasks": {"counting": 0.25}}, {"jpeg": -2.0, "pickscore": 4.0})
    b = Compared("b", tmp_path, {}, None, {"pickscore": 3.0, "jpeg": -4.0})
    rows = {row["name"]: row for row in table([a, b])}
    assert rows["counting"]["values"] == [0.25, None]
    assert rows["counting"]["width"] == [25.0, 0]
    assert rows["pickscore"]["width"] == [100.0, 75.0]
    assert rows["jpeg"]["best"] == -2.0
    assert rows["jpeg"]["width"] == [0, 0]
