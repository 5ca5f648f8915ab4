"""States that are kept while images are drawn: what an inversion would find, at no forward of its own."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import tiny
import tiny_pairs
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from diffalign import cli
from diffalign.core.errors import UsageError
from diffalign.data.pairs.states import states_path
from diffalign.data.pairs.tables import PairsError
from diffalign.data.prompts import Prompt
from diffalign.diffusion.inversion import integrate
from diffalign.diffusion.paths import chord_target
from diffalign.evaluation import geneval
from diffalign.evaluation.recording import StateKeeper
from diffalign.methods.preference import precompute as module
from diffalign.pipelines.drawing import Drawing

STEPS, STATES, PROMPTS = 6, 3, ("a red square", "a blue ring", "two stars")


def draw(folder, family="sd3", *, states=STATES, **settings):
    """Two images of each prompt with their states, and the table that makes pairs of them."""
    model = tiny_pairs.FAMILIES[family]()
    drawing = Drawing(
        STEPS, images_per_prompt=2, micro_batch_size=4, mixed_precision="no", **settings
    )
    prompts = [Prompt(text, {"prompt": text}) for text in PROMPTS]
    geneval.write_prompts(folder, prompts)
    keeper = StateKeeper(model, drawing, states)
    geneval.generate_samples(model, prompts, folder, drawing, keeper=keeper)
    rows = [
        {
            "prompt": text,
            "image_0": f"{i:05d}/samples/0001.png",
            "image_1": f"{i:05d}/samples/0000.png",
            "label": 1.0,
        }
        for i, text in enumerate(PROMPTS)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(source, folder, *, guidance_scale=None, min_noise=0.05, solver="recorded", **pairs):
    inversion = {"steps": pairs.pop("steps", STEPS), "states": pairs.pop("states", STATES)}
    inversion |= {"guidance_scale": guidance_scale, "min_noise": min_noise, "solver": solver}
    return tiny_pairs.settings(source, folder, pairs={"inversion": inversion, **pairs})


def fill(source, folder, family="sd3", seed=0, **changes):
    """A cache, and how many rows the denoiser was asked for while it was made."""
    model, rows = tiny_pairs.FAMILIES[family](seed), []
    model.denoiser.register_forward_hook(lambda module, args, out: rows.append(len(out[0])))
    cache = module.precompute(settings(source, folder, **changes), model, Accelerator(cpu=True))
    return cache, sum(rows)


class TestTheSamplersOwnWay:
    @pytest.mark.parametrize("family", ["sd3", "flux", "sd", "sdxl"])
    def test_the_stock_scheduler_goes_on_from_a_state_to_the_image(self, family, tmp_path):
        """Euler on the ODE is what DDIM and the Euler schedulers do."""
        model = tiny_pairs.FAMILIES[family]()
        cache, _ = fill(draw(tmp_path / "pairs", family), tmp_path, family)
        batch, grid = cache.batch(range(3)), module.grid_of(settings("", tmp_path), model)
        # EulerDiscrete ends at a sigma of 0, where timestep 0 still has a little noise
        close = {"rtol": 0, "atol": 0.05 if family == "sdxl" else 1e-4}
        for i, text in enumerate(PROMPTS):
            embeds = model.encode_prompt([text] * 2)
            with torch.no_grad():
                field = partial(model.predict, embeds=embeds)
                for k, place in enumerate(batch.grid_index[i].tolist()):
                    down = grid[: place + 1].flip(0)
                    end = integrate(field, batch.states[i, :, k], down, model.noise)[-1]
                    torch.testing.assert_close(end, batch.latents[i], **close)

    @pytest.mark.parametrize("family", tiny_pairs.FAMILIES)
    def test_the_error_is_the_models_and_costs_no_forward(self, family, tmp_path):
        model = tiny_pairs.FAMILIES[family]()
        cache, rows = fill(draw(tmp_path / "pairs", family), tmp_path, family)
        assert rows == 0
        check_errors(cache, model, settings("", tmp_path))

    @pytest.mark.parametrize("family", ["sd3", "sd"])
    def test_guided_images_have_states_and_the_error_is_asked_for(self, family, tmp_path):
        model = tiny_pairs.FAMILIES[family]()
        source = draw(tmp_path / "pairs", family, guidance_scale=4.0)
        cache, rows = fill(source, tmp_path, family)
        assert rows == len(PROMPTS) * 2 * STATES
        check_errors(cache, model, settings("", tmp_path))

    def test_an_embedded_guidance_of_another_value_is_asked_for(self, tmp_path):
        source = draw(tmp_path / "pairs", "flux", guidance_scale=3.5)
        assert fill(source, tmp_path / "a", "flux", guidance_scale=3.5)[1] == 0
        assert fill(source, tmp_path / "b", "flux", guidance_scale=1.0)[1] > 0

    def test_the_better_image_comes_first(self, tmp_path):
        source = draw(tmp_path / "pairs")
        before, _ = fill(source, tmp_path / "a")
        table = source / "pairs.jsonl"
        table.write_text(table.read_text().replace('"label": 1.0', '"label": 0.00'))
        after, _ = fill(source, tmp_path / "b")
        for name in ("latents", "states", "reference_error"):
            there, here = (getattr(c.batch(range(3)), name) for c in (before, after))
            torch.testing.assert_close(there.flip(1), here, rtol=0, atol=0)

    def test_fewer_states_than_were_recorded(self, tmp_path):
        cache, _ = fill(draw(tmp_path / "pairs", states=4), tmp_path, states=2)
        batch = cache.batch(range(3))
        assert batch.states.shape[2] == 2
        check_errors(cache, tiny.sd3_model(), settings("", tmp_path, states=2))


class TestWithoutASolver:
    def test_states_that_are_there_are_read(self, tmp_path):
        source = draw(tmp_path / "pairs")
        named, _ = fill(source, tmp_path / "a")
        cache, rows = fill(source, tmp_path / "b", solver=None)
        assert rows == 0
        assert cache.manifest["key"] == named.manifest["key"]

    @pytest.mark.parametrize(
        "why", ["no states of them were recorded", "other weights", "random_flip"]
    )
    def test_other_images_are_inverted_with_a_notice(self, why, tmp_path, caplog):
        source = draw(tmp_path / "pairs")
        changes = {"random_flip": True} if why == "random_flip" else {}
        if why.startswith("no"):
            for file in source.rglob("*.safetensors"):
                file.unlink()
        seed = 1 if why == "other weights" else 0
        cache, rows = fill(source, tmp_path / "b", seed=seed, solver=None, **changes)
        assert rows > 0
        assert cache.manifest["key"]["pairs"]["inversion"]["solver"] == "fireflow"
        assert "images are inverted with fireflow" in caplog.text
        assert why in caplog.text


def check_errors(cache, model, config):
    """Of the cache, against predictions for the states that it holds."""
    batch, grid = cache.batch(range(3)), module.grid_of(config, model)
    for i, text in enumerate(PROMPTS):
        embeds = model.encode_prompt([text] * 2)
        if batch.time_ids is not None:
            embeds = replace(embeds, time_ids=batch.time_ids[i])
        for k in range(config.states):
            state = batch.states[i, :, k]
            times = grid[batch.grid_index[i, k]].expand(2)
            target = chord_target(model.noise, batch.latents[i], state, times)
            with torch.no_grad():
                miss = model.predict(state, times, embeds) - target
            error = miss.square().flatten(1).mean(1)
            torch.testing.assert_close(batch.reference_error[i, :, k], error, rtol=1e-3, atol=1e-6)
    # where all lead to what the model says, nothing could be learned
    assert batch.reference_error.min() > 1e-3 * batch.reference_error.max()


class TestRefused:
    @pytest.fixture
    def source(self, tmp_path):
        return draw(tmp_path / "pairs")

    def test_states_of_other_weights(self, source, tmp_path):
        with pytest.raises(PairsError, match="other weights"):
            fill(source, tmp_path, seed=1)

    def test_another_grid(self, source, tmp_path):
        with pytest.raises(PairsError, match=r"inversion\.steps=7.*num_inference_steps"):
            fill(source, tmp_path, steps=7)

    def test_more_states_than_there_are(self, source, tmp_path):
        with pytest.raises(PairsError, match=r"3 states .*recorded.*states \(5\)"):
            fill(source, tmp_path, states=5)

    def test_too_little_noise(self, source, tmp_path):
        with pytest.raises(
            PairsError, match=r"[12] states with at least pairs\.inversion\.min_noise"
        ):
            fill(source, tmp_path, min_noise=0.8)

    def test_flips(self, source, tmp_path):
        with pytest.raises(UsageError, match="random_flip"):
            fill(source, tmp_path, random_flip=True)

    def test_images_without_states(self, source, tmp_path):
        states_path(source / "00001" / "samples" / "0000.png").unlink()
        with pytest.raises(PairsError, match=r"no states of .*00001.*record_states"):
            fill(source, tmp_path)

    def test_a_damaged_file(self, source, tmp_path):
        states_path(source / "00001" / "samples" / "0000.png").write_bytes(b"nothing")
        with pytest.raises(PairsError, match="damaged"):
            fill(source, tmp_path)

    def test_too_many_to_keep(self, tmp_path):
        with pytest.raises(UsageError, match=r"record_states: must lie in 1\.\.4"):
            draw(tmp_path / "pairs", states=7)


class TestTheCommand:
    FLAGS = ("--max_prompts=3", "--images_per_prompt=2", "--num_inference_steps=4")

    def pairs(self, folder, *flags):
        arguments = ["pairs", "--rewards=jpeg", f"--output_dir={folder}", *self.FLAGS, *flags]
        return cli.main([*arguments, "--model=shapes-sd3"])

    def test_states_stand_beside_images_and_are_trained_on(self, tmp_path, capsys):
        assert self.pairs(tmp_path, "--record_states=2") == 0
        images = sorted(tmp_path.rglob("*.png"))
        assert len(images) == 6
        assert all(states_path(image).is_file() for image in images)
        before = {image: image.stat().st_mtime_ns for image in images}
        assert self.pairs(tmp_path, "--record_states=2") == 0  # nothing is drawn twice
        assert {image: image.stat().st_mtime_ns for image in images} == before
        flags = ["--pairs.inversion.solver=recorded", "--pairs.inversion.steps=4"]
        flags += [
            "--pairs.inversion.states=2",
            f"--pairs.source={tmp_path}",
            "--pairs.validation=0",
        ]
        flags += [f"--output_dir={tmp_path / 'run'}"]
        assert cli.main(["precompute", "inversion-dpo-shapes", *flags]) == 0
        manifest = json.loads((tmp_path / "run-cache" / "manifest.json").read_text())
        assert manifest["skipped"] == {}
        assert manifest["round_trip_error"] is None
        flags += ["--training.num_updates=1", "--training.pairs_per_update=3"]
        flags += ["--evaluation.images_per_task=1", "--evaluation.num_inference_steps=1"]
        assert cli.main(["train", "inversion-dpo-shapes", *flags]) == 0
        row = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
        # at the reference: the loss of a coin, but for what another batch does to rounding in bfloat16
        assert row["loss"] == pytest.approx(math.log(2), abs=0.02)
        assert row["grad_norm"] > 0

    def test_a_folder_with_another_number_is_refused_either_way(self, tmp_path, capsys):
        assert self.pairs(tmp_path / "without") == 0
        assert self.pairs(tmp_path / "without", "--record_states=2") == 2
        assert "another way (record_states: None there)" in capsys.readouterr().err
        assert self.pairs(tmp_path / "with", "--record_states=2") == 0
        assert self.pairs(tmp_path / "with") == 2
        assert "another way (record_states: 2 there)" in capsys.readouterr().err

    def test_a_number_that_cannot_be_kept_leaves_no_trace(self, tmp_path, capsys):
        # the parser knows the least number, the model the greatest
        for count, reason in ((0, "must be at least 1"), (20, "must lie in")):
            assert self.pairs(tmp_path, f"--record_states={count}") == 2
            error = capsys.readouterr().err
            assert "--record_states" in error
            assert reason in error
        assert not list(tmp_path.iterdir())

    def test_lost_states_are_drawn_again(self, tmp_path, capsys):
        assert self.pairs(tmp_path, "--record_states=2") == 0
        lost = states_path(tmp_path / "00001" / "samples" / "0001.png")
        there = lost.read_bytes()
        lost.unlink()
        assert self.pairs(tmp_path, "--record_states=2") == 0
        assert lost.stat().st_size == len(there)

    def test_not_of_another_model_than_is_trained(self, tmp_path, capsys):
        lora = tmp_path / "pytorch_lora_weights.safetensors"
        save_file({"transformer.a.lora_A.weight": torch.zeros(1, 1)}, lora)
        assert self.pairs(tmp_path / "pairs", "--record_states=2", f"--lora={lora}") == 2
        assert "--record_states" in capsys.readouterr().err
