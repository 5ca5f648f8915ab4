"""Whole runs on a tiny pipeline from disk: what a user types, what lies in the folder, what a mistake says."""

import errno
import json
import os
import shutil
from functools import partial

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from whole_runs import train

from diffalign import cli
from diffalign.core.errors import UsageError
from diffalign.evaluation.pictures import image_grid
from diffalign.lora.source import locate
from diffalign.methods.online.health import Collapse
from diffalign.pipelines import places as pipeline_places
from diffalign.rewards import registry
from diffalign.scripts.launching import arguments
from diffalign.training import checkpoint


def test_a_run_leaves_a_folder_that_explains_itself(base, prompts, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train(base, prompts, folder, "--training.num_updates=2", "--training.eval_every=1") == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["updates"] == 2
    assert {"before", "after", "seconds", "device", "versions", "config"} <= set(summary)
    assert "geneval_before" not in summary  # jpeg does not know what is correct
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["update"] for r in rows] == [1, 2]
    assert rows[0]["evaluation"]["images"] == 3
    assert {p.name for p in (folder / "samples").iterdir()} == {"000001.png", "000002.png"}
    page = (folder / "report.html").read_text()
    assert "a cat" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert page.count("data:image/png;base64,") == 6
    assert "before" in capsys.readouterr().out

    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(folder / "lora")
    (adapter,) = pipeline.transformer.peft_config.values()
    assert (adapter.r, adapter.lora_alpha) == (4, 4.0)


