"""Prompt files, good and bad."""

import json

import pytest

from diffalign.data.prompts import PromptError, is_file, load_prompts, read_arguments


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_shapes_prompts_carry_their_metadata():
    found = load_prompts("shapes:held_out")
    assert found[0].metadata["include"]
    assert found[0].task == "single_object"


def test_text_files_hold_one_prompt_a_line(tmp_path):
    found = load_prompts(write(tmp_path, "a.txt", "a cat\n\n  a dog  \n"))
    assert [p.text for p in found] == ["a cat", "a dog"]
    assert found[0].task == "all"


def test_jsonl_files_keep_every_key(tmp_path):
    entry = {"tag": "colors", "include": [], "prompt": "x", "more": 1}
    (found,) = load_prompts(write(tmp_path, "a.jsonl", json.dumps(entry)))
    assert (found.text, found.task, found.metadata) == ("x", "colors", entry)


def test_limit_spreads_over_the_file(tmp_path):
    path = write(tmp_path, "a.txt", "\n".join(str(i) for i in range(10)))
    assert [p.text for p in load_prompts(path, limit=5)] == ["0", "2", "4", "6", "8"]
    assert len(load_prompts(path, limit=99)) == 10


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.jsonl", "", "holds no prompt"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": ', "a.jsonl:2 is not valid JSON"),
        ("a.jsonl", '{"text": "x"}', 'a.jsonl:1 needs a "prompt"'),
        ("a.jsonl", '{"prompt": " "}', 'a.jsonl:1 needs a "prompt"'),
        ("a.jsonl", "[1]", 'a.jsonl:1 needs a "prompt"'),
        ("a.csv", "x", "must end in .txt or .jsonl"),
        ("a.txt", b"fine\n\xfc\n", r"a.txt:2 is not readable: byte 0xfc at offset 5 is not UTF-8"),
        (
            "a.txt",
            b"\xff\xfea\x00\n",
            "a.txt:1 is not readable: byte 0x0a at offset 4 is not UTF-16",
        ),
        ("a.txt", "a cat\n".encode("utf-16-le"), "a.txt:1 is not readable: it holds a NUL"),
        ("a.jsonl", '{"prompt": "a\\u0000b"}', r"a.jsonl:1 is not usable: character 2 is U\+0000"),
        ("a.jsonl", '{"prompt": "\\ud83d"}', r"a.jsonl:1 is not usable: character 1 is U\+D83D"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1 is not valid JSON: nested too deep"),
        ("a.jsonl", '{"prompt": "x", "seed": ' + "9" * 5000 + "}", "a.jsonl:1 .* too many digits"),
        (
            "a.jsonl",
            '{"prompt": "x", "prompt": "y"}',
            "a.jsonl:1 .* the key 'prompt' stands in it twice",
        ),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, name, text, message):
    with pytest.raises(PromptError, match=message):
        load_prompts(write(tmp_path, name, text))


def test_missing_files_and_splits():
    with pytest.raises(PromptError, match="does not exist"):
        load_prompts("nowhere.txt")
    with pytest.raises(PromptError, match="Unknown split 'test'"):
        load_prompts("shapes:test")


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.jsonl", "A.JSONL"])
@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_encoding_and_line_end_gives_the_same_prompts(tmp_path, name, codec, end):
    texts = ["a cat\u2028on a mat", "b\x85c\x0cd", "ein Bär 🐻"]
    lines = [json.dumps({"prompt": t}, ensure_ascii=False) for t in texts]
    text = end.join(lines if name.lower().endswith("jsonl") else texts) + end
    found = load_prompts(write(tmp_path, name, text.encode(codec)))
    assert [p.text for p in found] == texts


def test_marks_of_files_that_were_joined_are_left_out(tmp_path):
    path = write(tmp_path, "a.txt", "\ufeffa red circle\n\ufeffa blue square\n")
    assert [p.text for p in load_prompts(path)] == ["a red circle", "a blue square"]


def test_arguments_are_texts_or_files(tmp_path):
    path = write(tmp_path, "P.TXT", "a\nb\n")
    assert [p.text for p in read_arguments(["x" * 300, path, "c."])] == ["x" * 300, "a", "b", "c."]
    with pytest.raises(PromptError, match="must end in .txt or .jsonl"):
        read_arguments([write(tmp_path, "a.csv", "x")])
    with pytest.raises(PromptError, match="no tokenizer takes"):
        read_arguments(["\udcff"])
    with pytest.raises(PromptError, match="there is no /.*nowhere.txt"):
        read_arguments(["nowhere.txt"])


def test_a_file_that_is_named_like_a_set_is_a_file():
    assert not is_file("geneval")
    assert not is_file("geneval:train")
    assert not is_file("shapes:train")
    assert is_file("geneval_mine.jsonl")
