import json
import re
from dataclasses import FrozenInstanceError, dataclass, replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe.attacks import APGD, ATTACKS, FAB, PGD, Attack, Square, attack_mode
from robust_moe.attacks.losses import kl_divergence, margin
from robust_moe.attacks.passes import Tally
from robust_moe.config import ConfigError, config_from_dict, load_config
from robust_moe.models import BasicBlock
from robust_moe.settings import plain, setting
from robust_moe_kernels.modules import FusedBlockMoE, balance_loss, replace_blocks


class Network(nn.Module):
    """Convolution, batch norm, dropout, linear; counts its forwards and the backwards that reach its input."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6, 5)
        self.forwards = self.backwards = 0
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        if x.requires_grad:
            x.register_hook(self._count)
        x = self.drop(torch.relu(self.bn(self.conv(x))))
        return self.fc(x.mean((2, 3)))

    def _count(self, grad: Tensor) -> None:
        self.backwards += 1


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    model = Network()
    model(torch.rand(16, 2, 6, 6))  # BN statistics that are not the identity
    model.forwards = 0
    return model


def batch(count: int = 7, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, 2, 6, 6, generator=generator, dtype=dtype), torch.arange(count) % 5


def plain_pgd(model, x0, y, eps, alpha, steps, norm):
    """The definition, a line a step."""
    x = x0.clone()
    for _ in range(steps):
        x.requires_grad_(True)
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
        with torch.no_grad():
            if norm == "Linf":
                delta = (x + alpha * grad.sign() - x0).clamp(-eps, eps)
            else:
                delta = x + alpha * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1) - x0
                length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                delta = delta * (eps / length).clamp(max=1)
            x = (x0 + delta).clamp(0, 1)
    return x


def test_linf_without_random_start_is_the_plain_loop_bit_for_bit(network):
    network.eval()
    x, y = batch()
    expected = plain_pgd(network, x, y, 8 / 255, 2 / 255, 5, "Linf")
    assert torch.equal(PGD(8 / 255, 5, 2 / 255, random_start=False)(network, x, y), expected)


def test_l2_without_random_start_is_the_plain_loop_to_rounding():
    torch.manual_seed(0)
    model = Network(torch.float64).eval()
    x, y = batch(dtype=torch.float64)
    expected = plain_pgd(model, x, y, 0.7, 0.2, 6, "L2")
    got = PGD(0.7, 6, 0.2, norm="L2", random_start=False)(model, x, y)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_closed_form_on_a_linear_model():
    # two classes, logits (w.x, -w.x): the loss of class 0 rises against w, by eps*sign(w) at every pixel
    weight = torch.tensor([1.0, -2.0, 0.5, -0.25])
    model = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.stack([weight, -weight]))
    x = torch.full((3, 4), 0.5)
    got = PGD(0.1, 3, random_start=False)(model, x, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(got, x - 0.1 * weight.sign(), rtol=0, atol=1e-7)
    got = PGD(0.1, 3, norm="L2", random_start=False)(model, x, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(got, x - 0.1 * weight / weight.norm(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("restarts", [1, 3])
def test_result_is_in_the_ball_and_the_box(norm, dtype, restarts):
    torch.manual_seed(0)
    model = Network(dtype).eval()
    x, y = batch(dtype=dtype)
    x[0], x[1] = 0.0, 1.0  # at the edges of the box
    got = PGD(0.3, 4, norm=norm, restarts=restarts)(model, x, y)
    delta = got - x
    reach = delta.abs().flatten(1).amax(1) if norm == "Linf" else delta.flatten(1).norm(dim=1)
    assert reach.max() <= 0.3 * (1 + 1e-6)
    assert reach.max() > 0.2  # it went somewhere
    assert got.min() >= 0
    assert got.max() <= 1
    assert got.dtype == dtype
    assert not got.requires_grad


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_exact_pass_counts(network, restarts, steps):
    x, y = batch()
    attack = PGD(8 / 255, steps, restarts=restarts)
    attack(network, x, y)
    scored = restarts if restarts > 1 else 0  # one forward a restart to find each sample's worst
    assert (network.forwards, network.backwards) == (restarts * steps + scored, restarts * steps)
    assert attack.passes == (network.forwards, network.backwards)


def test_the_model_comes_back_exactly_as_found(network, state_of):
    network.train()
    network.bn.eval()  # a frozen BN inside a training model
    network.fc.weight.requires_grad_(False)  # a frozen layer
    network.conv.weight.grad = torch.ones_like(network.conv.weight)
    x, y = batch()
    before = state_of(network)
    PGD(8 / 255, 3, restarts=2)(network, x, y)
    assert state_of(network) == before


def test_the_model_comes_back_after_an_error_inside_it(network, state_of):
    network.train()
    network.bn.eval()
    before = state_of(network)
    with pytest.raises(RuntimeError, match="channels"), attack_mode(network):
        network(torch.rand(1, 3, 6, 6))
    assert state_of(network) == before


def test_no_weight_gradient_is_computed(network):
    # a parameter that needs no gradient has none computed; the input's still flows
    seen = []
    original = Network.forward

    def forward(self, x):
        seen.append(([p.requires_grad for p in self.parameters()], x.requires_grad, self.training))
        return original(self, x)

    network.train()
    network.forward = forward.__get__(network)
    x, y = batch()
    PGD(8 / 255, 2)(network, x, y)
    assert len(seen) == 2
    for parameters, image, training in seen:
        assert not any(parameters)
        assert image
        assert not training
    assert all(parameter.grad is None for parameter in network.parameters())


def test_train_mode_moves_bn_statistics_once_a_forward(network):
    network.eval()
    x, y = batch()
    before = int(network.bn.num_batches_tracked)
    PGD(8 / 255, 3, mode="train")(network, x, y)
    assert int(network.bn.num_batches_tracked) == before + 3
    assert not network.training


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("random_start", [True, False])
def test_works_where_gradients_are_off(network, context, random_start):
    x, y = batch()
    attack = PGD(8 / 255, 3, random_start=random_start)
    expected = attack(network, x, y)
    with context():
        got = attack(network, x + 0, y + 0)  # tensors made in here
    assert torch.equal(got, expected)


def test_deterministic_and_keyed_by_seed_index_and_restart(network):
    x, y = batch()
    index = torch.arange(7) + 100
    first = PGD(0.1, 2, seed=1)(network, x, y, index)
    assert torch.equal(first, PGD(0.1, 2, seed=1)(network, x, y, index))
    assert not torch.equal(first, PGD(0.1, 2, seed=2)(network, x, y, index))
    assert not torch.equal(first, PGD(0.1, 2, seed=1)(network, x, y, index + 1))
    starts = PGD(0.1, 0, seed=1)
    one, two = (starts.start(x, index, 1, restart) for restart in (0, 1))
    assert not torch.equal(one, two)
    crafted = PGD(0.1, 2, seed=9).craft(network, x, y, index, seed=1)
    assert torch.equal(crafted.images, first)


@pytest.mark.parametrize("restarts", [1, 2])
def test_independent_of_batch_size_and_order(restarts):
    torch.manual_seed(0)
    model = Network(torch.float64).eval()  # fp64: the model's own batch dependence stays far below a sign flip
    x, y = batch(12, torch.float64)
    index = torch.arange(12)
    attack = PGD(0.1, 4, restarts=restarts)
    whole = attack(model, x, y, index)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    parts = torch.empty_like(whole)
    for part in order.split(5):
        parts[part] = attack(model, x[part], y[part], index[part])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


def test_restarts_keep_each_samples_worst(network):
    network.eval()
    x, y = batch(32)
    attack = PGD(0.05, 2, restarts=4)
    candidates = []
    for restart in range(4):
        one = PGD(0.05, 2)
        one.start = lambda x0, index, seed, _, r=restart: attack.start(x0, index, seed, r)
        candidates.append(one(network, x, y))
    with torch.no_grad():
        logits = [network(candidate) for candidate in candidates]
    # misclassified counts before any loss
    keys = [(l.argmax(1) != y) * 1e3 + F.cross_entropy(l, y, reduction="none").double() for l in logits]
    worst = torch.stack(keys).argmax(0)
    expected = torch.stack(candidates)[worst, torch.arange(32)]
    assert len(worst.unique()) > 1  # the case is not trivial
    assert torch.equal(attack(network, x, y), expected)


def test_more_steps_and_larger_eps_hurt_more(network):
    network.eval()
    x, y = batch(64)

    def loss(eps: float, steps: int) -> float:
        with torch.no_grad():
            return F.cross_entropy(network(PGD(eps, steps, eps / 4)(network, x, y)), y).item()

    clean = F.cross_entropy(network(x), y).item()
    assert clean < loss(0.02, 4) < loss(0.1, 4)
    assert loss(0.1, 1) < loss(0.1, 8)


def test_zero_radius_and_zero_steps_return_a_copy(network):
    x, y = batch()
    for attack in (PGD(0.0, 3), PGD(0.1, 0, random_start=False)):
        got = attack(network, x, y)
        assert torch.equal(got, x)
        assert got.data_ptr() != x.data_ptr()
    assert PGD(0.1, 2)(network, x[:0], y[:0]).shape == (0, 2, 6, 6)


def test_through_a_routed_block(state_of):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), BasicBlock(4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )
    replace_blocks(model, "1", num_experts=3, top_k=2, init="fresh")
    assert isinstance(model[1], FusedBlockMoE)
    model.train()
    x, y = batch(16)
    before = state_of(model)
    got = PGD(0.1, 4)(model, x, y)
    assert state_of(model) == before
    model.eval()
    with torch.no_grad():
        assert F.cross_entropy(model(got), y) > F.cross_entropy(model(x), y)


@pytest.mark.parametrize("fails", [False, True])
def test_the_routing_record_stays_that_of_the_last_forward(fails):
    torch.manual_seed(0)
    model = nn.Sequential(BasicBlock(2, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 5))
    replace_blocks(model, "0", num_experts=3, top_k=2, init="fresh")
    x, y = batch(16)
    PGD(0.1, 2)(model, x, y)
    assert model[0].routing is None  # as before any forward
    model(x)
    balance_loss(model).backward()
    expected = model[0].gate.fc.weight.grad.clone()
    model.zero_grad()
    model(x)
    record = model[0].routing
    if fails:
        with pytest.raises(ValueError, match="labels below 5"):
            PGD(0.1, 2)(model, x, y + 3)
    else:
        PGD(0.1, 2)(model, x, y)
    assert model[0].routing is record
    balance_loss(model).backward()  # its graph is there too
    assert torch.equal(model[0].gate.fc.weight.grad, expected)


def test_images_stay_float32_under_bfloat16_autocast(network):
    x, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        got = PGD(2 / 255, 3)(network, x, y)
    assert got.dtype == torch.float32
    # the steps were not rounded to bf16, whose spacing near 1 is 1/256
    assert (got != got.bfloat16().float()).float().mean() > 0.5
    assert (got - x).abs().max() <= 2 / 255 + 1e-6


class Broken(Network):
    """Gives NaN for one image of the batch from its ``when``-th forward on."""

    when = 1

    def forward(self, x):
        out = super().forward(x)
        return (
            out * torch.where(torch.arange(len(x)) == 1, torch.nan, 1.0)[:, None] if self.forwards >= self.when else out
        )


@pytest.mark.parametrize(("when", "restarts"), [(1, 1), (3, 1), (3, 2)])  # at once; at the last step; when scored
def test_nan_never_passes_for_an_attack(when, restarts):
    torch.manual_seed(0)
    model = Broken()
    model.when = when
    x, y = batch()
    steps = 3 if restarts == 1 else 2
    with pytest.raises(FloatingPointError, match="non-finite"):
        PGD(0.1, steps, restarts=restarts)(model, x, y)
    assert bool(PGD(0.1, steps, restarts=restarts).craft(model, x, y).nonfinite)
    assert model.training


def test_an_objective_changes_by_replacement_alone_and_its_copies_share_a_tally(network):
    x, y = batch()
    attack, tally = PGD(0.1, 3), Tally("cpu")
    passes = attack.aim(network, x, y, tally)
    with pytest.raises(FrozenInstanceError):
        passes.loss = margin
    other = replace(passes, y=y[:2], loss=margin)
    with attack_mode(network):
        logits = network(x)
        assert torch.equal(passes.examine(x).loss, F.cross_entropy(logits, y, reduction="none"))
        assert torch.equal(other.examine(x[:2]).loss, margin(network(x[:2]), y[:2]))
        assert (tally.counts.forward, tally.counts.backward) == (len(x) + 2, len(x) + 2)
        broken = replace(other, loss=lambda logits, y: logits.sum(1) * torch.nan)
        broken.examine(x[:2])
    assert not bool(tally.nonfinite)
    passes.tally.settle()  # whoever asks, the losses of all are looked at
    assert bool(tally.nonfinite)


def test_what_is_found_is_judged_by_the_prepared_loss(network):
    x, y = batch()
    found = PGD(0.1, 3, loss="kl").find(network, x, y)
    with attack_mode(network):
        clean, attacked = network(x), network(found.images)
    assert torch.equal(found.loss, kl_divergence(attacked, clean))
    assert torch.equal(found.fooled, attacked.argmax(1) != y)


class LostOnTheWay(nn.Module):
    """Logits that are NaN in a shell around the clean images, by a constant: their gradients stay finite."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x, self.fc = x, nn.Linear(x[0].numel(), 5)

    def forward(self, x: Tensor) -> Tensor:
        far = (x.detach() - self.x).abs().flatten(1).amax(1, keepdim=True)
        lost = (far > 0.01) & (far < 0.08)
        return self.fc(x.flatten(1)) + torch.where(lost, torch.nan, 0.0)


