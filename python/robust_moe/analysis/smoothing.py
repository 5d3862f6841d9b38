"""Randomised smoothing: ℓ2 radii for any model, true with a stated probability (Cohen et al., 2019, arXiv:1902.02918).

The smoothed classifier says c where the model says c most often on x + N(0, σ² I). If the most likely class has
probability at least p > 1/2, the smoothed classifier keeps it in the ℓ2 ball of radius σ Φ⁻¹(p) (theorem 1, with
p_B = 1 − p_A). As ‖δ‖₂ ≤ √d ‖δ‖∞ in d dimensions, the ℓ∞ ball of radius σ Φ⁻¹(p) / √d lies inside.

What is certified is the *smoothed* classifier, not the model; its images are not clamped to [0, 1] after the noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor, nn

from robust_moe.analysis.rounding import RELATIVE
from robust_moe.attacks.base import expect_number
from robust_moe.seeding import derive_seed
from robust_moe_kernels.checks import expect, expect_images
from robust_moe_kernels.modules import attack_mode

__all__ = ["ABSTAIN", "Smoothed", "SmoothedCertificate", "clopper_pearson_lower"]

ABSTAIN = -1
_RESOLUTION = {torch.float32: 1e-4, torch.float64: 1e-12}  # smallest sigma for pixels in [0, 1]: about 1000 roundings
_DRAW = 32  # noisy copies drawn at a time, so that the noise does not depend on the batch size


@dataclass(frozen=True)
class SmoothedCertificate:
    """What smoothing guarantees for a batch of B images; each row is wrong with probability at most ``alpha``."""

    classes: Tensor  # int64 [B], ABSTAIN where no class is certified
    radius: Tensor  # float64 [B], ℓ2, pixels in [0, 1]; 0 where abstained
    radius_linf: Tensor  # float64 [B], radius / sqrt(d)
    probability: Tensor  # float64 [B], lower confidence bound of the top class's probability
    sigma: float
    alpha: float
    samples: int


def clopper_pearson_lower(successes: int, trials: int, alpha: float) -> float:
    """Lower end of the one-sided 1 − ``alpha`` confidence interval of a binomial proportion (Clopper and Pearson,
    1934).

    The p with P(Bin(trials, p) ≥ successes) = alpha: whatever the true proportion, it is below p with probability at
    most alpha. 0 without successes.
    """
    from scipy.stats import beta  # a third of the time in which an evaluation starts

    _count("trials", trials, 1)
    _count("successes", successes, 0)
    expect(successes <= trials, "successes", f"at most trials = {trials}", successes)
    _share("alpha", alpha)
    return float(beta.ppf(alpha, successes, trials - successes + 1)) * (1 - RELATIVE) if successes else 0.0


class Smoothed:
    """A model under Gaussian noise.

    Args:
        model: images float [N, ...] -> logits [N, classes]; used in evaluation mode and left as found. Best trained
            under the same noise.
        num_classes: number of logits.
        sigma: standard deviation of the noise, > 0, pixels being in [0, 1]; a call takes no less than 1e-4 for images
            in float32, 1e-12 in float64: rounded noise of another size than a pixel's resolution is no Gaussian.
        batch_size: noisy copies a forward, >= 1; does not change the noise.
        seed: of the noise; an image's noise depends on (seed, its index) only.

    Raises:
        ValueError: a setting out of range, in a call also a sigma. FloatingPointError, in a call: non-finite logits.
    """

    def __init__(
        self, model: nn.Module, num_classes: int, sigma: float, *, batch_size: int = 256, seed: int = 0
    ) -> None:
        _count("num_classes", num_classes, 2)
        _count("batch_size", batch_size, 1)
        expect_number("seed", seed, Integral)
        expect_number("sigma", sigma)
        expect(math.isfinite(sigma) and sigma > 0, "sigma", "a finite number > 0", sigma)
        self.model = model
        self.num_classes = num_classes
        self.sigma = sigma
        self.batch_size = batch_size
        self.seed = seed

    def certify(
        self, x: Tensor, *, select: int = 100, samples: int = 10_000, alpha: float = 0.001, index: Tensor | None = None
    ) -> SmoothedCertificate:
        """Class and radius of each image [B, ...] (CERTIFY of the paper).

        ``select`` noisy copies choose the class, ``samples`` others estimate its probability; it abstains where the
        lower confidence bound is not above 1/2. No radius is larger than σ Φ⁻¹(alpha^(1/samples)), 3.2 σ at the
        defaults.

        Args:
            x: float32 or float64 [B, ...].
            alpha: probability, for each image, that what is certified is false; in (0, 1).
            index: int64 [B], each image's place in its data set, for its noise; None: in the batch.
        """
        _count("select", select, 1)
        _count("samples", samples, 1)
        _share("alpha", alpha)
        classes: list[int] = []
        bounds: list[float] = []
        for image, noise in self._images(x, "certify", index):
            chosen = int(self._counts(image, noise, select).argmax())
            hits = self._counts(image, noise, samples)[chosen].item()
            bound = clopper_pearson_lower(int(hits), samples, alpha)
            classes.append(chosen if bound > 0.5 else ABSTAIN)
            bounds.append(bound)
        probability = torch.tensor(bounds, dtype=torch.float64)
        radius = self.sigma * torch.special.ndtri(probability.clamp_min(0.5)) * (1 - 1e-9)  # ndtri is good to 1e-14
        return SmoothedCertificate(
            classes=torch.tensor(classes, dtype=torch.int64),
            radius=radius,
            radius_linf=radius / math.sqrt(x[0].numel()) * (1 - RELATIVE) if len(x) else radius,
            probability=probability,
            sigma=self.sigma,
            alpha=alpha,
            samples=samples,
        )

    def predict(self, x: Tensor, *, samples: int = 1000, alpha: float = 0.001, index: Tensor | None = None) -> Tensor:
        """The smoothed classifier's class of each image, int64 [B], or ABSTAIN (PREDICT of the paper).

        The two most frequent classes are compared by a two-sided binomial test; a class that is returned is another
        than the smoothed classifier's with probability at most ``alpha``. Arguments as for :meth:`certify`.
        """
        from scipy.stats import binomtest

        _count("samples", samples, 1)
        _share("alpha", alpha)
        classes = []
        for image, noise in self._images(x, "predict", index):
            counts, order = self._counts(image, noise, samples).sort(descending=True)
            first, second = counts[:2].tolist()
            sure = binomtest(first, first + second, 0.5).pvalue <= alpha
            classes.append(order[0].item() if sure else ABSTAIN)
        return torch.tensor(classes, dtype=torch.int64)

    def _images(self, x: Tensor, use: str, index: Tensor | None) -> Iterator[tuple[Tensor, torch.Generator]]:
        expect_images(x, "x")
        if index is not None:
            ok = index.dtype == torch.int64 and index.shape == x.shape[:1]
            expect(ok, "index", f"int64 positions [{len(x)}]", f"{index.dtype} {list(index.shape)}")
        places = range(len(x)) if index is None else index.tolist()
        largest = max(1.0, x.abs().max().item()) if x.numel() else 1.0
        least = _RESOLUTION[x.dtype] * largest
        wanted = f"at least {least:g}, below which noise is lost in the rounding of {x.dtype}"
        expect(self.sigma >= least, "sigma", wanted, self.sigma)
        with attack_mode(self.model), torch.no_grad():
            for image, place in zip(x, places, strict=True):
                yield image, torch.Generator().manual_seed(derive_seed(self.seed, "smoothing", use, place))

    def _counts(self, image: Tensor, noise: torch.Generator, samples: int) -> Tensor:
        """How often each class was the model's on noisy copies, int64 [classes] on the host."""
        counts = torch.zeros(self.num_classes, dtype=torch.int64, device=image.device)
        pending: list[Tensor] = []
        held = 0
        for done in range(0, samples, _DRAW):
            drawn = torch.randn(_DRAW, *image.shape, generator=noise)[
                : samples - done
            ]  # on the host: the same everywhere
            pending.append(drawn)
            held += len(drawn)
            while held >= self.batch_size or (held and done + _DRAW >= samples):
                rows = torch.cat(pending)
                counts += self._votes(image + self.sigma * rows[: self.batch_size].to(image))
                pending = [rows[self.batch_size :]]
                held = len(pending[0])
        return counts.cpu()

    def _votes(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        wanted = (len(images), self.num_classes)
        expect(tuple(logits.shape) == wanted, "model", f"logits of shape {list(wanted)}", list(logits.shape))
        if not bool(logits.isfinite().all()):
            raise FloatingPointError("Smoothed: the model gave non-finite logits")
        return torch.bincount(logits.argmax(1), minlength=self.num_classes)


def _count(name: str, value: int, least: int) -> None:
    expect_number(name, value, Integral)
    expect(value >= least, name, f"a count >= {least}", value)


def _share(name: str, value: float) -> None:
    expect_number(name, value)
    expect(0 < value < 1, name, "a number between 0 and 1", value)
