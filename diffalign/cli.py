"""The command line. torch and friends are imported inside the verb that needs them: `--help` answers at once."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from diffalign import __version__
from diffalign.cli_latents import add_autoencoder
from diffalign.core.errors import UserError, full_disk

EPILOG = """examples:
  diffalign demo
  diffalign train awm-shapes-sd3 --optimizer.learning_rate=1e-3 --output_dir runs/mine
  diffalign generate "a photo of a red circle" --model shapes-sd3 --lora runs/demo/lora
  diffalign evaluate --model shapes-sd3 --lora runs/demo/lora --rewards verifier
  diffalign list recipes
"""


VERBS = {
    "autoencoder": "autoencoder",
    "demo": "training",
    "bench": "training",
    "generate": "images",
    "pairs": "pairs",
    "evaluate": "evaluate",
    "convert": "files",
    "qsched": "tuning",
    "quantize": "quantize",
    "merge": "files",
    "serve-rewards": "service",
}
"""Verb to the module of commands that knows it."""
TALKATIVE = ("torchao", "torch.utils._pytree")
"""Where torchao is installed, both warn on import of what concerns nobody here."""
RESUMES = ("autoencoder", "demo", "train", "bench", "precompute", "pairs", "qsched")
SHARES = ("demo", "train", "precompute", "pairs")
"""Verbs for several processes; `evaluate geneval` and `evaluate fid` as well."""
TAKES_SETTINGS = ("train", "precompute")
"""Verbs with a recipe, whose settings can be overridden."""
DTYPES = ("bfloat16", "float16", "float32")


def build_parser() -> argparse.ArgumentParser:
    """All verbs."""
    parser = argparse.ArgumentParser(
        prog="diffalign",
        description="Align text-to-image diffusion models, make them fast, and prove both.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"diffalign {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    demo = verbs.add_parser("demo", help="watch a small model learn to follow prompts, on a laptop")
    demo.add_argument("--output_dir", default="runs/demo", help="default: %(default)s")

    train = verbs.add_parser(
        "train",
        help="train a recipe",
        description="Train a recipe of `diffalign list recipes`, or a YAML file. Every setting can be overridden: "
        "--key.sub=value. Flags of diffusers' training scripts work where they mean the same.",
    )
    train.add_argument("recipe", help="name or YAML file")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="check the settings, prompts and rewards, print the configuration and stop",
    )

    precompute = verbs.add_parser(
        "precompute",
        help="encode the images of a recipe once: preference pairs, or those of a move",
        description="Fill the cache of a recipe that learns from preference pairs or moves a model into other latents. "
        "`train` does so, too; here alone it "
        "can be shared among machines or be kept. Settings are overridden as with `train`.",
    )
    precompute.add_argument("recipe", help="name or YAML file")

    _add_images(verbs)
    _add_evaluate(verbs)
    _add_files(verbs)
    add_autoencoder(verbs)
    _add_quantize(verbs)
    _add_qsched(verbs)
    _add_bench(verbs)
    _add_service(verbs)
    listing = verbs.add_parser("list", help="what there is by name")
    listing.add_argument("what", choices=("recipes", "rewards", "models", "benches"))
    return parser


def _add_images(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Verbs that make images."""
    generate = verbs.add_parser("generate", help="make images with a model and a LoRA")
    generate.add_argument("prompts", nargs="+", help="texts, or files ending in .txt or .jsonl")
    generate.add_argument("--output_dir", default="runs/images", help="default: %(default)s")
    generate.add_argument("--images_per_prompt", type=int, default=4, help="default: %(default)s")
    _model_flags(generate)

    pairs = verbs.add_parser(
        "pairs",
        help="make preference pairs with a model and a reward",
        description="Draw images of prompts (in GenEval's layout, resumable), score them and write pairs.jsonl: which "
        "of a prompt's images are better. `pairs.source` of a recipe takes the folder (docs/preferences.md).",
    )
    pairs.add_argument("--prompts", default="shapes:train", help="default: %(default)s")
    pairs.add_argument(
        "--rewards", default="verifier", help="comma-separated; default: %(default)s"
    )
    pairs.add_argument("--output_dir", type=Path, default=Path("runs/pairs"))
    pairs.add_argument("--images_per_prompt", type=int, default=4, help="default: %(default)s")
    pairs.add_argument("--max_prompts", type=int, default=None, help="only so many prompts")
    pairs.add_argument(
        "--record_states",
        type=int,
        default=None,
        metavar="K",
        help="keep K states of each image on its way from noise, for `pairs.inversion.solver=recorded`: Inversion-DPO "
        "without an inversion; default: none",
    )
    pairs.add_argument(
        "--pick",
        default="best_worst",
        choices=("best_worst", "nested", "all"),
        help="of a prompt's images: default %(default)s, one pair; nested: each image once, best with worst, second "
        "with second worst",
    )
    pairs.add_argument(
        "--weights",
        default="equal",
        choices=("equal", "rankdpo"),
        help="of pairs: default %(default)s; rankdpo, for --pick all: by gain and rank",
    )
    pairs.add_argument(
        "--min_gap",
        type=float,
        default=0.0,
        help="least difference of rewards; default: %(default)s",
    )
    _model_flags(pairs)


