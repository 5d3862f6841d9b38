"""From rows to images: each reduction against a loop, and the identity for one row an image."""

import pytest
import torch

from robust_moe.tokens import capped_mean, for_rows, main_expert, mean_of_tokens, most_tokens, of_images


def values(images=3, tokens=4, *more):
    return torch.randn(images * tokens, *more, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_rows_of_an_image_lie_behind_each_other():
    rows = values(3, 4, 2)
    found = of_images(rows, 3)
    assert found.shape == (3, 4, 2)
    for image in range(3):
        assert torch.equal(found[image], rows[4 * image : 4 * image + 4])
    assert torch.equal(for_rows(torch.arange(3), 12), torch.tensor([0] * 4 + [1] * 4 + [2] * 4))
    assert torch.equal(for_rows(torch.arange(3), 3), torch.arange(3))


def test_no_images_have_no_rows():
    assert of_images(values(0, 4), 0).shape == (0, 1)
    assert for_rows(torch.zeros(0, 3), 0).shape == (0, 3)


@pytest.mark.parametrize("function", [lambda: of_images(values(3, 4), 5), lambda: for_rows(torch.zeros(5), 12)])
def test_rows_that_are_not_shared_out_evenly_are_refused(function):
    with pytest.raises(ValueError, match=r"model: expected routed layers with as many rows .* 5 images, got 12 rows"):
        function()


def test_losses_are_means_of_tokens_that_count_up_to_the_cap():
    rows = of_images(values(), 3)
    for image in range(3):
        assert mean_of_tokens(rows)[image] == pytest.approx(sum(rows[image].tolist()) / 4)
        capped = [min(value, 0.25) for value in rows[image].tolist()]
        assert capped_mean(rows, 0.25)[image] == pytest.approx(sum(capped) / 4)
    assert (capped_mean(rows, 0.25) < mean_of_tokens(rows)).any()


def test_a_token_that_is_won_has_no_gradient():
    rows = torch.tensor([[0.1, 0.3], [0.2, 0.0]], requires_grad=True)
    capped_mean(rows, 0.25).sum().backward()
    assert rows.grad.tolist() == [[0.5, 0.0], [0.5, 0.5]]


def test_more_than_half_of_the_tokens():
    t, f = True, False
    masks = torch.tensor([[t, t, f, f], [t, t, t, f], [f, f, f, f], [t, t, t, t]])
    assert most_tokens(masks).tolist() == [f, t, f, t]
    assert most_tokens(torch.tensor([[t], [f]])).tolist() == [t, f]


def test_the_expert_of_most_tokens():
    first = torch.tensor([[2, 2, 0, 1], [1, 0, 0, 1], [3, 3, 3, 2], [3, 3, 3, 3]])  # 3 of 3: no expert
    assert main_expert(first, 3).tolist() == [2, 0, 2, 0]


def test_one_row_an_image_is_left_as_it_is():
    rows = values(5, 1)
    alone = of_images(rows, 5)
    assert torch.equal(mean_of_tokens(alone), rows)
    assert torch.equal(capped_mean(alone, -9.0), rows)  # no cap: an attack on images goes on as it always did
    assert torch.equal(most_tokens(alone > 0), rows > 0)
