"""What an evaluation consists of and gives: its attacks, their settings, all that a result depends on, the result."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robust_moe.attacks import Attack, AutoAttack, Counts
from robust_moe.attacks.autoattack import members
from robust_moe.evaluation.sanity import Flag
from robust_moe.evaluation.scorer import LayerRouting, device_of

__all__ = [
    "AUTOATTACK",
    "Stage",
    "StageResult",
    "SuiteResult",
    "as_fraction",
    "describe_attack",
    "digest",
    "identity",
    "plan",
]

AUTOATTACK = "autoattack"  # the chain of its attacks
_LENGTHS = ("eps", "alpha")  # given as fractions of the pixel range


@dataclass(frozen=True)
class Stage:
    """One attack of an evaluation."""

    name: str
    attack: Attack
    chain: str  # attacks of one chain go on with the images that its earlier ones left; each chain starts anew


@dataclass(frozen=True, eq=False)
class StageResult:
    """What one attack did. Masks are in the order of the images."""

    stage: Stage
    attacked: np.ndarray  # bool [n]: it was given the image
    broken: np.ndarray  # bool [n]: and the model misclassifies what it made of it
    prediction: np.ndarray  # int64 [n], of what it made; the clean one where not attacked
    robust_after: float  # share of all n images that neither this nor an earlier attack broke
    alone: float | None  # share of all n images robust against this attack; None: it saw those left by another
    counts: Counts  # passes, all images together
    seconds: float
    reach: float  # largest distance from an image, in the norm of the evaluation
    low: float  # smallest and largest pixel
    high: float


@dataclass(frozen=True, eq=False)
class SuiteResult:
    """Accuracies over all n images, and where they come from. Masks are in the order of the images."""

    index: np.ndarray  # int64 [n], positions in the data set
    label: np.ndarray  # int64 [n]
    prediction: np.ndarray  # int64 [n], of the images as they are
    robust: np.ndarray | None  # bool [n]: right as it is and after every attack; None: no attack
    stages: list[StageResult]
    chains: dict[str, np.ndarray]  # bool [n], by chain: right as it is and after the chain's attacks
    flags: list[Flag]
    routing: dict[str, LayerRouting]  # by layer, of the images as they are
    examples: dict[str, np.ndarray]  # K broken images, for pictures
    seconds: float  # of all work, in all sessions

    @property
    def clean(self) -> np.ndarray:
        """bool [n]: right as it is."""
        return self.prediction == self.label


def plan(name: str, attack: Attack, version: str | None = None, seed: int = 0) -> list[Stage]:
    """``attack``, and then the attacks of AutoAttack's ``version`` with its ``eps`` and ``norm`` (None: it alone).

    An :class:`~robust_moe.attacks.AutoAttack` gives the stages of its own attacks, and no others.
    """
    if isinstance(attack, AutoAttack):
        return [Stage(member, each, AUTOATTACK) for member, each in attack.attacks.items()]
    more = {} if version is None else members(attack.eps, attack.norm, version, seed)
    own = f"{name} alone" if name in more else name
    return [Stage(own, attack, own), *(Stage(member, each, AUTOATTACK) for member, each in more.items())]


def as_fraction(value: float) -> str:
    """The simplest fraction that is ``value`` in float64, e.g. ``"8/255"``; the decimal number where there is none."""
    for most in (1000, 10**6):
        fraction = Fraction(value).limit_denominator(most)
        if math.isclose(fraction, value, rel_tol=1e-14):
            return str(fraction)
    return repr(value)


def describe_attack(attack: Attack) -> dict[str, Any]:
    """An attack's settings as plain values by name; radius and step as fractions of the pixel range."""
    settings: dict[str, Any] = {"attack": type(attack).__name__}
    for name, value in vars(attack).items():
        if name.startswith("_"):
            continue
        if name in _LENGTHS:
            value = as_fraction(value)
        if isinstance(value, dict):  # of attacks
            value = {key: describe_attack(each) for key, each in value.items() if isinstance(each, Attack)}
        if isinstance(value, str | int | float | dict):
            settings[name.removesuffix("_name")] = value
    return settings


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values."""
    whole = hashlib.sha256()
    for name, tensor in tensors.items():
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        whole.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return whole.hexdigest()


def identity(
    model: nn.Module, images: Tensor, labels: Tensor, stages: Sequence[Stage], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What a result depends on, plain values by name: SHA-256 of weights and of images with labels; ``settings`` and
    those of the attacks; what decides rounding."""
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    device = device_of(model)
    attacks = {
        f"{stage.name}.{name}": value
        for stage in stages
        for name, value in {"chain": stage.chain, **describe_attack(stage.attack)}.items()
    }
    return {
        "model": digest(state),
        "data": digest({"images": images, "labels": labels}),
        **settings,
        "attacks": ", ".join(stage.name for stage in stages),
        **attacks,
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }
