"""Train `shapes-clip`, a tiny CLIP of Shapes as a learned reward beside the exact verifier.

It is trained contrastively on scenes and captions, in batches of similar captions that differ in a colour, a number or
a relation only. GenEval's rules on the scenes say which image shows which caption, so a batch has no false negatives.
The model shares no code with the verifier at run time: a policy that exploits one need not exploit the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from diffalign.geneval.rules import RELATIONS, Metadata, judge, relative_position
from diffalign.shapes.prompts import prompts
from diffalign.shapes.text import MAX_LENGTH, TARGETS, WIDTH, build_clip_tokenizer, caption_targets
from diffalign.shapes.text import clip_config as text_config
from diffalign.shapes.world import (
    COLORS,
    GRID,
    IMAGE_SIZE,
    KINDS,
    Scene,
    detections,
    render,
    sample_scene,
)

VISION_WIDTH = 128
CELLS, LAYERS = len(GRID) ** 2, len(KINDS) + len(COLORS)
ABOUT_TWO = ("position", "color_attr")
"""Tasks with enough captions about the same two shapes to form families."""
RARE = torch.tensor(20.0)
"""Weight of the map's occupied cells, since most cells are empty."""
FAMILIES = 8
"""Families of captions per batch."""
RELATIVES = 16
"""Captions of a family per batch; each has a scene."""
NOISE = 6.0
"""Standard deviation of pixel noise, since generated images are not as clean as rendered ones."""


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Build an untrained CLIP for 64 x 64 pixels in patches of 8."""
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=2 * VISION_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
        hidden_act="quick_gelu",
    )
    model = CLIPModel(
        CLIPConfig(
            text_config=text_config(tokenizer).to_dict(),
            vision_config=vision.to_dict(),
            projection_dim=WIDTH,
        )
    )
    # CLIP's initial position embeddings have a fifteenth of the patches' scale. With them minutes of training would
    # not teach positions.
    positions = grid_waves(IMAGE_SIZE // vision.patch_size, VISION_WIDTH)
    model.vision_model.embeddings.position_embedding.weight.data[1:] = 0.3 * positions
    return model


def grid_waves(side: int, width: int) -> Tensor:
    """Return sines and cosines of rows and columns (side^2, width), in four equal parts.

    Their frequencies go from half a wave to side / 4 waves.
    """
    frequencies = torch.linspace(1, side / 2, width // 4) * torch.pi / side
    phase = torch.arange(side)[:, None] * frequencies
    line = torch.cat([phase.sin(), phase.cos()], 1)
    rows, columns = line.repeat_interleave(side, 0), line.repeat(side, 1)
    return torch.cat([rows, columns], 1)


def families(*splits: str) -> list[list[Metadata]]:
    """Group prompts into families: one task and, for tasks about two shapes, the same shapes."""
    by_family: dict[tuple[str, ...], list[Metadata]] = {}
    for entry in (entry for split in splits for entry in prompts(split)):
        many = entry["tag"] in ABOUT_TWO
        kinds = sorted(c["class"] for c in entry["include"]) if many else []
        by_family.setdefault((entry["tag"], *kinds), []).append(entry)
    return list(by_family.values())


def draw_batch(
    rng: np.random.Generator, pool: list[list[Metadata]]
) -> tuple[list[Metadata], list[Scene], list[int]]:
    """Draw prompts, a scene of each, and each prompt's family number.

    Tasks are equally likely.
    """
    by_task: dict[str, list[list[Metadata]]] = {}
    for family in pool:
        by_task.setdefault(family[0]["tag"], []).append(family)
    tasks = list(by_task)
    entries, numbers = [], []
    for number in range(FAMILIES):
        relatives = by_task[tasks[rng.integers(len(tasks))]]
        family = relatives[rng.integers(len(relatives))]
        entries += [family[i] for i in rng.integers(len(family), size=RELATIVES)]
        numbers += [number] * RELATIVES
    return entries, [sample_scene(entry, rng) for entry in entries], numbers


def agreement(entries: list[Metadata], scenes: list[Scene], numbers: list[int]) -> Tensor:
    """Return a table (B, B) of which images (rows) show which captions (columns).

    An entry is 1 if the image shows the caption, 0 if not, and -1 if that is unknown: the caption is of another family,
    and its shapes are all in the image.
    """
    n = len(entries)
    kinds = [{o.kind for o in scene} for scene in scenes]
    captioned_kinds = [{c["class"] for c in entry["include"]} for entry in entries]
    table = torch.zeros(n, n)
    for i in range(n):
        objects = detections(scenes[i])
        for j in range(n):
            if numbers[i] == numbers[j]:
                table[i, j] = float(judge(objects, entries[j]).correct)
            elif captioned_kinds[j] <= kinds[i]:
                table[i, j] = -1
    return table


def contrastive_loss(logits: Tensor, table: Tensor) -> Tensor:
    """Return the mean contrastive loss of logits (B, B) and their agreement table (B, B).

    It is -log of the probability of all right captions of an image, and of all right images of a caption.
    """
    allowed = logits.masked_fill(table < 0, -torch.inf)
    right = logits.masked_fill(table < 1, -torch.inf)
    both = [allowed.logsumexp(dim) - right.logsumexp(dim) for dim in (0, 1)]
    return torch.stack(both).mean()


def to_pixel_values(images: np.ndarray, processor: CLIPImageProcessorPil) -> Tensor:
    """Convert images (B, H, W, 3) uint8 to the input of the vision tower."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std


