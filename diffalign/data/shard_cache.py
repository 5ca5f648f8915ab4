"""Cache that `diffalign precompute` writes: shards of tensors and an index of their rows.

A shard is one safetensors file, written atomically. Its header names its rows and where the next shard begins. The file
`manifest.json` holds every value that the cache depends on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffalign.config import differences
from diffalign.core.errors import UserError
from diffalign.core.files import aside, contents, write_text
from diffalign.data.pairs.records import held_out
from diffalign.types import PromptEmbeds

MANIFEST, INDEX = "manifest.json", "index.parquet"
PROMPT_PARTS = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")


@dataclass
class Shard:
    """Consecutive items of a source; the next shard begins at row `stop` of the source."""

    number: int
    items: list[Any]
    stop: int


def prompt_tensors(
    prompts: Sequence[str], embed: Callable[[Sequence[str]], PromptEmbeds]
) -> dict[str, Tensor]:
    """Return the prompt tensors of a shard: the embeddings of each distinct prompt once.

    The tensor `prompt_row` (N,) gives the row of each item's prompt among them.
    """
    if not prompts:
        return {}
    place = {text: i for i, text in enumerate(dict.fromkeys(prompts))}
    embeds = embed(list(place)).to("cpu")
    parts = {name: getattr(embeds, name) for name in PROMPT_PARTS}
    prompt_rows = {"prompt_row": torch.tensor([place[text] for text in prompts])}
    return prompt_rows | {k: v for k, v in parts.items() if v is not None}


class CacheError(UserError, RuntimeError):
    """Cache that belongs to other settings, is incomplete, or cannot be written."""


class ShardCache:
    """Cache of shards in one folder.

    Rows are numbered from 0 over all shards, and each has a prompt.
    """

    rows: ClassVar[str]
    """Name of the rows in facts and counts, such as images."""
    setting: ClassVar[str]
    """Name of the setting that holds the cache's folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def claim(self, key: Mapping[str, Any]) -> None:
        """Write the values that the cache depends on into its manifest.

        Raises:
            CacheError: the folder holds a cache that was made from other values, or holds other files.
        """
        file = self.folder / MANIFEST
        if file.is_file():
            lines = differences(self.manifest["key"], json.loads(json.dumps(key)))
            if not lines:
                return
            if self.complete or self.begun:
                raise CacheError(
                    f"{self.folder} was made from something else (there, here):\n  "
                    + "\n  ".join(lines)
                    + f"\nchoose another {self.setting}, or delete that folder"
                )
        elif contents(self.folder):
            raise CacheError(
                f"{self.folder} is not empty and was not created by diffalign. Choose another {self.setting}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"key": key}, indent=1))

    @property
    def begun(self) -> bool:
        """True if the folder holds a shard; without one it belongs to no source yet."""
        return any(self.folder.glob("shard-*.safetensors"))

    @property
    def manifest(self) -> dict[str, Any]:
        file = self.folder / MANIFEST
        try:
            manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CacheError(
                f"{self.folder} is no cache of {self.rows} ({error}); `diffalign precompute` makes one"
            ) from error
        return manifest

    @property
    def complete(self) -> bool:
        return (self.folder / MANIFEST).is_file() and self.rows in self.manifest

    def shard(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def write_shard(self, number: int, tensors: Mapping[str, Tensor], facts: Any) -> None:
        """Write a shard atomically.

        Raises:
            CacheError: the shard cannot be written, as on a full disk; earlier shards stay.
        """
        path = self.shard(number)
        try:
            with aside(path) as file:
                save_file(
                    {k: v.contiguous().cpu() for k, v in tensors.items()},
                    file,
                    metadata={"facts": json.dumps(facts)},
                )
        except (OSError, SafetensorError) as error:
            raise CacheError(
                f"{path} could not be written ({error}); the shards before it are kept, and the same command goes on "
                "from there"
            ) from error

    def facts(self, number: int) -> dict[str, Any] | None:
        """Return the facts in a shard's header, or None if the shard does not exist.

        Raises:
            CacheError: the shard is damaged.
        """
        path = self.shard(number)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                facts: dict[str, Any] = json.loads(file.metadata()["facts"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{path} is damaged ({error}); delete it to make it again") from error
        return facts

    def finish(self, shards: Sequence[Mapping[str, Any]], *, notes: Mapping[str, Any]) -> None:
        """Write the index of all rows, and their counts.

        Args:
            shards: facts of all shards, in order.
            notes: further entries of the manifest.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = next((list(f[self.rows][0]) for f in shards if f[self.rows]), ["prompt"])
        table: dict[str, list[Any]] = {k: [] for k in [*columns, "shard", "offset"]}
        for number, facts in enumerate(shards):
            for offset, row in enumerate(facts[self.rows]):
                for name, value in {**row, "shard": number, "offset": offset}.items():
                    table[name].append(value)
        with aside(self.folder / INDEX) as file:
            pq.write_table(pa.table(table), file)
        counts = {self.rows: len(table["prompt"]), "shards": len(shards)}
        key = self.manifest["key"]
        write_text(self.folder / MANIFEST, json.dumps({"key": key, **counts, **notes}, indent=1))

    @cached_property
    def index(self) -> dict[str, list[Any]]:
        """Columns of the index, one value per row of the cache."""
        import pyarrow.parquet as pq

        if not self.complete:
            raise CacheError(
                f"{self.folder} is not complete; `diffalign precompute` goes on where it stopped"
            )
        columns: dict[str, list[Any]] = pq.read_table(self.folder / INDEX).to_pydict()
        return columns

    def split(self, share: float) -> tuple[list[int], list[int]]:
        """Return the numbers of the training rows and of the validation rows.

        Args:
            share: share of the prompts that are held out for validation.
        """
        is_held_out = [held_out(p, share) for p in self.index["prompt"]]
        numbers = range(len(is_held_out))
        training = [i for i in numbers if not is_held_out[i]]
        return training, [i for i in numbers if is_held_out[i]]

    @cached_property
    def _open(self) -> dict[int, Any]:
        return {}

    def columns(
        self,
        rows: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        without: Sequence[str] = (),
    ) -> tuple[dict[str, Tensor], PromptEmbeds]:
        """Return the stacked tensors and the prompts of rows, by their numbers.

        Args:
            without: names of tensors that are not read.
        """
        parts = [self.row(i, without=without) for i in rows]
        # shards pad their prompts to different lengths
        prompts = [
            PromptEmbeds(**{k: part.pop(k)[None] for k in PROMPT_PARTS if k in part})
            for part in parts
        ]
        tensors = {k: torch.stack([part[k] for part in parts]).to(device) for k in parts[0]}
        return tensors, PromptEmbeds.cat(prompts).to(device)

    def row(self, number: int, *, without: Sequence[str] = ()) -> dict[str, Tensor]:
        """Return all tensors of a row, including those of its prompt."""
        shard, offset = self.index["shard"][number], self.index["offset"][number]
        if shard not in self._open:
            try:
                self._open[shard] = safe_open(self.shard(shard), "pt").__enter__()
            except (OSError, SafetensorError) as error:
                raise CacheError(
                    f"{self.shard(shard)} is damaged: {error}. Delete it, and `diffalign precompute` makes it again"
                ) from error
        file = self._open[shard]
        names = set(file.keys()) - set(without)
        own = {k: file.get_slice(k)[offset] for k in names - {*PROMPT_PARTS, "prompt_row"}}
        row = int(file.get_slice("prompt_row")[offset])
        return own | {k: file.get_slice(k)[row] for k in PROMPT_PARTS if k in names}
