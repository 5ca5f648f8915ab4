"""Folders of images by anybody: every mode of Pillow, captions in every usual place, files that are broken."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, PngImagePlugin

from diffalign import cli
from diffalign.data import images as data_images
from diffalign.data.captioned import ImageSource
from diffalign.data.images import (
    ImageFolderError,
    batches,
    read_folder,
    read_image,
    write_captions,
)
from diffalign.data.prompts import Prompt
from diffalign.rewards.ocr import wanted_text
from diffalign.shapes.prompts import prompts
from diffalign.shapes.world import render, sample_scene

RED = (200, 30, 40)


def save(path, mode="RGB", color=RED, size=(12, 8), **kwargs):
    image = Image.new("RGB", size, color)
    image.convert(mode).save(path, **kwargs)
    return path


@pytest.mark.parametrize(
    ("name", "mode", "expected"),
    [
        ("a.png", "RGB", RED),
        ("a.bmp", "RGB", RED),
        ("a.png", "RGBA", RED),
        ("a.tif", "CMYK", RED),
        ("a.png", "P", RED),
        ("a.gif", "P", RED),
        ("a.png", "L", (82, 82, 82)),
        ("a.png", "1", None),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, name, mode, expected):
    found = read_image(save(tmp_path / name, mode))
    assert (found.shape, found.dtype) == ((3, 8, 12), torch.uint8)
    if expected:
        assert (found.float().mean((1, 2)) - torch.tensor(expected)).abs().max() <= 3


def test_transparency_lies_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").eq(255).all()


def test_sixteen_bits_are_scaled_and_not_cut(tmp_path):
    values = np.array([[0, 257 * 100, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0].tolist() == [[0, 100, 255]]
    Image.fromarray(np.array([[0.0, 0.5, np.nan]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(OSError, match="not finite"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", [np.int32, np.float32])
@pytest.mark.parametrize("top", [1, 255, 65535])
def test_values_of_a_tiff_are_scaled_by_their_range(tmp_path, kind, top):
    values = np.array([[0, 0.4 * top, top]]).astype(kind)
    Image.fromarray(values).save(tmp_path / "a.tif")
    expected = (values / top * 255).round().astype(int)
    assert read_image(tmp_path / "a.tif")[0].tolist() == expected.tolist()


def test_dark_images_of_16_bits_stay_dark_and_an_unknown_range_is_refused(tmp_path):
    for name in ("a.png", "a.tif", "a.pgm"):
        Image.fromarray(np.array([[0, 128, 255]], np.uint16)).save(tmp_path / name)
        assert read_image(tmp_path / name).max() <= 1, name
    Image.fromarray(np.array([[0, 2**20]], np.int32)).save(tmp_path / "b.tif")
    with pytest.raises(OSError, match="pixels up to 1048576"):
        read_image(tmp_path / "b.tif")


def test_of_an_animation_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (6, 6), c) for c in (RED, (0, 0, 255))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif")[0].float().mean() > 150


def test_an_image_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (3, 12, 8)


def test_a_damaged_exif_is_no_reason_to_lose_the_image(tmp_path):
    exif = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x02\x01\x12\x00\x03\x00\x00\x00"
    save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (3, 8, 12)


def test_large_texts_and_many_pixels_are_read(tmp_path, monkeypatch):
    """Pillow's limits are against strangers; the user's own images are read, and the limits stand afterwards."""
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=True)
    save(tmp_path / "a.png", pnginfo=info, icc_profile=b"\0" * 2_000_000)
    assert read_image(tmp_path / "a.png").shape == (3, 8, 12)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    assert read_image(tmp_path / "a.png").shape == (3, 8, 12)
    assert Image.MAX_IMAGE_PIXELS == 40
    monkeypatch.setattr(data_images, "MAX_PIXELS", 40)
    with pytest.raises(OSError, match="decompression bomb"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"no image at all", None])
def test_broken_files_are_an_os_error(tmp_path, content):
    path = tmp_path / "a.png"
    if content is None:  # cut in half
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(OSError):  # noqa: PT011 - Pillow's words
        read_image(path)


def test_captions_beside_and_in_tables(tmp_path):
    save(tmp_path / "b.png")
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red thing\n")
    assert [(i.path.name, i.prompt.text) for i in read_folder(tmp_path)] == [
        ("a.png", "a red thing"),
        ("b.png", ""),
    ]
    long = "very " * 2000
    (tmp_path / "metadata.csv").write_text(f'file_name,text\nb.png,"blue, or red"\na.png,{long}\n')
    assert [i.prompt.text for i in read_folder(tmp_path)] == ["blue, or red", long]
    rows = [{"file_name": "a.png", "prompt": "one", "tag": "x"}, {"file_name": "b.png"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    first, second = read_folder(tmp_path)
    assert (first.prompt.text, first.prompt.task, second.prompt.text) == ("one", "x", "")
    assert first.prompt.metadata["prompt"] == "one"


def test_tables_as_other_programs_write_them(tmp_path):
    save(tmp_path / "a.png")
    table = 'file_name,prompt,text\na.png,,"a sign\nthat says ""Hi"""\n'
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + table.encode())  # Excel's mark
    (image,) = read_folder(tmp_path)
    assert image.prompt.text == 'a sign\nthat says "Hi"'
    assert wanted_text(image.prompt.text, image.prompt.metadata) == "hi"  # not the whole caption
    line = json.dumps({"file_name": "a.png", "caption": "one\u2028two"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(line)
    assert read_folder(tmp_path)[0].prompt.text == "one\u2028two"
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "\xff"}')
    with pytest.raises(ImageFolderError, match="not readable"):
        read_folder(tmp_path)


def test_links_to_images_are_followed(tmp_path):
    """A snapshot of the hub is a folder of links."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    save(tmp_path / "blob.png")
    (folder / "a.png").symlink_to(tmp_path / "blob.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "./a.png", "prompt": "x"}')
    (image,) = read_folder(folder)
    assert read_image(image.path).shape == (3, 8, 12)


def test_few_images_wait_at_a_time(tmp_path, monkeypatch):
    for i in range(6):
        save(tmp_path / f"{i}.png", size=(10 + i, 10))
    monkeypatch.setattr(data_images, "MAX_WAITING", 3 * 10 * 12 * 2)
    found = list(batches(read_folder(tmp_path), size=64))
    assert sorted(i for rows, _, _ in found for i in rows) == list(range(6))
    assert found[0][0] != [5]  # some came before the last was read


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{", "1 is not valid JSON"),
        ("[]", "must be an object"),
        ('{"text": "x"}', "has no file_name"),
        ('{"file_name": "../../etc/passwd"}', "not inside the folder"),
        ("", "names no image"),
        ('{"file_name": "a.png", "text": "\\ud800"}', "1: the caption is not usable"),
        ('{"file_name": "a.png", "text": ["x", "y"]}', "1: text must be a text, not list"),
        ('{"file_name": "a.png", "n": ' + "9" * 5000 + "}", "1 is not valid JSON"),
        ("[" * 100_000, "1 is not valid JSON: nested too deep"),
    ],
)
def test_bad_tables_name_their_line(tmp_path, table, message):
    (tmp_path / "metadata.jsonl").write_text(table)
    with pytest.raises(ImageFolderError, match=message):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("table", "caption"),
    [
        (
            "file_name,text\n1.png,a red, round ball\n",
            "metadata.csv:2 has 3 fields under a header of 2",
        ),
        ("file_name,text\n1.png\n", "metadata.csv:2 has 1 fields"),
        ("file_name,text,text\n1.png,a,b\n", "metadata.csv:1 names the column 'text' twice"),
        ('file_name,text\n1.png,"a\n', "metadata.csv:2 is not readable: a quote is never closed"),
        (
            "file_name;text\n1.png;a\n",
            "1 is separated by semicolons, not by commas: save the table",
        ),
    ],
)
def test_rows_of_a_csv_are_as_wide_as_its_header(tmp_path, table, caption):
    save(tmp_path / "1.png")
    (tmp_path / "metadata.csv").write_text(table)
    with pytest.raises(ImageFolderError, match=caption):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "table",
    [
        "file_name, text\n1.png, a ball\n",
        ' file_name ,text \r\n1.png, "a ball"\r\n\r\n',
        ",file_name,text\n0,1.png,a ball\n",
    ],
)
@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16"])
def test_blanks_and_indices_of_a_csv_are_no_part_of_it(tmp_path, table, codec):
    save(tmp_path / "1.png")
    (tmp_path / "metadata.csv").write_bytes(table.encode(codec))
    assert [i.prompt.text for i in read_folder(tmp_path)] == ["a ball"]


def test_tables_are_read_wherever_they_lie(tmp_path):
    for name in ("train/1.png", "more/deep/2.png", "beside/3.png", "beside/4.png", "..a/5.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / name)
    rows = [{"file_name": "1.png", "text": "one"}]
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps(rows[0]))
    pq.write_table(
        pa.Table.from_pylist([{"file_name": "deep/2.png", "text": "two"}]),
        tmp_path / "more" / "metadata.parquet",
    )
    (tmp_path / "beside" / "3.TXT").write_text("three")
    (tmp_path / "beside" / "4.caption").write_text("four")
    found = {i.path.name: i.prompt.text for i in read_folder(tmp_path)}
    assert found == {"1.png": "one", "2.png": "two", "3.png": "three", "4.png": "four"}


def test_a_folder_may_begin_with_two_dots(tmp_path):
    (tmp_path / "..a").mkdir()
    save(tmp_path / "..a" / "5.png")
    (tmp_path / "metadata.json").write_text('[{"file_name": "..a/5.png", "text": "five"}]')
    assert [i.prompt.text for i in read_folder(tmp_path)] == ["five"]


def test_what_is_left_out_of_a_folder_is_said(tmp_path, caplog):
    save(tmp_path / "1.JPG")
    save(tmp_path / "2.jfif", format="JPEG")
    save(tmp_path / "3.avif")
    (tmp_path / "._1.JPG").write_bytes(b"\0\5\x16\7")
    (tmp_path / "4.heic").write_bytes(b"")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "1-checkpoint.png")
    assert [i.path.name for i in read_folder(tmp_path)] == ["1.JPG", "2.jfif", "3.avif"]
    assert "3 hidden or of the system (" in caplog.text
    assert "1 of a kind that is not read (4.heic)" in caplog.text
    save(tmp_path / "5.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.JPG,a\n")
    assert len(read_folder(tmp_path)) == 1
    assert "3 named in no row of the table above them (2.jfif, 3.avif, ...)" in caplog.text


def test_names_that_systems_and_programs_write_are_left_out(tmp_path):
    names = ("__pycache__", "System Volume Information", "$RECYCLE.BIN", "~backup", "~1.png")
    for name in names[:-1]:
        (tmp_path / name).mkdir()
        save(tmp_path / name / "1.png")
    save(tmp_path / names[-1])
    save(tmp_path / "1.png")
    assert [i.path.name for i in read_folder(tmp_path)] == ["1.png"]


def test_a_folder_of_drawn_images_has_captions_and_no_grid(tmp_path):
    for name in ("0000-a-cat.png", "0001-a-cat.png", "grid.png"):
        save(tmp_path / name)
    prompts = {
        f"000{i}-a-cat.png": Prompt("a cat", {"tag": "x", "prompt": "a cat"}) for i in (0, 1)
    }
    write_captions(tmp_path, prompts)
    save(tmp_path / "0000-a-dog.png")
    write_captions(tmp_path, {"0000-a-dog.png": Prompt("a dog")})
    found = {i.path.name: i.prompt for i in read_folder(tmp_path)}
    assert {n: p.text for n, p in found.items()} == {
        "0000-a-cat.png": "a cat",
        "0001-a-cat.png": "a cat",
        "0000-a-dog.png": "a dog",
    }
    assert found["0000-a-cat.png"].task == "x"
    (tmp_path / "metadata.jsonl").unlink()
    assert len(read_folder(tmp_path)) == 3


def test_of_folders_of_splits_the_training_one_is_read(tmp_path, caplog):
    for split in ("train", "test", "val"):
        (tmp_path / split).mkdir()
        save(tmp_path / split / f"{split}.png")
    assert [i.path.name for i in read_folder(tmp_path)] == ["train.png"]
    assert "2 of other splits than train" in caplog.text
    assert [i.path.name for i in read_folder(tmp_path / "test")] == ["test.png"]
    (tmp_path / "bus").mkdir()
    save(tmp_path / "bus" / "bus.png")
    save(tmp_path / "stray.png")
    names = {i.path.name for i in read_folder(tmp_path)}
    assert names == {"train.png", "bus.png", "stray.png"}


@pytest.mark.parametrize("table", ["metadata.jsonl", None])
@pytest.mark.parametrize("above", ["", "cat/"])
def test_images_of_other_splits_are_not_read_through_a_table_above(tmp_path, above, table, caplog):
    names = [f"{above}train/1.png", f"{above}test/2.png", "3.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / name)
    if table:
        rows = [json.dumps({"file_name": name, "text": "a"}) for name in names]
        (tmp_path / table).write_text("\n".join(rows))
    found = [i.path.relative_to(tmp_path).as_posix() for i in read_folder(tmp_path)]
    assert sorted(found) == sorted([names[0], names[2]])
    assert (
        f"1 of other splits than train; name a split's own folder to read it ({names[1]})"
        in caplog.text
    )


def test_folders_of_classes_are_no_splits(tmp_path):
    for name in ("train", "bus", "toy_train", "test_tube"):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "1.png")
    assert len(read_folder(tmp_path)) == 4


@pytest.mark.parametrize(
    "names",
    [
        ("train2017", "val2017"),
        ("train_images", "test_images"),
        ("pickTrain", "pickTest"),
        ("coco_train", "coco_val2017"),
        ("train", "test_set"),
    ],
)
def test_splits_may_lie_deeper_and_carry_years(tmp_path, names):
    for name in names:
        (tmp_path / "images" / name / "a").mkdir(parents=True)
        save(tmp_path / "images" / name / "a" / "1.png")
    (found,) = read_folder(tmp_path)
    assert found.path.parts[-3:] == (names[0], "a", "1.png")


def test_columns_have_no_case_and_a_table_without_captions_is_named(tmp_path, caplog):
    save(tmp_path / "1.png")
    (tmp_path / "metadata.csv").write_text("File_Name,Text,Other\n1.png,a cat,x\n")
    (image,) = read_folder(tmp_path)
    assert image.prompt == Prompt("a cat", {"Other": "x", "file_name": "1.png", "prompt": "a cat"})
    (tmp_path / "metadata.csv").write_text("file_name,description\n1.png,a cat\n")
    (image,) = read_folder(tmp_path)
    assert image.prompt.text == ""
    assert "no row has a prompt or text or caption; its columns are file_name, desc" in caplog.text


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_each_row_has_the_caption_that_it_names(tmp_path, suffix):
    entries = [{"prompt": "one"}, {"text": "two"}, {"prompt": " ", "caption": "three"}, {}]
    for i, entry in enumerate(entries):
        save(tmp_path / f"{i}.png")
        entry["file_name"] = f"{i}.png"
    text = json.dumps(entries) if suffix == "json" else "\n".join(map(json.dumps, entries))
    (tmp_path / f"metadata.{suffix}").write_text(text)
    assert [i.prompt.text for i in read_folder(tmp_path)] == ["one", "two", "three", ""]


def test_a_table_may_have_tabs_and_a_caption_file_the_whole_name(tmp_path):
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / name).parent.mkdir()
        save(tmp_path / name)
    (tmp_path / "a" / "metadata.tsv").write_text("File_name\ttext\n1.png\ta red, round ball\n")
    (tmp_path / "b" / "1.png.txt").write_text("a cube")
    assert [i.prompt.text for i in read_folder(tmp_path)] == ["a red, round ball", "a cube"]


@pytest.mark.parametrize(
    ("name", "sign", "why"),
    [
        ("metadata.csv", ";", "by semicolons, not by commas"),
        ("metadata.csv", "\t", "by tabs, not by commas"),
        ("metadata.tsv", ",", "by commas, not by tabs"),
    ],
)
def test_a_table_of_another_separator_is_refused(tmp_path, name, sign, why):
    save(tmp_path / "1.png")
    (tmp_path / name).write_text(f"file_name{sign}text\n1.png{sign}a\n")
    with pytest.raises(ImageFolderError, match=f"{name}:1 is separated {why}: save the table"):
        read_folder(tmp_path)


def test_folders_behind_links_are_read_once(tmp_path):
    (tmp_path / "far").mkdir()
    save(tmp_path / "far" / "a.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "far")
    (root / "circle").symlink_to(root)
    assert [i.path.name for i in read_folder(root)] == ["a.png"]


def test_a_folder_without_an_image_says_what_it_holds(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "labels.tsv").write_text("")
    with pytest.raises(
        ImageFolderError, match=r"which holds 1 of \.tsv; left out 1 of a kind .*a\.mp4"
    ):
        read_folder(tmp_path)


def test_an_undecodable_caption_is_named(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"a b\xe4r")
    with pytest.raises(ImageFolderError, match=r"a\.txt:1 is not readable: byte 0xe4 at offset 3"):
        read_folder(tmp_path)


def test_a_set_without_a_single_caption_is_refused_where_captions_are_needed(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("")
    message = "no image of .* has a caption, and it is to be trained on.*labels.csv is not read"
    with pytest.raises(ImageFolderError, match=message):
        ImageSource(str(tmp_path), (8, 8))


def test_batches_are_of_one_size_and_name_what_cannot_be_read(tmp_path):
    for i, size in enumerate([(12, 8), (8, 12), (12, 8), (12, 8)]):
        save(tmp_path / f"{i}.png", size=size)
    (tmp_path / "4.png").write_bytes(b"")
    found = list(batches(read_folder(tmp_path), size=2))
    assert sorted(i for rows, _, _ in found for i in rows) == [0, 1, 2, 3, 4]
    assert [tuple(p.shape) for _, p, _ in found if p is not None].count((2, 3, 8, 12)) == 1
    assert [rows for rows, pixels, error in found if error] == [[4]]


def test_what_has_no_caption_or_is_not_there_is_counted(tmp_path, capsys):
    """Five rows: right, its caption missing, a file that is missing, a right one, and a broken file."""
    rng = np.random.default_rng(0)
    entry = prompts("train")[0]
    rows = [
        {"file_name": f"{i}.png", "prompt": entry["prompt"] if i != 1 else ""} for i in range(5)
    ]
    for i in (0, 1, 3):
        Image.fromarray(render(sample_scene(entry, rng))).save(tmp_path / f"{i}.png")
    (tmp_path / "4.png").write_bytes(b"broken")
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    output = tmp_path / "out.json"
    flags = [f"--images={tmp_path}", "--rewards=shapes_clip,flatness", f"--output={output}"]
    assert cli.main(["evaluate", "rewards", "--json", *flags]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (found["images"], found["unreadable"], found["without_caption"]) == (5, 2, 1)
    assert found["counts"] == {
        "shapes_clip": {"scored": 2, "not_scored": 3},
        "flatness": {"scored": 3, "not_scored": 2},
    }
    scores = json.loads(output.read_text())["scores"]
    assert scores[1]["shapes_clip"] is None
    assert scores[1]["flatness"] > 0.9
    assert "2.png" in scores[2]["error"]
    assert found["means"]["shapes_clip"] == np.mean([scores[i]["shapes_clip"] for i in (0, 3)])


def test_a_folder_is_scored_from_the_command_line(tmp_path, capsys):
    rng = np.random.default_rng(0)
    entries = prompts("train")[:5]
    rows = []
    for i, entry in enumerate(entries):
        Image.fromarray(render(sample_scene(entry, rng))).save(tmp_path / f"{i}.png")
        rows.append({"file_name": f"{i}.png", **entry})
    (tmp_path / "3.png").write_bytes(b"broken")
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    output = tmp_path / "out" / "scores.json"
    flags = ["--images", str(tmp_path), "--rewards", "verifier,jpeg", "--output", str(output)]
    assert cli.main(["evaluate", "rewards", "--json", *flags]) == 0
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (last["images"], last["unreadable"]) == (5, 1)
    assert last["counts"]["verifier"] == {"scored": 4, "not_scored": 1}
    assert last["means"]["verifier"] == 1.0
    scores = json.loads(output.read_text())["scores"]
    assert [s.get("verifier") for s in scores] == [1, 1, 1, None, 1]
    assert "3.png" in scores[3]["error"]
    assert cli.main(["evaluate", "rewards"]) == 2
    assert cli.main(["evaluate", "rewards", "--images", str(tmp_path / "no")]) == 2
    assert cli.main(["evaluate", "--images", str(tmp_path)]) == 2
    assert cli.main(["evaluate", "rewards", "--images", str(tmp_path), "--rewards", ", "]) == 2
    assert cli.main(["evaluate", "rewards", *flags, "--batch_size=0"]) == 2
    capsys.readouterr()
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "3.png", **entries[0]}))
    assert cli.main(["evaluate", "rewards", *flags]) == 2
    assert "no image could be read" in capsys.readouterr().err
