"""Loading of recipes: YAML with overrides to a run's configuration, and back.

No other module uses draccus.
"""

from __future__ import annotations

import logging
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from diffalign.config.base import AnyRunConfig, LoopConfig, LoraConfig, MethodConfig
from diffalign.config.checks import ConfigError, nearest
from diffalign.config.files import parse_yaml, read_recipe
from diffalign.config.methods import DEFAULT, algorithm_class, available, run_class
from diffalign.core.text import read_text, suffix_of

logger = logging.getLogger(__name__)

# Flags of diffusers' training scripts, and the setting that each stands for in every kind of run.
ALIASES = {
    "pretrained_model_name_or_path": "model.name",
    "revision": "model.revision",
    "max_sequence_length": "model.max_sequence_length",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_layers": "lora.targets",
    "train_batch_size": "training.micro_batch_size",
    "max_train_steps": "training.num_updates",
    "mixed_precision": "training.mixed_precision",
    "seed": "training.seed",
    "report_to": "training.trackers",
    "checkpointing_steps": "training.checkpoint_every",
    "checkpoints_total_limit": "training.keep_checkpoints",
    "learning_rate": "optimizer.learning_rate",
    "lr_warmup_steps": "optimizer.warmup_updates",
    "lr_scheduler": "optimizer.lr_scheduler",
    "adam_weight_decay": "optimizer.weight_decay",
    "adam_epsilon": "optimizer.epsilon",
    "max_grad_norm": "optimizer.max_grad_norm",
}


LISTS = (list[str], list[str] | None)
ACCUMULATION = "gradient_accumulation_steps"
"""Flag of diffusers' scripts: one of three factors of the number of pairs per update."""


def recipes() -> dict[str, Path]:
    """Return name and file of every recipe that ships with the suite."""
    import diffalign.scripts

    folder = Path(next(iter(diffalign.scripts.__path__))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def describe_recipes() -> dict[str, str]:
    """Return name and first comment line of every recipe that ships with the suite."""
    descriptions = {}
    for name, path in recipes().items():
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
    parsed = _parse_overrides(overrides, raw)
    _drop_other_algorithm(raw, dict(parsed).get("algorithm.type"))
    algorithm = dict(parsed).get("algorithm.type")
    run = _run_class({"algorithm": {"type": algorithm}} if algorithm else raw)
    lora = {k.removeprefix("lora."): v for k, v in parsed if k.startswith("lora.")}
    if (alpha := _alpha_of(lora, raw.get("lora"))) is not None:
        parsed.append(("lora.alpha", alpha))
        logger.warning(
            "note: lora.alpha is %g: the ratio to lora.rank stays; set it for another", alpha
        )
    for key, value in parsed:
        steps = _steps(key, run)
        if steps[0] == "rewards" and len(steps) > 1 and "rewards" not in raw:
            # a reward on the command line is added to the default rewards, as it is to a recipe's
            raw["rewards"] = dict(_default(run, "rewards"))
        _assign(raw, steps, value)
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

    kind = _run_class(raw)
    _check_keys(kind, raw, ())
    groups = _with_lists(kind, raw)
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
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ConfigError):
                raise ConfigError(str(cause)) from error
            cause = cause.__cause__ or cause.__context__
        path = ".".join(getattr(error, "key_path", ()))
        message = str(getattr(error, "message", error)).strip()
        raise ConfigError(f"{path}: {message}" if path else message) from error


def _run_class(raw: Mapping[str, Any]) -> type[AnyRunConfig]:
    """Return the class of run settings that belongs to a mapping's algorithm."""
    algorithm = raw.get("algorithm")
    return run_class(algorithm.get("type", DEFAULT) if isinstance(algorithm, Mapping) else DEFAULT)


def _decode_algorithm(raw: Mapping[str, Any]) -> MethodConfig:
    """Build the settings of the algorithm, in the class that their `type` selects."""
    # draccus cannot select a class by a field's value, and leaves the group out of its errors
    import draccus
    from draccus.utils import DecodingError

    try:
        return draccus.decode(_algorithm_class(raw), dict(raw))
    except DecodingError as error:
        raise DecodingError(("algorithm", *error.key_path), error.message) from error


def _algorithm_class(raw: Mapping[str, Any]) -> type[MethodConfig]:
    return algorithm_class(raw.get("type", DEFAULT))


