"""Preference data as it is found, and as it is made: one record of all of it."""

import csv
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.config import PairsConfig
from diffalign.data.pairs.ranking import choose_pairs, rank_weights
from diffalign.data.pairs.records import PreferencePair, Skipped, held_out, read_pairs
from diffalign.data.pairs.tables import PairsError, rows


def png(value=0):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, format="PNG")
    return file.getvalue()


def pick(prompt, label, **more):
    """A row of Pick-a-Pic v2."""
    columns = {"caption": prompt, "jpg_0": png(0), "jpg_1": png(9), "label_0": label}
    return {**columns, "label_1": 1 - label, "has_label": True, "user_id": 3, **more}


def parquet(path, entries, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(entries), path, **kwargs)
    return path


def jsonl(path, entries):
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    return path


def read(source, **kwargs):
    return list(read_pairs(PairsConfig(source=str(source), **kwargs)))


def facts(pairs):
    return [(p.prompt, p.preference) for p in pairs]


class TestLayouts:
    def test_pickapic(self, tmp_path):
        entries = [pick("a", 1.0), pick("b", 0.0), pick("c", 0.5), pick("d", 1.0, has_label=False)]
        found = read(parquet(tmp_path / "train.parquet", entries))
        assert facts(found[:3]) == [("a", 1.0), ("b", 0.0), ("c", 0.5)]
        assert found[0].images == (png(0), png(9))
        assert found[3] == Skipped(3, found[3].place, "no label")

    def test_images_of_datasets_are_structs(self, tmp_path):
        entries = [pick("a", 1.0, jpg_0={"bytes": png(1), "path": None})]
        entries[0]["jpg_1"] = {"bytes": png(2), "path": "x.png"}
        assert read(parquet(tmp_path / "a.parquet", entries))[0].images == (png(1), png(2))

    def test_hpdv2_train_and_test(self, tmp_path):
        train = [{"prompt": "a", "file_path": ["x.jpg", "y.jpg"], "human_preference": [0, 1]}]
        (tmp_path / "train.json").write_text(json.dumps(train))
        found = read(tmp_path / "train.json")
        assert facts(found) == [("a", 0.0)]
        assert found[0].images == (tmp_path / "x.jpg", tmp_path / "y.jpg")
        test = [{"prompt": "a", "image_path": ["x", "y", "z"], "rank": [2, 1, 2]}]
        (tmp_path / "test.json").write_text(json.dumps(test))
        found = read(tmp_path / "test.json")
        assert [p.preference for p in found] == [0.0, 0.5, 1.0]
        assert [tuple(i.name for i in p.images) for p in found] == [
            ("x", "y"),
            ("x", "z"),
            ("y", "z"),
        ]
        assert {p.row for p in found} == {0}

    @pytest.mark.parametrize(("votes", "p"), [(None, 1.0), ([3, 12], 0.8), ([12, 3], 0.8)])
    def test_hpdv3_names_the_preferred_image_first(self, tmp_path, votes, p):
        entry = {"prompt": "a", "path1": "x", "path2": "y", "choice_dist": votes}
        (tmp_path / "t.json").write_text(json.dumps([entry]))
        assert facts(read(tmp_path / "t.json")) == [("a", p)]

    def test_rapidata_counts_votes(self, tmp_path):
        columns = {"prompt": "a", "image1": png(1), "image2": png(2), "votes_image2": 5}
        entries = [{**columns, "votes_image1": 15}, {**columns, "votes_image1": -1}]
        found = read(parquet(tmp_path / "a.parquet", entries))
        assert facts(found[:1]) == [("a", 0.75)]
        assert found[1].why == "votes are negative"

    def test_imagereward_groups_images_of_a_prompt(self, tmp_path):
        entries = [
            {"prompt_id": k, "prompt": f"p{k}", "image": png(i), "rank": rank}
            for k, ranks in enumerate([[1, 3, 2], [2, 2], [1]])
            for i, rank in enumerate(ranks)
        ]
        found = read(parquet(tmp_path / "a.parquet", entries, row_group_size=2))
        assert facts(found) == [("p0", 1.0), ("p0", 1.0), ("p0", 0.0), ("p1", 0.5)]
        assert [p.row for p in found] == [0, 0, 0, 3]

    def test_webdataset(self, tmp_path):
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            for k in range(3):
                for name, value in {
                    "original_prompt.txt": f"p{k}".encode(),
                    "jpg_0.jpg": png(k),
                    "jpg_1.jpg": png(k + 9),
                    "label_0.txt": b"1" if k else b"0",
                    "label_1.txt": b"0" if k else b"1",
                }.items():
                    info = tarfile.TarInfo(f"{k:05d}.{name}")
                    info.size = len(value)
                    archive.addfile(info, io.BytesIO(value))
        found = read(tmp_path / "a.tar")
        assert facts(found) == [("p0", 0.0), ("p1", 1.0), ("p2", 1.0)]
        assert found[2].images == (png(2), png(11))
        assert [r.columns["original_prompt"] for r in rows(tmp_path / "a.tar", start=2)] == ["p2"]

    def test_an_image_folder_with_a_table_of_ones_own(self, tmp_path):
        with (tmp_path / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "good", "bad", "vote"])
            writer.writeheader()
            writer.writerow({"text": "a", "good": "x.png", "bad": "y.png", "vote": "0.9"})
        names = {"prompt": "text", "image_0": "good", "image_1": "bad", "label": "vote"}
        found = read(tmp_path, column_map=names)
        assert facts(found) == [("a", 0.9)]
        assert found[0].images == (tmp_path / "x.png", tmp_path / "y.png")

    def test_two_labels_are_votes_and_other_columns_metadata(self, tmp_path):
        entry = {"prompt": "a", "image_0": "x", "image_1": "y", "label_0": 3, "label_1": 1}
        found = read(jsonl(tmp_path / "pairs.jsonl", [{**entry, "weight": 2, "scores": [1, 2]}]))
        assert facts(found) == [("a", 0.75)]
        assert found[0].weight == 2
        assert found[0].metadata == {"scores": [1, 2]}


