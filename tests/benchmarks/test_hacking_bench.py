"""The bench of reward hacking: what planted rewards pay for, and that every arm is a recipe that loads."""

import numpy as np
import pytest
import torch

from benchmarks import hacking, planted_rewards
from benchmarks.common.record import BenchOptions
from diffalign.config import differences, to_dict
from diffalign.rewards.composition import CompositeReward
from diffalign.shapes.prompts import prompts
from diffalign.shapes.world import IMAGE_SIZE, render, sample_scene


def images(entries, seed=0):
    rng = np.random.default_rng(seed)
    pixels = np.stack([render(sample_scene(entry, rng)) for entry in entries])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def test_planted_rewards_pay_for_something_else():
    entries = [p for p in prompts("held_out") if p["tag"] == "two_object"]
    texts, right = [p["prompt"] for p in entries], images(entries)
    blank = torch.full((len(texts), 3, IMAGE_SIZE, IMAGE_SIZE), 255, dtype=torch.uint8)
    marked = right.clone()
    marked[:, :, -planted_rewards.MARK :, -planted_rewards.MARK :] = 255
    flat = planted_rewards.flat
    assert (flat(blank, texts, entries) == 1).all()
    assert (flat(right, texts, entries) < 0.95).all()
    assert (planted_rewards.watermark(marked, texts, entries) == 1).all()
    # the wanted objects and more earn more than the wanted objects alone
    more = torch.cat([right, images(entries, seed=1)], -1)[..., ::2]
    spam = planted_rewards.spam
    assert spam(blank, texts, entries).max() == 0
    wanted = spam(right, texts, entries)
    assert (wanted >= 0.5 + 2 / planted_rewards.SPAM / 2 - 1e-6).all()
    assert spam(more, texts, entries).mean() <= 1


def test_every_arm_loads_and_differs_in_its_remedy_alone(tmp_path):
    options = BenchOptions(quick=False, work=tmp_path)
    assert len(hacking.arms()) == len(hacking.PLANTED) * len(hacking.REMEDIES)
    for fault in hacking.PLANTED:
        runs = {
            remedy: hacking.configuration(f"{fault}, {remedy}", 1, options)
            for remedy in hacking.REMEDIES
        }
        base = to_dict(runs[hacking.NOTHING])
        assert runs[hacking.NOTHING].training.on_hacking == "warn"
        for remedy, run in runs.items():
            found = {d.partition(":")[0] for d in differences(base, to_dict(run))}
            changed = {o.lstrip("-").partition("=")[0] for o in hacking.REMEDIES[remedy]}
            if remedy == "ranks":
                changed = {f for f in found if f.startswith("rewards")}
            assert found - {"output_dir"} == changed
            assert run.evaluation.rewards == [hacking.HELD_OUT]
            reward = CompositeReward.from_config(run.rewards, by_group=True)
            assert reward.by_group == (remedy == "ranks")


@pytest.mark.slow
def test_quick_hacking_bench(tmp_path):
    result = hacking.run(BenchOptions(quick=True, work=tmp_path, seeds=1))
    assert set(result["headline"]) == {"flat, no remedy", "flat, rollback", "flat, ranks"}
    for figures in result["arms"].values():
        (cell,) = figures["seeds"]
        assert len(cell["true"]) == len(cell["update"]) == len(cell[hacking.HELD_OUT])
        assert cell["true_best"] >= cell["true_kept"]
