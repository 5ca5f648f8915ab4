"""Benchmarks in their official formats: small files, rules, published figures, layouts, refusals."""

import json

import numpy as np
import pytest
from PIL import Image

from diffalign.core.fingerprint import of_file
from diffalign.data.prompts import Prompt
from diffalign.evaluation.geneval import sample_path
from diffalign.evaluation.suite import compbench, geneval2, oneig, unigenbench, wise
from diffalign.evaluation.suite.base import Measure, SuiteError
from diffalign.evaluation.suite.checklist import ChecklistError
from diffalign.evaluation.suite.export import export
from diffalign.evaluation.suite.registry import BUILT_IN, benchmark
from diffalign.evaluation.suite.sources import check_language, locate
from diffalign.evaluation.suite.summarize import Row, summarize
from diffalign.judges.base import Reply
from diffalign.judges.packing import pack

GENEVAL2 = {
    "prompt": "two red cats",
    "atom_count": 3,
    "vqa_list": [["How many cats are in the image?", "two"], ["Are the cats red?", "Yes"]],
    "skills": ["count", "attribute"],
}
DPG = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    "question_natural_language\n"
    "x1,A cat,,1,0,entity,whole,entity - whole (cat),Is there a cat?\n"
    "x2,A red cat on a mat,,1,0,entity,whole,entity - whole (cat),Is there a cat?\n"
    'x2,A red cat on a mat,,2,1,attribute,color,"attribute - color (cat, red)",Is the cat red?\n'
    'x2,A red cat on a mat,,3,2,relation,spatial,"relation - spatial (cat, mat, on)",Is it on a mat?\n'
)


def yes(value):
    return Reply("Yes", (float(value), 1.0 - value), (float(value), 1.0 - value))


def one(name):
    b = benchmark(name)
    return b.questions, b.measures


def named(measures, name):
    return [(m.low, m.high) for m in measures if m.name == name]


def test_geneval2(tmp_path):
    file = tmp_path / "geneval2_data.jsonl"
    file.write_text(json.dumps(GENEVAL2) + "\n")
    [prompt] = geneval2.load([file])
    official, corrected = (geneval2.questions(prompt, v) for v in ("official", "corrected"))
    assert official[0].words == (("two", "Two", " two", " Two", "2", " 2"),)
    assert [q.space_token for q in official] == [True, False]
    assert not corrected[0].space_token
    replies = {"0": Reply("two", (0.25,), (0.25,)), "1": Reply("Yes", (1.0,), (1.0,))}
    found = geneval2.measures(prompt, [replies], "official")
    assert named(found, "gm") == [(0.5, 0.5)]
    assert named(found, "am") == [(0.625, 0.625)]
    assert named(found, "skill/count") == [(0.25, 0.25)]
    found = geneval2.measures(prompt, [{"1": replies["1"]}], "official")
    assert named(found, "gm") == [(0, 1)]
    file.write_text(json.dumps(GENEVAL2 | {"skills": ["count"]}) + "\n")
    with pytest.raises(SuiteError, match=r"jsonl:1 is not an entry of GenEval 2"):
        geneval2.load([file])


def test_dpg_and_its_release(tmp_path):
    file = tmp_path / "dpg_bench.csv"
    file.write_text(DPG)
    questions, measures = one("dpg")
    first, second = benchmark("dpg").load([file])
    assert [q.text.partition("\n")[0] for q in questions(second, "official")] == [
        *("Is there a cat?", "Is the cat red?", "Is it on a mat?"),
    ]
    good = {"1": yes(1), "2": yes(1), "3": yes(1)}
    bad = {"1": yes(0), "2": yes(1), "3": yes(1)}
    corrected = measures(second, [bad, good], "corrected")
    assert named(corrected, "score") == [(0, 0), (1, 1)]
    assert named(corrected, "category/entity") == [(0, 0), (1, 1)]
    official = measures(second, [bad, good], "official")
    assert named(official, "category/entity") == [(1, 1)]  # of the last image only
    assert measures(first, [{"1": yes(1)}], "official") == []  # the release skips it
    assert named(measures(first, [{"1": yes(1)}], "corrected"), "score") == [(1, 1)]
    file.write_text(DPG.replace("x2,A red cat on a mat,,1,0", "x2,A red cat on a mat,,1,3"))
    with pytest.raises(ChecklistError, match=r"\(x2\).*lead back"):
        benchmark("dpg").load([file])


def test_oneig_does_not_propagate(tmp_path):
    table = tmp_path / "OneIG-Bench.csv"
    rows = ["category,id,prompt_en,type,prompt_length,class"]
    files = []
    for name, category in oneig.SETS.items():
        rows.append(f"{category},000,a prompt,T,short,None")
        file = tmp_path / f"{name}.json"
        entry = {
            "question": json.dumps({"1": "A?", "2": "B?", "3": "C?"}),
            "dependency": json.dumps({"1": [0], "2": [1], "3": [2]}),
        }
        file.write_text(json.dumps({"000": entry}))
        files.append(file)
    table.write_text("\n".join(rows))
    prompts = oneig.load([table, *files])
    assert [p.metadata["set"] for p in prompts] == list(oneig.SETS)
    replies = {"1": yes(0), "2": yes(1), "3": yes(1)}
    scores = [
        named(oneig.measures(prompts[0], [replies], v), "alignment")[0][0]
        for v in ("official", "corrected")
    ]
    assert scores == pytest.approx([1 / 3, 0])


