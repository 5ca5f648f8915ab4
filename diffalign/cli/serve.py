"""`diffalign serve-rewards`."""

from __future__ import annotations

import argparse

from diffalign.cli.verb import Verb


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `serve-rewards`."""
    parser.add_argument("--rewards", required=True, help="comma-separated")
    parser.add_argument(
        "--host", default="127.0.0.1", help="default: %(default)s, this machine alone"
    )
    parser.add_argument("--port", type=int, default=8100, help="default: %(default)s")
    parser.add_argument(
        "--timeout",
        default="300",
        help="seconds of scoring, of all or of each: 60, or pickscore=60,ocr=10; default: %(default)s",
    )
    parser.add_argument(
        "--max_bytes", type=int, default=256_000_000, help="of a request; default: %(default)s"
    )


def run(args: argparse.Namespace) -> None:
    """Serve until interrupted; the token of DIFFALIGN_REWARD_TOKEN is asked for where it is set."""
    from diffalign.rewards.serving import serve

    names = [n.strip() for n in args.rewards.split(",") if n.strip()]
    serve(names, host=args.host, port=args.port, timeout=args.timeout, max_bytes=args.max_bytes)


VERB = Verb(
    "serve-rewards",
    "rewards behind HTTP, for a GPU or an environment of their own (docs/rewards.md)",
    add_flags,
    run,
)
