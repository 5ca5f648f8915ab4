"""Write the tables of README and docs that show committed results.

A table stands between the comments `<!-- table: NAME -->` and `<!-- end -->`. `python docs/tools/tables.py` writes all
tables anew from `benchmarks/results`, and `tests/house/test_docs.py` checks that they are up to date.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CHECKPOINTS = ROOT / "diffalign" / "shapes" / "checkpoints"
BASES = ("shapes-sd3", "shapes-flux", "shapes-sd")
STUDENTS = (
    ("shapes-flux-schnell", "shapes-flux", "3"),
    ("shapes-sd-lcm", "shapes-sd", "3, two forwards per step"),
)
PLACE = re.compile(r"(<!-- table: ([a-z0-9-]+) -->\n)(.*?)(<!-- end -->)", re.S)


def result(name: str) -> dict[str, Any]:
    """Return a committed result, without `.json` in its name."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def settings_text(settings: str) -> str:
    """Return settings as code, or a dash if there are none."""
    return f"`{settings}`" if settings else "as it is"


def memory_table() -> str:
    """Return what every recipe needs, and how it fits on a card of 24 GiB."""
    rows = []
    for name, arm in result("memory")["arms"].items():
        small = arm["on_24_gib"]
        if small:
            fit = f"{settings_text(small['settings'])}: {small['total']:.1f}"
        else:
            fit = f"an int4 base: about {arm['int4_base']:.1f}"
        checkpointing = "yes" if arm["gradient_checkpointing"] else "no"
        size = str(arm["micro_batch_size"])
        rows.append((f"`{name}`", size, checkpointing, f"{arm['total']:.1f}", fit))
    header = ("recipe", "micro-batch", "gradient checkpointing", "GiB", "on 24 GiB")
    return table(header, rows)


def quick_start_table() -> str:
    """Return the forecasts of the recipes of the GPU quick start."""
    arms = result("memory")["arms"]
    names = {
        "SDXL": "inversion-dpo-sdxl",
        "SD3.5-medium": "awm-sd3.5-medium-pickscore",
        "FLUX.1-dev": "awm-flux.1-dev-pickscore",
    }
    rows = []
    for model, name in names.items():
        arm = arms[name]
        small = arm["on_24_gib"]
        if small:
            fit = f"{small['total']:.1f} GiB, {settings_text(small['settings'])}"
        else:
            fit = f"about {arm['int4_base']:.1f} GiB, on an int4 base"
        rows.append((model, f"`{name}`", f"{arm['total']:.1f} GiB, as it is", fit))
    return table(("model", "recipe", "80 GB card", "24 GB card"), rows)


def figure(value: float) -> str:
    """Return a score with three digits after the point."""
    return f"{value:.3f}"


def results_table() -> str:
    """Return the main result of every method, from the medians of its benchmark."""
    demo = result("demo")["arms"]["demo"]
    awm = result("awm")["headline"]
    wins = result("inversion-dpo")["headline"]["win_rate"]
    moved = result("dcgen")["headline"]
    lost = result("qsched")["headline"]["quality_recovered"]
    before, after = demo["geneval_before"]["median"], demo["geneval_after"]["median"]
    rows = [
        (
            "AWM, `make demo`",
            f"GenEval {figure(before)} before, {figure(after)} after",
            f"{demo['seconds']['median'] / 60:.0f} minutes on two CPU cores",
        ),
        (
            "AWM on equal terms",
            f"{awm['speedup_vs_flow_grpo']:.1f} times as fast as Flow-GRPO, "
            f"{awm['speedup_vs_nft']:.1f} times as fast as DiffusionNFT",
            "time to the same GenEval; same adapter, guided reference and timesteps",
        ),
        *(
            (
                f"Inversion-DPO on `{model}`",
                f"wins {figure(rates['inversion_dpo'])} of pairs against the base; "
                f"Diffusion-DPO wins {figure(rates['diffusion_dpo'])}",
                "three minutes of training on the same pairs",
            )
            for model, rates in wins.items()
        ),
        (
            "int4 in groups of 64",
            f"GenEval falls by {figure(lost['int4']['lost'])}",
            "mean of two students, three numbers of steps and three seeds",
        ),
        (
            "Q-Sched on coarse int4",
            f"gives back {lost['int4 rows']['share']:.0%} of the {figure(lost['int4 rows']['lost'])} that was lost",
            "48 prompts for the search; a negative result",
        ),
        (
            "DC-Gen",
            f"GenEval {figure(moved['geneval_base'])} before, {figure(moved['geneval_dc'])} after; "
            f"{moved['latency_ratio']:.1f} times as fast",
            f"a {'quarter' if moved['token_ratio'] == 4 else 'part'} of the tokens, on a CPU",
        ),
    ]
    return table(("method", "result", "conditions"), rows)