def _algorithm_classes() -> list[type[MethodConfig]]:
    return [algorithm_class(name) for name in available()]


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

    return plain(asdict(config))


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
            f"recipe file {recipe} does not exist: there is no {Path(recipe).absolute()}"
        )
    raise ConfigError(f"unknown recipe {recipe!r}{nearest(recipe, list(files))}")


def _read_recipe(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a recipe's settings, merged over those of the recipe that it `extends`."""
    raw = read_recipe(path)
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if path.resolve() in below:
        raise ConfigError(f"{path}: extends itself")
    beside = path.parent / str(base)
    merged = _read_recipe(
        beside if beside.is_file() else _find(str(base)), (*below, path.resolve())
    )
    algorithm = raw.get("algorithm")
    if isinstance(algorithm, dict):
        _drop_other_algorithm(merged, algorithm.get("type"))
    hints = typing.get_type_hints(_run_class(merged | raw))
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
    if kind and isinstance(algorithm, dict) and algorithm.get("type", DEFAULT) != kind:
        raw["algorithm"] = {}


def _parse_overrides(overrides: Sequence[str], raw: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return settings and values; names of diffusers are translated for the run's method."""
    flags = _split(overrides)
    algorithm = dict(flags).get("algorithm.type")
    run = _run_class({"algorithm": {"type": algorithm}} if algorithm else raw)
    aliases = aliases_of(run)
    result: list[tuple[str, Any]] = []
    accumulation = None
    for key, text in flags:
        if key == ACCUMULATION and run.pairs_per_step:
            accumulation = text
            continue
        names = aliases.get(key, key)
        for name in (names,) if isinstance(names, str) else names:
            result.append((name, _parse_value(text, _type_of(name, run), name)))
    if accumulation is not None:
        result.append(("training.pairs_per_update", _global_batch(accumulation, result, raw)))
    return result


def _split(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Return keys and texts of flags: `--a.b=1`, `--a.b 1` and bare `--flag` (true)."""
    result: list[tuple[str, str]] = []
    items = list(overrides)
    while items:
        item = items.pop(0)
        if not item.startswith("--"):
            raise ConfigError(f"expected --key=value, got {item!r}")
        key, equals, text = item[2:].partition("=")
        if not equals:
            text = items.pop(0) if items and not items[0].startswith("--") else "true"
        if key == "enable_xformers_memory_efficient_attention":
            key, text = "model.attention_backend", "xformers" if text == "true" else "null"
        result.append((key, text))
    return result


def _global_batch(steps: str, settings: Sequence[tuple[str, Any]], raw: Mapping[str, Any]) -> int:
    """Return the pairs per update: accumulation steps x batch size x world size."""
    group = raw.get("training")
    recipe = group.get("micro_batch_size") if isinstance(group, Mapping) else None
    batch_size: Any = dict(settings).get("training.micro_batch_size")
    batch_size = batch_size or recipe or LoopConfig.micro_batch_size
    try:
        return int(steps) * int(batch_size) * int(os.environ.get("WORLD_SIZE", "1"))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{ACCUMULATION}: expected a whole number, got {steps!r}") from error


def aliases_of(run: type[AnyRunConfig]) -> dict[str, Any]:
    """Return the flags of diffusers' scripts and the settings they stand for in a run."""
    return ALIASES | run.aliases


def _type_of(path: str, run: type[AnyRunConfig]) -> Any:
    """Return the type hint of a setting, or None for an unknown setting."""
    head, _, rest = path.partition(".")
    # the class of the algorithm is not needed: a name has one type in all algorithms
    if head == "algorithm" and rest:
        hints = [typing.get_type_hints(kind) for kind in _algorithm_classes()]
        return next((h[rest] for h in hints if rest in h), None)
    kind: Any = run
    for key in path.split("."):
        kind = typing.get_type_hints(kind).get(key) if is_dataclass(kind) else None
    return kind


def _parse_value(text: str, kind: Any, name: str) -> Any:
    """Return the value of an override, whose text is YAML; correct mistakes of YAML 1.1."""
    # YAML would read "no" as false, and the revision 1e5 as a number
    if kind in (str, str | None):
        return None if kind is not str and text.lower() in ("null", "none") else text
    if kind in LISTS and not text.startswith("[") and text != "null":
        return [part.strip() for part in text.split(",")]
    try:
        value = parse_yaml(text, f"{name}={text}")
    except ConfigError:
        # an unknown name is reported later
        if kind is None:
            return text
        raise
    # YAML 1.1 reads 3e-4 as text
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None if value.lower() == "none" else value
    if isinstance(value, float) and value.is_integer() and kind in (int, int | None):
        return int(value)
    return value


def _default(kind: type, name: str) -> Any:
    """Return the default of a dataclass field, made by its factory."""
    (factory,) = (f.default_factory for f in fields(kind) if f.name == name)
    assert callable(factory)
    return factory()


def _steps(path: str, kind: Any) -> list[str]:
    """Split the path of a setting at its dots; a mapping's key stays whole."""
    steps, rest = [], path
    while rest and typing.get_origin(kind) is not dict:
        step, _, rest = rest.partition(".")
        steps.append(step)
        kind = typing.get_type_hints(kind).get(step) if is_dataclass(kind) else None
    return [*steps, rest] if rest else steps


def _assign(raw: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for key in path[:-1]:
        inner = raw.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{'.'.join(path)}: {key} is not a group of settings")
        raw = inner
    raw[path[-1]] = value


def _check_keys(kind: type, raw: Any, path: tuple[str, ...]) -> None:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{'.'.join(path)}: expected a group of settings, got {raw!r}")
    hints = typing.get_type_hints(kind)
    names = [f.name for f in fields(kind)]
    for key, value in raw.items():
        full = ".".join((*path, str(key)))
        if key not in names:
            raise ConfigError(_unknown(kind, full, path, names))
        kind_of_value = hints[key]
        choices = typing.get_args(kind_of_value)
        if value is None and type(None) not in choices:
            raise ConfigError(f"{full}: expected a value, got null")
        if len(choices) == 2 and type(None) in choices:
            kind_of_value = next(c for c in choices if c is not type(None))
        if is_dataclass(hints[key]):
            inner = typing.cast(type, hints[key])
            if key == "algorithm" and isinstance(value, Mapping):
                inner = _algorithm_class(value)
            _check_keys(inner, value, (*path, str(key)))
        elif isinstance(value, bool) and kind_of_value in (int, float):
            raise ConfigError(f"{full}: expected a number, got {value}")
        elif kind_of_value is int and isinstance(value, float) and not value.is_integer():
            raise ConfigError(f"{full}: expected a whole number, got {value}")


def _unknown(kind: type, full: str, path: tuple[str, ...], names: Sequence[str]) -> str:
    """Return the message about an unknown setting, with the form that a recipe needs."""
    if path:
        return f"unknown setting {full!r}{nearest(full, ['.'.join((*path, n)) for n in names])}"
    every, aliases = _all_paths(kind), aliases_of(kind)
    target = aliases.get(full, full)
    settings = (target,) if isinstance(target, str) else target
    if all(setting in every for setting in settings):
        nested = "; ".join(
            ": {".join(t.split(".")) + ": ..." + "}" * t.count(".") for t in settings
        )
        return f"setting {full!r} is a flag's name: in a recipe write `{nested}`"
    return f"unknown setting {full!r}{nearest(full, [*every, *aliases])}"


def _with_lists(kind: Any, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with comma-separated texts split if their type is a list."""
    hints = typing.get_type_hints(kind)
    settings = dict(raw)
    for key, value in raw.items():
        hint = hints.get(key)
        if hint in LISTS and isinstance(value, str):
            settings[key] = [part.strip() for part in value.split(",")]
        elif is_dataclass(hint) and isinstance(value, Mapping):
            inner = _algorithm_class(value) if key == "algorithm" else hint
            settings[key] = _with_lists(inner, value)
    return settings


def _all_paths(kind: type, prefix: str = "") -> list[str]:
    hints = typing.get_type_hints(kind)
    result = []
    for f in fields(kind):
        result.append(prefix + f.name)
        if f.name == "algorithm":
            base = typing.cast(type, hints[f.name])
            inner = [
                p
                for kind in _algorithm_classes()
                if issubclass(kind, base)
                for p in _all_paths(kind, "algorithm.")
            ]
            result += dict.fromkeys(inner)
        elif is_dataclass(hints[f.name]):
            result += _all_paths(typing.cast(type, hints[f.name]), f"{prefix}{f.name}.")
    return result
