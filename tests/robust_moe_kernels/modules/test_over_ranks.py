"""A batch that lies on two ranks: every number is that of the whole batch on one. One pair of processes for all."""

import sys
import textwrap

import pytest
import torch
from rank_runs import as_torchrun, run_all
from torch import nn
from torchvision.models.resnet import BasicBlock

from robust_moe_kernels.modules import FusedBlockMoE, batch_over_ranks, mean_over_ranks, rank_count, sum_over_ranks
from robust_moe_kernels.modules.ranks import drawn_over_ranks, gather_over_ranks, offsets_over_ranks

SCRIPT = """
    import copy, sys
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import nn
    from torchvision.models.resnet import BasicBlock

    from robust_moe_kernels.modules import BALANCE_LOSSES, FusedBlockMoE, FusedMLPMoE, balance_loss, batch_over_ranks
    from robust_moe_kernels.modules import sum_over_ranks
    from robust_moe_kernels.modules.norm_over_ranks import norm_over_ranks
    from robust_moe_kernels.modules.token_gates import AdaptiveClusteringGate

    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def close(got, wanted, bound, what):
        error = (got.double() - wanted.double()).abs().max().item() if wanted.numel() else 0.0
        assert got.shape == wanted.shape and error <= bound, (what, list(got.shape), list(wanted.shape), error)

    def norm(rows, pixels):
        "rows of each rank; against PyTorch's norm of all of them in double"
        torch.manual_seed(sum(rows))
        every = [torch.randn(n, 3, pixels, 1, dtype=torch.float64) + 5 for n in rows]
        weight, bias = torch.randn(2, 3, dtype=torch.float64).unbind()
        upstream = [torch.randn_like(x) for x in every]
        whole = torch.cat(every).requires_grad_()
        own = every[rank].clone().requires_grad_()
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        wanted_mean, wanted_var = mean.clone(), var.clone()
        out, count = norm_over_ranks(own, mean, var, w, b, 0.1, 1e-5)
        (out * upstream[rank]).sum().backward()
        assert count == sum(rows) * pixels
        begin = sum(rows[:rank])
        if count > 1:
            ww, wb = weight.clone().requires_grad_(), bias.clone().requires_grad_()
            wanted = F.batch_norm(whole, wanted_mean, wanted_var, ww, wb, True, 0.1, 1e-5)
            (wanted * torch.cat(upstream)).sum().backward()
            close(out, wanted[begin:begin + rows[rank]], 1e-12, "norm")
            close(own.grad, whole.grad[begin:begin + rows[rank]], 1e-12, "gradient")
            close(sum_over_ranks(w.grad), ww.grad, 1e-11, "weight")
            close(sum_over_ranks(b.grad), wb.grad, 1e-11, "bias")
        elif count == 1:  # variance 0: the bias, no gradient to the input; the variance stays
            close(out, bias.view(1, 3, 1, 1).expand_as(out), 1e-12, "single")
            close(own.grad, torch.zeros_like(own), 1e-12, "gradient of a single")
            wanted_mean.lerp_(torch.cat(every)[0, :, 0, 0], 0.1)
        close(mean, wanted_mean, 1e-12, "running mean")
        close(var, wanted_var, 1e-12, "running variance")

    for rows in ((2, 3), (0, 4), (3, 0), (0, 0), (1, 0), (1, 1)):
        norm(rows, pixels=1)
        norm(rows, pixels=4)

    class Own(nn.BatchNorm2d):
        "a class that expert norms of another kind take the place of"

    def blocks(kind, bound, stride, norm=nn.BatchNorm2d):
        "a routed block of the engine, or in double of modules, on half a batch beside the whole"
        torch.manual_seed(1)
        skip = None
        if stride > 1:
            skip = nn.Sequential(nn.Conv2d(4, 8, 1, stride, bias=False), nn.BatchNorm2d(8))
        block = BasicBlock(4, 8 if skip else 4, stride, skip, norm_layer=norm).to(kind)
        wide = FusedBlockMoE.from_block(block, num_experts=5, top_k=2).train()
        for parameter in wide.parameters():
            nn.init.normal_(parameter, std=0.3)
        alone = copy.deepcopy(wide)
        batch_over_ranks(wide, norms=True)
        x = torch.randn(6, 4, 6, 6, dtype=kind)
        whole, own = x.clone().requires_grad_(), x[rank::2].clone().requires_grad_()
        upstream = torch.randn_like(alone(x))
        alone = copy.deepcopy(alone)  # statistics that moved once
        wide.load_state_dict(alone.state_dict())
        (alone(whole) * upstream).sum().backward()
        out = wide(own)
        (out * upstream[rank::2]).sum().backward()
        counts = torch.bincount(wide.routing.indices.flatten(), minlength=5)
        assert sum_over_ranks((counts == 0).sum()) > 0  # an expert is idle on a rank
        close(own.grad, whole.grad[rank::2], bound, "block: input")
        for (name, one), two in zip(wide.named_parameters(), alone.parameters()):
            close(sum_over_ranks(one.grad), two.grad, 10 * bound, name)
        for (name, one), two in zip(wide.named_buffers(), alone.buffers()):
            close(one, two, bound, name)

    for stride in (1, 2):
        blocks(torch.float32, 2e-5, stride)
        blocks(torch.float64, 1e-12, stride)
    blocks(torch.float32, 2e-5, 1, Own)
    blocks(torch.float64, 1e-12, 1, Own)

    def losses(kind):
        "of a noisy layer, values and gradients to the gate"
        torch.manual_seed(2)
        wide = FusedBlockMoE.from_block(BasicBlock(4, 4).double(), num_experts=4, top_k=2, noise_std=0.7).train()
        alone = copy.deepcopy(wide)
        batch_over_ranks(wide)
        x = torch.randn(10, 4, 4, 4, dtype=torch.float64)
        found = []
        for layer, images in ((alone, x), (wide, x[rank::2])):
            torch.manual_seed(3 + (rank if layer is wide else 0))  # only the first rank draws
            layer(images)
            loss = balance_loss(layer, kind)
            loss.backward()
            found.append((loss.detach(), layer.gate.fc.weight.grad))
        (wanted, gradient), (got, mine) = found
        close(got, wanted, 1e-12, kind)
        close(sum_over_ranks(mine) / 2, gradient, 1e-12, kind)

    for kind in BALANCE_LOSSES:
        losses(kind)

    def padded():
        "tokens of which the ranks have not as many each"
        torch.manual_seed(4)
        mlp = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)).double()
        wide = FusedMLPMoE.from_mlp(mlp, num_experts=3, top_k=1).train()
        alone = copy.deepcopy(wide)
        batch_over_ranks(wide)
        x, mask = torch.randn(4, 5, 6, dtype=torch.float64), torch.zeros(4, 5, dtype=torch.bool)
        mask[0, :3] = mask[1, 4] = mask[2, :2] = True
        alone(x, padding_mask=mask)
        wide(x[rank::2], padding_mask=mask[rank::2])
        for kind in ("kl", "switch", "z"):
            close(balance_loss(wide, kind).detach(), balance_loss(alone, kind).detach(), 1e-12, f"padded {kind}")

    padded()

    def clusters():
        torch.manual_seed(5)
        wide = AdaptiveClusteringGate(6, 3).double().train()
        wide.follow(4)
        alone = copy.deepcopy(wide)
        batch_over_ranks(wide)
        x, cluster = torch.randn(9 * 2, 6, dtype=torch.float64), torch.randint(4, (18,))
        wanted = alone(x, cluster)
        close(wide(x[rank::2], cluster[rank::2]), wanted[rank::2], 1e-12, "clusters")
        close(wide.spread, alone.spread, 1e-12, "spread")
        assert torch.equal(wide.seen, alone.seen)

    clusters()
    print("whole")
"""


