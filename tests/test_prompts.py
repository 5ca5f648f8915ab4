"""Prompt files, good and bad."""

import json

import pytest

from diffalign.data.prompts import PromptError, load_prompts


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
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, name, text, message):
    with pytest.raises(PromptError, match=message):
        load_prompts(write(tmp_path, name, text))


def test_missing_files_and_splits():
    with pytest.raises(PromptError, match="does not exist"):
        load_prompts("nowhere.txt")
    with pytest.raises(PromptError, match="unknown split 'test'"):
        load_prompts("shapes:test")
