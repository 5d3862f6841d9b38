"""Methods with a loss of the gates' own, prc and robust_gate, against their formulas written out."""

import copy
import io
import math

import pytest
import torch
from graph_recorder import Recorder
from method_losses import (
    BETA,
    CLASSES,
    COMMON,
    MIXTURE,
    WEIGHED,
    B,
    ascend,
    assert_same_update,
    ce,
    hard,
    kl,
    mixture,
    soft,
    update,
)
from rich.console import Console

from robust_moe.attacks.graph import StepGraphs
from robust_moe.config import ConfigError
from robust_moe.data import Batch
from robust_moe.engine import Reporter, Trainer, passes_of_run, read_metrics
from robust_moe.engine.experiment import make_method, make_model
from robust_moe.methods import PGDAdversarialTraining
from robust_moe.methods.adversarial import AdversarialMethod
from robust_moe.methods.prc import pairwise_consistency
from robust_moe.methods.routed import run_gates
from robust_moe.seeding import derive_seed
from robust_moe_kernels.modules import balance_loss, moe_layers

DATA = {"class_names": list("0123456789"), "channels": 1, "image_size": 8, "mean": [0.3], "std": [0.4]}
TWO_LAYERS = ("model.moe.layers=[layer2.0,layer2.1]", "model.moe.top_k=1")
T = 0.3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def batch():
    images = torch.rand(B, 1, 4, 4, dtype=torch.float64)
    return Batch(images, torch.arange(B) % CLASSES, torch.arange(B) + 30)


def routed(config):
    """A network of blocks in train mode and a batch for it."""
    model = make_model(config, DATA).train()
    return model, Batch(torch.rand(12, 1, 8, 8), torch.arange(12) % 10, torch.arange(12) + 40)


# --- prc ---


def matrix_of_pairs(r_logits, s_logits):
    """The pairwise loss, image by image and pair by pair."""
    r, s = r_logits.softmax(1), s_logits.softmax(1)
    count, experts = r.shape
    found = [[sum(r[b, i] * s[b, j] for b in range(count)) * experts / count for j in range(experts)]
             for i in range(experts)]  # fmt: skip
    same = sum((found[i][i] - 1) ** 2 for i in range(experts)) / experts
    pairs = [(i, j) for i in range(experts) for j in range(experts) if i != j]
    return same + 10 * sum(found[i][j] ** 2 for i, j in pairs) / len(pairs)


BY_HAND = {
    "kl": lambda r, s: kl(r, s).mean(),
    "symmetric": lambda r, s: (kl(r, s).mean() + kl(s, r).mean()) / 2,
    "pairwise": matrix_of_pairs,
}


@pytest.mark.parametrize(("routing", "whole"), [("hard", hard), ("soft", soft)])
@pytest.mark.parametrize("consistency", BY_HAND)
def test_prc_is_cross_entropy_and_the_divergence_of_the_routes_at_one_attacked_image(
    tiny, batch, routing, whole, consistency
):
    model = mixture(routing)
    reference = copy.deepcopy(model)
    settings = ("method.name=prc", f"method.consistency={consistency}", *WEIGHED, *COMMON, *MIXTURE)
    _, got = update(tiny(*settings), model, batch)
    x = ascend(lambda x: ce(whole(reference, x), batch.labels), batch.images, batch.index, 5)
    route = BY_HAND[consistency](reference.gate(batch.images), reference.gate(x))
    task = ce(whole(reference, x), batch.labels).mean()
    assert_same_update(model, reference, got, task + BETA * route)
    torch.testing.assert_close(got.logs["route_loss"], route.detach())
    torch.testing.assert_close(got.logs["dose"], (BETA * route / (task + BETA * route)).detach())


