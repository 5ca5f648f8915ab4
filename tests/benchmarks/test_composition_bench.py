"""The bench of compositions: its arms are recipes that load, and share the stages that they begin with."""

import pytest

from benchmarks import composition
from benchmarks.common.record import BenchOptions
from diffalign.composition.plan import check_order


@pytest.mark.parametrize("arm", composition.ARMS)
def test_arms_are_possible_orders(arm, tmp_path):
    recipe = composition.recipe_of(arm, 1, BenchOptions(quick=True, work=tmp_path))
    check_order(list(recipe.stages))
    assert tuple(recipe.stages) == composition.ARMS[arm]
    assert recipe.floors == {}
    assert all("floors" not in stage for stage in recipe.stages.values())
    assert recipe.measure.seed == 2000


def test_a_seed_is_that_of_every_stage(tmp_path):
    stages = composition.recipe_of("all", 2, BenchOptions(quick=False, work=tmp_path)).stages
    for name in composition.TRAINED:
        assert stages[name]["settings"]["training"]["seed"] == 2
    assert stages["quantize"]["seed"] == stages["qsched"]["seed"] == 2


@pytest.mark.slow
def test_a_short_run_has_every_figure(tmp_path):
    options = BenchOptions(quick=True, work=tmp_path, seeds=1, arms=("distill, quantize", "all"))
    result = composition.run(options)
    assert set(result["headline"]) == {
        *("speedup", "bytes_ratio", "geneval_base", "geneval_composed"),
        *("fid_base", "fid_composed"),
    }
    assert list(result["arms"]["all"]["stages"][0]) == list(composition.ARMS["all"])
