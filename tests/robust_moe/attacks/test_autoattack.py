"""AutoAttack: the same as its attacks one after the other by hand, whatever the batches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from robust_moe.attacks import APGD, FAB, PGD, Attack, AutoAttack, Counts, Found, Square
from robust_moe.attacks.autoattack import MEMBERS, members
from robust_moe.attacks.pace import Pace, clock
from robust_moe.evaluation.stages import describe_attack
from robust_moe.seeding import derive_seed

EPS = {"Linf": 0.15, "L2": 0.9}


class Counting(nn.Module):
    """Counts the images that go forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.images = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.model(x)


def small(eps: float, norm: str) -> list[Attack]:
    return [
        APGD(eps, 3, norm),
        APGD(eps, 4, norm, "dlr-targeted", n_targets=3),
        FAB(eps, 4, norm, targeted=True, n_targets=3),
        Square(eps, 60, norm),
    ]


NAMES = ["apgd", "apgd 2", "fab", "square"]


@pytest.mark.parametrize("norm", list(EPS))
def test_each_attack_gets_what_those_before_it_left(victim, norm):
    """By hand, image by image, in float64: an image does not feel its batch."""
    model, x, y = copy.deepcopy(victim.model).double(), victim.x.double(), victim.y.clone()
    y[:4] = (model(x[:4]).argmax(1) + 1) % 10  # wrong from the start
    index = torch.arange(len(y)) + 7
    expected, left, broke = x.clone(), model(x).argmax(1) == y, []
    for name, attack in zip(NAMES, small(EPS[norm], norm), strict=True):
        attack.seed = derive_seed(3, name)
        rows = left.nonzero()[:, 0]
        images = attack(model, x[rows], y[rows], index[rows])
        fooled = model(images).argmax(1) != y[rows]
        expected[rows[fooled]] = images[fooled]
        left[rows[fooled]] = False
        broke.append(int(fooled.sum()))
    assert broke[0] > 10
    assert sum(broke[1:]) > 0
    assert 10 < left.sum() < 80
    for batch_size in (96, 17):
        attack = AutoAttack(EPS[norm], norm, "custom", small(EPS[norm], norm), seed=3, batch_size=batch_size)
        torch.testing.assert_close(attack(model, x, y, index), expected, rtol=0, atol=1e-9)
    assert torch.equal(expected[:4], x[:4])
    assert torch.equal(expected[left], x[left])


