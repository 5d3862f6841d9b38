"""Several processes with a part of each batch train what one process trains with all of it: every method, in double."""

import pytest
from rank_runs import RUNS, assert_same_training, differences, double_runs, ends


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return double_runs(tmp_path_factory.mktemp("alone") / "runs", RUNS, 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return double_runs(tmp_path_factory.mktemp("two") / "runs", RUNS, 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """On two machines, as far as the processes know."""
    return double_runs(tmp_path_factory.mktemp("four") / "runs", {"trades": RUNS["trades"]}, 4, nodes=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_does(alone, two, name):
    assert_same_training(alone, two, name, 2)


@pytest.mark.slow
def test_four_processes_on_two_machines_do_too(alone, four):
    assert_same_training(alone, four, "trades", 4)


@pytest.mark.slow
def test_the_runs_are_no_trivial_ones(alone):
    """What differs between two runs moves the weights far beyond the bound."""
    end = {name: ends(alone, name).model for name in RUNS}
    forms = {name: [(key, value.shape) for key, value in state.items()] for name, state in end.items()}
    alike = [(one, two) for one in RUNS for two in RUNS if one < two and forms[one] == forms[two]]
    assert len(alike) > 50
    assert min(max(differences(end[one], end[two]).values()) for one, two in alike) > 1e-2
