"""How long attacks will still take, and the line that says so: for AutoAttack in Python and for whole evaluations."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from robust_moe.attacks.base import Attack

__all__ = ["Pace", "clock"]


def clock(seconds: float) -> str:
    """E.g. ``"3:05"``, or ``"2:03:05"`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Pace:
    """The speed of the attacks that have ended, in passes a second, and from it the time of those to come.

    Forward and backward passes count alike. An attack to come is taken to break no image, so that it has the most
    passes that it can: the time left is rather too long than too short.

    Args:
        model: what is attacked.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.passes, self.seconds = 0, 0.0

    def left(self, to_come: Iterable[tuple[Attack, int]]) -> float:
        """Seconds of the attacks ``to_come``, each with its number of images."""
        if not self.passes:
            return 0.0
        passes = sum(images * sum(attack.most_passes(self.model)) for attack, images in to_come)
        return passes * self.seconds / self.passes

    def line(
        self,
        name: str,
        *,
        passes: int,
        seconds: float,
        left: int,
        robust: int,
        count: int,
        to_come: Iterable[tuple[Attack, int]],
    ) -> str:
        """One line for an attack that has ended, which from now on is part of the speed.

        Args:
            name: of the attack.
            passes, seconds: what it cost.
            left: images that it did not break.
            robust: images that are right clean and after every attack so far.
            count: images in all.
            to_come: attacks that follow, each with its number of images.
        """
        self.passes, self.seconds = self.passes + passes, self.seconds + seconds
        to_come = list(to_come)
        text = f"{name}: {left:,} of {count:,} images left, robust accuracy {robust / count:.1%}, {seconds:.1f} s"
        return f"{text}, ETA {clock(self.left(to_come))}" if to_come else text
