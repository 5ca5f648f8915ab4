"""Every example runs, with settings that make it short."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
SHORT = [
    *("--training.num_updates=1", "--training.total_minutes=null", "--model.compile=false"),
    *("--rollout.prompts_per_update=2", "--rollout.group_size=2", "--evaluation.images_per_task=1"),
]
ARGUMENTS = {"quantize_and_repair": {"budget": 2, "num_prompts": 12}}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    if path.stem in ARGUMENTS:
        example.main(**ARGUMENTS[path.stem])
    else:
        example.main(SHORT)
    assert capsys.readouterr().out
    assert any((tmp_path / "runs").iterdir())
