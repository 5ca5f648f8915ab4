"""The commands of every tutorial run one after the other, with settings that make them short."""

from pathlib import Path

import pytest
from snippets import commands

from diffalign.cli.main import main

PAGES = sorted({s.page for s, _ in commands() if s.page.startswith("docs/tutorials/")})
TRAIN = ["--training.num_updates=1", "--training.eval_every=0", "--evaluation.images_per_task=1"]
ONLINE = ["--rollout.prompts_per_update=2", "--rollout.group_size=2", "--model.compile=false"]
SHORT = {
    "docs/tutorials/awm.md": [*TRAIN, *ONLINE, "--training.total_minutes=null"],
    "docs/tutorials/inversion-dpo.md": [*TRAIN, "--training.pairs_per_update=2"],
    "docs/tutorials/dcgen.md": TRAIN,
}
VERBS = {
    "evaluate": ["--max_prompts=6"],
    "pairs": ["--max_prompts=16", "--images_per_prompt=4"],
    "quantize": ["--max_prompts=2", "--latency=0"],
    "qsched": ["--max_prompts=12", "--budget=2"],
}
MOVE = ["--latents.limit=48", "--latents.alignment_images=32", "--training.images_per_update=4"]


def shortened(page, words):
    """A command with settings that make it short; the last one of a flag counts."""
    if words[0] != "train":
        return [*words, *VERBS.get(words[0], [])]
    recipe = words[1]
    if recipe.startswith("dcgen"):
        return [*words, *TRAIN, *MOVE]
    return [*words, *(TRAIN + ONLINE if recipe.startswith("awm") else SHORT[page])]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: Path(p).stem)
def test_commands_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for snippet, words in commands():
        # the last section of a page names other recipes in its text only
        if snippet.page == page:
            assert main(shortened(page, words)) == 0, words
