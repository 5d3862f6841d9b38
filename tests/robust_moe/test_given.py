"""What people give to evaluate is read in one way, or refused, and left as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robust_moe.given import as_labels, as_names, returning_logits


class Pair(nn.Module):
    """Returns a tuple of its logits and the image, or its features."""

    def __init__(self, features: bool = False) -> None:
        super().__init__()
        self.norm, self.drop, self.fc = nn.BatchNorm2d(3), nn.Dropout(), nn.Linear(3 * 4 * 4, 5)
        self.features = features

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = self.drop(self.norm(x)).flatten(1)
        return (features, self.fc(features)) if self.features else (self.fc(features), x)


def test_the_model_is_left_as_it_was():
    """Its hooks are removed afterwards, and an output that is a tensor does not change."""
    x = torch.rand(2, 3, 4, 4)
    model = Pair().eval()
    with returning_logits(model):
        assert torch.equal(model(x), model.fc(model.norm(x).flatten(1)))
        assert torch.equal(model(x), model.fc(model.norm(x).flatten(1)))
    assert not model._forward_hooks
    assert isinstance(model(x), tuple)
    plain = nn.Flatten()
    with returning_logits(plain):
        assert torch.equal(plain(x), x.flatten(1))
        assert not plain._forward_hooks


def test_features_are_not_taken_for_logits():
    model = Pair(features=True)
    with (
        returning_logits(model),
        pytest.raises(ValueError, match=r"one tensor \[B, classes\] in the tuple .*, got .* of n = 48 and 5"),
    ):
        model(torch.rand(2, 3, 4, 4))


@pytest.mark.parametrize("names", [["cat", "dog"], ("cat", "dog"), np.array(["cat", "dog"])])
def test_labels_by_name(names):
    assert as_labels(["dog", "cat"], as_names(names)).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("names", "got"),
    [
        ({"cat", "dog"}, "set"),  # in another order in every process
        ({0: "cat", 1: "dog"}, "dict"),  # of which the numbers would be the names
        (2, "int"),
        ("cat", "'cat'"),
    ],
)
def test_names_without_an_order_are_refused(names: Any, got: str):
    with pytest.raises(ValueError, match=f"class_names: expected a list of names, got {got}"):
        as_names(names)


def test_a_name_of_two_classes_names_none():
    with pytest.raises(ValueError, match="class_names: expected different names where labels are names, got 'cat' twi"):
        as_labels(["cat"], ["cat", "cat"])
    assert as_labels([1], ["cat", "cat"]).tolist() == [1]
