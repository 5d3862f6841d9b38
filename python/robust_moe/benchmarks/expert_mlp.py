"""A transformer's routed MLP against the ways it is written elsewhere: ViT-S, 197 tokens of 32 images, top 2.

What is compared: (a) a dense MLP of the same width on k rows for each token, the same products without routing; (b) the
masked loop over experts, as papers publish it; (c) the sorted loop, one library product per layer and expert; (d)
PyTorch's grouped product, where it computes the dtype on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from robust_moe.benchmarks.harness import Options, Row, Run, check_close, compare
from robust_moe_kernels.ops.expert_mlp import expert_mlp
from robust_moe_kernels.ops.routing import Route, sort_by_expert

__all__ = ["run"]

OURS, DENSE, MASKED, SORTED, GROUPED = "expert_mlp", "dense", "masked loop", "sorted loop", "grouped_mm"
Layers = tuple[Tensor, Tensor, Tensor, Tensor]  # weight1 [E, H, C], bias1 [E, H], weight2 [E, C, H], bias2 [E, C]


class _Case(NamedTuple):
    """One routed MLP with GELU and its tokens' routes."""

    x: Tensor  # [N, C]
    layers: Layers
    experts: list[Layers]  # one by one, as modules have them: their gradients are their own
    weights: Tensor  # [N, k]
    indices: Tensor  # [N, k]
    route: Route
    d_y: Tensor

    def leaves(self, variant: str) -> list[Tensor]:
        """What gradients are taken to: the same numbers for all, a single expert's for the dense MLP."""
        if variant in (OURS, GROUPED):
            return [self.x, *self.layers, self.weights]
        if variant == DENSE:
            return [self.x, *self.experts[0]]
        return [self.x, *(tensor for expert in self.experts for tensor in expert), self.weights]


def _case(tokens: int, channels: int, hidden: int, experts: int, dtype: torch.dtype, device: torch.device) -> _Case:
    torch.manual_seed(0)
    shapes = ((experts, hidden, channels), (experts, hidden), (experts, channels, hidden), (experts, channels))
    layers = [torch.randn(shape, device=device) / shape[-1] ** 0.5 for shape in shapes]
    first, bias1, second, bias2 = (tensor.to(dtype).requires_grad_() for tensor in layers)
    stacked = (first, bias1, second, bias2)
    alone = [[tensor[e].detach().clone().requires_grad_() for tensor in stacked] for e in range(experts)]
    scores = torch.randn(tokens, experts, device=device).softmax(1)
    kept, indices = scores.topk(2)
    return _Case(
        torch.randn(tokens, channels, device=device).to(dtype).requires_grad_(),
        stacked,
        [(w1, b1, w2, b2) for w1, b1, w2, b2 in alone],
        (kept / kept.sum(1, keepdim=True)).requires_grad_(),
        indices,
        sort_by_expert(indices, experts),
        torch.randn(tokens, channels, device=device).to(dtype),
    )


def _mlp(x: Tensor, layers: Layers) -> Tensor:
    weight1, bias1, weight2, bias2 = layers
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def _ours(case: _Case) -> Tensor:
    return expert_mlp(case.x, *case.layers, case.route, case.weights, "gelu")


def _dense(case: _Case) -> Tensor:
    """One expert on every row, without routing or weights."""
    rows = case.x.repeat_interleave(case.indices.shape[1], 0)
    return _mlp(rows, case.experts[0]).unflatten(0, case.indices.shape).sum(1)


def _masked(case: _Case) -> Tensor:
    """Every expert picks its tokens by a mask and writes them into [E, N, C] of zeros, which is weighted and summed."""
    factors = case.weights.new_zeros(len(case.x), len(case.experts)).scatter(1, case.indices, case.weights)
    merged = case.x.new_zeros(len(case.experts), *case.x.shape)
    for number, layers in enumerate(case.experts):
        mask = (case.indices == number).any(1)
        merged[number, mask] = _mlp(case.x[mask], layers)
    return torch.einsum("ne,enc->nc", factors.to(merged.dtype), merged)


