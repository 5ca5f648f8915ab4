"""Conversion of library and network errors into one line with advice.

Names of arguments in messages become the flags that users type.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

from diffalign.core import hub
from diffalign.core.errors import chain, one_line

NETWORK = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "huggingface_hub")
"""Libraries whose errors mean that a connection or a server failed."""
LONGEST = 300
"""Largest number of characters of a library's message."""


def library_line(error: BaseException | None) -> str | None:
    """Return one line for an error of a library, a server or a file's content.

    Return None for every other error.
    """
    lines = (_line(part) for part in chain(error))
    return next((line for line in lines if line is not None), None)


def _line(error: BaseException) -> str | None:
    name, module = type(error).__name__, type(error).__module__.partition(".")[0]
    text = one_line(error, limit=LONGEST)
    advice = hub.explain(error)
    if advice is not None:
        return f"{text} ({advice})"
    if module in NETWORK:
        return (
            f"the network or a server failed ({name}: {text}); check the connection, a mistyped "
            "path that was taken for a hub id, or name a local folder"
        )
    if isinstance(error, RecursionError):
        return "a file is nested too deeply to be read; make its brackets fewer"
    if isinstance(error, UnicodeError):
        return f"a file is not text in UTF-8 ({error}); save it as UTF-8"
    if name == "UnpicklingError":
        return (
            "weights in the pickle format are not read, since they can run code; convert them to .safetensors, or take "
            "those from the model's page"
        )
    if name == "SafetensorError":
        return f"a .safetensors file is damaged or cut ({text}); download or save it again"
    return None


def name_flags(text: str, flags: Mapping[str, str]) -> str:
    """Replace names of arguments in a message by the flags that users type.

    A name stands in backticks, or at the beginning before a colon. Domain code names arguments, because it does not
    know who calls it.

    Args:
        flags: flag of each argument.
    """
    text = re.sub(r"`(\w+)`", lambda match: flags.get(match[1], match[0]), text)
    return re.sub(r"^(\w+)(?==|: | must )", lambda match: flags.get(match[1], match[1]), text)


def report_to_launcher(line: str) -> None:
    """Pass an error line to torchrun, whose final report then shows it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file or not line:
        return
    details = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError):
        Path(file).write_text(json.dumps({"message": details}), encoding="utf-8")