ROW = {"prompt": "a", "image_0": "x", "image_1": "y", "label": 1}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"prompt": ""}, "no prompt"),
        ({"prompt": None}, "no prompt"),
        ({"label": 1.3}, "label not within 0..1"),
        ({"label": -0.1}, "label not within 0..1"),
        ({"label": "yes"}, "label is no number"),
        ({"label": None}, "label is no number"),
        ({"label": float("nan")}, "label is no number"),
        ({"image_0": None}, "no image in image_0"),
        ({"image_1": 7}, "no image in image_1"),
        ({"weight": 0}, "weight not positive"),
        ({"weight": []}, "weight is no number"),
        ({"prompt": "a \ud800 b"}, "a prompt that no tokenizer takes"),
        ({"image_0": "x\0y"}, "no image in image_0"),
        ({"label": 10**400}, "label is no number"),
    ],
)
def test_a_bad_row_is_skipped_and_the_next_is_read(tmp_path, change, why):
    found = read(jsonl(tmp_path / "pairs.jsonl", [ROW, {**ROW, **change}, ROW]))
    assert [type(p) for p in found] == [PreferencePair, Skipped, PreferencePair]
    assert found[1].why == why
    assert found[1].row == 1
    assert "row 1" in found[1].place


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (lambda f: f / "nowhere", {}, "neither a file nor a folder"),
        (lambda f: f, {}, "holds no table"),
        (lambda f: jsonl(f / "a.jsonl", []), {}, "has no rows"),
        (lambda f: jsonl(f / "a.jsonl", [{"x": 1}]), {}, "of no known layout"),
        (lambda f: jsonl(f / "a.jsonl", [[1]]), {}, "row 0 is no object"),
        (
            lambda f: jsonl(f / "a.jsonl", [{"prompt": "a"}]),
            {"preset": "hpdv2"},
            "row 0 has no column",
        ),
        (lambda f: jsonl(f / "a.jsonl", [ROW]), {"preset": "pickpic"}, "did you mean 'pickapic'"),
        (lambda f: jsonl(f / "a.jsonl", [ROW]), {"preset": "pickapic"}, "no column 'caption'"),
        (lambda f: jsonl(f / "a.jsonl", [ROW]), {"column_map": {"text": "a"}}, "no column 'text'"),
        (lambda f: jsonl(f / "a.jsonl", [ROW]), {"column_map": {"prompt": "t"}}, "no column 't'"),
    ],
)
def test_bad_sources_are_one_clear_error(tmp_path, make, kwargs, message):
    with pytest.raises(PairsError, match=message):
        read(make(tmp_path), **kwargs)


