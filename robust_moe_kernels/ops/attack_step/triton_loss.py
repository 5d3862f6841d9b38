"""The cross-entropy of each sample and its gradient in Triton; ``triton_impl`` offers them.

One program a sample, which goes over its logits two or three times: after the first they come from a cache. A network's
few classes take one block, so each is read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from robust_moe_kernels.triton_support import Build, on_device

__all__ = ["builds", "cross_entropy", "cross_entropy_backward"]

_BLOCKS = (16, 128, 1024)  # logits read at once: the first that holds all classes, or the last several times
_OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def _read(logits_ptr, first, classes, start, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK of a sample's logits; those past the last class are -inf, which has no share."""
    place = start + tl.arange(0, BLOCK)
    return tl.load(logits_ptr + first + place, mask=place < classes, other=-float("inf")).to(KIND)


@triton.jit
def _top_and_total(logits_ptr, first, classes, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """A sample's largest logit, and the sum of the exponentials of what each has less than it."""
    tops = tl.full((BLOCK,), -float("inf"), KIND)
    for start in range(0, classes, BLOCK):
        tops = tl.maximum(tops, _read(logits_ptr, first, classes, start, KIND, BLOCK))
    top = tl.max(tops, 0)
    totals = tl.zeros((BLOCK,), KIND)
    for start in range(0, classes, BLOCK):
        totals += tl.exp(_read(logits_ptr, first, classes, start, KIND, BLOCK) - top)
    return top, tl.sum(totals, 0)


@triton.jit(do_not_specialize=("classes",))
def _cross_entropy_kernel(
    logits_ptr,  # [B, classes] any float
    labels_ptr,  # [B] int64
    loss_ptr,  # [B] float32, or float64 for float64 logits
    classes,
    BLOCK: tl.constexpr,
):
    """One program: one sample."""
    kind: tl.constexpr = loss_ptr.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + sample)
    known = (label >= 0) & (label < classes)
    mine = tl.load(logits_ptr + sample * classes + label, mask=known, other=float("nan")).to(kind)
    top, total = _top_and_total(logits_ptr, sample * classes, classes, kind, BLOCK)
    tl.store(loss_ptr + sample, tl.log(total) - (mine - top))


@triton.jit(do_not_specialize=("stride", "classes"))
def _cross_entropy_backward_kernel(
    d_loss_ptr,  # [B] float32, or float64 for float64 logits
    stride,  # of d_loss, in elements
    logits_ptr,  # [B, classes] any float
    labels_ptr,  # [B] int64
    d_logits_ptr,  # as logits
    classes,
    BLOCK: tl.constexpr,
):
    """One program: one sample."""
    kind: tl.constexpr = d_loss_ptr.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    first = sample * classes
    label = tl.load(labels_ptr + sample)
    known = (label >= 0) & (label < classes)
    d = tl.load(d_loss_ptr + sample * stride, mask=known, other=float("nan"))
    top, total = _top_and_total(logits_ptr, first, classes, kind, BLOCK)
    for start in range(0, classes, BLOCK):
        place = start + tl.arange(0, BLOCK)
        share = tl.exp(_read(logits_ptr, first, classes, start, kind, BLOCK) - top) / total
        value = d * (share - (place == label).to(kind))
        tl.store(d_logits_ptr + first + place, value.to(d_logits_ptr.dtype.element_ty), mask=place < classes)


def _constants(classes: int) -> dict[str, int]:
    block = next((block for block in _BLOCKS if block >= classes), _BLOCKS[-1])
    return {"BLOCK": block, "num_warps": 4 if block > 128 else 1}


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Loss of each sample [B], in float32 at least, from logits [B, classes] and int64 labels [B]."""
    samples, classes = logits.shape
    loss = logits.new_empty(samples, dtype=torch.promote_types(logits.dtype, torch.float32))
    if samples:
        with on_device(logits):
            _cross_entropy_kernel[(samples,)](logits, y, loss, classes, **_constants(classes), **_OPTIONS)
    return loss


def cross_entropy_backward(d_loss: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    """Gradient to the logits [B, classes], in their dtype, from that to each sample's loss [B]."""
    samples, classes = logits.shape
    d_logits = torch.empty_like(logits)
    if samples:
        with on_device(logits):
            _cross_entropy_backward_kernel[(samples,)](
                d_loss, d_loss.stride(0), logits, y, d_logits, classes, **_constants(classes), **_OPTIONS
            )
    return d_logits


def builds() -> Iterator[Build]:
    """Every configuration that is launched, for the compile test."""
    for (data, kind), block in product(
        (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("fp64", "fp64")), _BLOCKS
    ):
        options = {"num_warps": _constants(block)["num_warps"], **_OPTIONS}
        logits = {"logits_ptr": f"*{data}", "labels_ptr": "*i64"}
        last = {"classes": "i32", "BLOCK": "constexpr"}
        yield Build(_cross_entropy_kernel, {**logits, "loss_ptr": f"*{kind}", **last}, {"BLOCK": block}, options)
        d_loss = {"d_loss_ptr": f"*{kind}", "stride": "i32"}
        signature = {**d_loss, **logits, "d_logits_ptr": f"*{data}", **last}
        yield Build(_cross_entropy_backward_kernel, signature, {"BLOCK": block}, options)