class Heads(nn.Module):
    """Auxiliary heads for training, which are discarded afterwards.

    Both towers name what is shown or captioned, and share a head for the shapes' positions: captions say these in two
    ways, and contrast alone hardly learns them. The image tower also predicts a map of kinds and colours by cell.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names = nn.ModuleList(nn.Linear(WIDTH, sum(TARGETS.values())) for _ in range(2))
        self.places = nn.Linear(WIDTH, 4 * len(KINDS))
        self.map = nn.Linear(VISION_WIDTH, CELLS * LAYERS)

    def loss(
        self,
        pooled: Tensor,
        image_embeds: Tensor,
        text_embeds: Tensor,
        entries: list[Metadata],
        scenes: list[Scene],
    ) -> Tensor:
        """Return the summed losses of the heads.

        Args:
            pooled: pooled output of the image tower.
            image_embeds: projected embeddings of the images.
            text_embeds: projected embeddings of the captions.
            entries: prompts of the captions.
            scenes: scenes of the images.
        """
        maps = torch.stack([scene_map(scene) for scene in scenes])
        return (
            _naming_loss(self.names[0](image_embeds), entries, shown=True)
            + _naming_loss(self.names[1](text_embeds), entries, shown=False)
            + _place_loss(self.places(image_embeds), [shown_places(scene) for scene in scenes])
            + _place_loss(self.places(text_embeds), [said_places(entry) for entry in entries])
            + 3 * F.binary_cross_entropy_with_logits(self.map(pooled), maps, pos_weight=RARE)
        )


def train_clip(
    folder: Path, *, steps: int, lr: float = 1e-3, seed: int = 0, batches: int = 40
) -> dict[str, float]:
    """Train from scratch, save model, tokenizer and processor, and measure `told_apart`.

    The argument `batches` is the number of batches that `told_apart` measures.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = build_clip_tokenizer()
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    )
    model, heads = build_model(tokenizer), Heads()
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    pool = families("train")
    bar = tqdm(range(steps), desc="shapes-clip", mininterval=10)
    for step in bar:
        entries, scenes, numbers = draw_batch(rng, pool)
        pixels = to_pixel_values(np.stack([render(scene) for scene in scenes]), processor)
        pixels = pixels + torch.randn_like(pixels) * (NOISE / 255 / processor.image_std[0])
        with torch.autocast("cpu", torch.bfloat16):
            pooled = model.vision_model(pixel_values=pixels).pooler_output
            image_embeds = model.visual_projection(pooled).float()
            text_embeds = embed_texts(model, tokenizer, [e["prompt"] for e in entries])
        logits = (
            F.normalize(image_embeds)
            @ F.normalize(text_embeds).T
            * model.logit_scale.exp().clamp(max=100)
        )
        loss = contrastive_loss(logits, agreement(entries, scenes, numbers))
        naming = heads.loss(pooled.float(), image_embeds, text_embeds, entries, scenes)
        optimizer.zero_grad()
        (loss + naming * (1 - step / steps)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", naming=f"{naming.item():.3f}", refresh=False)
    model.eval()
    measured = told_apart(model, tokenizer, processor, batches=batches)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return measured


def embed(
    model: CLIPModel, tokenizer: CLIPTokenizer, pixels: Tensor, texts: list[str]
) -> tuple[Tensor, Tensor]:
    """Return embeddings (B, D) of images and of texts in float32, before normalisation."""
    image_embeds = model.get_image_features(pixel_values=pixels).pooler_output
    return image_embeds.float(), embed_texts(model, tokenizer, texts)


def embed_texts(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Return embeddings (B, D) of texts in float32, before normalisation."""
    ids = tokenizer(
        texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    )
    features: Tensor = model.get_text_features(**ids).pooler_output
    return features.float()


def scene_map(scene: Scene) -> Tensor:
    """Return a map (CELLS * LAYERS,) of kinds and colours by grid cell."""
    grid = torch.zeros(CELLS, LAYERS)
    for item in scene:
        column, row = (round((v - GRID[0]) / (GRID[1] - GRID[0])) for v in (item.x, item.y))
        cell = len(GRID) * row + column
        grid[cell, KINDS.index(item.kind)] = 1
        grid[cell, len(KINDS) + list(COLORS).index(item.color)] = 1
    return grid.flatten()


def _naming_loss(logits: Tensor, entries: list[Metadata], *, shown: bool) -> Tensor:
    """Return the cross-entropy of what a caption says.

    With `shown`, targets that a caption leaves unsaid do not count: an image cannot know them.
    """
    targets = torch.tensor([caption_targets(e) for e in entries])
    parts = logits.split(list(TARGETS.values()), dim=-1)
    unsaid = -100 if shown else 0
    losses = []
    for i, part in enumerate(parts):
        target = targets[:, i].where(targets[:, i] > 0, unsaid)
        if (target >= 0).any():
            losses.append(F.cross_entropy(part, target))
    return torch.stack(losses).mean()


def said_places(entry: Metadata) -> list[int]:
    """Return a caption's position targets: two per kind.

    The first is 0 if the kind is left of the other and 1 if it is right, the second 0 if it is above and 1 if below;
    -100 marks a target that the caption does not state.
    """
    if entry["tag"] != "position":
        return [-100] * 2 * len(KINDS)
    target, named = entry["include"]
    return _places(named["class"], target["class"], [named["position"][0]])


def shown_places(scene: Scene) -> list[int]:
    """Return the position targets of a scene of two shapes, as in `said_places`."""
    if len(scene) != 2 or scene[0].kind == scene[1].kind:
        return [-100] * 2 * len(KINDS)
    first, second = scene
    return _places(first.kind, second.kind, relative_position(first.box, second.box))


def _places(kind: str, other: str, relations: Iterable[str]) -> list[int]:
    places = [-100] * 2 * len(KINDS)
    for relation in relations:
        axis, side = divmod(RELATIONS.index(relation), 2)
        places[2 * KINDS.index(kind) + axis] = side
        places[2 * KINDS.index(other) + axis] = 1 - side
    return places


def _place_loss(logits: Tensor, places: list[list[int]]) -> Tensor:
    targets = torch.tensor(places)
    if (targets < 0).all():
        return torch.zeros(())
    return F.cross_entropy(logits.view(-1, 2), targets.flatten())


@torch.no_grad()
def told_apart(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    processor: CLIPImageProcessorPil,
    *,
    batches: int = 40,
    seed: int = 1,
) -> dict[str, float]:
    """Return how often a right image scores above a wrong one, by task.

    For each held-out caption, pairs of a right and a wrong image of the same family are compared by cosine; chance
    gives 0.5. This is what a reward must distinguish within a group.
    """
    rng = np.random.default_rng(seed)
    pool = families("train", "held_out")
    held_out = {entry["prompt"] for entry in prompts("held_out")}
    wins: dict[str, list[float]] = {}
    for _ in range(batches):
        entries, scenes, numbers = draw_batch(rng, pool)
        pixels = to_pixel_values(np.stack([render(s) for s in scenes]), processor)
        image_embeds, text_embeds = embed(model, tokenizer, pixels, [e["prompt"] for e in entries])
        cosines = F.normalize(image_embeds) @ F.normalize(text_embeds).T
        table = agreement(entries, scenes, numbers)
        for j, entry in enumerate(entries):
            same = torch.tensor([n == numbers[j] for n in numbers])
            right = cosines[same & (table[:, j] == 1), j]
            wrong = cosines[same & (table[:, j] == 0), j]
            if entry["prompt"] in held_out and len(wrong):
                share = (right[:, None] > wrong[None]).float().mean().item()
                wins.setdefault(entry["tag"], []).append(share)
    return {task: float(np.mean(values)) for task, values in wins.items()}
