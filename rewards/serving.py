"""Start a reward service: check the arguments, load the rewards, listen."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from diffalign.core.errors import UsageError
from diffalign.rewards import registry
from diffalign.rewards.remote import TOKEN

CONNECTIONS = 64
DEFAULT_TIMEOUT = 300.0


def serve(names: Sequence[str], *, host: str, port: int, timeout: str, max_bytes: int) -> None:
    """Serve rewards until interrupted; clients need the token of DIFFALIGN_REWARD_TOKEN where it is set.

    Args:
        timeout: seconds of scoring, as `read_timeout` reads them.
        max_bytes: limit of a request.

    Raises:
        UsageError: the service could be reached from outside without a token, or no reward is named.
    """
    try:
        import uvicorn

        from diffalign.rewards.service import Limits, build_app
    except ModuleNotFoundError as error:
        raise UsageError(f"serve-rewards needs `pip install diffalign[server]`: {error}") from error
    token = os.environ.get(TOKEN) or None
    if host not in ("127.0.0.1", "localhost", "::1") and token is None:
        raise UsageError(
            f"--host {host}: others can reach the service; set {TOKEN} here and where it is used"
        )
    if not names:
        raise UsageError("--rewards names none")
    default, timeouts = read_timeout(timeout, names)
    limits = Limits(max_bytes=max_bytes, timeout=default, timeouts=timeouts)
    rewards = {name: registry.create(name) for name in names}
    for reward in rewards.values():
        reward.prepare()
    app = build_app(rewards, token=token, limits=limits)
    for name in rewards:
        print(f"remote:http://{host}:{port}/{name}", flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning", limit_concurrency=CONNECTIONS)


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
