"""`diffalign qsched`."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffalign.cli import options
from diffalign.cli.verb import Verb


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `qsched`."""
    parser.add_argument("--prompts", required=True, help="a .txt or .jsonl file, or shapes:train")
    parser.add_argument("--max_prompts", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--images_per_prompt", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--objective",
        default="jaq",
        help="jaq (CLIPScore + 2 HPSv2.1), jaq-lcm (CLIPScore + 2 CLIP-IQA), jaq-shapes, or reward=weight,...; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--reference",
        default=None,
        help="the model before quantisation: begin with the closed form, where that is better",
    )
    parser.add_argument(
        "--engine",
        default="cma",
        choices=("cma", "coordinate", "ramp", "grid", "none"),
        help="none: the closed form as it is; default: %(default)s",
    )
    parser.add_argument("--budget", type=int, default=200, help="candidates; default: %(default)s")
    parser.add_argument(
        "--box",
        type=float,
        nargs=2,
        default=(0.8, 1.2),
        metavar=("LOW", "HIGH"),
        help="default: 0.8 1.2",
    )
    parser.add_argument("--penalty", type=float, default=0.0, help="of the squared distance from 1")
    parser.add_argument(
        "--held_out",
        type=float,
        default=0.5,
        help="share of the prompts that accept; default: %(default)s",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=None,
        help="a copy of the model; default: into --model itself",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/qsched"),
        help="scores are kept here; default: %(default)s",
    )
    parser.add_argument(
        "--plot", type=Path, default=None, help="a picture of the search (.png, .svg, .pdf)"
    )
    options.add_model(parser)
    options.add_drawing(parser, solver=False)


def run(args: argparse.Namespace) -> None:
    """Search, print the factors, and write them where the model is, or a copy of the model with them."""
    from diffalign.cli.models import chosen_prompts, load, load_reference, settle_drawing
    from diffalign.core.errors import UsageError
    from diffalign.core.files import check_target
    from diffalign.rewards.composition import CompositeReward
    from diffalign.tuning.evaluator import Drawing
    from diffalign.tuning.objective import parse
    from diffalign.tuning.plot import check_plot, plot_history
    from diffalign.tuning.saving import describe, keeps_earlier, save, target_folder
    from diffalign.tuning.tune import Settings, tune

    if args.lora is not None:
        raise UsageError(
            "--lora: factors belong to one set of weights; `diffalign merge` makes it one"
        )
    folder, whole = target_folder(args.model, args.output_dir)
    if args.plot is not None:
        check_plot(args.plot)
    if args.engine == "none" and args.reference is None:
        raise UsageError("--engine none is the closed form alone, which needs a --reference")
    settings = Settings(
        parse(args.objective),
        engine=args.engine,
        budget=args.budget,
        low=args.box[0],
        high=args.box[1],
        penalty=args.penalty,
        held_out=args.held_out,
        seed=args.seed,
    )
    reward = CompositeReward.from_config(settings.objective, setting="--objective")
    prompts = chosen_prompts(args)
    card = settle_drawing(args)
    drawing = Drawing(
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        height=args.height,
        width=args.width,
        images_per_prompt=args.images_per_prompt,
        seed=args.seed,
        micro_batch_size=args.batch_size,
        mixed_precision="bf16" if args.dtype == "bfloat16" else "no",
    )
    check_target(args.work, setting="--work")
    reward.check_metadata([p.metadata for p in prompts])
    reward.prepare()
    model = load(args)
    reference = load_reference(args, model)
    file = args.work / "scores.jsonl"
    result = tune(model, prompts, reward.score, settings, drawing, reference=reference, file=file)
    result.apply(model.pipeline)
    save(model.pipeline, result, folder, whole=whole, card=card)
    if args.plot is not None:
        plot_history(result, args.plot)
    print(describe(result, folder, kept=keeps_earlier(result, model.pipeline)))


VERB = Verb(
    "qsched",
    "repair a quantised few-step model by its schedule",
    add_flags,
    run,
    description="Search two factors a step of the scheduler (Q-Sched) that raise a reward, keep them if held-out "
    "prompts agree, and write them into the scheduler's configuration (docs/qsched.md). Goes on where it stopped.",
    resumes=True,
)
