"""`diffalign pairs`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.cli import options, types
from diffalign.cli.flags import SampleFlags
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb

if TYPE_CHECKING:
    from diffalign.data.images import CaptionedImage
    from diffalign.rewards.composition import CompositeReward

RECIPE = "inversion-dpo"
"""Recipe that trains on pairs, and the start of the names of its variants."""
HELD_OUT = {"shapes:train": "shapes:held_out", "geneval:train": "geneval"}
"""Held-out prompts of the prompts that pairs are made of."""
PLACES = {
    "MODEL": "the model to train (`diffalign list models`, a folder or an id of the Hugging Face Hub)",
    "PROMPTS.txt": "your file of held-out prompts, one per line",
}
"""Words of the next command that stand for something of the user's."""


@dataclass(kw_only=True)
class Flags(SampleFlags):
    """Values of the flags of `pairs`."""

    images: Path | None
    rewards: list[str]
    output_dir: Path
    pick: str
    weights: str
    min_gap: float


def add_flags(parser: Parser) -> None:
    """Add the flags of `pairs`."""
    options.add_images(
        parser, text="make pairs of these images, several of each caption, and draw none"
    )
    options.add_prompts(parser, None)
    options.add_count(parser, "--max_prompts", None, "use only the first N prompts")
    options.add_rewards(parser)
    options.add_output_dir(parser, "runs/pairs", "folder of the images and of pairs.jsonl")
    options.add_count(parser, "--images_per_prompt", 4, "images of each prompt", low=2)
    options.add_count(
        parser,
        "--record_states",
        None,
        "also record N sampler states per image, so that Inversion-DPO needs no inversion "
        "(`pairs.inversion.solver=recorded`)",
    )
    parser.add_argument(
        "--pick",
        default="best_worst",
        choices=("best_worst", "nested", "all"),
        help="pairs of a prompt's images: the best with the worst; nested, also the second best with the second worst "
        "and so on; or all of different reward (default: %(default)s)",
    )
    parser.add_argument(
        "--weights",
        default="equal",
        choices=("equal", "rankdpo"),
        help="weight of a pair in training: all equal, or by gain and rank as RankDPO has it, which needs --pick all "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--min_gap",
        type=types.number(0),
        default=0.0,
        metavar="GAP",
        help="smallest difference of rewards that makes a pair (default: %(default)s)",
    )
    options.add_model(parser)
    options.add_drawing(parser)


def run(flags: Flags) -> None:
    """Score images and write preference pairs.

    The images are those of --images; without it missing images are generated first.
    """
    from diffalign.cli.output import counted, emit, suggest
    from diffalign.core import console, processes
    from diffalign.data.pairs.make import PairOptions, by_caption, by_place, make_pairs

    pick = PairOptions(flags.pick, flags.weights, flags.min_gap)
    state = processes.current()
    images, reward = _given(flags, flags.images) if flags.images else _drawn(flags)
    with console.counting("scores") as progress:
        result = make_pairs(
            flags.output_dir,
            images,
            reward,
            pick,
            batch_size=flags.batch_size or options.BATCH_SIZE,
            state=state,
            group=by_caption if flags.images else by_place,
            progress=progress,
        )
    if state.is_main_process:
        pairs, prompts = counted(result["pairs"], "pair"), counted(result["prompts"], "prompt")
        print(f"{pairs} of {prompts} in {result['file']}")
        if result["unreadable"]:
            print(f"{counted(result['unreadable'], 'image')} could not be read")
        suggest("train", *_training(flags))
        emit(result)


def _training(flags: Flags) -> list[str]:
    """Return the recipe of the model that drew, and the settings that it needs.

    Print what the user has to fill in.
    """
    import json

    from diffalign.config import load, recipes
    from diffalign.data.prompts import is_file

    # images that somebody has are not of --model's making
    model = None if flags.images else flags.model
    names = [name for name in recipes() if name.startswith(f"{RECIPE}-")]
    own = next((name for name in names if load(name).model.name == model), None)
    settings = [f"--pairs.source={flags.output_dir}"]
    if own is None:
        rewards = dict.fromkeys(flags.rewards, 1)
        settings += [f"--model.name={model or 'MODEL'}", f"--rewards={json.dumps(rewards)}"]
    held_out = load(own or RECIPE).prompts.evaluation
    if is_file(held_out) and not Path(held_out).is_file():
        settings.append(f"--prompts.evaluation={HELD_OUT.get(flags.prompts, 'PROMPTS.txt')}")
    missing = [f"{text} is {what}" for text, what in PLACES.items() if text in " ".join(settings)]
    if missing:
        print(f"{own or RECIPE} needs more settings: {'; '.join(missing)}")
    return [own or RECIPE, *settings]


def _given(flags: Flags, folder: Path) -> tuple[list[CaptionedImage], CompositeReward]:
    """Return the images of --images that can be compared, and the rewards."""
    from diffalign.cli.rewards import load_rewards
    from diffalign.core.errors import UsageError
    from diffalign.data.images import read_folder, require_captions
    from diffalign.data.pairs.make import comparable
    from diffalign.evaluation.geneval import SETTINGS

    for name in ("prompts", "lora", "record_states", "max_prompts"):
        if getattr(flags, name) is not None:
            raise UsageError(f"{name}: with `images` nothing is drawn; leave one of them out")
    if (flags.output_dir / SETTINGS).is_file() and flags.output_dir != folder:
        raise UsageError(
            f"output_dir: {flags.output_dir} holds images that were drawn, and their pairs; choose another folder"
        )
    images = read_folder(folder)
    require_captions(images, folder, why="pairs are of images of one caption")
    images = comparable(images, folder)
    return images, load_rewards(flags.rewards, [i.prompt.metadata for i in images])


def _drawn(flags: Flags) -> tuple[list[CaptionedImage], CompositeReward]:
    """Generate missing images in --output_dir, and return all images and the rewards."""
    from diffalign.cli.models import fill, settle_drawing
    from diffalign.cli.rewards import load_rewards
    from diffalign.core.errors import UsageError
    from diffalign.data.prompts import load_prompts
    from diffalign.evaluation.geneval import read_samples

    flags.prompts = flags.prompts or "shapes:train"
    if flags.record_states is not None and flags.lora is not None:
        raise UsageError(
            "record_states: states are recorded of the model that is trained later; leave out `lora`"
        )
    settle_drawing(flags)
    prompts = load_prompts(flags.prompts, limit=flags.max_prompts)
    reward = load_rewards(flags.rewards, [p.metadata for p in prompts])
    fill(flags, flags.output_dir, prompts, states=flags.record_states)
    images, _ = read_samples(flags.output_dir)
    return images, reward


VERB = Verb(
    "pairs",
    "make preference pairs of a model's images, or of a folder's, with rewards as the judge",
    add_flags,
    run,
    description="Draw images of prompts, score them with rewards, and write pairs.jsonl: which of a prompt's images "
    "are better.\nWith --images nothing is drawn. `pairs.source` of a recipe takes the folder "
    "(docs/preferences.md). The same command resumes.",
    shares=True,
    resumes=True,
    flags=Flags,
)
