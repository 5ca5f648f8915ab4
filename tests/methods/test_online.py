"""The loop on tiny models: it learns, resumes bit for bit, and does not depend on micro-batches or processes."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import tiny_llm
import torch
from diffusers.optimization import get_scheduler
from marks import slow_except
from processes import results_of
from tiny_runs import ONLINE, TWO, redness, settings, trainer, weights

from diffalign import lora
from diffalign.config import ConfigError, OptimizerConfig, PromptsConfig
from diffalign.core.errors import UsageError
from diffalign.data.prompts import Prompt, load_prompts
from diffalign.evaluation.scoring import BackgroundScorer
from diffalign.training import checkpoint
from diffalign.training.learning_rate import lr_factor
from diffalign.training.plan import check_prompts, make_plan
from diffalign.training.trainer import TrainingError
from diffalign.types import RewardOutput


@pytest.mark.parametrize(
    "family", slow_except(["flux", "flux2", "sana", "sd3"], sorted(tiny.MODELS))
)
def test_the_reward_rises(tmp_path, family):
    run = trainer(
        tmp_path,
        family=family,
        rollout={"group_size": 8, "prompts_per_update": 4},
        optimizer={"learning_rate": 0.03},
        algorithm={"ema_kl_beta": 0.1, "weight": "uniform"},
        training={"micro_batch_size": 64},
    )
    rows = [run.train_update() for _ in range(10)]
    first, last = (np.mean([r["reward"] for r in part]) for part in (rows[:2], rows[-2:]))
    assert last > first + rows[0]["reward_group_std"]
    assert rows[0]["ratio"] == 1.0
    assert rows[0]["kl"] == 0.0 < rows[-1]["kl"]
    assert {"grad_norm", "images_per_second", "reward_group_std", "kept"} <= set(rows[0])
    assert all(r["diversity"] > 0 for r in rows)


# a schedule that ends above 0 (Qwen-Image) leaves three steps of the other dynamics no window
CPS = {"dynamics": "cps"}


@pytest.mark.parametrize("algorithm", ["awm", "diffusion_nft", "flow_grpo"])
@pytest.mark.parametrize("family", tiny_llm.MODELS)
def test_micro_batches_of_prompts_of_any_length_change_nothing(tmp_path, family, algorithm):
    """Guided, where padded prompts meet a negative prompt of another length."""
    gradients = []
    # the likelihoods of Flow-GRPO are those without guidance
    guidance = 1.0 if algorithm == "flow_grpo" else 3.0
    for size in (12, 5):
        run = trainer(
            tmp_path / str(size),
            family=family,
            algorithm={"type": algorithm, "kl_beta": 0.1, **(CPS if guidance == 1 else TWO)},
            rollout={"guidance_scale": guidance, "micro_batch_size": size},
            training={"micro_batch_size": size},
        )
        row = run.train_update()
        assert row["grad_norm"] > 0
        assert row["kept"] == 12
        gradients.append(row["grad_norm"])
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-3)


@pytest.mark.parametrize(
    "groups",
    [
        {},
        {
            "rollout": {"merge_lora": True},
            "algorithm": {"reference_guidance_scale": 2.0, "kl_beta": 0.1},
            "optimizer": {"lr_scheduler": "cosine"},
        },
        {
            "algorithm": {"noise": "rollout", "timestep_stop": 0.5},
            "rollout": {"num_inference_steps": 4},
        },
        {"algorithm": {"noise": "group"}, "training": {"updates_per_rollout": 2}},
        {"algorithm": {"type": "diffusion_nft", "timesteps_per_image": 2}},
        {"algorithm": {"type": "flow_grpo"}},
    ],
)
def test_resumed_run_is_bit_identical(tmp_path, groups, monkeypatch):
    """Prompts return: three of four are drawn at a time. The resumed run encodes them anew."""
    tiny.make_embeddings_depend_on_their_batch(monkeypatch)
    groups = groups | {"train": load_prompts("shapes:train")[:4]}
    whole = trainer(tmp_path / "a", **groups)
    for _ in range(4):
        whole.train_update()

    first = trainer(tmp_path / "b", **groups)
    for _ in range(2):
        first.folder.append_log(first.train_update())
    first.save()
    first.folder.append_log(first.train_update())  # lost: it comes after the checkpoint

    second = trainer(tmp_path / "b", **groups)
    assert second.resume()
    assert second.progress.update == 2
    assert [r["update"] for r in second.folder.read_log()] == [1, 2]
    for _ in range(2):
        second.train_update()
    assert torch.equal(weights(second), weights(whole))
    for name in (lora.LAGGED, lora.AVERAGED):
        states = [lora.adapter_state(r.model.denoiser, name) for r in (second, whole)]
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_diffusion_nft_keeps_images_without_an_advantage(tmp_path):
    """Its pull to the old policy does not end with the advantage; AWM's gradient does."""
    kept = {}
    for kind in ("awm", "diffusion_nft"):
        run = trainer(
            tmp_path / kind,
            score=lambda images, prompts, metadata: RewardOutput(np.ones(len(prompts), np.float32)),
            algorithm={"type": kind, "timesteps_per_image": 2},
        )
        kept[kind] = run.train_update()["kept"]
    assert kept == {"awm": 0, "diffusion_nft": 12}