@pytest.mark.parametrize("name", ["a.parquet", "a.tar", "a.json", "a.jsonl", "a.csv"])
def test_damaged_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\xfe\x00garbage{")
    with pytest.raises(PairsError, match=name):
        read(tmp_path / name)


def test_a_source_must_be_named():
    with pytest.raises(PairsError, match="names no preference pairs"):
        list(read_pairs(PairsConfig()))


@pytest.mark.parametrize("start", [0, 1, 5, 6, 7, 11, 12])
def test_rows_before_the_start_are_left_out_and_numbers_stay(tmp_path, start):
    for part in range(2):
        entries = [pick(f"p{part * 6 + i}", 1.0) for i in range(6)]
        parquet(tmp_path / "data" / f"{part}.parquet", entries, row_group_size=2)
    config = PairsConfig(source=str(tmp_path))
    every, rest = list(read_pairs(config)), list(read_pairs(config, start=start))
    assert [p.row for p in every] == list(range(12))
    assert rest == every[start:]


def test_validation_prompts_depend_on_the_prompt_alone():
    prompts = [f"a photo of {i}" for i in range(4000)]
    kept = [held_out(p, 0.1) for p in prompts]
    assert np.mean(kept) == pytest.approx(0.1, abs=0.02)
    more = [held_out(p, 0.3) for p in prompts]
    assert all(b for a, b in zip(kept, more, strict=True) if a)
    assert not any(held_out(p, 0.0) for p in prompts)


class TestRanking:
    def test_best_and_worst(self):
        assert choose_pairs([0.2, 0.9, 0.1, 0.9]) == [(1, 2)]

    def test_all_pairs_but_equal_ones(self):
        assert choose_pairs([1, 0, 1], pick="all") == [(0, 1), (2, 1)]

    def test_nested_pairs_use_each_image_once(self):
        scores = [0.3, 0.9, 0.5, 0.1, 0.5, 0.4]
        assert choose_pairs(scores, pick="nested") == [(1, 3), (2, 0), (4, 5)]
        assert choose_pairs([1, 1, 0], pick="nested") == [(0, 2)]
        assert choose_pairs([1, 0, 0, 0], pick="nested") == [(0, 3)]

    def test_weights_do_not_depend_on_the_scale_of_a_reward(self):
        scores = [21.0, float("nan"), 19.0, 20.0]
        pairs = choose_pairs(scores, pick="all")
        weights = rank_weights(scores, pairs)
        assert weights == rank_weights([s * 10 - 3 for s in scores], pairs)
        assert max(weights) == weights[pairs.index((0, 2))]
        assert all(w > 0 for w in weights)
        assert rank_weights([1.0, 1.0], []) == []

    def test_gaps_and_failures(self):
        assert choose_pairs([0.5, 0.4], min_gap=0.1 + 1e-9) == []
        assert choose_pairs([float("nan"), 1.0]) == []
        assert choose_pairs([float("nan"), 1.0, 0.0]) == [(1, 2)]
        assert choose_pairs([1.0, 1.0, 1.0], pick="all") == []


def lines(*texts):
    return "".join(f"{text}\n" for text in texts)


GOOD = json.dumps(ROW)


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        (
            "a.jsonl",
            lines(GOOD, '{"prompt": "y", "image_0": "a", "image_1": "b"}', GOOD),
            "no label",
        ),
        ("a.jsonl", lines(GOOD, '{"prompt": "y"}', GOOD), "no column 'image_0'"),
        ("a.jsonl", lines(GOOD, "null", GOOD), "is no object"),
        ("a.jsonl", lines(GOOD, GOOD[:-9], GOOD), "is not valid JSON"),
        ("a.jsonl", lines(GOOD, "[" * 100_000, GOOD), "is not valid JSON"),
        ("a.jsonl", lines(GOOD, GOOD.replace("1}", "9" * 5000 + "}"), GOOD), "is not valid JSON"),
        ("a.jsonl", lines(GOOD, GOOD[:-1] + ', "label": 0}', GOOD), "is not valid JSON"),
        (
            "a.csv",
            lines("prompt,image_0,image_1,label", "x,a,b,1", "a red, round ball,a,b,1", "x,a,b,0"),
            "has 5 fields under a header of 4",
        ),
    ],
)
def test_a_line_that_cannot_be_read_is_skipped_and_the_next_is_read(tmp_path, name, text, why):
    (tmp_path / name).write_text(text)
    found = read(tmp_path / name)
    assert [type(p) for p in found] == [PreferencePair, Skipped, PreferencePair]
    assert found[1].why == why


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"prompt": "x", "file_path": ["a", "b"], "human_preference": [1, 0, 0]}, "two numbers"),
        ({"prompt": "x", "file_path": ["a", "b"], "human_preference": 5}, "two numbers"),
        ({"prompt": "x", "file_path": None, "human_preference": [1, 0]}, "no list of images"),
        ({"prompt": "x", "file_path": 3, "human_preference": 5}, "no list of images"),
        ({"prompt": "x", "image_path": ["a", "b"], "rank": None}, "no list of ranks"),
        ({"prompt": "x", "image_path": ["a"] * 3000, "rank": [1] * 3000}, "more than 256"),
        ({"prompt": "x", "path1": "a", "path2": "b", "choice_dist": 5}, "no list"),
        ({"prompt": "x", "path1": "a", "path2": "b", "choice_dist": ["a", {}]}, "no number"),
        (
            {"prompt": "x", "image1": "a", "image2": "b", "votes_image1": [], "votes_image2": 1},
            "no number",
        ),
        ({"prompt_id": {}, "prompt": "x", "image": 5, "rank": 1}, "no image"),
        ({"caption": "x", "jpg_0": "a", "jpg_1": {}, "label_0": {}}, "no number"),
        ({"caption": 7, "jpg_0": "a", "jpg_1": "b", "label_0": 1}, "no prompt"),
    ],
)
def test_values_of_another_kind_are_a_skip_in_every_layout(tmp_path, entry, why):
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    (found,) = read(tmp_path / "a.json")
    assert isinstance(found, Skipped)
    assert why in found.why


