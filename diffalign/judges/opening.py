"""Opening of judges by name."""

from __future__ import annotations

from pathlib import Path

from diffalign.judges.base import Judge, JudgeError

EXACT, RECORDED = "exact", "recorded"


def open_judge(name: str) -> Judge:
    """Return the judge of a name.

    Args:
        name: `exact` (the verifier of Shapes), URL#MODEL (an endpoint), a folder, or a hub id with an optional
            @REVISION.

    Raises:
        JudgeError: the judge cannot be opened.
    """
    if name == EXACT:
        from diffalign.judges.exact import ExactJudge

        return ExactJudge()
    if name.startswith(("http://", "https://")):
        from diffalign.judges.endpoint import EndpointJudge

        url, _, model = name.partition("#")
        if not model:
            raise JudgeError(
                f"judge={name}: the model is missing. Name it behind #, as in {url}#MODEL"
            )
        return EndpointJudge(url, model)
    place = name.partition("@")[0]
    if not Path(place).is_dir() and place.count("/") != 1:
        raise JudgeError(
            f"judge={name}: there is no such folder. Name exact, recorded, URL#MODEL, a folder or a hub id"
        )
    from diffalign.judges.local import LocalJudge

    return LocalJudge(name)
