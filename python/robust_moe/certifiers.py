"""The certificates that ``robust-moe certify`` can give an image: deterministic ones and randomised smoothing."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robust_moe.analysis import ABSTAIN, Graph, Smoothed, certify_mixture, network_graphs
from robust_moe.analysis.graph import Relu
from robust_moe.config import ConfigError, choose
from robust_moe.data.image_set import physical_memory
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import MoELayer, moe_layers

__all__ = ["CERTIFIERS", "Certified", "Certifier", "Deterministic", "Noise", "Search", "Smoothing", "make_certifier"]

CERTIFIERS = {
    "ibp": "interval propagation (arXiv:1810.12715): cheap and loose",
    "crown-ibp": "backward linear relaxation over intervals (arXiv:1811.00866)",
    "crown": "backward linear relaxation of every layer: tightest and dearest, small networks only",
    "lipschitz": "closed forms with global and local Lipschitz constants, no routed layers",
    "smoothing": "randomised smoothing (arXiv:1902.02918): any network, true with a stated probability",
}
_KINDS = {"lipschitz": ("global", "local")}  # of certify_mixture; the others: ("range",)
_WAY_OUT = "--by smoothing certifies any model"
_COPIES = 6  # of a matrix [rows, numbers of a map] that backward relaxation holds at a time


@dataclass(frozen=True)
class Search:
    """The bisection of deterministic certificates."""

    max_radius: float = 0.25  # where it ends, pixels in [0, 1]
    steps: int = 14  # radii are good to max_radius / 2**steps


@dataclass(frozen=True)
class Noise:
    """Settings of randomised smoothing; the defaults are those of the paper's experiments."""

    sigma: float = 0.25  # standard deviation, pixels in [0, 1]; the paper has 0.12, 0.25, 0.5 and 1
    select: int = 100  # noisy copies that choose the class (N0)
    samples: int = 100_000  # noisy copies that estimate its probability (N)
    alpha: float = 0.001  # probability that what is said of an image is false
    seed: int = 0


class Certified(NamedTuple):
    """What is certified of an image: the class is the label in the open ball of ``radius``."""

    radius: float  # pixels in [0, 1]; 0: nothing
    outcome: str  # of robust_moe.evaluation.certified.OUTCOMES


class Certifier(ABC):
    """A way to certify single images under fixed settings."""

    norms: tuple[str, ...]  # that it has radii in
    norm: str  # that radii are in
    of_model: bool  # certifies what the model itself says; otherwise a smoothed one
    guarantee: str  # what a radius promises
    settings: dict[str, Any]  # what radii depend on, plain values by name

    @abstractmethod
    def __call__(self, image: Tensor, label: Tensor, index: Tensor) -> Certified:
        """image [1, C, H, W] in [0, 1], label and index (place in the data set) int64 [1]."""

    @abstractmethod
    def estimate(self, image: Tensor, label: Tensor) -> float:
        """Seconds an image takes, measured on a part of the work for this one."""


class Deterministic(Certifier):
    """:func:`~robust_moe.analysis.certify_mixture` by one of its methods.

    Raises:
        ConfigError: a model that the analysis cannot follow, or whose bounds do not fit the memory.
    """

    norms = ("Linf",)
    norm = "Linf"
    of_model = True
    guarantee = "no image of the open Linf ball, within [0, 1], is given another class, in exact arithmetic"

    def __init__(self, model: nn.Module, by: str, shape: tuple[int, ...], search: Search) -> None:
        ok = math.isfinite(search.max_radius) and search.max_radius > 0
        expect(ok, "max_radius", "a finite number > 0", search.max_radius)
        expect(search.steps >= 1, "steps", "a count >= 1", search.steps)
        self.model, self.by, self.search = model, by, search
        self.settings = asdict(search)
        kinds = _KINDS.get(by, ("range",))
        self._given: dict[str, Any] = {"kinds": kinds, "method": "crown" if by == "lipschitz" else by}
        if by == "lipschitz" and any(_routed(layer) for layer in moe_layers(model).values()):
            raise ConfigError(
                "by: expected a network without routed layers for 'lipschitz', as no Lipschitz constant holds where a"
                f" route changes; --by crown follows routed layers, {_WAY_OUT}"
            )
        try:
            graphs = network_graphs(model, shape)
        except ValueError as error:
            raise self._refused(error) from error
        if self._given["method"] == "crown":
            _expect_memory(graphs, next(model.parameters()).device)

    def __call__(self, image: Tensor, label: Tensor, index: Tensor) -> Certified:
        radius = self._radius(image, label, self.search.steps)
        return Certified(radius, "certified" if radius > 0 else "uncertified")

    def estimate(self, image: Tensor, label: Tensor) -> float:
        began = time.perf_counter()
        try:
            self._radius(image, label, 1)
        except ValueError as error:
            raise self._refused(error) from error
        # the preparation bounds everything at the image itself, about as dear as a step of the bisection
        return (time.perf_counter() - began) * (self.search.steps + 1) / 2

    def _radius(self, image: Tensor, label: Tensor, steps: int) -> float:
        found = certify_mixture(self.model, image, label, max_radius=self.search.max_radius, steps=steps, **self._given)
        return min(1.0, found.radius.item())  # beyond 1 there are no images

    def _refused(self, error: ValueError) -> ConfigError:
        return ConfigError(f"by: expected a model that {self.by!r} can follow, got one it cannot: {error}; {_WAY_OUT}")


