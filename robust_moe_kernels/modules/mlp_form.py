"""What an MLP computes: which of its linear layers come first and last, and the activation between them.

Neither names nor classes say it, so each form that the layers' sizes allow is tried on random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from robust_moe_kernels.modules.probe import drawn_state, modes_kept
from robust_moe_kernels.modules.walk import modules_of
from robust_moe_kernels.ops.expert_mlp.activation import ACTIVATIONS, activate, activation_of

__all__ = ["MLPForm", "form_of", "is_plain_linear"]

_UNGATED = [name for name, activation in ACTIVATIONS.items() if not activation.gated]
_GATED = [name for name, activation in ACTIVATIONS.items() if activation.gated]
_PROBE = (2, 8)  # samples and tokens
_SCALES = (1.0, 1e4)  # of the numbers in them: activations that are cut off, as ReLU6, differ at large ones


class MLPForm(NamedTuple):
    """act(first(x)) -> last, act gated or not; layers by their positions in ``modules()``."""

    first: tuple[int, ...]  # one layer; or two, of the activated half and of the one that it multiplies
    last: int
    activation: str  # as ``expert_mlp`` names it
    swapped: bool = False  # of one gated layer: the activated half is the last
    same_in_training: bool = True  # dropout layers apart

    def apply(self, layers: Sequence[nn.Module], x: Tensor) -> Tensor:
        """What an MLP of this form computes, ``layers`` being its modules, without dropout."""
        z = self.ordered([torch.cat([layers[i](x) for i in self.first], -1)], -1)
        return layers[self.last](activate(z.flatten(0, -2), activation_of(self.activation)).unflatten(0, x.shape[:-1]))

    def ordered(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """Outputs of the first layers along ``dim``, or what makes them, as one tensor, the activated half first."""
        whole = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
        return torch.cat(whole.chunk(2, dim)[::-1], dim) if self.swapped else whole


def is_plain_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer that computes what its own weight and bias say."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return False
    return {"weight"} <= module.state_dict().keys() <= {"weight", "bias"}


def form_of(mlp: nn.Module) -> MLPForm:
    """The form of an MLP, found by comparing it on random numbers with each that its linear layers allow.

    Runs on the CPU in float64, on a state drawn for the purpose; neither the module nor a random generator changes.

    Raises:
        ValueError: a module that computes none of them, which it names.
    """
    layers = modules_of(mlp)
    linear = [i for i, layer in enumerate(layers) if is_plain_linear(layer)]
    kind = type(mlp).__name__
    if len(linear) not in (2, 3):
        raise ValueError(
            "mlp: expected two plain torch.nn.Linear layers with an activation between them, or three of a gated linear"
            f" unit, got {kind} with {len(linear)} such layers ({_parts(mlp)})"
        )
    cpu = torch.device("cpu")
    generator = torch.Generator(cpu).manual_seed(0)
    state = drawn_state(mlp, cpu, torch.float64, generator)
    forms = list(_candidates(layers, linear))
    other, failure = "computes something else", ""
    with torch.no_grad(), modes_kept(mlp), torch.random.fork_rng(devices=[]):
        for width in dict.fromkeys(_sizes(layers[form.first[0]])[0] for form in forms):
            x = torch.randn(*_PROBE, width, generator=generator, dtype=torch.float64, device=cpu)
            try:
                wanted = [functional_call(mlp.eval(), state, (scale * x,)) for scale in _SCALES]
            except Exception as error:  # whatever a module of another kind makes of this input
                failure = failure or f"fails: {error}"
                continue
            failure = other
            for form in forms:
                if _sizes(layers[form.first[0]])[0] != width:
                    continue
                found = (_applied(form, mlp, state, scale * x) for scale in _SCALES)
                if all(map(_equal, found, wanted)):
                    for layer in modules_of(mlp.train()):
                        if isinstance(layer, nn.modules.dropout._DropoutNd):
                            layer.eval()
                    trained = functional_call(mlp, state, (x.clone(),))
                    return form._replace(same_in_training=_equal(trained, wanted[0]))
    raise ValueError(
        "mlp: expected linear(act(linear(x))) of one input [..., C], act one of"
        f" {', '.join(_UNGATED)} or a gated one; on a random input {kind} ({_parts(mlp)}) {failure or other}"
    )


def _applied(form: MLPForm, mlp: nn.Module, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """What an MLP of that form would compute with that state."""
    return functional_call(_AsRead(mlp, form), {f"mlp.{name}": value for name, value in state.items()}, (x,))


def _parts(mlp: nn.Module) -> str:
    return ", ".join(f"{name}: {type(child).__name__}" for name, child in mlp.named_children()) or "no children"


def _candidates(layers: Sequence[nn.Module], linear: Sequence[int]) -> Iterator[MLPForm]:
    """The forms that layers of these sizes can have, the likely order of the layers first."""
    sizes = {i: _sizes(layers[i]) for i in linear}
    if len(linear) == 3:
        for last in reversed(linear):
            a, b = (i for i in linear if i != last)
            if sizes[a] == sizes[b] and sizes[a][1] == sizes[last][0]:
                yield from (MLPForm(pair, last, name) for pair in ((a, b), (b, a)) for name in _GATED)
        return
    for first, last in ((linear[0], linear[1]), (linear[1], linear[0])):
        hidden, inner = sizes[first][1], sizes[last][0]
        if hidden == inner:
            yield from (MLPForm((first,), last, name) for name in _UNGATED)
        elif hidden == 2 * inner:
            yield from (MLPForm((first,), last, name, swapped) for name in _GATED for swapped in (False, True))


def _sizes(layer: Any) -> tuple[int, int]:
    return layer.in_features, layer.out_features


def _equal(got: object, wanted: object) -> bool:
    """Whether the same operations have computed both: equal up to the library's order of summing."""
    if not isinstance(got, Tensor) or not isinstance(wanted, Tensor) or got.shape != wanted.shape:
        return False
    bound = 1e3 * torch.finfo(torch.float64).eps * wanted.abs().max().clamp_min(1.0)
    return bool(((got - wanted).abs() <= bound).all())


class _AsRead(nn.Module):
    """An MLP as the form says."""

    def __init__(self, mlp: nn.Module, form: MLPForm) -> None:
        super().__init__()
        self.mlp = mlp
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.form.apply(modules_of(self.mlp), x)
