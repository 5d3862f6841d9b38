"""Every operation of ``operand_cases`` with its arguments changed, one by one and at random: it gives the reference's
answer, or raises a ``TypeError`` or ``ValueError`` as the reference does. Nothing is asserted by a statement, so that
the same checks run under ``python -O``, from the command line: ``python -O tests/helpers/operand_checks.py``.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from operand_cases import Case, public, public_cases, raw_cases, registered
from torch import Tensor

__all__ = ["CASES", "Failure", "check_case", "check_complete", "check_random", "main"]

WRITTEN = ("nonfinite", "x_best", "grad_best", "x_fooled")  # in place
READ_AS_SHAPES = ("share_count", "plan_key")  # functions of sizes: no number of theirs is an address
# Dimensions (a tensor's name, which one) that no other argument has to agree with.
FREE = {
    "combine": {("y", 1), ("y", 2)},
    "dispatch": {("x", 1), ("x", 2)},
    "expert_conv_plan": {("weight", 1), ("weight", 2), ("weight", 3), ("weight", 4)},
    "expert_conv_forward": {("x", 0), ("x", 2), ("x", 3), ("weight", 1), ("weight", 3), ("weight", 4)},
    "expert_conv_dgrad": {("weight", 2)},
    "expert_conv_wgrad": {("x", 0)},
    "expert_conv": {("x", 2), ("x", 3), ("weight", 1), ("weight", 3), ("weight", 4)},
    "norm_finalise": {("shares", 1)},
    "norm_finalise_backward": {("shares", 1)},
    "pool_linear": {("x", 0), ("x", 2), ("x", 3)},
    "pool_linear_backward": {("d_logits", 0), ("weight", 1)},
    "random_start": {("x0", 1), ("x0", 2), ("x0", 3)},
    "scale_shift": {("z", 2), ("z", 3)},
    "sample_cross_entropy": {("logits", 1)},
    "sample_cross_entropy_backward": {("logits", 1)},
    "sort_by_expert": {("indices", 0), ("indices", 1)},
    "top_k_gate": {("logits", 0), ("logits", 1)},
    "top_k_route": {("logits", 0), ("logits", 1)},
}
FREE |= {f"conv_{name}": FREE[f"expert_conv_{name}"] for name in ("plan", "forward", "dgrad", "wgrad")}
CASES = {f"raw {name}": case for name, case in raw_cases().items()}
CASES |= {f"public {name}": case for name, case in public_cases().items()}


class Failure(Exception):
    """An operation did what it must not."""


def check_complete() -> None:
    """Every registered operation and every public function has a case, and each case names all tensors it takes."""
    for kind, names in (("raw", registered()), ("public", public())):
        cased = {name.split()[1] for name in CASES if name.startswith(kind)}
        if names != cased:
            raise Failure(f"{kind} operations without a case: {names - cased}; cases of none: {cased - names}")
    for name in registered():
        schema = torch._C._get_schema(f"robust_moe_kernels::{name}", "")
        given, named = set(CASES[f"raw {name}"].arguments) | {"impl"}, {argument.name for argument in schema.arguments}
        if given != named:
            raise Failure(f"{name}: expected a case that names {named}, got {given}")


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, tuple | list) else []


def outcome(case: Case, arguments: dict[str, Any], impl: str) -> Exception | list[Tensor]:
    """What a call raises or returns, with what it wrote; only errors that a user may be shown are caught."""
    own = {name: copy.deepcopy(value) if name in WRITTEN else value for name, value in arguments.items()}
    try:
        returned = case.call(**own, impl=impl)
    except (TypeError, ValueError) as error:
        return error
    return _tensors(returned) + [own[name] for name in WRITTEN if isinstance(own.get(name), Tensor)]


def _expect_same(what: str, got: Exception | list[Tensor], wanted: Exception | list[Tensor]) -> None:
    if isinstance(got, Exception) or isinstance(wanted, Exception):
        if type(got) is not type(wanted) or str(got) != str(wanted):
            raise Failure(f"{what}: expected {wanted!r}, got {got!r}")
        return
    try:
        for mine, other in zip(got, wanted, strict=True):
            rtol, atol = (2e-5, 2e-5) if mine.dtype == torch.float32 else (None, None)
            torch.testing.assert_close(mine, other, equal_nan=True, rtol=rtol, atol=atol)
    except AssertionError as error:
        raise Failure(f"{what}: {error}") from None


def expect_either(what: str, case: Case, arguments: dict[str, Any]) -> bool:
    """The best implementation and the reference agree on these arguments; returns whether by an error."""
    got = outcome(case, arguments, "auto")
    _expect_same(what, got, outcome(case, arguments, "reference"))
    return isinstance(got, Exception)


def expect_error(what: str, case: Case, arguments: dict[str, Any]) -> None:
    if not expect_either(what, case, arguments):
        raise Failure(f"{what}: expected an error, got an answer")


def views(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same numbers in other places, and fewer numbers in the same place."""
    if tensor.dim():
        spread = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])[..., ::2]
        yield "with gaps", spread.copy_(tensor)
        turned = tensor.permute(*reversed(range(tensor.dim()))).contiguous()
        yield "turned round", turned.permute(*reversed(range(tensor.dim())))
        yield "expanded", tensor[:1].expand(tensor.shape)
    shifted = tensor.new_zeros(tensor.numel() + 3)[3:].view(tensor.shape)
    yield "behind others", shifted.copy_(tensor)


