"""`diffalign qsched`."""

from __future__ import annotations

import argparse

from diffalign.cli import options, types
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb

ENGINES = ("cma", "coordinate", "ramp", "grid", "none")


def add_flags(parser: Parser) -> None:
    """Add the flags of `qsched`."""
    options.add_prompts(parser, None, required=True)
    options.add_count(parser, "--max_prompts", 50, "use only N of the prompts")
    options.add_count(parser, "--images_per_prompt", 1, "images of each prompt")
    parser.add_argument(
        "--objective",
        default="jaq",
        help="reward that is raised: jaq (CLIPScore + 2 HPSv2.1), jaq-lcm (CLIPScore + 2 CLIP-IQA), jaq-shapes, or "
        "reward=weight,... (default: %(default)s)",
    )
    parser.add_argument(
        "--reference",
        type=types.model,
        default=None,
        help="model before quantisation; its closed form is where the search begins, if it is better",
    )
    parser.add_argument(
        "--engine",
        default="cma",
        choices=ENGINES,
        help="search method; none takes the closed form as it is (default: %(default)s)",
    )
    options.add_count(parser, "--budget", 200, "candidates that are drawn and scored")
    parser.add_argument(
        "--box",
        type=float,
        nargs=2,
        default=(0.8, 1.2),
        metavar=("LOW", "HIGH"),
        help="range of the factors (default: 0.8 1.2)",
    )
    parser.add_argument(
        "--penalty",
        type=types.number(0),
        default=0.0,
        metavar="WEIGHT",
        help="weight of the squared distance of the factors from 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--held_out",
        type=types.number(above=0, high=1),
        default=0.5,
        metavar="SHARE",
        help="share of the prompts that are kept for accepting the result (default: %(default)s)",
    )
    parser.add_argument(
        "--output_dir",
        type=types.path,
        default=None,
        metavar="DIR",
        help="new folder for a copy of the model (default: write into the folder of --model)",
    )
    parser.add_argument(
        "--work",
        type=types.output_folder,
        default="runs/qsched",
        metavar="DIR",
        help="folder where scores are kept, so that the search can be resumed (default: %(default)s)",
    )
    parser.add_argument(
        "--plot",
        type=types.output_file,
        default=None,
        metavar="FILE",
        help="draw the search as a picture (.png, .svg or .pdf)",
    )
    options.add_model(
        parser,
        lora=types.refused("factors belong to one set of weights; `diffalign merge` makes it one"),
    )
    options.add_drawing(parser, solver=False)


def run(args: argparse.Namespace) -> None:
    """Search the factors, print them, and write them into the model or a copy."""
    from diffalign.cli.models import (
        calibration_drawing,
        chosen_prompts,
        load,
        load_reference,
        settle_drawing,
    )
    from diffalign.cli.output import emit, suggest
    from diffalign.core.errors import UsageError
    from diffalign.rewards.composition import CompositeReward
    from diffalign.tuning.objective import parse
    from diffalign.tuning.plot import check_plot, plot_history
    from diffalign.tuning.saving import describe, keeps_earlier, save, target_folder
    from diffalign.tuning.tune import Settings, tune

    folder, whole = target_folder(args.model, args.output_dir)
    if args.plot is not None:
        check_plot(args.plot)
    if args.engine == "none" and args.reference is None:
        raise UsageError("engine: none is the closed form alone, which needs a `reference`")
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
    reward = CompositeReward.from_config(settings.objective, setting="objective")
    prompts = chosen_prompts(args)
    card = settle_drawing(args)
    reward.check_metadata([p.metadata for p in prompts])
    reward.prepare()
    model = load(args)
    result = tune(
        model,
        prompts,
        reward.score,
        settings,
        calibration_drawing(args),
        reference=load_reference(args, model),
        file=args.work / "scores.jsonl",
    )
    result.apply(model.pipeline)
    save(model.pipeline, result, folder, whole=whole, card=card)
    if args.plot is not None:
        plot_history(result, args.plot)
        print(f"plot: {args.plot}")
    print(describe(result, folder, keeps_earlier=keeps_earlier(result, model.pipeline)))
    suggest("generate", "a photo of a red circle", "--model", folder)
    plain = result.to_dict()
    emit({k: v for k, v in plain.items() if k != "history"})


VERB = Verb(
    "qsched",
    "repair a quantised few-step model by tuning its schedule",
    add_flags,
    run,
    description="Search two factors per step of the scheduler (Q-Sched) that raise a reward, and write them into the "
    "scheduler's\nconfiguration if held-out prompts agree (docs/qsched.md). The same command resumes.",
    resumes=True,
)