@pytest.mark.slow
def test_two_ranks_compute_what_one_does_with_the_whole_batch(tmp_path):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    for status, said, error in run_all([sys.executable, str(tmp_path / "script.py")], as_torchrun(2)):
        assert (status, said) == (0, "whole\n"), error


def test_without_a_process_group_nothing_changes():
    x = torch.randn(3, 2)
    assert rank_count() == 1
    assert sum_over_ranks(x) is x and gather_over_ranks(x) is x
    assert torch.equal(mean_over_ranks(x), x)
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert torch.equal(offsets_over_ranks(offsets), offsets)
    torch.manual_seed(0)
    drawn = drawn_over_ranks(x, (3,))
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.randn_like(x))


def test_norms_of_another_class_train_without_a_process_group():
    torch.manual_seed(0)
    own = type("Own", (nn.BatchNorm2d,), {})
    plain, other = (
        FusedBlockMoE.from_block(BasicBlock(4, 4, norm_layer=norm), num_experts=3, top_k=1).train()
        for norm in (nn.BatchNorm2d, own)
    )
    other.load_state_dict(plain.state_dict())
    x = torch.randn(5, 4, 6, 6)
    for layer in (plain, other):
        layer(x).square().sum().backward()
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)
    torch.testing.assert_close(dict(plain.named_buffers()), dict(other.named_buffers()))


def test_norms_of_blocks_that_need_rows_are_refused():
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    with pytest.warns(UserWarning, match="its experts run one by one"):
        layer = FusedBlockMoE.from_block(block, num_experts=2)
    with pytest.raises(ValueError, match=r"norms: expected experts that may be given no rows on a rank, .* Sequential"):
        batch_over_ranks(nn.Sequential(layer), norms=True)
    batch_over_ranks(nn.Sequential(layer))  # statistics of the routing alone
    assert layer.over_ranks