def test_a_table_of_nothing_but_bad_rows_says_what_is_wrong_with_the_first(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines("[" * 100_000, "{"))
    with pytest.raises(PairsError, match=r"a\.jsonl:1, row 0 is not valid JSON: nested too deep"):
        read(tmp_path / "a.jsonl")


def tar(path, names):
    with tarfile.open(path, "w") as archive:
        for name, value in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(value)
            archive.addfile(info, io.BytesIO(value))
    return path


@pytest.mark.parametrize("before", ["", "./", "train.v1/", "a/b.c/"])
def test_samples_of_a_tar_are_told_by_the_name_behind_the_last_slash(tmp_path, before):
    members = {
        "original_prompt.txt": b"a",
        "jpg_0.JPG": png(0),
        "jpg_1.jpg": png(9),
        "label_0.txt": b"1",
    }
    names = {f"{before}{k}.{n}": v for k in ("0001", "0002") for n, v in members.items()}
    hidden = {f"{before}._0001.jpg_0.jpg": b"\0\5\x16\7"}
    found = read(tar(tmp_path / "a.tar", hidden | names))
    assert facts(found) == [("a", 1.0), ("a", 1.0)]
    assert found[0].images == (png(0), png(9))


def samples(*keys):
    members = {
        "original_prompt.txt": b"a",
        "jpg_0.jpg": png(0),
        "jpg_1.jpg": png(9),
        "label_0.txt": b"1",
    }
    return {f"{key}.{n}": v for key in keys for n, v in members.items()}