def test_a_held_out_reward_is_looked_at_and_not_trained_on(
    base, prompts, tmp_path, capsys, monkeypatch
):
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    monkeypatch.setitem(registry.BUILT_IN, "brightness", "tiny:Brightness")
    few = "--training.num_updates=2"
    assert train(base, prompts, plain, few) == 0
    assert train(base, prompts, watched, few, "--evaluation.rewards=brightness") == 0
    summary = json.loads((watched / "summary.json").read_text())
    assert 0 < summary["before"]["means"]["brightness"] < 1
    assert summary["held_out_rewards"]["brightness"]["description"]
    assert summary["after"]["means"]["reward"] == pytest.approx(
        summary["after"]["means"]["jpeg"]
    )  # not in the sum
    weights = [load_file(f / "lora" / "pytorch_lora_weights.safetensors") for f in (plain, watched)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert "brightness" in (watched / "report.html").read_text()
    assert train(base, prompts, tmp_path / "same", "--evaluation.rewards=jpeg") == 2
    assert "evaluation.rewards.jpeg" in capsys.readouterr().err
    assert train(base, prompts, tmp_path / "wrong", "--evaluation.rewards=jpg") == 2
    assert "evaluation.rewards: unknown reward 'jpg'; did you mean" in capsys.readouterr().err


def test_the_memory_forecast_comes_first(base, prompts, tmp_path, capsys):
    assert train(base, prompts, tmp_path / "run", "--training.num_updates=1") == 0
    assert capsys.readouterr().out.startswith("memory forecast, GiB for a process: 0.")


def test_a_longer_run_continues_and_equals_one_in_one_go(base, prompts, tmp_path):
    for folder, stops in (("whole", [3]), ("parts", [1, 3])):
        for updates in stops:
            assert train(base, prompts, tmp_path / folder, f"--training.num_updates={updates}") == 0
    logs = [
        [json.loads(line) for line in (tmp_path / f / "log.jsonl").read_text().splitlines()]
        for f in ("whole", "parts")
    ]
    assert [r["reward"] for r in logs[0]] == [r["reward"] for r in logs[1]]
    whole, parts = (
        tmp_path / f / "lora" / "pytorch_lora_weights.safetensors" for f in ("whole", "parts")
    )
    with safe_open(whole, "pt") as a, safe_open(parts, "pt") as b:
        assert a.metadata() == b.metadata()  # safetensors writes its keys in any order
        names = list(a.keys())
        assert names == list(b.keys())
        assert all(torch.equal(a.get_tensor(n), b.get_tensor(n)) for n in names)


def test_a_folder_of_another_configuration_is_refused(base, prompts, tmp_path, capsys):
    assert train(base, prompts, tmp_path / "run", "--training.num_updates=1") == 0
    assert train(base, prompts, tmp_path / "run", "--learning_rate=0.5") == 2
    assert "optimizer.learning_rate: 0.001, 0.5" in capsys.readouterr().err


@pytest.mark.parametrize("which", ["train", "evaluation"])
def test_prompts_that_were_edited_in_between_are_noticed(which, base, prompts, tmp_path, capsys):
    folder, other = tmp_path / "run", tmp_path / "other.txt"
    other.write_text(prompts.read_text())
    more = ["--training.num_updates=1", f"--prompts.{which}={other}"]
    assert train(base, prompts, folder, *more) == 0
    other.write_text("a cat\na dog\na fish\n")
    assert train(base, prompts, folder, *more) == 2
    assert f"what prompts.{which} names has changed since it began" in capsys.readouterr().err
    other.write_text(prompts.read_text())
    assert train(base, prompts, folder, *more) == 0
    (folder / "prompts.json").unlink()  # a folder of an older version
    other.write_text("a cat\na dog\na fish\n")
    assert train(base, prompts, folder, *more) == 0


def test_a_base_with_other_weights_is_noticed(base, prompts, tmp_path, capsys):
    folder, other = tmp_path / "run", tmp_path / "base"
    shutil.copytree(base, other)
    assert train(other, prompts, folder, "--training.num_updates=1") == 0
    digests = json.loads((folder / "prompts.json").read_text())
    file = next((other / "transformer").glob("*.safetensors"))
    weights = load_file(file)
    name = min(weights)
    weights[name][(0,) * weights[name].ndim] += 1.0
    save_file(weights, file, metadata={"format": "pt"})
    capsys.readouterr()
    assert train(other, prompts, folder, "--training.num_updates=2") == 2
    error = capsys.readouterr().err
    assert "what model.name names has changed since it began; put the old file or model" in error
    assert json.loads((folder / "prompts.json").read_text()) == digests
    # a folder of an older version has no digest of the base
    digests.pop("model.name")
    (folder / "prompts.json").write_text(json.dumps(digests))
    assert train(other, prompts, folder, "--training.num_updates=2") == 0


class FullDisk:
    """A picture whose file cannot grow."""

    def __init__(self, number):
        self.number = number

    def save(self, file):
        file.write_bytes(b"half a pict")
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_the_run_goes_on(
    number, base, prompts, tmp_path, capsys, monkeypatch
):
    """Full while the samples of update 2 are written, before its checkpoint."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    more = ["--training.num_updates=3"]
    assert train(base, prompts, whole, *more) == 0
    grids = []

    def grid(images, **options):
        grids.append(1)
        return FullDisk(number) if len(grids) == 2 else image_grid(images, **options)

    monkeypatch.setattr("diffalign.training.run.image_grid", grid)
    assert train(base, prompts, folder, *more) == 2
    good = folder / "checkpoints" / "000001"
    error = capsys.readouterr().err
    assert f"error: {os.strerror(number)}: {folder / 'samples' / '000002.png'}; the last" in error
    assert f"checkpoint in {folder} is 000001. Free space, and the same command goes on" in error
    assert "Traceback" not in error
    assert [p.name for p in (folder / "samples").iterdir()] == ["000001.png"]
    assert checkpoint.latest(folder / "checkpoints") == good
    checkpoint.load(good)
    monkeypatch.undo()
    assert train(base, prompts, folder, *more) == 0
    assert "resumed after update 1" in capsys.readouterr().out
    weights = [load_file(f / "lora" / "pytorch_lora_weights.safetensors") for f in (whole, folder)]
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


def test_a_full_disk_is_one_line_where_there_are_no_checkpoints(
    base, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        "diffalign.evaluation.images.image_grid", lambda *_, **__: FullDisk(errno.ENOSPC)
    )
    flags = [f"--model={base}", "--dtype=float32", "--num_inference_steps=1"]
    assert cli.main(["generate", "a cat", *flags, f"--output_dir={tmp_path / 'images'}"]) == 2
    error = capsys.readouterr().err
    assert f"diffalign: error: No space left on device: {tmp_path / 'images' / 'grid.png'}" in error
    assert "Free space, and the same command" in error
    assert "Traceback" not in error


def test_a_schedule_ends_where_the_run_was_to_end(base, prompts, tmp_path, capsys):
    more = ["--lr_scheduler=linear", "--training.num_updates=1"]
    assert train(base, prompts, tmp_path / "run", *more) == 0
    assert train(base, prompts, tmp_path / "run", more[0], "--training.num_updates=2") == 2
    assert "training.num_updates: 1, 2" in capsys.readouterr().err


@pytest.mark.parametrize("updates", [3, 4])
@pytest.mark.parametrize("reaction", ["warn", "stop", "rollback"])
def test_a_collapse_is_answered_as_configured(
    base, prompts, tmp_path, capsys, monkeypatch, reaction, updates
):
    """The detector is told what to see; what follows is the run's own."""
    seen = []

    def detector(rows):
        if len(rows) == 3 and not seen:
            seen.append(1)
            return Collapse(update=3, good=2, reward=0.1, best=0.5, gradient_rise=9.0)
        return None

    monkeypatch.setattr("diffalign.methods.online.trainer.find_collapse", detector)
    folder = tmp_path / "run"
    more = [f"--training.num_updates={updates}", f"--training.on_collapse={reaction}"]
    assert train(base, prompts, folder, *more) == (2 if reaction == "stop" else 0)
    printed = "".join(capsys.readouterr())
    assert "the run looks collapsed" in printed
    assert ("rolled back to update 2" in printed) == (reaction == "rollback")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    wanted = 3 if reaction == "stop" else updates
    assert [r["update"] for r in log] == list(range(1, wanted + 1))
    noted = {r["update"]: r["warnings"] for r in log if "warnings" in r}
    rows = {3: {"collapse": "update 3: the run looks collapsed"}}
    assert {n: {k: v[:33] for k, v in w.items()} for n, w in noted.items()} == (
        {} if reaction == "rollback" else rows
    )
    if reaction == "rollback":
        assert json.loads((folder / "summary.json").read_text())["rollbacks"] == 1


def test_warnings_are_said_once_and_collapses_are_looked_for_after_the_last(
    base, prompts, tmp_path, capsys, monkeypatch
):
    asked = []

    def detector(rows):
        asked.append([r["update"] for r in rows])
        return Collapse(2, 1, reward=0.1, best=0.5, gradient_rise=9.0) if len(asked) == 2 else None

    monkeypatch.setattr("diffalign.methods.online.trainer.find_collapse", detector)
    monkeypatch.setattr(
        "diffalign.methods.online.trainer.find_warnings", lambda *a: {"diversity": "alike"}
    )
    for updates in (3, 4):  # the second resumes
        assert train(base, prompts, tmp_path / "run", f"--training.num_updates={updates}") == 0
    assert capsys.readouterr().out.count("warning: alike") == 1
    assert asked == [[1], [1, 2], [3], [3, 4]]
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    noted = [set(json.loads(line).get("warnings", ())) for line in lines]
    assert noted == [{"diversity"}, {"collapse"}, set(), set()]


def test_the_checkpoint_before_a_cut_one_is_used(base, prompts, tmp_path, capsys, caplog):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert train(base, prompts, whole, "--training.num_updates=3") == 0
    assert train(base, prompts, folder, "--training.num_updates=2") == 0
    file = folder / "checkpoints" / "000002" / "default.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    assert train(base, prompts, folder, "--training.num_updates=3") == 0
    assert "000002/default.safetensors is damaged" in caplog.text
    assert "resumed after update 1" in capsys.readouterr().out
    files = [f / "lora" / "pytorch_lora_weights.safetensors" for f in (whole, folder)]
    one, two = map(load_file, files)
    assert all(torch.equal(v, two[k]) for k, v in one.items())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompts.train=shapes:train", "--prompts.task_weights={rings: 2}"], "the task 'rings'"),
        (["--rewards={verifier: 1}"], "reward 'verifier' needs include"),
        (["--rewards={verifier: 1}"], "rewards` that need no metadata"),
        (["--rewards={verifer: 1}"], "did you mean 'verifier'"),
        (["--model.name=shapes-sd2"], "no model 'shapes-sd2'"),
        (["--prompts.train=nowhere.txt"], "nowhere.txt does not exist"),
        (["--resolution=30"], "multiples of 4 pixels"),
        (["--algorithm.timesteps_per_image=5"], "do not fit"),
        (["--lora.targets=[attn.nope]"], "match no layer"),
        (["--model.attention_backend=xformers", "--mixed_precision=no"], "would ignore 'xformers'"),
        (["--report_to=tensorbord"], "did you mean 'tensorboard'"),
        (["--report_to=comet_ml"], "comet_ml is not installed"),
        (["--model.name=runs/nowhere"], "runs/nowhere is no folder or file here"),
    ],
)
def test_mistakes_are_one_line(base, prompts, tmp_path, capsys, more, message):
    assert train(base, prompts, tmp_path / "run", *more) == 2
    error = capsys.readouterr().err.strip()
    assert message in error[error.rindex("diffalign: error:") :]
    assert not (tmp_path / "run").exists()  # the corrected command may have the folder


