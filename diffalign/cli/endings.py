"""Conversion of errors into one line and an exit status."""

from __future__ import annotations

import signal

from diffalign.cli.boundary import library_line, name_flags
from diffalign.cli.parser import Parser, flag_of
from diffalign.cli.verb import Verb
from diffalign.core.errors import ReportedError, UserError, explain, full_disk
from diffalign.core.interruption import Interrupted, name_of


def ending(
    error: BaseException, verb: Verb, flags: object, *, parser: Parser | None = None
) -> tuple[str, int] | None:
    """Return the line to print and the exit status of an error.

    Return None for a fault of the program, so that its traceback is shown.

    Args:
        flags: values of the verb's flags.
        parser: parser of the verb, which knows how its flags are spelt.
    """
    # a dry run leaves nothing to go on from
    resumes = verb.resumes and not getattr(flags, "dry_run", False)
    if isinstance(error, KeyboardInterrupt):
        if not isinstance(error, Interrupted):
            error = Interrupted(signal.SIGINT, str(error))
        note = "the same command goes on from where it was" if resumes else "nothing is resumed"
        return f"interrupted ({name_of(error.number)}): {str(error) or note}", error.exit_code
    if isinstance(error, ReportedError):
        return "", 2
    if isinstance(error, UserError):
        line = f"diffalign: error: {name_flags(str(error), _spelling(parser))}"
        return line, error.exit_code
    text = library_line(error) or explain(error, memory=memory_advice(flags))
    if text is None:
        return None
    more = "goes on from where it was" if resumes else "can be run again"
    if full_disk(error) is not None:
        return f"diffalign: error: {text}, and the same command {more}", 2
    return f"diffalign: error: {text}" + (f". The same command {more}" if resumes else ""), 2


def _spelling(parser: Parser | None) -> dict[str, str]:
    """Return the flags of a verb, by the argument that each sets."""
    actions = parser._actions if parser is not None else ()
    return {action.dest: flag_of(action) for action in actions if action.option_strings}


def memory_advice(flags: object) -> str:
    """Return advice that names the flags of a verb that reduce its memory use."""
    parts = []
    # None before the model's card has been read: its batch is not known, and may be 1
    size = getattr(flags, "batch_size", 1)
    if size is None:
        parts.append("a smaller --batch_size")
    elif size > 1:
        parts.append(f"a smaller --batch_size (now {size})")
    if getattr(flags, "dtype", None) == "float32":
        parts.append("--dtype=bfloat16")
    if getattr(flags, "mixed_precision", None) == "no":
        parts.append("--mixed_precision=bf16")
    if hasattr(flags, "height"):
        parts.append("a smaller --height and --width")
    if hasattr(flags, "resolution"):
        parts.append(f"a smaller --resolution (now {flags.resolution})")
    if getattr(flags, "settings", None) is not None and hasattr(flags, "recipe"):
        parts.append("smaller micro-batches (--pairs.micro_batch_size, --latents.micro_batch_size)")
    if hasattr(flags, "model") and not hasattr(flags, "backend"):
        parts.append("a quantised model (`diffalign quantize`)")
    parts.append("a machine or a device with more memory")
    return "What helps: " + ", ".join(parts)
