"""Loading of recipes: YAML with overrides to a run's configuration, and back.

No other module uses draccus.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from diffalign.config.base import AnyRunConfig, MethodConfig
from diffalign.config.checks import ConfigError
from diffalign.config.fields import field_types
from diffalign.config.files import read_recipe
from diffalign.config.keys import check_keys, with_lists
from diffalign.config.methods import algorithm_class, kind_of, run_class
from diffalign.config.model import LoraConfig
from diffalign.config.overrides import assign, parse_overrides, split_flags
from diffalign.core.nearest import nearest
from diffalign.core.text import read_text, suffix_of

logger = logging.getLogger(__name__)


def recipes(folder: str = "") -> dict[str, Path]:
    """Return name and file of every recipe that ships with the suite.

    Args:
        folder: folder among the recipes; without one they are those of `diffalign train`.
    """
    import diffalign.scripts

    place = Path(next(iter(diffalign.scripts.__path__))) / "recipes" / folder
    return {path.stem: path for path in sorted(place.glob("*.yaml"))}


def describe_recipes(folder: str = "") -> dict[str, str]:
    """Return name and first comment line of the recipes that `recipes` returns."""
    descriptions = {}
    for name, path in recipes(folder).items():
        first = read_text(path).partition("\n")[0]
        descriptions[name] = first.lstrip("# ")
    return descriptions


def load(recipe: str | Path | None = None, overrides: Sequence[str] = ()) -> Any:
    """Load a recipe by name or file, and apply overrides.

    Args:
        overrides: flags such as `--optimizer.learning_rate=1e-3`.

    Returns:
        The settings of the run, in the dataclass that belongs to the algorithm (`RunConfig` for online methods).

    Raises:
        ConfigError: the recipe cannot be read, or a setting is unknown or invalid.
    """
    raw: dict[str, Any] = {}
    if recipe is not None:
        raw = _read_recipe(_find(str(recipe)))
    flags = split_flags(overrides)
    kind = dict(flags).get("algorithm.type")
    _drop_other_algorithm(raw, kind)
    run = run_class(kind or kind_of(raw.get("algorithm")))
    settings = parse_overrides(flags, run, raw)
    lora = {k.removeprefix("lora."): v for k, v in settings if k.startswith("lora.")}
    if (alpha := _alpha_of(lora, raw.get("lora"))) is not None:
        settings.append(("lora.alpha", alpha))
        logger.warning(
            "note: lora.alpha is %g: the ratio to lora.rank stays; set it for another", alpha
        )
    for path, value in settings:
        assign(raw, run, path, value)
    return decode(raw)


def _alpha_of(own: Mapping[str, Any], base: Any) -> float | None:
    """Return the alpha that keeps the ratio alpha / rank of `base`.

    Return None unless `own` sets the rank and no alpha. The alpha of diffusers' training scripts follows the rank, too:
    it is the rank.
    """
    defaults = {"rank": LoraConfig.rank, "alpha": LoraConfig.alpha}
    defaults |= base if isinstance(base, Mapping) else {}
    numbers = [own.get("rank"), defaults["rank"], defaults["alpha"]]
    valid = [
        float(n)
        for n in numbers
        if isinstance(n, int | float) and not isinstance(n, bool) and n > 0
    ]
    if "alpha" in own or len(valid) < len(numbers):
        return None
    rank, base_rank, base_alpha = valid
    return rank * base_alpha / base_rank


def decode(raw: Mapping[str, Any]) -> Any:
    """Validate a nested mapping, and build the configuration for its algorithm."""
    import draccus

    kind = run_class(kind_of(raw.get("algorithm")))
    check_keys(kind, raw)
    groups = with_lists(kind, raw)
    algorithm = dict(groups.pop("algorithm", {}))
    try:
        # an empty algorithm, so that draccus checks nothing against the default algorithm
        config = draccus.decode(kind, {**groups, "algorithm": {}})
        config.algorithm = _decode_algorithm(algorithm)
        # repeat the checks between groups with the real algorithm
        config.__post_init__()
        return config
    # draccus wraps the errors of checks, and raises a bare Exception for lists
    except Exception as error:
        raise _config_error(error) from error


def decode_group(kind: type, raw: Mapping[str, Any], path: tuple[str, ...] = ()) -> Any:
    """Validate a nested mapping, and build any dataclass of settings from it.

    Args:
        kind: the dataclass; it has no group `algorithm`.
        raw: settings of a YAML file.
        path: names of the groups that `raw` lies in, for messages.

    Raises:
        ConfigError: a setting is unknown or invalid.
    """
    import draccus

    check_keys(kind, raw, path)
    try:
        return draccus.decode(kind, with_lists(kind, raw))
    except Exception as error:
        raise _config_error(error, path) from error


def _config_error(error: BaseException, path: tuple[str, ...] = ()) -> ConfigError:
    """Return draccus' error as one that names the setting."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigError):
            return cause
        cause = cause.__cause__ or cause.__context__
    setting = ".".join((*path, *getattr(error, "key_path", ())))
    message = " ".join(str(getattr(error, "message", error)).split())
    return ConfigError(message, setting=setting or None)


