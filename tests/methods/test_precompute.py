"""The pass over preference pairs: what it keeps, what it refuses, and that it goes on where it stopped."""

import errno
import json
from functools import partial

import numpy as np
import pytest
import tiny
import tiny_pairs
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open

from diffalign.core.errors import UsageError
from diffalign.core.fingerprint import of_pipeline
from diffalign.data import fill as filling
from diffalign.data import shard_cache
from diffalign.data.fill import shards
from diffalign.data.pairs.cache import PairCache
from diffalign.data.pairs.records import Skipped
from diffalign.data.pairs.tables import PairsError
from diffalign.data.shard_cache import CacheError
from diffalign.diffusion.inversion import integrate
from diffalign.diffusion.paths import implied_noise
from diffalign.methods.preference import precompute as module
from diffalign.methods.preference.maker import PairMaker
from diffalign.methods.preference.precompute import precompute


@pytest.fixture
def source(tmp_path):
    return tiny_pairs.write_pairs(tmp_path / "pairs")


def fill(source, folder, family="sd3", seed=0, **groups):
    config = tiny_pairs.settings(source, folder, **groups)
    return precompute(config, tiny_pairs.FAMILIES[family](seed), Accelerator(cpu=True))


def tensors(cache):
    found = {}
    for file in sorted(cache.folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            found |= {(file.name, k): shard.get_tensor(k) for k in shard.keys()}  # noqa: SIM118
    return found


def equal(a, b, **kwargs):
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], **(kwargs or {"rtol": 0, "atol": 0}))


class TestShards:
    def items(self, rows):
        return [Skipped(row, "", "") for row in rows]

    def test_a_shard_ends_where_a_row_ends(self):
        found = list(shards(self.items([0, 0, 0, 1, 1, 2, 5]), size=2))
        assert [[i.row for i in s.items] for s in found] == [[0, 0, 0], [1, 1], [2, 5]]
        assert [(s.number, s.stop) for s in found] == [(0, 1), (1, 2), (2, 6)]

    def test_going_on_gives_the_same_shards(self):
        items = self.items([0, 0, 1, 2, 2, 2, 3, 4, 4, 5])
        every = list(shards(items, size=3))
        for k in range(1, len(every)):
            rest = [i for i in items if i.row >= every[k - 1].stop]
            assert list(shards(rest, first=k, size=3)) == every[k:]

    def test_the_limit_counts_items(self):
        assert sum(len(s.items) for s in shards(self.items(range(9)), size=2, limit=5)) == 5