def test_prc_has_a_second_image_that_raises_the_divergence_of_the_routes(tiny, batch):
    model = mixture()
    reference = copy.deepcopy(model)
    _, got = update(tiny("method.name=prc", "method.adversary=router", *WEIGHED, *COMMON, *MIXTURE), model, batch)
    x = ascend(lambda x: ce(hard(reference, x), batch.labels), batch.images, batch.index, 5)
    clean = reference.gate(batch.images).detach()
    x2 = ascend(lambda x: kl(clean, reference.gate(x)), batch.images, batch.index, derive_seed(5, "router"))
    route = kl(reference.gate(batch.images), reference.gate(x2)).mean()
    assert_same_update(model, reference, got, ce(hard(reference, x), batch.labels).mean() + BETA * route)
    assert got.logs["router_attack_gain"] > 0
    weaker = kl(clean, reference.gate(x)).mean()
    assert route > weaker  # than the image that raises the cross-entropy


@pytest.mark.parametrize("adversary", ["ce", "router"])
def test_prc_sums_over_the_layers_and_batch_norms_behind_the_last_gate_see_the_attacked_image_alone(tiny, adversary):
    config = tiny("method.name=prc", f"method.adversary={adversary}", "method.beta=3", "model.moe.balance.weight=0.25",
                  *TWO_LAYERS)  # fmt: skip
    model, batch = routed(config)
    reference = copy.deepcopy(model)
    method = make_method(config)
    (got,) = method.updates(model, batch, 5)
    x = others = method.attack.craft(reference, batch.images, batch.labels, batch.index, seed=5).images
    if adversary == "router":
        others = method.craft(reference, batch, derive_seed(5, "router"), method.router).images

    def gates(images):
        reference(images)
        return [layer.routing.clean_logits for layer in moe_layers(reference).values()]

    logits = reference(x)
    wanted = torch.nn.functional.cross_entropy(logits, batch.labels) + 0.25 * balance_loss(reference, "entropy")
    if adversary == "router":
        both = [pair.chunk(2) for pair in gates(torch.cat([batch.images, others]))]
    else:
        both = list(zip(gates(batch.images), gates(x), strict=True))
    wanted = wanted + 3 * sum(kl(one, two).mean() for one, two in both)
    torch.testing.assert_close(got.loss, wanted)
    got.loss.backward()
    wanted.backward()
    for (name, one), two in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, two[1].grad, rtol=1e-4, atol=1e-6, msg=name)
    assert int(model.bn1.num_batches_tracked) == 2
    assert max(int(expert.bn1.num_batches_tracked) for expert in model.layer2[1].experts) == 1


@pytest.mark.parametrize("experts", [2, 4])
def test_closed_forms_of_the_pairwise_loss(experts):
    sure = 200 * torch.eye(experts).repeat(3, 1)
    assert float(pairwise_consistency(sure, sure)) == 0
    uniform = torch.zeros(8, experts)
    assert float(pairwise_consistency(uniform, uniform)) == pytest.approx(1 - 2 / experts + 11 / experts**2)
    collapsed = sure[:1].repeat(8, 1)
    assert float(pairwise_consistency(collapsed, collapsed)) == pytest.approx(experts - 1)
    assert pairwise_consistency(sure, sure.roll(1, 0)) > 10 / experts  # balanced, but never the same expert
    assert pairwise_consistency(sure.half(), sure.half()).dtype == torch.float32
    one, other = torch.randn(2, 8, experts, generator=torch.Generator().manual_seed(0))
    wanted = pairwise_consistency(one, other)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pairwise_consistency(one, other), wanted)


# --- robust_gate ---


def gate_settings(*more):
    return ("method.name=robust_gate", f"method.temperature={T}", *more, *COMMON, *MIXTURE)


def test_robust_gate_trains_the_experts_along_the_routes_taken_and_no_gate(tiny, batch):
    model = mixture()
    reference = copy.deepcopy(model)
    _, got = update(tiny(*gate_settings()), model, batch)
    reference.gate.requires_grad_(False)
    x = ascend(lambda x: ce(hard(reference, x), batch.labels), batch.images, batch.index, 5)
    assert_same_update(model, reference, got, ce(hard(reference, x), batch.labels).mean())


