"""`diffalign pairs --images`: preference pairs of images that somebody has."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image

from diffalign import cli
from diffalign.cli import pairs as verb
from diffalign.cli.parser import Parser
from diffalign.config import PairsConfig, load
from diffalign.data.pairs.records import read_pairs


@pytest.fixture
def photos(tmp_path):
    """Four images of two captions, the first of each the smaller as a JPEG; one of a caption of its own, and none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    captions = ["a cat", "a cat", "a dog", "a dog", "a fish", ""]
    rows = []
    for i, caption in enumerate(captions):
        noise = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise if i % 2 else np.zeros_like(noise)).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": caption})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pairs(photos, output, *flags):
    return cli.main(
        ["pairs", f"--images={photos}", "--rewards=jpeg", f"--output_dir={output}", *flags]
    )


@pytest.mark.parametrize("inside", [False, True])
def test_images_of_one_caption_are_compared(photos, tmp_path, capsys, caplog, inside):
    output = photos if inside else tmp_path / "out"
    assert pairs(photos, output) == 0
    found = list(read_pairs(PairsConfig(source=str(output))))
    assert [(p.prompt, p.preference) for p in found] == [("a cat", 1.0), ("a dog", 1.0)]
    assert {path.name for p in found for path in p.images} == {"0.png", "1.png", "2.png", "3.png"}
    assert all(path.is_file() for p in found for path in p.images)
    row = json.loads((output / "pairs.jsonl").read_text().splitlines()[0])
    assert row["image_0"].startswith("/") != inside
    assert "2 of 6 images have a caption of their own, or none" in caplog.text


def test_what_cannot_be_compared_is_one_line(photos, tmp_path, capsys):
    for flags, message in (
        (["--prompts=geneval"], "--prompts: with --images nothing is drawn"),
        (["--record_states=2"], "--record_states: with --images nothing is drawn"),
    ):
        assert pairs(photos, tmp_path / "out", *flags) == 2
        assert message in capsys.readouterr().err
    (photos / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n')
    assert pairs(photos, tmp_path / "out") == 2
    assert "none of which two images share" in capsys.readouterr().err
    (photos / "metadata.jsonl").unlink()
    assert pairs(photos, tmp_path / "out") == 2
    assert "has a caption, and pairs are of images of one caption" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model=shapes-sd3"], "inversion-dpo-shapes --pairs.source=p"),
        (["--model=shapes-sd"], "inversion-dpo-shapes-sd --pairs.source=p"),
        *(
            (
                [f"--model={name}", "--prompts=mine.txt"],
                f"inversion-dpo-{name} --pairs.source=p --prompts.evaluation=PROMPTS.txt",
            )
            for name in ("sd1.5", "sdxl", "sd3.5-medium", "flux.1-dev")
        ),
        (
            ["--model=org/mine", "--rewards=jpeg", "--prompts=shapes:train"],
            "inversion-dpo --pairs.source=p --model.name=org/mine '--rewards={\"jpeg\": 1}' "
            "--prompts.evaluation=shapes:held_out",
        ),
        (
            ["--images=.", "--rewards=jpeg"],
            "inversion-dpo --pairs.source=p --model.name=MODEL '--rewards={\"jpeg\": 1}' "
            "--prompts.evaluation=PROMPTS.txt",
        ),
    ],
)
def test_the_next_command_names_the_recipe_of_the_model_that_drew(flags, words, capsys):
    parser = Parser()
    verb.add_flags(parser)
    settings = verb._training(parser.parse_args([*flags, "--output_dir=p"]))
    assert shlex.join(settings) == words
    told = capsys.readouterr().out
    assert ("your file of held-out prompts" in told) == ("PROMPTS.txt" in words)
    filled = [w.replace("MODEL", "shapes-sd3") for w in settings[1:]]
    assert load(settings[0], filled).pairs.source == "p"
