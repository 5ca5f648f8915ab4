"""Read and write the folder of a run: configuration, log, checkpoints, samples and results.

A run folder belongs to one configuration.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffalign.config import AnyRunConfig, ConfigError, decode, differences, dump, to_dict
from diffalign.config.settings import free_settings
from diffalign.core import locks
from diffalign.core.errors import UserError
from diffalign.core.files import contents, write_json_lines, write_text
from diffalign.training import checkpoint
from diffalign.training.budget import BUDGET

CONFIG, LOG, SUMMARY, REPORT = "config.yaml", "log.jsonl", "summary.json", "report.html"
INPUTS = "prompts.json"
"""File with the digests of prompts, reward files and the base model's weights."""
BEFORE = "before.safetensors"
"""File with the base model's evaluation on held-out prompts."""
ALIGNED, ALIGNMENT_FACTS = "aligned.safetensors", "aligned.json"
"""Files with a DC-Gen run's aligned embedder and last layer, and the alignment's figures."""
CHECKPOINTS, SAMPLES, BEST = "checkpoints", "samples", "best"
BEST_RECORD = "best.json"
"""File in `best/` with the figures of the best evaluation by held-out rewards."""
PREPARED = (CONFIG, INPUTS, BUDGET, LOG, ALIGNED, ALIGNMENT_FACTS, CHECKPOINTS, SAMPLES, BEST)
"""Files and folders that a run may leave if it ends before its first update.

They are deleted if another configuration takes over the folder. `before.safetensors` stays: its key names what it was
made with.
"""


class RunFolderError(UserError, RuntimeError):
    """Folder that this run must not write to, or that has no readable run."""


