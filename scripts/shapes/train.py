"""Make the Shapes checkpoints from nothing: autoencoder, text encoders, denoiser, pipeline folder. Resumable.

    python -m diffalign.scripts.shapes.train sd3 --work runs/shapes --out diffalign/shapes/checkpoints/shapes-sd3

An hour or two on two CPU cores with AMX (`clip`: ten minutes, at once). Each stage is kept in --work and skipped when
it is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderDC, AutoencoderKL, DiffusionPipeline

from diffalign.autoencoders.images import RenderedImages, quality
from diffalign.autoencoders.trainer import AutoencoderConfig, AutoencoderTrainer, set_scale
from diffalign.core.versions import versions
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.flux import FluxModel
from diffalign.pipelines.sd import SDModel
from diffalign.pipelines.sd3 import SD3Model
from diffalign.scripts.shapes.autoencoder import build_autoencoder, build_deep_autoencoder
from diffalign.scripts.shapes.build import (
    build_flux_pipeline,
    build_sd3_pipeline,
    build_sd_pipeline,
    save_pipeline,
)
from diffalign.scripts.shapes.clip import train_clip
from diffalign.scripts.shapes.denoiser import Captioned, PretrainConfig, Pretraining, make_dataset
from diffalign.scripts.shapes.guidance import GuidanceDistillation
from diffalign.shapes.text import MAX_LENGTH
from diffalign.shapes.world import IMAGE_SIZE

EYES_STEPS = 1400
STEPS, DEEP_STEPS = 2000, 6000
"""Training steps of the two autoencoders."""
FAMILIES = {
    "sd3": (build_sd3_pipeline, SD3Model),
    "flux": (build_flux_pipeline, FluxModel),
    "sd": (build_sd_pipeline, SDModel),
}


def load_autoencoder(work: Path) -> AutoencoderKL:
    folder = work / "vae"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        train_codec(build_autoencoder(), folder, work / "vae-training", steps=STEPS)
    vae = AutoencoderKL.from_pretrained(folder)
    return vae.to(memory_format=torch.channels_last)


def load_model(family: str, work: Path) -> TextToImageModel:
    """Return the pipeline with trained autoencoder and text encoders, and a fresh denoiser."""
    build, kind = FAMILIES[family]
    folder = work / family / "start"
    if not (folder / "model_index.json").exists():
        torch.manual_seed(0)
        build(load_autoencoder(work)).save_pretrained(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.vae.to(memory_format=torch.channels_last)
    return kind(pipeline, max_sequence_length=MAX_LENGTH, default_size=(IMAGE_SIZE, IMAGE_SIZE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=[*sorted(FAMILIES), "clip", "dc", "vae"])
    parser.add_argument("--work", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--images", type=int, default=PretrainConfig.images)
    parser.add_argument("--stop-after-minutes", type=float, default=None)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-alignment", action="store_true", help="leave out the semantic map")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: %(default)s")
    args = parser.parse_args()

    if args.family == "vae":
        load_autoencoder(args.work)
        return
    if args.family == "clip":
        train_eyes(args.out, steps=args.steps or EYES_STEPS)
        return
    if args.family == "dc":
        train_deep(args.out, args.work / "dc", steps=args.steps or DEEP_STEPS)
        return
    args.steps = args.steps or PretrainConfig.steps
    model = load_model(args.family, args.work).to(args.device)
    folder = args.work / args.family
    cache = folder / f"data-{args.images}.safetensors"
    if not cache.exists():
        make_dataset(model, args.images, seed=0).save(cache)
    data = Captioned.load(cache)
    minutes = args.stop_after_minutes
    config = PretrainConfig(
        steps=args.steps,
        images=args.images,
        # torch 2.13 compiles a U-Net's blocks for CPUs such that their gradients are zero
        compile=not args.no_compile and (args.family != "sd" or args.device != "cpu"),
        stop_after_seconds=None if minutes is None else 60 * minutes,
        alignment=0.0 if args.no_alignment else PretrainConfig.alignment,
    )
    run = Pretraining(model, config, folder)
    run.resume()
    run.run(data)
    history = {"pretraining": run.history}
    if model.guidance_is_embedded:
        model.denoiser.load_state_dict(run.ema)
        # of this very teacher: a longer pretraining needs a student of its own
        run = GuidanceDistillation(model, distillation(config), folder / f"guidance-{run.step}")
        run.resume()
        run.run(data)
        history["guidance distillation"] = run.history
    with run.averaged():
        save_pipeline(model.pipeline, args.out)
    record = {
        "command": shlex.join(["python", "-m", "diffalign.scripts.shapes.train", *sys.argv[1:]]),
        "config": dataclasses.asdict(config),
        "config of the distillation": dataclasses.asdict(distillation(config)),
        "history": history,
        "versions": versions(),
    }
    (folder / "history.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def train_eyes(out: Path, *, steps: int) -> None:
    """`shapes-clip`, and beside it what it tells apart."""
    record = {
        "command": shlex.join(["python", "-m", "diffalign.scripts.shapes.train", *sys.argv[1:]]),
        "held-out captions: share of pairs of a right and a wrong image told apart": train_clip(
            out, steps=steps
        ),
        "versions": versions(),
    }
    file = out.with_name(f"{out.name}.json")
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def train_deep(out: Path, work: Path, *, steps: int) -> None:
    """`shapes-dc`, and beside it how well it reconstructs."""
    torch.manual_seed(0)
    vae = build_deep_autoencoder()
    trainer = train_codec(vae, out, work, steps=steps)
    record = {
        "command": shlex.join(["python", "-m", "diffalign.scripts.shapes.train", *sys.argv[1:]]),
        "config": dataclasses.asdict(trainer.config),
        "held-out scenes": quality(vae, RenderedImages(seed=0).measured()),
        "history": trainer.history,
        "versions": versions(),
    }
    file = out.with_name(f"{out.name}.json")
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def train_codec(
    vae: AutoencoderKL | AutoencoderDC, out: Path, work: Path, *, steps: int
) -> AutoencoderTrainer:
    """Train on random scenes, set the scale of the latents, and save."""
    images = RenderedImages(seed=0)
    trainer = AutoencoderTrainer(vae, images, AutoencoderConfig(num_updates=steps), folder=work)
    trainer.run()
    set_scale(vae, images(10**6, 512))
    vae.to(torch.bfloat16).save_pretrained(out)
    return trainer


def distillation(config: PretrainConfig) -> PretrainConfig:
    """Return the configuration of a short run: the student starts as its own teacher."""
    return dataclasses.replace(
        config, steps=config.steps // 8, lr=config.lr / 5, warmup=20, stop_after_seconds=None
    )


if __name__ == "__main__":
    main()
