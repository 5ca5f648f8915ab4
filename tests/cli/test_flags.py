"""Values of flags: each verb's dataclass has what its parser sets, and no more."""

import argparse
from dataclasses import MISSING, fields

import pytest

from diffalign.cli.main import VERBS
from diffalign.cli.parser import Parser

LOWEST = [lower for verb in VERBS for lower in (verb.verbs or (verb,))]
OF_THE_PARSER = {"help"}
OF_THE_ENTRY = {"settings"}


@pytest.mark.parametrize("verb", LOWEST, ids=lambda verb: verb.name)
def test_a_verb_takes_the_values_of_its_flags(verb):
    parser = Parser()
    verb.add_flags(parser)
    parsed = {action.dest for action in parser._actions} - OF_THE_PARSER
    names = {f.name: f for f in fields(verb.flags)}
    assert parsed <= set(names)
    needed = {n for n, f in names.items() if f.default is f.default_factory is MISSING}
    assert needed - OF_THE_ENTRY <= parsed
    assert ("settings" in names) == verb.takes_settings


def test_values_that_no_flag_of_a_verb_sets_keep_their_defaults():
    verb = next(verb for verb in LOWEST if verb.name == "quantize")
    parser = Parser()
    verb.add_flags(parser)
    args = parser.parse_args(["--output_dir=x"])
    flags = verb.flags.taken_from(vars(argparse.Namespace(**vars(args), verbose=True)))
    assert (flags.backend, flags.max_prompts, flags.solver) == ("auto", 32, "default")
    assert not hasattr(flags, "verbose")
