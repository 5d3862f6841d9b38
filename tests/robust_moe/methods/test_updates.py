"""What moves in each update, and the defects of published code, each held by a test: attacks that move batch-norm
statistics or leave the mode changed, stale gradients, a router that does not learn, a start that is no start, NaN that
passes unseen."""

import pytest
import torch
from small_runs import TOKENS
from torch import nn

from robust_moe.config import ConfigError
from robust_moe.data import Batch
from robust_moe.engine.experiment import make_method, make_model
from robust_moe.methods import METHODS
from robust_moe.methods import fast_at as fast
from robust_moe_kernels.modules import moe_layers
from robust_moe_kernels.ops.attack_step import random_start

DATA = {"class_names": list("0123456789"), "channels": 1, "image_size": 8, "mean": [0.3], "std": [0.4]}
BLOCKS = ()  # the fixture's network with a routed block
NETWORKS = ("model.moe.layers=[]", "model.mixture.num_experts=3", "model.mixture.routing=hard")
NETWORKS += ("model.mixture.router=linear",)
SOFT = (*NETWORKS, "model.mixture.routing=soft")
DUAL = (*NETWORKS, "model.dual.enabled=true")
TRANSFORMERS = (*TOKENS, *NETWORKS, "model.mixture.routing=soft")
# (method, model): everything that makes sense together
CASES = {
    **{f"{name}-blocks": (name, BLOCKS) for name in METHODS if name != "jtdmoe"},
    **{f"{name}-tokens": (name, TOKENS) for name in METHODS if name != "jtdmoe"},
    **{f"{name}-networks": (name, NETWORKS) for name in ("pgd_at", "trades", "rt_er", "advmoe", "prc", "robust_gate")},
    "rt_er-soft": ("rt_er", SOFT),
    "advmoe-soft": ("advmoe", SOFT),
    "rt_er-released": ("rt_er", (*NETWORKS, "method.form=released")),
    "rt_er-tokens-released": ("rt_er", (*TOKENS, "method.form=released")),
    "rt_er-transformers": ("rt_er", TRANSFORMERS),
    "jtdmoe": ("jtdmoe", DUAL),
    "jtdmoe-tokens": ("jtdmoe", (*TOKENS, "model.dual.enabled=true", "model.dual.experts=true")),
    "jtdmoe-tokens-released": ("jtdmoe", (*TOKENS, "model.dual.enabled=true", "method.form=released")),
    "jtdmoe-transformers": ("jtdmoe", (*TRANSFORMERS, "model.dual.enabled=true", "model.dual.experts=true")),
    "jtdmoe-released": ("jtdmoe", (*DUAL, "method.form=released")),
    "jtdmoe-blocks": ("jtdmoe", ("model.dual.enabled=true",)),
    "trades-dual": ("trades", DUAL),
}


def setting(config):
    torch.manual_seed(0)
    model = make_model(config, DATA).train()
    images = torch.rand(12, 1, 8, 8)
    return model, Batch(images, torch.arange(12) % 10, torch.arange(12) + 40)


