"""The specification of the attack steps, in plain PyTorch.

The ℓ∞ step and start are the same bit for bit in every implementation: each operation below rounds once, in this order,
and none contracts a multiplication with an addition. The ℓ2 forms differ by the order of their sums.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cross_entropy", "cross_entropy_backward", "pgd_step", "random_start", "why_not"]

_TWO_POW_MINUS_24 = 2.0**-24
_TINY = 1e-12  # below this norm a vector is taken as zero
_RADIUS_BLOCK = 0xFFFFFFFF  # the counter block that no pixel uses: its first word gives the ℓ2 radius


def why_not(device_type: str) -> str | None:
    return None


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _l2_norm(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x.reshape(x.shape[0], x.shape[1:].numel()).double(), dim=1)
    return _per_sample(norm.clamp_min(_TINY), x)


def pgd_step(
    x: Tensor, grad: Tensor, x0: Tensor, eps: float, alpha: float, norm: str, nonfinite: Tensor | None = None
) -> Tensor:
    if nonfinite is not None:
        nonfinite |= ~torch.isfinite(grad).all()
    if norm == "Linf":
        # Comparisons, not torch.sign: a NaN gradient leaves the pixel where it is.
        step = alpha * ((grad > 0).to(x.dtype) - (grad < 0).to(x.dtype))
        delta = (x + step - x0).clamp(-eps, eps)
    else:
        direction = grad.to(x.dtype) * (1.0 / _l2_norm(grad)).to(x.dtype)
        delta = x + alpha * direction - x0
        delta = delta * (eps / _l2_norm(delta)).clamp_max(1.0).to(x.dtype)
    return (x0 + delta).clamp(0.0, 1.0)


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a*b for 32-bit values held in int64."""
    low = (b & 0xFFFF) * a  # < 2^48
    high = (b >> 16) * a + (low >> 16)  # < 2^49
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) on 32-bit words held in int64 tensors of one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a_hi, a_lo = _mul_hi_lo(0xD2511F53, c0)
        b_hi, b_lo = _mul_hi_lo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = b_hi ^ c1 ^ k0, b_lo, a_hi ^ c3 ^ k1, a_lo
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def _words(sample_index: Tensor, blocks: Tensor, seed: int, stream: int) -> Tensor:
    """[B, n, 4] random words for n counter blocks of each sample."""
    shape = (sample_index.numel(), blocks.numel())
    low = (sample_index & 0xFFFFFFFF)[:, None].expand(shape)
    high = ((sample_index >> 32) & 0xFFFFFFFF)[:, None].expand(shape)
    block = blocks[None, :].expand(shape)
    words = philox4x32(
        [block, low, high, torch.full_like(block, stream)], (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    )
    return torch.stack(words, dim=-1)


def _uniform(words: Tensor, dtype: torch.dtype) -> Tensor:
    """[0, 1) from the upper 24 bits: exact in float32."""
    return (words >> 8).to(dtype) * _TWO_POW_MINUS_24


def random_start(x0: Tensor, sample_index: Tensor, eps: float, seed: int, stream: int, norm: str) -> Tensor:
    size = x0[0].numel() if x0.shape[0] else 0
    blocks = torch.arange((size + 3) // 4, device=x0.device)
    words = _words(sample_index, blocks, seed, stream)
    u = _uniform(words, x0.dtype)  # [B, n, 4]
    if norm == "Linf":
        noise = (2.0 * u - 1.0).flatten(1)[:, :size] * eps
        return (x0 + noise.view_as(x0)).clamp(0.0, 1.0)
    radius = (-2.0 * (u[..., 0::2] + _TWO_POW_MINUS_24).log()).sqrt()  # Box and Muller
    angle = (2.0 * math.pi) * u[..., 1::2]
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)[:, :size].view_as(x0)
    block = torch.full((1,), _RADIUS_BLOCK, dtype=torch.int64, device=x0.device)  # no copy, which the host waits for
    last = _words(sample_index, block, seed, stream)[:, 0, 0]
    length = eps * (_uniform(last, torch.float64) + _TWO_POW_MINUS_24) ** (1.0 / max(size, 1))
    return (x0 + normal * (_per_sample(length, x0) / _l2_norm(normal)).to(x0.dtype)).clamp(0.0, 1.0)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    full = logits.to(torch.promote_types(logits.dtype, torch.float32))
    known = y.clamp(0, logits.shape[1] - 1)  # PyTorch would raise, or on a GPU end every further use of it
    return F.cross_entropy(full, known, reduction="none").masked_fill(known != y, float("nan"))


def cross_entropy_backward(d_loss: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    shares = F.softmax(logits.to(d_loss.dtype), 1)
    classes = torch.arange(logits.shape[1], device=logits.device)
    slope = shares - (classes == y[:, None]).to(shares.dtype)
    unknown = (y < 0) | (y >= logits.shape[1])
    return (d_loss[:, None] * slope.masked_fill(unknown[:, None], float("nan"))).to(logits.dtype)
