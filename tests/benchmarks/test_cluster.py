"""The step on many GPUs, on paper: the tables of the page are the program's, which keeps to what sums have to move."""

from pathlib import Path

import pytest

from benchmarks import cluster

PAGE = Path(__file__).parents[2] / "docs" / "clusters.md"


def test_the_page_has_the_programs_tables():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    wanted = [line for line in cluster.tables() if line]
    assert len(wanted) == 10 + 5 + 8
    assert [line for line in wanted if line not in lines] == []


def test_sums_move_no_fewer_bytes_than_a_sum_can():
    # each GPU has to send and take (N - 1) / N of the bytes twice, however it is done
    size = 1e9
    assert cluster._sum(size, 1, 8) == 0
    for gpus in (2, 8):
        least = 2 * (gpus - 1) / gpus * size / cluster.NVLINK
        assert cluster._sum(size, gpus, 8) == pytest.approx(least + 2 * (gpus - 1) * cluster.HOP_INSIDE)
    for machines in (2, 8, 64):
        one_card = 2 * (machines - 1) / machines * size / cluster.INFINIBAND  # all of a machine's bytes leave by it
        for cards in (1, 8):
            inside = cluster._sum(size, 8, cards)
            between = cluster._sum(size, 8 * machines, cards) - inside
            assert between == pytest.approx(one_card / cards + 2 * (machines - 1) * cluster.HOP)


def test_spread_experts_are_summed_over_the_gpus_that_have_the_same():
    net = cluster.network(32)
    assert net.gradient_bytes == 4 * (net.dense + 32 * net.expert)
    assert net.expert == 2 * (9 * 512 * 512 + 2 * 512)  # two convolutions with their norms
    # one expert for each of 32 GPUs: nothing but the dense part is summed over all of them
    alone = cluster.step(net, 32, 128, sharded=32)
    assert alone.sums == pytest.approx(cluster._sum(4 * net.dense, 32, 8))
    assert alone.exchange > cluster.step(net, 32, 128, sharded=8).exchange > 0
    assert cluster.step(net, 32, 128).exchange == 0


def test_parts_hold_no_less_than_a_step_needs():
    net = cluster.transformer(32)
    assert net.layers == 6
    assert net.expert == 2 * 384 * 1536 + 384 + 1536  # an MLP with its biases
    copies = 2 * 6 * 32 * net.expert
    assert cluster.held(net, 1) == 16 * net.parameters + copies
    sizes = [cluster.held(net, gpus) for gpus in (1, 8, 64, 512)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] > 4 * net.parameters + copies  # an attack has all weights, and their copies in bfloat16
    one = cluster.network(32)  # its largest part is nearly all of it: whole weights, gradients, and these once more
    assert cluster.held(one, 512) > 12 * 32 * one.expert
