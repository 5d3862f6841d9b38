"""Several processes with a part of each batch train what one process trains with all of it: every method, in double."""

import pytest
import torch
from rank_runs import double_runs

from robust_moe.methods import METHODS

SYNC = ("run.sync_batch_norm=true", "data.augment.flip=true", "run.epochs=2")
NETWORKS = ("model.moe.layers=[]", "model.mixture.num_experts=3", "model.mixture.routing=hard")
DUAL = ("model.moe.layers=[]", "model.mixture.num_experts=2", "model.dual.enabled=true")
OTHERS = {
    "released rt_er": ("method=rt_er", "method.form=released"),
    "pairwise prc": ("method=prc", "method.consistency=pairwise", "method.adversary=router"),
    "released jtdmoe": ("method=jtdmoe", *DUAL, "method.form=released"),
    "weight perturbation": ("method.awp_gamma=0.01", "method=trades"),
    "average": ("run.ema_decay=0.9", "optim.grad_clip=0.1"),
    "attack in train mode": ("method.attack_mode=train",),
    "training in eval mode": ("method.train_mode=eval",),
    "noise": ("model.moe.noise_std=0.5", "model.moe.noise=logits", "model.moe.balance=load"),
    "released noise": ("model.moe.noise_std=0.5", "model.moe.noise=released", "model.moe.balance=switch"),
    "importance": ("model.moe.balance=importance", "model.moe.num_experts=8"),
    "released entropy": ("model.moe.balance=entropy_released", "model.moe.top_k=1"),
    "networks": NETWORKS,
    "networks, all": (*NETWORKS, "model.mixture.routing=soft"),
    "gate with a norm": ("model.moe.gate=two_conv",),
    "dense": ("model.moe.layers=[]", "optim.name=adam", "optim.lr=1e-3"),
}
RUNS = {name: (f"method={name}", *(DUAL if name == "jtdmoe" else ())) for name in METHODS} | OTHERS
RUNS = {name: (*settings, *SYNC) for name, settings in RUNS.items()}
BOUND = 1e-12  # largest difference of a weight below 1: sums in another order leave some 1e-15 after five steps


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


def ends(folder, name, rank=0):
    return torch.load(folder / f"{name} {rank}.pt", weights_only=True)


def differences(one, other):
    assert one.keys() == other.keys()
    return {key: (value.double() - other[key].double()).abs().max().item() for key, value in one.items()}


def assert_same_training(alone, several, name, size):
    """To the bound as alone, statistics of batch norms and the average among it; among each other bit for bit."""
    model, average, means = ends(alone, name)
    first = ends(several, name)
    assert max(differences(model, first[0]).values()) < BOUND
    assert not average or max(differences(average, first[1]).values()) < BOUND
    for other in range(1, size):
        for mine, theirs in zip(first[:2], ends(several, name, other)[:2], strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
    for key in ("loss", "task_loss", "accuracy", "balance_loss"):
        assert key not in means or means[key] == pytest.approx(first[2][key], abs=BOUND)


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
    end = {name: ends(alone, name)[0] for name in RUNS}
    forms = {name: [(key, value.shape) for key, value in state.items()] for name, state in end.items()}
    alike = [(one, two) for one in RUNS for two in RUNS if one < two and forms[one] == forms[two]]
    assert len(alike) > 50
    assert min(max(differences(end[one], end[two]).values()) for one, two in alike) > 1e-2
