"""`diffalign autoencoder`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffalign.cli import options, types
from diffalign.cli.flags import Values
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb


@dataclass(kw_only=True)
class Flags(Values):
    """Values of the flags of `autoencoder`."""

    autoencoder: str
    from_scratch: bool
    images: str
    output_dir: Path
    phase: str
    resolution: int
    num_updates: int
    batch_size: int
    learning_rate: float
    adversarial_weight: float
    mixed_precision: str
    checkpoint_every: int
    seed: int


def add_flags(parser: Parser) -> None:
    """Add the flags of `autoencoder`."""
    parser.add_argument(
        "--autoencoder",
        type=types.place,
        required=True,
        help="autoencoder to start from: a name that ships (shapes-dc), a folder or a hub id",
    )
    parser.add_argument(
        "--from_scratch",
        action="store_true",
        help="take only the autoencoder's configuration and start with new weights",
    )
    parser.add_argument(
        "--images",
        type=types.place,
        default="shapes",
        help="folder of training images, or shapes for rendered ones (default: %(default)s)",
    )
    options.add_output_dir(parser, None, "folder of the trained autoencoder")
    parser.add_argument(
        "--phase",
        default="reconstruct",
        metavar="PHASE",
        help="part that is trained: reconstruct, all weights at low resolution; latent, the layers around the latents; "
        "refine, the last layers with an adversary (default: %(default)s)",
    )
    options.add_count(parser, "--resolution", 256, "side of the training images in pixels")
    options.add_count(parser, "--num_updates", 2000, "updates of training")
    options.add_count(parser, "--batch_size", 32, "images per update")
    parser.add_argument(
        "--learning_rate",
        type=types.number(above=0),
        default=2e-3,
        metavar="RATE",
        help="learning rate of AdamW (default: %(default)s)",
    )
    parser.add_argument(
        "--adversarial_weight",
        type=types.number(0),
        default=0.1,
        metavar="WEIGHT",
        help="weight of the adversarial loss in phase refine (default: %(default)s)",
    )
    parser.add_argument(
        "--mixed_precision",
        default="bf16",
        choices=("bf16", "no"),
        help="number format of the computation (default: %(default)s)",
    )
    options.add_count(parser, "--checkpoint_every", 200, "updates between checkpoints")
    parser.add_argument(
        "--seed", type=types.seed, default=0, help="random seed (default: %(default)s)"
    )


def run(flags: Flags) -> None:
    """Train an autoencoder, save it in diffusers' layout, and print its quality."""
    from dataclasses import fields

    import torch

    from diffalign.autoencoders.run import check_folder, train_autoencoder
    from diffalign.autoencoders.trainer import AutoencoderConfig
    from diffalign.cli.output import emit, print_table, suggest
    from diffalign.evaluation.figures import number
    from diffalign.pipelines.moving import load_autoencoder

    check_folder(flags.output_dir)
    names = {f.name for f in fields(AutoencoderConfig)}
    config = AutoencoderConfig(**{k: v for k, v in vars(flags).items() if k in names})
    result = train_autoencoder(
        load_autoencoder(flags.autoencoder, dtype=torch.float32),
        flags.images,
        flags.output_dir,
        config,
        resolution=flags.resolution,
        from_scratch=flags.from_scratch,
    )
    before, after = result["before"], result["after"]
    rows = [(name, number(before[name]), number(after[name])) for name in after]
    print_table("reconstruction of held-out images", ("", "before", "after"), [rows])
    print(f"autoencoder: {flags.output_dir} ({result['updates']} updates, {result['seconds']} s)")
    suggest("train", "dcgen-shapes-flux", f"--latents.autoencoder={flags.output_dir}")
    emit({k: result[k] for k in ("phase", "before", "after", "updates", "seconds")})


VERB = Verb(
    "autoencoder",
    "train an autoencoder, in the phases of DC-AE",
    add_flags,
    run,
    description="Train an AutoencoderDC or AutoencoderKL on images, one phase after the other: reconstruct, latent, "
    "refine.\nThe same command resumes an interrupted training.",
    resumes=True,
    flags=Flags,
)
