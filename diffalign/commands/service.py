"""The verb serve-rewards."""

from __future__ import annotations

import argparse
import os

from diffalign.errors import UsageError
from diffalign.rewards import registry
from diffalign.rewards.remote import TOKEN

CONNECTIONS = 64


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
    rewards = {}
    for name in (n.strip() for n in args.rewards.split(",") if n.strip()):
        rewards[name] = registry.create(name)
        rewards[name].prepare()
    if not rewards:
        raise UsageError("--rewards names none")
    limits = Limits(max_bytes=args.max_bytes, timeout=args.timeout)
    app = build_app(rewards, token=token, limits=limits)
    for name in rewards:
        print(f"remote:http://{args.host}:{args.port}/{name}", flush=True)
    uvicorn.run(
        app, host=args.host, port=args.port, log_level="warning", limit_concurrency=CONNECTIONS
    )
    return 0