@pytest.mark.parametrize("best", [False, True])
def test_nan_between_start_and_end_counts(best):
    torch.manual_seed(0)
    x, y = batch()
    model = LostOnTheWay(x).eval()
    attack = PGD(0.1, 5, 0.02, loss="margin", random_start=False, best=best)
    with pytest.raises(FloatingPointError, match="non-finite"):
        attack(model, x, y)


class Thresholds(nn.Module):
    def __init__(self, x: Tensor, keeps_graph: bool) -> None:
        super().__init__()
        self.fc, self.keeps_graph = nn.Linear(x[0].numel(), 5), keeps_graph

    def forward(self, x: Tensor) -> Tensor:
        out = self.fc((x > 0.5).float().flatten(1))
        return out + 0 * x.flatten(1)[:, :1] if self.keeps_graph else out


@pytest.mark.parametrize("keeps_graph", [True, False])
@pytest.mark.parametrize(
    "attack", [PGD(0.1, 3), APGD(0.1, 3), FAB(0.1, 3), Square(0.1, 20)], ids=lambda a: type(a).__name__
)
def test_a_model_without_gradients_can_be_attacked(attack, keeps_graph):
    """Nothing to climb by: the random start stays, or Square's queries find something."""
    torch.manual_seed(0)
    x, y = batch()
    got = attack(Thresholds(x, keeps_graph).eval(), x, y)
    assert (got - x).abs().max() <= 0.1 + 1e-6


