"""Every snippet of README and docs runs from an empty folder, and every command is one that the suite knows."""

import shlex
from pathlib import Path

import pytest
import tiny_moves
import torch
from snippets import ROOT, SpellingParser, commands, snippets

from diffalign import config, lora
from diffalign.cli.main import build_parser, main, spell_out
from diffalign.composition import recipe as recipes
from diffalign.pipelines.registry import load_model

COMMANDS = commands()
SETTINGS = ("train", "precompute")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with what the commands before the snippets leave in runs/."""
    folder = tmp_path_factory.mktemp("newcomer")
    model = load_model("shapes-sd3")
    lora.attach(model.denoiser, rank=4, alpha=8, targets=model.lora_targets, policies=())
    lora.export_lora(model.denoiser, model.pipeline, folder / "runs/demo/lora")
    _, moved = tiny_moves.moved_model("flux")
    moved.pipeline.save_pretrained(folder / "runs/dcgen-shapes-flux/pipeline")
    small = ["--model=shapes-flux-schnell", "--backend=int4", "--latency=0"]
    assert main(["quantize", *small, f"--output_dir={folder / 'runs/small'}"]) == 0
    return folder


@pytest.mark.parametrize("snippet", snippets("python"), ids=lambda s: s.name)
def test_python_runs_as_it_is_printed(snippet, results, monkeypatch):
    monkeypatch.chdir(results)
    torch.manual_seed(0)
    exec(compile(snippet.text, snippet.name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(
    ("snippet", "words"), COMMANDS, ids=[f"{s.name} {shlex.join(w)[:60]}" for s, w in COMMANDS]
)
def test_commands_are_known(snippet, words):
    if words[0] == "accelerate":
        script = next(w for w in words if w.endswith(".py"))
        assert (ROOT / script).is_file()
        return
    parser = build_parser(SpellingParser)
    args, rest = parser.parse_known_args(spell_out(words))
    if words[0] in SETTINGS:
        recipe = args.recipe
        if not Path(recipe).suffix:
            config.load(recipe, rest)
    elif words[0] == "compose":
        recipes.load(args.recipe, rest)
    else:
        assert rest == []
