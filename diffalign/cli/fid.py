"""`diffalign evaluate fid`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffalign.cli import options
from diffalign.cli.verb import Verb


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `evaluate fid`."""
    options.add_images(parser)
    parser.add_argument(
        "--generated",
        default=None,
        metavar="DIR|MODEL",
        help="what --images or --model names",
    )
    parser.add_argument(
        "--reference", default=None, help="a folder, statistics (.npz), or shapes:held_out"
    )
    parser.add_argument(
        "--network",
        default=None,
        help="inception (or inception:WEIGHTS), clip, shapes_clip; default: inception, on Shapes shapes_clip",
    )
    parser.add_argument(
        "--save_statistics",
        type=Path,
        default=None,
        help="keep the features of what is generated as .npz; needs no --reference",
    )
    parser.add_argument(
        "--prompts",
        default="shapes:held_out",
        help="shapes:held_out, geneval or a file; default: %(default)s",
    )
    parser.add_argument("--max_prompts", type=int, default=None, help="only so many prompts")
    parser.add_argument("--images_per_prompt", type=int, default=4, help="default: %(default)s")
    options.add_evaluation(parser)
    options.add_model(parser)
    options.add_drawing(parser)


def run(args: argparse.Namespace) -> None:
    """FID, KID, CMMD, precision and recall of what is --generated (--images, --model) against --reference, or its
    statistics alone; the last line is JSON."""
    from diffalign.cli.output import print_scores, write_result
    from diffalign.core import processes
    from diffalign.core.errors import UsageError
    from diffalign.evaluation.fid import statistics_path
    from diffalign.evaluation.fid_sides import compare_sides, generated_side, reference_side
    from diffalign.rewards.features import load_network

    options.check_counts(args)
    _read_generated(args)
    if args.reference is None and args.save_statistics is None:
        raise UsageError(
            "evaluate fid needs --reference (a folder, statistics (.npz) or shapes:held_out) or --save_statistics"
        )
    on_shapes = (args.reference or "").startswith("shapes:") or (
        args.images is None and args.model.startswith("shapes-")
    )
    # before a network is downloaded, a model loaded or an image drawn: are all files there?
    if args.save_statistics is not None:
        args.save_statistics = statistics_path(args.save_statistics)
    batch = args.batch_size or options.BATCH_SIZE
    reference = args.reference and reference_side(
        args.reference, batch_size=batch, max_prompts=args.max_prompts
    )
    generated = generated_side(args.images or _generation(args), batch_size=batch)
    state = processes.current()  # first: it says which GPU is this process's
    network = load_network(args.network or ("shapes_clip" if on_shapes else "inception"))
    reference = reference and reference(network)
    features = generated(network, state)
    if not state.is_main_process:
        return
    if args.save_statistics is not None:
        features.save(args.save_statistics)
    other = reference() if reference else None
    distances, result = compare_sides(features, other)
    if other is not None:
        n, m = features.moments.n, other.moments.n or "unknown"
        title = f"{n} images against {m} of {args.reference}, {features.network}"
        # the spread over subsets is 0 where they are all of the images; the interval is not
        shown = {name: value for name, value in distances.items() if name != "kid_std"}
        print_scores(title, shown, result["intervals"])
        for warning in result["warnings"]:
            print(f"warning: {warning}")
    write_result(args.output, result)
    print(json.dumps(result))


def _read_generated(args: argparse.Namespace) -> None:
    """Read --generated as --images for a folder of images, and as --model for all else."""
    from diffalign.core.errors import UsageError

    if args.generated is None:
        return
    if args.images is not None:
        raise UsageError("--generated: give either it or --images")
    folder = Path(args.generated)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        args.images = folder
    else:
        args.model = args.generated


def _generation(args):  # type: ignore[no-untyped-def]
    from diffalign.cli.models import batching, drawing, evaluation, load, settle_drawing
    from diffalign.data.prompts import load_prompts
    from diffalign.evaluation.fid_sides import Generation

    settle_drawing(args)
    about = {
        **drawing(args),
        "images_per_prompt": args.images_per_prompt,
        "dtype": args.dtype,
    }
    prompts = load_prompts(args.prompts, limit=args.max_prompts)
    return Generation(lambda: load(args), prompts, evaluation(args), about, batching(args))


VERB = Verb("fid", "FID and its kin of a folder or a model", add_flags, run, shares=True)