X, Y = batch(4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((X * 255, Y), ["x:", "[0, 1]", "to 25"]),  # bytes as floats
        ((X - 0.5, Y), ["x:", "[0, 1]", "-0."]),  # normalised images
        ((X.where(X < 0.9, torch.nan), Y), ["x:", "finite", "nan"]),
        ((X.where(X < 0.9, torch.inf), Y), ["x:", "[0, 1]", "inf"]),
        ((X.bfloat16(), Y), ["x:", "float32", "bfloat16"]),  # would lose a 2/255 step
        (((X * 255).to(torch.uint8), Y), ["x:", "float32", "uint8"]),
        ((X[0, 0, 0], Y), ["x:", "[B, C, H, W]", "[6]"]),
        ((X, Y.int()), ["y:", "int64", "int32"]),
        ((X, Y[:3]), ["y:", "[4]", "[3]"]),
        ((X, F.one_hot(Y)), ["y:", "[4]", "[4, 4]"]),
        ((X, Y - 1), ["y:", ">= 0", "-1"]),
        ((X, Y + 3), ["y:", "below 5", "6"]),  # more classes than logits
        ((X, Y, torch.arange(3)), ["sample_index:", "[4]", "[3]"]),
        ((X, Y, torch.arange(4.0)), ["sample_index:", "int64", "float32"]),
    ],
)
def test_bad_inputs_name_argument_expected_and_got(network, arguments, words, state_of):
    network.train()
    before = state_of(network)
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        PGD(0.1, 1)(network, *arguments)
    for word in words:
        assert word in str(error.value)
    assert state_of(network) == before