class TestContents:
    @pytest.mark.parametrize("family", list(tiny_pairs.FAMILIES))
    def test_states_errors_and_embeddings_are_the_reference_s(self, family, source, tmp_path):
        """Recomputed here from the images, one pair at a time."""
        model = tiny_pairs.FAMILIES[family]()
        height, width = model.default_size
        tiny_pairs.write_pairs(source, size=height)
        cache = fill(source, tmp_path, family)
        batch = cache.batch(range(12))
        path = model.noise
        grid = module.grid_of(tiny_pairs.settings(source, tmp_path), model)
        solver = "fireflow" if family in tiny.MODELS else "midpoint"
        for i in (0, 7):
            prompt = cache.index["prompt"][i]
            embeds = model.encode_prompt([prompt] * 2)
            kept = batch.embeds[i : i + 1]
            torch.testing.assert_close(kept.prompt_embeds, embeds[:1].prompt_embeds)
            mask = embeds[:1].prompt_attention_mask
            assert (kept.prompt_attention_mask is None) == (mask is None)
            if mask is not None:
                torch.testing.assert_close(kept.prompt_attention_mask, mask)
            pictures = [Image.open(source / f"{i}-{k}.png") for k in range(2)]
            pixels = torch.stack(
                [torch.tensor(list(p.getdata())).view(height, width, 3) for p in pictures]
            )
            latents = model.encode(pixels.permute(0, 3, 1, 2).to(torch.uint8))
            torch.testing.assert_close(batch.latents[i], latents, rtol=1e-4, atol=1e-5)
            with torch.no_grad():
                field = partial(model.predict, embeds=embeds)
                states = integrate(field, latents, grid, path, solver=solver)
                for k, place in enumerate(batch.grid_index[i].tolist()):
                    state, times = states[place], grid[place].expand(2)
                    torch.testing.assert_close(batch.states[i, :, k], state, rtol=1e-3, atol=1e-4)
                    noise = implied_noise(path, latents, state, times)
                    torch.testing.assert_close(
                        path.add_noise(latents, noise, times), state, rtol=1e-5, atol=1e-5
                    )
                    miss = model.predict(state, times, embeds) - path.target(latents, noise, times)
                    error = miss.square().flatten(1).mean(1)
                    torch.testing.assert_close(
                        batch.reference_error[i, :, k], error, rtol=1e-2, atol=1e-6
                    )

    @pytest.mark.parametrize("guidance_scale", [None, 3.0])
    @pytest.mark.parametrize(
        ("solver", "evaluations", "known"),
        [
            ("euler", 6, True),
            ("midpoint", 12, True),
            ("fixed_point", 30, True),
            ("fireflow", 7, False),
        ],
    )
    def test_what_the_inversion_saw_is_not_asked_for_again(
        self, solver, evaluations, known, guidance_scale, source, tmp_path, monkeypatch
    ):
        """Rows of the denoiser's forwards are counted; errors are those of predictions at the states that are kept."""
        monkeypatch.setattr(PairMaker, "_round_trip", lambda *_: 0.0)
        model, rows = tiny_pairs.FAMILIES["sd3"](), []
        model.denoiser.register_forward_hook(
            lambda module, args, kwargs, out: rows.append(len(out[0])), with_kwargs=True
        )
        inversion = {"solver": solver, "guidance_scale": guidance_scale}
        groups = {
            "pairs": {"dtype": "bfloat16", "inversion": {"steps": 6, "states": 3} | inversion}
        }
        config = tiny_pairs.settings(source, tmp_path, **groups)
        cache = module.precompute(config, model, Accelerator())
        batch = cache.batch(range(12))
        known = known and guidance_scale is None
        asked = (batch.grid_index == 6).sum() if known else batch.grid_index.numel()
        guided = 1 if guidance_scale is None else 2
        assert sum(rows) == 2 * (12 * evaluations * guided + int(asked))
        grid, path = module.grid_of(config, model), model.noise
        states = batch.states.flatten(0, 2)
        times = grid[batch.grid_index].unsqueeze(1).expand(-1, 2, -1).flatten()
        latents = batch.latents.unsqueeze(2).expand(-1, -1, 3, -1, -1, -1).flatten(0, 2).float()
        embeds = model.encode_prompt(list(np.repeat(cache.index["prompt"][:12], 6)))
        target = path.target(latents, implied_noise(path, latents, states.float(), times), times)
        with torch.no_grad():
            miss = model.predict(states.float(), times, embeds) - target
        error = miss.square().flatten(1).mean(1).view(12, 2, 3)
        torch.testing.assert_close(batch.reference_error, error, rtol=1e-4, atol=1e-6)

    def test_neither_micro_batches_nor_shards_matter(self, source, tmp_path, monkeypatch):
        caches = []
        for name, size, shard in (("a", 8, 128), ("b", 2, 128), ("c", 8, 5)):
            monkeypatch.setattr(filling, "SHARD_ITEMS", shard)
            caches.append(fill(source, tmp_path / name, pairs={"micro_batch_size": size}))
        first = caches[0].batch(range(12))
        for cache in caches[1:]:
            other = cache.batch(range(12))
            assert torch.equal(first.grid_index, other.grid_index)
            torch.testing.assert_close(first.states, other.states, rtol=1e-3, atol=1e-4)
        assert caches[2].manifest["shards"] == 3

    def test_the_preferred_image_comes_first(self, tmp_path):
        source = tiny_pairs.write_pairs(tmp_path / "pairs", 3, row_1={"label": 0.2})
        batch = fill(source, tmp_path).batch(range(3))
        assert batch.preference.tolist() == pytest.approx([1.0, 0.8, 1.0])
        plain = fill(tiny_pairs.write_pairs(tmp_path / "p", 3), tmp_path / "other").batch(range(3))
        assert torch.equal(batch.latents[1], plain.latents[1].flip(0))
        assert torch.equal(batch.latents[0], plain.latents[0])

    def test_both_images_share_flip_and_crop(self, tmp_path):
        source = tiny_pairs.write_pairs(tmp_path / "pairs", 12, size=24)
        for i in range(12):  # twice the same picture but for one channel
            first = Image.open(source / f"{i}-0.png")
            red, green, blue = first.split()
            Image.merge("RGB", (red, green, blue.point(lambda v: 255 - v))).save(
                source / f"{i}-1.png"
            )
        config = tiny_pairs.settings(
            source, tmp_path, pairs={"random_flip": True, "center_crop": False}
        )
        model = tiny.sdxl_model()
        maker = module.PairMaker(config, model, module.grid_of(config, model))
        found = [maker._ready(pair) for pair in module.read_pairs(config.pairs)]
        corners = set()
        for ready in found:
            pixels, times = ready.pixels, ready.time_ids
            assert pixels.shape == (2, 3, 16, 16)
            assert (pixels[0, :2].int() - pixels[1, :2].int()).abs().max() <= 1
            assert torch.equal(times[0], times[1])
            assert times[0, :2].tolist() == [24, 24]
            corners.add(tuple(times[0, 2:4].tolist()))
        assert corners == {(0.0, 0.0)}  # covered by shrinking: a square has nothing to crop

    def test_sdxl_is_told_the_original_size(self, tmp_path):
        source = tiny_pairs.write_pairs(tmp_path / "pairs", 2)
        Image.new("RGB", (40, 20), "red").save(source / "0-0.png")
        batch = fill(source, tmp_path, "sdxl").batch(range(2))
        assert batch.time_ids[0].tolist() == [[20, 40, 0, 8, 16, 16], [16, 16, 0, 0, 16, 16]]

    def test_bfloat16_halves_the_states(self, source, tmp_path):
        cache = fill(source, tmp_path, pairs={"dtype": "bfloat16"})
        kinds = {k[1]: v.dtype for k, v in tensors(cache).items()}
        assert kinds["states"] == kinds["latents"] == torch.bfloat16
        assert kinds["reference_error"] == torch.float32
        assert cache.batch([0]).states.dtype == torch.float32

    def test_the_manifest_says_how_exact_the_inversion_is(self, source, tmp_path):
        errors = [
            fill(source, tmp_path / str(n), pairs={"inversion": {"steps": n, "states": 1}}).manifest
            for n in (4, 16)
        ]
        assert errors[1]["round_trip_error"] < 0.5 * errors[0]["round_trip_error"]
        assert errors[0]["seconds"] > 0


