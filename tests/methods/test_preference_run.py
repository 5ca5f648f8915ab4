"""From pairs to a LoRA by the command line: pairs, precompute, train, and what is left behind."""

import json

import pytest
import tiny
import tiny_pairs
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from diffalign import cli

FAMILIES = {
    "sd3": tiny.sd3_pipeline,
    "flux": tiny.flux_pipeline,
    "sd": tiny.sd_pipeline,
    "sdxl": tiny.sdxl_pipeline,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder of each family in diffusers' layout."""
    found = {}
    for name, build in FAMILIES.items():
        found[name] = tmp_path_factory.mktemp(name) / "base"
        build().save_pretrained(found[name])
    return found


@pytest.fixture
def held_out(tmp_path):
    file = tmp_path / "held_out.txt"
    file.write_text("a photo of a red square\na photo of two blue circles\n")
    return file


def train(base, source, held_out, folder, *more, verb="train"):
    return cli.main(
        [
            *(verb, "inversion-dpo", f"--pretrained_model_name_or_path={base}"),
            *(f"--train_data_dir={source}", f"--prompts.evaluation={held_out}"),
            *(f"--output_dir={folder}", "--rewards={jpeg: 1.0}", "--rank=2", "--lora_alpha=4"),
            *("--resolution=16", "--mixed_precision=no", "--model.dtype=float32"),
            *("--max_train_steps=3", "--training.pairs_per_update=4", "--train_batch_size=4"),
            *("--num_inference_steps=4", "--pairs.inversion.states=2", "--pairs.validation=0.3"),
            *("--evaluation.num_inference_steps=2", "--training.sample_every=2"),
            *("--training.eval_every=2", "--evaluation.guidance_scale=null", *more),
        ]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_become_a_lora_that_stock_pipelines_load(family, bases, held_out, tmp_path):
    source = tiny_pairs.write_pairs(tmp_path / "pairs", 12)
    folder = tmp_path / "run"
    assert train(bases[family], source, held_out, folder) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["updates"] == 3
    assert summary["pairs"] + summary["validation_pairs"] == 12
    assert 0 <= summary["win_rate"]["rate"] <= 1
    assert 0 <= summary["after"]["validation/accuracy"] <= 1
    assert summary["beta_per_element"] == pytest.approx(2000 / (4 * 8 * 8))
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert rows[1]["evaluation"]["validation/error_winner"] > 0
    assert {"margin", "accuracy", "error_winner", "error_loser"} <= set(rows[0])
    assert "pairs" in (folder / "report.html").read_text()
    pipeline = DiffusionPipeline.from_pretrained(bases[family])
    pipeline.load_lora_weights(folder / "lora")
    assert load_file(folder / "lora" / "pytorch_lora_weights.safetensors")


def test_precompute_first_and_train_from_its_cache(bases, held_out, tmp_path, capsys):
    source = tiny_pairs.write_pairs(tmp_path / "pairs", 6, row_2={"label": 0.5})
    cache = f"--pairs.cache={tmp_path / 'cache'}"
    base = bases["sd"]
    assert train(base, source, held_out, tmp_path / "a", cache, "--json", verb="precompute") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["pairs"], told["skipped"]) == (5, {"tie": 1})
    assert not (tmp_path / "a").exists()
    made = (tmp_path / "cache" / "shard-00000.safetensors").stat().st_mtime_ns
    for name, algorithm in (("b", "inversion_dpo"), ("c", "diffusion_dpo")):
        more = [f"--algorithm.type={algorithm}", cache]
        assert train(base, source, held_out, tmp_path / name, *more) == 0
    assert (tmp_path / "cache" / "shard-00000.safetensors").stat().st_mtime_ns == made


def test_an_interrupted_run_goes_on(bases, held_out, tmp_path):
    source = tiny_pairs.write_pairs(tmp_path / "pairs", 6)
    base, every = bases["sd3"], "--checkpointing_steps=1"
    assert train(base, source, held_out, tmp_path / "whole", every) == 0
    folder = tmp_path / "parts"
    assert train(base, source, held_out, folder, every, "--max_train_steps=1") == 0
    assert train(base, source, held_out, folder, every) == 0
    weights = [
        load_file(f / "lora" / "pytorch_lora_weights.safetensors")
        for f in (tmp_path / "whole", folder)
    ]
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train_data_dir=nowhere"], "pairs.source: 'nowhere' is neither a file nor a folder"),
        (["--pairs.preset=hpdv3"], "no column 'path1'"),
        (["--pairs.validation=0.9999999"], "every prompt is kept for validation"),
        (["--training.pairs_per_update=0"], "training.pairs_per_update: must be at least 1"),
        (["--resolution=17"], "multiples of 2 pixels"),
        (["--lora_layers=to_x"], "lora.targets that match no layer"),
        (["--pairs.inversion.solver=fireflow"], "fireflow is for rectified flows"),
    ],
)
def test_mistakes_are_one_line(more, message, bases, held_out, tmp_path, capsys):
    source = tiny_pairs.write_pairs(tmp_path / "pairs", 3)
    assert train(bases["sd"], source, held_out, tmp_path / "run", *more) == 2
    assert message in capsys.readouterr().err


