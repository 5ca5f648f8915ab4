"""The verb serve-rewards."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence

from diffalign.core.errors import UsageError
from diffalign.rewards import registry
from diffalign.rewards.remote import TOKEN

CONNECTIONS = 64
DEFAULT_TIMEOUT = 300.0


def serve_rewards(args: argparse.Namespace) -> int:
    """Serve until interrupted; the token of DIFFALIGN_REWARD_TOKEN is asked for where it is set."""
    try:
        import uvicorn

        from diffalign.rewards.service import Limits, build_app
    except ModuleNotFoundError as error:
        raise UsageError(f"serve-rewards needs `pip install diffalign[server]`: {error}") from error
    token = os.environ.get(TOKEN) or None
    if args.host not in ("127.0.0.1", "localhost", "::1") and token is None:
        raise UsageError(
            f"--host {args.host}: others can reach the service; set {TOKEN} here and where it is used"
        )
    names = [n.strip() for n in args.rewards.split(",") if n.strip()]
    if not names:
        raise UsageError("--rewards names none")
    timeout, timeouts = read_timeout(args.timeout, names)
    limits = Limits(max_bytes=args.max_bytes, timeout=timeout, timeouts=timeouts)
    rewards = {name: registry.create(name) for name in names}
    for reward in rewards.values():
        reward.prepare()
    app = build_app(rewards, token=token, limits=limits)
    for name in rewards:
        print(f"remote:http://{args.host}:{args.port}/{name}", flush=True)
    uvicorn.run(
        app, host=args.host, port=args.port, log_level="warning", limit_concurrency=CONNECTIONS
    )
    return 0


def read_timeout(text: str, names: Sequence[str]) -> tuple[float, dict[str, float]]:
    """Seconds for all rewards and for those that are named: of "60", "pickscore=60,ocr=10" or both, "60,ocr=10".

    Raises:
        UsageError: a part is no positive number, or names a reward that is not served.
    """
    default, timeouts = DEFAULT_TIMEOUT, {}
    for part in text.split(","):
        name, _, number = (x.strip() for x in part.rpartition("="))
        try:
            seconds = float(number)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise UsageError(f"--timeout: seconds must be a positive number, got {part!r}")
        if not name:
            default = seconds
        elif name in names:
            timeouts[name] = seconds
        else:
            raise UsageError(f"--timeout: {name!r} is not among --rewards {','.join(names)}")
    return default, timeouts