class Smoothing(Certifier):
    """:class:`~robust_moe.analysis.Smoothed`: the class that the model gives most often under Gaussian noise."""

    norms = ("L2", "Linf")
    of_model = False

    def __init__(self, model: nn.Module, classes: int, norm: str, noise: Noise, batch_size: int) -> None:
        for name, count in (("select", noise.select), ("samples", noise.samples)):
            expect(count >= 1, name, "a count >= 1", count)
        expect(0 < noise.alpha < 1, "alpha", "a number between 0 and 1", noise.alpha)
        self.smoothed = Smoothed(model, classes, noise.sigma, batch_size=batch_size, seed=noise.seed)
        self.norm, self.noise = norm, noise
        self.settings = asdict(noise)
        self._given = {name: self.settings[name] for name in ("select", "samples", "alpha")}
        self.guarantee = (
            f"the model smoothed with sigma = {noise.sigma:g} gives no image of the open {norm} ball another class; "
            f"false with probability at most {noise.alpha:g} for each image"
        )

    def __call__(self, image: Tensor, label: Tensor, index: Tensor) -> Certified:
        found = self.smoothed.certify(image, index=index, **self._given)
        (chosen,) = found.classes.tolist()
        if chosen != label.item():
            return Certified(0.0, "abstained" if chosen == ABSTAIN else "wrong")
        return Certified((found.radius if self.norm == "L2" else found.radius_linf).item(), "certified")

    def estimate(self, image: Tensor, label: Tensor) -> float:
        copies = min(self.smoothed.batch_size, self.noise.samples)
        began = time.perf_counter()
        self.smoothed.certify(image, **{**self._given, "select": copies, "samples": copies})
        return (time.perf_counter() - began) * (self.noise.select + self.noise.samples) / (2 * copies)


def make_certifier(
    by: str,
    model: nn.Module,
    shape: tuple[int, ...],
    classes: int,
    *,
    norm: str | None = None,
    search: Search | None = None,
    noise: Noise | None = None,
    batch_size: int = 256,
) -> Certifier:
    """The certifier named ``by``, a key of :data:`CERTIFIERS`.

    Args:
        shape: of an image, [C, H, W].
        norm: ``"Linf"`` or ``"L2"``; None: the certifier's own.
        search: of deterministic ones; noise: of smoothing, with ``batch_size`` noisy copies in a forward.

    Raises:
        ConfigError: a setting out of range, a model that cannot be followed.
    """
    choose(CERTIFIERS, by, "by")
    norms = Smoothing.norms if by == "smoothing" else Deterministic.norms
    if norm is not None and norm not in norms:
        raise ConfigError(f"norm: expected {' or '.join(norms)} with --by {by}, got {norm!r}")
    try:
        if by == "smoothing":
            return Smoothing(model, classes, norm or norms[0], noise or Noise(), batch_size)
        return Deterministic(model, by, shape, search or Search())
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error


def _routed(layer: MoELayer) -> bool:
    """Whether it is a layer inside a network; the others are mixtures of networks."""
    return not hasattr(layer.experts, "networks")


def _expect_memory(graphs: Iterable[Graph], device: torch.device) -> None:
    """Backward relaxation of every layer holds a row for each number that a ReLU reads, as long as the largest map."""
    rows = largest = 0
    for graph in graphs:
        read = [graph.size(node.source) for node in graph.nodes if isinstance(node, Relu)]
        if read and max(read) * max(map(graph.size, range(len(graph.nodes)))) > rows * largest:
            rows, largest = max(read), max(map(graph.size, range(len(graph.nodes))))
    needed = 8 * rows * largest * _COPIES
    if needed > (memory := _memory(device)):
        raise ConfigError(
            f"by: expected a network whose bounds by 'crown' fit {memory / 2**30:.0f} GiB, got one with a layer of "
            f"{rows:,} numbers, which needs about {needed / 2**30:.0f} GiB; --by crown-ibp needs little, {_WAY_OUT}"
        )


def _memory(device: torch.device) -> float:
    """Bytes of the device's memory; infinity where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return physical_memory()
