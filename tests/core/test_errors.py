"""Errors name their setting, and errors of libraries fit on one line."""

import copy
import pickle

import pytest

from diffalign.config.checks import ConfigError, check
from diffalign.core.errors import UsageError, first_line, one_line
from diffalign.core.files import write_json_lines
from diffalign.core.nearest import nearest
from diffalign.core.text import read_json_lines


def test_an_error_knows_the_setting_that_it_begins_with():
    error = UsageError("no such file", setting="prompts.train", value="a.txt")
    assert str(error) == "prompts.train=a.txt: no such file"
    assert (error.setting, error.message) == ("prompts.train", "no such file")
    assert UsageError("no such file").setting is None
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (str(twin), twin.setting) == (str(error), error.setting)
    with pytest.raises(ConfigError, match=r"^a\.b: must be 1$") as raised:
        check(False, "a.b", "must be 1")
    assert raised.value.setting == "a.b"


def test_texts_of_other_libraries_fit_on_one_line():
    error = ValueError("  first\n second   third ")
    assert one_line(error) == "first second third"
    assert one_line(error, limit=7) == "first s"
    assert first_line(error) == "first"
    assert one_line(ValueError()) == first_line(ValueError("\n")) == "ValueError"


def test_a_hint_names_the_nearest_name_or_what_else_helps():
    assert nearest("jpg", ["jpeg", "ocr"], otherwise="look") == "; did you mean 'jpeg'?"
    assert nearest("zzz", ["jpeg", "ocr"], otherwise="look") == "; look"
    assert nearest("zzz", ["jpeg", "ocr"]) == "; valid are jpeg, ocr"
    assert nearest("zzz", [f"name{i}" for i in range(99)]) == ""


def test_json_lines_are_read_as_they_were_written(tmp_path):
    rows = [{"a": 1, "b": "é\u2028"}, {"a": None}]
    write_json_lines(tmp_path / "rows.jsonl", rows)
    assert read_json_lines(tmp_path / "rows.jsonl") == rows
