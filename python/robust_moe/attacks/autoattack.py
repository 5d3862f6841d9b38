"""AutoAttack (Croce and Hein, 2020, arXiv:2003.01690): attacks in turn, each on what the ones before have left."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from robust_moe.attacks.base import MOST_RESTARTS, MOST_STEPS, Attack, expect_length, expect_number, per_sample
from robust_moe.attacks.pace import Pace
from robust_moe.attacks.passes import Passes
from robust_moe.attacks.square import Square
from robust_moe.attacks.table import ATTACKS
from robust_moe.console import print_line
from robust_moe.seeding import derive_seed
from robust_moe.settings import setting
from robust_moe_kernels.checks import expect

__all__ = ["MEMBERS", "VERSIONS", "AutoAttack", "members"]

QUERIES_A_STEP = 50  # of Square, for every step of the gradient attacks: 5000 and 100 in the standard


MEMBERS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")  # names in ATTACKS
VERSIONS = {"standard": ("apgd-ce", "apgd-t", "fab-t", "square"), "rand": ("apgd-ce", "apgd-dlr")}
_DRAWS = 20  # over which "rand" averages a gradient


def _member(name: str, eps: float, steps: int, **settings: Any) -> Attack:
    attack = ATTACKS[name]
    length = {"queries": QUERIES_A_STEP * steps} if attack.owner is Square else {"steps": steps}
    return attack.owner(eps, **length, **attack.fixed, **settings)


def members(
    eps: float, norm: str = "Linf", version: str = "standard", seed: int = 0, *, steps: int = 100, **settings: Any
) -> dict[str, Attack]:
    """The attacks of a version by name, each with the seed that it has in :class:`AutoAttack`; ``settings``:
    ``restarts`` and ``mode``.

    Raises:
        ValueError: another version, or a bad setting.
    """
    expect(version in VERSIONS, "version", f"one of {', '.join(VERSIONS)}", repr(version))
    if version == "rand":
        settings["eot_iter"] = _DRAWS
    return {
        name: _member(name, eps, steps, norm=norm, seed=derive_seed(seed, name), **settings)
        for name in VERSIONS[version]
    }


def _named(
    attacks: Sequence[str | Attack], own: Mapping[str, object], seed: int, make: Callable[[str], Attack]
) -> dict[str, Attack]:
    """Attacks by name, a second one of a name with its number, each with a seed made of that name; ``own``: what an
    attack that is given must have in common with the others."""
    named: dict[str, Attack] = {}
    for place, entry in enumerate(attacks):
        if isinstance(entry, str):
            expect(entry in MEMBERS, f"attacks[{place}]", f"one of {', '.join(MEMBERS)}, or an Attack", repr(entry))
            name, attack = entry, make(entry)
        else:
            expect(isinstance(entry, Attack), f"attacks[{place}]", "a name or an Attack", repr(entry))
            for setting, value in own.items():
                got = getattr(entry, setting, value)
                expect(got == value, f"attacks[{place}].{setting}", f"{value!r}, that of all", repr(got))
            name, attack = type(entry).__name__.lower(), copy.copy(entry)
        same = sum(other == name or other.startswith(f"{name} ") for other in named)
        name = f"{name} {same + 1}" if same else name
        attack.seed = derive_seed(seed, name)
        named[name] = attack
    return named


@ATTACKS.register("autoattack")
class AutoAttack(Attack):
    """A sequence of attacks, each on the images that none before has broken, put together anew into batches.

    ``"standard"``: APGD on the cross-entropy, targeted APGD and targeted FAB (nine targets; the classes but one where
    there are fewer), Square with 5000 queries. ``"rand"``, for models that draw random numbers: APGD on the
    cross-entropy and on DLR, gradients averaged over 20 draws. An image comes back as the first attack to break it left
    it, and unchanged where none did or where it is misclassified already.

    For numbers with masks, costs and warnings by attack, and to go on after a crash, see
    :func:`robust_moe.evaluation.run_suite`, which runs the same attacks.

    Args:
        eps: radius of the ball, >= 0, pixels being in [0, 1].
        norm: ``"Linf"`` or ``"L2"``.
        version: ``"standard"``, ``"rand"``, or ``"custom"``: what ``attacks`` lists.
        attacks: for ``"custom"``: names of :data:`MEMBERS`, with the settings given here, or attacks with their own, of
            the same ``eps``, ``norm`` and ``mode``.
        seed: each attack draws from a seed made of this one and its name; an attack's own is not used.
        batch_size: images a forward, >= 1; the result does not depend on it, but for rounding.
        steps: of the gradient attacks, >= 0; Square makes 50 times as many queries. The standard is 100.
        restarts: of each attack, >= 1. The standard is 1.
        mode: see :class:`~robust_moe.attacks.base.Attack`.
        verbose: True: prints one line for each attack as it ends: the images that it left, the robust accuracy after it
            (of all images of the call), its seconds and, from its speed, the time that the other attacks will take at
            most. A function takes these lines instead, such as :meth:`robust_moe.engine.Reporter.line`. Images do not
            depend on it.

    Raises:
        ValueError: a value of another type or out of its range; attacks without "custom", or none with it, or of
            another ball.
    """

    keeps_all = False

    @dataclass(frozen=True, kw_only=True)
    class Config(Attack.Config):
        """Settings of AutoAttack."""

        version: Literal["standard", "rand"] = setting("standard", "rand is for models that draw random numbers")
        steps: int = setting(
            100,
            "of the gradient attacks; Square makes 50 times as many queries",
            at_least=0,
            at_most=MOST_STEPS // QUERIES_A_STEP,
        )
        restarts: int = setting(1, "of each attack", at_least=1, at_most=MOST_RESTARTS)

    def __init__(
        self,
        eps: float,
        norm: str = "Linf",
        version: str = "standard",
        attacks: Sequence[str | Attack] | None = None,
        seed: int = 0,
        batch_size: int = 256,
        *,
        steps: int = 100,
        restarts: int = 1,
        mode: str = "eval",
        verbose: bool | Callable[[str], object] = False,
    ) -> None:
        super().__init__(steps=steps, restarts=restarts, seed=seed, mode=mode)
        expect(isinstance(verbose, bool) or callable(verbose), "verbose", "True, False or a function", repr(verbose))
        expect_length("eps", eps)
        expect_number("batch_size", batch_size, Integral)
        expect(batch_size >= 1, "batch_size", "a count >= 1", batch_size)
        versions = (*VERSIONS, "custom")
        expect(version in versions, "version", f"one of {', '.join(versions)}", repr(version))
        if version == "custom":
            given = attacks or ()
            expect(bool(given), "attacks", "at least one with version='custom'", attacks)
            settings: dict[str, Any] = {"norm": norm, "restarts": restarts, "mode": mode}
            own = {"eps": float(eps), "norm": norm, "mode": mode}
            self.attacks = _named(given, own, seed, lambda name: _member(name, eps, steps, **settings))
        else:
            expect(attacks is None, "attacks", f"None with version={version!r} (use 'custom')", attacks)
            self.attacks = members(eps, norm, version, seed, steps=steps, restarts=restarts, mode=mode)
        self.eps = float(eps)
        self.norm = norm
        self.version = version
        self.batch_size = batch_size
        self._say = print_line if verbose is True else verbose or None  # private: no setting that decides a result

    @property
    def passes(self) -> tuple[int, int]:
        """(forwards, backwards) of the attacks on an image that stays robust, and the clean forward; what FAB and
        Square found is looked at with one forward each more."""
        costs = [attack.passes for attack in self.attacks.values()]
        return 1 + sum(forward for forward, _ in costs), sum(backward for _, backward in costs)

    def run(self, passes: Passes, x0: Tensor, sample_index: Tensor | None, seed: int) -> Tensor:
        """Reads the host between attacks, also from :meth:`craft`."""
        index = torch.arange(len(x0), device=x0.device) if sample_index is None else sample_index
        with torch.no_grad():
            logits = torch.cat([passes.logits(part) for part in x0.split(self.batch_size)])
        passes.tally.flag(torch.isnan(logits).any())
        out, left = x0.clone(), (logits.argmax(1) == passes.y).nonzero()[:, 0]
        how: dict[str, Any] = {"largest_label": passes.largest_label, "reads": True, "room": self.batch_size}
        pace, attacks = Pace(passes.model), list(self.attacks.values())
        for place, (name, attack) in enumerate(self.attacks.items(), 1):
            kept, began, before = [], time.perf_counter(), passes.tally.counts.total
            for rows in left.split(self.batch_size) if len(left) else ():
                images = x0[rows]
                one = attack.aim(passes.model, images, passes.y[rows], passes.tally, **how)
                found = attack.search(one, images, index[rows], derive_seed(seed, name))
                out[rows] = torch.where(per_sample(found.fooled, x0), found.images, images)
                kept.append(rows[~found.fooled])
            left = torch.cat(kept) if kept else left
            if self._say is not None:
                line = pace.line(
                    name,
                    passes=passes.tally.counts.total - before,
                    seconds=time.perf_counter() - began,
                    left=len(left),
                    robust=len(left),
                    count=len(x0),
                    to_come=[(each, len(left)) for each in attacks[place:]],
                )
                self._say(line)
        return out
