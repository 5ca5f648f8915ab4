"""Whole runs from the command line, on a tiny pipeline on disk."""

from diffalign import cli

SETTINGS = [
    "--model.max_sequence_length=16",
    "--model.dtype=float32",
    "--model.compile=false",
    "--prompts.task_weights=null",
    "--lora.rank=4",
    "--lora.alpha=8",
    "--rewards={jpeg: 1}",
    "--rollout.prompts_per_update=2",
    "--rollout.group_size=3",
    "--rollout.num_inference_steps=2",
    "--algorithm.timesteps_per_image=2",
    "--algorithm.timestep_stop=1.0",
    "--learning_rate=0.001",
    "--training.sample_every=1",
    "--training.checkpoint_every=1",
    "--training.max_minutes=null",
    "--optimizer.lr_scheduler=constant",
    "--evaluation.num_inference_steps=2",
    "--evaluation.images_per_task=3",
]


def train(base, prompts, folder, *more):
    return cli.main(
        [
            "train",
            "demo",
            f"--output_dir={folder}",
            f"--model.name={base}",
            f"--prompts.train={prompts}",
            f"--prompts.evaluation={prompts}",
            *SETTINGS,
            *more,
        ]
    )
