"""Errors of the Hugging Face hub in one line, with advice."""

from __future__ import annotations

URL = "https://huggingface.co"
_PROBLEMS: tuple[tuple[tuple[str, ...], tuple[int, ...], str], ...] = (
    (
        ("GatedRepoError",),
        (403,),
        "is gated: accept its licence at {url}, then `hf auth login` with a token of that account",
    ),
    (
        ("RevisionNotFoundError",),
        (),
        "has no {revision}; {url}/commits lists what there is",
    ),
    (
        ("LocalEntryNotFoundError", "OfflineModeIsEnabled"),
        (),
        "is no folder or file here, is not in the hub's cache, and the hub cannot be reached: check the spelling and "
        "the network (HF_HUB_OFFLINE, proxies), or `hf download {id}` on a machine that reaches it and give the folder",
    ),
    (("EntryNotFoundError",), (), "has no such file: check the name at {url}"),
    (
        ("RepositoryNotFoundError",),
        (401, 404),
        "is no folder or file here and no repository that the hub shows you: check the spelling at {url}; a private "
        "one needs `hf auth login`",
    ),
)
"""Error classes of huggingface_hub, HTTP statuses, and their meaning. The first that fits counts."""


def status(error: BaseException) -> int | None:
    """Return the HTTP status of an error, or None."""
    return getattr(getattr(error, "response", None), "status_code", None)


def explain(
    error: BaseException, source: str | None = None, *, revision: str | None = None
) -> str | None:
    """Return one line for an error of the hub's client; None for another error.

    Args:
        source: hub id that was asked for, if it is known.
        revision: branch, tag or commit that was asked for.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    # a status of another server says nothing about the hub
    is_hub = any(kind.__module__.startswith("huggingface_hub") for kind in type(error).__mro__)
    code = status(error) if is_hub else None
    for classes, statuses, problem in _PROBLEMS:
        if not names.isdisjoint(classes) or code in statuses:
            return _line(problem, source, revision)
    return None


def unreachable(source: str) -> str:
    """Return one line for a missing model while the hub is unreachable."""
    return _line(_PROBLEMS[2][2], source, None)


def _line(problem: str, source: str | None, revision: str | None) -> str:
    missing = "such revision" if revision is None else f"revision {revision!r}"
    url = URL if source is None else f"{URL}/{source}"
    text = problem.format(url=url, revision=missing, id=source or "ID")
    return f"{source or 'the repository'} {text}"