def reshaped(tensor: Tensor) -> Iterator[tuple[str, Tensor, int | None]]:
    """Other shapes; with the dimension that is longer, shorter or empty, or None for other ranks."""
    yield "of more dimensions", tensor[None], None
    yield "of the most dimensions", tensor[None, None, None, None, None], None
    if tensor.dim():
        yield "of fewer dimensions", tensor.select(0, 0), None
    for dim, size in enumerate(tensor.shape):
        yield f"longer in {dim}", torch.cat([tensor, tensor.narrow(dim, size - 1, 1)], dim), dim
        yield f"shorter in {dim}", tensor.narrow(dim, 0, size - 1), dim
        yield f"empty in {dim}", tensor.narrow(dim, 0, 0), dim


def retyped(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a dtype, layout or device that no operation takes in this one's place."""
    floats = tensor.is_floating_point()
    for dtype in (torch.int64, torch.int32, torch.bool, torch.uint8) if floats else (torch.float32, torch.int16):
        yield str(dtype), tensor.to(dtype)
    yield "complex", tensor.to(torch.complex64)


def misplaced(name: str, argument: str, index: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Indices of which one is out of range, at each place in turn."""
    most = () if name.endswith(("finalise", "finalise_backward")) else (10**6, 2**40)  # whose number of rows is free
    for place in range(index.numel()):
        for value in (-1, -(2**40), *most):
            wrong = index.clone()
            wrong.view(-1)[place] = value
            yield f"{value} at {place}", wrong


def check_case(name: str) -> int:
    """One argument after the other of one case; returns how many calls were refused."""
    case, errors = CASES[name], 0
    short = name.split()[1]
    if short in READ_AS_SHAPES:
        outcome(case, case.arguments, "auto")
        return 0
    if expect_either(name, case, case.arguments):
        raise Failure(f"{name}: expected an answer, got {outcome(case, case.arguments, 'auto')!r}")
    tensors = case.tensors()
    for argument, tensor in tensors.items():
        for what, view in views(tensor):
            changed, plain = case.arguments | {argument: view}, case.arguments | {argument: view.clone()}
            errors += expect_either(f"{name}, {argument} {what}", case, changed)
            if argument not in WRITTEN:
                got, wanted = outcome(case, changed, "auto"), outcome(case, plain, "auto")
                _expect_same(f"{name}, {argument} {what} and as a copy", got, wanted)
        for what, other, dim in reshaped(tensor):
            changed, label = case.arguments | {argument: other}, f"{name}, {argument} {what}"
            if (argument, dim) in FREE.get(short, ()):
                errors += expect_either(label, case, changed)
            else:
                expect_error(label, case, changed)
                errors += 1
        for what, other in retyped(tensor):
            expect_error(f"{name}, {argument} {what}", case, case.arguments | {argument: other})
            errors += 1
        if len(tensors) > 1:
            expect_error(f"{name}, {argument} meta", case, case.arguments | {argument: tensor.to("meta")})
            errors += 1
        if argument in case.indices:
            for what, index in misplaced(short, argument, tensor):
                expect_error(f"{name}, {argument} {what}", case, case.arguments | {argument: index})
                errors += 1
        if tensor.is_floating_point():
            for dtype in (torch.float64, torch.float16):
                errors += expect_either(
                    f"{name}, {argument} {dtype}", case, case.arguments | {argument: tensor.to(dtype)}
                )
    for argument, values in case.scalars.items():
        for value in values:
            expect_error(f"{name}, {argument}={value!r}", case, case.arguments | {argument: value})
            errors += 1
    return errors


def _variants(name: str, argument: str, tensor: Tensor, case: Case) -> list[Tensor]:
    found = [other for _, other in views(tensor)] + [other for _, other, _ in reshaped(tensor)]
    found += [other for _, other in retyped(tensor)]
    if argument in case.indices:
        found += [other for _, other in misplaced(name, argument, tensor)]
    if tensor.is_floating_point():
        found += [tensor.double(), tensor.half()]
    return found


def check_random(seed: int, calls: int) -> int:
    """Calls with two arguments changed at once; returns how many were refused."""
    draw, errors = random.Random(seed), 0
    names = sorted(name for name in CASES if name.split()[1] not in READ_AS_SHAPES)
    for number in range(calls):
        name = draw.choice(names)
        case, changed = CASES[name], dict(CASES[name].arguments)
        for argument, tensor in draw.sample(sorted(case.tensors().items()), min(2, len(case.tensors()))):
            changed[argument] = draw.choice(_variants(name, argument, tensor, case))
        errors += expect_either(f"{name}, call {number} of seed {seed}", case, changed)
    return errors


def main() -> None:
    """All of it; raises at the first failure and prints how many calls were refused."""
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # what a kernel leaves out is NaN
    check_complete()
    refused = Counter({name: check_case(name) for name in CASES})
    refused["at random"] = check_random(0, 2000)
    print(sum(refused.values()))


if __name__ == "__main__":
    main()
