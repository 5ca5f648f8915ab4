"""Reader of recipe files: YAML with unique keys, and paths relative to the recipe."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.config.checks import ConfigError
from diffalign.core.errors import first_line
from diffalign.core.text import RANK, read_text, suffix_of

logger = logging.getLogger(__name__)

PROMPT_FILES = (".txt", ".jsonl")
SOURCES = ("pairs.source", "latents.images")
"""Settings whose value is always a path."""
MODELS = ("model.name", "latents.autoencoder")
"""Settings whose value is a path only if it has a separator or a suffix.

A plain name could be either a model or a folder; it stays a model.
"""


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the settings of a recipe file.

    Raises:
        ConfigError: the file cannot be read, is not YAML, has a key twice, or is no mapping.
    """
    raw = parse_yaml(read_text(path, error=ConfigError), str(path))
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} must hold a mapping of settings, such as `training: {{seed: 1}}`"
        )
    return beside(raw, path.parent)


def parse_yaml(text: str, place: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        ConfigError: the text is not YAML, is nested too deep, or has a key twice; the message begins with `place`.
    """
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{place}{line} is not valid YAML: {error.problem or error.context}"
        ) from error
    except RecursionError:
        raise ConfigError(f"{place} is not valid YAML: nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{place} is not valid YAML: {first_line(error)}") from error


def _loader() -> Any:
    """Return PyYAML's safe loader, extended to refuse a key that occurs twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names: set[Any] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in names:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"the key {key.value!r} stands there twice", key.start_mark
                        )
                    names.add(key.value)
            return super().construct_mapping(node, deep)

    return Loader


def beside(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the settings with relative paths resolved against the recipe's folder.

    A path is resolved only if the file exists in that folder.
    """
    settings = {k: dict(v) if isinstance(v, Mapping) else v for k, v in raw.items()}
    for setting in ("prompts.train", "prompts.evaluation", *SOURCES, *MODELS):
        group, _, name = setting.partition(".")
        values = settings.get(group)
        if isinstance(values, dict) and isinstance(values.get(name), str):
            values[name] = _beside(setting, values[name], folder)
    if isinstance(settings.get("rewards"), dict):
        settings["rewards"] = {_reward(k, folder): v for k, v in settings["rewards"].items()}
    evaluation = settings.get("evaluation")
    if isinstance(evaluation, dict) and isinstance(evaluation.get("rewards"), list):
        evaluation["rewards"] = [_reward(name, folder) for name in evaluation["rewards"]]
    return settings


def _reward(name: Any, folder: Path) -> Any:
    """Return a reward's name; resolve the file of `FILE.py:NAME` against the recipe's folder."""
    text = str(name)
    prefix = RANK if text.startswith(RANK) else ""
    file, suffix, rest = text.removeprefix(RANK).partition(".py:")
    path = folder / f"{file}.py"
    is_file = bool(suffix) and not os.path.isabs(file) and path.is_file()
    return f"{prefix}{path}:{rest}" if is_file else name


def _beside(setting: str, value: str, folder: Path) -> str:
    path = folder / value
    if setting in MODELS:
        is_path = "/" in value or os.sep in value or bool(suffix_of(value))
    else:
        is_path = setting in SOURCES or suffix_of(value) in PROMPT_FILES
    if not value or not is_path or os.path.isabs(value) or not os.path.exists(path):
        return value
    if os.path.exists(value) and not os.path.samefile(value, path):
        logger.warning("%s: %s beside the recipe is read, not the one in %s", setting, path, Path())
    return str(path)
