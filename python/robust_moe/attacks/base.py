"""What gradient attacks share: input checks, the model's mode, the loop over restarts and steps, the NaN guard."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Number, Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe_kernels.modules import moe_layers

__all__ = ["MODES", "Attack", "Crafted", "attack_mode"]

MODES = ("eval", "train")


class Crafted(NamedTuple):
    """Adversarial images that no host has looked at yet."""

    images: Tensor  # as the clean images: same shape and dtype, in [0, 1], detached
    nonfinite: Tensor  # bool scalar on the device: some gradient or loss on the way was NaN or infinite


@contextmanager
def attack_mode(model: nn.Module, mode: str = "eval") -> Iterator[None]:
    """Freeze ``model`` and set its mode for the span of an attack, then put back all of it exactly as found.

    Frozen parameters make autograd skip every weight gradient: a PGD step then costs one forward and one backward to
    the input. Flags are restored one submodule and one parameter at a time, so a partly frozen model or a BN layer
    held in eval mode comes back as it was; so does each MoE layer's ``routing``, the record of the caller's last
    forward. Gradients are enabled inside, also under ``no_grad`` or ``inference_mode``.
    """
    modules = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    routings = [(layer, layer.routing) for layer in moe_layers(model).values()]
    try:
        model.train(mode == "train")
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in modules:
            module.training = training
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)
        for layer, routing in routings:
            layer.routing = routing


def _expect(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def expect_number(name: str, value: object, kind: type[Number] = Real) -> None:
    """Refuse text, booleans and tensors; ``kind``: Real or Integral."""
    ok = isinstance(value, kind) and not isinstance(value, bool)
    _expect(ok, name, "an integer" if kind is Integral else "a number", repr(value))


def check_inputs(x: Tensor, y: Tensor, sample_index: Tensor | None) -> int:
    """Refuse what no attack can work on; returns the largest label. Reads the host once.

    The largest label is compared with the number of logits at the first forward, before the loss sees it: on a GPU an
    out-of-range label would abort the whole process.
    """
    _expect(x.dtype in (torch.float32, torch.float64), "x", "float32 or float64 images", x.dtype)
    _expect(x.ndim >= 2, "x", "a batch of images [B, C, H, W]", f"shape {list(x.shape)}")
    _expect(y.dtype == torch.int64, "y", "int64 labels", y.dtype)
    _expect(y.shape == x.shape[:1], "y", f"labels of shape [{x.shape[0]}]", f"shape {list(y.shape)}")
    _expect(y.device == x.device, "y", f"labels on {x.device}", y.device)
    if sample_index is not None:
        _expect(sample_index.dtype == torch.int64, "sample_index", "int64 positions", sample_index.dtype)
        ok = sample_index.shape == y.shape
        _expect(ok, "sample_index", f"shape [{x.shape[0]}]", f"shape {list(sample_index.shape)}")
        _expect(sample_index.device == x.device, "sample_index", f"positions on {x.device}", sample_index.device)
    if x.numel() == 0:
        return -1
    bounds = [x.min(), x.max(), y.min(), y.max()]  # min and max propagate NaN
    low, high, first, last = torch.stack([bound.double() for bound in bounds]).tolist()
    _expect(low >= 0 and high <= 1, "x", "finite pixels in [0, 1]", f"values from {low:g} to {high:g}")
    _expect(first >= 0, "y", "labels >= 0", f"a label of {first:g}")
    return int(last)


def _ordinary(tensor: Tensor) -> Tensor:
    """A tensor that autograd may save: one made in inference mode is copied."""
    return tensor.clone() if tensor.is_inference() else tensor


class Attack(ABC):
    """An iterative gradient attack: ``restarts`` times, a start and then ``steps`` gradient steps.

    A subclass gives :meth:`start` and :meth:`step`, and may replace :meth:`loss`, or :meth:`run` when its state is
    more than the current iterate. Calling the attack checks the inputs and raises; :meth:`craft` does neither and
    never reads the host, for training loops that gather the flag themselves.

    Args:
        steps: gradient steps, >= 0.
        restarts: independent starts, >= 1; each sample keeps its worst (misclassified first, then by loss).
        seed: of the random start; the result depends on (seed, sample index, restart) only, not on the batch size.
        mode: mode of the model while it is attacked, ``"eval"`` or ``"train"``. In train mode BN statistics move and
            the result depends on the batch.
    """

    def __init__(self, *, steps: int, restarts: int = 1, seed: int = 0, mode: str = "eval") -> None:
        for name, value in (("steps", steps), ("restarts", restarts), ("seed", seed)):
            expect_number(name, value, Integral)
        _expect(steps >= 0, "steps", "a count >= 0", steps)
        _expect(restarts >= 1, "restarts", "a count >= 1", restarts)
        _expect(mode in MODES, "mode", f"one of {', '.join(MODES)}", repr(mode))
        self.steps = steps
        self.restarts = restarts
        self.seed = seed
        self.mode = mode

    @property
    def passes(self) -> tuple[int, int]:
        """(forwards, backwards) that :meth:`run` makes on one batch."""
        scored = self.restarts if self.restarts > 1 else 0
        return self.restarts * self.steps + scored, self.restarts * self.steps

    @abstractmethod
    def start(self, x0: Tensor, sample_index: Tensor | None, seed: int, restart: int) -> Tensor:
        """First iterate, [B, ...] in the ball around ``x0`` and in [0, 1]."""

    @abstractmethod
    def step(self, x: Tensor, grad: Tensor, x0: Tensor) -> Tensor:
        """Next iterate from the gradient of the loss at ``x``; again in the ball and in [0, 1]."""

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Loss of each sample, [B], that the attack raises: cross-entropy, in fp32 at least."""
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), y, reduction="none")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, sample_index: Tensor | None = None) -> Tensor:
        """Adversarial images of ``x``, detached, of its shape and dtype, in the ball and in [0, 1].

        Args:
            model: maps [B, C, H, W] in [0, 1] to logits [B, classes]; left exactly as found.
            x: float32 or float64 [B, C, H, W] in [0, 1].
            y: int64 [B], labels in 0..classes-1, on the device of ``x``.
            sample_index: int64 [B], position of each image in its data set, the counter of its random start; None: the
                position in the batch.

        Raises:
            ValueError: an input is of the wrong shape, dtype, device or range.
            FloatingPointError: the model gave a NaN or infinite gradient: the images would not be adversarial, and
                a score on them would count NaN as robust.
        """
        largest = check_inputs(x, y, sample_index)
        if x.numel() == 0:
            return x.detach().clone()
        crafted = self.craft(model, x, y, sample_index, largest_label=largest)
        if bool(crafted.nonfinite):  # the one host read after the attack
            raise FloatingPointError(
                f"{type(self).__name__}: the model gave a non-finite gradient or loss on its input"
            )
        return crafted.images

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
            x0, y = _ordinary(x.detach()), _ordinary(y)
            passes = _Passes(model, self.loss, y, largest_label)
            adversarial = self.run(passes, x0, sample_index, self.seed if seed is None else seed).detach()
        if adversarial.data_ptr() == x.data_ptr():  # no steps and no random start: never hand out the caller's memory
            adversarial = adversarial.clone()
        return Crafted(adversarial, passes.nonfinite)

    def run(self, passes: _Passes, x0: Tensor, sample_index: Tensor | None, seed: int) -> Tensor:
        """The loop. One restart costs ``steps`` forwards and backwards; several cost one more forward each."""
        best = best_wrong = best_loss = None
        for restart in range(self.restarts):
            x = self.start(x0, sample_index, seed, restart)
            for _ in range(self.steps):
                x = self.step(x, passes.gradient(x), x0)
            if self.restarts == 1:
                return x
            wrong, loss = passes.score(x)
            if best is None:
                best, best_wrong, best_loss = x, wrong, loss
                continue
            worse = (wrong & ~best_wrong) | ((wrong == best_wrong) & (loss > best_loss))
            best = torch.where(worse.view(-1, *[1] * (x.ndim - 1)), x, best)
            best_wrong, best_loss = wrong | best_wrong, torch.where(worse, loss, best_loss)
        return best


