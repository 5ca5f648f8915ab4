"""`report.html`: one self-contained page that shows what a run did."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from diffalign.config import AnyRunConfig, dump
from diffalign.core.files import write_text
from diffalign.data.prompts import Prompt
from diffalign.evaluation.score import Evaluation

EXAMPLES = 18
CURVES = {
    "reward": "reward (training rollouts)",
    "reward_group_std": "reward spread within a group",
    "kl": "distance to the base model",
    "kl_lagged": "distance to the lagged policy",
    "grad_norm": "gradient norm",
    "images_per_second": "images per second",
}


def image_grid(images: Tensor, *, columns: int, gap: int = 2) -> Image.Image:
    """(N, 3, H, W) uint8 to one picture, row by row."""
    n, _, h, w = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 255, np.uint8)
    for i, pixels in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = (i // columns) * (h + gap) + gap, (i % columns) * (w + gap) + gap
        canvas[top : top + h, left : left + w] = pixels
    return Image.fromarray(canvas)


def png_uri(pixels: np.ndarray) -> str:
    """(H, W, 3) uint8 as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def curve(values: Sequence[float], *, width: int = 320, height: int = 90) -> dict[str, Any] | None:
    """Points of an SVG line for finite values, with its extremes; None when there are fewer than two."""
    points = [(i, v) for i, v in enumerate(values) if v is not None and np.isfinite(v)]
    if len(points) < 2:
        return None
    low, high = min(v for _, v in points), max(v for _, v in points)
    span = (high - low) or 1.0
    line = " ".join(
        f"{i / (len(values) - 1) * width:.1f},{height - (v - low) / span * height:.1f}"
        for i, v in points
    )
    return {
        "points": line,
        "low": low,
        "high": high,
        "last": points[-1][1],
        "width": width,
        "height": height,
    }


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count`, spread evenly."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def render_page(template: str, **content: Any) -> str:
    """HTML of a template of this package; what the template names and nobody gives is an error."""
    environment = Environment(
        loader=PackageLoader("diffalign.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(template).render(**content)


def shown(images: int) -> list[int]:
    """Which of so many images of an evaluation a report shows: spread evenly over the held-out prompts, not picked."""
    return evenly(range(images), EXAMPLES)


def _examples(before: Evaluation, after: Evaluation) -> list[dict[str, Any]]:
    """Pairs of the same seed."""
    rows = []
    for i in shown(len(before.prompts)):
        pair = [e.image(i).permute(1, 2, 0).numpy() for e in (before, after)]
        rows.append(
            {
                "prompt": before.prompts[i].text,
                "before": png_uri(pair[0]),
                "after": png_uri(pair[1]),
                "before_reward": float(before.rewards[i]),
                "after_reward": float(after.rewards[i]),
            }
        )
    return rows


def write_report(
    folder: Path,
    *,
    config: AnyRunConfig,
    summary: dict[str, Any],
    log: list[dict[str, Any]],
    prompts: Sequence[Prompt],
    before: Evaluation,
    after: Evaluation,
) -> Path:
    """Write `folder/report.html` and return its path."""
    charts = [
        {"title": title, **chart}
        for key, title in CURVES.items()
        if (chart := curve([row.get(key) for row in log]))  # type: ignore[misc]
    ]
    page = render_page(
        "report.html",
        config=config,
        yaml=dump(config),
        summary=summary,
        charts=charts,
        examples=_examples(before, after),
        tasks=[(t, before.tasks[t], after.tasks[t]) for t in after.tasks],
        means=[
            (k, before.means[k], after.means[k])
            for k in after.means
            if k in before.means and not k.endswith("/correct")
        ],
        held_out=len({p.text for p in prompts}),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path
