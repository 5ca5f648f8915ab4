"""The loop that moves a model: what it asks, both ends in closed form, updates, resumes, processes, and bad input."""

import json

import pytest
import tiny
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from processes import results_of
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file
from tiny_moves import deep_autoencoder, image_folder, settings, trainer

from diffalign import cli, lora
from diffalign.algorithms.dcgen import dcgen_loss, guided
from diffalign.config import ConfigError, LatentRunConfig, decode, load, recipes
from diffalign.core.errors import UsageError
from diffalign.data.captioned import ImageSource
from diffalign.data.fill import SHARD_ITEMS
from diffalign.data.images import ImageFolderError
from diffalign.data.shard_cache import CacheError
from diffalign.latents.alignment import Statistics
from diffalign.latents.codec import pack
from diffalign.latents.move import layer
from diffalign.methods.dcgen.alignment import watched
from diffalign.methods.dcgen.trainer import LatentTrainer
from diffalign.training.run_folder import RunFolder

FAMILIES = sorted(tiny.MOVABLE)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoder")
    deep_autoencoder().save_pretrained(folder)
    return folder


def ready(*args, **kwargs):
    run = trainer(*args, **kwargs)
    run.prepare()
    return run


# --- the loss


def predictions(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(3, 4, 2, 2, generator=generator) for _ in range(3))


def test_without_guidance_it_is_flow_matching():
    """C1."""
    pred, null, target = predictions()
    plain, _ = dcgen_loss(pred, target)
    one, _ = dcgen_loss(pred, target, null_pred=null, guidance_scale=torch.ones(3))
    torch.testing.assert_close(plain, one)
    torch.testing.assert_close(plain, (pred - target).square().mean((1, 2, 3)))


def test_its_weight_under_guidance_is_the_inverse_square():
    """C2: L = |v(c, w) - (v0 + w (u - v0))|^2 / w^2."""
    pred, null, target = predictions()
    w = torch.tensor([1.5, 3.0, 6.0])
    found, metrics = dcgen_loss(pred, target, null_pred=null, guidance_scale=w)
    goal = null + w.view(-1, 1, 1, 1) * (target - null)
    torch.testing.assert_close(found, (pred - goal).square().mean((1, 2, 3)) / w.square())
    torch.testing.assert_close(metrics["loss"], found)
    assert float(guided(goal, null, w).sub(target).abs().max()) < 1e-5


def test_no_gradient_passes_through_the_empty_prompt():
    """C3."""
    pred, null, target = (t.requires_grad_() for t in predictions())
    loss, _ = dcgen_loss(pred, target, null_pred=null, guidance_scale=torch.full((3,), 2.0))
    loss.sum().backward()
    assert null.grad is None
    assert pred.grad is not None


def test_the_empty_prompt_is_asked_at_scale_one(images, autoencoder, tmp_path, monkeypatch):
    """C4: whatever the scale at which the prompts are."""
    run = ready(tmp_path / "run", images, autoencoder, latents={"cache": str(tmp_path / "cache")})
    asked, original = [], run.model.predict

    def recorded(noisy, times, embeds, **kwargs):
        asked.append((embeds, kwargs["guidance_scale"]))
        return original(noisy, times, embeds, **kwargs)

    monkeypatch.setattr(run.model, "predict", recorded)
    denoising = run.task.make_batch(run.cache.batch(range(4)), list(range(4)))
    assert (denoising.guidance_scale > 1).all()
    with torch.no_grad():
        run.task.loss(denoising)
    (null, one), (prompts, scale) = asked
    assert one.tolist() == [1.0] * 4
    assert torch.equal(scale, denoising.guidance_scale)
    assert prompts is denoising.embeds
    expected = run.task.null.repeat_first(4).prompt_embeds
    assert torch.equal(null.prompt_embeds, expected)


# --- both ends