class TestRefusals:
    @pytest.mark.parametrize(
        ("groups", "seed", "what"),
        [
            ({}, 1, "model"),
            ({"pairs": {"inversion": {"steps": 8, "states": 3}}}, 0, "pairs.inversion.steps: 6, 8"),
            (
                {"pairs": {"inversion": {"steps": 6, "states": 2}}},
                0,
                "pairs.inversion.states: 3, 2",
            ),
            ({"pairs": {"dtype": "bfloat16"}}, 0, "pairs.dtype"),
            ({"pairs": {"ties": "soft"}}, 0, "pairs.ties"),
            ({"pairs": {"limit": 5}}, 0, "pairs.limit"),
            ({"pairs": {"seed": 5}}, 0, "pairs.seed"),
            ({"images": {"height": 32}}, 0, "size.*16.*32"),
        ],
    )
    def test_a_stale_cache(self, source, tmp_path, groups, seed, what):
        fill(source, tmp_path)
        before = sorted(p.name for p in (tmp_path / "run-cache").iterdir())
        with pytest.raises(CacheError, match=what):
            fill(source, tmp_path, seed=seed, **groups)
        assert sorted(p.name for p in (tmp_path / "run-cache").iterdir()) == before

    def test_changed_files(self, source, tmp_path):
        fill(source, tmp_path)
        with (source / "pairs.jsonl").open("a") as file:
            file.write((source / "pairs.jsonl").read_text().splitlines()[0] + "\n")
        with pytest.raises(CacheError, match="files.*pairs.jsonl"):
            fill(source, tmp_path)

    def test_what_may_change(self, source, tmp_path):
        first = fill(source, tmp_path)
        moved = source.rename(tmp_path / "moved")
        again = fill(
            moved,
            tmp_path,
            pairs={"validation": 0.5, "micro_batch_size": 2},
            training={"seed": 7},
        )
        assert again.manifest == first.manifest

    def test_a_folder_of_others(self, source, tmp_path):
        (tmp_path / "run-cache").mkdir()
        (tmp_path / "run-cache" / "thesis.tex").write_text("")
        with pytest.raises(CacheError, match="was not created by diffalign"):
            fill(source, tmp_path)

    def test_adapters_are_no_other_model(self):
        from diffalign import lora

        model = tiny.sd_model()
        plain = of_pipeline(model.pipeline)
        lora.attach(model.denoiser, rank=2, alpha=2, targets=model.lora_targets)
        assert of_pipeline(model.pipeline) == plain
        with torch.no_grad():
            next(model.pipeline.vae.parameters()).view(-1)[0] += 1
        assert of_pipeline(model.pipeline) != plain

    def test_too_many_states(self, source, tmp_path):
        with pytest.raises(UsageError, match="7 of 5 states"):
            fill(source, tmp_path, pairs={"inversion": {"steps": 6, "states": 7}})

    def test_fireflow_on_a_u_net(self, source, tmp_path):
        with pytest.raises(UsageError, match="fireflow is for rectified flows"):
            fill(source, tmp_path, "sd", pairs={"inversion": {"solver": "fireflow"}})


