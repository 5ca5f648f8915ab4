"""Benchmarks: one form of result, every arm a recipe that loads, and a quick one from the command line."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from tiny_moves import deep_autoencoder

from benchmarks import BENCHES, acceleration, demo, memory
from benchmarks.awm import arms as awm_arms
from benchmarks.common import record
from benchmarks.common.curves import Curve
from benchmarks.common.peak_memory import peak_bytes
from benchmarks.dcgen import latency as deep_latency
from benchmarks.inversion_dpo import inversion_dpo
from benchmarks.qsched.forms import FORMS
from benchmarks.rewards import models as reward_models
from benchmarks.rewards import rewards as bench_rewards
from diffalign import cli
from diffalign.config import differences, to_dict
from diffalign.core.errors import UsageError
from diffalign.rewards.judged import Asking
from diffalign.rewards.registry import BUILT_IN, create


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
    assert set(BENCHES) == {
        "acceleration",
        "alignment",
        "suite",
        "demo",
        "awm",
        "hacking",
        "rewards",
        "solvers",
        "inversion-dpo",
        "qsched",
        "dcgen",
        "service",
        "memory",
        "optimise",
        "compose",
        "serving",
    }
    assert cli.main(["bench", "demo", "--arms=dema"]) == 2
    assert "arms=dema: no such arm; did you mean 'demo'" in capsys.readouterr().err


def test_what_was_found_is_kept(tmp_path):
    options = record.BenchOptions(quick=False, work=tmp_path)
    asked = []

    def make():
        asked.append(True)
        return {"x": len(asked)}

    assert options.cached("int4 rows, 2", 1, make, key=[1, "a"]) == {"x": 1}
    assert options.cached("int4 rows, 2", 1, make, key=[1, "a"]) == {"x": 1}
    assert options.cached("int4 rows, 2", 2, make, key=[1, "a"]) == {"x": 2}
    assert (tmp_path / "int4-rows-2-1" / "cell.json").is_file()
    # with other settings it is another, whatever lies there
    assert options.cached("int4 rows, 2", 1, make, key=[2, "a"]) == {"x": 3}
    assert options.cached("int4 rows, 2", 1, make, key=[2, "a"]) == {"x": 3}


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
        },
        "no reward": {
            "output_dir",
            "algorithm.advantage_max",
            "training.drop_uninformative",
        },
    }


def test_rivals_share_everything_but_the_algorithm(tmp_path):
    options = record.BenchOptions(quick=False, work=tmp_path)
    ours = to_dict(awm_arms.configuration("awm", awm_arms.Arm(awm_arms.AWM), 2, options))
    for name, arm in awm_arms.RIVALS.items():
        theirs = to_dict(awm_arms.configuration(name, arm, 2, options))
        assert theirs["algorithm"].pop("type") == name
        found = {line.partition(":")[0] for line in differences(ours, theirs)}
        assert {f for f in found if not f.startswith("algorithm")} <= {
            "output_dir",
            "rollout.merge_lora",  # Flow-GRPO must know its own log-probabilities
            "optimizer.learning_rate",  # each has its own, the best of those tried or as good
        }


def test_every_arm_can_be_chosen(tmp_path):
    groups = (
        *(awm_arms.RIVALS, awm_arms.NEWER, awm_arms.RELEASED, awm_arms.LEVERS),
        awm_arms.LONG,
    )
    for names in (("awm", *itertools.chain(*groups)), demo.ARMS):
        text = ",".join(names)
        options = record.BenchOptions(quick=False, work=tmp_path, arms=tuple(text.split(",")))
        assert options.select(names) == list(names)
        assert len({options.folder(name, 0) for name in names}) == len(names)


def test_a_lever_changes_what_it_is_named_for(tmp_path):
    options = record.BenchOptions(quick=False, work=tmp_path)
    ours = to_dict(awm_arms.configuration("awm", awm_arms.Arm(awm_arms.AWM), 0, options))
    groups = (awm_arms.LEVERS, awm_arms.RELEASED, awm_arms.COSTS, awm_arms.NOISES)
    for name, arm in itertools.chain(*(g.items() for g in groups)):
        plain = awm_arms.configuration(name, awm_arms.Arm(arm.recipe), 0, options)
        assert (to_dict(plain) == {**ours, "output_dir": plain.output_dir}) == (
            arm.recipe == awm_arms.AWM
        )
        theirs = to_dict(awm_arms.configuration(name, arm, 0, options))
        found = {line.partition(":")[0] for line in differences(to_dict(plain), theirs)}
        named = {o.lstrip("-").partition("=")[0] for o in arm.overrides}
        assert found
        assert all(any(f.startswith(n) for n in named) for f in found)


def test_preference_arms_share_everything_but_what_they_are_named_for(tmp_path):
    options = record.BenchOptions(quick=False, work=tmp_path)
    for model in inversion_dpo.RECIPES:
        subject = inversion_dpo.Subject(model, options)
        runs = {arm: subject.configuration(arm, 1, seconds=60) for arm in inversion_dpo.ARMS}
        ours = to_dict(runs["inversion_dpo"])
        assert {r.pairs.source for r in runs.values()} == {str(tmp_path / f"pairs-{model}")}
        for arm, run in runs.items():
            assert run.training.seed == 1
            assert run.training.max_minutes == 1
            assert bool(run.states) == (arm in ("inversion_dpo", "inverted", "released"))
            found = {line.partition(":")[0] for line in differences(ours, to_dict(run))}
            assert {f for f in found if not f.startswith("algorithm")} <= {
                "output_dir",
                "optimizer.learning_rate",
                "pairs.cache",
                "training.eval_every",
                *(["training.num_updates"] if arm == "released" else []),
                *(
                    ["pairs.inversion.solver", "pairs.inversion.steps"]
                    if arm == "inverted"
                    else ["pairs.inversion.states"]
                ),
            }


def test_seconds_to_match_count_what_was_precomputed():
    def found(rate):
        return {"win_rate": {"rate": rate}, "tasks": {"overall": rate}}

    log = [
        {"seconds": 10.0, "evaluation": found(0.6)},
        {"seconds": 20.0, "evaluation": found(0.4)},
        {"seconds": 25.0},
    ]
    summary = {
        "precompute_seconds": 30.0,
        "before": {"tasks": {"overall": 0.3}},
        "after": {"tasks": {"overall": 0.8}},
        "win_rate": {"rate": 0.7},
    }
    curve = inversion_dpo.preference_curve(log, summary, "win_rate")
    assert curve.score == [0.5, 0.5, 0.6, 0.4, 0.7]
    assert curve.cost == {"seconds": [0, 30, 40, 50, 55], "training": [0, 0, 10, 20, 25]}
    assert inversion_dpo.preference_curve(log, summary, "geneval").score == [
        0.3,
        0.3,
        0.6,
        0.4,
        0.8,
    ]
    slow = Curve([0.5, 0.5, 0.7], {"seconds": [0, 10, 110]})
    never = Curve([0.5, 0.5, 0.55], {"seconds": [0, 10, 110]})
    flat = Curve([0.5, 0.5, 0.5], {"seconds": [0, 10, 110]})
    for made in (slow, never, flat):
        made.cost["training"] = [0, 0, 100]

    assert inversion_dpo.ratio_to_match(curve, slow, "seconds") == 0.5
    assert inversion_dpo.ratio_to_match(slow, curve, "seconds") == 2.0
    assert inversion_dpo.ratio_to_match(never, curve, "seconds") == math.inf
    assert math.isnan(inversion_dpo.ratio_to_match(curve, flat, "seconds"))
    arms = {
        "inversion_dpo": {"curves": {"win_rate": [curve, never, curve]}},
        "diffusion_dpo": {"curves": {"win_rate": [slow, slow, flat]}},
    }
    told = inversion_dpo.times(arms)["seconds"]
    assert told["to match"] == [0.5, None, None]
    assert told["median to match"] is None  # of 0.5 and never; the third says nothing
    assert told["speedup"][0] == 2.0
    assert inversion_dpo.times({"sft": {}}) == {}


def test_a_finished_run_is_read_and_not_made_again(tmp_path, monkeypatch):
    options = record.BenchOptions(quick=True, work=tmp_path)
    config = demo.configuration("demo", 0, options)
    calls = []
    monkeypatch.setattr(record, "train", lambda c: calls.append(c) or {"updates": 3})
    assert record.run_once(config) == {"updates": 3}
    summary = {"updates": 7, "config": to_dict(config)}
    tmp_path.joinpath("demo-0").mkdir()
    tmp_path.joinpath("demo-0", "summary.json").write_text(json.dumps(summary))
    assert record.run_once(config) == summary
    assert len(calls) == 1
    longer = replace(config, training=replace(config.training, max_minutes=99.0))
    with pytest.raises(UsageError, match=r"another configuration.*\n  training\.max_minutes"):
        record.run_once(longer)


@pytest.fixture
def quick(tmp_path, capfd):
    """Runs a benchmark as a user would; its last line and its file."""

    def run(name):
        output = tmp_path / f"{name}.json"
        flags = ["--quick", "--json", f"--work={tmp_path}", f"--output={output}"]
        assert cli.main(["bench", name, *flags]) == 0
        last = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
        written = json.loads(output.read_text())
        assert last == written["headline"]
        return last, written

    return run


@pytest.mark.slow
def test_quick_solvers_bench(quick):
    last, written = quick("solvers")
    assert set(written["arms"]) == {"default", "adams_bashforth"}
    assert all(0 < score < 1 for score in last.values())


@pytest.mark.slow
def test_quick_awm_bench(quick):
    last, written = quick("awm")
    assert {"speedup_vs_flow_grpo", "speedup_vs_nft", "geneval_final", "forwards_per_image"} == set(
        last
    )
    # rollout 6, policy 2 x 2.2, guided reference 2; less where groups are dropped
    assert 10 < last["forwards_per_image"] < 13
    assert written["costs"]["two updates a rollout"]["seconds"]["median"] > 1.2
    assert written["signals"]["4 timesteps"]["square_over_awm"] < 1


@pytest.mark.slow
def test_quick_qsched_bench(quick):
    last, written = quick("qsched")
    assert set(last) == {
        "quality_recovered",
        "network_calls_vs_grid",
        "bytes_ratio",
        "int8_latency_vs_bf16",
        *("psnr_int4", "psnr_int3", "psnr_int2", "geneval_int4_rows"),
    }
    assert set(last["quality_recovered"]) >= set(FORMS) - {"bf16"}
    assert min(last["bytes_ratio"].values()) > 2.8
    assert last["int8_latency_vs_bf16"] > 0
    for student in written["students"].values():
        steps = student["forms"]["int8"]["steps"]["2"]
        assert 0 < steps["plain"]["geneval"]["median"] < 1
        assert steps["plain"]["psnr"]["median"] > 30
        assert student["grid"][0]["cma"]["rows"] > 0


@pytest.mark.slow
def test_quick_inversion_dpo_bench(quick):
    last, written = quick("inversion-dpo")
    arms = {"inversion_dpo", "inverted", "diffusion_dpo", "released", "sft"}
    assert {model: set(rates) for model, rates in last["win_rate"].items()} == {
        "shapes-sd3": arms,
        "shapes-sd": arms,
    }
    assert all(0.2 < ratio < 1 for ratio in last["step_time_ratio_cached"].values())
    for found in written["models"].values():
        assert found["arms"]["inversion_dpo"]["precompute_seconds"] > 0
        assert set(found["gradients"]) >= {"states / fresh noise", "states: winners / losers"}
        assert found["arms"]["sft"]["forwards_per_pair"] < 5


@pytest.mark.slow
def test_quick_demo_bench(quick):
    last, _ = quick("demo")
    assert last["seeds"] == 1


@pytest.mark.slow
def test_rewards_are_timed_beside_the_original_preprocessing(tmp_path, capsys):
    """In a process of its own, as a user would."""
    output = tmp_path / "rewards.json"
    flags = ["--quick", "--json", "--arms=clip_score", f"--work={tmp_path}", f"--output={output}"]
    assert cli.main(["bench", "rewards", *flags]) == 0
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert set(last) == {f"preprocessing_{key}_clip_score" for key in ("share", "share_before")}
    arms = json.loads(output.read_text())["arms"]
    assert set(arms) == {"clip_score"}
    assert arms["clip_score"]["original_over_ours"] > 0
    assert 0 < arms["clip_score"]["share"] <= 1
    assert arms["clip_score"]["memory_mib"] > 0
    assert cli.main(["bench", "rewards", "--quick", "--arms=pick"]) == 2


def test_two_ways_to_a_frechet_distance_are_timed():
    found = bench_rewards.measure("fid", 64, 1)
    assert found["relative_difference"] < 1e-9
    assert found["torchmetrics_over_ours"] > 0


def test_bytes_at_the_peak_by_hand():
    x, w = torch.zeros(4, 256), torch.zeros(256, 256, requires_grad=True)
    kib = 4 * 256 * 4

    def call():
        y = (x @ w) + 1  # the product and the sum
        return y.view(-1)[:3].relu()  # the sum, and three numbers

    assert peak_bytes(call, [x, w]) == 2 * kib
    assert peak_bytes(lambda: x.mul_(2).flatten(), [x]) == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bytes_at_the_peak_are_those_of_torchs_own_tracker(device):
    from torch.distributed._tools.mem_tracker import MemTracker

    vae = deep_autoencoder().to(device)
    latents = torch.zeros(1, 8, 4, 4, device=device)
    tracker = MemTracker()
    tracker.track_external(vae, latents)
    with torch.no_grad(), tracker:
        vae.decode(latents)
    (rows,) = tracker.get_tracker_snapshot("peak").values()
    told = {kind.name: size for kind, size in rows.items() if kind != "Total"}
    wanted = told["ACT"] + told["TEMP"]
    assert peak_bytes(lambda: vae.decode(latents), [vae, latents]) == wanted > 0


def test_bytes_of_a_step_are_those_of_torchs_own_tracker():
    from torch.distributed._tools.mem_tracker import MemTracker

    vae = deep_autoencoder().decoder
    latents = torch.zeros(1, 8, 4, 4)

    def step():
        vae(latents).square().mean().backward()

    tracker = MemTracker()
    tracker.track_external(vae, latents)
    with tracker:
        step()
    (rows,) = tracker.get_tracker_snapshot("peak").values()
    told = {kind.name: size for kind, size in rows.items() if kind != "Total"}
    vae.zero_grad()
    wanted = sum(told[kind] for kind in ("ACT", "TEMP", "GRAD"))
    assert peak_bytes(step, [vae, latents], backward=True) == wanted > 0


def test_fused_attention_never_writes_its_matrix():
    q = torch.empty(1, 2, 512, 8, device="meta", dtype=torch.bfloat16)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert peak_bytes(lambda: attend(q, q, q), [q]) == q.numel() * 2


def test_an_autoencoder_of_the_meta_device_is_timed_with_random_weights():
    vae = deep_autoencoder().to("meta")
    found = deep_latency.decoding(vae, (1, 8, 2, 2), device="cpu", quick=True)
    assert list(found) == ["seconds"]
    assert found["seconds"] > 0


def test_what_does_not_fit_is_no_figure():
    def call():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert deep_latency.timed(call, torch.device("cpu"), quick=True) == {"seconds": None}


def test_every_reward_can_be_timed():
    known = reward_models.builders(real=False)
    # the time of those that ask a judge is the judge's; `vlm_judge` stands for them
    asking = {name for name in BUILT_IN if isinstance(create(name), Asking)}
    assert set(known) == {*BUILT_IN, reward_models.PUBLISHED_SIZE} - asking


@pytest.mark.parametrize("name", ["hpsv3", "vlm_judge", "verifier", "image_reward"])
def test_arms_score_what_they_are_shown(name):
    found = bench_rewards.measure(name, 2, 1)
    assert found["images_per_second"] > 0
    assert ("share" in found) == (name in ("hpsv3", "image_reward"))


def test_memory_is_forecast_without_weights(tmp_path):
    result = memory.run(record.BenchOptions(quick=True, work=tmp_path))
    (arm,) = result["arms"].values()
    # 0.86 billion parameters in two bytes each
    assert arm["denoiser"] == pytest.approx(0.86e9 * 2 / 2**30, rel=0.05)
    parts = ("denoiser", "text_encoders", "autoencoder", "adapters", "optimizer", "rollout")
    phases = ("training", "drawing", "encoding")
    largest = max(arm[p] for p in phases)
    assert arm["total"] == pytest.approx(sum(arm[p] for p in parts) + largest, abs=0.05)
    assert arm["on_24_gib"]["settings"] == "as it is"
    assert arm["on_80_gib"]["total"] == arm["total"]


def test_acceleration_measures_one_model_a_command_and_no_seed_twice(tmp_path, monkeypatch):
    measured = []

    def figures(self, per_task):
        measured.append((self._name, self._seed, per_task))
        presets = {name: {"ratio": 2.0, "psnr": 40.0} for name in acceleration.PRESETS}
        numbers = dict.fromkeys(acceleration.FIGURES, 1.0 + self._seed) | {"restored": 1.0}
        return {**numbers, "presets": presets, "guidance_scale": 7.0, "computed": [0, 1]}

    monkeypatch.setattr(acceleration._Measurement, "figures", figures)
    options = record.BenchOptions(True, tmp_path, seeds=2, arms=("shapes-sd3",))
    result = acceleration.run(options)
    assert acceleration.run(options) == result
    assert measured == [("shapes-sd3", 0, 4), ("shapes-sd3", 1, 4)]
    arm = result["arms"]["shapes-sd3"]
    assert arm["presets"]["fast"]["ratio"]["values"] == [2.0, 2.0]
    assert result["headline"] == {
        "lossless_ratio": 1.5,
        "cache_ratio": 1.5,
        "cache_psnr": 1.5,
        "geneval_drop": 1.5,
        "restored": True,
    }
    acceleration.run(replace(options, quick=False, seeds=1))
    assert measured[2:] == [("shapes-sd3", 0, 128)]
