"""The look at whether an attack in training attacks: it must see one that does nothing, or the reverse."""

import io

import pytest
import torch
from rich.console import Console

from robust_moe.attacks import pgd
from robust_moe.data import Batch
from robust_moe.engine import Reporter, Trainer
from robust_moe.engine.experiment import make_method, make_model

DATA = {"class_names": list("0123456789"), "channels": 1, "image_size": 8, "mean": [0.3], "std": [0.4]}
NETWORKS = ("model.moe.layers=[]", "model.mixture.num_experts=3", "model.mixture.routing=hard")
CASES = {
    "pgd_at": (),
    "mart": (),
    "trades": (),
    "advmoe": (),
    "prc": (),
    "robust_gate": (),
    "advmoe on networks": (*NETWORKS, "model.mixture.routing=soft"),  # no jump where a route changes
    "rt_er": NETWORKS,
    "rt_er released": (*NETWORKS, "method.form=released"),
    "jtdmoe": (*NETWORKS, "model.dual.enabled=true"),
}


def parts(tiny, case, *overrides):
    config = tiny(f"method.name={case.split()[0]}", *CASES[case], "method.attack.steps=10", *overrides)
    torch.manual_seed(0)
    model = make_model(config, DATA).train()
    batch = Batch(torch.rand(12, 1, 8, 8), torch.arange(12) % 10, torch.arange(12) + 40)
    return make_method(config), model, batch


def gains(tiny, case, *overrides):
    method, model, batch = parts(tiny, case, *overrides)
    updates = list(method.updates(model, batch, 0))
    assert all(module.training for module in model.modules())
    return [float(update.logs["attack_gain"]) for update in updates if "attack_gain" in update.logs]


@pytest.mark.parametrize("case", CASES)
def test_an_attack_gains(tiny, case):
    found = gains(tiny, case)
    assert len(found) == (2 if "advmoe" in case else 1)
    assert min(found) > 0


@pytest.mark.parametrize("case", CASES)
def test_an_attack_that_descends_loses(tiny, case, monkeypatch):
    step = pgd.pgd_step
    monkeypatch.setattr(pgd, "pgd_step", lambda x, grad, *args, **options: step(x, -grad, *args, **options))
    assert max(gains(tiny, case, "method.attack.alpha=0.005")) < 0


# a cross-entropy is compared with the clean images, on which a random start alone may gain or lose a little
IDLE = [(case, "eps") for case in CASES]
IDLE += [(case, "alpha") for case in CASES if case not in ("pgd_at", "mart", "prc", "robust_gate", "rt_er released")]


# gate noise makes two training forwards of one image differ: a divergence between them is no gain
@pytest.mark.parametrize(("case", "nothing"), IDLE)
def test_an_attack_that_does_nothing_gains_nothing(tiny, case, nothing):
    noise = "mixture" if "model.moe.layers=[]" in CASES[case] else "moe"
    still = ("method.attack.alpha=0", *(["method.attack.eps=0"] if nothing == "eps" else []))
    assert max(gains(tiny, case, f"model.{noise}.noise_std=0.3", *still)) == pytest.approx(0, abs=1e-6)


def test_a_second_expert_that_outweighs_the_model_is_no_false_alarm(tiny):
    """What RT-ER's attack raises is mostly the divergence then; the cross-entropy may fall."""
    assert min(gains(tiny, "rt_er", "method.beta=1000")) > 0


def test_rt_er_watches_what_its_attack_raises(tiny):
    """CE(F(x'), y) + β KL(f_2(x') ‖ f_2(x)), by hand: the adversarial image's own distribution weighs."""
    method, model, batch = parts(tiny, "rt_er", "method.beta=50")
    attack = method.joint
    places = (
        attack.start(batch.images, batch.index, 0, 0),
        attack.craft(model, batch.images, batch.labels, batch.index, seed=0).images,
    )
    model.eval()
    with torch.no_grad():
        model(batch.images)
        second = model.routing.logits.argsort(dim=1, descending=True)[:, 1].tolist()
        found = []
        for x in places:
            task = torch.nn.functional.cross_entropy(model(x), batch.labels)
            clean, moved = (
                torch.cat([model.experts.networks[e](each[None]) for e, each in zip(second, images, strict=True)])
                .double()
                .log_softmax(1)
                for images in (batch.images, x)
            )
            found.append(task + 50 * (moved.exp() * (moved - clean)).sum(1).mean())
    model.train()
    (update,) = method.updates(model, batch, 0)
    assert float(update.logs["attack_gain"]) == pytest.approx(float(found[1] - found[0]), rel=1e-4)


@pytest.mark.parametrize("name", ["trades", "advmoe"])
def test_the_run_says_so_once(tiny, name):
    console = Console(record=True, width=300, file=io.StringIO())
    settings = (
        f"method.name={name}",
        "method.attack.eps=0",
        "method.attack.alpha=0",
        "run.epochs=1",
        "run.log_every=1",
    )
    Trainer(tiny(*settings), Reporter(console=console)).fit()
    said = console.export_text()
    assert said.count("method.attack: the attack does not raise the loss: its images change it by +0 on average") == 1
