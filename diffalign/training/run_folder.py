"""The folder of a run: its configuration, log, checkpoints, grids and results. It belongs to one configuration."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffalign.config import AnyRunConfig, ConfigError, decode, differences, dump, to_dict
from diffalign.core import locks
from diffalign.core.errors import UserError
from diffalign.core.files import contents, write_text
from diffalign.training import checkpoint
from diffalign.training.budget import BUDGET

# Settings that decide how long or how a run is watched, not what it computes: a resumed run may change them.
FREE = {
    "output_dir",
    "training.num_updates",
    "training.max_minutes",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.eval_every",
    "training.sample_every",
    "training.on_collapse",
    "training.max_idle_updates",
    "training.trackers",
    "training.micro_batch_size",
    "rollout.micro_batch_size",
    "teacher.micro_batch_size",
    "model.gradient_checkpointing",
    "model.attention_backend",
    "model.compile",
    "rollout.reward_timeout",
    "rollout.overlap_rewards",
    "teacher.reward_timeout",
    "images.micro_batch_size",
    "images.reward_timeout",
    "pairs.micro_batch_size",
    "latents.micro_batch_size",
    "latents.cache",
    "pairs.source",  # the cache knows what it was made from
    "pairs.cache",
}
CONFIG, LOG, SUMMARY, REPORT = "config.yaml", "log.jsonl", "summary.json", "report.html"
PROMPTS = "prompts.json"
BEFORE = "before.safetensors"
"""How the reference does on held-out prompts."""
ALIGNED, ALIGNMENT_FACTS = "aligned.safetensors", "aligned.json"
"""Both ends of a model that was moved into another latent space, made before the first update."""
CHECKPOINTS, SAMPLES = "checkpoints", "samples"
PREPARED = (CONFIG, PROMPTS, BUDGET, LOG, ALIGNED, ALIGNMENT_FACTS, CHECKPOINTS, SAMPLES)
"""What a run leaves that ended before its first update. `before.safetensors` knows what it belongs to."""


class RunFolderError(UserError, RuntimeError):
    """A folder that this run must not write to."""


class RunFolder:
    """Paths and files of one run; only the main process may write."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def newest_checkpoint(self) -> Path | None:
        """The newest finished checkpoint."""
        return checkpoint.latest(self.checkpoints)

    def saved(self) -> str:
        """Return, for who interrupts the run, what is saved and where the same command goes on."""
        good = self.newest_checkpoint
        if good is None:
            return f"no update of {self.path} is saved; the same command begins with the first"
        update = int(good.name)
        return f"updates up to {update} are saved in {good}; the same command goes on with update {update + 1}"

    @property
    def begun(self) -> bool:
        """Whether an update was made; before that, the folder belongs to no configuration."""
        return self.newest_checkpoint is not None or bool(self.read_log())

    def check(self, config: AnyRunConfig, prompts: Mapping[str, str] | None = None) -> None:
        """Check that the folder is new, or of a run that may go on with this configuration. Writes nothing.

        Args:
            prompts: settings to digests of what they led to.

        Raises:
            RunFolderError: the folder belongs to something else; the message lists what differs.
        """
        if (self.path / CONFIG).is_file():
            if self.begun and (lines := self._differences(config)):
                raise RunFolderError(
                    f"{self.path} holds a run with another configuration (there, here):\n  "
                    + "\n  ".join(lines)
                    + "\nchoose another --output_dir, or delete that folder"
                )
            if self.begun and (setting := self._changed_prompts(prompts or {})):
                raise RunFolderError(
                    f"{self.path} holds a run with other prompts or rewards: what {setting} names has changed since it "
                    "began; put the old file back, or choose another --output_dir"
                )
        elif contents(self.path):
            raise RunFolderError(
                f"{self.path} is not empty and no run of diffalign; choose another --output_dir"
            )

    def claim(self, config: AnyRunConfig, prompts: Mapping[str, str] | None = None) -> None:
        """Check the folder, create it and note down its configuration and the digests of its prompts.

        A folder in which no update was made is taken over by another configuration, without what was prepared there.
        """
        self.check(config, prompts)
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / CONFIG).is_file() and not self.begun:
            try:
                other = self._differences(config) or self._changed_prompts(prompts or {})
            except RunFolderError:
                other = ["unreadable"]
            if other:
                self._clear()
        self.write(CONFIG, dump(config))
        if prompts:
            self.write(PROMPTS, json.dumps(prompts, indent=1))

    def _differences(self, config: AnyRunConfig) -> list[str]:
        """Return the settings that differ from the folder's and that a resumed run may not change."""
        file = self.path / CONFIG
        try:
            there = yaml.safe_load(file.read_text(encoding="utf-8"))
            # settings that are newer than the run have their defaults there
            there = to_dict(decode(there))
        except yaml.YAMLError as error:
            raise RunFolderError(f"{file} is not readable: {error}") from error
        except ConfigError as error:
            raise RunFolderError(f"{file} is no configuration of this version: {error}") from error
        free = FREE
        if config.optimizer.lr_scheduler != "constant":
            free = FREE - {"training.num_updates"}  # the schedule ends where the run does
        return [d for d in differences(there, to_dict(config)) if d.partition(":")[0] not in free]

    def _changed_prompts(self, prompts: Mapping[str, str]) -> str | None:
        """Return the first setting whose prompts have changed; runs of old versions have noted none and pass."""
        file = self.path / PROMPTS
        if not file.is_file():
            return None
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunFolderError(f"{file} is not readable: {error}") from error
        return next((s for s, digest in prompts.items() if there.get(s, digest) != digest), None)

    def _clear(self) -> None:
        for name in PREPARED:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def write(self, name: str, text: str) -> Path:
        """Write a text file aside and rename it."""
        file = self.path / name
        write_text(file, text, durable=True)
        return file

    def append_log(self, row: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read_log(self) -> list[dict[str, Any]]:
        """All whole rows; a last line cut by a crash is left out."""
        file = self.path / LOG
        if not file.is_file():
            return []
        rows = []
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def rewind_log(self, update: int) -> None:
        """Drop rows of updates after `update`, which a resumed run makes again."""
        rows = [r for r in self.read_log() if r["update"] <= update]
        self.write(LOG, "".join(json.dumps(r) + "\n" for r in rows))


def set_aside(folder: Path) -> Path | None:
    """Rename a finished run's folder to the next free `NAME.N`, and return that; None where no run is finished.

    Raises:
        LockError: another process runs there.
    """
    if not (folder / SUMMARY).is_file():
        return None
    number = 1
    while (kept := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    with locks.hold(folder):
        pass  # nobody is evaluating it again
    folder.rename(kept)
    return kept
