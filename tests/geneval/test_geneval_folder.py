"""GenEval's folders: made, resumed, read from others, scored, summed up."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from processes import fork

from diffalign import cli, lora
from diffalign.data.prompts import load_prompts
from diffalign.evaluation import geneval
from diffalign.evaluation.geneval import GenEvalError
from diffalign.geneval import prompts as geneval_prompts
from diffalign.geneval.rules import TASKS
from diffalign.pipelines.registry import load_model
from diffalign.rewards.geneval import GenEvalReward
from diffalign.shapes.prompts import prompts as shapes_prompts
from diffalign.shapes.verifier import detect
from diffalign.shapes.world import render, sample_scene

PUBLISHED = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"


def test_the_prompts_are_the_published_file_byte_for_byte():
    assert hashlib.sha256(geneval_prompts.jsonl().encode()).hexdigest() == PUBLISHED
    found = load_prompts("geneval")
    assert len(found) == 553
    assert list(dict.fromkeys(p.task for p in found)) == list(TASKS)


def test_training_prompts_are_others_of_the_same_kind():
    found, published = load_prompts("geneval:train"), load_prompts("geneval")
    assert not {p.text for p in found} & {p.text for p in published}
    assert {p.task for p in found} == set(TASKS) - {"single_object"}
    assert len({p.text for p in found}) == len(found) > 6000
    GenEvalReward().check_metadata([p.metadata for p in found])


def scenes(folder, *, images=2, wrong=()):
    """A GenEval folder of right Shapes images; of the prompts in `wrong` the first image is empty."""
    rng = np.random.default_rng(0)
    entries = shapes_prompts("held_out")[::7]
    for i, entry in enumerate(entries):
        samples = folder / f"{i:05d}" / "samples"
        samples.mkdir(parents=True)
        samples.parent.joinpath("metadata.jsonl").write_text(json.dumps(entry) + "\n")
        for k in range(images):
            pixels = render(sample_scene(entry, rng))
            if i in wrong and k == 0:
                pixels = np.full_like(pixels, 255)
            Image.fromarray(pixels).save(samples / f"{k:04d}.png")
        Image.fromarray(pixels).save(samples.parent / "grid.png")  # as GenEval's script leaves it
    return entries


def verify(images, metadata):
    return [detect(x) for x in images.permute(0, 2, 3, 1).numpy()]


def test_a_folder_is_scored_with_the_official_fields_and_summary(tmp_path):
    entries = scenes(tmp_path, wrong=(0, 3))
    images, _ = geneval.read_samples(tmp_path)
    assert len(images) == 2 * len(entries)
    rows = geneval.score_samples(images, verify, batch_size=5)
    assert [r["correct"] for r in rows].count(False) == 2
    row = rows[0]
    assert not row["correct"]
    assert row["reason"].startswith("expected ")
    assert row["filename"].endswith("00000/samples/0000.png")
    assert json.loads(row["metadata"]) == entries[0]
    good = rows[1]
    [[name, [box]]] = json.loads(good["details"]).items()
    assert name == entries[0]["include"][0]["class"]
    assert len(box) == 5
    found = geneval.summary(rows)
    n = len(entries)
    assert found["correct_images"] == pytest.approx(1 - 2 / (2 * n))
    assert found["correct_prompts"] == 1
    by_task = {t: [r["correct"] for r in rows if r["tag"] == t] for t in TASKS}
    expected = {t: sum(v) / len(v) for t, v in by_task.items() if v}
    assert found["tasks"] == pytest.approx(
        {**expected, "overall": np.mean(list(expected.values()))}
    )


def test_what_cannot_be_read_or_is_missing_is_counted_and_wrong(tmp_path):
    entries = scenes(tmp_path)
    (tmp_path / "00000/samples/0000.png").write_bytes(b"")
    (tmp_path / "00001/samples/0001.png").unlink()
    (tmp_path / "00002/samples/notes.txt").write_text("not an image")
    empty = tmp_path / "00900/samples"
    empty.mkdir(parents=True)
    empty.parent.joinpath("metadata.jsonl").write_text(json.dumps(entries[0]))
    images, without = geneval.read_samples(tmp_path)
    rows = geneval.score_samples(images, verify, batch_size=4)
    found = geneval.summary(rows, empty=without)
    total = 2 * len(entries) - 1
    assert (found["images"], found["scored"], found["unreadable"], found["missing"]) == (
        total,
        total - 1,
        1,
        3,
    )
    assert found["correct_images"] == pytest.approx((total - 1) / total)
    assert rows[0]["reason"] == "unreadable"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "one JSON object"),
        ("{", "not valid JSON"),
        ("[1]", "one JSON"),
    ],
)
def test_a_folder_with_bad_metadata_is_refused(tmp_path, content, message):
    scenes(tmp_path)
    file = tmp_path / "00001/metadata.jsonl"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(GenEvalError, match=message):
        geneval.read_samples(tmp_path)


def test_folders_that_are_not_genevals_are_refused(tmp_path):
    with pytest.raises(GenEvalError, match="no folder"):
        geneval.read_samples(tmp_path / "none")
    with pytest.raises(GenEvalError, match="layout"):
        geneval.read_samples(tmp_path)


@pytest.fixture
def flags(tmp_path):
    small = [
        "--max_prompts=4",
        "--num_inference_steps=2",
        "--images_per_prompt=2",
        "--dtype=float32",
    ]
    return [
        "evaluate",
        "geneval",
        "--json",
        "--model=shapes-sd3",
        f"--output_dir={tmp_path / 'g'}",
        *small,
    ]


def pixels(folder):
    found = [np.asarray(Image.open(p)) for p in sorted(folder.rglob("0*.png"))]
    return np.stack(found).astype(int)


def test_a_model_is_evaluated_and_resumed_from_the_command_line(tmp_path, flags, capsys):
    folder = tmp_path / "g"
    assert cli.main(flags) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["detector"]["name"] == "verifier"
    assert (result["images"], result["prompts_scored"], result["missing"]) == (8, 4, 0)
    assert json.loads((folder / "summary.json").read_text())["tasks"] == result["tasks"]
    assert len((folder / "results.jsonl").read_text().splitlines()) == 8

    assert result["intervals"]["overall"]["n"] == 8
    assert result["intervals"]["overall"]["prompts"] == 4

    made = pixels(folder)
    (folder / "00001/samples/0001.png").unlink()
    # a copy that was cut off is drawn again as well
    for name, length in (("00003/samples/0000", 0), ("00000/samples/0000", 300)):
        sample = folder / f"{name}.png"
        sample.write_bytes(sample.read_bytes()[:length])
    assert cli.main([*flags, "--batch_size=3"]) == 0
    assert np.abs(pixels(folder) - made).max() <= 2  # the same images, in other batches

    assert cli.main([*flags, "--seed=7"]) == 2
    assert "made in another way (seed: 1000 there)" in capsys.readouterr().err
    assert cli.main(["evaluate", "geneval", "--json", f"--images={folder}"]) == 0
    again = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert again["tasks"] == result["tasks"]


@pytest.mark.parametrize("damage", ["empty", "cut", "last byte", "turned bit", "text", "absent"])
def test_a_sample_that_cannot_be_read_is_not_whole(tmp_path, damage):
    file = tmp_path / "0000.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    assert geneval.is_whole(file)
    content = file.read_bytes()
    middle = len(content) // 2
    damaged = {
        "empty": b"",
        "cut": content[:middle],
        "last byte": content[:-1],
        "turned bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "text": b"not an image",
        "absent": None,
    }[damage]
    file.unlink() if damaged is None else file.write_bytes(damaged)
    assert not geneval.is_whole(file)


def test_real_models_are_asked_for_the_published_prompts(tmp_path, capsys):
    """Nothing can be loaded here: what it looks for first is the detector of photographs."""
    flags = ["--model=sd3.5-medium", f"--output_dir={tmp_path / 'g'}"]
    assert cli.main(["evaluate", "geneval", *flags]) == 2
    assert "mask2former" in capsys.readouterr().err


def test_another_lora_of_the_same_name_is_another_model(tmp_path, flags, capsys):
    """What was made with the file as it was must not be scored as made with the file as it is."""
    pipeline = load_model("shapes-sd3").pipeline
    for scale in (0.1, 0.2):
        parameters = lora.attach(
            pipeline.transformer, rank=2, alpha=2.0, targets=["attn.to_q"], seed=0
        )
        with torch.no_grad():
            for p in parameters:
                p.fill_(scale)
        lora.export_lora(pipeline.transformer, pipeline, tmp_path / "lora")
        pipeline = load_model("shapes-sd3").pipeline
        expected = 0 if scale == 0.1 else 2
        assert cli.main([*flags, f"--lora={tmp_path / 'lora'}"]) == expected
    assert "lora_fingerprint" in capsys.readouterr().err
    assert cli.main([*flags, "--images_per_prompt=3"]) == 2
    assert "images_per_prompt: 2 there" in capsys.readouterr().err


def test_images_of_another_tool_are_not_mixed_with_ours(tmp_path, flags, capsys):
    scenes(tmp_path / "g")
    assert cli.main(flags) == 2
    assert "another tool" in capsys.readouterr().err


def test_a_detector_that_does_not_know_the_classes_is_refused(tmp_path, flags, capsys):
    assert cli.main([*flags, "--prompts=geneval", "--detector=verifier"]) == 2
    assert "verifier" in capsys.readouterr().err
    assert not (tmp_path / "g").exists()


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path, flags):
    """The same folder, rows and summary as one process; then features of it, each half by one process."""

    def run(*arguments):
        done = fork(2, "command_line", *arguments, "--json", output=tmp_path)
        assert done.returncodes == [0, 0], done.stderr[-9000:]
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("{"))
        return json.loads(line)

    both = run(*flags)
    assert (both["images"], both["prompts_scored"], both["missing"]) == (8, 4, 0)
    alone = tmp_path / "alone"
    assert cli.main([*flags, f"--output_dir={alone}"]) == 0
    assert np.abs(pixels(alone) - pixels(tmp_path / "g")).max() <= 2
    assert json.loads((alone / "summary.json").read_text())["tasks"] == both["tasks"]
    rows = (tmp_path / "g/results.jsonl").read_text().splitlines()
    assert len(rows) == len(set(rows)) == 8
    reference = ["--reference=shapes:held_out", "--network=shapes_clip"]
    shared = run("evaluate", "fid", f"--images={tmp_path / 'g'}", *reference)
    assert shared["generated"]["n"] == shared["generated"]["images"] == 8
    (tmp_path / "one.json").unlink(missing_ok=True)
    single = [
        "evaluate",
        "fid",
        f"--images={tmp_path / 'g'}",
        *reference,
        f"--output={tmp_path / 'one.json'}",
    ]
    assert cli.main(single) == 0
    assert json.loads((tmp_path / "one.json").read_text())["fid"] == pytest.approx(
        shared["fid"], rel=1e-6
    )
