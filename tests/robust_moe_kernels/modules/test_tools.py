"""Common utilities treat a routed network as they treat the dense one.

The routed twin has copies of the dense network's block as experts and weights that add up to 1, so in evaluation both
compute the same function: what a tool makes of the one can be compared with what it makes of the other. ``TOOLS`` is
the table; docs/tools.md shows it to users, and must say the same.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from model_tools import (
    another_default_device,
    checkpointing,
    compiling,
    copying,
    exporting,
    extracting_features,
    gradient_of,
    gradient_penalty,
    hessian,
    jacobian,
    mapping,
    onnx,
    quantising,
    scripting_by_trace,
    second_derivatives,
    sharding,
    sharing_memory,
    symbolic_tracing,
    tangent,
    through_a_file,
)
from tool_models import dense, routed
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from training_tools import (
    clipping_by_unit,
    decayed_by_timm,
    decayed_by_torchvision,
    flattening,
    freezing_by_class,
    hooks,
    initialising,
    lbfgs,
    moving_average,
    parametrising,
    pruning,
    pruning_globally,
    safetensors,
    spectral_normalising,
    statistics_of_an_average,
    sync_batch_norm,
    weight_normalising,
)

from robust_moe_kernels.modules.block_experts import BlockExperts
from robust_moe_kernels.modules.residual import ResidualExperts

DOCS = Path(__file__).parents[3] / "docs" / "tools.md"


pytestmark = pytest.mark.usefixtures("one_thread")


WORKS, ONE_BY_ONE, GENERAL = "works", "one by one", "general path"
OLD_NORM = partial(weight_normalising, normalise=nn.utils.weight_norm, scale="weight_g")
NEW_NORM = partial(weight_normalising, normalise=parametrizations.weight_norm, scale="original0")
PRUNES = {
    "l1_unstructured": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "random_unstructured": lambda conv: prune.random_unstructured(conv, "weight", 0.5),
    "ln_structured": lambda conv: prune.ln_structured(conv, "weight", 0.5, n=2, dim=0),
    "ln_structured over inputs": lambda conv: prune.ln_structured(conv, "weight", 0.3, n=2, dim=1),
    "random_structured": lambda conv: prune.random_structured(conv, "weight", 0.5, dim=0),
    "custom_from_mask": lambda conv: prune.custom_from_mask(conv, "weight", (conv.weight > 0).float()),
}


class Tool(NamedTuple):
    treated: str
    run: Callable[[nn.Sequential], Tensor | None]


TOOLS = {
    "freezing norms by class": Tool(WORKS, freezing_by_class),
    "`nn.SyncBatchNorm.convert_sync_batchnorm`": Tool(ONE_BY_ONE, sync_batch_norm),
    "`swa_utils.update_bn`": Tool(WORKS, statistics_of_an_average),
    "`swa_utils.AveragedModel`, EMA": Tool(WORKS, moving_average),
    "timm's weight-decay groups": Tool(WORKS, decayed_by_timm),
    "torchvision's weight-decay groups": Tool(WORKS, decayed_by_torchvision),
    "`model.apply(init)`": Tool(WORKS, initialising),
    "`nn.utils.weight_norm`": Tool(ONE_BY_ONE, OLD_NORM),
    "`parametrizations.weight_norm`": Tool(ONE_BY_ONE, NEW_NORM),
    "`nn.utils.spectral_norm`": Tool(
        ONE_BY_ONE, partial(spectral_normalising, normalise=partial(nn.utils.spectral_norm, n_power_iterations=50))
    ),
    "`parametrizations.spectral_norm`": Tool(
        ONE_BY_ONE,
        partial(spectral_normalising, normalise=partial(parametrizations.spectral_norm, n_power_iterations=50)),
    ),
    **{f"`prune.{name}`": Tool(ONE_BY_ONE, partial(pruning, prunes=prunes)) for name, prunes in PRUNES.items()},
    "`prune.global_unstructured`": Tool(ONE_BY_ONE, pruning_globally),
    "`parametrize.register_parametrization`": Tool(ONE_BY_ONE, parametrising),
    "forward and backward hooks": Tool(ONE_BY_ONE, hooks),
    "`parameters_to_vector`, `vector_to_parameters`": Tool(WORKS, flattening),
    "`optim.LBFGS`": Tool(WORKS, lbfgs),
    "safetensors": Tool(WORKS, safetensors),
    "timm's adaptive gradient clipping": Tool(WORKS, clipping_by_unit),
    "`copy.deepcopy`": Tool(WORKS, partial(copying, copied=copy.deepcopy)),
    "`torch.save` of a whole model": Tool(WORKS, partial(copying, copied=through_a_file)),
    "`share_memory`": Tool(WORKS, sharing_memory),
    "`torch.set_default_device`": Tool(WORKS, another_default_device),
    "FSDP2, `fully_shard`": Tool(WORKS, sharding),
    "dynamic quantisation": Tool(ONE_BY_ONE, quantising),
    "`create_feature_extractor`": Tool(WORKS, extracting_features),
    "`fx.symbolic_trace`": Tool(WORKS, symbolic_tracing),
    "`torch.compile`": Tool(WORKS, compiling),
    "`checkpoint(use_reentrant=False)`": Tool(WORKS, partial(checkpointing, reentrant=False)),
    "`checkpoint(use_reentrant=True)`": Tool(WORKS, partial(checkpointing, reentrant=True)),
    "`torch.func.grad`": Tool(GENERAL, partial(gradient_of, of_samples=False)),
    "per-sample gradients, `vmap(grad)`": Tool(GENERAL, partial(gradient_of, of_samples=True)),
    "`torch.func.jacrev`": Tool(GENERAL, jacobian),
    "`torch.func.jvp`": Tool(GENERAL, tangent),
    "`torch.func.hessian`": Tool(GENERAL, hessian),
    "`torch.vmap`": Tool(GENERAL, mapping),
    "second derivatives (`create_graph=True`)": Tool(GENERAL, partial(second_derivatives, training=False)),
    "gradient penalties": Tool(GENERAL, gradient_penalty),
    "`torch.export`": Tool(GENERAL, exporting),
    "`torch.onnx.export(dynamo=True)`": Tool(GENERAL, onnx),
    "`torch.jit.trace`": Tool(GENERAL, scripting_by_trace),
}
TOLERANCE = {"dynamic quantisation": 0.05, "`optim.LBFGS`": 1e-3}


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_treats_both_alike(name: str):
    tool = TOOLS[name]
    wanted = tool.run(dense())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = tool.run(routed())
    said = {
        kind
        for kind, words in ((ONE_BY_ONE, "run one by one"), (GENERAL, "in plain PyTorch"))
        if any(words in str(warning.message) for warning in caught)
    }
    assert said == ({tool.treated} - {WORKS})  # a detour is announced, and named
    assert (found is None) == (wanted is None)
    if wanted is not None:
        scale = max(1.0, float(wanted.detach().abs().max()))
        bound = scale * TOLERANCE.get(name, 2e-5)
        assert float((found.detach() - wanted.detach()).abs().max()) <= bound


# Tools that meet experts' memory, modules or statistics, or transform the forward, and take a second at most.
OFF_ENGINE = [
    "`nn.SyncBatchNorm.convert_sync_batchnorm`",
    "`swa_utils.update_bn`",
    "`swa_utils.AveragedModel`, EMA",
    "`parametrizations.weight_norm`",
    "`prune.l1_unstructured`",
    "`parameters_to_vector`, `vector_to_parameters`",
    "safetensors",
    "`torch.save` of a whole model",
    "`share_memory`",
    "`torch.set_default_device`",
    "FSDP2, `fully_shard`",
    "dynamic quantisation",
    "`create_feature_extractor`",
    "`fx.symbolic_trace`",
    "`checkpoint(use_reentrant=False)`",
    "`checkpoint(use_reentrant=True)`",
    "`torch.func.grad`",
    "per-sample gradients, `vmap(grad)`",
    "`torch.func.hessian`",
    "`torch.vmap`",
    "gradient penalties",
    "`torch.jit.trace`",
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OFF_ENGINE)
def test_a_tool_treats_blocks_off_the_engine_as_dense_ones(name: str, monkeypatch):
    """The same blocks, as if the engine did not compute them."""

    def refuse(*_) -> None:
        raise ValueError("for the test's sake")

    monkeypatch.setattr(ResidualExperts, "of", refuse)
    tool, model = TOOLS[name], routed()
    assert isinstance(model[3].experts, BlockExperts)
    wanted, found = tool.run(dense()), tool.run(model)
    assert (found is None) == (wanted is None)
    if wanted is not None:
        bound = max(1.0, float(wanted.detach().abs().max())) * TOLERANCE.get(name, 2e-5)
        assert float((found.detach() - wanted.detach()).abs().max()) <= bound


def test_the_documentation_has_this_table():
    rows = dict(re.findall(r"^\| (.+?) \| (works|one by one|general path)\b.* \|$", DOCS.read_text(), re.MULTILINE))
    assert {name: rows.get(name) for name in TOOLS} == {name: tool.treated for name, tool in TOOLS.items()}
