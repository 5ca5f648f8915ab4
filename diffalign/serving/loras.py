"""LoRAs of a server: those of one folder, loaded at the start and switched without loading."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

from diffalign.acceleration.adapters import names_of, why_silent
from diffalign.core.errors import UsageError
from diffalign.core.nearest import nearest
from diffalign.lora.files import load_lora, read_lora
from diffalign.lora.policies import policy
from diffalign.lora.source import SUFFIX
from diffalign.pipelines.base import TextToImageModel

logger = logging.getLogger(__name__)


class Loras:
    """LoRAs by name, each an adapter of the denoiser.

    A request names one of them, never a path, so that no file outside of the folder is read.
    """

    def __init__(self, model: TextToImageModel, folder: Path | None = None) -> None:
        """Load every LoRA of a folder.

        A LoRA is a file or a folder in it, and its name is that of the file without its ending.

        Raises:
            UsageError: the folder is missing or empty, the model carries a LoRA already, or a LoRA does not fit, has no
                effect or changes a text encoder.
        """
        self.model = model
        self._adapters: dict[str, str] = {}
        self._used: str | None = None
        self._policy = ExitStack()
        if folder is None:
            return
        denoiser = model.denoiser
        if names_of(denoiser):
            raise UsageError(
                f"loras={folder}: the model carries a LoRA already. Merge it first (`diffalign merge`)."
            )
        for name, path in _files(folder).items():
            lora = read_lora(str(path))
            if set(lora.parts) != {model.denoiser_part}:
                raise UsageError(
                    f"loras={folder}: {path.name} changes {', '.join(sorted(set(lora.parts)))}, and a server switches "
                    "LoRAs of the denoiser only. Merge it into a model of its own (`diffalign merge`)."
                )
            before = names_of(denoiser)
            load_lora(model.pipeline, lora)
            (adapter,) = names_of(denoiser) - before
            reason = why_silent(denoiser, adapter)
            if reason is not None:
                raise UsageError(
                    f"loras={folder}: {path.name} has no effect: {reason}. Remove it from the folder."
                )
            self._adapters[name] = adapter
        denoiser.disable_adapters()

    @property
    def names(self) -> list[str]:
        """Names of the LoRAs."""
        return list(self._adapters)

    def check(self, name: str) -> None:
        """Raise UsageError with the nearest name if there is no LoRA of this name."""
        if name not in self._adapters:
            hint = nearest(name[:80], self.names) if self.names else "; this server has none"
            raise UsageError(f"lora={name[:80]!r}: there is no such LoRA{hint}")

    def use(self, name: str | None) -> None:
        """Use one LoRA, or none, until the next call."""
        # a switch visits every layer, which takes too long to do in each step
        if name == self._used:
            return
        self._policy.close()
        self._used = None
        if name is not None:
            self._policy.enter_context(policy(self.model.denoiser, self._adapters[name]))
            self._used = name


def _files(folder: Path) -> dict[str, Path]:
    """Return the LoRAs of a folder by name, in order."""
    if not folder.is_dir():
        raise UsageError(f"loras={folder}: there is no such folder. Name one that holds LoRAs.")
    paths = [
        path
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".")
        and (path.is_dir() or path.suffix.lower() == SUFFIX)
        # a link may lead out of the folder that the operator allows
        and path.resolve().is_relative_to(folder.resolve())
    ]
    if not paths:
        raise UsageError(f"loras={folder}: the folder holds no LoRA. Put {SUFFIX} files into it.")
    names = [p.name if p.is_dir() else p.stem for p in paths]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"loras={folder}: two LoRAs have the name {name}. Rename one.")
    return dict(zip(names, paths, strict=True))
