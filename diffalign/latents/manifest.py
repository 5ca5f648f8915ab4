"""What a moved pipeline's folder says of itself, and refuses to be loaded without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.latents.codec import LatentCodec

MANIFEST = "dcgen.json"


class ManifestError(UserError, ValueError):
    """A folder whose autoencoder or text length is not the one that its denoiser was trained with."""


def write_manifest(folder: Path, codec: LatentCodec, *, text_tokens: int) -> None:
    """Beside `model_index.json`."""
    facts = {"codec": codec.to_dict(), "text_tokens": text_tokens}
    (folder / MANIFEST).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def check_manifest(folder: Path, codec: LatentCodec) -> dict[str, Any] | None:
    """The manifest of a folder, None where it has none.

    Raises:
        ManifestError: it is damaged, or of another autoencoder.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        there, here = found["codec"], codec.to_dict()
        int(found["text_tokens"])
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{file} is damaged: {error}") from error
    for name, value in here.items():
        if there.get(name) != value:
            raise ManifestError(
                f"{folder} was trained with another autoencoder: {name} is {there.get(name)} in {MANIFEST}, and "
                f"{value} of the one that is there"
            )
    return found
