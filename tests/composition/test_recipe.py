"""Recipes of a composition: what is read, and what is refused before anything runs."""

import json
from pathlib import Path

import pytest
import tiny
import tiny_composition
import tiny_pairs
import torch
import yaml
from diffusers import AutoencoderDC
from tiny_moves import deep_autoencoder

from diffalign import config
from diffalign.cli import main
from diffalign.composition import forecast
from diffalign.composition import recipe as recipes
from diffalign.composition.plan import check_order, make_plan
from diffalign.composition.recipe import Recipe, load
from diffalign.composition.registry import STAGES
from diffalign.core.errors import UserError
from diffalign.lora.files import export_lora
from diffalign.lora.policies import attach
from diffalign.methods.dcgen import trainer as moves
from diffalign.pipelines.moving import move_model
from diffalign.pipelines.registry import load_model

ORDER = list(STAGES)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder with a tiny base, an autoencoder, images and prompts."""
    folder = tmp_path_factory.mktemp("world")
    tiny_composition.recipe(folder)
    return folder


def plan_of(folder, *names, **changes):
    """Return the plan of a tiny recipe; a change names a stage or a group, and its settings."""
    raw = tiny_composition.recipe(folder, *names)
    for name, values in changes.items():
        place = raw["stages"] if name in raw["stages"] else raw
        if isinstance(values, dict):
            merge(place.setdefault(name, {}), values)
        else:
            place[name] = values
    return make_plan(recipes.decode_group(Recipe, raw))


def merge(into, values):
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def test_recipes_that_ship_name_known_stages_and_recipes():
    names = recipes.recipes()
    bases = ("shapes-flux", "flux.1-dev", "sd3.5-medium", "sdxl", "sana")
    assert sorted(names) == sorted(f"compose-{base}" for base in bases)
    for name, text in recipes.describe_recipes().items():
        recipe = load(name)
        check_order(list(recipe.stages))
        assert text
        assert recipe.output_dir == f"runs/{name}"
        for stage in recipe.stages.values():
            assert stage.get("recipe") in (None, *config.recipes())


def test_a_recipe_is_written_and_read_again(tmp_path):
    recipe = load("compose-shapes-flux", ["--stages.quantize.backend=int4", "--floors.fid=3"])
    assert recipe.stages["quantize"]["backend"] == "int4"
    assert recipe.floors["fid"] == 3
    file = tmp_path / "again.yaml"
    file.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    assert load(file) == recipe


def test_a_stage_is_left_out_by_null():
    recipe = load("compose-shapes-flux", ["--stages.dcgen=null", "--stages.qsched=null"])
    assert list(recipe.stages) == ["align", "distill", "quantize", "accelerate"]


def test_files_beside_the_recipe_are_read(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: distill-shapes-flux\n")
    (tmp_path / "p.txt").write_text("a cat\n")
    text = "stages: {distill: {recipe: mine.yaml}}\nmeasure: {prompts: p.txt, rewards: [jpeg]}\n"
    (tmp_path / "a.yaml").write_text(text)
    recipe = load(tmp_path / "a.yaml")
    assert recipe.stages["distill"]["recipe"] == str(tmp_path / "mine.yaml")
    assert recipe.measure.prompts == str(tmp_path / "p.txt")


def test_nested_settings_become_overrides():
    settings = {"model": {"compile": False}, "lora.rank": 8, "rewards": '{"jpeg": 1}', "x": None}
    flags = ["--model.compile=false", "--lora.rank=8", '--rewards={"jpeg": 1}', "--x=null"]
    assert recipes.flags_of(settings) == flags


@pytest.mark.parametrize("first", ORDER)
@pytest.mark.parametrize("second", ORDER)
def test_only_alignment_and_its_neighbours_may_change_places(first, second):
    if first == second:
        return
    forward = ORDER.index(first) < ORDER.index(second)
    free = {first, second} in ({"dcgen", "align"}, {"align", "distill"})
    if forward or free:
        check_order([first, second])
    else:
        with pytest.raises(config.ConfigError, match=f"stages=.*{second} cannot follow {first}"):
            check_order([first, second])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {}", "stages: there is no stage"),
        ("stages: {alignn: {}}", "stages.alignn: there is no such stage; did you mean 'align'"),
        ("stages: {quantize: {bakend: int8}}", "did you mean 'stages.quantize.backend'"),
        ("stages: {quantize: int8}", "stages.quantize: expected a group of settings"),
        ("stage: {}", "did you mean 'stages'"),
        ("stages: {quantize: {}}\nfloors: {psnr: 90}", "floors.psnr: no stage can meet 90"),
        ("stages: {quantize: {}}\nfloors: {fid: 1}", "floors.fid: there is no reference"),
        ("stages: {quantize: {}}\nfloors: {genval: 0}", "did you mean 'geneval'"),
        ("stages: {quantize: {floors: {geneval: 2}}}", "stages.quantize.floors.geneval: is the"),
        ("stages: {quantize: {backend: int9}}", "no quantisation backend is named 'int9'"),
        ("stages: {quantize: {}}\ndtype: int8", "dtype: unknown value 'int8'"),
        ("stages: {distill: {recipe: demo}}", "stages.distill.recipe: demo is a recipe of awm"),
        ("stages: {accelerate: {preset: fastest}}", "there is no such preset"),
        ("stages: {qsched: {engine: none}}", "needs the model before a quantisation"),
        ("stages: {quantize: {}}\nmeasure: {rewards: []}", "measure.rewards: name at least one"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_one_line(tmp_path, text, message):
    file = tmp_path / "a.yaml"
    file.write_text(f"model: shapes-flux\n{text}\n")
    with pytest.raises(UserError, match=message) as caught:
        make_plan(load(file))
    assert "\n" not in str(caught.value)


def test_unknown_recipes_name_the_nearest():
    with pytest.raises(config.ConfigError, match="did you mean 'compose-shapes-flux'"):
        load("compose-shapes-fluks")


def test_a_stage_is_named_by_what_it_was_made_from(world):
    first, again = plan_of(world), plan_of(world)
    assert [s.place for s in first.steps] == [s.place for s in again.steps]
    other = plan_of(world, quantize={"group_size": 32})
    same = [a.place == b.place for a, b in zip(first.steps, other.steps, strict=True)]
    assert same == [True, True, True, False, False, False]
    # settings that change no result change no name, and neither do floors
    free = {"settings": {"training": {"checkpoint_every": 7, "micro_batch_size": 2}}}
    assert plan_of(world, dcgen=free).steps[0].place == first.steps[0].place
    assert plan_of(world, dcgen={"floors": {"psnr": 1}}).steps[0].place == first.steps[0].place
    longer = {"settings": {"training": {"num_updates": 3}}}
    assert plan_of(world, dcgen=longer).steps[0].place != first.steps[0].place


def test_a_stage_is_new_when_its_prompts_change(world):
    first = plan_of(world, "distill")
    prompts = world / "prompts.txt"
    text = prompts.read_text()
    try:
        prompts.write_text(text + "\na photo of a blue square")
        assert plan_of(world, "distill").steps[0].place != first.steps[0].place
    finally:
        prompts.write_text(text)


def test_states_follow_the_stages(world):
    steps = plan_of(world).steps
    assert [s.after.card.num_inference_steps for s in steps] == [6, 6, 2, 2, 2, 2]
    assert [s.after.is_moved for s in steps] == [True] * 6
    assert [s.after.is_quantised for s in steps] == [False] * 3 + [True] * 3
    assert steps[2].stage.run_config.teacher.guidance_scale == 2.0
    assert steps[4].stage.earlier["quantize"].source == steps[2].after.source
    tokens = [s.after.build().image_seq_len((16, 16)) for s in steps[:2]]
    assert tokens == [4, 4]


def test_a_scheduler_that_qsched_does_not_know_is_refused(tmp_path):
    raw = tiny_composition.recipe(tmp_path, "qsched")
    tiny.sana_pipeline().save_pretrained(tmp_path / "sana")
    raw |= {"model": str(tmp_path / "sana"), "drawing": {"num_inference_steps": 4, "batch_size": 2}}
    with pytest.raises(
        UserError, match=r"stages.qsched: .*DPMSolverMultistepScheduler.*consistency"
    ):
        make_plan(recipes.decode_group(Recipe, raw))


def test_unets_are_not_moved(tmp_path):
    raw = tiny_composition.recipe(tmp_path, "dcgen")
    tiny.sd_pipeline().save_pretrained(tmp_path / "sd")
    raw["model"] = str(tmp_path / "sd")
    with pytest.raises(UserError, match="cannot be moved"):
        make_plan(recipes.decode_group(Recipe, raw))


def test_text_of_another_length_is_refused_after_a_move(world):
    length = {"settings": {"model": {"max_sequence_length": 8}}}
    with pytest.raises(UserError, match="max_sequence_length=8: the model was moved with 16"):
        plan_of(world, "dcgen", "align", align=length)


def test_targets_must_exist_after_the_move(world):
    targets = {"settings": {"lora": {"targets": ["=nowhere"]}}}
    with pytest.raises(UserError, match=r"align.settings.lora.targets: no layer .*=nowhere"):
        plan_of(world, "dcgen", "align", align=targets)


def lora_of(model, folder, targets):
    """Save a LoRA on some layers of a model."""
    attach(model.denoiser, rank=2, alpha=2, targets=targets, policies=())
    export_lora(model.denoiser, model.pipeline, folder)
    return str(folder)


@pytest.fixture(scope="module")
def loras(world):
    """LoRAs of the base: in its blocks, in its first layer, and of another base."""

    def base():
        return load_model(str(world / "base"), dtype=torch.float32)

    return {
        "blocks": lora_of(base(), world / "lora-blocks", ["attn.to_q"]),
        "ends": lora_of(base(), world / "lora-ends", ["=x_embedder"]),
        "other": lora_of(tiny.sd3_model(), world / "lora-other", ["attn.to_q"]),
    }


def aligned(world, place, *names):
    """Return the plan of a recipe whose alignment is a LoRA."""
    raw = tiny_composition.recipe(world, *names)
    raw["stages"]["align"] = {"lora": place}
    return make_plan(recipes.decode_group(Recipe, raw))


def test_a_lora_of_before_a_move_is_carried_over_or_refused(world, loras):
    aligned(world, loras["blocks"], "dcgen", "align")
    aligned(world, loras["ends"], "align")
    with pytest.raises(
        UserError, match=r"the move replaced x_embedder and proj_out.*x_embedder has"
    ):
        aligned(world, loras["ends"], "dcgen", "align")


def test_a_lora_of_another_base_is_refused(world, loras, tmp_path):
    with pytest.raises(UserError, match=r"stages.align.lora=.*LoRA of another model"):
        aligned(world, loras["other"], "align")
    run = tmp_path / "run"
    (run / "lora").mkdir(parents=True)
    (run / "config.yaml").write_text(config.dump(config.load("demo")))
    (run / "log.jsonl").write_text("")
    raw = tiny_composition.recipe(world, "align")
    raw |= {"model": "shapes-flux", "dtype": "bfloat16", "drawing": {}}
    raw["stages"]["align"] = {"lora": str(run / "lora")}
    with pytest.raises(UserError, match="was trained on shapes-sd3, and the base is shapes-flux"):
        make_plan(recipes.decode_group(Recipe, raw))


def test_a_lora_and_a_recipe_exclude_each_other(world, loras):
    with pytest.raises(UserError, match="has a LoRA and a recipe"):
        plan_of(world, "align", align={"lora": loras["blocks"]})


def test_a_cache_of_another_codec_is_refused(world, tmp_path):
    (tmp_path / "shard-00000.safetensors").write_bytes(b"")
    codec = move_model(tiny.flux_model(), deep_autoencoder(), size=(16, 16)).codec.to_dict()
    key = {"key": {"codec": codec | {"scale": 7.0}}}
    (tmp_path / "manifest.json").write_text(json.dumps(key))
    cache = {"settings": {"latents": {"cache": str(tmp_path)}}}
    with pytest.raises(UserError, match=r"latents.cache=.*its scale is 7.0"):
        plan_of(world, "dcgen", dcgen=cache)


def test_a_quantised_base_is_not_trained(world, tmp_path):
    config_file = tmp_path / "small" / "transformer" / "config.json"
    tiny_composition.wide_flux().save_pretrained(tmp_path / "small")
    settings = json.loads(config_file.read_text()) | {"quantization_config": {"quant_method": "x"}}
    config_file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="is quantised, and what is trained cannot be merged"):
        plan_of(world, "distill", model=str(tmp_path / "small"))


def test_factors_of_the_base_are_refused(world, tmp_path):
    base = tmp_path / "factors"
    tiny_composition.wide_flux().save_pretrained(base)
    file = base / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"qsched": {"steps": {}}}))
    with pytest.raises(UserError, match=r"model=.*factors of Q-Sched"):
        plan_of(world, "quantize", model=str(base))


def test_layers_too_small_to_pack_are_refused(world, tmp_path):
    tiny.flux_pipeline().save_pretrained(tmp_path / "tiny")
    with pytest.raises(UserError, match="stages.quantize: no layer .* large enough"):
        plan_of(world, "quantize", model=str(tmp_path / "tiny"))


def test_a_full_disk_is_known_before(world, monkeypatch):
    plan = plan_of(world)
    forecast.check_disk(plan)
    monkeypatch.setattr(forecast, "free_disk", lambda folder: 1000)
    with pytest.raises(UserError, match=r"output_dir=.*need .* GiB, and the disk has 0.00 GiB"):
        forecast.check_disk(plan)


def test_the_forecast_counts_the_moved_denoiser(world):
    plan = plan_of(world)
    rows = {row.name: row for row in forecast.forecasts(plan)}
    count = forecast.Operations()
    assert count.of_row(plan.steps[0].after) < count.of_row(plan.base)
    assert rows["base"].measuring == 8 * 6 * count.of_row(plan.base)
    # two updates of six images, each a forward, its backward, and the empty prompt
    assert rows["dcgen"].flops == 2 * 6 * 4 * count.of_row(plan.steps[0].after)
    assert rows["quantize"].disk < rows["distill"].disk
    assert rows["composed folder"].disk == rows["accelerate"].disk


def test_a_dry_run_makes_nothing(world, capsys):
    raw = tiny_composition.recipe(world, "dcgen", "quantize")
    file = tiny_composition.write(world, raw, "dry.yaml")
    assert main(["compose", str(file), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("dcgen", "quantize", "GiB of disk", "TFLOP/s"))
    assert not Path(raw["output_dir"]).exists()


def test_a_folder_of_somebody_else_is_refused(world, tmp_path, capsys):
    (tmp_path / "mine").write_text("important")
    raw = tiny_composition.recipe(world, "quantize") | {"output_dir": str(tmp_path)}
    file = tiny_composition.write(world, raw, "full.yaml")
    assert main(["compose", str(file)]) == 2
    assert "was not created by a composition" in capsys.readouterr().err


def published_autoencoder(name, *, dtype=torch.bfloat16, meta=False):
    """Return a DC-AE of a published layout on the meta device."""
    n = 7 if "f64" in name else 6
    sides = {}
    for side in ("encoder", "decoder"):
        sides[f"{side}_block_types"] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * (n - 3)
        sides[f"{side}_block_out_channels"] = (128, 256, 512, 512, 1024, 1024, 2048)[:n]
        sides[f"{side}_layers_per_block"] = (2,) * n
        sides[f"{side}_qkv_multiscales"] = ((),) * n
    with torch.device("meta"):
        return AutoencoderDC(latent_channels=128 if n == 7 else 32, **sides).to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(recipes.recipes()) - {"compose-shapes-flux"}))
def test_recipes_of_published_models_pass_all_checks(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(moves, "load_autoencoder", published_autoencoder)
    for file in ("prompts.txt", "held_out.txt"):
        Path(file).write_text("\n".join(f"a {file} {i}" for i in range(300)))
    images = tmp_path / "images"
    (tmp_path / "pickapic").mkdir()
    tiny_pairs.write_pairs(tmp_path / "pickapic", n=4)
    tiny_composition.image_folder(images)
    plan = make_plan(load(name))
    rows = forecast.forecasts(plan)
    assert all(row.memory for row in rows[:-1])
    assert plan.steps[-1].after.card.num_inference_steps == 4