def _weighted(case: _Case, rows: Tensor) -> Tensor:
    scaled = rows * case.weights.flatten().index_select(0, case.route.order)[:, None].to(rows.dtype)
    return torch.zeros_like(case.x).index_add(0, case.route.sample, scaled)


def _sorted(case: _Case) -> Tensor:
    """Rows sorted by expert, each expert's contiguous segment by the library, rows added back with their weights."""
    segments = case.x.index_select(0, case.route.sample).split(case.route.counts.tolist())
    rows = [_mlp(part, layers) for part, layers in zip(segments, case.experts, strict=True) if len(part)]
    return _weighted(case, torch.cat(rows))


def _grouped(case: _Case) -> Tensor:
    """The same with one grouped product for each layer."""
    weight1, bias1, weight2, bias2 = case.layers
    ends, expert = case.route.offsets[1:].int(), case.indices.flatten().index_select(0, case.route.order)
    rows = case.x.index_select(0, case.route.sample)
    z = torch._grouped_mm(rows, weight1.transpose(1, 2), ends) + bias1.index_select(0, expert)
    rows = torch._grouped_mm(F.gelu(z), weight2.transpose(1, 2), ends) + bias2.index_select(0, expert)
    return _weighted(case, rows)


_VARIANTS: dict[str, Callable[[_Case], Tensor]] = {
    OURS: _ours, DENSE: _dense, MASKED: _masked, SORTED: _sorted, GROUPED: _grouped
}  # fmt: skip


def _forward(case: _Case, variant: str, _: int) -> Tensor:
    with torch.no_grad():
        return _VARIANTS[variant](case)


def _both(case: _Case, variant: str, _: int) -> list[Tensor]:
    y = _VARIANTS[variant](case)
    return [y, *torch.autograd.grad(y, case.leaves(variant), case.d_y)]


def _check(case: _Case, variants: list[str]) -> None:
    """All routed variants against the sorted loop, the gradients of experts one by one or stacked alike."""
    bound = 1e-5 if case.x.dtype == torch.float32 else 4e-2
    count = len(case.experts)
    wanted = _both(case, SORTED, 0)
    experts = [torch.stack(wanted[2 + i : 2 + 4 * count : 4]) for i in range(4)]
    for variant in variants:
        if variant in (DENSE, SORTED):
            continue
        got = _both(case, variant, 0)
        if len(got) > 7:
            got = [*got[:2], *(torch.stack(got[2 + i : 2 + 4 * count : 4]) for i in range(4)), got[-1]]
        for name, mine, right in zip(
            ("y", "d_x", "d_weight1", "d_bias1", "d_weight2", "d_bias2", "d_weights"),
            got,
            [*wanted[:2], *experts, wanted[-1]],
            strict=True,
        ):
            check_close(f"{variant} {name}", mine, right, bound)


def run(options: Options) -> list[Row]:
    """A ViT-S's routed MLP beside the dense one, loops and the grouped product; in float32, and in bfloat16."""
    tokens, channels, hidden = (97, 32, 128) if options.quick else (197 * 32, 384, 1536)
    rows = []
    for dtype, experts in product((torch.float32, torch.bfloat16), (8, 32)):
        case = _case(tokens, channels, hidden, experts, dtype, options.device)
        variants = list(_VARIANTS)
        try:
            _forward(case, GROUPED, 0)
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            print(f"left out {GROUPED}: {str(error).splitlines()[0]}")
            variants.remove(GROUPED)
        _check(case, variants)
        about = {"E": experts, "k": 2, "tokens": tokens, "widths": f"{channels}-{hidden}", "dtype": str(dtype)[6:],
                 "threads": torch.get_num_threads()}  # fmt: skip
        for mode, function in (("forward", _forward), ("forward+backward", _both)):
            runs: dict[str, Run] = {variant: partial(function, case, variant) for variant in variants}
            rows += compare({"mode": mode, **about}, runs, options, warmup=0)  # _check has run them all
    return rows
