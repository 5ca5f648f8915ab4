"""The command line's entry point. torch is imported inside the verb that needs it, so `--help` answers at once."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from diffalign import __version__
from diffalign.cli import (
    autoencoder,
    bench,
    convert,
    demo,
    evaluate,
    generate,
    listing,
    merge,
    pairs,
    precompute,
    qsched,
    quantize,
    serve,
    train,
)
from diffalign.cli.endings import ending
from diffalign.cli.verb import Verb
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
    bench.VERB,
    serve.VERB,
    listing.VERB,
)
TALKATIVE = ("torchao", "torch.utils._pytree")
"""Where torchao is installed, both warn on import of things that do not matter here."""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="diffalign",
        description="Align text-to-image diffusion models, make them fast, and prove both.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"diffalign {__version__}")
    _add_verbs(parser, VERBS, dest="verb")
    return parser


def _add_verbs(parser: argparse.ArgumentParser, verbs: Sequence[Verb], *, dest: str) -> None:
    choices = parser.add_subparsers(dest=dest, required=True, metavar=dest.upper())
    for verb in verbs:
        own = choices.add_parser(
            verb.name, help=verb.help, description=verb.description or f"{verb.help}."
        )
        if verb.verbs:
            _add_verbs(own, verb.verbs, dest="what")
        else:
            own.set_defaults(chosen=verb)
            verb.add_flags(own)


def spell_out(argv: Sequence[str]) -> list[str]:
    """Put the lower verb behind its verb: `evaluate --images DIR rewards`, and `evaluate` alone."""
    words = list(argv)
    verb = next((v for v in VERBS if v.verbs and words[:1] == [v.name]), None)
    if verb is None or set(words[1:2]) & {"-h", "--help"}:
        return words
    names = {lower.name for lower in verb.verbs}
    for i, word in enumerate(words[1:], 1):
        value = words[i - 1].startswith("--") and "=" not in words[i - 1]
        if word in names and not value:
            return [verb.name, word, *words[1:i], *words[i + 1 :]]
    return [verb.name, verb.verbs[0].name, *words[1:]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; a user's error is one line, not a traceback."""
    parser = build_parser()
    args, rest = parser.parse_known_args(spell_out(sys.argv[1:] if argv is None else argv))
    verb: Verb = args.chosen
    if rest and not verb.takes_settings:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.settings = rest
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with ends_at_once():
            if not verb.shares:
                _check_alone(verb)
            verb.run(args)
    except (KeyboardInterrupt, Exception) as error:
        end = ending(error, verb, args)
        if end is None:
            raise
        line, code = end
        if line:
            print(line, file=sys.stderr)
        return code
    return 0


def _check_alone(verb: Verb) -> None:
    """Raise UsageError where several processes run a verb that shares no work."""
    if "LOCAL_RANK" in os.environ:
        from diffalign.core.processes import launched

        if (launched() or 1) > 1:
            raise UserError(
                f"{verb.name} shares no work: start one process, without accelerate or torchrun"
            )
