"""From the rows of a routing record to images.

A layer that routes images has one row in its record for each of B images; one that routes tokens has N = B T rows, the
T tokens of an image behind each other. Attacks, evaluations and methods speak of images. What they say of an image is
made from its tokens here and nowhere else:

- A loss: the mean over the tokens (:func:`mean_of_tokens`, :func:`capped_mean`), so that a layer weighs as much in the
  sum over the layers as one that routes images, and a factor such as JointPGD's λ means the same.
- A condition, such as "sent to the expert that it is driven to": it holds for an image if it does for more than half of
  its tokens (:func:`most_tokens`).
- A changed route: both the share of tokens whose experts changed and the share of images with such a token are
  reported (:mod:`robust_moe.evaluation.routing_measures`).

With T = 1 each of them is the identity.
"""

from __future__ import annotations

from torch import Tensor

from robust_moe_kernels.checks import expect

__all__ = ["capped_mean", "for_rows", "main_expert", "mean_of_tokens", "most_tokens", "of_images"]


def of_images(rows: Tensor, images: int) -> Tensor:
    """Rows [B T, ...] of a record, those of an image behind each other, as [B, T, ...]; ``images``: B.

    Raises:
        ValueError: the rows are no multiple of the images, as where a model cuts images before it routes them.
    """
    count = len(rows)
    ok = count % images == 0 if images else count == 0
    expect(ok, "model", f"routed layers with as many rows for each of the {images} images", f"{count} rows")
    return rows.unflatten(0, (images, count // images if images else 1))


def for_rows(values: Tensor, rows: int) -> Tensor:
    """What is known of each of B images, [B, ...], for each row of a record, [B T, ...]; ``rows``: B T.

    Raises:
        ValueError: see :func:`of_images`.
    """
    images = len(values)
    ok = rows % images == 0 if images else rows == 0
    expect(ok, "model", f"routed layers with as many rows for each of the {images} images", f"{rows} rows")
    return values if rows == images else values.repeat_interleave(rows // images, 0)


def mean_of_tokens(values: Tensor) -> Tensor:
    """[B, T] to [B]."""
    return values[:, 0] if values.shape[1] == 1 else values.mean(1)


def capped_mean(values: Tensor, cap: float) -> Tensor:
    """:func:`mean_of_tokens` of a number that an attack raises, [B, T] to [B]; where there are several tokens each
    counts up to ``cap``. So a token that is won gives no gradient any more, and the others' are next."""
    return mean_of_tokens(values if values.shape[1] == 1 else values.clamp_max(cap))


def most_tokens(mask: Tensor) -> Tensor:
    """Whether more than half of an image's tokens are set, bool [B, T] to bool [B]."""
    return 2 * mask.sum(1) > mask.shape[1]


def main_expert(first: Tensor, num_experts: int) -> Tensor:
    """The expert that is the first choice of most tokens, int64 [B, T] to int64 [B]; the lowest of several. Entries of
    ``num_experts``, tokens without an expert, count for none."""
    counts = first.new_zeros(len(first), num_experts + 1).scatter_add_(1, first, first.new_ones(()).expand_as(first))
    return counts[:, :num_experts].argmax(1)