def test_own_prompts_run_on_a_recipe_for_others(base, prompts, tmp_path, capsys):
    """Its task weights fit none of them, and an update draws more than there are: both are said."""
    more = ["--rollout.prompts_per_update=5", "--prompts.task_weights={rings: 2}"]
    assert train(base, prompts, tmp_path / "run", *more, "--training.num_updates=1") == 0
    told = "".join(capsys.readouterr())
    assert "note: prompts.task_weights: no prompt of" in told
    assert "note: rollout.prompts_per_update is 5" in told
    (row,) = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(row)["update"] == 1


def test_a_merged_pipeline_draws_what_the_lora_draws(base, prompts, tmp_path, capsys):
    assert (
        train(base, prompts, tmp_path / "run", "--training.num_updates=2", "--learning_rate=0.05")
        == 0
    )
    flags = [f"--model={base}", f"--lora={tmp_path / 'run' / 'lora'}", "--dtype=float32"]
    merged = tmp_path / "merged"
    assert cli.main(["merge", *flags, f"--output_dir={merged}"]) == 0
    assert cli.main(["merge", *flags, f"--output_dir={merged}"]) == 2
    assert "exists already" in capsys.readouterr().err
    pipelines = [DiffusionPipeline.from_pretrained(folder) for folder in (base, base, merged)]
    pipelines[1].load_lora_weights(tmp_path / "run" / "lora")
    images = [
        pipeline(
            "a cat",
            num_inference_steps=2,
            guidance_scale=1.0,
            output_type="latent",
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(0),
        ).images
        for pipeline in pipelines
    ]
    torch.testing.assert_close(images[1], images[2], rtol=1e-3, atol=1e-4)
    assert (images[0] - images[2]).abs().max() > 1e-3
    assert not hasattr(pipelines[2].transformer, "peft_config")


