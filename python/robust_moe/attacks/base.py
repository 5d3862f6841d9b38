"""What attacks share: input checks, the model's mode, the NaN guard."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from robust_moe.attacks.losses import cross_entropy
from robust_moe.attacks.passes import Counts, Passes, Tally
from robust_moe.attacks.table import ATTACKS
from robust_moe.settings import Config as Settings
from robust_moe.settings import ConfigError, Table, setting
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules.attack_mode import MODES, attack_mode

__all__ = ["Attack", "Crafted", "Found"]

# Of a configuration, which may come from anyone: an attack plans its steps and starts before the first of them.
MOST_STEPS, MOST_RESTARTS = 10**6, 10**4


class Crafted(NamedTuple):
    """Adversarial images that no host has looked at yet."""

    images: Tensor  # as the clean images: same shape and dtype, in [0, 1], detached
    nonfinite: Tensor  # bool scalar on the device: some gradient or loss on the way was NaN or infinite


class Found(NamedTuple):
    """What an attack found for each sample."""

    images: Tensor  # [B, ...]: where several were met that fool, or none, the attack says which one this is
    fooled: Tensor  # bool [B]: the attack has won
    loss: Tensor  # [B], of the images, or the highest on the way to them


def expect_number(name: str, value: object, kind: type[object] = Real) -> None:
    """Refuse text, booleans and tensors; ``kind``: Real or Integral."""
    ok = isinstance(value, kind) and not isinstance(value, bool)
    expect(ok, name, "an integer" if kind is Integral else "a number", repr(value))


def expect_length(name: str, value: float) -> None:
    """Refuse what is no finite number >= 0."""
    expect_number(name, value)
    expect(math.isfinite(value) and value >= 0, name, "a finite number >= 0", value)


def check_inputs(x: Tensor, y: Tensor, sample_index: Tensor | None) -> int:
    """Refuse what no attack can work on; returns the largest label. Reads the host once.

    The largest label is compared with the number of logits at the first forward, before the loss sees it: on a GPU an
    out-of-range label would abort the whole process.
    """
    expect(x.dtype in (torch.float32, torch.float64), "x", "float32 or float64 images", x.dtype)
    expect(x.ndim >= 2, "x", "a batch of images [B, C, H, W]", f"shape {list(x.shape)}")
    expect(y.dtype == torch.int64, "y", "int64 labels", y.dtype)
    expect(y.shape == x.shape[:1], "y", f"labels of shape [{x.shape[0]}]", f"shape {list(y.shape)}")
    expect(y.device == x.device, "y", f"labels on {x.device}", y.device)
    if sample_index is not None:
        expect(sample_index.dtype == torch.int64, "sample_index", "int64 positions", sample_index.dtype)
        ok = sample_index.shape == y.shape
        expect(ok, "sample_index", f"shape [{x.shape[0]}]", f"shape {list(sample_index.shape)}")
        expect(sample_index.device == x.device, "sample_index", f"positions on {x.device}", sample_index.device)
    if x.numel() == 0:
        return -1
    bounds = [x.min(), x.max(), y.min(), y.max()]  # min and max propagate NaN
    low, high, first, last = torch.stack([bound.double() for bound in bounds]).tolist()
    expect(low >= 0 and high <= 1, "x", "finite pixels in [0, 1]", f"values from {low:g} to {high:g}")
    expect(first >= 0, "y", "labels >= 0", f"a label of {first:g}")
    return int(last)


def ordinary(tensor: Tensor) -> Tensor:
    """A tensor that autograd may save: one made in inference mode is copied."""
    return tensor.clone() if tensor.is_inference() else tensor


def _apart(images: Tensor, x: Tensor) -> Tensor:
    """``images`` in memory of their own: with no steps and no random start they may be the caller's."""
    return images.clone() if images.data_ptr() == x.data_ptr() else images


