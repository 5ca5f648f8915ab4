"""The commands of every tutorial run one after the other, with settings that make them short."""

from pathlib import Path

import pytest
from marks import slow_except
from snippets import commands

from diffalign.cli.main import main

LONG = ("docs/tutorials/qsched.md", "docs/tutorials/dcgen.md")
"""Tutorials that take more seconds than the fast tests have."""
PAGES = sorted({s.page for s, _ in commands() if s.page.startswith("docs/tutorials/")})
TRAIN = ["--training.num_updates=1", "--training.eval_every=0", "--evaluation.images_per_task=1"]
ROLLOUT = ["--rollout.prompts_per_update=2", "--rollout.group_size=2", "--model.compile=false"]
MOVE = ["--latents.limit=48", "--latents.alignment_images=32", "--training.images_per_update=4"]
RECIPES = {
    "demo": [*ROLLOUT, "--training.total_minutes=null"],
    "awm-shapes-flux": ROLLOUT,
    "inversion-dpo-shapes": ["--training.pairs_per_update=2"],
    "dcgen-shapes-flux": MOVE,
}
VERBS = {
    "evaluate": ["--max_prompts=6"],
    "pairs": ["--max_prompts=16", "--images_per_prompt=4"],
    "quantize": ["--max_prompts=2", "--latency=0"],
    "qsched": ["--max_prompts=12", "--budget=2"],
}


def shortened(words):
    """A command with settings that make it short; the last one of a flag counts."""
    if words[0] == "train":
        return [*words, *TRAIN, *RECIPES[words[1]]]
    return [*words, *VERBS.get(words[0], [])]


@pytest.mark.parametrize(
    "page", slow_except(set(PAGES) - set(LONG), PAGES), ids=lambda page: Path(page).stem
)
def test_commands_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for snippet, words in commands():
        if snippet.page == page:
            assert main(shortened(words)) == 0, words
