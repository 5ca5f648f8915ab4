"""Benchmarks: one form of result, every arm a recipe that loads, and a quick one from the command line."""

import json

import pytest

from diffalign import cli
from diffalign.bench import BENCHES, demo, record
from diffalign.config import differences, to_dict


def test_spread():
    found = record.spread([3.0, 1.0, 2.0])
    assert found == {"median": 2.0, "low": 1.0, "high": 3.0, "values": [3.0, 1.0, 2.0]}


def test_a_result_says_where_it_comes_from():
    found = record.record("demo", {"headline": {"x": 1}}, quick=True)
    assert found["headline"] == {"x": 1}
    assert {"command", "machine", "versions", "quick"} <= set(found)


def test_names_and_seeds_are_checked(capsys):
    assert cli.main(["bench", "dema"]) == 2
    assert "did you mean 'demo'" in capsys.readouterr().err
    assert cli.main(["bench", "demo", "--seeds=0"]) == 2
    assert cli.main(["list", "benches"]) == 0
    assert set(BENCHES) == {"demo"}


def test_arms_differ_only_in_what_they_are_named_for(tmp_path):
    options = record.BenchOptions(quick=False, work=tmp_path)
    runs = {arm: demo.configuration(arm, 1, options) for arm in demo.ARMS}
    assert {r.training.seed for r in runs.values()} == {1}
    assert {r.evaluation.seed for r in runs.values()} == {1001}
    base = to_dict(runs["demo"])
    found = {
        arm: {line.partition(":")[0] for line in differences(base, to_dict(run))}
        for arm, run in runs.items()
    }
    assert found == {
        "demo": set(),
        "plain reference": {
            "output_dir",
            "algorithm.reference_guidance_scale",
            "algorithm.kl_beta",
        },
        "no reward": {
            "output_dir",
            "algorithm.advantage_max",
            "training.drop_uninformative",
        },
    }


@pytest.mark.slow
def test_quick_demo_bench(tmp_path, capsys):
    output = tmp_path / "demo.json"
    flags = ["--quick", f"--work={tmp_path}", f"--output={output}"]
    assert cli.main(["bench", "demo", *flags]) == 0
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last == json.loads(output.read_text())["headline"]
    assert last["seeds"] == 1