def test_diffusion_nft_learns_and_draws_with_the_lagged_policy(tmp_path):
    run = trainer(
        tmp_path,
        rollout={"group_size": 8, "prompts_per_update": 4},
        optimizer={"learning_rate": 0.03},
        algorithm={"type": "diffusion_nft", "lag_ramp": 0.05, "timesteps_per_image": 2},
        training={"micro_batch_size": 64},
    )
    assert run.policy_update.rollout_policy == lora.LAGGED
    rows = [run.train_update() for _ in range(20)]
    first, last = (np.mean([r["reward"] for r in part]) for part in (rows[:2], rows[-2:]))
    assert last > first + rows[0]["reward_group_std"]
    assert rows[0]["optimality"] == pytest.approx(0.5, abs=0.05)
    # before the first update the three predictions are one: mean e t^2 / w on both sides
    assert rows[0]["positive"] == pytest.approx(rows[0]["negative"], rel=1e-5)


def test_the_clock_counts_rollouts_and_updates(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    for module, times in (
        ("methods.online.trainer", [0.0, 5.0, 100.0, 103.0]),
        ("training.trainer", [0.0, 7.0, 100.0, 104.0]),
    ):
        clock = SimpleNamespace(perf_counter=iter(times).__next__)
        monkeypatch.setattr(f"diffalign.{module}.time", clock)
    rows = [run.train_update() for _ in range(2)]
    assert [(r["rollout_seconds"], r["update_seconds"], r["seconds"]) for r in rows] == [
        (5.0, 2.0, 7.0),
        (3.0, 1.0, 11.0),
    ]


def test_averaged_weights_follow_faster_at_first(tmp_path):
    """The decay after step s is (1 + s) / (10 + s), and ema_max at most."""
    run = trainer(tmp_path, training={"ema_max": 0.25})
    expected = None
    for step, decay in ((1, 2 / 11), (2, 0.25)):
        run.train_update()
        states = [lora.adapter_state(run.model.denoiser, n) for n in (lora.CURRENT, lora.AVERAGED)]
        current, averaged = ({k: v.clone() for k, v in s.items()} for s in states)
        start = expected or {k: v * 0 for k, v in current.items()}
        if step == 2:
            for name, value in averaged.items():
                wanted = decay * start[name] + (1 - decay) * current[name]
                torch.testing.assert_close(value, wanted)
        expected = averaged


def test_nothing_to_resume(tmp_path):
    assert not trainer(tmp_path).resume()


def test_a_checkpoint_cut_in_half_is_an_error(tmp_path):
    run = trainer(tmp_path)
    run.train_update()
    run.save()
    file = checkpoint.latest(run.folder.checkpoints) / "default.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        trainer(tmp_path).resume()


@pytest.mark.parametrize(
    ("updates_per_rollout", "noise"),
    [(1, "fresh"), (2, "fresh"), (1, "group"), (1, "rollout")],
)
def test_micro_batches_change_nothing(tmp_path, updates_per_rollout, noise):
    runs = [
        trainer(
            tmp_path / str(size),
            rollout={"micro_batch_size": size, "num_inference_steps": 4},
            training={"micro_batch_size": size, "updates_per_rollout": updates_per_rollout},
            algorithm={"noise": noise, "timestep_stop": 0.5},
        )
        for size in (12, 5)
    ]
    rows = [[run.train_update() for _ in range(2)] for run in runs]
    here, there = (weights(run) for run in runs)
    assert (here - there).norm() < 1e-4 * here.norm()
    # Adam makes a step of its rate of a gradient however small, rounding among it: here 5 % of a step
    torch.testing.assert_close(here, there, rtol=1e-3, atol=5e-4)
    for row, other in zip(*rows, strict=True):
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert rows[0][0]["reward"] == pytest.approx(rows[1][0]["reward"], abs=1e-3)


@pytest.mark.parametrize("solver", ["default", "adams_bashforth"])
@pytest.mark.parametrize("algorithm", ["awm", "diffusion_nft"])
def test_noise_of_the_rollout_changes_no_image_and_is_trained_on(tmp_path, algorithm, solver):
    runs = {
        noise: trainer(
            tmp_path / noise,
            rollout={"solver": solver, "num_inference_steps": 4, "micro_batch_size": 5},
            algorithm={
                **{"type": algorithm, "noise": noise, "timestep_stop": 0.5},
                **{"timesteps_per_image": 2, "kl_timesteps": 1},
            },
        )
        for noise in ("fresh", "rollout")
    }
    rows = {noise: run.train_update() for noise, run in runs.items()}
    assert rows["rollout"]["reward"] == rows["fresh"]["reward"]
    assert 0 < rows["rollout"]["grad_norm"] != rows["fresh"]["grad_norm"]
    assert rows["rollout"]["forwards_per_image"] == rows["fresh"]["forwards_per_image"]


def test_several_updates_per_rollout_use_the_lagged_policy(tmp_path):
    run = trainer(tmp_path, training={"updates_per_rollout": 3})
    row = run.train_update()
    assert run.policy_update.rollout_policy == lora.LAGGED
    assert run.progress.step == 3
    assert row["ratio"] != 1.0  # the second and third step are off policy
    assert trainer(tmp_path / "b").train_update()["ratio"] == 1.0


def test_groups_without_a_signal_are_dropped(tmp_path):
    def flat_for_squares(images, prompts, metadata):
        output = redness(images, prompts, metadata)
        return RewardOutput(
            np.where([i < 4 for i in range(len(prompts))], 0.5, output.values).astype(np.float32)
        )

    run = trainer(tmp_path, flat_for_squares)
    assert run.train_update()["kept"] == 8
    keep = trainer(tmp_path / "b", flat_for_squares, training={"drop_uninformative": False})
    assert keep.train_update()["kept"] == 12


def test_constant_rewards_change_nothing_and_do_not_crash(tmp_path, caplog):
    run = trainer(tmp_path, lambda images, p, m: RewardOutput(np.ones(len(p), np.float32)))
    before = weights(run)
    row = run.train_update()
    assert row["kept"] == 0
    assert torch.equal(weights(run), before)
    assert "nothing to learn" in caplog.text


def test_failed_rewards_are_counted_and_left_out(tmp_path):
    def sometimes(images, prompts, metadata):
        values = redness(images, prompts, metadata).values.copy()
        values[[0, 5]] = np.nan
        return RewardOutput(values)

    row = trainer(tmp_path, sometimes).train_update()
    assert row["failed_rewards"] == 2
    assert row["kept"] == 10
    assert np.isfinite(row["reward"])


def test_a_rollout_without_any_reward_saves_and_stops(tmp_path):
    run = trainer(tmp_path)
    run.train_update()
    run.rollouts.scorer = BackgroundScorer(
        lambda images, p, m: RewardOutput(np.full(len(p), np.nan, np.float32))
    )
    with pytest.raises(TrainingError, match="update 2: no image could be scored"):
        run.train_update()
    again = trainer(tmp_path)
    assert again.resume()
    assert again.progress.update == 1
    assert torch.equal(weights(again), weights(run))


def test_a_bfloat16_base_trains_without_autocast(tmp_path, monkeypatch):
    build = tiny.MODELS["sd3"]

    def half():
        model = build()
        model.pipeline.to(torch.bfloat16)
        return model

    monkeypatch.setitem(tiny.MODELS, "sd3", half)
    row = trainer(tmp_path).train_update()
    assert row["ratio"] == 1.0
    assert np.isfinite(row["grad_norm"])


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path):
    run = trainer(tmp_path)
    run.train_update()
    run.save()
    before = weights(run)
    make = run.rollouts.make

    def spoil_the_model(*arguments):
        rollout = make(*arguments)
        with torch.no_grad():
            next(iter(run.model.pipeline.transformer.pos_embed.parameters())).fill_(torch.nan)
        return rollout

    run.rollouts.make = spoil_the_model
    run.rollouts.scorer = BackgroundScorer(
        lambda images, p, m: RewardOutput(np.arange(len(p), dtype=np.float32))
    )
    with pytest.raises(TrainingError, match="gradient of update 2 is not finite.*000001"):
        run.train_update()
    assert torch.equal(weights(run), before)