def test_model_that_gives_no_logits_is_refused():
    with pytest.raises(ValueError, match=r"model: expected logits of shape \[4, classes\], got shape \[4, 2, 6, 6\]"):
        PGD(0.1, 1)(nn.Identity(), X, Y)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eps": -0.1}, ["eps", ">= 0", "-0.1"]),
        ({"eps": float("nan")}, ["eps", "finite", "nan"]),
        ({"alpha": -1.0}, ["alpha", ">= 0", "-1"]),
        ({"steps": -1}, ["steps", ">= 0", "-1"]),
        ({"restarts": 0}, ["restarts", ">= 1", "0"]),
        ({"restarts": 2, "random_start": False}, ["restarts", "without a random start"]),
        ({"norm": "L1"}, ["norm", "Linf, L2", "L1"]),
        ({"mode": "test"}, ["mode", "eval, train", "test"]),
        ({"eps": "8/255"}, ["eps: expected a number", "'8/255'"]),  # text is the configuration's
        ({"alpha": "2/255"}, ["alpha: expected a number", "'2/255'"]),
        ({"eps": None}, ["eps: expected a number", "None"]),
        ({"steps": 2.5}, ["steps: expected an integer", "2.5"]),
        ({"steps": "7"}, ["steps: expected an integer", "'7'"]),
        ({"steps": True}, ["steps: expected an integer", "True"]),
        ({"restarts": 1.0}, ["restarts: expected an integer", "1.0"]),
        ({"seed": "0"}, ["seed: expected an integer", "'0'"]),
    ],
)
def test_bad_settings_name_argument_expected_and_got(settings, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        PGD(**{"eps": 0.1, "steps": 2, **settings})
    for word in words:
        assert word in str(error.value)


def test_default_step_size():
    assert PGD(8 / 255, 20).alpha == 2.5 * (8 / 255) / 20


def test_built_attack_has_the_configured_settings():
    config = PGD.Config(eps="8/255", steps=3, alpha="2/255", norm="L2", restarts=2)
    attack = config.build(seed=5, mode="train")
    assert (attack.eps, attack.alpha, attack.norm, attack.restarts) == (8 / 255, 2 / 255, "L2", 2)
    assert (attack.seed, attack.mode, attack.steps, attack.random_start) == (5, "train", 3, True)
    with pytest.raises(ConfigError, match=r"attack.name: expected one of apgd-ce, .*, got 'pdg'; did you mean 'pgd'"):
        load_config(None, ["eval.attack=pdg"])


SETTINGS = {  # one that is nobody's default
    "steps": 3,
    "queries": 3,
    "alpha": "1/255",
    "random_start": False,
    "restarts": 2,
    "loss": "margin",
    "eot_iter": 4,
    "graph": False,
    "n_targets": 5,
    "version": "rand",
}
USED = {
    "pgd": {"steps", "alpha", "random_start", "restarts", "loss", "eot_iter", "graph"},
    "fgsm": {"alpha", "random_start", "loss", "eot_iter", "graph"},
    "apgd-ce": {"steps", "restarts", "eot_iter"},
    "apgd-dlr": {"steps", "restarts", "eot_iter"},
    "apgd-t": {"steps", "restarts", "eot_iter", "n_targets"},
    "fab": {"steps", "restarts"},
    "fab-t": {"steps", "restarts", "n_targets"},
    "square": {"queries", "restarts", "loss"},
    "autoattack": {"steps", "restarts", "version"},
    "steering": {"steps", "alpha", "random_start", "restarts", "loss", "eot_iter", "graph"},
}


def built_with(attack: Attack, setting: str) -> object:
    values = {"loss": "loss_name", "queries": "steps"}
    if setting == "graph":
        return attack.graphs.graph
    return getattr(attack, values.get(setting, setting))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ATTACKS)
