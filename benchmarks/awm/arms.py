"""Arms that are compared with AWM: recipes with their overrides."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.common.record import BenchOptions
from diffalign.config import RunConfig, load


@dataclass(frozen=True)
class Arm:
    """Recipe with the overrides of one arm."""

    recipe: str
    overrides: tuple[str, ...] = ()


AWM = "awm-shapes-sd3"
EVERY = 20
"""Updates between two evaluations."""
EARLY = Arm(
    AWM,
    (f"--training.num_updates={EVERY}", "--training.eval_every=4", "--training.max_minutes=null"),
)
"""AWM until its first evaluation, scored more often.

The other arms end at scores that AWM passes in this range.
"""
RIVALS = {
    "flow_grpo": Arm("flow-grpo-shapes-sd3"),
    "diffusion_nft": Arm("diffusion-nft-shapes-sd3"),
}
NEWER = {
    "crd": Arm("crd-shapes-sd3"),
    "dgpo": Arm("dgpo-shapes-sd3"),
    "fdfo": Arm("fdfo-shapes-sd3"),
    "flow_dppo": Arm("flow-dppo-shapes-sd3"),
}
"""Methods that came after AWM, with the settings of their recipes, which are not tuned."""
KEEP_ALL = "--training.drop_uninformative=false"
UNGUIDED = ("--algorithm.reference_guidance_scale=null", "--prompts.task_weights=null")
RELEASED = {
    "released awm": Arm(
        AWM,
        (
            *UNGUIDED,
            "--lora.targets=null",
            "--algorithm.weight=ghuber",
            "--algorithm.timesteps_per_image=6",
            "--algorithm.kl_timesteps=6",
            "--algorithm.timestep_start=0.07",
            "--algorithm.timestep_stop=0.86",
            "--algorithm.kl_beta=0.001",
            "--algorithm.ema_kl_beta=1",
            "--rollout.num_inference_steps=14",
            KEEP_ALL,
        ),
    ),
    "released flow_grpo": Arm(
        "flow-grpo-shapes-sd3",
        (
            *UNGUIDED,
            "--lora.targets=null",
            "--algorithm.dynamics=sde",
            "--algorithm.noise_level=0.7",
            "--algorithm.window_size=null",
            "--algorithm.window_stop=1",
            "--algorithm.kl_beta=0.04",
            "--rollout.num_inference_steps=10",
            KEEP_ALL,
        ),
    ),
    "released diffusion_nft": Arm(
        "diffusion-nft-shapes-sd3",
        (
            *UNGUIDED,
            "--lora.targets=null",
            "--algorithm.timesteps_per_image=9",
            "--algorithm.kl_timesteps=9",
            "--algorithm.timestep_stop=0.9",
            "--algorithm.kl_beta=1e-4",
            "--rollout.num_inference_steps=10",
        ),
    ),
}
"""Hyper-parameters of the releases for GenEval.

Parts that this loop does not implement are left out: Flow-GRPO's guidance in training, the noise of AWM's rollouts,
and DPM-Solver in DiffusionNFT's.
"""
LEVERS = {
    "no guidance in the reference": Arm(
        AWM, ("--algorithm.reference_guidance_scale=null", "--algorithm.kl_beta=0.01")
    ),
    "uniform tasks": Arm(AWM, ("--prompts.task_weights=null",)),
    "two updates a rollout": Arm(AWM, ("--training.updates_per_rollout=2",)),
    "noise of the rollout": Arm(AWM, ("--algorithm.noise=rollout",)),
    "one noise a group": Arm(AWM, ("--algorithm.noise=group",)),
    "four timesteps and one noise a group": Arm(
        AWM, ("--algorithm.timesteps_per_image=4", "--algorithm.noise=group")
    ),
}
"""AWM's recipe with one setting changed.

The arm without guidance uses the best distance weight of those that were tried.
"""
HOUR = "an hour"
LONG = {
    HOUR: Arm(
        "awm-shapes-sd3-long",
        ("--training.max_minutes=65", "--training.num_updates=20000", "--training.eval_every=50"),
    )
}
"""AWM with settings for runs that are longer than minutes."""
COSTS = {
    "released timesteps and distances": Arm(
        AWM,
        (
            "--algorithm.timesteps_per_image=6",
            "--algorithm.timestep_stop=1",
            "--algorithm.kl_timesteps=6",
        ),
    ),
    "released rollout of 14 steps": Arm(AWM, ("--rollout.num_inference_steps=14",)),
    "no compilation": Arm(AWM, ("--model.compile=false",)),
    "unmerged rollouts": Arm(AWM, ("--rollout.merge_lora=false",)),
    "adams_bashforth in 5 steps": Arm(
        AWM, ("--rollout.solver=adams_bashforth", "--rollout.num_inference_steps=5")
    ),
    "distances on every timestep": Arm(AWM, ("--algorithm.kl_timesteps=2",)),
    "no guidance in the reference": Arm(AWM, ("--algorithm.reference_guidance_scale=null",)),
    "two updates a rollout": LEVERS["two updates a rollout"],
    "groups without a signal kept": Arm(AWM, (KEEP_ALL,)),
    "groups without a signal kept, no compilation": Arm(AWM, (KEEP_ALL, "--model.compile=false")),
}
"""Arms whose cost per update is measured: one setting changed in each."""
NOISES = {
    "1 timestep": Arm(AWM, ("--algorithm.timesteps_per_image=1",)),
    "2 independent timesteps": Arm(AWM, ("--algorithm.timestep_sampling=independent",)),
    "4 timesteps": Arm(AWM, ("--algorithm.timesteps_per_image=4",)),
    "one noise a group": LEVERS["one noise a group"],
    "4 timesteps, one noise a group": LEVERS["four timesteps and one noise a group"],
}
"""Timestep and noise settings under which AWM's expected gradient is the same."""
MINUTES = 6
QUICK = (
    "--model.compile=false",
    "--training.num_updates=2",
    "--training.eval_every=1",
    "--evaluation.images_per_task=4",
    "--rollout.prompts_per_update=3",
)


def configuration(name: str, arm: Arm, seed: int, options: BenchOptions) -> RunConfig:
    """Return the configuration of one arm and seed. A run folder that exists is resumed."""
    overrides = [
        f"--output_dir={options.folder(name, seed)}",
        f"--training.seed={seed}",
        f"--evaluation.seed={1000 + seed}",
        f"--training.max_minutes={MINUTES}",
        "--training.num_updates=100000",
        f"--training.eval_every={EVERY}",
        "--training.sample_every=0",
        *arm.overrides,
        *(QUICK if options.quick else ()),
    ]
    return load(arm.recipe, overrides)
