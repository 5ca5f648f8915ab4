"""Commands that a page or a message suggests are what a shell and the parser accept."""

import shlex
from pathlib import Path

from diffalign.core.commands import command


def test_a_command_survives_the_shell():
    line = command("generate", "it's a red cube", model=Path("my models/sd"), guidance_scale=3.5)
    assert shlex.split(line) == [
        *("diffalign", "generate", "it's a red cube"),
        *("--model", "my models/sd", "--guidance_scale", "3.5"),
    ]


def test_an_argument_that_is_none_is_left_out():
    assert command("evaluate", run="runs/awm", seed=None) == "diffalign evaluate --run runs/awm"


def test_zero_is_a_value():
    assert command("generate", seed=0) == "diffalign generate --seed 0"