def test_an_image_goes_to_no_attack_once_it_is_broken():
    """Images of one value: the first attack breaks those above 0.5, the second those above 0.3."""

    class Given(Attack):
        def __init__(self, reach: float) -> None:
            super().__init__(steps=0)
            self.reach, self.given = reach, []

        passes = (0, 0)

        def run(self, passes, x0, sample_index, seed):
            self.given.append(sample_index.tolist())
            return torch.where(x0 > self.reach, 1.0, x0)

    class Bright(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([torch.ones(len(x)), 2.0 * (x.amax((1, 2, 3)) == 1)], 1)

    x = torch.tensor([0.6, 0.1, 0.4, 1.0, 0.7, 0.2])[:, None, None, None].expand(6, 1, 2, 2)
    first, second = Given(0.5), Given(0.3)
    attack = AutoAttack(1.0, version="custom", attacks=[first, second], batch_size=3)
    got = attack(Bright(), x, torch.zeros(6, dtype=torch.int64), torch.arange(6) * 10)
    assert first.given == [[0, 10, 20], [40, 50]]  # the fourth is misclassified from the start
    assert second.given == [[10, 20, 50]]  # put together anew
    assert got.amax((1, 2, 3)).tolist() == pytest.approx([1, 0.1, 1, 1, 1, 0.2])


def test_the_standard_is_the_standard():
    attacks = AutoAttack(8 / 255).attacks
    assert list(attacks) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    ce, targeted, fab, square = attacks.values()
    assert (ce.loss_name, ce.steps, ce.restarts, ce.rho) == ("ce", 100, 1, 0.75)
    assert (targeted.loss_name, targeted.steps, targeted.n_targets) == ("dlr-targeted", 100, 9)
    assert (fab.targeted, fab.steps, fab.n_targets, fab.alpha_max, fab.eta, fab.beta) == (True, 100, 9, 0.1, 1.05, 0.9)
    assert (square.steps, square.p_init, square.loss_name) == (5000, 0.8, "margin")
    assert {attack.eps for attack in attacks.values()} == {8 / 255}
    assert len({attack.seed for attack in attacks.values()}) == 4
    random = AutoAttack(0.5, "L2", "rand").attacks
    assert [(a.loss_name, a.eot_iter, a.norm) for a in random.values()] == [("ce", 20, "L2"), ("dlr", 20, "L2")]


def test_members_alone_draw_what_they_draw_together(victim):
    model, x, y = victim
    whole = AutoAttack(0.15, version="custom", attacks=["apgd-ce"], seed=5, steps=3)(model, x, y)
    attack = members(0.15, seed=5, steps=3)["apgd-ce"]
    alone = attack.find(model, x, y)
    clean = model(x).argmax(1) == y
    assert torch.equal(whole[alone.fooled & clean], alone.images[alone.fooled & clean])


def test_names_and_attacks_mix_and_repeat():
    attack = AutoAttack(0.1, version="custom", attacks=["apgd-dlr", PGD(0.1, 5), "apgd-dlr", PGD(0.1, 3)], steps=7)
    assert list(attack.attacks) == ["apgd-dlr", "pgd", "apgd-dlr 2", "pgd 2"]
    assert [each.steps for each in attack.attacks.values()] == [7, 5, 7, 3]
    for name in MEMBERS:
        assert AutoAttack(0.1, version="custom", attacks=[name]).attacks.keys() == {name}


def test_every_attack_has_a_seed_of_its_own():
    square = Square(0.1, 50, seed=9)
    attack = AutoAttack(0.1, version="custom", attacks=["square", square, "square"], seed=5)
    other = AutoAttack(0.1, version="custom", attacks=["square", square, "square"], seed=6)
    seeds = [each.seed for each in (*attack.attacks.values(), *other.attacks.values())]
    assert len(set(seeds)) == 6
    assert attack.attacks["square"].seed == members(0.1, seed=5)["square"].seed
    assert square.seed == 9  # the caller's is left alone


def test_passes_are_counted(victim):
    model, counts = Counting(victim.model), Counts()
    AutoAttack(0.15, version="custom", attacks=small(0.15, "Linf"))(model, victim.x, victim.y, counts=counts)
    assert counts.forward == model.images
    robust = AutoAttack(1e-6, "L2", "custom", small(1e-6, "L2"))  # in L∞ Square asks less on a CPU
    model.images, counts = 0, Counts()
    right = int((victim.model(victim.x).argmax(1) == victim.y).sum())
    robust(model, victim.x, victim.y, counts=counts)
    assert counts.forward == model.images
    # FAB and Square do not say whom they fooled: one forward more each
    assert counts.forward == 96 + right * (robust.passes[0] - 1 + 2)
    assert counts.backward == right * robust.passes[1]


@pytest.mark.parametrize(
    "attack", [PGD(0.15, 3), FAB(0.15, 5), Square(0.15, 30), APGD(0.15, 4)], ids=lambda attack: type(attack).__name__
)
def test_every_attack_says_whom_it_fooled(victim, attack):
    model, x, y = victim
    counting, counts = Counting(model), Counts()
    found = attack.find(counting, x, y, counts=counts)
    assert isinstance(found, Found)
    assert torch.equal(found.images, attack(model, x, y))
    assert torch.equal(found.fooled, model(found.images).argmax(1) != y)
    assert 0.1 < found.fooled.float().mean() < 0.9
    assert counts.forward == counting.images
    assert [len(part) for part in attack.find(model, x[:0], y[:0])] == [0, 0, 0]


@pytest.mark.parametrize(
    "attack",
    [APGD(0.12, 5, loss="dlr-targeted", n_targets=5), FAB(0.12, 5, targeted=True, n_targets=5, restarts=2)],
    ids=lambda attack: type(attack).__name__,
)
def test_with_room_the_targets_of_few_images_run_together(victim, attack):
    """Fewer and larger forwards, and the same images: in float64, where the batch is not felt."""
    model, x, y = copy.deepcopy(victim.model).double(), victim.x[:9].double(), victim.y[:9]
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    few = attack(model, x, y)
    calls, largest = len(sizes), max(sizes)
    sizes.clear()
    together = attack(model, x, y, room=96)
    handle.remove()
    torch.testing.assert_close(together, few, rtol=0, atol=1e-9)
    assert largest == 9
    assert 9 < max(sizes) <= 96
    assert len(sizes) < 0.8 * calls


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"version": "plus"}, "version: expected one of standard, rand, custom, got 'plus'"),
        ({"version": "custom"}, "attacks: expected at least one with version='custom', got None"),
        ({"attacks": ["square"]}, "attacks: expected None with version='standard' (use 'custom'), got ['square']"),
        (
            {"version": "custom", "attacks": ["apgd"]},
            "attacks[0]: expected one of apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square, or an Attack, got 'apgd'",
        ),
        ({"version": "custom", "attacks": ["square", 3]}, "attacks[1]: expected a name or an Attack, got 3"),
        (
            {"version": "custom", "attacks": [PGD(0.1, 1, mode="train")]},
            "attacks[0].mode: expected 'eval', that of all, got 'train'",
        ),
        (
            {"version": "custom", "attacks": [PGD(0.4, 1)]},
            "attacks[0].eps: expected 0.1, that of all, got 0.4",
        ),
        (
            {"version": "custom", "attacks": ["square", PGD(0.1, 1, norm="L2")]},
            "attacks[1].norm: expected 'Linf', that of all, got 'L2'",
        ),
        ({"batch_size": 0}, "batch_size: expected a count >= 1, got 0"),
        ({"eps": -1}, "eps: expected a finite number >= 0, got -1"),
        ({"norm": "L1"}, "norm: expected one of Linf, L2, got 'L1'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError) as error:
        AutoAttack(**{"eps": 0.1} | settings)
    assert str(error.value) == message


def test_verbose_says_one_line_for_each_attack_and_changes_no_image(victim, capsys):
    model, x, y = victim
    settings = {"version": "custom", "attacks": ["apgd-ce", "fab", "square"], "seed": 3, "batch_size": 40, "steps": 3}
    quiet = AutoAttack(0.15, **settings)(model, x, y)
    assert capsys.readouterr().out == ""  # off by default
    attack = AutoAttack(0.15, **settings, verbose=True)
    assert torch.equal(attack(model, x, y), quiet)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["apgd-ce", "fab", "square"]
    right = int((model(quiet).argmax(1) == y).sum())
    last = f"square: {right} of {len(x)} images left, robust accuracy {right / len(x):.1%}, "
    assert lines[-1].startswith(last)
    assert [", ETA " in line for line in lines] == [True, True, False]
    told = []
    AutoAttack(0.15, **settings, verbose=told.append)(model, x, y)
    assert [line.partition(", robust")[0] for line in told] == [line.partition(", robust")[0] for line in lines]
    with pytest.raises(ValueError, match="verbose: expected True, False or a function, got 3"):
        AutoAttack(0.15, verbose=3)
    assert describe_attack(attack) == describe_attack(AutoAttack(0.15, **settings))  # nor any result's identity


def test_the_time_left_follows_from_the_passes_of_the_attacks_to_come():
    model = nn.Flatten()
    pgd = PGD(0.1, 10)  # 10 forwards and 10 backwards an image
    pace = Pace(model)
    assert pace.left([(pgd, 100)]) == 0.0  # nothing is known yet
    line = pace.line("a", passes=400, seconds=8.0, left=1500, robust=1200, count=2000, to_come=[(pgd, 1500), (pgd, 25)])
    # 1,525 images of 20 passes at 50 passes a second
    assert line == "a: 1,500 of 2,000 images left, robust accuracy 60.0%, 8.0 s, ETA 10:10"
    assert pace.line("b", passes=0, seconds=0.0, left=4, robust=4, count=2000, to_come=[]).endswith(" 0.2%, 0.0 s")
    assert [clock(seconds) for seconds in (0, 59.6, 3599, 3600, 36610)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "10:10:10",
    ]
