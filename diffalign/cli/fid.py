"""`diffalign evaluate fid`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.cli import options, types
from diffalign.cli.flags import SampleFlags
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb

if TYPE_CHECKING:
    from diffalign.evaluation.fid import FeatureSet
    from diffalign.evaluation.fid_sides import Generation


@dataclass(kw_only=True)
class Flags(SampleFlags):
    """Values of the flags of `evaluate fid`."""

    images: Path | None
    generated: str | None
    reference: str | None
    network: str | None
    save_statistics: Path | None
    output: Path | None


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


def run(flags: Flags) -> None:
    """Compare generated images with a reference by FID and related distances.

    With --save_statistics also save the features of the generated images.
    """
    from diffalign.cli.output import print_scores, write_result
    from diffalign.evaluation.fid_sides import compare_sides

    _check(flags)
    features = _features(flags)
    if features is None:
        return
    generated, reference = features
    if flags.save_statistics is not None:
        print(f"statistics: {flags.save_statistics}")
    distances, result = compare_sides(generated, reference)
    if reference is not None:
        counts = f"{generated.moments.n} images against {reference.moments.n or 'unknown'}"
        # the spread over subsets is 0 if a subset holds all images; the interval is not
        shown = {name: value for name, value in distances.items() if name != "kid_std"}
        title = f"{counts} of {flags.reference}, {generated.network}"
        print_scores(title, shown, result["intervals"])
        print("".join(f"warning: {warning}\n" for warning in result["warnings"]), end="")
    write_result(flags.output, result)


def _check(flags: Flags) -> None:
    """Settle which images are generated, and check the reference before anything is loaded."""
    from diffalign.core.errors import UsageError
    from diffalign.evaluation.fid import statistics_path

    if flags.generated is not None:
        if flags.images is not None:
            raise UsageError("give either it or `images`", setting="generated")
        if types.is_image_folder(flags.generated):
            flags.images = types.path(flags.generated)
        else:
            flags.model = flags.generated
    if flags.reference is None and flags.save_statistics is None:
        raise UsageError(
            "evaluate fid needs --reference (a folder, statistics (.npz) or shapes:held_out) or --save_statistics"
        )
    if flags.save_statistics is not None:
        flags.save_statistics = statistics_path(flags.save_statistics)


def _features(flags: Flags) -> tuple[FeatureSet, FeatureSet | None] | None:
    """Return the features of the generated images and of the reference, on the main process."""
    from diffalign.core import console, processes
    from diffalign.evaluation.fid_sides import generated_side, reference_side
    from diffalign.rewards.features import load_network

    batch = flags.batch_size or options.BATCH_SIZE
    # look up all files before a network is downloaded, a model loaded or an image generated
    with console.counting("images") as progress, console.counting("reference") as other_progress:
        reference = flags.reference and reference_side(
            flags.reference,
            batch_size=batch,
            max_prompts=flags.max_prompts,
            progress=other_progress,
        )
        source = flags.images or _generation(flags)
        generated = generated_side(source, batch_size=batch, progress=progress)
        # before the network, because joining the processes selects this process's GPU
        state = processes.current()
        network = load_network(flags.network or _default_network(flags))
        compute_reference = reference and reference(network)
        features = generated(network, state)
        if not state.is_main_process:
            return None
        if flags.save_statistics is not None:
            features.save(flags.save_statistics)
        return features, compute_reference() if compute_reference else None


def _default_network(flags: Flags) -> str:
    """Return the network of the features for Shapes, or for photographs."""
    of_shapes = (flags.reference or "").startswith("shapes:") or (
        flags.images is None and flags.model.startswith("shapes-")
    )
    return "shapes_clip" if of_shapes else "inception"


def _generation(flags: Flags) -> Generation:
    """Return the model, prompts and settings that generate the images to compare."""
    from diffalign.cli.models import drawing, load, recorded, settle_drawing
    from diffalign.data.prompts import load_prompts
    from diffalign.evaluation.fid_sides import Generation

    settle_drawing(flags)
    about = {**recorded(flags), "images_per_prompt": flags.images_per_prompt, "dtype": flags.dtype}
    prompts = load_prompts(flags.prompts, limit=flags.max_prompts)
    return Generation(lambda: load(flags), prompts, drawing(flags), about)


VERB = Verb(
    "fid",
    "compare images with a reference: FID, KID, CMMD, precision and recall",
    add_flags,
    run,
    shares=True,
    flags=Flags,
)
