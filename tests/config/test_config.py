"""Configurations: recipes, overrides, and errors that name the field and the nearest valid name."""

import re
import subprocess
import sys

import pytest

from diffalign import config
from diffalign.config import ConfigError, PreferenceRunConfig, load
from diffalign.config.methods import algorithm_class
from diffalign.pipelines.registry import available


def test_every_recipe_loads_and_is_dumped_and_read_back(tmp_path):
    assert "demo" in config.recipes()
    for name in config.recipes():
        loaded = load(name)
        (tmp_path / "copy.yaml").write_text(config.dump(loaded))
        assert load(tmp_path / "copy.yaml") == loaded
        assert config.describe_recipes()[name]
        assert loaded.model.name in available()  # what a recipe trains is there, or on a hub


def test_overrides_by_path_and_by_diffusers_names():
    loaded = load(
        "demo",
        [
            "--optimizer.learning_rate=3e-4",
            "--rank",
            "8",
            "--resolution=128",
            "--seed=7",
            "--model.gradient_checkpointing",
            "--rewards.jpeg=0.5",
            "--lora_layers=attn.to_q,attn.to_k",
            "--mixed_precision=no",
            "--revision=1e5",
            "--max_train_steps=1e2",
            "--enable_xformers_memory_efficient_attention",
            "--training.max_minutes=null",
        ],
    )
    assert loaded.optimizer.learning_rate == 3e-4
    assert (loaded.lora.rank, loaded.lora.targets) == (8, ["attn.to_q", "attn.to_k"])
    assert (loaded.model.revision, loaded.training.num_updates) == ("1e5", 100)
    assert (loaded.training.mixed_precision, loaded.model.attention_backend) == ("no", "xformers")
    assert (loaded.rollout.height, loaded.rollout.width) == (128, 128)
    assert loaded.training.seed == 7
    assert loaded.model.gradient_checkpointing is True
    assert loaded.rewards == {"verifier": 1.0, "jpeg": 0.5}
    assert loaded.training.max_minutes is None


def test_rewards_as_a_whole_replace_those_of_the_recipe():
    assert load("demo", ["--rewards={jpeg: 2}"]).rewards == {"jpeg": 2.0}