@pytest.mark.parametrize("routing", ["hard", "soft", "top_k"])
@pytest.mark.parametrize("attacked", ["shared", "own"])
def test_robust_gate_learns_the_softmax_of_the_attacked_losses(tiny, batch, routing, attacked):
    model = mixture(routing)
    reference = copy.deepcopy(model)
    method, got = update(tiny(*gate_settings(f"method.attacked={attacked}")), model, batch, number=1)
    x = method.attack.craft(reference, batch.images, batch.labels, batch.index, seed=5).images
    columns = []
    for network in reference.experts.networks:
        images = x
        if attacked == "own":
            images = ascend(
                lambda x, network=network: ce(network(x), batch.labels),
                batch.images,
                batch.index,
                derive_seed(5, "experts"),
            )
        columns.append(ce(network(images), batch.labels).detach())
    target = torch.stack([column.neg().div(T).exp() for column in columns], 1)
    target = target / target.sum(1, keepdim=True)
    reference.experts.requires_grad_(False)
    scores = reference.gate(x).softmax(1)
    wanted = sum((target[:, e] * (target[:, e].log() - scores[:, e].log())).mean() for e in range(3))
    assert_same_update(model, reference, got, wanted)
    best = torch.stack(columns, 1).argmin(1)
    assert float(got.logs["gate_hits"]) == pytest.approx(float((scores.argmax(1) == best).double().mean()))
    regret = torch.stack(columns, 1).gather(1, scores.argmax(1)[:, None])[:, 0] - torch.stack(columns, 1).amin(1)
    assert float(got.logs["gate_regret"]) == pytest.approx(float(regret.mean()))


@pytest.mark.parametrize("layers", ["[layer2.0,layer2.1]", "[layer2.0.conv2,layer2.1]"])
def test_robust_gate_takes_layer_after_layer_while_the_others_route_as_they_are(tiny, layers):
    config = tiny("method.name=robust_gate", "model.moe.top_k=1", f"model.moe.layers={layers}",
                  "model.moe.balance.weight=0.25")  # fmt: skip
    model, batch = routed(config)
    reference = copy.deepcopy(model)
    before = {name: value.clone() for name, value in model.named_buffers()}
    method, got = update(config, model, batch, number=1)
    x = method.attack.craft(reference, batch.images, batch.labels, batch.index, seed=5).images
    reference.eval()
    wanted, records = 0, []
    for layer in moe_layers(reference).values():
        losses = []
        for expert in range(4):
            layer.fixed_expert = expert
            with torch.no_grad():
                losses.append(torch.nn.functional.cross_entropy(reference(x), batch.labels, reduction="none"))
        layer.fixed_expert = None
        seen = []
        hook = layer.gate.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            reference(x)
        hook.remove()
        logits = layer.gate(seen[0])
        wanted = wanted + kl(torch.stack(losses, 1) / -0.1, logits).mean()
        records.append(logits)
    for logits in records:
        mean = logits.softmax(1).mean(0)
        wanted = wanted + 0.25 * (mean * mean.log()).sum()
    torch.testing.assert_close(got.loss, wanted, rtol=1e-4, atol=1e-5)
    gates = [p for layer in moe_layers(reference).values() for p in layer.gate.parameters()]
    mine = [p for layer in moe_layers(model).values() for p in layer.gate.parameters()]
    for one, two in zip(mine, torch.autograd.grad(wanted, gates), strict=True):
        torch.testing.assert_close(one.grad, two, rtol=1e-3, atol=1e-5)
    assert sum(parameter.grad is not None for parameter in model.parameters()) == len(mine)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers() if "running" not in name
               and "tracked" not in name)  # fmt: skip
    assert int(model.bn1.num_batches_tracked) == 1  # of the experts' update alone
    assert all(layer.reroute is None for layer in moe_layers(model).values())


def test_robust_gate_updates_its_gates_every_so_many_batches(tiny, batch):
    method = make_method(tiny(*gate_settings("method.every=3")))
    model = mixture().train()
    counts = []
    for step in range(7):
        method.step = step
        counts.append(len(list(method.updates(model, batch, step))))
    assert counts == [2, 1, 1, 2, 1, 1, 2]


