"""Measurement of a model between two stages: scores, distances, time and size."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.acceleration.apply import accelerate
from diffalign.acceleration.report import PLAN
from diffalign.composition.digests import LENGTH, of_listing
from diffalign.composition.recipe import GENEVAL, Recipe
from diffalign.composition.stage import State, device, drawing_of
from diffalign.core import console
from diffalign.core.files import write_text
from diffalign.core.fingerprint import of_json
from diffalign.core.precision import attention
from diffalign.data.prompts import Prompt, load_prompts, told
from diffalign.evaluation.fid import FeatureSet, collect
from diffalign.evaluation.fid_sides import compare_sides, reference_side
from diffalign.evaluation.kept import keep, kept
from diffalign.evaluation.pictures import evenly
from diffalign.evaluation.score import Evaluation, evaluate_model, repeat_prompts
from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.registry import load_model
from diffalign.pipelines.sampler import Sampler
from diffalign.pipelines.sampling import generators_of
from diffalign.quantization.accounting import folder_bytes, report
from diffalign.rewards import own
from diffalign.rewards.composition import CompositeReward
from diffalign.rewards.features import FeatureNetwork, load_network
from diffalign.training.memory_fit import free_memory

SHOWN = 12
"""Images of each stage that are stored for the page and the PSNR."""
WARM_UP = 1
BATCH = 64
"""Images of the reference whose features are computed at a time."""
Clock = Callable[[], float]


@dataclass(frozen=True)
class Measured:
    """Measurement of a model: the scores of its images, and figures for JSON."""

    evaluation: Evaluation
    figures: dict[str, Any]

    @property
    def geneval(self) -> float | None:
        """GenEval's overall score; None if no reward tells which images are correct."""
        return self.evaluation.tasks.get("overall")


class Meter:
    """Instrument that measures every model of a composition in the same way.

    Args:
        recipe: settings of the measurement.
        base: state of the base, beside which the others are timed.
        folder: folder of the reference's features.
        clock: function that returns seconds.
    """

    def __init__(
        self, recipe: Recipe, base: State, folder: Path, *, clock: Clock = time.perf_counter
    ) -> None:
        self.recipe, self.base, self.folder, self.clock = recipe, base, folder, clock
        s = recipe.measure
        self.prompts = load_prompts(s.prompts, limit=s.max_prompts)
        self.reward = CompositeReward.from_config(
            dict.fromkeys(s.rewards, 1.0), setting="measure.rewards"
        )
        self.reward.check_metadata([p.metadata for p in self.prompts])
        self._network: FeatureNetwork | None = None
        self._reference: FeatureSet | None = None
        # looks the files up now, and reads them later
        self._read = None
        if s.reference is not None:
            self._read = reference_side(s.reference, batch_size=BATCH, max_prompts=s.max_prompts)

    def drawing(self, state: State) -> Drawing:
        """Return how the images of a state are drawn."""
        s = self.recipe.measure
        return drawing_of(
            state.card,
            self.recipe.dtype,
            images_per_prompt=s.images_per_prompt,
            images_per_task=s.images_per_task,
            seed=s.seed,
        )

    def images(self) -> list[Prompt]:
        """Return the prompt of each image."""
        return repeat_prompts(self.prompts, self.drawing(self.base))

    def measure(self, state: State, place: Path) -> Measured:
        """Return the measurement of a state.

        It is read from the folder of the stage if it is there.
        """
        prompts = self.images()
        key = self._key(state, prompts)
        stem = place / f"measured-{of_json(key)[:LENGTH]}"
        images, figures = stem.with_suffix(".safetensors"), stem.with_suffix(".json")
        evaluation = kept(images, prompts, key=key)
        if evaluation is not None and figures.is_file():
            return Measured(evaluation, json.loads(figures.read_text(encoding="utf-8")))
        place.mkdir(parents=True, exist_ok=True)
        measured = self._measured(state)
        keep(measured.evaluation, images, key=key)
        write_text(figures, json.dumps(measured.figures, indent=1))
        return measured

    def _key(self, state: State, prompts: Sequence[Prompt]) -> Any:
        s = self.recipe.measure
        return {
            "model": state.digest,
            "base": self.base.digest,
            "card": [str(state.card), str(self.base.card)],
            "settings": vars(s),
            "prompts": of_json(told(prompts)),
            "reference": of_listing(s.reference),
            "files": [own.digest(name) for name in s.rewards],
            "threads": torch.get_num_threads(),
        }

    def _measured(self, state: State) -> Measured:
        self.reward.prepare()
        model = load_accelerated(state, self.recipe.dtype)
        evaluation, features = self._drawn(model, state)
        figures = {
            **evaluation.to_dict(),
            **self._distances(features),
            **self._times(model, state),
            **sizes(model, state),
            "steps": state.card.num_inference_steps,
            "guidance_scale": state.card.guidance_scale,
            "guidance_is_embedded": model.guidance_is_embedded,
        }
        return Measured(evaluation, figures)

    def _drawn(self, model: TextToImageModel, state: State) -> tuple[Evaluation, FeatureSet | None]:
        """Draw and score all images once, and return their features with them."""
        parts: list[Tensor] = []
        total = len(self.images())
        network = self._load_network()
        with console.counting("images") as progress:

            def look(part: slice, images: Tensor) -> None:
                progress(part.stop, total)
                if network is not None:
                    parts.append(network(images).float())

            drawing = self.drawing(state)
            evaluation = evaluate_model(
                model, self.prompts, self.reward.score, drawing, on_images=look
            )
        features = None
        if network is not None:
            number = {text: i for i, text in enumerate(dict.fromkeys(evaluation.texts))}
            group = [number[text] for text in evaluation.texts]
            features = collect(network, parts, group, {"model": state.source})
        rows = evenly(range(len(evaluation.prompts)), SHOWN)
        return evaluation.thinned(rows), features

    def _load_network(self) -> FeatureNetwork | None:
        s = self.recipe.measure
        if s.reference is not None and self._network is None:
            is_shapes = s.reference.startswith("shapes:")
            self._network = load_network(s.network or ("shapes_clip" if is_shapes else "inception"))
        return self._network

    def _distances(self, features: FeatureSet | None) -> dict[str, Any]:
        """Return FID, CMMD and the like to the reference, whose features are stored."""
        if features is None or self._read is None or self._network is None:
            return {}
        if self._reference is None:
            s = self.recipe.measure
            key = [s.reference, of_listing(s.reference), s.max_prompts, self._network.weights]
            file = self.folder / f"reference-{of_json(key)[:LENGTH]}.npz"
            if not file.is_file():
                self.folder.mkdir(parents=True, exist_ok=True)
                self._read(self._network)().save(file)
            self._reference = FeatureSet.load(file)
        distances, record = compare_sides(features, self._reference)
        return {**distances, "network": record["network"], "warnings": record["warnings"]}

    def _times(self, model: TextToImageModel, state: State) -> dict[str, Any]:
        """Return the seconds of one image.

        The base draws in turns with the model if both fit into memory.
        """
        own = Timed(model, self.drawing(state), self.prompts[0].text, self.clock)
        base = own
        is_base = state.digest == self.base.digest
        if not is_base and sizes(model, state)["all_bytes"] * 2 < min(
            room.free for room in free_memory()
        ):
            plain = load_accelerated(self.base, self.recipe.dtype)
            base = Timed(plain, self.drawing(self.base), self.prompts[0].text, self.clock)
        for turn in range(self.recipe.measure.repeats + WARM_UP):
            for timed in dict.fromkeys((base, own)):
                timed.draw(is_counted=turn >= WARM_UP)
        figures: dict[str, Any] = own.medians()
        if base is not own or is_base:
            pairs = zip(base.seconds, own.seconds, strict=True)
            figures["base_seconds"] = statistics.median(base.seconds)
            figures["speedup"] = statistics.median(b / o for b, o in pairs)
        return figures