def presets_table() -> str:
    """Return what each preset turns on for each family, and where that was measured."""
    from diffalign.acceleration.choices import choices
    from diffalign.core.checkout import read_result

    record = read_result("acceleration")
    rows = []
    for choice in choices():
        texts = (choice.text(device) for device in ("GPU", "CPU"))
        rows.append((choice.family, f"`{choice.preset}`", *texts, choice.measured(record)))
    return table(("family", "preset", "on a GPU", "on a CPU", "measured"), rows)


def bits_table() -> str:
    """Return size and quality of the students' weights by bits and rounding."""
    students = result("qsched-bits")["rounding"]
    rows = []
    for form in next(iter(students.values())):
        scores = [student[form]["steps"]["4"] for student in students.values()]
        cells = [
            f"{s['ratio_to_bf16']['median']:.2f} | "
            + ("-" if form == "bf16" else f"{s['psnr']['median']:.1f}")
            + f" | {figure(s['geneval']['median'])} | {s['fid']['median']:.1f}"
            for s in scores
        ]
        rows.append((form, *cells))
    columns = [f"`{name}`: times smaller | PSNR | GenEval | FID" for name in students]
    header = " | ".join(("weights", *columns)).split(" | ")
    return table(header, [" | ".join(row).split(" | ") for row in rows])


def packed_sizes_table() -> str:
    """Return the sizes of published denoisers in packed formats."""
    forms = {
        "int8": "int8",
        "int4": "int4",
        "int4 svd 32": "int4, SVD rank 32",
        "int3": "int3",
        "int2": "int2",
    }
    rows = []
    for name, sizes in result("qsched-sizes")["sizes"].items():
        cells = [
            f"{sizes[form]['bytes'] / 1e9:.2f} GB, {sizes[form]['ratio']:.2f}x" for form in forms
        ]
        whole = f"{sizes['bf16_bytes'] / 1e9:.2f} GB"
        rows.append((name, f"{sizes['weights'] / 1e9:.2f} B", whole, *cells))
    return table(("denoiser", "weights", "bfloat16", *forms.values()), rows)


def parameters(name: str) -> int:
    """Return the number of weights of a shipped denoiser."""
    from safetensors import safe_open

    (file,) = (
        file
        for part in ("transformer", "unet")
        for file in (CHECKPOINTS / name / part).glob("*.safetensors")
    )
    with safe_open(file, "np") as weights:
        names = weights.keys()
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in names)


def bases_table() -> str:
    """Return what the shipped base models draw right."""
    rows = []
    for name in BASES:
        measured = result(name)
        scores = measured["held_out"]
        placed = measured.get("relations")
        shares = [
            figure(placed[task]["then as prompted"]["share"]) if placed else "-"
            for task in ("position", "color_attr")
        ]
        cells = [figure(scores[key]["overall"]) for key in ("without guidance", "guidance 3")]
        rows.append((f"`{name}`", f"{parameters(name) / 1e6:.1f} M", *cells, *shares))
    header = ("model", "denoiser", "GenEval without guidance", "with guidance 3")
    return table((*header, "relations as prompted", "colours as prompted"), rows)


def students_table() -> str:
    """Return the students of few steps beside their bases."""
    rows = []
    for student, base, costs in STUDENTS:
        lines = [(student, student, "without guidance", "none", "**")]
        few = f"{base}-few-steps"
        lines.append((base, few, "without guidance", "none", ""))
        lines.append((base, few, "guidance 3", costs, ""))
        for model, file, setting, guidance, mark in lines:
            held_out = result(file)["held_out"]
            scores = [held_out[f"{setting}, {steps} steps"] for steps in (1, 2, 4, 8)]
            cells = [
                f"{mark}{s['overall']:.2f}{mark} ({s['overall_low']:.2f} - {s['overall_high']:.2f})"
                for s in scores
            ]
            rows.append((f"`{model}`", guidance, *cells))
    return table(("model", "guidance", "1 step", "2 steps", "4 steps", "8 steps"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "memory": memory_table,
    "presets": presets_table,
    "quick-start": quick_start_table,
    "results": results_table,
    "bits": bits_table,
    "packed-sizes": packed_sizes_table,
    "shapes-bases": bases_table,
    "shapes-students": students_table,
}


def filled(text: str) -> str:
    """Return a page with all its tables written anew."""
    return PLACE.sub(lambda place: f"{place[1]}\n{TABLES[place[2]]()}\n{place[4]}", text)


def pages() -> list[Path]:
    """Return README, the page of the checkpoints, and the pages of docs."""
    return [ROOT / "README.md", CHECKPOINTS / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    """Write all tables anew."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if filled(text) != text:
            page.write_text(filled(text), encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