class Attack(ABC):
    """An attack: settings to the constructor, ``(model, x, y)`` to the call, adversarial images back.

    A subclass gives :meth:`run` and :attr:`passes`, and may replace :meth:`prepare`, :meth:`search`, :meth:`loss` and
    :meth:`fooled`.
    With ``@ATTACKS.register("name")`` and a ``Config`` whose fields are arguments of its constructor, a configuration
    can choose it by that name, from outside the package too.

    Calling the attack, or :meth:`find`, which also tells who was fooled, checks the inputs and raises; :meth:`craft`
    does neither, and reads the host only where the attack says so, for training loops that gather the flag themselves.

    Args:
        steps: gradient steps, >= 0.
        restarts: independent starts, >= 1.
        seed: of the random start; the result depends on (seed, sample index, restart) only, not on the batch size.
        eot_iter: forwards and backwards over which each gradient is averaged, >= 1: more than one for models that draw
            random numbers, such as noisy gates (Athalye et al., 2018, arXiv:1802.00420).
        mode: mode of the model while it is attacked, ``"eval"`` or ``"train"``. In train mode BN statistics move and
            the result depends on the batch.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Settings):
        """What every attack in a configuration has: a ball in pixel space; images are in [0, 1]."""

        table: ClassVar[Table] = ATTACKS
        eps: Fraction = setting("8/255", "radius of the ball, a number or an exact fraction", at_least=0)
        norm: Literal["Linf", "L2"] = setting("Linf", "of the ball")

        def check(self) -> None:
            if self.norm == "Linf" and self.eps > 1:
                got = f"{float(self.eps):g}"
                raise ConfigError(
                    f"eps: expected a radius of Linf in [0, 1], as pixels are, or {self.eps}/255, got {got!r}"
                )
            if self.owner is not None:
                self.build()  # the constructor's own rules

        def build(self, *, seed: int = 0, mode: str = "eval", **changes: Any) -> Attack:
            """The attack.

            Args:
                seed: of its random choices.
                mode: the model's mode while it runs, ``"eval"`` or ``"train"``.
                changes: arguments of the constructor that replace settings.

            Raises:
                ConfigError: settings that do not go together; the message begins with a setting's name.
            """
            try:
                return self.owner(**{**self.arguments(), **changes, "seed": seed, "mode": mode})
            except ConfigError:
                raise
            except ValueError as error:
                raise ConfigError(str(error)) from error

        def arguments(self) -> dict[str, Any]:
            """Arguments of the constructor: the settings, lengths as floats, and what the name decides."""
            values = self.values() | dict(self.fixed)
            return {name: float(value) if isinstance(value, Fraction) else value for name, value in values.items()}

        @property
        def label(self) -> str:
            """A short name for files and tables, such as ``"pgd20"``, or ``"pgd20x5"`` with five restarts."""
            settings = self.values()
            restarts = settings.get("restarts", 1)
            return f"{self.name}{settings.get('steps', '')}{f'x{restarts}' if restarts > 1 else ''}"

    # Whether the forwards of :meth:`craft` do not depend on what is fooled. False: images leave on the way.
    keeps_all: ClassVar[bool] = True

    # Of a subclass that has a ball, from its constructor.
    eps: float  # radius, pixels being in [0, 1]
    norm: str  # "Linf" or "L2"

    def __init__(self, *, steps: int, restarts: int = 1, seed: int = 0, eot_iter: int = 1, mode: str = "eval") -> None:
        counts = (("steps", steps), ("restarts", restarts), ("seed", seed), ("eot_iter", eot_iter))
        for name, value in counts:
            expect_number(name, value, Integral)
        expect(steps >= 0, "steps", "a count >= 0", steps)
        expect(restarts >= 1, "restarts", "a count >= 1", restarts)
        expect(eot_iter >= 1, "eot_iter", "a count >= 1", eot_iter)
        expect(mode in MODES, "mode", f"one of {', '.join(MODES)}", repr(mode))
        self.steps = steps
        self.restarts = restarts
        self.seed = seed
        self.eot_iter = eot_iter
        self.mode = mode

    @property
    @abstractmethod
    def passes(self) -> tuple[int, int]:
        """(forwards, backwards) that :meth:`prepare` and :meth:`run` make on one batch."""

    def most_passes(self, model: nn.Module) -> tuple[int, int]:
        """The most (forwards, backwards) that an image can cost on ``model``: of one that nothing fools."""
        return self.passes

    def prepare(self, passes: Passes, x0: Tensor) -> Passes:
        """``passes`` with the loss of this attack on the clean images ``x0``, called once before :meth:`run`: where the
        loss compares with more than the labels, ``dataclasses.replace(passes, loss=..., extras=...)``."""
        return passes

    @abstractmethod
    def run(self, passes: Passes, x0: Tensor, sample_index: Tensor | None, seed: int) -> Tensor:
        """The loop: adversarial images of ``x0``. Reads the host only where ``passes.reads``."""

    def search(self, passes: Passes, x0: Tensor, sample_index: Tensor | None, seed: int) -> Found:
        """:meth:`run`, and a forward more to see what came of it."""
        images = self.run(passes, x0, sample_index, seed)
        return Found(images, *passes.score(images))

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Loss of each sample, [B], that the attack raises: cross-entropy, in fp32 at least."""
        return cross_entropy(logits, y)

    def fooled(self, logits: Tensor, y: Tensor) -> Tensor:
        """Whether the attack has won, bool [B]: the sample is misclassified."""
        return logits.argmax(1) != y

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        sample_index: Tensor | None = None,
        *,
        room: int | None = None,
        counts: Counts | None = None,
    ) -> Tensor:
        """Adversarial images of ``x``, detached, of its shape and dtype, in the ball and in [0, 1].

        Args:
            model: maps [B, C, H, W] in [0, 1] to logits [B, classes]; left exactly as found.
            x: float32 or float64 [B, C, H, W] in [0, 1].
            y: int64 [B], labels in 0..classes-1, on the device of ``x``.
            sample_index: int64 [B], position of each image in its data set, the counter of its random start; None: the
                position in the batch.
            room: images that one forward may hold: up to so many climbs of few images run as one batch, in attacks
                with several targets or restarts; None: as many as ``x`` has.
            counts: grows by the passes made.

        Raises:
            ValueError: an input is of the wrong shape, dtype, device or range.
            FloatingPointError: the model gave a NaN or infinite gradient: the images would not be adversarial, and
                a score on them would count NaN as robust.
        """
        largest = check_inputs(x, y, sample_index)
        if x.numel() == 0:
            return x.detach().clone()
        with attack_mode(model, self.mode):
            x0, tally = ordinary(x.detach()), Tally(x.device, counts)
            passes = self.aim(model, x0, ordinary(y), tally, largest_label=largest, reads=True, room=room)
            images = self.run(passes, x0, sample_index, self.seed).detach()
        self.refuse_nonfinite(tally.nonfinite)
        return _apart(images, x)

    def find(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        sample_index: Tensor | None = None,
        *,
        room: int | None = None,
        counts: Counts | None = None,
    ) -> Found:
        """As calling the attack (its arguments and errors), with each sample's success and loss; a forward more, but
        in attacks that know them anyway."""
        largest = check_inputs(x, y, sample_index)
        if x.numel() == 0:
            return Found(x.detach().clone(), torch.zeros_like(y, dtype=torch.bool), torch.zeros_like(y, dtype=x.dtype))
        with attack_mode(model, self.mode):
            x0, tally = ordinary(x.detach()), Tally(x.device, counts)
            passes = self.aim(model, x0, ordinary(y), tally, largest_label=largest, reads=True, room=room)
            found = self.search(passes, x0, sample_index, self.seed)
        self.refuse_nonfinite(tally.nonfinite)
        return found._replace(images=_apart(found.images.detach(), x))

    def craft(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        sample_index: Tensor | None = None,
        *,
        seed: int | None = None,
        largest_label: int = -1,
    ) -> Crafted:
        """As calling the attack, without input checks and without reading the host; ``seed`` replaces the attack's."""
        with attack_mode(model, self.mode):
            x0, tally = ordinary(x.detach()), Tally(x.device)
            passes = self.aim(model, x0, ordinary(y), tally, largest_label=largest_label)
            adversarial = self.run(passes, x0, sample_index, self.seed if seed is None else seed).detach()
        return Crafted(_apart(adversarial, x), tally.nonfinite)

    def aim(
        self,
        model: nn.Module,
        x0: Tensor,
        y: Tensor,
        tally: Tally,
        *,
        largest_label: int = -1,
        reads: bool = False,
        room: int | None = None,
    ) -> Passes:
        """The objective of this attack on the images ``x0``, for :meth:`run` or :meth:`search`. The model is in the
        attack's mode. Arguments: see :class:`~robust_moe.attacks.passes.Passes`; ``room`` None: as many as ``x0`` has.
        """
        return self.prepare(
            Passes(
                *(model, y, self.loss, self.fooled, tally),
                draws=self.eot_iter,
                mode=self.mode,
                largest_label=largest_label,
                reads=reads,
                room=max(room or 0, len(y)),
            ),
            x0,
        )

    def refuse_nonfinite(self, nonfinite: Tensor) -> None:
        """Raise ``FloatingPointError`` where the flag is set: the one host read after an attack."""
        if bool(nonfinite):
            kind = nonfinite.device.type
            half = f", computing in {torch.get_autocast_dtype(kind)}" if torch.is_autocast_enabled(kind) else ""
            raise FloatingPointError(
                f"{type(self).__name__}: the model gave a non-finite gradient or loss on its input{half}"
            )


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...], to go with images."""
    return values.view(-1, *[1] * (like.ndim - 1))