def test_generate_and_evaluate(base, prompts, tmp_path, capsys):
    flags = ["--model", str(base), "--num_inference_steps=2", "--dtype=float32"]
    folder = tmp_path / "images"
    assert (
        cli.main(
            [
                "generate",
                "a cat",
                str(prompts),
                *flags,
                f"--output_dir={folder}",
                "--images_per_prompt=2",
            ]
        )
        == 0
    )
    names = sorted(p.name for p in folder.iterdir())
    assert len(names) == 10
    assert names[-2:] == ["grid.png", "metadata.jsonl"]
    assert names[0] == "0000-a-cat.png"
    capsys.readouterr()
    output = tmp_path / "result.json"
    assert (
        cli.main(
            [
                *("evaluate", "--json", f"--prompts={prompts}", "--rewards=jpeg", *flags),
                f"--output={output}",
            ]
        )
        == 0
    )
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last == json.loads(output.read_text())
    assert last["images"] == 3
    assert last["rewards"]["jpeg"]["scale"] == 1 / 500


def test_a_dry_run_of_a_real_recipe_forecasts_before_the_prompts_are_written(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffalign.training.memory_fit.describe", lambda *_: ["a forecast"])
    assert cli.main(["train", "awm-sd3.5-medium-pickscore", "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert "# a forecast" in printed.out
    assert "error: prompts.train: prompt file prompts.txt does not exist" in printed.err


def test_an_empty_prompt_is_refused(capsys):
    for text in ("", " "):
        assert cli.main(["generate", text]) == 2
        assert f"prompt {text!r} is empty" in capsys.readouterr().err


def test_a_home_folder_of_nobody_is_one_line(capsys):
    place = "~nosuchuser/x"
    for flag in ("--output_dir", "--lora", "--model"):
        # the parser shows the usage of some values
        try:
            code = cli.main(["generate", "x", f"{flag}={place}"])
        except SystemExit as error:
            code = error.code
        assert code == 2
        error = capsys.readouterr().err
        assert "the home folder of an unknown user" in error.strip().splitlines()[-1]
    for look in (locate, pipeline_places.look):
        with pytest.raises(UsageError, match="unknown user"):
            look(place)


def test_generate_explains_mistakes(base, capsys):
    assert cli.main(["generate", "x", "--model", str(base), "--height=30", "--width=32"]) == 2
    assert "multiples of 4 pixels" in capsys.readouterr().err
    assert cli.main(["generate", "x", "--model", str(base), "--lora=nowhere"]) == 2
    assert "--lora: nowhere does not exist" in capsys.readouterr().err


def test_a_folder_without_a_pipeline_is_named(tmp_path, capsys):
    assert cli.main(["generate", "x", "--model", str(tmp_path)]) == 2
    assert "no model_index.json" in capsys.readouterr().err
    (tmp_path / "model_index.json").write_text('{"_class_name": "AudioLDMPipeline"}')
    assert cli.main(["generate", "x", "--model", str(tmp_path)]) == 2
    assert "AudioLDMPipeline is not supported" in capsys.readouterr().err


def test_dry_run_prints_the_configuration(capsys):
    assert cli.main(["train", "demo", "--dry-run", "--seed=9"]) == 0
    assert "seed: 9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompts.train=nowhere.txt"], "nowhere.txt does not exist"),
        (["--prompts.evaluation=nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--prompts.train=nowhere.txt"], "prompts.train: prompt file"),
        (["--output_dir="], "output_dir: must not be empty. Name a folder"),
        (["--output_dir=~nosuchuser/x"], "~nosuchuser/x names the home folder of an unknown user"),
        (["--model.name=~nosuchuser/x"], "~nosuchuser/x names the home folder of an unknown user"),
        (["--evaluation.rewards=jpg"], "evaluation.rewards: unknown reward 'jpg'; did you mean"),
        (["--rewards={verifier: 1}"], "reward 'verifier' needs include"),
        (["--training.eval_every=-1"], "training.eval_every: must not be negative"),
        (["--learning_rate=inf"], "optimizer.learning_rate: must be finite"),
        (["--algorithm.type=flow_grpo", "--algorithm.window_size=50"], "algorithm.window_size: 50"),
    ],
)
def test_a_dry_run_refuses_what_a_start_refuses(more, message, base, prompts, tmp_path, capsys):
    if "--algorithm.type=flow_grpo" in more:  # the settings of these tests are AWM's
        code = cli.main(["train", "demo", "--dry-run", *more])
    else:
        code = train(base, prompts, tmp_path / "run", "--dry-run", *more)
    printed = capsys.readouterr()
    assert code == 2
    assert message in printed.err
    assert not printed.out
    assert not (tmp_path / "run").exists()


