"""Start of a reward service: check the arguments, load the rewards, listen."""

from __future__ import annotations

import math
from collections.abc import Sequence

from diffalign.core.errors import UsageError
from diffalign.rewards import registry
from diffalign.rewards.own import attribute_of
from diffalign.rewards.remote import TOKEN
from diffalign.web.listening import address_of, listen, read_token

DEFAULT_TIMEOUT = 300.0


def serve(names: Sequence[str], *, host: str, port: int, timeout: str, max_bytes: int) -> None:
    """Serve rewards until interrupted.

    If DIFFALIGN_REWARD_TOKEN is set, clients must send it as their token.

    Args:
        timeout: seconds of scoring, see `read_timeout`.
        max_bytes: largest size of a request in bytes.

    Raises:
        UsageError: the service could be reached from outside without a token, no reward is named, or the port is taken.
    """
    try:
        from diffalign.rewards.service import Limits, build_app
        from diffalign.web.connections import make_server
    except ModuleNotFoundError as error:
        raise UsageError(f"serve-rewards needs `pip install diffalign[server]`: {error}") from error
    token = read_token(TOKEN, host=host, where=" and where it is used")
    if not names:
        raise UsageError("rewards: names none")
    served_names = {attribute_of(name): name for name in names}
    if len(served_names) < len(names):
        raise UsageError(
            f"rewards={','.join(names)}: two of them have the same name. Serve them apart."
        )
    for name in names:
        registry.check_name(name)
    default, timeouts = read_timeout(timeout, list(served_names))
    limits = Limits(max_bytes=max_bytes, timeout=default, timeouts=timeouts)
    listening = listen(host, port)
    rewards = {served: registry.create(name) for served, name in served_names.items()}
    for reward in rewards.values():
        reward.prepare()
    app = build_app(rewards, token=token, limits=limits)
    for name in rewards:
        print(f"remote:{address_of(listening, host)}/{name}", flush=True)
    make_server(app).run(sockets=[listening])


def read_timeout(text: str, names: Sequence[str]) -> tuple[float, dict[str, float]]:
    """Return the default time limit in seconds, and those of named rewards.

    Args:
        text: "60", "pickscore=60,ocr=10", or both as in "60,ocr=10".

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
            raise UsageError(f"timeout: seconds must be a positive number, got {part!r}")
        if not name:
            default = seconds
        elif name in names:
            timeouts[name] = seconds
        else:
            raise UsageError(f"timeout: {name!r} is not among `rewards` {','.join(names)}")
    return default, timeouts
