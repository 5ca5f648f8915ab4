"""The semantic map with which bases are aligned in pretraining, and the order in which checkpoints are made."""

import math
import sys

import pytest
import tiny
import torch
from second_device import CUDA, SecondDevice
from test_shapes_training import config, dataset, model_of

from diffalign.core.errors import UsageError
from diffalign.pipelines.flux import FluxModel
from diffalign.pipelines.sd3 import SD3Model
from diffalign.scripts.shapes import everything
from diffalign.scripts.shapes.denoiser import Captioned, Pretraining
from diffalign.scripts.shapes.semantics import (
    OBJECT_WEIGHT,
    SemanticHead,
    image_tokens,
    middle_block,
    semantic_loss,
    semantic_map,
    tokens_per_side,
)
from diffalign.shapes.world import COLORS, KINDS, SceneObject


def test_a_token_belongs_to_the_object_that_covers_enough_of_it():
    # 16 px at (12, 12): its box is 4..20, which covers token 1 whole and half of tokens 0 and 2
    labels = semantic_map((SceneObject("cross", "blue", 12, 12, 16),), side=8)
    kind, color = 1 + KINDS.index("cross"), 1 + list(COLORS).index("blue")
    assert labels.shape == (2, 8, 8)
    assert labels[0, 1, 1] == kind
    assert labels[1, 1, 1] == color
    assert labels[0, 0, 1] == kind  # half of it
    assert labels[0, 0, 0] == 0  # a quarter of it
    assert (labels[:, 3:] == 0).all()
    assert (labels[0] > 0).sum() == 5


def test_later_objects_cover_earlier_ones():
    below, above = (
        SceneObject("circle", "red", 20, 20, 16),
        SceneObject("ring", "black", 20, 20, 16),
    )
    labels = semantic_map((below, above), side=8)
    assert set(labels[0].flatten()) == {0, 1 + KINDS.index("ring")}


def test_the_loss_of_a_head_that_knows_nothing_is_that_of_chance():
    labels = torch.randint(6, (3, 2, 16))
    logits = torch.zeros(3, 16, len(KINDS) + len(COLORS) + 2)
    chance = math.log(len(KINDS) + 1) + math.log(len(COLORS) + 1)
    assert semantic_loss(logits, labels).item() == pytest.approx(chance, rel=1e-6)


def test_objects_weigh_more_than_the_ground():
    labels = torch.tensor([[[0, 1], [0, 1]]])  # one token of ground, one of an object
    logits = torch.zeros(1, 2, len(KINDS) + len(COLORS) + 2)
    logits[0, 0, [0, len(KINDS) + 1]] = 100.0  # right about the ground
    chance = math.log(len(KINDS) + 1) + math.log(len(COLORS) + 1)
    expected = OBJECT_WEIGHT * chance / (OBJECT_WEIGHT + 1)
    assert semantic_loss(logits, labels).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["sd3", "flux", "sd"])
def test_the_middle_block_gives_a_state_for_every_image_token(family):
    model = {**tiny.MODELS, **tiny.UNETS}[family]()
    states = []
    block = middle_block(model.denoiser)
    block.register_forward_hook(lambda _, __, output: states.append(image_tokens(output)))
    latents, timesteps, embeds = model.random_inputs(2, model.default_size)
    model.predict(latents, timesteps, embeds)
    (state,) = states
    assert len(state) == 2
    assert state.ndim == 3
    assert state.shape[1] == tokens_per_side(model, size=model.default_size[0]) ** 2


@pytest.mark.parametrize("kind", [SD3Model, FluxModel])
def test_the_head_learns_and_the_denoiser_is_an_ordinary_one(kind, tmp_path):
    torch.manual_seed(0)
    run = Pretraining(model_of(kind), config(alignment=1.0, lr=5e-3), tmp_path)
    data = dataset(run.model)
    weights = {k: v.clone() for k, v in run.head.state_dict().items()}
    losses = [run.update(data) for _ in range(30)]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert any(not torch.equal(v, weights[k]) for k, v in run.head.state_dict().items())
    assert not [name for name in run.denoiser.state_dict() if "head" in name]
    plain = Pretraining(model_of(kind), config(alignment=0.0), tmp_path)
    assert plain.head is None
    assert sum(p.numel() for o in run.optimizers for p in o.param_groups[0]["params"]) == sum(
        p.numel() for o in plain.optimizers for p in o.param_groups[0]["params"]
    ) + sum(p.numel() for p in run.head.parameters())


def test_a_head_reads_what_a_block_gives():
    assert SemanticHead(24)(torch.randn(2, 9, 24)).shape == (2, 9, len(KINDS) + len(COLORS) + 2)


def test_a_dataset_is_read_as_it_was_written(tmp_path):
    data = dataset(model_of(SD3Model))
    data.save(tmp_path / "data.safetensors")
    again = Captioned.load(tmp_path / "data.safetensors")
    assert torch.equal(again.latents, data.latents)
    assert torch.equal(again.rows, data.rows)
    assert torch.equal(again.maps, data.maps)
    for name in ("embeds", "long_embeds"):
        old, new = getattr(data, name), getattr(again, name)
        assert torch.equal(old.prompt_embeds, new.prompt_embeds)
        assert torch.equal(old.pooled_prompt_embeds, new.pooled_prompt_embeds)


@pytest.mark.parametrize("kind", [SD3Model, FluxModel])
def test_pretraining_runs_on_another_device(kind, tmp_path):
    with SecondDevice():
        run = Pretraining(model_of(kind).to(CUDA), config(), tmp_path)
        model = model_of(kind)
        data = dataset(model)
        run.update(data)
        run.save()
        again = Pretraining(model_of(kind).to(CUDA), config(), tmp_path)
        again.resume()
        again.update(data)
        assert again.step == 2


class TestStages:
    def plan(self, tmp_path):
        return everything.stages(out=tmp_path / "out", work=tmp_path / "work", device="cpu")

    def test_every_shipped_checkpoint_has_a_stage_after_what_it_needs(self, tmp_path):
        plan = self.plan(tmp_path)
        names = [stage.name for stage in plan]
        shipped = {p.name for p in everything.CHECKPOINTS.iterdir() if p.is_dir()}
        assert set(names) == shipped | {"shapes-vae"}
        for i, stage in enumerate(plan):
            assert set(stage.needs) <= set(names[:i])

    def test_stages_run_in_order_and_whole_checkpoints_are_kept(self, tmp_path, capsys):
        def stage(name, *needs):
            code = f"open({str(tmp_path / 'log')!r}, 'a').write({name!r})"
            return everything.Stage(name, tmp_path / name, ((sys.executable, "-c", code),), needs)

        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "model_index.json").write_text("{}")
        everything.make_all([stage("c", "a", "b"), stage("a"), stage("b")], jobs=2)
        assert (tmp_path / "log").read_text() == "ac"
        assert "b: already made" in capsys.readouterr().out

    def test_a_half_written_checkpoint_is_made_again(self, tmp_path):
        (tmp_path / "half" / "transformer").mkdir(parents=True)
        assert not everything.is_whole(tmp_path / "half")

    def test_a_stage_that_fails_ends_all(self, tmp_path):
        bad = everything.Stage("bad", tmp_path / "bad", ((sys.executable, "-c", "exit(3)"),))
        with pytest.raises(UsageError, match="bad: .* ended with 3"):
            everything.make_all([bad], jobs=1)
