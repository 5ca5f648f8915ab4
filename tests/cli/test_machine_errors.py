"""Errors of the machine: one line with what helps, in every form that libraries give them."""

import argparse
import errno
import os
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from snippets import SpellingParser

from diffalign.cli.endings import ending, memory_advice
from diffalign.cli.main import VERBS, build_parser, main
from diffalign.config import load
from diffalign.core.errors import ReportedError, UsageError, explain, out_of_memory
from diffalign.core.interruption import Interrupted
from diffalign.training.memory_advice import memory_advice as advice_of_run

CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24.00 GiB of which 1.10 GiB is free."
)
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "400000000000 bytes. Error code 12 (Cannot allocate memory)"
)
VERB = {v.name: v for v in VERBS}


def refused(number, file=None):
    return OSError(number, os.strerror(number), file)


def test_no_memory_in_every_form():
    try:
        np.zeros(10**15)
    except MemoryError as error:
        array = error
    errors = [CUDA, CPU, MemoryError(), array, refused(errno.ENOMEM)]
    errors.append(
        RuntimeError("unable to mmap 40 bytes from file <x>: Cannot allocate memory (12)")
    )
    errors.append(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")
    )
    for error in errors:
        line = explain(error, memory="What helps: less")
        assert "out of memory" in line
        assert line.endswith(". What helps: less")
        assert "\n" not in line
        assert out_of_memory(error)
    assert explain(CUDA, memory="x") == "CUDA out of memory. Tried to allocate 2.00 GiB. x"
    wrapped = ValueError("while drawing")
    wrapped.__cause__ = CUDA
    assert explain(wrapped, memory="x") == explain(CUDA, memory="x")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (refused(errno.EROFS, "/x"), "Read-only file system: /x. Choose a folder on a file system"),
        (refused(errno.EACCES, "/x"), "Permission denied: /x. Choose a place that you may"),
        (refused(errno.ENOTDIR, "/x/y"), "Not a directory: /x/y. A part of that path is a file"),
        (refused(errno.ENOSPC, "/x"), "No space left on device: /x. Free space"),
        (refused(errno.ENOENT), "the current directory does not exist any more. Change to one"),
        (refused(errno.ENOENT, "/x"), "No such file or directory: /x. Check the path"),
        (refused(errno.EPROTO), "Protocol error"),
        (requests.ConnectionError("no route\nto host"), "no route to host"),
        (
            RuntimeError("[/x/gloo/transport/tcp/pair.cc:5] Timed out waiting 1800000ms for recv"),
            "another process of this launch does not answer",
        ),
    ],
)
def test_what_the_system_refuses(error, line):
    assert explain(error).startswith(line)
    assert not out_of_memory(error)


def test_faults_of_the_program_and_errors_of_the_suite_are_not_explained():
    for error in (ValueError("shapes"), RuntimeError("size mismatch"), UsageError("said better")):
        assert explain(error) is None
    told = UsageError("said better")
    told.__cause__ = CUDA
    assert explain(told) is None


def test_every_command_ends_with_one_line_and_its_status():
    args = argparse.Namespace(batch_size=64, model="m", height=None)
    train, merge = VERB["train"], VERB["merge"]
    assert ending(Interrupted(15, "kept"), train, args) == ("interrupted (SIGTERM): kept", 143)
    assert ending(KeyboardInterrupt(), merge, args)[1] == 130
    assert ending(ReportedError("elsewhere"), train, args) == ("", 2)
    assert ending(UsageError("x: is wrong"), train, args) == ("diffalign: error: x: is wrong", 2)
    assert ending(ValueError("a fault"), train, args) is None
    line, status = ending(CUDA, merge, args)
    assert status == 2
    assert "What helps: a smaller --batch_size (now 64), a smaller --height and --width" in line
    assert "diffalign quantize" in line


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["generate", "x", "--dtype=float32"], "a smaller --batch_size, --dtype=bfloat16"),
        (["evaluate", "fid", "--model=m", "--batch_size=8"], "a smaller --batch_size (now 8)"),
        (
            ["autoencoder", "--autoencoder=a", "--output_dir=o"],
            "--batch_size (now 32), a smaller --re",
        ),
        (["merge", "--lora=l", "--output_dir=o"], "a machine or a device with more memory"),
    ],
)
def test_advice_names_flags_that_the_verb_has(words, advice):
    assert advice in memory_advice(build_parser(SpellingParser).parse_args(words))


def test_advice_names_settings_that_the_run_has():
    text = advice_of_run(load("demo", ["--training.micro_batch_size=1", "--mixed_precision=no"]))
    assert "training.micro_batch_size" not in text
    assert "rollout.micro_batch_size (now " in text
    assert "training.mixed_precision=bf16" in text
    for recipe, setting in (("inversion-dpo-shapes-sd", "pairs"), ("dcgen-shapes-flux", "latents")):
        assert f"a smaller {setting}.micro_batch_size" in advice_of_run(load(recipe))


def test_a_run_is_refused_where_it_cannot_write_before_torch_is_there(
    tmp_path, capsys, monkeypatch
):
    def late(config):
        pytest.fail("too late")

    monkeypatch.setattr("diffalign.cli.train.train_config", late)
    file = tmp_path / "file"
    file.write_text("x")
    assert main(["train", "demo", f"--output_dir={file / 'run'}"]) == 2
    assert f"{file} is a file, so" in capsys.readouterr().err
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(["train", "demo", "--output_dir=run"]) == 2
    assert "current directory does not exist any more" in capsys.readouterr().err
    monkeypatch.chdir(Path(__file__).parent)
