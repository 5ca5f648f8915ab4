"""Entry point of the command line.

Only verbs that need torch import it, inside their `run`, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from diffalign import __version__
from diffalign.cli import (
    autoencoder,
    bench,
    compose,
    convert,
    demo,
    evaluate,
    generate,
    listing,
    merge,
    optimise,
    options,
    output,
    pairs,
    precompute,
    qsched,
    quantize,
    serve,
    serve_images,
    train,
)
from diffalign.cli.boundary import report_to_launcher
from diffalign.cli.endings import ending
from diffalign.cli.flags import Values
from diffalign.cli.parser import Parser
from diffalign.cli.types import expand_home
from diffalign.cli.verb import Verb
from diffalign.core import console
from diffalign.core.errors import UserError
from diffalign.core.interruption import ends_at_once

EPILOG = """examples:
  diffalign demo
  diffalign train awm-shapes-sd3 --optimizer.learning_rate=1e-3 --output_dir runs/mine
  diffalign generate "a photo of a red circle" --model shapes-sd3 --lora runs/demo/lora
  diffalign evaluate --model shapes-sd3 --lora runs/demo/lora --rewards verifier
  diffalign list recipes
"""
VERBS = (
    demo.VERB,
    train.VERB,
    precompute.VERB,
    generate.VERB,
    pairs.VERB,
    evaluate.VERB,
    convert.VERB,
    merge.VERB,
    autoencoder.VERB,
    quantize.VERB,
    qsched.VERB,
    optimise.VERB,
    compose.VERB,
    bench.VERB,
    serve_images.VERB,
    serve.VERB,
    listing.VERB,
)


def build_parser(kind: type[Parser] = Parser) -> Parser:
    """Build the parser of all verbs."""
    parser = kind(
        prog="diffalign",
        description="Align text-to-image diffusion models, make them fast, and measure both.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"diffalign {__version__}")
    _add_verbs(parser, VERBS, dest="verb")
    return parser


def _add_verbs(parser: Parser, verbs: Sequence[Verb], *, dest: str) -> None:
    choices = parser.add_subparsers(dest=dest, required=True, metavar="VERB")
    for verb in verbs:
        own = choices.add_parser(
            verb.name,
            help=verb.help,
            description=verb.description or f"{verb.help[0].upper()}{verb.help[1:]}.",
            epilog=verb.epilog,
        )
        if verb.verbs:
            _add_verbs(own, verb.verbs, dest="what")
        else:
            own.set_defaults(chosen=verb, parser=own)
            verb.add_flags(own)
            options.add_screen(own, results=verb.has_result)


def spell_out(argv: Sequence[str]) -> list[str]:
    """Move a lower verb behind its verb, and add it if it is missing.

    Examples are `evaluate --images DIR rewards`, and `evaluate` alone.
    """
    words = list(argv)
    verb = next((v for v in VERBS if v.verbs and words[:1] == [v.name]), None)
    if verb is None or set(words[1:2]) & {"-h", "--help"}:
        return words
    names = {lower.name for lower in verb.verbs}
    for i, word in enumerate(words[1:], 1):
        value = words[i - 1].startswith("--") and "=" not in words[i - 1]
        if word in names and not value:
            return [verb.name, word, *words[1:i], *words[i + 1 :]]
    # the parser refuses a misspelt name
    if words[1:] and not words[1].startswith("-"):
        return words
    return [verb.name, verb.verbs[0].name, *words[1:]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    An error prints one line, and a traceback only with --verbose.
    """
    parser = build_parser()
    words = spell_out(sys.argv[1:] if argv is None else argv)
    try:
        args, rest = parser.parse_known_args(words)
        if rest and not args.chosen.takes_settings:
            args.parser.unknown(rest)
        args.settings = [expand_home(word) for word in rest]
    except UserError as error:
        _print_error(f"diffalign: error: {error}")
        return 2
    with (
        console.quiet(verbose=args.verbose or not args.chosen.quiet),
        output.screen(json_only=getattr(args, "json", False)),
    ):
        flags = args.chosen.flags.taken_from(vars(args))
        return _run(args.chosen, flags, args)


def _run(verb: Verb, flags: Values, args: argparse.Namespace) -> int:
    try:
        with ends_at_once():
            if not verb.shares:
                _check_alone(verb)
            verb.run(flags)
            sys.stdout.flush()
    except BrokenPipeError:
        # the reader, such as `head`, has ended, so that the rest of the buffer cannot be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (KeyboardInterrupt, Exception) as error:
        end = ending(error, verb, flags, parser=args.parser)
        if end is None:
            raise
        if args.verbose:
            traceback.print_exception(error, file=console.stderr())
        line, code = end
        _print_error(line, expected=isinstance(error, UserError | KeyboardInterrupt))
        return code
    return 0


def _print_error(line: str, *, expected: bool = True) -> None:
    """Print an error of this process.

    An expected error is printed by the first process only. A failure of memory, disk or network is printed by every
    process that it hits.
    """
    rank = os.environ.get("RANK", "0")
    if line and (rank == "0" or not expected):
        print(line if rank == "0" else f"process {rank}: {line}", file=console.stderr())
    report_to_launcher(line)


def _check_alone(verb: Verb) -> None:
    """Raise UserError if several processes run a verb that shares no work."""
    if "LOCAL_RANK" in os.environ:
        from diffalign.core.processes import launched

        if (launched() or 1) > 1:
            raise UserError(
                f"`{verb.name}` runs in one process. Start it without accelerate or torchrun"
            )
