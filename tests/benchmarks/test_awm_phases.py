"""Phases of AWM's updates: the trainer's own calls, timed and counted; on the CPU with tiny models."""

import pytest
import tiny
import torch
from compilation import counted
from marks import slow, slow_except

from benchmarks.awm import awm
from benchmarks.awm import phases as awm_phases
from benchmarks.common.record import BenchOptions
from diffalign import lora
from diffalign.config import load
from diffalign.methods.online.forward_update import ForwardProcessUpdate

PHASES = ["rollout", "decode", "policy", "reference", "lagged", "optimizer"]
NARROW = {
    "sd3.5-medium": {
        "num_layers": 2,  # the last one lacks some of the LoRA's targets
        "num_attention_heads": 2,
        "caption_projection_dim": 128,
        "dual_attention_layers": (0,),
    },
    "flux.1-dev": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2},
}


def configuration(recipe, *more):
    side = [f"--rollout.{name}={tiny.SIZE}" for name in ("height", "width")]
    return load(recipe, [*side, "--lora.rank=4", "--rollout.micro_batch_size=4", *more])


@pytest.fixture
def counter(monkeypatch):
    with counted(monkeypatch, "eager") as counter:
        yield counter


def base_weights(denoiser):
    return {n: p.clone() for n, p in denoiser.named_parameters() if "lora_" not in n}


@pytest.mark.parametrize(
    ("family", "name"),
    [("sd3", "sd3.5-medium"), slow("flux", "flux.1-dev")],
)
def test_every_phase_is_measured_with_and_without_compilation(family, name, counter):
    model = tiny.MODELS[family]()
    config = configuration(awm_phases.RECIPES[name])
    before = base_weights(model.denoiser)
    found = awm_phases.by_phase(model, config)
    assert found["images"] == 24 * 24
    assert counter.frame_count > 0
    for how in ("eager", "compiled"):
        phases = found[how]["phases"]
        assert list(phases) == PHASES
        for row in phases.values():
            assert len(row["seconds"]["values"]) == 3
            assert row["seconds"]["median"] > 0
        # 576 images, 4 drawn and 2 trained on at a time, 4 or 3 timesteps of each, distances on 1
        assert {n: (r["rows"], r["calls"]) for n, r in phases.items()} == {
            "rollout": (4, 144),
            "decode": (4, 144),
            "policy": (2 * config.algorithm.timesteps_per_image, 288),
            "reference": (2, 288),
            "lagged": (2, 288),
            "optimizer": (0, 1),
        }
        total = sum(r["calls"] * r["seconds"]["median"] for r in phases.values())
        assert found[how]["update_seconds"] == pytest.approx(total, abs=1e-3)
    added = {n: row["added_bytes"] for n, row in found["eager"]["phases"].items()}
    assert (
        added["policy"] > added["reference"] > 0
    )  # it keeps what the backward needs, of more rows
    after = {n.replace(".base_layer", ""): p for n, p in base_weights(model.denoiser).items()}
    assert all(torch.equal(p, after[n]) for n, p in before.items())
    assert any(
        p.abs().max() > 0
        for n, p in lora.adapter_parameters(model.denoiser, "default")
        if "lora_B" in n
    )


def test_only_the_optimizer_changes_the_adapter(sd3):
    trainer = awm_phases.make_trainer(sd3, configuration("awm-sd3.5-medium"))
    for name, phase in awm_phases.phases(trainer).items():
        before = [p.detach().clone() for p in trainer.parameters]
        phase.call()
        same = [torch.equal(p, old) for p, old in zip(trainer.parameters, before, strict=True)]
        assert all(same) == (name != "optimizer")
        assert any(p.grad is not None for p in trainer.parameters) == (
            name not in ("rollout", "decode")
        )


def test_policy_and_distances_are_all_of_a_micro_batch(sd3, monkeypatch):
    """The forwards of the phases are those of the trainer's own update: in rows, and of which policies."""
    trainer = awm_phases.make_trainer(
        sd3, configuration("awm-sd3.5-medium", "--algorithm.kl_timesteps=3")
    )
    found = awm_phases.phases(trainer)
    seen = []
    sd3.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            (len(kwargs["hidden_states"]), torch.is_grad_enabled())
        ),
        with_kwargs=True,
    )
    for name in ("policy", "reference", "lagged"):
        found[name].call()
    ours, batches = sorted(seen), []
    seen.clear()
    original = ForwardProcessUpdate.micro_batch
    monkeypatch.setattr(
        ForwardProcessUpdate,
        "micro_batch",
        lambda self, batch, *args, **kwargs: (
            batches.append(batch) or original(self, batch, *args, **kwargs)
        ),
    )
    found["policy"].call()
    seen.clear()
    trainer.policy_update.accumulate(batches[0], update=1)
    assert ours == sorted(seen) == [(6, False), (6, False), (8, True)]


def test_phases_follow_the_recipe(sd3, tmp_path):
    more = ("--training.updates_per_rollout=2", "--algorithm.kl_beta=0")
    trainer = awm_phases.make_trainer(sd3, configuration("awm-sd3.5-medium", *more))
    found = awm_phases.phases(trainer)
    # off policy the lagged policy's prediction belongs to the loss itself
    assert list(found) == ["rollout", "decode", "policy", "optimizer"]
    assert (found["policy"].calls, found["optimizer"].calls) == (2 * 288, 2)


def test_what_does_not_fit_is_no_figure(sd3, monkeypatch):
    def too_much(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ForwardProcessUpdate, "micro_batch", too_much)
    monkeypatch.setattr(awm_phases, "compile_blocks", lambda *args: False)
    found = awm_phases.by_phase(sd3, configuration("awm-sd3.5-medium"))
    assert set(found) == {"images", "eager"}
    assert found["eager"]["phases"]["policy"] == {"rows": 8, "calls": 288, "seconds": None}
    assert found["eager"]["phases"]["rollout"]["seconds"]["median"] > 0
    assert found["eager"]["update_seconds"] is None
    monkeypatch.setattr(awm_phases, "published", too_much)
    assert awm_phases._real_size("flux.1-dev", configuration("awm-flux.1-dev")) == {"eager": None}


@pytest.mark.parametrize("name", slow_except(["sd3.5-medium"], awm_phases.RECIPES))
def test_published_models_with_few_blocks_compute_something(name):
    model = awm_phases.published(name, device="cpu", **NARROW[name])
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.bfloat16}
    trainer = awm_phases.make_trainer(model, configuration(awm_phases.RECIPES[name]))
    found = awm_phases.phases(trainer)
    assert found["rollout"].call().isfinite().all()
    assert found["decode"].call()[1].all()
    found["policy"].call()
    assert trainer.step(1, index=0) > 0


def test_the_arm_is_left_out_without_cuda(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = BenchOptions(quick=True, work=tmp_path, seeds=1, arms=(awm_phases.NAME,))
    assert awm_phases.measure(options) == {}
    assert awm.run(options) == {"headline": {}}  # and alone it needs no run of AWM
    assert not list(tmp_path.iterdir())


def test_the_arm_keeps_what_it_found(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(
        awm_phases,
        "_real_size",
        lambda name, config: asked.append(config.model.name) or {"of": name},
    )
    options = BenchOptions(quick=True, work=tmp_path, seeds=1, arms=(awm_phases.NAME,))
    for _ in range(2):
        assert awm.run(options)["phases"] == {name: {"of": name} for name in awm_phases.RECIPES}
    assert asked == list(awm_phases.RECIPES)
