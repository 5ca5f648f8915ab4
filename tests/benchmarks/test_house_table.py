"""The measures of the source code, on a tree whose figures are known."""

import json
import subprocess

import pytest

from benchmarks.common import house

MANY = ", ".join(f"x{i}: int" for i in range(9))
FILES = {
    "diffalign/__init__.py": "",
    "diffalign/config/online.py": '"""Settings of a run."""\n\n\nclass RunConfig:\n    """Settings."""\n',
    "diffalign/cli/main.py": "import argparse\n\nfrom diffalign import core\n\n\n"
    'def run(args: argparse.Namespace) -> str:\n    return core.one("--output")\n',
    "diffalign/core.py": "import diffalign.b\n\nBAD = 'choose another --output, not git --always'\n\n\n"
    + f"def one({MANY}) -> int:\n    return 1\n",
    "diffalign/b.py": "from diffalign import core\nfrom diffalign.config.online import RunConfig\n\n\n"
    + '''def two(x) -> bool:
    """Of things that are there"""
    return isinstance(x, RunConfig) or isinstance(x, int)
''',
    "pipelines/long.py": "def long() -> None:\n"
    + "".join(f"    print({i})\n" for i in range(60))
    + "".join("    print(0, 0)\n" for _ in range(7))
    + "# a reason\n" * 340,
}


@pytest.fixture
def tree(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_figures_of_a_known_tree(tree):
    figures = house.measure(tree, with_types=False)
    assert figures["files"] == len(FILES)
    assert figures["files_over_400_lines"] == {"pipelines/long.py": 408}
    assert figures["longest_function"] == {"pipelines/long.py:long": 68}
    assert figures["functions_over_60_lines"] == {"pipelines/long.py:long": 68}
    assert figures["functions_over_8_arguments"] == {"diffalign/core.py:one": 9}
    assert figures["isinstance_of_configurations"] == {"diffalign/b.py": 1}
    assert figures["functions_on_namespaces"] == 1
    assert figures["functions_on_namespaces_below_the_command_line"] == 0
    assert figures["flags_below_the_command_line"] == {"diffalign/core.py": 1}
    assert figures["import_cycles"] == [["diffalign.b", "diffalign.core"]]
    assert figures["texts_that_break_a_rule"] == {"diffalign/b.py": 2}
    assert figures["typed_functions_percent"] == 75.0
    assert figures["rooms"]["pipelines"] == 408
    assert list(figures["largest_room"]) == ["pipelines"]
    # seven equal lines of print(0, 0) hold two windows of six
    code = sum(len([x for x in t.splitlines() if x and x[0] != "#"]) for t in FILES.values())
    assert figures["repeated_lines_percent"] == pytest.approx(100 * 7 / code, abs=0.01)


def test_the_record_says_what_was_measured(tree, capsys):
    git = ["git", "-C", str(tree), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    output = tree / "house.json"
    house.main([f"--root={tree}", "--no-mypy", f"--output={output}"])
    assert "| functions over 8 arguments | 1 (diffalign/core.py:one 9) |" in capsys.readouterr().out
    record = json.loads(output.read_text())
    assert len(record["commit"]) >= 7
    assert record["figures"]["files"] == len(FILES)
    assert set(record["versions"]) == {"python", "mypy"}
