"""Every example runs, with settings that make it short."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from diffalign.config import methods

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
SHORT = [
    *("--training.num_updates=1", "--training.total_minutes=null", "--model.compile=false"),
    *("--rollout.prompts_per_update=2", "--rollout.group_size=2", "--evaluation.images_per_task=1"),
]
ARGUMENTS = {"quantize_and_repair": ["2", "12"]}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), *ARGUMENTS.get(path.stem, SHORT)])
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    # an algorithm of an example is found in the module that runs
    main = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    main.__file__ = str(path)
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), main.__dict__)
    methods.available.cache_clear()
    assert capsys.readouterr().out
    assert any((tmp_path / "runs").iterdir())