def test_listings(capsys):
    for what, name in (("recipes", "demo"), ("rewards", "verifier"), ("models", "flux.1-dev")):
        assert cli.main(["list", what]) == 0
        assert name in capsys.readouterr().out


def test_launcher_translates_its_arguments():
    translate = partial(arguments, script="train_awm")
    assert translate(["--config", "demo", "--seed=1"]) == ["train", "demo", "--seed=1"]
    assert translate(["--seed=1", "--config=x.yaml"]) == ["train", "x.yaml", "--seed=1"]
    for argv in ([], ["--config"]):
        with pytest.raises(SystemExit, match="train_awm: --config is missing"):
            translate(argv)
    started = arguments(["--rank=8"], script="train_inversion_dpo", default="inversion-dpo")
    assert started == ["train", "inversion-dpo", "--rank=8"]


def test_bfloat16_base_under_autocast_trains(base, prompts, tmp_path):
    folder = tmp_path / "run"
    more = ["--model.dtype=bfloat16", "--mixed_precision=bf16", "--training.num_updates=1"]
    assert train(base, prompts, folder, *more) == 0
    row = json.loads((folder / "log.jsonl").read_text())
    assert row["ratio"] == 1.0
    assert torch.isfinite(torch.tensor(row["grad_norm"]))


def test_gradient_checkpointing_gives_the_same_run(base, prompts, tmp_path):
    rows = []
    for flag in ("false", "true"):
        folder = tmp_path / flag
        more = [
            f"--gradient_checkpointing={flag}",
            "--mixed_precision=no",
            "--training.num_updates=1",
        ]
        assert train(base, prompts, folder, *more) == 0, flag
        rows.append(json.loads((folder / "log.jsonl").read_text())["grad_norm"])
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)


def test_images_per_task_balances_the_tasks():
    from diffalign.config import EvaluationConfig
    from diffalign.data.prompts import load_prompts
    from diffalign.evaluation.score import repeat_prompts

    found = repeat_prompts(load_prompts("shapes:held_out"), EvaluationConfig(images_per_task=10))
    tasks = [p.task for p in found]
    assert {t: tasks.count(t) for t in tasks} == dict.fromkeys(tasks, 10)
    assert len({p.text for p in found if p.task == "color_attr"}) == 10
    assert len({p.text for p in found if p.task == "single_object"}) == 1