def run(method, model, batch, optimizer=None, seed=0):
    """All updates, each applied as the engine does; yields (update, names that got a gradient)."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for update in method.updates(model, batch, seed):
        model.zero_grad(set_to_none=True)
        update.loss.backward()
        if update.after_backward is not None:
            update.after_backward()
        yield update, {names[id(p)] for p in model.parameters() if p.grad is not None}
        if optimizer is not None:
            optimizer.step()


@pytest.mark.parametrize("case", CASES)
def test_every_method_leaves_modes_and_gradients_alone_and_attacks_for_real(tiny, case):
    name, overrides = CASES[case]
    config = tiny(f"method.name={name}", *overrides)
    model, batch = setting(config)
    seen = 0
    for update, moved in run(make_method(config), model, batch):
        seen += 1
        assert moved, "an update moves something"
        assert {"loss"} <= update.logs.keys()
        assert not any(value.requires_grad for value in update.logs.values())
        assert torch.isfinite(update.loss)
        assert update.nonfinite is None or not bool(update.nonfinite)
        assert all(module.training for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert all(layer.reroute is None for layer in moe_layers(model).values())
        if "attack_gain" in update.logs:
            assert update.logs["attack_gain"] > 0
    assert seen == {"free_at": 4, "jtdmoe": 2, "advmoe": 2, "robust_gate": 2}.get(name, 1)


@pytest.mark.parametrize(
    ("name", "form", "levels"),
    [
        ("advmoe", "paper", [{"experts"}, {"gate"}]),
        ("robust_gate", "", [{"experts"}, {"gate"}]),
        ("jtdmoe", "paper", [{"robust"}, {"robust", "standard"}]),
        ("jtdmoe", "released", [{"robust"}, {"standard"}]),
    ],
)
def test_who_moves_at_each_level(tiny, name, form, levels):
    chosen = (*DUAL, f"method.form={form}") if name == "jtdmoe" else NETWORKS  # advmoe and robust_gate have no form
    config = tiny(f"method.name={name}", *chosen)
    model, batch = setting(config)
    found = [{name.split(".")[0] for name in moved} for _, moved in run(make_method(config), model, batch)]
    assert found == levels


@pytest.mark.parametrize(
    "case",
    [
        *(
            "rt_er-networks",
            "rt_er-soft",
            "rt_er-blocks",
            "advmoe-networks",
            "jtdmoe",
            "prc-blocks",
            "robust_gate-blocks",
        ),
        *("pgd_at-tokens", "rt_er-tokens", "advmoe-tokens", "prc-tokens", "robust_gate-tokens", "jtdmoe-transformers"),
    ],
)
def test_the_router_gets_a_gradient(tiny, case):
    name, overrides = CASES[case]
    config = tiny(f"method.name={name}", "model.moe.balance=none", *overrides)
    model, batch = setting(config)
    largest = 0.0
    for _ in run(make_method(config), model, batch):
        gates = [p for layer in moe_layers(model).values() for p in layer.gate.parameters()]
        largest = max([largest, *(float(p.grad.abs().max()) for p in gates if p.grad is not None)])
    assert largest > 0


@pytest.mark.parametrize(
    ("name", "forwards"),
    # forwards in train mode: what a method trains on. Its attack, however many steps, moves nothing
    [("standard", 1), ("pgd_at", 1), ("fast_at", 1), ("trades", 2), ("mart", 2), ("free_at", 4), ("rt_er", 2)],
)
def test_only_what_is_trained_on_moves_batch_norm_statistics(tiny, name, forwards):
    config = tiny(f"method.name={name}", *(() if name == "standard" else ("method.attack.steps=5",)))
    model, batch = setting(config)
    for _ in run(make_method(config), model, batch):
        pass
    assert int(model.bn1.num_batches_tracked) == forwards


def test_random_starts_fill_the_ball():
    images = torch.full((64, 1, 8, 8), 0.5)
    start = random_start(images, 0.1, 3, torch.arange(64)) - images
    assert abs(float(start.mean())) < 0.01
    assert float(start.std()) == pytest.approx(0.1 / 3**0.5, rel=0.05)
    assert float((start.abs() > 0.0999).float().mean()) < 0.01  # published code had 97 % of pixels at the edge


@pytest.mark.parametrize("name", ["trades", "rt_er", "advmoe", "prc", "robust_gate"])
def test_nan_in_an_attack_is_flagged_not_signed_to_zero(tiny, name):
    config = tiny(f"method.name={name}", *SOFT)
    model, batch = setting(config)
    with torch.no_grad():
        model.experts.networks[0].conv1.weight[0] = torch.nan
    update = next(make_method(config).updates(model, batch, 0))
    assert bool(update.nonfinite)


# --- catastrophic overfitting ---


def test_fast_at_goes_over_to_pgd_while_the_two_attacks_disagree(tiny):
    config = tiny("method.name=fast_at", "method.attack.eps=0.05", "method.attack.steps=10")
    method = make_method(config)
    accuracies = {}

    def craft(model, batch, seed, attack=None):
        kind = "fgsm" if attack is method.fgsm else "pgd"
        images = batch.images.clone() if accuracies[kind] else 1 - batch.images
        return fast.Crafted(images, torch.zeros((), dtype=torch.bool))

    method.craft = craft
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0] * 4, [-1.0] * 4]))
    # a bright image is class 0 wherever it is bright against 0: its negative, darker than zero, is class 1
    images = torch.full((4, 1, 2, 2), 2.0)
    batch = Batch(images, torch.zeros(4, dtype=torch.int64), torch.arange(4))

    def trained_on(step, fgsm, pgd):
        accuracies.update(fgsm=fgsm, pgd=pgd)
        method.step = step
        (update,) = method.updates(model.train(), batch, 0)
        return "pgd" if bool(update.logs["on_pgd"]) else "fgsm"

    assert trained_on(0, fgsm=True, pgd=True) == "fgsm"
    assert method.warnings() == []
    assert trained_on(20, fgsm=True, pgd=False) == "pgd"
    assert trained_on(21, fgsm=True, pgd=True) == "pgd"  # until the next comparison
    again = make_method(config)
    again.load_state_dict(method.state_dict())  # a resumed run goes on so
    assert again.with_pgd
    assert trained_on(40, fgsm=True, pgd=True) == "fgsm"
    assert len(method.warnings()) == 1
    assert "catastrophic overfitting" in method.warnings()[0]


# --- refusals ---


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method.name=rt_er", "model.moe.layers=[]"], r"model.mixture.num_experts: expected at least 2.*got 0"),
        (["method.name=rt_er", "model.moe.num_experts=1", "model.moe.top_k=1"], r"model.moe.num_experts: .*got 1"),
        (["method.name=rt_er", *DUAL], "expected jtdmoe for a dual model"),
        (["method.name=advmoe", *DUAL], "expected jtdmoe for a dual model"),
        (["method.name=advmoe", "model.moe.layers=[]"], "model.mixture.num_experts: expected at least 2"),
        (["method.name=jtdmoe", *NETWORKS], "model.dual.enabled: expected true"),
        (["method.name=jtdmoe", "model.dual.enabled=true", "model.moe.layers=[]"], "expected at least 2"),
        (["method.name=trades", "method.attack.name=fgsm"], "method.attack.name: expected 'pgd'"),
        (["method.name=trades", "method.attack.random_start=false"], "method.attack.random_start: expected True"),
        (["method.name=rt_er", "method.attack.restarts=2"], "method.attack.restarts: expected 1 for method.name=rt_er"),
        (["method.name=advmoe", "method.attack.loss=dlr"], "method.attack.loss: expected 'ce'"),
        (["method.name=trades", "method.attack.loss=dlr"], "method.attack.loss: expected 'ce' or 'kl' .*got 'dlr'"),
        (["method.name=free_at", "method.attack.name=apgd-ce"], "method.attack.name: expected 'pgd' .*got 'apgd-ce'"),
        (["method.name=free_at", "method.attack.loss=dlr"], "method.attack.loss: expected 'ce' for .*free_at"),
        (["method.name=free_at", "method.attack.restarts=3"], "method.attack.restarts: expected 1 for .*free_at"),
        (["method.name=jtdmoe", *DUAL, "model.dual.alpha=0"], r"model.dual.alpha: expected a share in \(0, 1\).*got 0"),
        (["method.name=jtdmoe", *DUAL, "model.dual.alpha=1"], r"model.dual.alpha: expected a share in \(0, 1\).*got 1"),
        (["model.moe.balance=load"], r"model.moe.noise_std: expected > 0 for model.moe.balance=load.*got 0.0"),
        (["model.moe.balance=load", *SOFT], r"model.mixture.noise_std: expected > 0 for model.moe.balance=load"),
        (["model.moe.balance=load", *DUAL, "method.name=jtdmoe"], r"model.mixture.noise_std: expected > 0"),
        (["model.moe.noise=released"], r"model.moe.noise_std: expected > 0 for noise=released, got 0.0"),
        (
            ["model.moe.noise=released", "model.moe.noise_std=0.1", "model.moe.balance=load"],
            "model.moe.noise: expected logits or vmoe for balance=load, got 'released'",
        ),
        (
            [*TOKENS, "model.moe.noise_std=1", "model.moe.balance=vmoe"],
            "model.moe.noise: expected vmoe for balance=vmoe, got 'logits'",
        ),
        (
            [*SOFT, "model.mixture.noise_std=1", "model.moe.balance=vmoe"],
            r"model.moe.balance.name: expected another loss for mixture, whose score noise is in units of a row's spr",
        ),
        ([*TOKENS, "model.moe.noise=vmoe"], r"model.moe.noise_std: expected > 0 for noise=vmoe, got 0.0"),
        (["model.moe.capacity=1.5"], "model.moe.capacity: expected null for gate=gap_fc, which routes maps.*got 1.5"),
        (["model.moe.choice=expert"], "model.moe.choice: expected token for gate=gap_fc, .*got expert"),
        ([*TOKENS, "model.moe.capacity=0"], r"model.moe.capacity: expected a number in \(0, 1024\], got 0.0"),
        ([*TOKENS, "model.moe.top_k=5"], r"model.moe.top_k: expected 1 <= k <= 4, got 5"),
        (
            ["method.train_mode=eval", "method.attack_mode=train"],
            "method.attack_mode: expected eval with train_mode=eval.*got 'train'",
        ),
        (
            ["method.train_mode=eval", "model.moe.noise_std=0.1"],
            r"model.moe.noise_std: expected 0 with method.train_mode=eval.*got 0.1",
        ),
        (
            ["method.train_mode=eval", "model.moe.inference=random_top"],
            r"model.moe.inference: expected none with method.train_mode=eval.*got 'random_top'",
        ),
        (
            ["method.train_mode=eval", *DUAL, "method.name=jtdmoe", "model.mixture.noise_std=0.1"],
            r"model.mixture.noise_std: expected 0 with method.train_mode=eval",
        ),
        (["method.name=standard", "method.train_mode=eval"], "unknown key 'method.train_mode' of method 'standard'"),
        (["method.name=free_at", "method.attack.norm=L2"], "method.attack.norm: expected 'Linf'"),
        (
            ["method.attack.name=apgd-ce", "method.attack.loss=dlr"],
            "unknown key 'method.attack.loss' of attack 'apgd-ce'",
        ),
        (["method.name=tradess"], "method.name: .* did you mean 'trades'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(tiny, overrides, words):
    with pytest.raises(ConfigError, match=words):
        make_method(tiny(*overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.moe.balance=load", "model.moe.noise_std=0.1"],
        ["model.moe.balance=load", "model.moe.balance.weight=0"],
        ["model.moe.balance=load", "model.moe.layers=[]"],  # a dense model has no balance
        ["method.name=trades", "method.attack.loss=kl"],
    ],
)
def test_what_makes_sense_is_not_refused(tiny, overrides):
    config = tiny(*overrides)
    model, batch = setting(config)
    (update,) = make_method(config).updates(model, batch, 0)
    assert torch.isfinite(update.loss)


@pytest.mark.parametrize(("overrides", "decays"), [((), True), (NETWORKS, False)])
def test_an_expert_without_images_decays_where_it_is_a_block(tiny, overrides, decays):
    """As documented (:class:`~robust_moe.methods.Update`): its gradient is zero, or there is none."""
    config = tiny("method.name=standard", "model.moe.balance=none", "model.moe.top_k=1", *overrides)
    model, batch = setting(config)
    (layer,) = moe_layers(model).values()
    last = [value for name, value in layer.gate.named_parameters() if name.endswith("bias")][-1]
    last.data[2] = -1e3
    weight = (lambda: layer.experts[2].conv1.weight) if decays else (lambda: layer.experts.networks[2].conv1.weight)
    before = weight().detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in run(make_method(config), model, batch, optimizer):
        pass
    assert 2 not in layer.routing.indices
    torch.testing.assert_close(weight().detach(), before * (1 - 0.01 * decays), rtol=1e-6, atol=0)


def test_state_of_another_method_is_refused(tiny):
    with pytest.raises(KeyError, match="expected no state for PGDAdversarialTraining, got delta"):
        make_method(tiny()).load_state_dict({"delta": None})


class Blind(nn.Module):
    """Logits that the images have no part in."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(10))

    def forward(self, images):
        return self.logits.expand(len(images), 10)


def test_free_at_needs_a_loss_that_depends_on_the_images(tiny):
    config = tiny("method.name=free_at")
    _, batch = setting(config)
    with pytest.raises(RuntimeError, match=r"^model: expected a loss that depends on the images, got none"):
        list(run(make_method(config), Blind(), batch))
