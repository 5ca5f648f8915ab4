"""The command line before anything is loaded: what it refuses, how it says so, and what it shows."""

import io
import json
import logging
import os
import subprocess
import sys
import warnings

import pytest

from diffalign import cli
from diffalign.cli import output, types
from diffalign.cli.boundary import library_line, name_flags
from diffalign.core import console
from diffalign.core.errors import UsageError
from diffalign.core.nearest import nearest


def refused(capsys, *words):
    """The last line of a command that is refused."""
    try:
        code = cli.main([str(w) for w in words])
    except SystemExit as stopped:  # argparse's own
        code = stopped.code
    assert code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trian", "demo"), "unknown verb 'trian'; did you mean 'train'?"),
        (("evaluate", "genevl"), "unknown verb 'genevl'; did you mean 'geneval'?"),
        (("generate", "a", "--steps", "5"), "did you mean --num_inference_steps?"),
        (("generate", "a", "--guidance=3"), "did you mean --guidance_scale?"),
        (("generate", "a", "--num_inf=3"), "unrecognized arguments: --num_inf=3"),
        (("generate", "a", "--dtype=bf16"), "unknown value 'bf16'; did you mean 'bfloat16'?"),
        (("quantize", "--backend=int5", "--output_dir=x"), "did you mean 'int"),
        (("list", "recipe"), "did you mean 'recipes'?"),
    ],
)
def test_misspelt_names_are_answered_with_the_nearest(words, message, capsys):
    assert message in refused(capsys, *words)


@pytest.mark.parametrize("value", ["0", "-3", "many", "1.5"])
@pytest.mark.parametrize(
    "flag", ["--batch_size", "--height", "--width", "--num_inference_steps", "--images_per_prompt"]
)
def test_counts_have_a_range(flag, value, capsys):
    line = refused(capsys, "generate", "a", f"{flag}={value}")
    assert line.startswith(f"diffalign: error: {flag} must be ")
    assert value in line


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--guidance_scale", v) for v in ("nan", "inf", "-1", "x")),
        *(("--seed", v) for v in ("-1", str(2**63), str(2**64))),
    ],
)
def test_numbers_have_a_range(flag, value, capsys):
    line = refused(capsys, "generate", "a", f"{flag}={value}")
    assert line.startswith(f"diffalign: error: {flag} must be ")


def test_places_are_checked_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    cases = [
        (("generate", "a", "--output_dir=file"), "--output_dir: file is a file"),
        (("generate", "a", "--output_dir=file/x"), "file is a file, so file/x"),
        (("generate", "a", "--lora=runs/nothere"), "--lora: runs/nothere does not exist"),
        (("generate", "a", "--lora=mine/nothere"), "--lora: mine/nothere does not exist"),
        (("generate", "a", "--model=mine/nothere"), "--model: mine/nothere does not exist"),
        (("merge", "--lora=a/b", "--output_dir=mine"), "--output_dir: mine exists already"),
        (("evaluate", "rewards", "--images=none"), "--images: none does not exist"),
        (("evaluate", "fid", "--reference=coco/val"), "--reference: coco/val does not exist"),
        (("evaluate", "fid", "--save_statistics=mine"), "--save_statistics: mine is a folder"),
        (("evaluate", "report", "--folders", "x=none"), "--folders: none does not exist"),
        (("train", "demo", "--output_dir=file"), "output_dir: file is a file"),
    ]
    for words, message in cases:
        assert message in refused(capsys, *words), words
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine"]


def test_home_is_expanded_where_shells_leave_it_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert types.path("~/x") == tmp_path / "x"
    assert types.place("~/x") == str(tmp_path / "x")
    assert types.expand_home("--output_dir=~/x") == f"--output_dir={tmp_path / 'x'}"
    assert types.expand_home("--a=b") == "--a=b"


def test_a_hint_names_a_word_of_a_longer_name():
    assert nearest("steps", ["seed", "num_inference_steps"]) == (
        "; did you mean 'num_inference_steps'?"
    )
    assert nearest("zzz", ["a", "b"]) == "; valid are a, b"


def test_arguments_become_the_flags_that_users_type():
    flags = {"svd_rank": "--svd_rank", "images": "--images"}
    assert name_flags("svd_rank: too large; see `images`", flags) == (
        "--svd_rank: too large; see --images"
    )
    assert name_flags("svd_rank=9: too large", flags) == "--svd_rank=9: too large"
    assert name_flags("images could not be read", flags) == "images could not be read"


def test_errors_of_libraries_are_one_line_with_advice():
    class GatedRepoError(Exception):
        pass

    try:
        try:
            raise GatedRepoError("403\nAccess is restricted")
        except GatedRepoError as inner:
            raise RuntimeError("could not load") from inner
    except RuntimeError as error:
        line = library_line(error)
    assert "hf auth login" in line
    assert "\n" not in line
    assert "nested too deeply" in library_line(RecursionError())
    assert "UTF-8" in library_line(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"))
    assert library_line(KeyError("a fault of ours")) is None
    assert library_line(UsageError("says for itself")) is None


def test_messages_of_other_libraries_are_kept_for_the_log(tmp_path, capsys):
    with console.quiet():
        print("foreign", file=sys.stderr)
        warnings.warn("deprecated", FutureWarning, stacklevel=1)
        logging.getLogger("diffalign.x").warning("ours")
        console.write_messages(tmp_path)
        console.write_messages(tmp_path / "none")
    error = capsys.readouterr().err
    assert error == "ours\n"
    assert "foreign" in (tmp_path / "messages.log").read_text()
    with console.quiet(verbose=True):
        print("foreign", file=sys.stderr)
    assert "foreign" in capsys.readouterr().err


def test_json_stands_alone_on_standard_output(capsys):
    with output.screen(json_only=True):
        print("for people")
        output.emit({"a": 1})
    out, error = capsys.readouterr()
    assert json.loads(out) == {"a": 1}
    assert error == "for people\n"
    with output.screen(json_only=False):
        output.emit({"a": 1})
    assert capsys.readouterr().out == ""


def test_a_bar_counts_what_is_done(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with console.counting("images") as progress:
        progress(0, 4)
        progress(4, 4)
    assert "4/4" in stream.getvalue()


@pytest.mark.parametrize("module", ["diffalign", "diffalign.cli"])
def test_modules_run_as_the_command_does(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "list", "rewards"],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert "verifier" in done.stdout


def test_recipes_are_listed_by_method_and_hardware(capsys):
    assert cli.main(["list", "recipes"]) == 0
    out = capsys.readouterr().out
    assert out.index("AWM (online RL), a laptop or one GPU") < out.index("one GPU or more")
    assert cli.main(["list", "recipes", "--json"]) == 0
    assert "demo" in json.loads(capsys.readouterr().out)