def test_impossible_resolution_is_refused_before_the_first_rollout(tmp_path):
    with pytest.raises(ValueError, match="multiples of 4 pixels"):
        trainer(tmp_path, rollout={"height": 18, "width": 16})


class TestPlan:
    def plan(self, update=1, **kwargs):
        config = settings("x").rollout
        return make_plan(
            load_prompts("shapes:train"),
            config,
            seed=0,
            update=update,
            tasks=PromptsConfig(**kwargs),
        )

    def test_prompts_are_distinct_and_tasks_balanced(self):
        tasks = []
        for update in range(200):
            plan = self.plan(update)
            assert len({p.text for p in plan.prompts}) == 3
            tasks += [p.task for p in plan.prompts]
        assert all(abs(tasks.count(t) / len(tasks) - 1 / 6) < 0.06 for t in set(tasks))
        assert len(set(tasks)) == 6

    def test_weights_say_how_often_a_task_is_drawn(self):
        weights = {"single_object": 0, "colors": 0.5, "position": 2.0}
        plans = [self.plan(u, task_weights=weights).prompts for u in range(400)]
        tasks = [p.task for plan in plans for p in plan]
        total = 0.5 + 2.0 + 3  # and one for each of the three others
        for task in {p.task for p in load_prompts("shapes:train")}:
            share = tasks.count(task) / len(tasks)
            assert share == pytest.approx(weights.get(task, 1.0) / total, abs=0.03)
        assert all(len({p.text for p in plan}) == 3 for plan in plans)

    def test_a_task_with_too_few_prompts_is_filled_up_from_the_others(self):
        few = [p for p in load_prompts("shapes:train") if p.task == "single_object"][:1]
        many = [p for p in load_prompts("shapes:train") if p.task == "counting"][:9]
        plan = make_plan(
            few + many,
            settings("x", rollout={"prompts_per_update": 6}).rollout,
            seed=0,
            update=1,
            tasks=PromptsConfig(),
        )
        assert sorted(p.task for p in plan.prompts) == ["counting"] * 5 + ["single_object"]

    def test_wrong_weights_are_refused(self, tmp_path):
        with pytest.raises(UsageError, match="did you mean 'counting'"):
            trainer(tmp_path, prompts={"task_weights": {"count": 2.0}})
        names = {p.task for p in load_prompts("shapes:train")}
        with pytest.raises(UsageError, match="every task"):
            trainer(tmp_path, prompts={"task_weights": dict.fromkeys(names, 0.0)})
        with pytest.raises(ConfigError, match=r"task_weights\.counting: .*-1"):
            PromptsConfig(task_weights={"counting": -1.0})

    def test_too_few_prompts_are_all_drawn_before_one_returns(self):
        prompts = [Prompt(text) for text in "abc"]
        for wanted in (2, 3, 7):
            config = settings("x", rollout={"prompts_per_update": wanted}).rollout
            plans = [
                make_plan(prompts, config, seed=0, update=u, tasks=PromptsConfig())
                for u in (1, 1, 2)
            ]
            counts = Counter(p.text for p in plans[0].prompts)
            assert sum(counts.values()) == wanted
            assert max(counts.values()) - min(counts[p.text] for p in prompts) <= 1
            assert [p.text for p in plans[0].prompts] == [p.text for p in plans[1].prompts]
            assert len(set(plans[0].seeds)) == wanted * 4, "each has noise of its own"
        assert [p.text for p in plans[0].prompts] != [p.text for p in plans[2].prompts]

    def test_a_task_without_weight_is_not_drawn_however_few_are_left(self):
        prompts = [Prompt(str(i), {"tag": "a" if i < 2 else "b"}) for i in range(9)]
        config = settings("x", rollout={"prompts_per_update": 5}).rollout
        tasks = PromptsConfig(task_weights={"b": 0.0})
        plan = make_plan(prompts, config, seed=0, update=1, tasks=tasks)
        assert sorted(Counter(p.text for p in plan.prompts).values()) == [2, 3]

    def test_repeated_prompts_are_told(self, tmp_path):
        wanted = {"prompts_per_update": 700}
        (notice,) = check_prompts(load_prompts("shapes:train"), settings(tmp_path, rollout=wanted))
        assert "is 700, and prompts.train=shapes:train has 652 to draw" in notice
        assert "rollout.prompts_per_update=652 draws each once" in notice
        weights = {"task_weights": {"color_attr": 0.0, "position": 0.0}}
        config = settings(tmp_path, rollout={"prompts_per_update": 60}, prompts=weights)
        (notice,) = check_prompts(load_prompts("shapes:train"), config)
        assert "has 52 to draw" in notice

    def test_weights_of_a_recipe_are_dropped_for_prompts_without_its_tasks(self, tmp_path):
        """A file has its own tasks, or none; a misspelt one is an error all the same."""
        weights = {"counting": 2.0, "position": 0.5}

        def told(prompts, **more):
            tasks = {"train": "mine.txt", "task_weights": weights | more}
            config = settings(tmp_path, prompts=tasks, rollout={"prompts_per_update": 2})
            return check_prompts(prompts, config)

        (notice,) = told([Prompt("a"), Prompt("b")])
        assert notice.startswith(
            "prompts.task_weights: no prompt of mine.txt has the task counting, position;"
        )
        some = [Prompt("a", {"tag": "counting"}), Prompt("b", {"tag": "style"})]
        (notice,) = told(some)
        assert "has the task position;" in notice
        assert told([*some, Prompt("c", {"tag": "position"})]) == []
        with pytest.raises(UsageError, match="'styles'; did you mean 'style'"):
            told(some, styles=1.0)

    def test_unbalanced_plans_follow_the_file(self):
        tasks = [p.task for u in range(100) for p in self.plan(u, balance_tasks=False).prompts]
        assert tasks.count("color_attr") > 200

    def test_is_a_function_of_seed_and_update(self):
        assert self.plan(3).seeds == self.plan(3).seeds
        assert self.plan(3).seeds != self.plan(4).seeds
        assert len(set(self.plan(3).seeds)) == 12

    @pytest.mark.parametrize("world", [1, 2, 5, 13])
    def test_shares_cover_every_image_once(self, world):
        plan = self.plan()
        assert [i for r in range(world) for i in plan.shard(r, world)] == list(range(12))