UNIGEN = (
    "index,prompt_en,sub_dims_en\n"
    '0,A cat\'s hat,"{""Testpoints"": [""Style"", ""Attribute - Quantity""], '
    '""Testpoint Description"": [""ink"", ""one""]}"\n'
)


def test_unigenbench(tmp_path):
    [prompt] = unigenbench.read_table(UNIGEN, "file")
    [question] = unigenbench.questions(prompt, "official")
    assert "1. Style: ink\n2. Attribute - Quantity: one" in question.text
    reply = Reply("it's fine <analysis>['don't']</analysis><score>[1, 0]</score>")
    found = unigenbench.measures(prompt, [{"testpoints": reply}], "official")
    assert named(found, "primary/Style") == [(1, 1)]
    assert named(found, "primary/Attribute") == named(found, "sub/Attribute - Quantity") == [(0, 0)]
    for broken in (Reply("<score>[1]</score>"), Reply(error="away"), Reply("I would not.")):
        found = unigenbench.measures(prompt, [{"testpoints": broken}], "official")
        assert named(found, "primary/Style") == [(0, 1)]
    with pytest.raises(SuiteError, match=r"file:2 \(index 0\) needs as many descriptions"):
        unigenbench.read_table(UNIGEN.replace(', ""one""', ""), "file")
    with pytest.raises(SuiteError, match=r"\(index 0\) is not valid JSON"):
        unigenbench.read_table(UNIGEN.replace("], ", "] "), "file")


def test_the_overall_is_the_mean_of_dimensions():
    rows = [
        Row(
            "a",
            [Measure("primary/A", 1, 1), Measure("primary/A", 1, 1), Measure("primary/B", 0, 0)],
        )
    ]
    assert summarize(rows, unigenbench.combine)["overall"]["value"] == 0.5


def test_wise_gives_the_published_overall(tmp_path):
    """SD3.5-M's six categories of WISE's table, and its overall of 0.376."""
    shares = {
        "culture": 0.4825,
        **dict(
            zip(
                ("time", "space", "biology", "physics"), (0.375, 0.375, 0.1833, 0.3917), strict=True
            )
        ),
        "chemistry": 0.2,
    }
    rows = [Row(name, [Measure(f"category/{name}", v, v)]) for name, v in shares.items()]
    assert summarize(rows, wise.combine)["overall"]["value"] == pytest.approx(0.376, abs=5e-5)
    entries = [
        {"Prompt": "p", "Explanation": "e", "Category": "c", "Subcategory": "s", "prompt_id": n}
        for n in (1, 401, 1000)
    ]
    file = tmp_path / "merge.json"
    file.write_text(json.dumps(entries))
    prompts = wise.load([file])
    names = [wise.measures(p, [{"score": Reply("Score: 1")}], "official")[0].name for p in prompts]
    assert names == ["category/culture", "category/time", "category/chemistry"]
    spans = [
        named(wise.measures(prompts[0], [{"score": Reply(t)}], "official"), names[0])[0]
        for t in ("Score: 0", "Score: 0.5", "no idea", "<think>Score: 0</think>Score: 1")
    ]
    assert spans == [(0, 0), (0, 1), (0, 1), (1, 1)]
    file.write_text(json.dumps(entries + entries[:1]))
    with pytest.raises(SuiteError, match="entry 4 has the prompt_id 1 of an earlier one"):
        wise.load([file])


def test_longtext_pools_words(tmp_path):
    file = tmp_path / "text_prompts.jsonl"
    entry = {"category": "sign", "length": "short", "prompt": "a sign", "text": ["Open", "today"]}
    file.write_text(json.dumps(entry | {"prompt_id": 7}) + "\n")
    [prompt] = benchmark("longtext").load([file])
    _, measures = one("longtext")
    found = measures(prompt, [{"read": Reply("OPEN junk junk junk")}], "official")
    assert named(found, "recall") == [(0.5, 0.5)]
    assert named(found, "precision") == [(0.25, 0.25)]
    assert next(m.weight for m in found if m.name == "recall") == 2
    assert named(measures(prompt, [{}], "official"), "recall") == [(0, 1)]
    blank = Reply(error="the answer is empty")
    assert named(measures(prompt, [{"read": blank}], "official"), "recall") == [(0, 0)]
    file.write_text(json.dumps(entry | {"text": ["!"]}) + "\n")
    with pytest.raises(SuiteError, match="asks for no text"):
        benchmark("longtext").load([file])


