"""Settings that several methods share, each in a class of its own: another method of the same class keeps them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from robust_moe.attacks import PGD, Attack
from robust_moe.settings import Config, ConfigError, setting

__all__ = ["AttackOptions", "BetaOption", "FormOption", "LabelSmoothing", "StepsSchedule"]


@dataclass(frozen=True, kw_only=True)
class LabelSmoothing(Config):
    """Of methods whose cross-entropy may have smoothed labels."""

    label_smoothing: float = setting(
        0.0,
        "share of a label that all classes get alike in the cross-entropy trained on; 0: off",
        at_least=0,
        below=1,
    )


@dataclass(frozen=True, kw_only=True)
class AttackOptions(Config):
    """Of methods that train on adversarial images."""

    attack: Attack.Config = setting(PGD.Config(alpha=Fraction(2, 255)), "that makes the adversarial images")
    attack_mode: Literal["eval", "train"] = setting("eval", "the model's mode while adversarial images are made")
    train_mode: Literal["train", "eval"] = setting(
        "train", "the model's mode while weights are trained; eval: with BN statistics that stay as they are"
    )

    def check(self) -> None:
        super().check()
        if self.train_mode == "eval" and self.attack_mode == "train":
            raise ConfigError("attack_mode: expected eval with train_mode=eval, which keeps BN statistics, got 'train'")

    def expect_attack(self, why: str, **expected: Collection[Any]) -> None:
        """Raise :class:`ConfigError` where a setting of the attack is none of those that the method heeds."""
        for key, values in expected.items():
            got = getattr(self.attack, key)
            if got not in values:
                raise ConfigError(
                    f"attack.{key}: expected {' or '.join(map(repr, values))} for method.name={self.name}, {why}, got "
                    f"{got!r}"
                )

    def expect_single_pgd(self) -> None:
        """Raise :class:`ConfigError` for an attack that is not PGD from one random start with the usual loss: the
        method's own attack has its steps, and a loss of its own."""
        why = "whose attack has a loss of its own"
        self.expect_attack(why, name=["pgd"], restarts=[1], loss=["ce"], random_start=[True])


@dataclass(frozen=True, kw_only=True)
class StepsSchedule(AttackOptions):
    """Of methods whose attack may have few steps in the beginning and more later."""

    attack_steps_schedule: tuple[tuple[float, ...], ...] = setting(
        (),
        "[share of the run, steps] pairs, e.g. [[0, 2], [0.4, 5]]: the attack's steps from that share on; "
        "[]: attack.steps",
    )

    def check(self) -> None:
        super().check()
        schedule = self.attack_steps_schedule
        shares = [piece[0] for piece in schedule if piece]
        steps = [piece[1] for piece in schedule if len(piece) == 2]
        ok = len(steps) == len(schedule) and shares[:1] in ([], [0]) and sorted(set(shares)) == shares
        ok = ok and all(share < 1 for share in shares)
        if not (ok and all(count >= 1 and count.is_integer() for count in steps)):
            raise ConfigError(
                "attack_steps_schedule: expected [share of the run, steps] pairs: shares rising strictly from 0 and "
                f"below 1, whole steps >= 1, got {[list(piece) for piece in schedule]}"
            )
        if schedule:
            why = "whose number of steps follows a schedule (method.attack_steps_schedule)"
            self.expect_attack(why, name=["pgd"])


@dataclass(frozen=True, kw_only=True)
class BetaOption(Config):
    """Of methods that weigh a robustness term."""

    beta: float = setting(6.0, "factor of the robustness term", at_least=0)


@dataclass(frozen=True, kw_only=True)
class FormOption(Config):
    """Of methods whose released code computes something else than their paper says."""

    form: Literal["paper", "released"] = setting("paper", "released: what the authors' code computes")
