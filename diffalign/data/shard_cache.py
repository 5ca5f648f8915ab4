"""What `diffalign precompute` leaves behind: shards of tensors, and an index of their rows.

A shard is one safetensors file, written whole or not at all; it says in its header what it was made from and where the
next one starts. `manifest.json` holds everything that could make the cache stale.
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
    """Consecutive items of a source; the next shard begins at row `stop` of it."""

    number: int
    items: list[Any]
    stop: int


def prompt_tensors(
    prompts: Sequence[str], embed: Callable[[Sequence[str]], PromptEmbeds]
) -> dict[str, Tensor]:
    """Of a shard's rows: each prompt's embeddings once, and the row of each one's prompt among them."""
    if not prompts:
        return {}
    place = {text: i for i, text in enumerate(dict.fromkeys(prompts))}
    embeds = embed(list(place)).to("cpu")
    parts = {name: getattr(embeds, name) for name in PROMPT_PARTS}
    found = {"prompt_row": torch.tensor([place[text] for text in prompts])}
    return found | {k: v for k, v in parts.items() if v is not None}


class CacheError(UserError, RuntimeError):
    """A cache that does not fit, is not whole, or cannot be written."""


class ShardCache:
    """Reads and writes one folder. Rows of all shards are numbered from 0, and each has a prompt."""

    rows: ClassVar[str]
    """What its rows are called in facts and counts."""
    setting: ClassVar[str]
    """The setting that says where it lies."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def claim(self, key: Mapping[str, Any]) -> None:
        """Note down what the cache is made from.

        Raises:
            CacheError: it is there and made from something else, or the folder holds other things.
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
                f"{self.folder} is not empty and no cache of diffalign; choose another {self.setting}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"key": key}, indent=1))

    @property
    def begun(self) -> bool:
        """Whether there is a shard; before that, the folder belongs to no source."""
        return any(self.folder.glob("shard-*.safetensors"))

    @property
    def manifest(self) -> dict[str, Any]:
        file = self.folder / MANIFEST
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CacheError(
                f"{self.folder} is no cache of {self.rows} ({error}); `diffalign precompute` makes one"
            ) from error

    @property
    def complete(self) -> bool:
        return (self.folder / MANIFEST).is_file() and self.rows in self.manifest

    def shard(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def write_shard(self, number: int, tensors: Mapping[str, Tensor], facts: Any) -> None:
        """CacheError where the disk is full; what is there stays."""
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
        """What a shard says of itself; None where there is none.

        Raises:
            CacheError: it is cut or changed.
        """
        path = self.shard(number)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                return json.loads(file.metadata()["facts"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{path} is damaged ({error}); delete it to make it again") from error

    def finish(self, shards: Sequence[Mapping[str, Any]], *, notes: Mapping[str, Any]) -> None:
        """Write the index of all rows, and the counts; `shards` are the facts of all of them."""
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
        """Columns of the index."""
        import pyarrow.parquet as pq

        if not self.complete:
            raise CacheError(
                f"{self.folder} is not complete; `diffalign precompute` goes on where it stopped"
            )
        found: dict[str, list[Any]] = pq.read_table(self.folder / INDEX).to_pydict()
        return found

    def split(self, share: float) -> tuple[list[int], list[int]]:
        """Numbers of the rows to train on, and of those of this share of the prompts that are kept for validation."""
        kept = [held_out(p, share) for p in self.index["prompt"]]
        numbers = range(len(kept))
        return [i for i in numbers if not kept[i]], [i for i in numbers if kept[i]]

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
        """Tensors of rows by their numbers, stacked, and their prompts; those named `without` are not read."""
        parts = [self.row(i, without=without) for i in rows]
        found = {k: torch.stack([part[k] for part in parts]).to(device) for k in parts[0]}
        return found, PromptEmbeds(**{k: found.pop(k) for k in PROMPT_PARTS if k in found})

    def row(self, number: int, *, without: Sequence[str] = ()) -> dict[str, Tensor]:
        """All tensors of a row, its prompt's among them."""
        shard, offset = self.index["shard"][number], self.index["offset"][number]
        if shard not in self._open:
            try:
                self._open[shard] = safe_open(self.shard(shard), "pt").__enter__()
            except (OSError, SafetensorError) as error:
                raise CacheError(f"{self.shard(shard)} is damaged: {error}") from error
        file = self._open[shard]
        names = set(file.keys()) - set(without)
        found = {k: file.get_slice(k)[offset] for k in names - {*PROMPT_PARTS, "prompt_row"}}
        row = int(file.get_slice("prompt_row")[offset])
        return found | {k: file.get_slice(k)[row] for k in PROMPT_PARTS if k in names}
