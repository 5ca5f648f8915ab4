"""Reader of text files: prompts, captions, tables and recipes.

The byte order mark selects the encoding; without one it is UTF-8. A line ends with LF, CR or CR LF only. U+2028, U+0085
and form feeds are ordinary characters of a line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffalign.core.errors import UserError

MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
"""Byte order marks and their codecs; the longer marks first."""


class TextError(UserError, ValueError):
    """A text file that cannot be read; the message names file and line."""


RANK = "rank:"
"""Prefix of a reward that ranks the images of a prompt by another: "rank:pickscore"."""
REMOTE = "remote:"
"""Prefix of a service's reward: "remote:http://HOST:PORT/NAME"."""


def suffix_of(path: str | Path) -> str:
    """Return the suffix of a file name in lower case, with its dot."""
    return Path(path).suffix.lower()


def read_text(path: Path, *, error: type[UserError] = TextError) -> str:
    """Return the text of a whole file, its lines separated by LF.

    Raises:
        error: the file cannot be opened or decoded, or holds a NUL character.
    """
    return "\n".join(line for _, line in read_lines(path, error=error))


def read_lines(path: Path, *, error: type[UserError] = TextError) -> Iterator[tuple[int, str]]:
    """Yield the number (from 1) and the text of each line, without its line end.

    Raises:
        error: the file cannot be opened or decoded, or a line holds a NUL character.
    """
    codec = "utf-8"
    try:
        with path.open("rb") as file:
            start = file.read(4)
        codec = next((name for mark, name in MARKS if start.startswith(mark)), codec)
        with path.open(encoding=codec) as file:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    raise error(
                        f"{path}:{number} is not readable: it holds a NUL character (UTF-16 without a byte order "
                        "mark?); save the file as UTF-8"
                    )
                # concatenated files have byte order marks inside
                yield number, line.removesuffix("\n").removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise error(_undecodable(path, codec)) from None
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}") from cause


def _undecodable(path: Path, codec: str) -> str:
    """Return a message that names the line and the offset of the first invalid byte."""
    data = path.read_bytes()
    try:
        data.decode(codec)
    except UnicodeDecodeError as cause:
        before = bytes(cause.object[: cause.start]).decode(codec, errors="ignore")
        line = before.replace("\r\n", "\n").replace("\r", "\n").count("\n") + 1
        offset = len(data) - len(cause.object) + cause.start
        name = codec.removesuffix("-sig").upper()
        return (
            f"{path}:{line} is not readable: byte 0x{data[offset]:02x} at offset {offset} is not {name}; "
            "save the file as UTF-8"
        )
    return f"{path} is not readable: it was changed while it was read"


def parse_json(text: str, place: str, *, error: type[UserError] = TextError) -> Any:
    """Return the value of a JSON text.

    Raises:
        error: the text is not JSON, is nested too deep, or has a key twice; the message names `place`.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        why = "nested too deep"
    except json.JSONDecodeError as cause:
        why = str(cause)
    except KeyError as cause:
        why = f"the key {cause} stands in it twice"
    except ValueError:
        why = "a number has too many digits"
    raise error(f"{place} is not valid JSON: {why}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a dictionary of the pairs, or raise KeyError for a key that occurs twice."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in names if names.count(name) > 1))
    return entries


def read_json(path: Path, *, error: type[UserError] = TextError) -> Any:
    """Return the value of a JSON file.

    Raises:
        error: the file cannot be read, or is not JSON.
    """
    return parse_json(read_text(path, error=error), str(path), error=error)


def read_json_lines(path: Path, *, error: type[UserError] = TextError) -> list[Any]:
    """Return the values of a file with one JSON text per line.

    Blank lines are left out.

    Raises:
        error: the file cannot be read, or a line is not JSON.
    """
    lines = read_lines(path, error=error)
    return [parse_json(text, f"{path}:{n}", error=error) for n, text in lines if text.strip()]


def unusable(text: str) -> str:
    """Return the reason why no tokenizer accepts a text, or an empty string."""
    for place, character in enumerate(text):
        if character == "\0" or "\ud800" <= character <= "\udfff":
            return f"character {place + 1} is U+{ord(character):04X}, which no tokenizer takes"
    return ""
