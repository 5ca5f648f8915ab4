"""Registry of benchmarks by name.

Entries are strings until one is used. A package adds benchmarks by the entry-point group `diffalign.benchmarks`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points

from diffalign.core.nearest import nearest
from diffalign.evaluation.suite.base import Benchmark, SuiteError

ENTRY_POINT_GROUP = "diffalign.benchmarks"
BUILT_IN = {
    "geneval2": "diffalign.evaluation.suite.geneval2:BENCHMARK",
    "unigenbench": "diffalign.evaluation.suite.unigenbench:BENCHMARK",
    "longtext": "diffalign.evaluation.suite.longtext:BENCHMARK",
    "preference": "diffalign.evaluation.suite.preference:BENCHMARK",
    "wise": "diffalign.evaluation.suite.wise:BENCHMARK",
    "dpg": "diffalign.evaluation.suite.dpg:BENCHMARK",
    "oneig": "diffalign.evaluation.suite.oneig:BENCHMARK",
    "compbench": "diffalign.evaluation.suite.compbench:BENCHMARK",
    "partiprompts": "diffalign.evaluation.suite.partiprompts:BENCHMARK",
    "hpdv2": "diffalign.evaluation.suite.hpdv2:BENCHMARK",
    "hpsv3": "diffalign.evaluation.suite.hpsv3:BENCHMARK",
    "shapes:rubric": "diffalign.evaluation.suite.shapes:RUBRIC",
    "shapes:preference": "diffalign.evaluation.suite.shapes:PREFERENCE",
    "shapes:checklist": "diffalign.evaluation.suite.shapes:CHECKLIST",
}


def available() -> dict[str, str]:
    """Return name and "module:ATTRIBUTE" of built-in benchmarks and those of installed packages."""
    targets = dict(BUILT_IN)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        targets.setdefault(point.name, point.value)
    return targets


def benchmark(name: str) -> Benchmark:
    """Return the benchmark of a name.

    Raises:
        SuiteError: no benchmark has the name.
    """
    targets = available()
    if name not in targets:
        hint = nearest(name, targets, otherwise=f"known are {', '.join(sorted(targets))}")
        raise SuiteError(f"benchmarks={name}: no benchmark has that name{hint}")
    module, _, attribute = targets[name].partition(":")
    loaded: Benchmark = getattr(import_module(module), attribute)
    return loaded