@pytest.mark.parametrize("family", FAMILIES)
def test_the_embedder_is_the_least_squares_map(family, images, autoencoder, tmp_path):
    run = ready(tmp_path / "run", images, autoencoder, family=family)
    facts = run.alignment
    assert 0 < facts["embedder_r2"] <= 1
    chosen = [i for i in run.cache.paired if i in run.images]
    assert facts["aligned_images"] == len(chosen) > 4
    batch = run.cache.batch(chosen, paired=True)
    old = layer(run.base.denoiser, run.base.ends.embedder)
    p = run.base.patch_size
    side = [s // p for s in batch.base_latents.shape[2:]]
    tokens = pack(batch.base_latents, p) @ old.weight.flatten(1).T + old.bias
    tokens = tokens.transpose(1, 2).unflatten(2, side)
    k = side[0] // batch.latents.shape[2]
    y = torch.nn.functional.avg_pool2d(tokens, k).movedim(1, -1).flatten(0, -2).double()
    x = batch.latents.movedim(1, -1).flatten(0, -2).double()
    wanted = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    ours = layer(run.model.denoiser, run.model.ends.embedder)
    found = x @ ours.weight.flatten(1).T.double() + ours.bias.double()
    expected = torch.cat([x, torch.ones(len(x), 1).double()], 1) @ wanted
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_linear_in_what_it_reads(family, images, autoencoder, tmp_path):
    """The loss that least squares predicts is the loss that the model has, guided scales and all."""
    run = ready(tmp_path / "run", images, autoencoder, family=family)
    batch = run.cache.batch(run.images)
    seeds = list(range(len(run.images)))
    head = layer(run.model.denoiser, run.model.ends.head)
    with torch.no_grad(), lora.policy(run.model.denoiser, lora.REFERENCE):
        features, target = run.task.features(batch, seeds, watched(run.model))
        loss, _ = run.task.loss(run.task.make_batch(batch, seeds))
    found = features.flatten(0, 1) @ head.weight.T + head.bias
    error = (found - pack(target, 1).flatten(0, 1)).square().mean()
    assert float(error) == pytest.approx(float(loss.mean()), rel=1e-3)


def test_the_closed_head_is_better_than_a_random_one(autoencoder, tmp_path):
    images, losses = image_folder(tmp_path / "images", n=96), {}
    for name, align in (("closed", True), ("random", False)):
        groups = {"align_head": align, "alignment_images": 96}
        run = ready(tmp_path / name, images, autoencoder, latents=groups)
        batch = run.cache.batch(run.images)
        with torch.no_grad():
            found = run.task.loss(run.task.make_batch(batch, list(range(len(batch.latents)))))[0]
        losses[name] = float(found.mean())
    assert losses["closed"] < losses["random"]


def test_shift_by_signal_moves_the_schedulers_noise_levels(images, autoencoder, tmp_path):
    run = ready(tmp_path / "run", images, autoencoder, latents={"shift": "signal"})
    r = run.alignment["signal_shift"]
    sigmas = torch.tensor([0.2, 0.6])
    plain = run.base.shifted(sigmas, (16, 16))
    found = run.model.shifted(sigmas, (16, 16))
    torch.testing.assert_close(found, r * plain / (1 + (r - 1) * plain))
    noise_aware = ready(tmp_path / "aware", images, autoencoder, latents={"noise_aware": True})
    assert noise_aware.alignment["embedder_error"] > run.alignment["embedder_error"]


# --- updates


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_adapter_changes_nothing(family, images, autoencoder, tmp_path):
    """C4."""
    run = ready(tmp_path / "run", images, autoencoder, family=family)
    batch = run.cache.batch(run.images[:2])
    denoising = run.task.make_batch(batch, [0, 1])
    with torch.no_grad():
        with lora.policy(run.model.denoiser, lora.REFERENCE):
            wanted = run.task.predict(denoising)
        assert torch.equal(run.task.predict(denoising), wanted)


def test_what_is_trained_is_the_adapters_and_nothing_else(images, autoencoder, tmp_path):
    """C6: a target that begins with "=" is one layer, not every layer whose name ends so."""
    ends = ["=x_embedder", "=proj_out", "attn.to_q"]
    run = ready(tmp_path / "run", images, autoencoder, lora={"targets": ends})
    trained = {n for n, p in run.model.denoiser.named_parameters() if p.requires_grad}
    layers = {n.partition(".lora_")[0] for n in trained}
    assert all(".lora_" in n for n in trained)
    assert layers == {
        "x_embedder",
        "proj_out",
        "transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.0.attn.to_q",
    }
    suffix = ready(tmp_path / "other", images, autoencoder, lora={"targets": ["proj_out"]})
    names = {n for n, p in suffix.model.denoiser.named_parameters() if p.requires_grad}
    assert any(n.startswith("single_transformer_blocks.0.proj_out") for n in names)


def test_a_rank_of_all_channels_trains_the_ends_in_full(images, autoencoder, tmp_path):
    """Any matrix of the embedder is within reach of a LoRA of rank 8 for 8 channels."""
    run = ready(tmp_path / "run", images, autoencoder, lora={"targets": ["=x_embedder"]})
    embedder = run.model.denoiser.x_embedder
    wanted = torch.randn(embedder.base_layer.weight.shape)
    u, s, v = torch.linalg.svd(wanted, full_matrices=False)
    with torch.no_grad():
        embedder.lora_B["default"].weight.copy_(u * s)
        embedder.lora_A["default"].weight.copy_(v)
    torch.testing.assert_close(embedder.get_delta_weight("default"), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_updates_lower_the_loss_and_resume_bit_for_bit(family, images, autoencoder, tmp_path):
    def build(name):
        cache = {"cache": str(tmp_path / "cache")}
        return ready(tmp_path / name, images, autoencoder, family=family, latents=cache)

    whole = build("whole")
    rows = [whole.train_update() for _ in range(4)]
    assert rows[0]["loss"] > 0
    first = build("parts")
    for _ in range(2):
        first.train_update()
    first.save()
    second = build("parts")
    assert second.resume()
    again = [second.train_update() for _ in range(2)]
    assert [r["loss"] for r in again] == [r["loss"] for r in rows[2:]]
    for policy in (lora.CURRENT, lora.AVERAGED):
        a, b = (lora.adapter_state(r.model.denoiser, policy) for r in (whole, second))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert "validation/loss" in whole.validate()
    batch = whole.cache.batch(whole.images)
    denoising = whole.task.make_batch(batch, list(range(len(batch.latents))))
    with torch.no_grad():
        with lora.policy(whole.model.denoiser, lora.REFERENCE):
            before = float(whole.task.loss(denoising)[0].mean())
        for _ in range(20):
            with torch.enable_grad():
                whole.train_update()
        assert float(whole.task.loss(denoising)[0].mean()) < before


def test_micro_batches_make_no_difference(images, autoencoder, tmp_path):
    found = []
    for size in (6, 2):
        run = ready(tmp_path / str(size), images, autoencoder, training={"micro_batch_size": size})
        row = run.train_update()
        found.append([row[k] for k in ("loss", "relative_error", "grad_norm")])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_two_processes_give_what_one_gives(images, autoencoder, tmp_path):
    one, two = (
        results_of(world, "latent_run", tmp_path / str(world), images, autoencoder)
        for world in (1, 2)
    )
    assert one[3]["embedder_r2"] == pytest.approx(two[3]["embedder_r2"], rel=1e-5)
    torch.testing.assert_close(one[1], two[1], rtol=1e-3, atol=1e-3)
    assert one[2] == pytest.approx(two[2], rel=1e-3)


# --- the cache


def test_images_that_cannot_be_used_are_counted(autoencoder, tmp_path):
    images = image_folder(tmp_path / "images")
    (images / "003.png").write_bytes(b"cut")
    (images / "004.txt").write_text("  ")
    run = ready(tmp_path / "run", images, autoencoder)
    assert run.cache.manifest["skipped"] == {"unreadable": 1, "no caption": 1}
    assert run.cache.manifest["images"] == 10
    assert run.facts()["skipped_images"] == {"unreadable": 1, "no caption": 1}


def test_a_cache_of_another_autoencoder_is_refused(images, autoencoder, tmp_path):
    cache = {"latents": {"cache": str(tmp_path / "cache")}}
    ready(tmp_path / "a", images, autoencoder, **cache)
    deep_autoencoder(1).save_pretrained(tmp_path / "other")
    with pytest.raises(CacheError, match="was made from something else"):
        ready(tmp_path / "b", images, tmp_path / "other", **cache)


def test_a_cache_of_other_images_is_refused(autoencoder, tmp_path):
    images = image_folder(tmp_path / "images")
    cache = {"latents": {"cache": str(tmp_path / "cache")}}
    ready(tmp_path / "a", images, autoencoder, **cache)
    ready(tmp_path / "b", images.rename(tmp_path / "moved"), autoencoder, **cache)
    (tmp_path / "moved" / "001.txt").write_text("another caption")
    with pytest.raises(CacheError, match="was made from something else"):
        ready(tmp_path / "c", tmp_path / "moved", autoencoder, **cache)


def test_an_interrupted_pass_goes_on(autoencoder, tmp_path, monkeypatch):
    """Prompts return in the second shard: its tensors are those of the uninterrupted pass."""
    tiny.make_embeddings_depend_on_their_batch(monkeypatch)
    images = image_folder(tmp_path / "images", n=SHARD_ITEMS + 5)
    (images / f"{SHARD_ITEMS + 4:03d}.txt").write_text("a prompt of the second shard alone")
    groups = {"latents": {"cache": str(tmp_path / "cache"), "alignment_images": 4}}
    ready(tmp_path / "run", images, autoencoder, **groups)
    folder = tmp_path / "cache"
    whole = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert sorted(n for n in whole if n.startswith("shard")) == [
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]
    (folder / "shard-00001.safetensors").unlink()
    (folder / "index.parquet").unlink()
    manifest = json.loads(whole["manifest.json"])
    (folder / "manifest.json").write_text(json.dumps({"key": manifest["key"]}))
    run = ready(tmp_path / "again", images, autoencoder, **groups)
    kept = (folder / "shard-00000.safetensors").read_bytes()
    assert kept == whole["shard-00000.safetensors"]
    made = load_file(folder / "shard-00001.safetensors")
    for name, values in load_bytes(whole["shard-00001.safetensors"]).items():
        assert torch.equal(made[name], values)
    assert run.cache.manifest["images"] == SHARD_ITEMS + 5
    assert len(run.cache.paired) == SHARD_ITEMS, "by shards"
    (folder / "shard-00001.safetensors").write_bytes(b"cut")
    with pytest.raises(CacheError, match="damaged"):
        run.cache.row(SHARD_ITEMS + 1)


def test_rendered_images_are_a_function_of_their_row():
    source = ImageSource("shapes:train", (64, 64), limit=3)
    first, second = list(source.items()), list(source.items(start=1))
    assert [i.row for i in second] == [1, 2]
    assert torch.equal(first[2].pixels, second[1].pixels)
    assert first[2].prompt == second[1].prompt


# --- from the command line


def common(tmp_path, images, autoencoder):
    tiny.flux_pipeline().save_pretrained(tmp_path / "base")
    return [
        *("dcgen-shapes-flux", f"--model.name={tmp_path / 'base'}", "--model.dtype=float32"),
        *(f"--latents.autoencoder={autoencoder}", f"--train_data_dir={images}"),
        *("--latents.limit=12", "--latents.alignment_images=12", "--latents.validation=0.4"),
        *("--rewards={jpeg: 1.0}", "--lora.rank=8", "--resolution=16", "--mixed_precision=no"),
        *("--training.images_per_update=6", "--training.micro_batch_size=6"),
        *("--max_train_steps=3", "--training.checkpoint_every=2", "--training.sample_every=2"),
        *("--training.eval_every=2", "--evaluation.images_per_task=1"),
        *("--evaluation.num_inference_steps=2", f"--output_dir={tmp_path / 'run'}"),
        "--max_sequence_length=16",
    ]


def test_a_run_leaves_a_drop_in_pipeline(images, autoencoder, tmp_path, capsys):
    arguments = common(tmp_path, images, autoencoder)
    assert cli.main(["precompute", "--json", *arguments]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 12
    assert cli.main(["train", *arguments]) == 0
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["tokens"] == {"base": 16, "moved": 4}
    assert summary["alignment"]["embedder_r2"] > 0
    assert "validation/loss" in summary["after"]
    assert "moved with dcgen" in (run / "report.html").read_text()
    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline", trust_remote_code=True)
    assert type(pipeline).__name__ == "DCGenFluxPipeline"
    assert not any("lora" in k for k in pipeline.transformer.state_dict())
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a", num_inference_steps=2).images[0].size == (16, 16)
    asked = ["generate", "a photo", f"--model={run / 'pipeline'}", "--num_inference_steps=2"]
    assert cli.main([*asked, f"--output_dir={tmp_path / 'drawn'}", "--dtype=float32"]) == 0

    # a further run begins where this one ended, in the same space: the resolution lift
    lifted = [a for a in arguments if not a.startswith(("--latents.autoencoder", "--output_dir"))]
    lifted = [a for a in lifted if not a.startswith(("--model.name", "--resolution"))]
    lifted += [f"--model.name={run / 'pipeline'}", "--latents.autoencoder=null"]
    lifted += ["--resolution=32", f"--output_dir={tmp_path / 'lifted'}"]
    assert cli.main(["train", *lifted]) == 0
    summary = json.loads((tmp_path / "lifted" / "summary.json").read_text())
    assert summary["tokens"] == {"base": 16, "moved": 16}
    index = json.loads((tmp_path / "lifted" / "pipeline" / "model_index.json").read_text())
    assert index["codec"]["compression"] == 8
    assert index["image_size"] == 32
    assert (tmp_path / "lifted" / "lora").is_dir()

    # a run that goes on leaves what it is then
    weights = "transformer/diffusion_pytorch_model.safetensors"
    longer = [a for a in arguments if not a.startswith("--max_train_steps")]
    longer += ["--max_train_steps=4", "--optimizer.lr_scheduler=constant"]
    first = [*arguments, "--optimizer.lr_scheduler=constant", f"--output_dir={tmp_path / 'on'}"]
    assert cli.main(["train", *first]) == 0
    before = (tmp_path / "on" / "pipeline" / weights).read_bytes()
    assert cli.main(["train", *longer, f"--output_dir={tmp_path / 'on'}"]) == 0
    assert (tmp_path / "on" / "pipeline" / weights).read_bytes() != before


def test_other_methods_go_on_in_the_new_space(images, autoencoder, tmp_path):
    """A moved pipeline is a model like any other: here AWM trains on it."""
    assert cli.main(["train", *common(tmp_path, images, autoencoder)]) == 0
    moved = tmp_path / "run" / "pipeline"
    awm = ["train", "awm-shapes-flux", f"--model.name={moved}", "--rewards={jpeg: 1.0}"]
    awm += ["--model.dtype=float32", "--mixed_precision=no", "--max_train_steps=1"]
    awm += ["--rollout.prompts_per_update=2", "--rollout.group_size=2", "--model.compile=false"]
    awm += ["--rollout.num_inference_steps=4", "--evaluation.images_per_task=1", "--lora.rank=2"]
    awm += ["--evaluation.num_inference_steps=2", f"--output_dir={tmp_path / 'awm'}"]
    assert cli.main(awm) == 0
    assert (tmp_path / "awm" / "lora").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": {"images": ""}}, "latents.images: name a folder"),
        ({"latents": {"images": "shapes:train"}}, "latents.limit: say how many"),
        ({"latents": {"autoencoder": "/nowhere"}}, "latents.autoencoder: /nowhere"),
        ({"images": {"height": 12, "width": 16}}, "do not fit an autoencoder"),
        ({"lora": {"targets": ["=nothing"]}}, "lora.targets that match no layer"),
        ({"latents": {"validation": 0.9999999}}, "every prompt is kept for validation"),
    ],
)
def test_what_cannot_be_run_is_refused(changes, message, images, autoencoder, tmp_path):
    with pytest.raises((UsageError, ImageFolderError), match=message):
        ready(tmp_path / "run", images, autoencoder, **changes)


def test_settings_are_checked(images, autoencoder, tmp_path):
    for changes, message in (
        ({"algorithm": {"max_guidance": 0.5}}, "algorithm.min_guidance"),
        ({"latents": {"objective": "sideways"}}, "latents.objective"),
        ({"algorithm": {"prompt_dropout": 1.0}}, "algorithm.prompt_dropout"),
        ({"latents": {"noise_aware": True, "objective": "upsample"}}, "latents.noise_aware"),
        ({"latents": {"shift": "signal", "autoencoder": None}}, "latents.shift"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings(tmp_path, images, autoencoder, **changes)
    config, folder = settings(tmp_path, images, autoencoder), RunFolder(tmp_path / "sd")
    with pytest.raises(UsageError, match="no rectified flow"):
        LatentTrainer(config, tiny.sd_model(), Accelerator(cpu=True), folder)


def test_recipes_are_moves():
    found = [name for name in recipes() if name.startswith("dcgen")]
    assert found
    for name in found:
        config = load(name)
        assert isinstance(config, LatentRunConfig)
        assert config.lora.rank >= 32
    assert decode({"algorithm": {"type": "dcgen"}}).algorithm.max_guidance == 14


def test_statistics_are_summed_over_processes_in_place():
    found = Statistics(2, 1)
    found.add(torch.ones(3, 2), torch.ones(3, 1))
    for tensor in found.tensors():
        tensor.mul_(2)
    assert found.count == 6
