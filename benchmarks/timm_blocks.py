"""Which blocks of timm's residual networks become experts, on the engine or one by one, and keep their function.

No timing: every residual network of timm that has a ``layer4.1`` and up to 60 million parameters is built without
trained weights, its norms' numbers drawn (many last norms start at zero, behind which a block would not be seen), and
run on four random images of 64 pixels before and after ``replace_blocks``, whose experts are copies.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import Tensor, nn

from robust_moe.benchmarks.harness import provenance
from robust_moe.benchmarks.records import expect_records, folder_option, write_record
from robust_moe_kernels import FusedBlockMoE
from robust_moe_kernels.modules.residual import ResidualExperts

__all__ = ["SHOWN", "draw_norms", "main", "networks", "replaced"]

LAYER = "layer4.1"
MODULES = ("resnet", "res2net", "resnest", "sknet", "senet")  # timm's residual networks with stages of this name
MILLIONS = 60  # rounded: ResNet-152 has 60.2
SHOWN = ("engine", "one by one", "refused", "another function")


def networks() -> Iterator[str]:
    """Names of the networks, found without memory for their weights."""
    for module in MODULES:
        for name in timm.list_models(module=module):
            with torch.device("meta"):
                model = timm.create_model(name)
            millions = round(sum(parameter.numel() for parameter in model.parameters()) / 1e6)
            if millions <= MILLIONS and any(inner == LAYER for inner, _ in model.named_modules()):
                yield name


@torch.no_grad()
def draw_norms(model: nn.Module, seed: int = 0) -> None:
    """Numbers for every norm as after training: weights and variances from 0.5 to 1.5, means and biases of 0.2."""
    generator = torch.Generator().manual_seed(seed)
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm):
            for name, value in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
                if name in ("weight", "running_var"):
                    value.uniform_(0.5, 1.5, generator=generator)
                elif value.is_floating_point():
                    value.normal_(0.0, 0.2, generator=generator)


@torch.no_grad()
def replaced(model: nn.Module, layer: str, x: Tensor) -> dict[str, Any]:
    """What becomes of a network in evaluation whose ``layer`` is two copies of itself, with k = 1 and 2.

    Returns:
        ``how``, one of ``SHOWN``; ``reason``, where the engine does not compute the block; ``off``, the largest
        deviation of an output, and ``without``, that of the network with the block left out, both in units of the
        epsilon of the dtype times the largest output.
    """
    block, wanted = model.get_submodule(layer), model(x)
    unit = torch.finfo(wanted.dtype).eps * wanted.abs().max().item()
    model.set_submodule(layer, nn.Identity())
    without = (model(x) - wanted).abs().max().item() / unit
    model.set_submodule(layer, block)
    found: dict[str, Any] = {"block": type(block).__name__, "how": "", "reason": "", "off": 0.0, "without": without}
    for top_k in (1, 2):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                routed = FusedBlockMoE.from_block(block, 2, top_k)
            except ValueError as error:
                return found | {"how": "refused", "reason": str(error)}
        found["how"] = "engine" if _on_engine(routed) else "one by one"
        found["reason"] = str(said[0].message) if said else ""
        model.set_submodule(layer, routed)
        off = (model(x) - wanted).abs().max().item() / unit
        found["off"] = round(max(found["off"], off), 1)
        model.set_submodule(layer, block)
        # An output is some hundred roundings deep; without the block it is off by millions of them.
        if not off <= 1e3 or not without > 1e5:
            return found | {"how": "another function"}
    return found


def _on_engine(layer: FusedBlockMoE) -> bool:
    """Grouped convolutions among the engine's kind of blocks run one by one too."""
    return isinstance(layer.experts, ResidualExperts) and layer.experts.content() is not None


def main(arguments: list[str] | None = None) -> None:
    """Look at every network, one at a time, and print or write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks timm_blocks", description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="networks of timm (all with a layer4.1 and up to 60 M parameters)")
    parser.add_argument("--out", type=folder_option, help="folder for timm_blocks.json; without it nothing is written")
    options = parser.parse_args(arguments)
    expect_records(parser, options.out, ["timm_blocks"])
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    rows: list[dict[str, Any]] = []
    for name in options.names or networks():
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        draw_norms(model)
        rows.append({"name": name, **replaced(model, LAYER, x)})
        off = f"off {rows[-1]['off']:8.1f} eps, without it {rows[-1]['without']:.1e}"
        print(f"{name:28}{rows[-1]['how']:12}{off}  {rows[-1]['reason']}", flush=True)
        del model
    counts = Counter(row["how"] for row in rows)
    print("\n" + ", ".join(f"{how}: {counts[how]}" for how in SHOWN) + f"; of {len(rows)}")
    if options.out:
        about = {"benchmark": "timm_blocks", "timm": timm.__version__, "counts": {how: counts[how] for how in SHOWN}}
        record = {**about, **provenance(torch.device("cpu")), "rows": rows}
        print(f"written: {write_record(options.out, 'timm_blocks', json.dumps(record, indent=1) + chr(10))}")