def test_preference_and_diversity():
    _, measures = one("preference")
    features = np.eye(2, dtype=np.float32)
    images = [
        {"reward": Reply("a,b", (i, float("nan")), (i, float("nan"))), "features": Reply(pack(f))}
        for i, f in enumerate(features)
    ]
    prompt = Prompt("p", {"prompt": "p"})
    found = measures(prompt, images, "official")
    assert named(found, "reward/a") == [(0, 0), (1, 1)]
    assert named(found, "reward/b") == [(-np.inf, np.inf)] * 2
    assert named(found, "diversity") == [(1, 1)]
    [(vendi, _)] = named(found, "vendi")
    assert vendi == pytest.approx(2)
    images[1]["features"] = Reply(error="away")
    assert named(measures(prompt, images, "official"), "vendi") == [(1, 2)]


def test_sets_of_prompts(tmp_path):
    lines = tmp_path / "test.txt"
    lines.write_text("a\nb\na\nb\n")
    assert [p.text for p in benchmark("preference").load([lines])] == ["a", "b"]
    table = tmp_path / "parti.tsv"
    table.write_text('Prompt\tCategory\tChallenge\tNote\na "b\tArts\tBasic\t\n')
    [prompt] = benchmark("partiprompts").load([table])
    assert (prompt.text, prompt.metadata["category"]) == ('a "b', "Arts")
    styles = []
    for style in ("anime", "concept-art", "paintings", "photo"):
        styles.append(tmp_path / f"{style}.json")
        styles[-1].write_text('["x"]')
    assert len(benchmark("hpdv2").load(styles)) == 4
    table.write_text(json.dumps({"animals": ["a"], "food": ["b", "c"]}))
    assert len(benchmark("hpsv3").load([table])) == 3


def test_compbench_asks_for_noun_phrases():
    assert compbench.phrases("a green bench and a blue bowl") == ["green bench", "blue bowl"]
    assert compbench.phrases("A round cake, and the oval mat.") == ["round cake", "oval mat"]
    prompt = Prompt("a green bench and a blue bowl", {"set": "color"})
    found = compbench.measures(prompt, [{"0": yes(0.5), "1": yes(0.5)}], "official")
    assert named(found, "set/color") == [(0.25, 0.25)]


def test_files_are_found_by_digest(tmp_path):
    b = benchmark("geneval2")
    file = tmp_path / "geneval2_data.jsonl"
    file.write_text(json.dumps(GENEVAL2))
    with pytest.raises(SuiteError, match="not the file that geneval2 is defined on"):
        locate(b, tmp_path)
    [path], [record] = locate(b, tmp_path, allow_other=True)
    assert path == file
    assert record["sha256"] == of_file(file)
    assert not record["published"]
    with pytest.raises(SuiteError, match=r"needs merge.json, which is not there"):
        locate(benchmark("wise"), tmp_path)
    with pytest.raises(SuiteError, match=r"HF_HUB_OFFLINE|could not be downloaded"):
        locate(benchmark("wise"), None)


def test_prompts_of_another_language_are_refused():
    check_language(["a cat", "una gatta"], "latin", "x")
    with pytest.raises(SuiteError, match="another language"):
        check_language(["一只猫", "两只狗"], "latin", "x")


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_every_benchmark_is_whole(name):
    b = benchmark(name)
    assert b.name == name
    assert b.judge or b.rewards
    assert b.summary
    assert b.headline


@pytest.mark.parametrize(
    ("name", "metadata", "files"),
    [
        ("geneval2", {}, {"00000.png", "image_paths.json"}),
        ("unigenbench", {"index": "12"}, {f"12_{k}.png" for k in range(4)}),
        ("longtext", {"prompt_id": 7}, {f"0007_{k}.png" for k in range(4)}),
        ("wise", {"prompt_id": 401}, {"401.png"}),
        ("dpg", {"item_id": "x1"}, {"x1.png"}),
        ("oneig", {"set": "anime", "id": "000"}, {"anime/000.webp"}),
        ("compbench", {"set": "color"}, {f"color/samples/a cat_{k:06d}.png" for k in range(4)}),
    ],
)
def test_official_layouts(tmp_path, name, metadata, files):
    for k in range(4):
        place = sample_path(tmp_path / "images", 0, k)
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (60 * k, 0, 0)).save(place)
    prompts = [Prompt("a cat", {"prompt": "a cat", **metadata})]
    export(benchmark(name), prompts, tmp_path / "images", tmp_path / "out")
    place = tmp_path / "out" / name
    assert {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()} == files
    if name in ("dpg", "oneig"):
        grid = Image.open(place / next(iter(files))).convert("RGB")
        assert grid.size == (16, 12)
        assert [grid.getpixel((x, y))[0] for y in (0, 6) for x in (0, 8)] == [0, 60, 120, 180]


def test_layouts_that_cannot_be_written(tmp_path):
    with pytest.raises(SuiteError, match="no official layout"):
        export(benchmark("preference"), [], tmp_path, tmp_path / "out")
    with pytest.raises(SuiteError, match="has no image"):
        export(benchmark("wise"), [Prompt("a", {"prompt_id": 1})], tmp_path, tmp_path / "out")