def test_a_gate_that_waits_for_its_turn_is_not_reported_as_stuck(tiny):
    console = Console(record=True, width=300, file=io.StringIO())
    config = tiny("method.name=robust_gate", "method.every=3", "run.log_every=1", "run.epochs=1")
    assert Trainer(config, Reporter(console=console)).fit().finished
    assert "its gate" not in console.export_text()


@pytest.mark.parametrize("attacked", ["shared", "own"])
def test_the_gate_comes_to_choose_the_expert_that_withstands(tiny, attacked):
    """Two of three experts answer the wrong class; the gate starts at one of them."""
    config = tiny(*gate_settings(f"method.attacked={attacked}", "optim.lr=0.5"))
    method, model = make_method(config), mixture().train()
    images = torch.rand(40, 1, 4, 4, dtype=torch.float64)
    some = Batch(images, torch.zeros(40, dtype=torch.int64), torch.arange(40))
    with torch.no_grad():
        for expert, network in enumerate(model.experts.networks):
            network[-1].weight.mul_(0.1)
            network[-1].bias.copy_(torch.eye(CLASSES)[0 if expert == 2 else 1])
        model.gate[-1].weight.mul_(0.1)
        model.gate[-1].bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    regret = []
    for step in range(40):
        _, found = method.updates(model, some, step)
        regret.append(float(found.logs["gate_regret"]))
        gradients = torch.autograd.grad(found.loss, list(model.gate.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.gate.parameters(), gradients, strict=True):
                parameter -= 0.5 * gradient
    assert regret[0] > 0.5
    assert regret[-1] == 0
    assert (model.gate(images).argmax(1) == 2).all()


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("robust_gate", ("method.attacked=own", "model.moe.layers=[layer2.1]")),
        ("jtdmoe", ("method.form=released", "model.moe.layers=[layer2.1]", "model.dual.enabled=true")),
    ],
)
def test_the_steps_through_each_expert_are_recorded_once(tiny, name, overrides):
    """On a GPU as CUDA graphs: one for the model's route and one for each expert."""
    config = tiny(f"method.name={name}", *overrides)
    model, batch = routed(config)
    method, recorder = make_method(config), Recorder()
    method.attack.graphs = StepGraphs(capturer=recorder)
    for step in range(4):
        method.step = step
        list(method.updates(model, batch, step))
    assert (recorder.captures, recorder.replays) == (1 + 4, 3 * (1 + 4))  # the first batch of all runs one by one


# --- both ---


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("advmoe", ("model.moe.gate=fixed",), "model.moe.gate.name: expected a gate that is trained for advmoe, got"),
        ("prc", ("model.moe.gate=fixed",), "expected a gate that is trained for prc, got 'fixed'"),
        ("robust_gate", ("model.moe.gate=fixed",), "expected a gate that is trained for robust_gate, got 'fixed'"),
        (
            "robust_gate",
            ("model.moe.layers=[]", *MIXTURE, "model.mixture.router.frozen=true"),
            "model.mixture.router.frozen: expected false for robust_gate",
        ),
    ],
)
def test_gates_that_are_not_trained_are_refused(tiny, name, settings, words):
    with pytest.raises(ConfigError, match=words):
        make_method(tiny(f"method.name={name}", *settings))


@pytest.mark.parametrize("name", ["prc", "robust_gate"])
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model.mixture.num_experts=2", "model.moe.layers=[]", "model.dual.enabled=true"],
            "expected jtdmoe for a dual",
        ),
        (["model.moe.layers=[]"], "model.mixture.num_experts: expected at least 2"),
    ],
)
def test_models_without_a_choice_are_refused(tiny, name, overrides, words):
    with pytest.raises(ConfigError, match=words):
        make_method(tiny(f"method.name={name}", *overrides))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method.name=prc", "method.adversary=router", "method.attack.loss=dlr"], "method.attack.loss: expected 'ce'"),
        (["method.name=prc", "method.consistency=js"], "method.consistency: expected .*pairwise.*got 'js'"),
        (["method.name=robust_gate", "method.temperature=0"], "method.temperature: expected .*got 0"),
        (["method.name=robust_gate", "method.every=0"], "method.every: expected .*got 0"),
    ],
)
def test_settings_out_of_their_range_are_refused(tiny, overrides, words):
    with pytest.raises(ConfigError, match=words):
        make_method(tiny(*overrides))


