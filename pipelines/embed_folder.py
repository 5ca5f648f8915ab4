"""Folder of prompt embeddings, which runs share."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffalign.core.files import aside
from diffalign.core.fingerprint import fingerprint, of_json
from diffalign.pipelines.offloading import text_encoders
from diffalign.types import PromptEmbeds

if TYPE_CHECKING:
    from diffalign.pipelines.base import TextToImageModel


class EmbedFolder:
    """Folder of embeddings by text encoders and prompt, one file each.

    Embeddings of other encoders, of another dtype or of another length stand in other folders. A file that cannot be
    read counts as absent, and is written again.

    Args:
        folder: folder for the embeddings of any number of models.
        model: model whose text encoders are loaded.
    """

    def __init__(self, folder: str | Path, model: TextToImageModel) -> None:
        encoders = text_encoders(model.pipeline)
        key = {
            "family": model.family,
            "encoders": fingerprint(encoders),
            "dtypes": {name: str(part.dtype) for name, part in encoders.items()},
            "max_sequence_length": model.max_sequence_length,
        }
        self.folder = Path(folder).expanduser() / of_json(key)[:16]

    def read(self, prompt: str) -> PromptEmbeds | None:
        """Return the embedding (1 row) of a prompt on the CPU, or None."""
        try:
            return PromptEmbeds(**load_file(self._file(prompt)))
        except (OSError, SafetensorError, TypeError):
            return None

    def write(self, prompt: str, embeds: PromptEmbeds) -> None:
        """Save the embedding of a prompt (1 row)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f.name: getattr(embeds, f.name) for f in fields(embeds)}
        with aside(self._file(prompt)) as file:
            save_file({n: t.contiguous().cpu() for n, t in tensors.items() if t is not None}, file)

    def _file(self, prompt: str) -> Path:
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.safetensors"
