"""What people give to :func:`robust_moe.evaluate`, made into what evaluations take, where there is one way to read it.

Images and labels may be NumPy arrays or lists, labels may be names, pixels may lie a rounding outside of [0, 1], and a
model may return its logits in a tuple or a mapping. What could be read in two ways is refused in one sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robust_moe.settings import hint, shown
from robust_moe_kernels.checks import expect

__all__ = ["as_images", "as_labels", "as_names", "returning_logits"]

ROUNDING = 1e-6  # by which a pixel may leave [0, 1]: a few roundings of float32, far below a grey level
COLOURS = (1, 3, 4)  # channels of a picture


def as_images(images: Any) -> Tensor:
    """[n, C, H, W] uint8 in 0..255, or float32 in [0, 1], from a tensor, an array or nested lists.

    Raises:
        ValueError: another shape; the channels last, as image libraries have them; neither bytes nor floats.
    """
    tensor = _tensor("images", images)
    if tensor.is_floating_point():
        tensor = tensor.to(torch.float32)  # in which all verdicts are
    got = list(tensor.shape)
    expect(tensor.ndim == 4 and len(tensor) > 0, "images", "shape [n, C, H, W] with n >= 1", got)
    numbers = tensor.dtype in (torch.uint8, torch.float32)
    expect(numbers, "images", "uint8 in 0..255, or floats in [0, 1]", tensor.dtype)
    last = tensor.shape[1] not in COLOURS and tensor.shape[3] in COLOURS
    name = "transpose" if isinstance(images, np.ndarray) else "permute"
    expect(not last, "images", f"shape [n, C, H, W], as of images.{name}(0, 3, 1, 2)", f"{got}, with the channels last")
    if tensor.is_floating_point() and tensor.numel():
        low, high = (bound.item() for bound in tensor.aminmax())
        if (low < 0 or high > 1) and low >= -ROUNDING and high <= 1 + ROUNDING:
            tensor = tensor.clamp(0, 1)
    return tensor


def as_names(class_names: Any) -> list[str]:
    """Names of the classes, in their order; none of None.

    Raises:
        ValueError: no sequence: a set has no order, and of a mapping either side may be the names.
    """
    ordered = class_names is None or isinstance(class_names, (Sequence, np.ndarray))
    got = repr(class_names) if isinstance(class_names, str) else type(class_names).__name__
    expect(ordered and not isinstance(class_names, str), "class_names", "a list of names", got)
    return [] if class_names is None else [str(name) for name in class_names]


def as_labels(labels: Any, class_names: Sequence[str]) -> Tensor:
    """[n] int64, from a tensor, an array or a list, of numbers or of names out of ``class_names``.

    Raises:
        ValueError: names that are not among ``class_names``, or stand there twice; numbers that are not whole.
    """
    if not isinstance(labels, Tensor):
        array = _array("labels", labels)
        if array.dtype.kind in "UO" and array.size and all(isinstance(label, str) for label in array.flat):
            return _by_name(array, class_names)
        labels = array
    tensor = _tensor("labels", labels)
    whole = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
    expect(whole, "labels", "whole numbers 0..classes-1, or names with class_names beside them", tensor.dtype)
    return tensor.to(torch.int64)


@contextmanager
def returning_logits(model: nn.Module) -> Iterator[None]:
    """Inside, a ``model`` that returns a tuple or a mapping returns the logits out of it: of a tuple the first tensor
    [B, classes], of a mapping ``"logits"``. No forward is made for this; once the model has returned a tensor it is
    left alone.

    Raises:
        ValueError: in the forward, where there are no logits, or several such tensors of other widths.
    """

    def take(module: nn.Module, inputs: tuple[Any, ...], found: Any) -> Tensor | None:
        if isinstance(found, Tensor):
            handle.remove()
            return None
        logits: Tensor = found[_where(found)]
        return logits

    handle = model.register_forward_hook(take)
    try:
        yield
    finally:
        handle.remove()


def _where(found: Any) -> int | str:
    """The place of the logits in what a model returned."""
    if isinstance(found, Mapping):
        if _are_logits(found.get("logits")):
            return "logits"
        got = f"a mapping of {', '.join(map(str, found))}"
    elif isinstance(found, (tuple, list)):
        places = [place for place, value in enumerate(found) if _are_logits(value)]
        widths = list(dict.fromkeys(found[place].shape[1] for place in places))
        several = f"tensors [B, n] of n = {' and '.join(map(str, widths))}"
        expect(len(widths) <= 1, "model", "logits alone, or one tensor [B, classes] in the tuple with them", several)
        if places:
            return places[0]
        got = f"a {type(found).__name__} of {len(found)} without such a tensor"
    else:
        got = type(found).__name__
    raise ValueError(
        "model: expected a module that returns logits [B, classes], or a tuple with them, or a mapping with them under "
        f"'logits', got {got}"
    )


def _are_logits(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2


def _array(name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError:  # rows of unequal lengths
        array = np.asarray(None)
    expect(array.dtype != object or array.ndim > 0, name, "a tensor, an array or a list", type(value).__name__)
    return array


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    array = _array(name, value)
    numbers = array.dtype != np.uint16 and array.dtype.kind in "buifc"
    expect(numbers, name, "a tensor, or an array of numbers", f"an array of {array.dtype}")
    if array.dtype.kind == "f" and not isinstance(value, np.ndarray):
        array = array.astype(np.float32)  # Python's numbers have no precision of their own
    return torch.from_numpy(np.ascontiguousarray(array))


def _by_name(labels: np.ndarray, class_names: Sequence[str]) -> Tensor:
    first = str(labels.flat[0])
    expect(bool(class_names), "labels", "numbers 0..classes-1, or class_names beside them", f"names such as {first!r}")
    numbers = {name: number for number, name in enumerate(class_names)}
    twice = next((name for number, name in enumerate(class_names) if numbers[name] != number), None)
    expect(twice is None, "class_names", "different names where labels are names", f"{twice!r} twice")
    strange = next((str(label) for label in labels.flat if str(label) not in numbers), None)
    if strange is not None:
        near = hint(strange, class_names)
        raise ValueError(f"labels: expected names out of class_names, got {shown(strange)}{near}")
    return torch.tensor([numbers[str(label)] for label in labels.flat]).reshape(labels.shape)
