"""A signal in every loop that is resumed: what is in hand is kept, and the same call goes on from there."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from test_tuning import PROMPTS, brightness, drawing
from tiny import flux_model, sd3_model

from diffalign.core.interruption import Interrupted
from diffalign.core.locks import LockError, hold
from diffalign.data import fill
from diffalign.data.prompts import Prompt
from diffalign.data.shard_cache import ShardCache
from diffalign.evaluation.fill import fill_folder
from diffalign.evaluation.geneval import GenEvalError
from diffalign.tuning.tune import Settings, tune

pytestmark = pytest.mark.usefixtures("signals")


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


class Cache(ShardCache):
    rows, setting = "pairs", "pairs.cache"


def test_filling_a_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(fill, "SHARD_ITEMS", 2)
    made = []

    def make(shard):
        made.append(shard.number)
        if made == [0, 1]:
            terminate()
        facts = {"stop": shard.stop, "items": len(shard.items), "skipped": {}}
        facts["pairs"] = [{"prompt": str(item.row)} for item in shard.items]
        return {"x": torch.zeros(len(shard.items))}, facts

    def run():
        return fill.fill(
            Cache(tmp_path / "cache"),
            Accelerator(cpu=True),
            key={"source": "a"},
            items=lambda row: [SimpleNamespace(row=i) for i in range(row, 10)],
            limit=None,
            make=lambda: make,
            nothing=ValueError,
        )

    with pytest.raises(
        Interrupted, match=r"stopped with 4 pairs in .*cache; the same command goes"
    ):
        run()
    assert run().complete
    assert made == [0, 1, 2, 3, 4]
    with hold(tmp_path / "cache"):
        assert run().complete  # which is read beside others


def test_filling_a_folder_of_images(tmp_path):
    prompts = [Prompt(t, {"prompt": t}) for t in ("a cat", "a dog", "a bird")]
    drawn = []

    def load():
        model = sd3_model()
        decode = model.decode_checked

        def watched(latents):
            drawn.append(len(latents))
            if len(drawn) == 2:
                terminate()
            return decode(latents)

        model.decode_checked = watched
        return model

    def run(**made):
        settings = drawing(
            num_inference_steps=1, images_per_prompt=2, micro_batch_size=2, size=(32, 32)
        )
        fill_folder(tmp_path / "images", prompts, load, settings, made=made)

    with pytest.raises(Interrupted, match="4 of 6 images are in .*images; the same command draws"):
        run(model="a")
    assert len(list((tmp_path / "images").glob("*/samples/*.png"))) == 4
    with pytest.raises(GenEvalError, match="in another way"):
        run(model="b")
    run(model="a")
    assert drawn == [2, 2, 2]
    for file in (tmp_path / "images").glob("*/samples/*.png"):
        file.unlink()
    run(model="b")  # a folder without an image belongs to nobody


def test_searching_a_schedule(tmp_path):
    file = tmp_path / "work" / "scores.jsonl"
    seen = []

    def score(images, prompts, metadata):
        seen.append(len(prompts))
        if len(seen) == 3:
            terminate()
        return brightness(images, prompts, metadata)

    def run():
        settings = Settings({"spread": 1.0}, engine="coordinate", budget=9)
        each = drawing(micro_batch_size=3)  # half of the prompts
        return tune(flux_model(), PROMPTS, score, settings, each, file=file)

    with pytest.raises(
        Interrupted, match=r"[123] candidates are scored in .*scores\.jsonl; the same"
    ):
        run()
    lines = file.read_text().count("\n")
    run()
    assert file.read_text().count("\n") > lines
    assert sorted(p.name for p in file.parent.iterdir()) == ["scores.jsonl"]


def test_a_search_in_a_folder_that_is_in_use_is_refused(tmp_path, monkeypatch):
    settings = Settings({"spread": 1.0})

    def refuse(*args, **options):
        raise LockError("in use")

    monkeypatch.setattr("diffalign.tuning.tune.locks.hold", refuse)
    with pytest.raises(LockError):
        tune(flux_model(), PROMPTS, brightness, settings, drawing(), file=tmp_path / "scores.jsonl")
