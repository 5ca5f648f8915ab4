"""Queries to the hub for models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from diffalign.core.errors import one_line
from diffalign.core.hub import explain, status
from diffalign.pipelines.places import INDEX, UnknownModel

TIMEOUT = 10.0
"""Seconds after which a hub that does not answer counts as unreachable."""


@dataclass(frozen=True)
class Repository:
    """Model repository on the hub.

    Attributes:
        files: paths of its files; those in the local cache if the hub cannot be reached.
        reachable: True if the hub answered.
    """

    files: tuple[str, ...]
    reachable: bool

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` that avoid further requests to an unreachable hub."""
        return {} if self.reachable else {"local_files_only": True}


@lru_cache(maxsize=32)
def repository(
    source: str,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | None = None,
) -> Repository:
    """Query the hub for a model once, or list the local cache without an answer.

    Raises:
        UnknownModel: the hub has no such model, or denies access; the message says what to do.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().model_info(source, revision=revision, timeout=TIMEOUT, token=token)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UnknownModel(refusal(error, source, revision)) from error
    except OfflineModeIsEnabled:
        return Repository(cached_files(source, revision, cache_dir), reachable=False)
    except HfHubHTTPError as error:
        if status(error) in (401, 403):
            raise UnknownModel(refusal(error, source, revision)) from error
        return Repository(cached_files(source, revision, cache_dir), reachable=False)
    except Exception as error:
        # the HTTP library that raises depends on the version of the hub's client
        if not isinstance(error, OSError) and not type(error).__module__.startswith("httpx"):
            raise
        return Repository(cached_files(source, revision, cache_dir), reachable=False)
    return Repository(tuple(s.rfilename for s in info.siblings or ()), reachable=True)


def cached_files(
    source: str, revision: str | None = None, cache_dir: str | None = None
) -> tuple[str, ...]:
    """Return the paths of a model's files in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    indices = [
        try_to_load_from_cache(source, name, revision=revision, cache_dir=cache_dir)
        for name in (INDEX, "config.json")
    ]
    index = next((file for file in indices if isinstance(file, str)), None)
    if index is None:
        return ()
    root = Path(index).parent
    return tuple(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


def fetch_index(
    source: str,
    revision: str | None = None,
    *,
    repo: Repository,
    token: str | bool | None = None,
    cache_dir: str | None = None,
) -> Path:
    """Download the `model_index.json` of a model, and return its path in the local cache.

    Raises:
        UnknownModel: the model has no such file, or the hub denies access; the message says what to do.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
    )

    try:
        return Path(
            hf_hub_download(
                source,
                INDEX,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=not repo.reachable,
            )
        )
    except RemoteEntryNotFoundError as error:
        single = [f for f in repo.files if f.endswith(".safetensors") and "/" not in f]
        advice = (
            f"; download a file of it, such as {single[0]}, and give its path" if single else ""
        )
        raise UnknownModel(
            f"{source} has no {INDEX}: it is no pipeline in diffusers' layout{advice}"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UnknownModel(refusal(error, source, revision)) from error


def refusal(error: BaseException, source: str, revision: str | None = None) -> str:
    """Return one line with the reason of the hub's error and advice."""
    line = explain(error, source, revision=revision)
    return line or f"{source} could not be fetched: {one_line(error)}"