def test_a_setting_reaches_the_attack_or_is_refused(name, setting):
    given = json.dumps(SETTINGS[setting])
    chosen = [f"eval.attack.name={name}", f"eval.attack.{setting}={given.strip(chr(34))}"]
    if setting in USED[name]:
        expected = 1 / 255 if setting == "alpha" else SETTINGS[setting]
        assert built_with(load_config(None, chosen).eval.attack.build(), setting) == expected
        return
    with pytest.raises(ConfigError, match=rf"^override: unknown key 'eval\.attack\.{setting}' of attack '{name}'"):
        load_config(None, chosen)


def test_names_of_one_attack_decide_its_arguments():
    built = {name: ATTACKS[name]().build() for name in ATTACKS}
    assert [built[f"apgd-{name}"].loss_name for name in ("ce", "dlr", "t")] == ["ce", "dlr", "dlr-targeted"]
    assert (built["fab"].targeted, built["fab-t"].targeted) == (False, True)
    assert {name: type(attack) for name, attack in built.items()} == {name: ATTACKS[name].owner for name in ATTACKS}


@pytest.mark.parametrize("name", ATTACKS)
def test_another_name_keeps_the_ball(name):
    chosen = ["eval.attack.eps=4/255", f"eval.attack.name={name}"]
    assert load_config(None, chosen).eval.attack.build().eps == 4 / 255
    base = {"eval": {"attack": {"name": "pgd", "eps": "4/255", "norm": "L2"}}}
    attack = config_from_dict(base, [f"eval.attack={name}"]).eval.attack
    assert (attack.name, attack.eps, attack.norm) == (name, Fraction(4, 255), "L2")


