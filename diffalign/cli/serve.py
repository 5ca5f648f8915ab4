"""`diffalign serve-rewards`."""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.cli import types
from diffalign.cli.flags import Values
from diffalign.cli.parser import Parser
from diffalign.cli.verb import Verb


@dataclass(kw_only=True)
class Flags(Values):
    """Values of the flags of `serve-rewards`."""

    rewards: list[str]
    host: str
    port: int
    timeout: str
    max_bytes: int


def add_flags(parser: Parser) -> None:
    """Add the flags of `serve-rewards`."""
    parser.add_argument(
        "--rewards",
        type=types.names,
        required=True,
        metavar="NAME,...",
        help="names from `diffalign list rewards`, separated by commas",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; other machines can reach anything but the default (default: %(default)s)",
    )
    parser.add_argument(
        "--port",
        type=types.count(0),
        default=8100,
        help="port to listen on; 0: any that is free (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        default="300",
        metavar="SECONDS",
        help="time limit of scoring, for all rewards or for each: 60, or pickscore=60,ocr=10 (default: %(default)s)",
    )
    parser.add_argument(
        "--max_bytes",
        type=types.count(),
        default=256_000_000,
        metavar="N",
        help="largest request in bytes (default: %(default)s)",
    )


def run(flags: Flags) -> None:
    """Serve rewards until interrupted.

    If DIFFALIGN_REWARD_TOKEN is set, clients must send it as their token.
    """
    from diffalign.rewards.serving import serve

    serve(
        flags.rewards,
        host=flags.host,
        port=flags.port,
        timeout=flags.timeout,
        max_bytes=flags.max_bytes,
    )


VERB = Verb(
    "serve-rewards",
    "serve rewards over HTTP, from another GPU or environment (docs/rewards.md)",
    add_flags,
    run,
    has_result=False,
    quiet=False,
    epilog="""example:
  diffalign serve-rewards --rewards pickscore,ocr --port 8100""",
    flags=Flags,
)