class Timed:
    """Timer of single images of one model."""

    def __init__(
        self, model: TextToImageModel, drawing: Drawing, prompt: str, clock: Clock
    ) -> None:
        self.model, self.drawing, self.prompt, self.clock = model, drawing, prompt, clock
        self.seconds: list[float] = []
        self.parts: dict[str, list[float]] = {"text": [], "denoise": [], "decode": []}

    def draw(self, *, is_counted: bool) -> None:
        """Draw one image, and store the seconds of its parts."""
        # a new sampler has no embeddings in its cache
        sampler = Sampler(self.model, self.drawing)
        marks = [self._now()]
        batch = sampler.batch([self.prompt])
        marks.append(self._now())
        with torch.no_grad(), sampler.computing(), attention(self.model.device):
            latents = batch.draw(generators_of([self.drawing.seed]))
            marks.append(self._now())
            self.model.decode(latents)
        marks.append(self._now())
        if is_counted:
            self.seconds.append(marks[-1] - marks[0])
            for name, start, end in zip(self.parts, marks, marks[1:], strict=False):
                self.parts[name].append(end - start)

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return self.clock()

    def medians(self) -> dict[str, float]:
        """Return the median seconds of an image and of its parts."""
        parts = {f"{name}_seconds": statistics.median(v) for name, v in self.parts.items()}
        return {"seconds": statistics.median(self.seconds), **parts}


def load_accelerated(state: State, dtype: str) -> TextToImageModel:
    """Load the model of a state, with its plan in force if it has one."""
    gc.collect()
    model = load_model(state.source, dtype=getattr(torch, dtype), device=device())
    if (Path(state.source) / PLAN).is_file():
        accelerate(model.pipeline, Path(state.source))
    return model


def sizes(model: TextToImageModel, state: State) -> dict[str, Any]:
    """Return bytes in memory and on disk, and tokens of an image and its text."""
    size = model.image_size((state.card.height, state.card.width))
    parts = model.pipeline.components.values()
    networks = [part for part in parts if isinstance(part, torch.nn.Module)]
    folder = Path(state.source)
    return {
        "bytes": report(model.denoiser).bytes,
        "all_bytes": sum(report(part).bytes for part in networks),
        "disk_bytes": folder_bytes(folder) if folder.is_dir() else None,
        "tokens": model.image_seq_len(size),
        "text_tokens": model.prompt_shape()[0],
    }


def headline(measured: Measured) -> dict[str, Any]:
    """Return the figures of a measurement that stand in a table."""
    f = measured.figures
    names = ("fid", "cmmd", "seconds", "denoise_seconds", "speedup", "bytes", "tokens", "steps")
    return {
        GENEVAL: measured.geneval,
        **measured.evaluation.means,
        **{name: f[name] for name in names if f.get(name) is not None},
    }