def test_two_processes_give_what_one_gives(tmp_path):
    results = [results_of(world, "online_runs", tmp_path / str(world)) for world in (1, 2)]
    assert set(results[0]) == {*ONLINE, "gathered"}
    assert torch.equal(*(result["gathered"].view(torch.int32) for result in results))
    for kind in ONLINE:
        (one, rows, policies), (two, others, same) = (result[kind] for result in results)
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(policies, same, rtol=1e-3, atol=1e-4)
        for name in ("reward", "reward_group_std", "diversity", "grad_norm", "forwards_per_image"):
            found = [r[name] for r in others]
            assert [r[name] for r in rows] == pytest.approx(found, rel=2e-3, abs=1e-4), name


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_the_rate_follows_diffusers_schedules(name):
    """diffusers starts its warm-up at zero, which wastes a step: ours is theirs one step on, and equal without one."""
    config = OptimizerConfig(lr_scheduler=name, warmup_updates=0)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=7)
    for step in range(8):
        assert lr_factor(step, config, total=7) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    warm = OptimizerConfig(lr_scheduler=name, warmup_updates=4)
    assert [lr_factor(s, warm, total=20) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(
    ("guidance", "ema_kl_beta", "expected"),
    [
        (None, 0.0, 3 + 2 * 2.2 + 1),  # rollout, policy, reference
        (None, 1.0, 3 + 2 * 2.2 + 2),  # and the lagged policy
        (3.0, 0.0, 3 + 2 * 2.2 + 2),  # a guided reference is two
    ],
)
def test_forwards_are_counted(tmp_path, guidance, ema_kl_beta, expected):
    run = trainer(
        tmp_path,
        algorithm={"reference_guidance_scale": guidance, "ema_kl_beta": ema_kl_beta},
        training={"micro_batch_size": 5},
    )
    assert run.train_update()["forwards_per_image"] == pytest.approx(expected)
    assert run.train_update()["forwards_per_image"] == pytest.approx(expected)  # of this update


def test_an_image_that_is_not_finite_has_no_reward(tmp_path):
    """Whatever a reward makes of its pixels: it is left out, and training goes on."""
    run = trainer(tmp_path)
    decode = run.model.decode_checked

    def broken(latents):
        images, finite = decode(latents)
        finite[0] = False
        return images, finite

    run.model.decode_checked = broken
    row = run.train_update()
    assert row["failed_rewards"] == 1
    assert all(p.isfinite().all() for p in run.parameters)
