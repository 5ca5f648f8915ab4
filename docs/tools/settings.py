"""Write the reference of all settings from the dataclasses of `diffalign.config`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from diffalign.config.methods import METHODS, algorithm_class, run_class
from diffalign.config.settings import aliases_of, free_settings

INTRODUCTION = """# Settings

This page is made from the code. A recipe writes a setting as `group: {key: value}`, the command line as
`--group.key=value`. Recipes change many defaults, and `diffalign train RECIPE --dry-run` prints the result. "flag"
names a flag of diffusers' training scripts for the same setting.
"""
GROUPS = {
    "": "Settings of the run itself.",
    "model": "The base model.",
    "lora": "The adapter that is trained.",
    "algorithm": "The algorithm, which `algorithm.type` names. Each type has settings of its own.",
    "prompts": "Prompts for training and evaluation.",
    "rollout": "Images that online algorithms train on.",
    "images": "Images for evaluation, of runs on pairs and of DC-Gen.",
    "teacher": "Trajectories of the teacher, for few-step students.",
    "pairs": "Preference pairs.",
    "pairs.inversion": "States of the images of preference pairs.",
    "latents": "The new latent space of DC-Gen.",
    "optimizer": "AdamW on the LoRA weights.",
    "training": "The training loop.",
    "evaluation": "Scoring on held-out prompts.",
}


@dataclass
class Setting:
    """A key of a recipe, with the methods that have it."""

    name: str
    kind: str
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Names of the methods by the text that they give the setting."""
    defaults: dict[str, str] = field(default_factory=dict)
    """Default by the name of a method."""
    free: bool = False
    """True if a resumed run may change the setting."""

    @property
    def text(self) -> str:
        """Return the description; texts that differ name their methods."""
        if len(self.texts) <= 1:
            return next(iter(self.texts), "")
        parts = [f"- {', '.join(names)}: {text}" for text, names in self.texts.items()]
        return "\n".join(part.replace("\n\n", " ") for part in parts)


@cache
def field_texts(kind: type) -> dict[str, str]:
    """Return the docstrings below the fields of a dataclass, without those of its bases."""
    tree = ast.parse(inspect.getsource(kind))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
    texts = {}
    for first, second in itertools.pairwise(body):
        if isinstance(first, ast.AnnAssign) and isinstance(second, ast.Expr):
            value = second.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                texts[typing.cast(ast.Name, first.target).id] = inspect.cleandoc(value.value)
    return texts


def text_of(kind: type, name: str) -> str:
    """Return the docstring of a field, from the nearest base that has one."""
    texts = (field_texts(base) for base in kind.__mro__ if dataclasses.is_dataclass(base))
    return next((found[name] for found in texts if name in found), "")


def default_of(item: dataclasses.Field[Any]) -> str:
    """Return a field's default as a recipe writes it."""
    factory = item.default_factory
    value = item.default if factory is dataclasses.MISSING else factory()
    names = {None: "null", True: "true", False: "false", "": '""'}
    if isinstance(value, list | tuple | dict):
        return str(list(value)) if isinstance(value, tuple) else str(value)
    return names.get(value, str(value)) if not isinstance(value, int | float) else _number(value)


def _number(value: float) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def paths(kind: type, group: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], type]]:
    """Yield full name, field and owner of every setting below a dataclass, without `algorithm`."""
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        full = f"{group}.{item.name}" if group else item.name
        if dataclasses.is_dataclass(hints[item.name]):
            if full != "algorithm":
                yield from paths(typing.cast(type, hints[item.name]), full)
        else:
            yield full, item, kind


def settings() -> dict[str, Setting]:
    """Return every setting of every method by its full name, in the order of the dataclasses."""
    entries: dict[str, Setting] = {}
    for method in METHODS:
        run, algorithm = run_class(method), algorithm_class(method)
        free = free_settings(run)
        for full, item, owner in (*paths(run), *paths(algorithm, "algorithm")):
            setting = entries.setdefault(full, Setting(full, str(item.type)))
            setting.defaults[method] = default_of(item)
            setting.free |= full in free
            text = text_of(owner, item.name)
            if text:
                setting.texts.setdefault(text, []).append(method)
    return entries


def group_of(name: str) -> str:
    """Return the group of a setting; the longest known one."""
    return max((g for g in GROUPS if name.startswith(f"{g}.") or not g), key=len)


def flags() -> dict[str, set[str]]:
    """Return the flags of diffusers' scripts for each setting."""
    names: dict[str, set[str]] = {}
    for method in METHODS:
        for flag, targets in aliases_of(run_class(method)).items():
            for target in targets:
                names.setdefault(target, set()).add(flag)
    return names


def entry(setting: Setting, aliases: set[str]) -> str:
    """Return the text of one setting: heading, type, default, methods and description."""
    lines = [f"### `{setting.name}`", ""]
    by_default: dict[str, list[str]] = {}
    for method, default in setting.defaults.items():
        by_default.setdefault(default, []).append(method)
    if setting.name == "algorithm.type":
        facts = [f"`{setting.kind}`", f"one of {', '.join(f'`{m}`' for m in METHODS)}"]
    elif len(by_default) == 1:
        facts = [f"`{setting.kind}`", f"default `{next(iter(by_default))}`"]
    else:
        parts = [f"`{value}` ({', '.join(names)})" for value, names in by_default.items()]
        facts = [f"`{setting.kind}`", f"default {', '.join(parts)}"]
    if len(setting.defaults) < len(METHODS) and len(by_default) == 1:
        facts.append(f"of {', '.join(setting.defaults)}")
    if setting.free:
        facts.append("may change when a run is resumed")
    if aliases:
        facts.append(f"flag {', '.join(f'`--{a}`' for a in sorted(aliases))}")
    lines += ["; ".join(facts), ""]
    if setting.text:
        lines += [setting.text, ""]
    return "\n".join(lines)


def page() -> str:
    """Return the whole reference in Markdown."""
    by_group: dict[str, list[Setting]] = {group: [] for group in GROUPS}
    for setting in settings().values():
        by_group[group_of(setting.name)].append(setting)
    names = flags()
    parts = [INTRODUCTION]
    for group, members in by_group.items():
        parts.append(f"## {group or 'The run'}\n\n{GROUPS[group]}\n")
        parts += [entry(s, names.get(s.name, set())) for s in members]
    return "\n".join(parts)


if __name__ == "__main__":
    print(page())