def test_a_gate_that_no_forward_reaches_is_named():
    model = mixture()
    model.fixed_expert = 1
    with pytest.raises(RuntimeError, match="expected a forward through every gate, got none through ''"):
        run_gates(model, torch.rand(2, 1, 4, 4, dtype=torch.float64))


@pytest.mark.parametrize("name", ["prc", "robust_gate"])
def test_a_short_run_learns_digits(tiny, name):
    settings = (f"method.name={name}", "run.epochs=12", "run.log_every=4", "optim.lr=0.05", "method.attack.eps=0.02")
    folder = Trainer(tiny(*settings), Reporter(enabled=False)).fit().folder
    losses = [line["task_loss"] for line in read_metrics(folder, "train")]
    assert losses[0] > 0.8 * math.log(10)
    assert losses[-1] < 0.85 * losses[0]  # measured: 0.75 (prc), 0.71 (robust_gate); without learning 1


@pytest.mark.parametrize(
    ("settings", "forward", "inputs", "weights"),  # passes of an image; of 4 batches, 2 with an update of the gates
    [
        (("method.name=prc",), 4 * (2 + 2), 4 * (2 + 2), 4 * 2),
        (("method.name=prc", "method.adversary=router"), 4 * (2 * 2 + 1 + 3), 4 * (2 * 2 + 3), 4 * 3),
        (("method.name=robust_gate", "method.every=3"), 4 * 3 + 2 * (4 + 1), 4 * 3, 4),
        (("method.name=robust_gate", "method.every=3", "method.attacked=own"), 4 * 3 + 2 * (4 * 3 + 1),
         4 * 3 + 2 * 4 * 2, 4),
    ],
)  # fmt: skip
def test_a_run_costs_what_its_network_sees(tiny, monkeypatch, settings, forward, inputs, weights):
    """At the convolution that every pass begins, and every gradient ends, with."""
    config = tiny(*settings, "run.epochs=1", "run.max_steps=4", "eval.limit=1", "eval.attack.steps=0")
    monkeypatch.setattr("robust_moe.methods.prc.probed_gain", lambda *_: {})
    monkeypatch.setattr("robust_moe.methods.robust_gate.probed_gain", lambda *_: {})
    monkeypatch.setattr(AdversarialMethod, "probed_climb", lambda *_: {})
    seen, training = dict.fromkeys(("forward", "inputs", "weights"), 0), []

    def count(module, _, output):
        if not training:
            return
        seen["forward"] += len(output)
        trains = module.weight.requires_grad

        def backward(grad):
            seen["inputs"] += len(grad)
            seen["weights"] += len(grad) * trains

        if output.requires_grad:
            output.register_hook(backward)

    trainer = Trainer(config, Reporter(enabled=False))
    set_up, step = trainer._set_up, trainer._step

    def hooked(*options):
        set_up(*options)
        trainer.model.get_submodule("conv1").register_forward_hook(count)

    def counted(some):
        training.append(True)
        step(some)
        training.clear()

    trainer._set_up, trainer._step = hooked, counted
    trainer.fit()
    assert seen == {"forward": 16 * forward, "inputs": 16 * inputs, "weights": 16 * weights}
    assert passes_of_run(config, 64) == sum(seen.values())


def test_a_mixture_of_networks_counts_its_experts(tiny):
    config = tiny(*gate_settings(), "run.max_steps=1", "method.attack.steps=2", "run.epochs=1")
    assert passes_of_run(config, 64) == 16 * (2 * 2 + 3 + 3 + 1)
    assert issubclass(type(config.method), AdversarialMethod.Config)
    assert PGDAdversarialTraining.Config(attack=config.method.attack).passes_of(2, 5, config.model) == 5 * (2 * 2 + 3)
