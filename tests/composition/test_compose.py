"""Compositions of tiny pipelines: stages made once, measured, kept or refused, and the composed folder."""

import json
import shutil
import signal

import pytest
import tiny_composition
import torch
import yaml
from processes import fork, python

from diffalign.cli import main
from diffalign.composition import floors, result
from diffalign.composition.measuring import Meter
from diffalign.composition.plan import make_plan
from diffalign.composition.recipe import Recipe, decode_group
from diffalign.composition.run import BelowFloor, below_floor, compose, make_stage
from diffalign.composition.stages.quantize import QuantizeStage
from diffalign.core.errors import UserError
from diffalign.core.fingerprint import of_file
from diffalign.evaluation.path import bars
from diffalign.pipelines.registry import load_model

SHORT = ("distill", "quantize", "qsched")
TIMED = ("README.md",)
"""Files of the composed folder that hold measured times."""


def plan_of(raw):
    return make_plan(decode_group(Recipe, raw))


def digests(folder):
    """Return the digest of every file of a folder that holds no time."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in TIMED)
    return {p.relative_to(folder).as_posix(): of_file(p) for p in files}


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """Folder, recipe and result of a short composition."""
    folder = tmp_path_factory.mktemp("composed")
    raw = tiny_composition.recipe(folder, *SHORT)
    raw["measure"]["rewards"] = ["jpeg", f"{folder / 'reward.py'}:brightness"]
    done = compose(plan_of(raw))
    result.write(done)
    return folder, raw, done


def test_every_stage_is_measured_beside_the_base_and_the_one_before(composed):
    _, _, done = composed
    assert [row.name for row in done.rows] == ["base", *SHORT]
    assert [row.measured.figures["steps"] for row in done.rows] == [6, 2, 2, 2]
    assert [row.psnr is not None for row in done.rows] == [False, False, True, True]
    base, student, small, _ = (row.measured for row in done.rows)
    assert small.figures["bytes"] < student.figures["bytes"] == base.figures["bytes"]
    for row in done.rows[1:]:
        values = row.measured.evaluation.means["jpeg"] - base.evaluation.means["jpeg"]
        assert row.to_base["jpeg"].value == pytest.approx(values, abs=1e-9)
        assert row.to_base["jpeg"].n == 8
        figures = row.measured.figures
        parts = sum(figures[f"{part}_seconds"] for part in ("text", "denoise", "decode"))
        assert figures["seconds"] == pytest.approx(parts, rel=1e-6)
    assert done.rows[1].to_before.keys() == done.rows[1].to_base.keys()


def test_the_composed_folder_is_the_last_stage(composed):
    _, _, done = composed
    own, stage = digests(done.folder), digests(done.folder.parent / done.last.state.source)
    assert {name: own[name] for name in stage} == stage
    assert own.keys() - stage.keys() == {"composition.json", "samples.png"}


def test_the_card_is_in_the_format_of_the_hub(composed):
    _, _, done = composed
    text = (done.folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["library_name"] == "diffusers"
    assert metadata["pipeline_tag"] == "text-to-image"
    assert metadata["license"] == "other"
    assert {"text-to-image", "distill", "quantize", "qsched"} <= set(metadata["tags"])
    for word in ("diffalign.load", "packed", "num_inference_steps=2", "samples.png", "| base |"):
        assert word in body
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])["stages"].keys() == set(SHORT)


def test_page_and_record_have_every_stage(composed):
    folder, _, done = composed
    page = (folder / "composed" / result.PAGE).read_text()
    record = json.loads((folder / "composed" / "compose.json").read_text())
    assert [row["name"] for row in record["stages"]] == ["base", *SHORT]
    for name in ("base", *SHORT):
        assert f"<td>{name}</td>" in page
    assert page.count("<img") == 4 * result.COLUMNS
    headline = result.headline(done)
    assert headline["bytes_ratio"] > 1
    assert headline["speedup"] > 0


def test_the_same_command_makes_nothing_again(composed, monkeypatch):
    _, raw, done = composed
    before = digests(done.folder)
    stage = done.plan.steps[0].stage
    monkeypatch.setattr(type(stage), "make", lambda *_: pytest.fail("made again"))
    monkeypatch.setattr(Meter, "_measured", lambda *_: pytest.fail("measured again"))
    again = compose(plan_of(raw))
    result.write(again)
    assert result.headline(again) == result.headline(done)
    assert digests(done.folder) == before


def test_a_changed_stage_leaves_those_before_it(composed, tmp_path):
    _, raw, done = composed
    raw = {
        **raw,
        "stages": {**raw["stages"], "quantize": {**raw["stages"]["quantize"], "group_size": 32}},
    }
    plan = plan_of(raw)
    assert plan.steps[0].place == done.plan.steps[0].place
    again = compose(plan, until="quantize")
    assert [row.name for row in again.rows] == ["base", "distill", "quantize"]
    assert again.last.state.source != done.rows[2].state.source
    with pytest.raises(UserError, match="until=align: the recipe has no such stage"):
        compose(plan, until="align")


def test_a_folder_draws_the_same_pixels_each_time(composed):
    _, _, done = composed
    card = done.last.state.card
    stored = done.last.measured.evaluation.images
    meter = Meter(done.plan.recipe, done.plan.base, done.folder.parent)
    for _ in range(2):
        model = load_model(str(done.folder), dtype=torch.float32)
        measured = meter._drawn(model, done.last.state)[0]
        assert torch.equal(measured.images, stored)
    assert card.num_inference_steps == 2


def test_a_stage_below_its_floor_stops_with_the_last_good_one(composed, capsys):
    folder, raw, _ = composed
    stages = {**raw["stages"], "quantize": {**raw["stages"]["quantize"], "floors": {"psnr": 78}}}
    stages["quantize"] |= {"backend": "int4"}
    raw = {**raw, "stages": stages, "output_dir": str(folder / "floored")}
    (folder / "floored").mkdir()
    (folder / "composed" / "stages").rename(folder / "floored" / "stages")
    try:
        # the student is there already, since a stage is named by what it was made from
        file = tiny_composition.write(folder, raw, "floored.yaml")
        assert main(["compose", str(file)]) == 1
    finally:
        (folder / "floored" / "stages").rename(folder / "composed" / "stages")
    text = capsys.readouterr().err
    assert "stages.quantize: psnr" in text
    assert "and the floor is 78" in text
    assert f"The last good model is {folder / 'floored' / 'model'}" in text
    card = (folder / "floored" / "model" / "README.md").read_text()
    assert "- distill" in card
    assert "| quantize |" in card
    page = (folder / "floored" / "report.html").read_text()
    assert 'class="stopped"' in page


def test_floors_are_differences_to_the_base(composed):
    _, _, done = composed
    base, student = done.rows[0].measured, done.rows[1].measured
    change = done.rows[1].to_base["jpeg"].value
    stage = done.plan.steps[0].stage
    for floor, count in ((change - 1e-6, 0), (change + 1e-6, 1)):
        stage.settings.floors = {"jpeg": floor}
        assert len(floors.failures(stage, student, base, base)) == count
    # a student's images are others, so that their PSNR says nothing
    stage.settings.floors = {"psnr": 78.0}
    assert floors.failures(stage, student, base, base) == []
    stage.settings.floors = {"geneval": 0.0}
    with pytest.raises(UserError, match="no reward of measure.rewards tells"):
        floors.check_attainable([stage], base)
    stage.settings.floors = {}


def test_the_error_names_the_base_if_no_stage_is_good(composed):
    _, _, done = composed
    bad = type(done)(done.plan, done.rows[:1], done.rows[1])
    assert isinstance(below_floor(bad), BelowFloor)
    assert "The last good model is the base" in str(below_floor(bad))


def test_a_failed_stage_leaves_what_was_made(composed, monkeypatch):
    _, raw, _ = composed
    stages = {**raw["stages"], "quantize": {**raw["stages"]["quantize"], "group_size": 16}}
    plan = plan_of({**raw, "stages": stages})

    def fail(self, state, after, target, place):
        target.mkdir()
        (target / "half").write_text("half")
        raise OSError(28, "No space left on device")

    make = QuantizeStage.make
    monkeypatch.setattr(QuantizeStage, "make", fail)
    with pytest.raises(OSError, match="No space left"):
        compose(plan)
    monkeypatch.setattr(QuantizeStage, "make", make)
    step = plan.steps[1]
    assert not (step.place / "model").exists()
    make_stage(step)
    assert not (step.place / "model" / "half").exists()
    assert (step.place / "model" / "model_index.json").is_file()


def test_a_search_that_goes_on_leaves_the_same_bytes(composed):
    _, _, done = composed
    step = done.plan.steps[2]
    before = digests(step.place / "model")
    shutil.rmtree(step.place / "model")
    make_stage(step)
    assert digests(step.place / "model") == before


def test_another_folder_of_this_name_is_not_replaced(composed):
    _, _, done = composed
    mark = done.folder / result.MARK
    text = mark.read_text()
    mark.unlink()
    try:
        with pytest.raises(UserError, match="was not created by a composition"):
            result.write(done)
    finally:
        mark.write_text(text)


def test_bars_need_two_values():
    assert bars("x", {"base": 1.0, "other": None}) is None
    chart = bars("x", {"base": 4.0, "other": 1.0})
    assert [width for _, _, width in chart.bars] == [100.0, 25.0]


@pytest.mark.slow
def test_the_whole_path_survives_kills_with_the_same_bytes(tmp_path):
    """Killed at every stage, and once between a model and its record: the folder is the uninterrupted one."""
    raw = tiny_composition.recipe(tmp_path)
    file = tiny_composition.write(tmp_path, raw)

    def process(moment):
        done = fork(1, "killed_composition", moment, file, output=tmp_path)
        return done.returncodes[0], done.stderr[-3000:]

    assert process("never")[0] == 0
    folder = tmp_path / "composed"
    whole = digests(folder / "model")
    folder.rename(tmp_path / "whole")
    for moment in (*tiny_composition.STAGES, "update", "record", "copy"):
        code, errors = process(moment)
        assert code == -signal.SIGKILL, (moment, errors)
    assert process("never")[0] == 0
    assert digests(folder / "model") == whole
    # fresh processes draw the same pixels
    images = [python("drawn_pixels", folder / "model").stdout for _ in range(2)]
    assert images[0] == images[1] != ""