def _add_evaluate(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Scores of everything; what a flag is for stands in its help."""
    evaluate = verbs.add_parser(
        "evaluate", help="score a model, with or without a LoRA, or a folder of images"
    )
    evaluate.add_argument(
        "what",
        nargs="?",
        default="model",
        choices=("model", "rewards", "geneval", "fid", "wins", "report"),
        help="model: generate and score; rewards: score the images of --images; geneval: GenEval's folders, of --model "
        "or in --images; fid: FID and its kin of --model or --images from --reference; "
        "wins: how often --images are preferred to those --against; "
        "report: a page that compares --folders; default: %(default)s",
    )
    evaluate.add_argument(
        "--images", type=Path, default=None, help="a folder with captions (docs/rewards.md)"
    )
    evaluate.add_argument(
        "--prompts",
        default=None,
        help="geneval, shapes:held_out or a file; default: shapes:held_out, of geneval with another model geneval",
    )
    evaluate.add_argument(
        "--rewards", default=None, help="comma-separated; default: verifier, of report none"
    )
    evaluate.add_argument(
        "--max_prompts", type=int, default=None, help="score only so many prompts"
    )
    evaluate.add_argument(
        "--images_per_prompt", type=int, default=None, help="default: 1, of geneval 4"
    )
    evaluate.add_argument(
        "--images_per_task", type=int, default=None, help="instead: so many images of every task"
    )
    evaluate.add_argument(
        "--output_dir",
        type=Path,
        default=Path("runs/geneval"),
        help="of geneval; filled and resumed",
    )
    evaluate.add_argument(
        "--detector",
        default=None,
        choices=("verifier", "geneval", "geneval_compat"),
        help="of geneval; default: the one that knows the prompts' classes",
    )
    evaluate.add_argument(
        "--folders", nargs="+", default=None, metavar="[NAME=]DIR", help="of report"
    )
    evaluate.add_argument("--against", type=Path, default=None, help="of wins: the other folder")
    evaluate.add_argument(
        "--generated",
        default=None,
        metavar="DIR|MODEL",
        help="of fid: what --images or --model names",
    )
    evaluate.add_argument(
        "--reference", default=None, help="of fid: a folder, statistics (.npz), or shapes:held_out"
    )
    evaluate.add_argument(
        "--network",
        default=None,
        help="of fid: inception (or inception:WEIGHTS), clip, shapes_clip; default: inception, on Shapes shapes_clip",
    )
    evaluate.add_argument(
        "--save_statistics",
        type=Path,
        default=None,
        help="of fid: keep the features of what is generated as .npz; needs no --reference",
    )
    evaluate.add_argument(
        "--output",
        type=Path,
        default=None,
        help="also write the result as JSON; of report the page",
    )
    _model_flags(evaluate)


def _add_files(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Verbs that rewrite LoRA files."""
    convert = verbs.add_parser("convert", help="a LoRA file from and to the keys of other programs")
    convert.add_argument("lora", help="a .safetensors file, or a folder with diffusers' file name")
    convert.add_argument("--to", required=True, choices=("diffusers", "comfyui", "kohya"))
    convert.add_argument(
        "--family",
        default=None,
        choices=("sd3", "flux"),
        help="needed for a transformer in kohya's keys",
    )
    convert.add_argument("--output", type=Path, required=True)

    merge = verbs.add_parser("merge", help="a whole pipeline with a LoRA added into its weights")
    merge.add_argument("--model", default="shapes-sd3", help="name, folder or hub id")
    merge.add_argument(
        "--lora", required=True, help="folder, file or hub id; behind a colon the file in it"
    )
    merge.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    merge.add_argument(
        "--scheduler",
        default=None,
        help="of a distilled student: its run's scheduler/, or a class such as LCMScheduler or "
        "TCDScheduler,timestep_spacing=trailing",
    )
    merge.add_argument(
        "--fold_guidance",
        type=float,
        default=None,
        help="of FLUX: for this guidance scale alone, in FLUX.1-schnell's layout",
    )
    merge.add_argument("--output_dir", type=Path, required=True, help="must not exist yet")


def _add_quantize(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from diffalign.quantization.backends import BACKENDS

    quantize = verbs.add_parser(
        "quantize",
        help="a smaller copy of a model: 8 or 4 bits a weight, convolutions too",
        description="Quantise a model's denoiser and save a folder that `diffalign.load` and every verb read "
        "(docs/qsched.md). Prints true bytes in memory and on disk, and the time of a forward beside the original's.",
    )
    quantize.add_argument(
        "--backend",
        default="auto",
        help=f"auto, {', '.join(BACKENDS)}; default: %(default)s, by device",
    )
    quantize.add_argument("--output_dir", type=Path, required=True, help="must not exist yet")
    quantize.add_argument(
        "--components",
        nargs="+",
        default=(),
        metavar="NAME",
        help="besides the denoiser, such as text_encoder_2",
    )
    quantize.add_argument(
        "--group_size",
        type=int,
        default=64,
        help="weights with one scale, of int4 and int8; default: %(default)s",
    )
    quantize.add_argument(
        "--svd_rank",
        type=int,
        default=0,
        help="of a low-rank branch (SVDQuant) beside int4, int8, int8-static, torchao-int8wo or torchao-fp8wo; "
        "default: none",
    )
    quantize.add_argument(
        "--prompts",
        default=None,
        help="calibrate that branch, or int8-static, on what the model sees while it draws these",
    )
    quantize.add_argument("--max_prompts", type=int, default=32, help="default: %(default)s")
    quantize.add_argument(
        "--latency",
        type=int,
        default=1,
        help="images of the forward that is timed beside bfloat16; 0: none; default: %(default)s",
    )
    _model_flags(quantize, steps=4, solver=False)


def _add_qsched(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Where names differ from the model flags', the search's own come first."""
    qsched = verbs.add_parser(
        "qsched",
        help="repair a quantised few-step model by its schedule",
        description="Search two factors a step of the scheduler (Q-Sched) that raise a reward, keep them if held-out "
        "prompts agree, and write them into the scheduler's configuration (docs/qsched.md). Goes on where it stopped.",
    )
    qsched.add_argument("--prompts", required=True, help="a .txt or .jsonl file, or shapes:train")
    qsched.add_argument("--max_prompts", type=int, default=50, help="default: %(default)s")
    qsched.add_argument("--images_per_prompt", type=int, default=1, help="default: %(default)s")
    qsched.add_argument(
        "--objective",
        default="jaq",
        help="jaq (CLIPScore + 2 HPSv2.1), jaq-lcm (CLIPScore + 2 CLIP-IQA), jaq-shapes, or reward=weight,...; "
        "default: %(default)s",
    )
    qsched.add_argument(
        "--reference",
        default=None,
        help="the model before quantisation: begin with the closed form, where that is better",
    )
    qsched.add_argument(
        "--engine",
        default="cma",
        choices=("cma", "coordinate", "ramp", "grid", "none"),
        help="none: the closed form as it is; default: %(default)s",
    )
    qsched.add_argument("--budget", type=int, default=200, help="candidates; default: %(default)s")
    qsched.add_argument(
        "--box",
        type=float,
        nargs=2,
        default=(0.8, 1.2),
        metavar=("LOW", "HIGH"),
        help="default: 0.8 1.2",
    )
    qsched.add_argument("--penalty", type=float, default=0.0, help="of the squared distance from 1")
    qsched.add_argument(
        "--held_out",
        type=float,
        default=0.5,
        help="share of the prompts that accept; default: %(default)s",
    )
    qsched.add_argument(
        "--output_dir",
        type=Path,
        default=None,
        help="a copy of the model; default: into --model itself",
    )
    qsched.add_argument(
        "--work",
        type=Path,
        default=Path("runs/qsched"),
        help="scores are kept here; default: %(default)s",
    )
    qsched.add_argument(
        "--plot", type=Path, default=None, help="a picture of the search (.png, .svg, .pdf)"
    )
    _model_flags(qsched, steps=4, solver=False)


def _add_bench(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = verbs.add_parser("bench", help="measure one of the suite's claims")
    bench.add_argument("name", help="a name of `diffalign list benches`")
    bench.add_argument("--quick", action="store_true", help="minutes, to see that it works")
    bench.add_argument("--seeds", type=int, default=None, help="default: 3, or 1 with --quick")
    bench.add_argument("--arms", default=None, help="only these, separated by commas")
    bench.add_argument(
        "--work", type=Path, default=Path("runs/bench"), help="runs are kept and resumed here"
    )
    bench.add_argument("--output", type=Path, default=None, help="write the whole result as JSON")


def _add_service(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = verbs.add_parser(
        "serve-rewards",
        help="rewards behind HTTP, for a GPU or an environment of their own (docs/rewards.md)",
    )
    serve.add_argument("--rewards", required=True, help="comma-separated")
    serve.add_argument(
        "--host", default="127.0.0.1", help="default: %(default)s, this machine alone"
    )
    serve.add_argument("--port", type=int, default=8100, help="default: %(default)s")
    serve.add_argument(
        "--timeout",
        default="300",
        help="seconds of scoring, of all or of each: 60, or pickscore=60,ocr=10; default: %(default)s",
    )
    serve.add_argument(
        "--max_bytes", type=int, default=256_000_000, help="of a request; default: %(default)s"
    )


def _model_flags(parser: argparse.ArgumentParser, *, steps: int = 10, solver: bool = True) -> None:
    """`solver`: whether the verb draws with another than the model's own."""
    parser.add_argument(
        "--model", default="shapes-sd3", help="name, folder or hub id; default: %(default)s"
    )
    parser.add_argument(
        "--lora", default=None, help="folder, file or hub id; behind a colon the file in it"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument(
        "--num_inference_steps", type=int, default=steps, help="default: %(default)s"
    )
    if solver:
        parser.add_argument(
            "--solver",
            default="default",
            choices=("default", "adams_bashforth"),
            help="see docs/awm.md",
        )
    parser.add_argument("--guidance_scale", type=float, default=None, help="default: none")
    parser.add_argument("--height", type=int, default=None, help="pixels; default: the model's")
    parser.add_argument("--width", type=int, default=None, help="pixels; default: the model's")
    parser.add_argument("--seed", type=int, default=1000, help="default: %(default)s")
    parser.add_argument(
        "--batch_size", type=int, default=64, help="images at a time; default: %(default)s"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: returns the exit status; a user's error is one line, not a traceback."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.verb not in TAKES_SETTINGS:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return _run(args, rest)
    except KeyboardInterrupt:
        more = "; the same command goes on from where it was" if _goes_on(args) else ""
        print(f"interrupted{more}", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"diffalign: error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        full = full_disk(error)
        if full is None:
            raise
        more = "goes on from where it was" if _goes_on(args) else "can be run again"
        print(f"diffalign: error: {full}. Free space, and the same command {more}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    shares = args.verb in SHARES or getattr(args, "what", None) in ("geneval", "fid")
    if "LOCAL_RANK" in os.environ and not shares:
        from diffalign.core.processes import launched

        if (launched() or 1) > 1:
            raise UserError(
                f"{args.verb} shares no work: start one process, without accelerate or torchrun"
            )
    if args.verb == "list":
        from diffalign.commands.light import listing

        return listing(args.what)
    if args.verb == "train":
        from diffalign.commands.light import train

        return train(args.recipe, rest, dry_run=args.dry_run)
    if args.verb == "precompute":
        from diffalign.commands.training import precompute

        return precompute(args, rest)
    module = import_module(f"diffalign.commands.{VERBS[args.verb]}")
    return int(getattr(module, args.verb.replace("-", "_"))(args) or 0)


def _goes_on(args: argparse.Namespace) -> bool:
    """Whether the verb, started again, keeps what it has done."""
    return args.verb in RESUMES or getattr(args, "what", None) == "geneval"


if __name__ == "__main__":
    sys.exit(main())
