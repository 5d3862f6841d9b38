"""The attacks of an evaluation, their settings, and all that a result depends on."""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from fractions import Fraction
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe.attacks import Attack, AutoAttack
from robust_moe.attacks.autoattack import members
from robust_moe.attacks.graph import StepGraphs
from robust_moe.evaluation.outcome import AUTOATTACK, Stage
from robust_moe.evaluation.scorer import device_of, precision
from robust_moe_kernels import __version__, moe_layers
from robust_moe_kernels.checks import expect

__all__ = [
    "as_fraction",
    "describe_attack",
    "digest",
    "expect_ball",
    "fingerprint",
    "identity",
    "plan",
]

_OF_MODULES = frozenset(vars(nn.Module()))  # attributes that every module has
_LENGTHS = ("eps", "alpha")  # given as fractions of the pixel range


def plan(name: str, attack: Attack, version: str | None = None, seed: int = 0) -> list[Stage]:
    """``attack``, and then the attacks of AutoAttack's ``version`` with its ``eps`` and ``norm`` (None: it alone).

    An :class:`~robust_moe.attacks.AutoAttack` gives the stages of its own attacks.

    Raises:
        ValueError: an AutoAttack, and a version of it too; an unknown version.
    """
    if isinstance(attack, AutoAttack):
        expect(version is None, "attack", f"another one beside AutoAttack's version {version!r}", repr(name))
        return [Stage(member, each, AUTOATTACK) for member, each in attack.attacks.items()]
    more = {} if version is None else members(attack.eps, attack.norm, version, seed)
    own = f"{name} alone" if name in more else name
    return [Stage(own, attack, own), *(Stage(member, each, AUTOATTACK) for member, each in more.items())]


def expect_ball(stages: Sequence[Stage], eps: float, norm: str) -> None:
    """Refuse an attack of another ball than the evaluation's, or one that moves the model's statistics."""
    for stage in stages:
        for name, value in (("eps", eps), ("norm", norm), ("mode", "eval")):
            got = getattr(stage.attack, name, value)
            expect(
                got == value, "stages", f"{stage.name!r} with {name} = {value!r}, as the evaluation has it", repr(got)
            )


def as_fraction(value: float) -> str:
    """The simplest fraction that is ``value`` in float64, e.g. ``"8/255"``; the decimal number where there is none."""
    for most in (1000, 10**6):
        fraction = Fraction(value).limit_denominator(most)
        if math.isclose(fraction, value, rel_tol=1e-14):
            return str(fraction)
    return repr(value)


def describe_attack(attack: Attack) -> dict[str, Any]:
    """An attack's settings as plain values by name; radius and step as fractions of the pixel range.

    Of tensors and models that it holds, their SHA-256; what decides only how its steps run (``graph``) is left out.

    Raises:
        ValueError: a public attribute that cannot be described, so that a change of it would go unseen.
    """
    settings: dict[str, Any] = {"attack": type(attack).__name__}
    for name, value in vars(attack).items():
        if name.startswith("_") or isinstance(value, StepGraphs):
            continue
        what = f"{type(attack).__name__}.{name}"
        settings[name.removesuffix("_name")] = as_fraction(value) if name in _LENGTHS else _plain(value, what)
    return settings


def _plain(value: Any, what: str) -> Any:
    """As JSON will have it."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return [_plain(each, what) for each in value]
    if isinstance(value, dict):
        return {str(key): _plain(each, what) for key, each in value.items()}
    if isinstance(value, Attack):
        return describe_attack(value)
    if isinstance(value, Tensor):
        return digest({"": value})
    if isinstance(value, nn.Module):
        return fingerprint(value)
    bound = getattr(value, "__self__", None) is not None and not isinstance(value, BuiltinFunctionType)
    name = "<" if bound else getattr(value, "__qualname__", "<")
    expect("<" not in name, what, "plain values, tensors, models, attacks or named functions", repr(value))
    return f"{value.__module__}.{name}"


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values."""
    whole = hashlib.sha256()
    for name, tensor in tensors.items():
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))  # one element may have stride 0
        if flat.numel():
            whole.update(flat.view(torch.uint8).numpy().data)
    return whole.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model: its modules and their options as it prints them, weights and all buffers (persistent or
    not), and of each MoE layer what it has imposed and how it routes in evaluation. Not of its code, nor of options
    that it does not print.

    Raises:
        ValueError: a routing rule, or what it holds, that cannot be described, so that a change of it would go unseen.
    """
    state = model.state_dict()
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    tensors |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    imposed = {
        name: [
            layer.fixed_expert,
            *(_rule(getattr(layer, kind), f"{name}.{kind}") for kind in ("reroute", "inference")),
        ]
        for name, layer in moe_layers(model).items()
    }
    others = {name: repr(value) for name, value in state.items() if name not in tensors}
    printed = re.sub(r" at 0x[0-9a-f]+", "", f"{model!r} {others!r}")
    return hashlib.sha256(f"{printed}\n{json.dumps(imposed)}\n{digest(tensors)}".encode()).hexdigest()


def _rule(rule: Any, what: str) -> Any:
    """A routing rule as JSON will have it: the name of its class and all of its attributes."""
    if rule is None or isinstance(rule, FunctionType):
        return _plain(rule, what)
    kind = type(rule)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(rule, nn.Module):  # with its tensors what it holds beside them, which it need not print
        kept = {key: value for key, value in vars(rule).items() if key not in _OF_MODULES}
        return [name, fingerprint(rule), _plain(kept, what)]
    # what copies itself in a way of its own, as functools.partial does, may hold more than its attributes
    own = any(method in vars(base) for base in kind.__mro__[:-1] for method in ("__reduce__", "__reduce_ex__"))
    expect(
        not own and "<" not in kind.__qualname__,
        what,
        "an object of a class of a module, or a named function",
        repr(rule),
    )
    state = object.__getstate__(rule)  # its __dict__, and with __slots__ a pair
    return [name, _plain(state, what)]


def identity(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    stages: Sequence[Stage],
    settings: Mapping[str, Any],
    index: Tensor | None = None,
) -> dict[str, Any]:
    """What a result depends on, plain values by name: SHA-256 of the model (:func:`fingerprint`), of images with
    labels, and of positions (None: 0..n-1); ``settings`` and those of the attacks; what decides rounding.

    A model of which :func:`fingerprint` cannot tell all is another one in every call, for a reason that ``"model"``
    says: nothing of it is gone on with."""
    device = device_of(model)
    try:
        told = fingerprint(model)
    except ValueError as error:
        told = f"cannot be told from another one, so that nothing is resumed ({error}; {secrets.token_hex(8)})"
    index = torch.arange(len(images)) if index is None else index
    attacks = {
        f"{stage.name}.{name}": value
        for stage in stages
        for name, value in {"chain": stage.chain, **describe_attack(stage.attack)}.items()
    }
    return {
        "model": told,
        "data": digest({"images": images, "labels": labels}),
        "index": digest({"index": index}),
        **settings,
        "attacks": ", ".join(stage.name for stage in stages),
        **attacks,
        "robust-moe": __version__,
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        **precision(device),
    }