class TestSkips:
    def test_each_reason_is_counted(self, tmp_path, caplog):
        source = tiny_pairs.write_pairs(
            tmp_path / "pairs",
            10,
            row_1={"label": 0.5},
            row_2={"label": 7},
            row_3={"prompt": ""},
            row_4={"image_1": "4-0.png"},
            row_5={"image_0": "nowhere.png"},
        )
        (source / "6-1.png").write_bytes((source / "6-1.png").read_bytes()[:60])
        (source / "7-0.png").write_bytes(b"")
        with caplog.at_level("WARNING"):
            cache = fill(source, tmp_path)
        assert cache.manifest["skipped"] == {
            "tie": 1,
            "label not within 0..1": 1,
            "no prompt": 1,
            "identical images": 1,
            "unreadable image": 3,
        }
        assert cache.manifest["pairs"] == 3
        assert "row 4 is left out: identical images" in caplog.text

    @pytest.mark.parametrize(("ties", "labels"), [("soft", {0.5}), ("random", {1.0})])
    def test_ties(self, tmp_path, ties, labels):
        source = tiny_pairs.write_pairs(
            tmp_path / "pairs", 12, **{f"row_{i}": {"label": 0.5} for i in range(12)}
        )
        cache = fill(source, tmp_path, pairs={"ties": ties})
        assert set(cache.batch(range(12)).preference.tolist()) == labels
        if ties == "random":
            plain = fill(source, tmp_path / "soft", pairs={"ties": "soft"}).batch(range(12))
            swapped = [
                not torch.equal(a, b)
                for a, b in zip(cache.batch(range(12)).latents, plain.latents, strict=True)
            ]
            assert 1 < sum(swapped) < 11

    def test_nothing_left(self, tmp_path):
        source = tiny_pairs.write_pairs(tmp_path / "pairs", 1, row_0={"label": 0.5})
        with pytest.raises(PairsError, match="no pair can be used .tie: 1."):
            fill(source, tmp_path)

    def test_an_alpha_channel_and_grey_are_read(self, tmp_path):
        source = tiny_pairs.write_pairs(tmp_path / "pairs", 2)
        Image.new("RGBA", (16, 16), (255, 0, 0, 99)).save(source / "0-0.png")
        Image.new("L", (16, 16), 77).save(source / "1-1.png")
        assert fill(source, tmp_path).manifest["pairs"] == 2


