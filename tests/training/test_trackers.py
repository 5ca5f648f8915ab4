"""What experiment trackers get of a run: numbers, configuration, pictures."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from whole_runs import train

from diffalign.evaluation.pictures import image_grid
from diffalign.training import trackers

events_of = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_trackers_get_the_log_the_configuration_and_the_samples(base, prompts, tmp_path):
    folder = tmp_path / "run"
    more = ["--training.num_updates=2", "--training.eval_every=1", "--report_to=tensorboard"]
    assert train(base, prompts, folder, *more) == 0
    events = events_of.EventAccumulator(str(folder / "diffalign"), size_guidance={"images": 0})
    events.Reload()
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = events.Scalars("reward")
    assert [e.step for e in found] == [1, 2]
    assert [e.value for e in found] == pytest.approx([r["reward"] for r in log])
    held_out = events.Scalars("evaluation/jpeg")
    assert [e.step for e in held_out] == [1]
    assert held_out[0].value == pytest.approx(log[0]["evaluation"]["means"]["jpeg"])
    assert {e.step for e in events.Images("samples")} == {1, 2}
    written = "".join(p.read_text() for p in folder.rglob("hparams.yml"))
    assert "optimizer.learning_rate: 0.001" in written


def test_trackio_gets_the_samples_as_one_grid(monkeypatch):
    """trackio itself is not needed: accelerate's tracker of it takes no images but logs what it is given."""
    logged = []
    tracker = SimpleNamespace(
        name="trackio", log=lambda values, step: logged.append((values, step))
    )
    accelerator = SimpleNamespace(is_main_process=True, trackers=[tracker])
    monkeypatch.setitem(
        sys.modules, "trackio", SimpleNamespace(Image=lambda value: ("image", value))
    )
    images = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8)
    grid = image_grid(images, columns=6)
    trackers.log_images(accelerator, images, grid=grid, update=5)
    ((values, step),) = logged
    assert (list(values), step) == (["samples"], 5)
    kind, logged_grid = values["samples"]
    assert kind == "image"
    assert np.array_equal(np.asarray(logged_grid), np.asarray(image_grid(images, columns=6)))


def test_trackio_keeps_the_log_and_the_samples(base, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    folder = tmp_path / "run"
    assert train(base, prompts, folder, "--training.num_updates=2", "--report_to=trackio") == 0
    (name,) = SQLiteStorage.get_runs("diffalign")
    rows = SQLiteStorage.get_logs("diffalign", name)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = {r["step"]: r["reward"] for r in rows if "reward" in r}
    assert found == pytest.approx({r["update"]: r["reward"] for r in log})
    samples = {r["step"]: r["samples"] for r in rows if "samples" in r}
    assert set(samples) == {1, 2}
    for step, image in samples.items():
        assert image["_type"] == "trackio.image"  # what its dashboard shows
        kept = Image.open(tmp_path / "trackio" / "media" / image["file_path"]).convert("RGB")
        drawn = Image.open(folder / "samples" / f"{step:06d}.png")
        assert np.array_equal(np.asarray(kept), np.asarray(drawn))
