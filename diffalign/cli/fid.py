"""`diffalign evaluate fid`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from diffalign.cli import options, types
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb

if TYPE_CHECKING:
    from diffalign.evaluation.fid_sides import Generation


def add_flags(parser: Parser) -> None:
    """Add the flags of `evaluate fid`."""
    options.add_images(parser, text="folder of the generated images")
    parser.add_argument(
        "--generated",
        type=types.generated,
        default=None,
        metavar="DIR|MODEL",
        help="either of --images and --model: a folder of images, or a model that draws them",
    )
    parser.add_argument(
        "--reference",
        type=types.reference,
        default=None,
        metavar="DIR|FILE",
        help="folder of real images, statistics (.npz), or shapes:held_out",
    )
    parser.add_argument(
        "--network",
        default=None,
        metavar="NAME",
        help="network of the features: inception (or inception:WEIGHTS), clip or shapes_clip (default: inception; "
        "shapes_clip on Shapes)",
    )
    parser.add_argument(
        "--save_statistics",
        type=types.output_file,
        default=None,
        metavar="FILE",
        help="save the features of the generated images as .npz; then no --reference is needed",
    )
    options.add_prompts(parser, "shapes:held_out")
    options.add_count(parser, "--max_prompts", None, "use only the first N prompts")
    options.add_count(parser, "--images_per_prompt", 4, "images of each prompt")
    options.add_output(parser)
    options.add_model(parser)
    options.add_drawing(parser)


def run(args: argparse.Namespace) -> None:
    """Compare generated images with a reference by FID and related distances.

    With --save_statistics also save the features of the generated images.
    """
    from diffalign.cli.output import print_scores, write_result
    from diffalign.core import console, processes
    from diffalign.core.errors import UsageError
    from diffalign.evaluation.fid import statistics_path
    from diffalign.evaluation.fid_sides import compare_sides, generated_side, reference_side
    from diffalign.rewards.features import load_network

    _read_generated(args)
    if args.reference is None and args.save_statistics is None:
        raise UsageError(
            "evaluate fid needs --reference (a folder, statistics (.npz) or shapes:held_out) or --save_statistics"
        )
    on_shapes = (args.reference or "").startswith("shapes:") or (
        args.images is None and args.model.startswith("shapes-")
    )
    # check all files before a network is downloaded, a model loaded or an image generated
    if args.save_statistics is not None:
        args.save_statistics = statistics_path(args.save_statistics)
    batch = args.batch_size or options.BATCH_SIZE
    with console.counting("images") as progress, console.counting("reference") as other_progress:
        reference = args.reference and reference_side(
            args.reference,
            batch_size=batch,
            max_prompts=args.max_prompts,
            progress=other_progress,
        )
        generated = generated_side(
            args.images or _generation(args), batch_size=batch, progress=progress
        )
        # before the network, because joining the processes selects this process's GPU
        state = processes.current()
        network = load_network(args.network or ("shapes_clip" if on_shapes else "inception"))
        reference = reference and reference(network)
        features = generated(network, state)
        if not state.is_main_process:
            return
        if args.save_statistics is not None:
            features.save(args.save_statistics)
        other = reference() if reference else None
    if args.save_statistics is not None:
        print(f"statistics: {args.save_statistics}")
    distances, result = compare_sides(features, other)
    if other is not None:
        n, m = features.moments.n, other.moments.n or "unknown"
        title = f"{n} images against {m} of {args.reference}, {features.network}"
        # the spread over subsets is 0 if a subset holds all images; the interval is not
        shown = {name: value for name, value in distances.items() if name != "kid_std"}
        print_scores(title, shown, result["intervals"])
        for warning in result["warnings"]:
            print(f"warning: {warning}")
    write_result(args.output, result)


def _read_generated(args: argparse.Namespace) -> None:
    """Copy --generated to --images if it is a folder of images, else to --model."""
    from diffalign.core.errors import UsageError

    if args.generated is None:
        return
    if args.images is not None:
        raise UsageError("generated: give either it or `images`")
    if types.is_image_folder(args.generated):
        args.images = types.path(args.generated)
    else:
        args.model = args.generated


def _generation(args: argparse.Namespace) -> Generation:
    """Return the model, prompts and settings that generate the images to compare."""
    from diffalign.cli.models import batching, drawing, evaluation, load, settle_drawing
    from diffalign.data.prompts import load_prompts
    from diffalign.evaluation.fid_sides import Generation

    settle_drawing(args)
    about = {**drawing(args), "images_per_prompt": args.images_per_prompt, "dtype": args.dtype}
    prompts = load_prompts(args.prompts, limit=args.max_prompts)
    return Generation(lambda: load(args), prompts, evaluation(args), about, batching(args))


VERB = Verb(
    "fid",
    "compare images with a reference: FID, KID, CMMD, precision and recall",
    add_flags,
    run,
    shares=True,
)
