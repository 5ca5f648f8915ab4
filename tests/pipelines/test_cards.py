"""How models are drawn with where nobody says: published settings, saved ones, those of the stock call."""

import json

import pytest
import tiny
import torch
from diffusers import LCMScheduler

from diffalign.cli.main import main
from diffalign.core.errors import UserError
from diffalign.pipelines.cards import CARD, PUBLISHED, CardError, DrawingCard, card_of
from diffalign.pipelines.registry import MODELS
from diffalign.pipelines.saving import save_pipeline


def test_every_named_model_has_a_card():
    assert set(MODELS) <= set(PUBLISHED)


@pytest.mark.parametrize(
    ("name", "steps", "guidance"),
    [
        ("sd1.5", 50, 7.5),
        ("stabilityai/stable-diffusion-xl-base-1.0", 50, 5.0),
        ("stabilityai/sdxl-turbo", 1, None),
        ("sd3.5-medium", 40, 4.5),
        ("stabilityai/stable-diffusion-3.5-large", 28, 3.5),
        ("stabilityai/stable-diffusion-3.5-large-turbo", 4, None),
        ("stabilityai/stable-diffusion-3-medium-diffusers", 28, 7.0),
        ("black-forest-labs/FLUX.1-dev", 50, 3.5),
        ("flux.1-schnell", 4, None),
        ("sana-1.6b", 20, 4.5),
        ("shapes-sd3", 10, None),
        ("shapes-sd-lcm", 4, None),
    ],
)
def test_published_settings(name, steps, guidance):
    """Neither a weight nor the hub is needed."""
    card = card_of(name)
    assert (card.num_inference_steps, card.guidance_scale) == (steps, guidance)
    assert card.batch_size <= 16 or name.startswith("shapes")


@pytest.mark.parametrize(
    ("family", "steps", "guidance"),
    [("sd", 50, 7.5), ("sdxl", 50, 5.0), ("sd3", 28, 7.0), ("flux", 28, 3.5), ("sana", 20, 4.5)],
)
def test_a_folder_is_drawn_as_its_stock_call_draws(family, steps, guidance, tmp_path):
    getattr(tiny, f"{family}_pipeline")().save_pretrained(tmp_path)
    card = card_of(str(tmp_path))
    assert (card.num_inference_steps, card.guidance_scale) == (steps, guidance)


def test_few_step_students_are_known_by_scheduler_or_layout(tmp_path):
    pipeline = tiny.sd_pipeline()
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "lcm")
    flux = tiny.flux_pipeline()
    flux.save_pretrained(tmp_path / "schnell")
    file = tmp_path / "schnell" / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"guidance_embeds": False}))
    for name in ("lcm", "schnell"):
        card = card_of(str(tmp_path / name))
        assert (card.num_inference_steps, card.guidance_scale) == (4, None)


def test_a_saved_card_comes_first(tmp_path):
    card = DrawingCard(3, 2.5, 7, 32, 16, "float32")
    save_pipeline(tiny.sd_pipeline(), tmp_path, card=card)
    assert card_of(str(tmp_path)) == card


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"num_inference_steps": "4"}',
        '{"num_inference_steps": 0}',
        '{"num_inference_steps": 4, "dtype": "int3"}',
        '{"num_inference_steps": 4, "guidance_scale": "x"}',
    ],
)
def test_a_damaged_card_is_one_line(text, tmp_path):
    (tmp_path / CARD).write_text(text)
    with pytest.raises(CardError, match="is damaged") as raised:
        DrawingCard.load(tmp_path / CARD)
    assert "\n" not in str(raised.value)


@pytest.fixture
def folder(tmp_path):
    save_pipeline(
        tiny.sd_pipeline(), tmp_path / "sd", card=DrawingCard(2, None, 3, 16, 16, "float32")
    )
    return tmp_path / "sd"


def test_settings_are_said_before_drawing_and_flags_win(folder, tmp_path, capsys):
    flags = [f"--output_dir={tmp_path / 'images'}", "--images_per_prompt=1"]
    assert not main(["generate", "a red circle", f"--model={folder}", *flags])
    assert "2 steps, no guidance, 16 x 16 px, 3 at a time, float32" in capsys.readouterr().out
    more = ["--num_inference_steps=1", "--guidance_scale=3", "--dtype=bfloat16"]
    assert not main(["generate", "a red circle", f"--model={folder}", *flags, *more])
    assert "1 steps, guidance 3, 16 x 16 px, 3 at a time, bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("scheduler", "changes", "steps", "message"),
    [
        ("LCMScheduler", {}, 51, "makes no 51 steps"),
        ("DDIMScheduler", {}, 1001, "makes no 1001 steps"),
        ("DDIMScheduler", {}, 0, "at least 1"),
        ("EDMEulerScheduler", {}, 4, "has no noise schedule of Stable Diffusion"),
        ("IPNDMScheduler", {}, 4, "has no noise schedule of Stable Diffusion"),
        ("DDIMScheduler", {"prediction_type": "sample"}, 4, "prediction_type 'sample'"),
        ("FlowMatchEulerDiscreteScheduler", {}, 4, "has no noise schedule of Stable Diffusion"),
    ],
)
def test_schedulers_are_refused_before_weights_are_read(
    scheduler, changes, steps, message, folder, capsys, monkeypatch
):
    import diffusers

    own = getattr(diffusers, scheduler).from_config(
        {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", **changes}
    )
    own.save_pretrained(folder / "scheduler")
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", None)
    flags = [f"--num_inference_steps={steps}", "--images_per_prompt=1"]
    assert main(["generate", "a red circle", f"--model={folder}", *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_flow_needs_a_scheduler_of_flows(tmp_path):
    pipeline = tiny.sd3_pipeline()
    pipeline.scheduler = tiny.sd_pipeline().scheduler
    pipeline.save_pretrained(tmp_path)
    from diffalign.pipelines.registry import load_model

    with pytest.raises(UserError, match="DDIMScheduler: sd3 models are rectified flows"):
        load_model(str(tmp_path), dtype=torch.float32)