class _Passes:
    """Forward and backward passes of one attack on one batch, with the device flag of what was not finite."""

    def __init__(self, model: nn.Module, loss, y: Tensor, largest_label: int) -> None:
        self.model, self.loss, self.y, self.largest_label = model, loss, y, largest_label
        self.nonfinite = torch.zeros((), dtype=torch.bool, device=y.device)

    def logits(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        ok = logits.ndim == 2 and logits.shape[0] == x.shape[0]
        _expect(ok, "model", f"logits of shape [{x.shape[0]}, classes]", f"shape {list(logits.shape)}")
        ok = self.largest_label < logits.shape[1]
        _expect(ok, "y", f"labels below {logits.shape[1]}, the number of logits", f"a label of {self.largest_label}")
        return logits

    def gradient(self, x: Tensor) -> Tensor:
        """Gradient of the summed loss to ``x``: one forward, one backward, no weight gradients."""
        x = x.detach().requires_grad_(True)
        # the sum keeps each sample's gradient independent of the batch size and away from fp16 underflow
        (grad,) = torch.autograd.grad(self.loss(self.logits(x), self.y).sum(), x)
        self.nonfinite |= ~torch.isfinite(grad).all()
        return grad

    def score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(misclassified, loss) of each sample, [B] each."""
        with torch.no_grad():
            logits = self.logits(x)
            loss = self.loss(logits, self.y)
        self.nonfinite |= ~torch.isfinite(loss).all()
        return logits.argmax(1) != self.y, loss
