"""`diffalign autoencoder`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffalign.cli.verb import Verb


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `autoencoder`."""
    parser.add_argument(
        "--autoencoder", required=True, help="a name that ships (shapes-dc), a folder or a hub id"
    )
    parser.add_argument(
        "--from_scratch", action="store_true", help="take its configuration only, with new weights"
    )
    parser.add_argument(
        "--images", default="shapes", help="a folder, or shapes: rendered; default: %(default)s"
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--phase", default="reconstruct", help="default: %(default)s")
    parser.add_argument("--resolution", type=int, default=256, help="pixels; default: %(default)s")
    parser.add_argument("--num_updates", type=int, default=2000, help="default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="default: %(default)s")
    parser.add_argument(
        "--adversarial_weight", type=float, default=0.1, help="phase refine; default: %(default)s"
    )
    parser.add_argument("--mixed_precision", default="bf16", choices=("bf16", "no"))
    parser.add_argument("--checkpoint_every", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def run(args: argparse.Namespace) -> None:
    """Train, save the autoencoder in diffusers' layout, and print how well it reconstructs."""
    from dataclasses import fields

    import torch

    from diffalign.autoencoders.run import check_folder, train_autoencoder
    from diffalign.autoencoders.trainer import AutoencoderConfig
    from diffalign.pipelines.moving import load_autoencoder

    check_folder(args.output_dir)
    names = {f.name for f in fields(AutoencoderConfig)}
    config = AutoencoderConfig(**{k: v for k, v in vars(args).items() if k in names})
    result = train_autoencoder(
        load_autoencoder(args.autoencoder, dtype=torch.float32),
        args.images,
        args.output_dir,
        config,
        resolution=args.resolution,
        from_scratch=args.from_scratch,
    )
    print(json.dumps({k: result[k] for k in ("phase", "before", "after", "updates", "seconds")}))


VERB = Verb(
    "autoencoder",
    "train an autoencoder, whole or the part that a phase of DC-AE trains",
    add_flags,
    run,
    description="Train an AutoencoderDC or AutoencoderKL on images, one phase after the other: reconstruct (all "
    "weights, low resolution), latent (the layers around the latents, at the resolution of use), refine (the last "
    "layers, with an adversary). The same command goes on where it stopped.",
    resumes=True,
)
