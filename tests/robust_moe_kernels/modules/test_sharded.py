"""A model whose weights FSDP2 has spread over two processes. One pair of processes for all."""

import sys
import textwrap

import pytest
from rank_runs import as_torchrun, run_all

SCRIPT = """
    import copy, sys
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    sys.path.insert(0, sys.argv[1])
    from tool_models import images, routed
    from robust_moe_kernels.modules import attack_mode, whole_weights

    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    plain = routed()
    parts = copy.deepcopy(plain)
    for layer in (parts[3], parts[4]):
        fully_shard(layer, mesh=mesh)
    fully_shard(parts, mesh=mesh)
    x, y = images()

    def gradient(model, mode="eval", precision=None):
        with attack_mode(model, mode), torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
            leaf = x.clone().requires_grad_()
            return torch.autograd.grad(F.cross_entropy(model(leaf).float(), y), leaf)[0]

    def in_parts(model):
        return {isinstance(parameter, DTensor) for parameter in model.parameters()}

    # an attack reads what it reads of the plain model, bit for bit, and leaves the model as it was
    for mode in ("eval", "train"):
        for precision in (None, torch.bfloat16):
            assert torch.equal(gradient(parts, mode, precision), gradient(plain, mode, precision)), (mode, precision)
            assert in_parts(parts) == {True}
            assert all(parameter.requires_grad for parameter in parts.parameters())

    # inside, processes may make as many passes as they like; a hold inside of a hold lets go at the outer one's end
    with whole_weights(parts):
        assert in_parts(parts) == {False}
        for _ in range(1 + 2 * rank):
            gradient(parts)
        assert in_parts(parts) == {False}
        if rank == 1:
            with torch.no_grad():
                parts(x)
        assert in_parts(parts) == {False}
    assert in_parts(parts) == {True}

    # also in inference mode, in which the model may meet its first pass
    fresh, other = routed(), routed()
    for layer in (fresh[3], fresh[4]):
        fully_shard(layer, mesh=mesh)
    fully_shard(fresh, mesh=mesh)
    with torch.inference_mode():
        assert torch.equal(gradient(fresh), gradient(other))
        with whole_weights(fresh):
            fresh(x)
    F.cross_entropy(fresh.train()(x), y).backward()

    # what is not all of it is refused
    try:
        gradient(torch.nn.Sequential(*parts))
    except ValueError as error:
        assert "expected the module that fully_shard was called on" in str(error), error
    else:
        raise AssertionError
    assert in_parts(parts) == {True}

    # an error inside lets go too
    try:
        with attack_mode(parts):
            raise KeyError
    except KeyError:
        pass
    assert in_parts(parts) == {True}

    # afterwards it learns as one process with both shares of the images does: the mean of the gradients
    for model in (plain, parts):
        model.zero_grad()
        model.eval()
    F.cross_entropy(parts(x[rank::2]), y[rank::2]).backward()
    sum(F.cross_entropy(plain(x[r::2]), y[r::2]) for r in range(2)).div(2).backward()
    for (name, p), q in zip(plain.named_parameters(), parts.parameters()):
        assert (q.grad is None) == (p.grad is None), name
        if p.grad is not None:
            assert (p.grad - q.grad.full_tensor()).abs().max() <= 1e-5 * p.grad.abs().max() + 1e-7, name

    with whole_weights(plain):  # nothing, of a model that is not spread
        assert in_parts(plain) == {False}
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_attacks_on_a_model_in_parts_are_those_on_the_whole_one(tmp_path):
    (tmp_path / "parts.py").write_text(textwrap.dedent(SCRIPT))
    helpers = next(path for path in sys.path if path.endswith("helpers"))
    for status, _, said in run_all([sys.executable, str(tmp_path / "parts.py"), helpers], as_torchrun(2)):
        assert status == 0, said
