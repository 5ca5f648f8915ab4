"""Model card of a composed folder, in the Hub's format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from diffalign.acceleration.report import PLAN
from diffalign.core.versions import versions
from diffalign.pipelines.places import INDEX
from diffalign.pipelines.registry import resolve
from diffalign.schedulers.coefficients import KEY

if TYPE_CHECKING:
    from diffalign.composition.run import Composed, Row

README, GRID = "README.md", "samples.png"
"""Names of the card and of the same-seed grid in the composed folder."""
FACTS = (
    *("algorithm", "recipe", "lora", "updates", "scheduler", "backends", "rounding", "svd_rank"),
    *("bits_per_weight", "accepted", "gain", "evaluations", "preset", "options"),
    *("device", "stage_seconds"),
)
"""Facts of stages that the card shows."""


def card_text(result: Composed, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return the model card of a composition.

    Args:
        result: stages with their measurements.
        columns: columns of the table of stages.
        cells: cells of the table, a row for each model.
    """
    recipe = result.plan.recipe
    folder = result.folder
    parts = [
        f"---\n{yaml.safe_dump(_front(result), sort_keys=False)}---",
        f"# {folder.parent.name}",
        f"This is {recipe.model} after {_listed([r.title for r in result.rows[1:]])}, composed by diffalign.",
        f"![samples]({GRID})",
        "*Same prompts and seeds in every row, spread evenly and not picked.*",
        "## Use\n\n```python\n" + "\n".join(usage(folder, result.last)) + "\n```",
        "\n".join(f"- {line}" for line in loading(folder)),
        "## Stages\n\n" + _table(columns, cells),
        "Intervals are 95 % intervals over prompts. A change is the paired difference on the same prompts and seeds.",
        "## Methods and settings\n\n" + "\n".join(f"- {line}" for line in _methods(result)),
        f"```yaml\n{yaml.safe_dump(recipe.to_dict(), sort_keys=False)}```",
        "## Base, data and licence\n\n" + "\n".join(f"- {line}" for line in _origin(result)),
        "## Versions\n\n" + _table(("package", "version"), list(versions().items())),
    ]
    return "\n\n".join(parts) + "\n"


def _front(result: Composed) -> dict[str, Any]:
    """Return the card's metadata, which the Hub reads."""
    recipe = result.plan.recipe
    spec = resolve(recipe.model)
    quantised = result.last.state.is_quantised
    front: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    front["license"] = recipe.card.license
    if recipe.card.license == "other":
        front["license_name"] = "licence-of-the-base"
    if "/" in spec.source and not Path(spec.source).exists() and ":" not in spec.source:
        front["base_model"] = spec.source
        front["base_model_relation"] = "quantized" if quantised else "finetune"
    front["tags"] = ["text-to-image", "diffusers", "diffalign", *[r.name for r in result.rows[1:]]]
    return front


def usage(folder: Path, last: Row) -> list[str]:
    """Return lines of Python that load a composed folder and draw."""
    card = last.state.card
    arguments = [f"num_inference_steps={card.num_inference_steps}"]
    if card.guidance_scale is not None:
        arguments.append(f"guidance_scale={card.guidance_scale:g}")
    elif not last.measured.figures.get("guidance_is_embedded"):
        arguments.append("guidance_scale=1.0")
    return [
        "import torch",
        "import diffalign",
        "",
        f"pipe = diffalign.load({str(folder)!r}, torch_dtype=torch.{card.dtype})",
        f"image = pipe({last.measured.evaluation.texts[0]!r}, {', '.join(arguments)}).images[0]",
    ]


def loading(folder: Path) -> list[str]:
    """Return how stock diffusers opens a composed folder, in sentences."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    has_code = isinstance(index.get("_class_name"), list)
    methods = _quantised(folder)
    lines = []
    if any(method == "diffalign" for method in methods):
        lines.append(
            "The weights are packed, so that `diffalign.load` reads them and stock diffusers does not."
        )
    else:
        code = ", trust_remote_code=True" if has_code else ""
        lines.append(f"Stock diffusers: `DiffusionPipeline.from_pretrained(folder{code})`.")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if json.loads(scheduler.read_text(encoding="utf-8")).get(KEY) is not None:
        lines.append(
            "The scheduler has factors of Q-Sched, which `diffalign.load` applies and stock diffusers ignores."
        )
    if (folder / PLAN).is_file():
        lines.append(f"`{PLAN}` has the acceleration, which `diffalign.load` puts in force.")
    lines.append("To publish the folder: `hf upload OWNER/NAME FOLDER`.")
    return lines


def _quantised(folder: Path) -> list[str]:
    """Return the method of each quantised part; packed weights are "diffalign"."""
    methods = []
    for file in sorted(folder.glob("*/config.json")):
        config = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
        if config is not None:
            name = str(config.get("quant_method"))
            methods.append("diffalign" if name.startswith("diffalign") else name)
    return methods


def _methods(result: Composed) -> Iterator[str]:
    """Yield a line for each stage: its method, what it was made with, and how long it took."""
    for row in result.rows[1:]:
        facts = {name: row.facts[name] for name in FACTS if row.facts.get(name) is not None}
        words = [f"{name.replace('_', ' ')} {_plain(value)}" for name, value in facts.items()]
        yield f"**{row.title}**: {', '.join(words)}"


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _origin(result: Composed) -> Iterator[str]:
    recipe = result.plan.recipe
    yield f"Base: {recipe.model} ({resolve(recipe.model).source.removeprefix('package:')})."
    yield recipe.card.data or "Data: see the settings above."
    yield f"Measured on prompts `{recipe.measure.prompts}`, which no stage is trained on."
    if recipe.card.license == "other":
        yield "The licence of the base applies to this model; see the base's page."
    else:
        yield f"Licence: {recipe.card.license}."


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + words[-1]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines)