@pytest.mark.parametrize("damage", ["header", "cut", "half a block"])
def test_a_tar_that_is_damaged_or_cut_off_is_refused(tmp_path, damage):
    file = tar(tmp_path / "a.tar", samples(1, 2, 3))
    with tarfile.open(file) as archive:
        start = archive.getmember("2.original_prompt.txt").offset
    data = bytearray(file.read_bytes())
    if damage == "header":
        data[start : start + 512] = b"x" * 512
    else:
        del data[start + 256 * (damage == "half a block") :]
    file.write_bytes(data)
    why = (
        f"is not readable: it is .* at byte {start}" if damage != "half a block" else "not readable"
    )
    with pytest.raises(PairsError, match=why):
        list(rows(file))


def test_members_of_a_tar_that_archivers_write_are_no_samples(tmp_path):
    extra = {
        f"{folder}/0.jpg_0.jpg": b"" for folder in ("PaxHeaders.0", "a/PaxHeaders", "__pycache__")
    }
    assert facts(read(tar(tmp_path / "a.tar", extra | samples(1)))) == [("a", 1.0)]


def test_damaged_text_in_a_tar_or_parquet_costs_its_row_alone(tmp_path):
    members = {"jpg_0.jpg": png(0), "jpg_1.jpg": png(9), "label_0.txt": b"1"}
    prompts = {"1": b"a", "2": b"\xff", "3": b"c"}
    names = {
        f"{k}.{n}": v
        for k, prompt in prompts.items()
        for n, v in {"original_prompt.txt": prompt, **members}.items()
    }
    found = read(tar(tmp_path / "a.tar", names))
    assert [type(p) for p in found] == [PreferencePair, Skipped, PreferencePair]
    texts = pa.array([b"a", b"\xff\xfe", b"c"]).cast(pa.string(), safe=False)
    table = pa.table(
        {"prompt": texts, "image_0": ["x"] * 3, "image_1": ["y"] * 3, "label": [1] * 3}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert [type(p) for p in found] == [PreferencePair, Skipped, PreferencePair]


@pytest.mark.parametrize(
    "names",
    [
        [
            "data/train-00000-of-00001.parquet",
            "data/test-0.parquet",
            "data/validation_unique-0.parquet",
        ],
        ["training/0.parquet", "eval/0.parquet"],
        ["train.PARQUET", "val.parquet"],
        ["pickTrain-0.parquet", "pickTest-0.parquet"],
    ],
)
def test_of_a_dataset_with_splits_the_training_one_is_read(tmp_path, names, caplog):
    for name in names:
        parquet(tmp_path / name, [pick(name, 1.0)])
    assert facts(read(tmp_path)) == [(names[0], 1.0)]
    assert "other splits than train" in caplog.text
    assert facts(read(tmp_path / names[1])) == [(names[1], 1.0)]


def test_columns_of_pairs_have_no_case(tmp_path):
    row = {"Prompt": "a", "IMAGE_0": "x.png", "image_1 ": "y.png", "Label": 1, "Mood": "b"}
    (found,) = read(jsonl(tmp_path / "a.jsonl", [row]))
    assert (found.prompt, found.preference, found.metadata) == ("a", 1.0, {"Mood": "b"})
    named = {"TEXT": "a", "Image_0": "x.png", "image_1": "y.png", "Vote": 0.5}
    names = {"prompt": "text", "label": "vote", "image_0": "image_0"}
    assert facts(read(jsonl(tmp_path / "b.jsonl", [named]), column_map=names)) == [("a", 0.5)]


def test_hidden_tables_are_left_out_and_suffixes_have_no_case(tmp_path):
    parquet(tmp_path / "a.PARQUET", [pick("a", 1.0)])
    parquet(tmp_path / ".cache" / "b.parquet", [pick("b", 1.0)])
    (tmp_path / "._a.PARQUET").write_bytes(b"\0\5\x16\7")
    assert facts(read(tmp_path)) == [("a", 1.0)]
    jsonl(tmp_path / "PAIRS.JSONL", [ROW])
    assert facts(read(tmp_path / "PAIRS.JSONL")) == [("a", 1.0)]