def test_rules_of_the_constructor_hold_for_a_configuration():
    with pytest.raises(ConfigError, match=r"^eval\.attack\.restarts: expected 1 without a random start, got 2"):
        load_config(None, ["eval.attack.restarts=2", "eval.attack.random_start=false"])
    with pytest.raises(ConfigError, match=r"^eval\.attack\.random_start: expected True with loss='kl'"):
        load_config(None, ["eval.attack=fgsm", "eval.attack.loss=kl"])


def test_an_attack_from_outside_has_settings_of_its_own():
    @ATTACKS.register("still")
    class Still(PGD):
        @dataclass(frozen=True, kw_only=True)
        class Config(PGD.Config):
            pull: float = setting(1.0, "factor of every step", at_least=0)

        def __init__(self, *args, pull: float, **settings) -> None:
            super().__init__(*args, **settings)
            self.alpha *= pull

    try:
        chosen = ["eval.attack.name=still", "eval.attack.pull=0.5", "eval.attack.alpha=2/255"]
        attack = load_config(None, chosen).eval.attack
        assert (type(attack.build()), attack.build().alpha) == (Still, 1 / 255)
        assert config_from_dict({"eval": {"attack": plain(attack)}}).eval.attack == attack
        with pytest.raises(ConfigError, match=r"eval.attack.pull: expected a number >= 0, got -1.0"):
            load_config(None, [*chosen, "eval.attack.pull=-1"])
    finally:
        del ATTACKS._entries["still"]