class RunFolder:
    """Folder of one run. Only the main process may write to it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def best(self) -> Path:
        """Folder of the best policy by held-out rewards: its checkpoint, its LoRA and its figures."""
        return self.path / BEST

    def read_best(self) -> dict[str, Any] | None:
        """Return the figures of the best evaluation by held-out rewards, or None.

        A record whose checkpoint is missing does not count.
        """
        try:
            record: dict[str, Any] = json.loads((self.best / BEST_RECORD).read_text("utf-8"))
            update, by = int(record["update"]), tuple(record["by"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if update and not (self.best / f"{update:06d}").is_dir():
            return None
        return record | {"by": by}

    @property
    def newest_checkpoint(self) -> Path | None:
        """Newest finished checkpoint, or None."""
        return checkpoint.latest(self.checkpoints)

    def saved(self, *, trained: bool = False) -> str:
        """Return a text for an interrupted run: what is saved, and where the same command continues.

        Args:
            trained: no update is left to make.
        """
        good = self.newest_checkpoint
        if good is None:
            return f"no update of {self.path} is saved; the same command begins with the first"
        update = int(good.name)
        if trained:
            return (
                f"training is finished, and its {update} updates are saved in {good}; the same command evaluates and "
                "writes the LoRA"
            )
        return f"updates up to {update} are saved in {good}; the same command goes on with update {update + 1}"

    @property
    def begun(self) -> bool:
        """True once an update was made. Before, the folder belongs to no configuration."""
        return self.newest_checkpoint is not None or bool(self.read_log())

    def chosen_memory(self, config: AnyRunConfig) -> AnyRunConfig | None:
        """Return the folder's configuration if its run chose memory settings.

        Return None for a run that has made no update, and for a configuration that asks for no choice.
        """
        if config.model.memory is None or not (self.path / CONFIG).is_file() or not self.begun:
            return None
        try:
            text = (self.path / CONFIG).read_text(encoding="utf-8")
            other: AnyRunConfig = decode(yaml.safe_load(text))
        except (OSError, ValueError, yaml.YAMLError, ConfigError):
            return None
        return other if type(other) is type(config) and other.model.memory is not None else None

    def check(self, config: AnyRunConfig, inputs: Mapping[str, str] | None = None) -> None:
        """Check that the folder is new, or belongs to a run with this configuration.

        Nothing is written.

        Args:
            inputs: digests of prompts, reward files and base model, by the setting that names them.

        Raises:
            RunFolderError: the folder belongs to another run, or to no run. The message lists the differences.
        """
        if (self.path / CONFIG).is_file():
            if self.begun and (lines := self._differences(config)):
                raise RunFolderError(
                    f"{self.path} holds a run with another configuration (there, here):\n  "
                    + "\n  ".join(lines)
                    + "\nchoose another output_dir, or delete that folder"
                )
            if self.begun and (setting := self._changed_input(inputs or {})):
                raise RunFolderError(
                    f"{self.path} holds a run with other prompts, rewards or base weights: what {setting} names has "
                    "changed since it began; put the old file or model back, or choose another output_dir"
                )
        elif contents(self.path):
            raise RunFolderError(
                f"{self.path} is not empty and was not created by diffalign. Choose another output_dir"
            )

    def claim(self, config: AnyRunConfig, inputs: Mapping[str, str] | None = None) -> None:
        """Check and create the folder, and write the configuration and the digests.

        A folder in which no update was made can be taken over by another configuration. Files that the earlier one
        prepared are deleted.
        """
        self.check(config, inputs)
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / CONFIG).is_file() and not self.begun:
            try:
                other = self._differences(config) or self._changed_input(inputs or {})
            except RunFolderError:
                other = ["unreadable"]
            if other:
                self._clear()
        self.write(CONFIG, dump(config))
        if inputs:
            self.write(INPUTS, json.dumps(inputs, indent=1))

    def _differences(self, config: AnyRunConfig) -> list[str]:
        """Return changed settings that a resumed run may not change, as texts."""
        file = self.path / CONFIG
        try:
            stored = yaml.safe_load(file.read_text(encoding="utf-8"))
            # decoding gives settings that did not exist when the run began their defaults
            stored = to_dict(decode(stored))
        except yaml.YAMLError as error:
            raise RunFolderError(
                f"{file} is not readable: {error}. Restore it, or choose another output_dir"
            ) from error
        except ConfigError as error:
            raise RunFolderError(
                f"{file} cannot be read by this version: {error}. Choose another output_dir"
            ) from error
        free = free_settings(type(config))
        if config.optimizer.lr_scheduler != "constant":
            # the learning rate's schedule depends on the number of updates
            free -= {"training.num_updates"}
        return [d for d in differences(stored, to_dict(config)) if d.partition(":")[0] not in free]

    def _changed_input(self, inputs: Mapping[str, str]) -> str | None:
        """Return the first setting whose prompts, reward file or base model have changed, or None.

        Run folders of old versions have no digests, and pass.
        """
        file = self.path / INPUTS
        if not file.is_file():
            return None
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunFolderError(
                f"{file} is not readable: {error}. Restore it, or choose another output_dir"
            ) from error
        return next((s for s, digest in inputs.items() if stored.get(s, digest) != digest), None)

    def _clear(self) -> None:
        for name in PREPARED:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def write(self, name: str, text: str) -> Path:
        """Write a text file under another name and rename it: it is never half written."""
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
        """Return all rows of the log. A last line that a crash has truncated is skipped."""
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
        """Delete the log rows of updates after `update`, which a resumed run makes again."""
        rows = [r for r in self.read_log() if r["update"] <= update]
        write_json_lines(self.path / LOG, rows, durable=True)


def set_aside(folder: Path) -> Path | None:
    """Rename a finished run's folder to the next free `NAME.N`, and return the new path.

    Return None if the folder has no finished run.

    Raises:
        LockError: another process is running in the folder.
    """
    if not (folder / SUMMARY).is_file():
        return None
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    # raises LockError if a process is evaluating the run again
    with locks.hold(folder):
        pass
    folder.rename(target)
    return target