def test_precompute_is_for_pairs(capsys):
    assert cli.main(["precompute", "demo"]) == 2
    assert "type awm have no cache to fill" in capsys.readouterr().err


class TestPairs:
    def make(self, base, prompts, folder, *more):
        return cli.main(
            [
                *("pairs", "--model", str(base), "--prompts", str(prompts), "--rewards", "jpeg"),
                *("--num_inference_steps", "2", "--images_per_prompt", "3", "--dtype", "float32"),
                *("--height", "16", "--width", "16", "--output_dir", str(folder), "--json", *more),
            ]
        )

    def test_images_are_ranked_by_a_reward(self, bases, held_out, tmp_path, capsys):
        folder = tmp_path / "pairs"
        assert self.make(bases["sd"], held_out, folder, "--pick", "all") == 0
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
        assert told["pairs"] == len(rows) > 0
        assert told["images"] == 6
        for row in rows:
            assert row["scores"][0]["jpeg"] > row["scores"][1]["jpeg"]
            assert Image.open(folder / row["image_0"]).size == (16, 16)
        assert train(bases["sd"], folder, held_out, tmp_path / "run", "--pairs.validation=0") == 0

    def test_weights_of_a_ranking(self, bases, held_out, tmp_path):
        folder = tmp_path / "pairs"
        assert self.make(bases["sd"], held_out, folder, "--pick=all", "--weights=rankdpo") == 0
        rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
        weights = [row["weight"] for row in rows]
        assert sum(weights) / len(weights) == pytest.approx(1)
        assert max(weights) > 1 > min(weights) > 0

    def test_weights_of_a_ranking_need_all_of_it(self, bases, held_out, tmp_path, capsys):
        assert self.make(bases["sd"], held_out, tmp_path / "pairs", "--weights=rankdpo") == 2
        assert "it needs --pick all" in capsys.readouterr().err

    def test_another_model_does_not_fill_the_same_folder(self, bases, held_out, tmp_path, capsys):
        folder = tmp_path / "pairs"
        assert self.make(bases["sd"], held_out, folder) == 0
        before = (folder / "pairs.jsonl").read_text()
        assert self.make(bases["sd"], held_out, folder) == 0
        assert (folder / "pairs.jsonl").read_text() == before
        assert self.make(bases["sdxl"], held_out, folder) == 2
        assert "made in another way" in capsys.readouterr().err

    def test_one_image_makes_no_pair(self, bases, held_out, tmp_path, capsys):
        assert self.make(bases["sd"], held_out, tmp_path, "--images_per_prompt", "1") == 2
        assert "--images_per_prompt must be at least 2" in capsys.readouterr().err