def test_an_algorithm_is_chosen_by_its_type():
    chosen = load(None, ["--algorithm.type=diffusion_nft", "--algorithm.mix=0.1"]).algorithm
    assert isinstance(chosen, config.DiffusionNFTConfig)
    assert (chosen.mix, chosen.lag_max, chosen.ema_kl_beta) == (0.1, 0.5, 0.0)
    assert isinstance(load(None).algorithm, config.AWMConfig)
    assert {name: algorithm_class(name).type for name in config.METHODS} == {
        name: name for name in config.METHODS
    }
    unmerged = "--rollout.merge_lora=false"
    other = load("demo", ["--algorithm.type=flow_grpo", "--algorithm.window_size=2", unmerged])
    assert other.algorithm == config.FlowGRPOConfig(window_size=2)  # nothing of the recipe's AWM
    assert other.rollout == load("demo", [unmerged]).rollout
    for name in config.METHODS:
        loaded = load(None, [f"--algorithm.type={name}"])
        assert config.decode(config.to_dict(loaded)) == loaded
    with pytest.raises(ConfigError, match=r"algorithm.type: unknown value \['awm'\]"):
        config.decode({"algorithm": {"type": ["awm"]}})
    with pytest.raises(ConfigError, match=r"algorithm.kl_beta: expected a value, got null"):
        load(None, ["--algorithm.kl_beta=null"])
    with pytest.raises(ConfigError, match=r"rollout.height: expected a number, got True"):
        load(None, ["--rollout.height=true"])
    with pytest.raises(ConfigError, match="did you mean 'diffusion_nft'"):
        load(None, ["--algorithm.type=difusion_nft"])
    with pytest.raises(ConfigError, match=r"unknown setting 'algorithm.mix'"):
        load(None, ["--algorithm.mix=0.1"])
    with pytest.raises(ConfigError, match=r"algorithm.timesteps_per_image.*many"):
        load(None, ["--algorithm.timesteps_per_image=many"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--optimizer.learing_rate=1"],
            "'optimizer.learing_rate'; did you mean 'optimizer.learning_rate'",
        ),
        (["--optimiser.learning_rate=1"], "did you mean 'optimizer"),
        (["--learnin_rate=1"], "did you mean 'learning_rate'"),
        (["--optimizer.learning_rate=fast"], "optimizer.learning_rate: .*fast"),
        (["--optimizer.learning_rate=-1"], "optimizer.learning_rate: must be positive"),
        (["--optimizer.learning_rate=inf"], "optimizer.learning_rate: must be finite, got inf"),
        (["--optimizer.learning_rate=nan"], "optimizer.learning_rate: must be positive, got nan"),
        (["--optimizer.weight_decay=-1"], "optimizer.weight_decay: must be finite and not neg"),
        (["--training.eval_every=-1"], "training.eval_every: must not be negative; 0 for none"),
        (["--training.sample_every=-1"], "training.sample_every: must not be negative"),
        (["--training.checkpoint_every=0"], "training.checkpoint_every: must be at least 1"),
        (["--training.num_updates=2.5"], "training.num_updates: expected a whole number"),
        (["--training.num_updates=true"], "training.num_updates: expected a number"),
        (["--training.num_updates=many"], "training.num_updates"),
        (["--rollout.group_size=1"], "rollout.group_size: a group needs at least 2"),
        (
            ["--algorithm.weight=ghubr"],
            "algorithm.weight: unknown value 'ghubr'; did you mean 'ghuber'",
        ),
        (["--algorithm.type=grpo"], "algorithm.type"),
        (["--algorithm.kl_timesteps=9"], "algorithm.kl_timesteps: must lie in"),
        (["--model=shapes-sd3"], "model: expected a group of settings"),
        (["--rewards={}"], "rewards: name at least one"),
        (["--rewards=verifier"], "rewards"),
        (["--model.dtype=int8"], "model.dtype"),
        (["--mixed_precision=fp16"], "training.mixed_precision"),
        (["--model.attention_backend=xformers"], "needs training.mixed_precision=no"),
        (["--evaluation.images_per_prompt=0"], "evaluation.images_per_prompt"),
        (["--optimizer.betas=[0.9, 1.5]"], "optimizer.betas"),
        (["--rewards.verifier=.nan"], "rewards.verifier: needs a finite weight"),
        (["learning_rate=1"], "expected --key=value"),
    ],
)
def test_errors_name_the_field(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load("demo", overrides)


def test_unknown_recipes_and_files(tmp_path):
    with pytest.raises(ConfigError, match="unknown recipe 'demmo'; did you mean 'demo'"):
        load("demmo")
    with pytest.raises(ConfigError, match="does not exist"):
        load("nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="mapping"):
        load(tmp_path / "list.yaml")


def test_differences_are_listed_by_path():
    a, b = (config.to_dict(load("demo", o)) for o in ([], ["--lora.rank=4", "--rewards.jpeg=1"]))
    # alpha keeps its ratio to the rank
    expected = ["lora.rank: 32, 4", "lora.alpha: 64.0, 8.0", "rewards.jpeg: None, 1.0"]
    assert config.differences(a, b) == expected


@pytest.mark.parametrize(
    "module",
    [
        "diffalign.config",
        "diffalign.cli",
        "diffalign.rewards.registry",
        "diffalign.pipelines.registry",
    ],
)
def test_light_modules_do_not_import_torch(module):
    code = f"import sys, {module} as m; m and sys.exit(any(n in sys.modules for n in ('torch', 'diffusers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_recipe_extends_another(tmp_path):
    base, top = tmp_path / "base.yaml", tmp_path / "top.yaml"
    base.write_text(
        "rewards: {verifier: 1.0}\nlora: {rank: 8, alpha: 4}\nalgorithm: {weight: t, kl_beta: 0.5}\n"
        "prompts: {task_weights: {counting: 2.0, colors: 3.0}}\n"
    )
    top.write_text(
        "extends: base.yaml\nrewards: {jpeg: 2.0}\nlora: {rank: 16}\nalgorithm: {kl_beta: 0.25}\n"
        "prompts: {task_weights: {colors: 1.0}}\n"
    )
    found = config.load(top, ["--lora.alpha=1"])
    assert found.rewards == {"jpeg": 2.0}
    assert (found.lora.rank, found.lora.alpha) == (16, 1.0)
    assert (found.algorithm.weight, found.algorithm.kl_beta) == ("t", 0.25)
    assert found.prompts.task_weights == {"colors": 1.0}


def test_another_algorithm_inherits_nothing_of_the_extended_one(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "extends: demo\nalgorithm: {type: flow_grpo, window_size: 2}\nrollout: {merge_lora: false}\n"
    )
    found = config.load(file)
    assert found.algorithm == config.FlowGRPOConfig(window_size=2)
    assert found.lora == config.load("demo").lora


def test_a_circle_of_recipes_is_an_error(tmp_path):
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text(f"extends: {b}\n")
    b.write_text(f"extends: {a}\n")
    with pytest.raises(ConfigError, match="extends itself"):
        config.load(a)
    a.write_text("extends: demmo\n")
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        config.load(a)


def test_flags_of_diffusers_preference_scripts(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = "--train_data_dir=pairs --beta_dpo=900 --loss_type=ipo --resolution=768 --max_train_samples=50"
    flags += " --random_flip --train_batch_size=4 --gradient_accumulation_steps=16"
    flags += " --num_inference_steps=20 --guidance_scale=7.5"
    found = load("inversion-dpo-sd1.5", flags.split())
    assert isinstance(found, PreferenceRunConfig)
    assert (found.pairs.source, found.pairs.limit, found.pairs.random_flip) == ("pairs", 50, True)
    assert (found.algorithm.beta, found.algorithm.loss_type) == (900, "ipo")
    assert (found.images.height, found.images.width) == (768, 768)
    assert (found.training.micro_batch_size, found.training.pairs_per_update) == (4, 128)
    assert found.pairs.inversion.steps == 20
    assert found.evaluation.guidance_scale == 7.5


def test_the_algorithm_may_stand_apart_from_its_flag():
    found = load(None, ["--resolution=64", "--algorithm.type", "diffusion_dpo"])
    assert isinstance(found, PreferenceRunConfig)
    assert found.images.height == 64


def test_a_window_that_no_schedule_has_room_for():
    """Which steps can be stochastic depends on the model, that the last one cannot does not."""
    flags = ["--algorithm.type=flow_grpo", "--rollout.num_inference_steps=6"]
    flags.append("--rollout.merge_lora=false")
    for more in (["--algorithm.window_size=5"], ["--algorithm.window_size=null"]):
        load("demo", [*flags, *more])
    for more, most in (
        (["--algorithm.window_size=50"], 5),
        (["--algorithm.window_size=6"], 5),
        (["--algorithm.window_size=4", "--algorithm.window_stop=0.5"], 3),
        (["--rollout.num_inference_steps=1"], 0),
    ):
        with pytest.raises(
            ConfigError, match=rf"algorithm\.window_size: .* of which {most} at most"
        ):
            load("demo", [*flags, *more])


def test_settings_are_checked_against_the_chosen_algorithm_alone():
    apart = ["--algorithm.type=diffusion_dpo", "--pairs.inversion.states=0"]
    assert load("inversion-dpo", apart).states == 0
    with pytest.raises(ConfigError, match=r"pairs\.inversion\.states: inversion_dpo"):
        load("inversion-dpo", ["--pairs.inversion.states=0"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--algorithm.variant=figur", "did you mean 'figure'"),
        ("--algorithm.loss_type=orpo", "algorithm.loss_type: unknown value 'orpo'"),
        ("--algorithm.safeguard=1.5", "algorithm.safeguard: must lie in 0..1"),
        ("--pairs.inversion.states=0", "pairs.inversion.states: inversion_dpo trains on 1 states"),
        ("--pairs.inversion.solver=heun", "pairs.inversion.solver: unknown value 'heun'"),
        ("--pairs.validation=1", "pairs.validation: must lie in 0..1"),
        ("--pairs.tie=drop", "unknown setting 'pairs.tie'; did you mean 'pairs.ties'"),
        (
            "--gradient_accumulation_steps=many",
            "gradient_accumulation_steps: expected a whole number",
        ),
        ("--rollout.group_size=4", "unknown setting 'rollout'"),
    ],
)
def test_preference_settings_that_cannot_be(override, message):
    with pytest.raises(ConfigError, match=message):
        load("inversion-dpo", [override])


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("awm-sd3.5-medium-geneval", 20.8),
        ("awm-sd3.5-medium-ocr", 20.8),
        ("awm-sana", 20.8),
        # of these three are forwards that checkpointing makes again
        ("awm-flux.1-dev-ocr", 20.6),
        ("awm-flux.1-dev-pickscore", 20.6),
        ("awm-flux.1-dev", 21.6),
    ],
)
def test_forwards_an_image_of_recipes_for_real_models(recipe, expected):
    """The release of AWM needs 39. That a run counts what this sum says is asserted in test_online."""
    c = load(recipe, [])
    trained = 2.2 + c.model.gradient_checkpointing
    distances = (c.algorithm.kl_beta > 0) + (c.algorithm.ema_kl_beta > 0)
    found = (
        c.rollout.num_inference_steps
        + c.algorithm.timesteps_per_image * trained
        + c.algorithm.kl_timesteps * distances
    )
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("flag", "path"),
    [
        ("--seed=18446744073709551616", "training.seed"),
        ("--seed=-1", "training.seed"),
        ("--evaluation.seed=9223372036854775808", "evaluation.seed"),
        ("--guidance_scale=nan", "rollout.guidance_scale"),
        ("--evaluation.guidance_scale=-1", "evaluation.guidance_scale"),
        ("--rollout.height=0", "rollout.height"),
        ("--rollout.width=-64", "rollout.width"),
        ("--train_batch_size=0", "training.micro_batch_size"),
        ("--rollout.micro_batch_size=-3", "rollout.micro_batch_size"),
        ("--learning_rate=nan", "optimizer.learning_rate"),
        ("--learning_rate=.inf", "optimizer.learning_rate"),
        ("--lora.alpha=.inf", "lora.alpha"),
        ("--algorithm.kl_beta=nan", "algorithm.kl_beta"),
        ("--algorithm.clip_range=.nan", "algorithm.clip_range"),
        ("--training.max_minutes=0", "training.max_minutes"),
        ("--training.total_minutes=-2", "training.total_minutes"),
        ("--model.max_sequence_length=0", "model.max_sequence_length"),
        ("--rollout.prompts_per_update=99999999999", "rollout.prompts_per_update"),
        ("--training.num_updates=1000001", "training.num_updates"),
        ("--lora.rank=100000", "lora.rank"),
        ("--rollout.height=99999", "rollout.height"),
    ],
)
def test_numbers_have_ranges(flag, path):
    with pytest.raises(ConfigError, match=rf"^{re.escape(path)}: "):
        load("awm-shapes-sd3", [flag])


@pytest.mark.parametrize(
    ("flags", "alpha"),
    [
        (["--rank=8"], 16.0),
        (["--lora.rank=64"], 128.0),
        (["--rank=8", "--lora_alpha=8"], 8.0),
        (["--lora.alpha=5"], 5.0),
        ([], 64.0),
    ],
)
def test_a_rank_alone_keeps_the_ratio_of_the_recipe(flags, alpha, caplog):
    """diffusers' scripts let alpha follow the rank, too; theirs is the rank itself."""
    assert load("awm-shapes-sd3", flags).lora.alpha == alpha
    assert ("lora.alpha is" in caplog.text) == (flags in (["--rank=8"], ["--lora.rank=64"]))


def test_a_rank_alone_in_a_recipe_that_extends_keeps_the_ratio(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: inversion-dpo\nlora:\n  rank: 4\n")
    assert load(recipe).lora.alpha == 4.0
    assert load(recipe, ["--rank=8"]).lora.alpha == 8.0