def _decode_algorithm(raw: Mapping[str, Any]) -> MethodConfig:
    """Build the settings of the algorithm, in the class that their `type` selects."""
    # draccus cannot select a class by a field's value, and leaves the group out of its errors
    import draccus
    from draccus.utils import DecodingError

    try:
        algorithm: MethodConfig = draccus.decode(algorithm_class(kind_of(raw)), dict(raw))
    except DecodingError as error:
        raise DecodingError(("algorithm", *error.key_path), error.message) from error
    return algorithm


def dump(config: AnyRunConfig) -> str:
    """Return the configuration as YAML that `load` can read."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain dictionaries, lists and numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    settings: dict[str, Any] = plain(asdict(config))
    return settings


def differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Return a line "path: a, b" for every leaf in which two nested mappings differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(k for k in b if k not in a)]
        return [line for k in keys for line in differences(a.get(k), b.get(k), f"{prefix}{k}.")]
    return [] if a == b else [f"{prefix.rstrip('.')}: {a!r}, {b!r}"]


def _find(recipe: str) -> Path:
    files = recipes()
    if recipe in files:
        return files[recipe]
    if suffix_of(recipe) in (".yaml", ".yml"):
        if Path(recipe).is_file():
            return Path(recipe)
        raise ConfigError(
            f"recipe file {recipe} does not exist: there is no {Path(recipe).absolute()}. Check the path"
        )
    hint = nearest(recipe, files, otherwise="`diffalign list recipes` names all of them")
    raise ConfigError(f"unknown recipe {recipe!r}{hint}")


def _read_recipe(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a recipe's settings, merged over those of the recipe that it `extends`."""
    raw = read_recipe(path)
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if path.resolve() in below:
        raise ConfigError(f"{path}: extends itself. Name another recipe in `extends`")
    beside = path.parent / str(base)
    merged = _read_recipe(
        beside if beside.is_file() else _find(str(base)), (*below, path.resolve())
    )
    algorithm = raw.get("algorithm")
    if isinstance(algorithm, dict):
        _drop_other_algorithm(merged, algorithm.get("type"))
    hints = field_types(run_class(kind_of((merged | raw).get("algorithm"))))
    if isinstance(own := raw.get("lora"), dict):
        alpha = _alpha_of(own, merged.get("lora"))
        raw["lora"] = own if alpha is None else {**own, "alpha": alpha}
    for key, value in raw.items():
        group = is_dataclass(hints.get(key)) and isinstance(value, dict)
        merged[key] = {**(merged.get(key) or {}), **value} if group else value
    return merged


def _drop_other_algorithm(raw: dict[str, Any], kind: str | None) -> None:
    """Drop the algorithm's settings of a recipe if they belong to another algorithm."""
    algorithm = raw.get("algorithm")
    if kind and isinstance(algorithm, dict) and kind_of(algorithm) != kind:
        raw["algorithm"] = {}