class TestGoingOn:
    def test_after_an_interruption(self, tmp_path, monkeypatch):
        """Prompts of the first shard return in the others."""
        tiny.make_embeddings_depend_on_their_batch(monkeypatch)
        again = {f"row_{i}": {"prompt": f"a red square {i % 7}"} for i in range(12)}
        source = tiny_pairs.write_pairs(tmp_path / "pairs", 12, **again)
        monkeypatch.setattr(filling, "SHARD_ITEMS", 5)
        whole = fill(source, tmp_path / "whole")
        make = module.PairMaker.make

        def interrupted(self, shard):
            if shard.number == 1:
                raise KeyboardInterrupt
            return make(self, shard)

        monkeypatch.setattr(module.PairMaker, "make", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fill(source, tmp_path)
        with pytest.raises(CacheError, match="goes on where it stopped"):
            PairCache(tmp_path / "run-cache").split(0.0)
        made = []
        monkeypatch.setattr(
            module.PairMaker,
            "make",
            lambda self, shard: made.append(shard.number) or make(self, shard),
        )
        cache = fill(source, tmp_path)
        assert made == [1, 2]
        equal(tensors(cache), tensors(whole))
        assert cache.index == whole.index

    def test_after_a_full_disk(self, source, tmp_path, monkeypatch):
        monkeypatch.setattr(filling, "SHARD_ITEMS", 5)
        save = shard_cache.save_file

        def full(state, file, **kwargs):
            if "00001" in str(file):
                file.write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
            save(state, file, **kwargs)

        monkeypatch.setattr(shard_cache, "save_file", full)
        with pytest.raises(CacheError, match="No space left.*shards before it are kept"):
            fill(source, tmp_path)
        names = sorted(p.name for p in (tmp_path / "run-cache").iterdir())
        assert names == ["manifest.json", "shard-00000.safetensors"]
        monkeypatch.setattr(shard_cache, "save_file", save)
        assert fill(source, tmp_path).manifest["pairs"] == 12

    def test_a_damaged_shard_is_named(self, source, tmp_path, monkeypatch):
        monkeypatch.setattr(filling, "SHARD_ITEMS", 5)
        cache = fill(source, tmp_path)
        manifest = json.loads((cache.folder / "manifest.json").read_text())
        (cache.folder / "manifest.json").write_text(json.dumps({"key": manifest["key"]}))
        path = cache.shard(1)
        path.write_bytes(path.read_bytes()[:50])
        with pytest.raises(CacheError, match="shard-00001.* is damaged"):
            fill(source, tmp_path)
        path.unlink()
        assert fill(source, tmp_path).manifest == {**manifest, "seconds": pytest.approx(0, abs=1e3)}

    def test_a_finished_cache_is_left_alone(self, source, tmp_path, monkeypatch):
        fill(source, tmp_path)
        monkeypatch.setattr(module, "PairMaker", None)
        fill(source, tmp_path)

    def test_the_limit_holds_over_interruptions(self, source, tmp_path, monkeypatch):
        monkeypatch.setattr(filling, "SHARD_ITEMS", 3)
        cache = fill(source, tmp_path, pairs={"limit": 7})
        assert cache.manifest["pairs"] == 7
        manifest = cache.manifest
        (cache.folder / "manifest.json").write_text(json.dumps({"key": manifest["key"]}))
        cache.shard(2).unlink()
        assert fill(source, tmp_path, pairs={"limit": 7}).manifest["pairs"] == 7
