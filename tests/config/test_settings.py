"""Facts on the fields of settings: free settings, and the flags of diffusers that stand for them."""

import pytest

from diffalign.config.methods import METHODS, run_class
from diffalign.config.settings import aliases_of, free_settings, settings_of

SHARED = {
    "pretrained_model_name_or_path": ("model.name",),
    "revision": ("model.revision",),
    "max_sequence_length": ("model.max_sequence_length",),
    "gradient_checkpointing": ("model.gradient_checkpointing",),
    "rank": ("lora.rank",),
    "lora_alpha": ("lora.alpha",),
    "lora_layers": ("lora.targets",),
    "train_batch_size": ("training.micro_batch_size",),
    "max_train_steps": ("training.num_updates",),
    "mixed_precision": ("training.mixed_precision",),
    "seed": ("training.seed",),
    "report_to": ("training.trackers",),
    "checkpointing_steps": ("training.checkpoint_every",),
    "checkpoints_total_limit": ("training.keep_checkpoints",),
    "learning_rate": ("optimizer.learning_rate",),
    "lr_warmup_steps": ("optimizer.warmup_updates",),
    "lr_scheduler": ("optimizer.lr_scheduler",),
    "adam_weight_decay": ("optimizer.weight_decay",),
    "adam_epsilon": ("optimizer.epsilon",),
    "max_grad_norm": ("optimizer.max_grad_norm",),
}
OWN = {
    "awm": {
        "resolution": ("rollout.height", "rollout.width"),
        "guidance_scale": ("rollout.guidance_scale",),
        "num_inference_steps": ("rollout.num_inference_steps",),
    },
    "inversion_dpo": {
        "resolution": ("images.height", "images.width"),
        "guidance_scale": ("evaluation.guidance_scale",),
        "num_inference_steps": ("pairs.inversion.steps",),
        "beta_dpo": ("algorithm.beta",),
        "loss_type": ("algorithm.loss_type",),
        "dataset_name": ("pairs.source",),
        "train_data_dir": ("pairs.source",),
        "max_train_samples": ("pairs.limit",),
        "random_flip": ("pairs.random_flip",),
        "center_crop": ("pairs.center_crop",),
    },
    "reflow": {
        "resolution": ("teacher.height", "teacher.width"),
        "guidance_scale": ("teacher.guidance_scale",),
        "num_inference_steps": ("evaluation.num_inference_steps",),
        "num_ddim_timesteps": ("teacher.num_inference_steps",),
        "huber_c": ("algorithm.huber_c",),
    },
    "dcgen": {
        "resolution": ("images.height", "images.width"),
        "guidance_scale": ("evaluation.guidance_scale",),
        "num_inference_steps": ("evaluation.num_inference_steps",),
        "train_data_dir": ("latents.images",),
        "max_train_samples": ("latents.limit",),
        "proportion_empty_prompts": ("algorithm.prompt_dropout",),
        "logit_mean": ("algorithm.sigma_mean",),
        "logit_std": ("algorithm.sigma_std",),
        "random_flip": ("latents.random_flip",),
        "center_crop": ("latents.center_crop",),
    },
}


@pytest.mark.parametrize("kind", OWN)
def test_flags_of_diffusers_stand_for_settings(kind):
    assert aliases_of(run_class(kind)) == SHARED | OWN[kind]


@pytest.mark.parametrize("kind", METHODS)
def test_a_resumed_run_may_change_how_it_is_watched_but_not_what_it_computes(kind):
    paths, free = settings_of(run_class(kind)), free_settings(run_class(kind))
    for path in paths:
        name = path.rpartition(".")[2]
        if name in ("micro_batch_size", "cache", "output_dir", "reward_timeout"):
            assert path in free, path
        if path.startswith(("algorithm.", "optimizer.", "lora.", "prompts.", "evaluation.")):
            assert path not in free, path
        if name in ("seed", "total_minutes", "limit", "validation", "num_inference_steps"):
            assert path not in free, path
    shared = {"training.num_updates", "training.trackers", "training.max_minutes", "model.compile"}
    assert shared < free
    assert ("pairs.source" in free) == ("pairs.source" in paths)
