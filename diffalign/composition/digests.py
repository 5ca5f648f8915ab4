"""Digests of what a stage was made from."""

from __future__ import annotations

from pathlib import Path

from diffalign.core.fingerprint import of_json, of_place
from diffalign.pipelines.registry import resolve, source_of
from diffalign.shapes import CHECKPOINTS

LENGTH = 12
"""Digits of a digest in the name of a folder."""


def of_base(name: str, dtype: str) -> str:
    """Return the digest of a base: of its files if they are on this machine, else of its name."""
    spec = resolve(name)
    source = source_of(spec)
    return of_json([of_place(source) or source, spec.revision, spec.lora, spec.scheduler, dtype])


def of_listing(place: str | None) -> str | None:
    """Return a digest of the names, sizes and times of a place's files.

    There may be too many files to read them. A plain name of an autoencoder that ships means its files. Return None for
    anything else that is not here.
    """
    path = Path(place) if place else None
    if path is None:
        return None
    if not path.exists():
        path = CHECKPOINTS / path if "/" not in str(place) else path
    if not path.exists():
        return None
    files = sorted(p for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file())
    stats = [(p.relative_to(path).as_posix(), p.stat()) for p in files]
    return of_json([[name, s.st_size, s.st_mtime_ns] for name, s in stats])
