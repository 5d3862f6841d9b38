"""Components from outside the package: one file, chosen, trained, evaluated and resumed from the command line."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from robust_moe.attacks import ATTACKS
from robust_moe.commands import app
from robust_moe.config import ConfigError, load_config, save_config
from robust_moe.data import DATASETS
from robust_moe.engine.checkpoint import load_checkpoint
from robust_moe.methods import METHODS
from robust_moe.models import GATES, MODELS, ROUTERS
from robust_moe.settings import import_plugins, replaced

TABLES = (ATTACKS, METHODS, MODELS, GATES, ROUTERS, DATASETS)
NAME = "plugin_of_a_test"

ATTACK = '''
from dataclasses import dataclass

from robust_moe.attacks import ATTACKS, PGD
from robust_moe.settings import setting


@ATTACKS.register("half-pgd")
class HalfPGD(PGD):
    """PGD whose steps are shorter."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PGD.Config):
        share: float = setting(0.5, "of PGD's step", above=0, at_most=1)

    def __init__(self, *args, share: float = 0.5, **settings) -> None:
        super().__init__(*args, **settings)
        self.alpha *= share
'''

METHOD = '''
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from robust_moe.data import Batch
from robust_moe.methods import METHODS, Method, Objective
from robust_moe.settings import setting


@METHODS.register("noise")
class Noise(Method):
    """Cross-entropy on images with noise."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        std: float = setting(0.1, "standard deviation of the noise, pixels being in [0, 1]", at_least=0)

    def objectives(self, model: nn.Module, batch: Batch, step_seed: int, forward) -> Iterator[Objective]:
        noise = batch.images.new_empty(batch.images.shape).normal_(0, self.config.std)
        yield Objective(lambda: self.classify(model, forward, (batch.images + noise).clamp(0, 1), batch.labels))
'''


MODEL = '''
from dataclasses import dataclass

from torch import nn

from robust_moe.models import MODELS, ImageSpec, ModelConfig
from robust_moe.settings import setting


@dataclass(frozen=True, kw_only=True)
class PatchesConfig(ModelConfig):
    side: int = setting(4, "of a patch", unit="pixels", at_least=1)


@MODELS.register("patches", PatchesConfig)
def patches(images: ImageSpec, side: int) -> nn.Module:
    """Any callable that returns a network."""
    body = [nn.Conv2d(images.channels, 8, side, side), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(8, images.num_classes))
'''

BLOCKS = '''
from collections import OrderedDict
from dataclasses import dataclass

from timm.models.resnet import BasicBlock
from torch import nn

from robust_moe.models import MODELS, ImageSpec, ModelConfig
from robust_moe.settings import setting


@dataclass(frozen=True, kw_only=True)
class ExcitedConfig(ModelConfig):
    width: int = setting(8, "channels", at_least=1)


@MODELS.register("excited", ExcitedConfig)
def excited(images: ImageSpec, width: int) -> nn.Module:
    """Blocks with squeeze and excitation and drop path, which the engine does not compute."""
    blocks = [BasicBlock(width, width, attn_layer="se", drop_path=nn.Dropout2d(0.1)) for _ in range(2)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, images.num_classes))
    stem = nn.Conv2d(images.channels, width, 3, padding=1)
    return nn.Sequential(OrderedDict(stem=stem, layer4=nn.Sequential(*blocks), head=head))
'''

GATE = '''
from dataclasses import dataclass

from torch import Tensor, nn

from robust_moe.models import GATES, GateConfig
from robust_moe.settings import setting


@GATES.register("max_fc")
class MaxGate(nn.Module):
    """The largest value of each map, then a linear layer."""

    @dataclass(frozen=True, kw_only=True)
    class Config(GateConfig):
        temperature: float = setting(1.0, "that logits are divided by", above=0)

    def __init__(self, in_channels: int, num_experts: int, temperature: float) -> None:
        super().__init__()
        self.fc = nn.Linear(in_channels, num_experts)
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.amax((2, 3))) / self.temperature
'''

ROUTER = """
from dataclasses import dataclass

from torch import nn

from robust_moe.models import ROUTERS, ImageSpec, Router, RouterConfig
from robust_moe.settings import setting


@dataclass(frozen=True, kw_only=True)
class HiddenConfig(RouterConfig):
    hidden: int = setting(8, "units", at_least=1)


@ROUTERS.register("hidden", HiddenConfig)
def hidden_router(images: ImageSpec, num_experts: int, hidden: int) -> nn.Module:
    def body(channels: int, size: int, experts: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * size**2, hidden), nn.ReLU(), nn.Linear(hidden, experts))

    return Router(body, images.channels, images.image_size, num_experts, images.mean, images.std)
"""

DATA = '''
from dataclasses import dataclass

import torch

from robust_moe.data import DATASETS, DataSet, ImageSet
from robust_moe.settings import setting


@DATASETS.register("stripes")
class Stripes(DataSet):
    """Two classes: stripes that lie and stripes that stand."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DataSet.Config):
        width: int = setting(2, "of a stripe", unit="pixels", at_least=1)

    def load(self) -> tuple[ImageSet, ImageSet]:
        line = (torch.arange(8) // self.config.width % 2 * 255).to(torch.uint8)
        standing, lying = line.expand(1, 8, 8), line[:, None].expand(1, 8, 8)
        images, labels = torch.stack([lying, standing] * 40), torch.arange(80) % 2
        whole = ImageSet(images, labels, ("lying", "standing"), "stripes")
        return whole, whole
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder of a user; what a plug-in registers is forgotten afterwards."""
    before = [dict(table._entries) for table in TABLES]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for table, entries in zip(TABLES, before, strict=True):
        table._entries = entries
    sys.modules.pop(NAME, None)


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def forget() -> None:
    """As in a new process: the module is not imported and nothing of it is registered."""
    for table in TABLES:
        for name in [name for name, entry in table._entries.items() if entry.__module__ == NAME]:
            del table._entries[name]
    sys.modules.pop(NAME, None)


@pytest.mark.parametrize(
    ("source", "section", "chosen", "kept"),
    [
        (ATTACK, "method.attack", ("method.attack=half-pgd", "method.attack.share=0.25"), {"share": 0.25}),
        (METHOD, "method", ("method=noise", "method.std=0.05"), {"std": 0.05}),
        (MODEL, "model", ("model=patches", "model.side=2", "model.moe.layers=[]"), {"side": 2}),
        (BLOCKS, "model", ("model=excited", "model.width=4", "model.moe.layers=[layer4.1]"), {"width": 4}),
        (GATE, "model.moe.gate", ("model.moe.gate=max_fc", "model.moe.gate.temperature=2"), {"temperature": 2.0}),
        (
            ROUTER,
            "model.mixture.router",
            ("model.moe.layers=[]", "model.mixture.num_experts=2", "model.mixture.router={name: hidden, hidden: 4}"),
            {"hidden": 4},
        ),
        (DATA, "data", ("data={name: stripes, width: 1}", "model.moe.layers=[]"), {"width": 1}),
    ],
    ids=["attack", "method", "model", "blocks of any kind", "gate", "router", "data"],
)
def test_a_plugin_is_trained_evaluated_and_resumed(tiny, folder, source, section, chosen, kept):
    (folder / f"{NAME}.py").write_text(source)
    save_config(tiny("run.epochs=2", "run.max_steps=2"), folder / "run.yaml")
    done = run("train", "run.yaml", "--import", NAME, *chosen)
    assert done.exit_code == 0, done.output
    written = (folder / "run" / "config.yaml").read_text()
    assert NAME in written

    forget()
    done = run("eval", "run", "--n", 10)  # the checkpoint names the module
    assert done.exit_code == 0, done.output
    forget()
    on = run("train", "run.yaml", "--import", NAME, *chosen, "run.max_steps=3", "--override")
    assert on.exit_code == 0, on.output
    assert load_checkpoint(folder / "run" / "last.pt")["position"]["step"] == 3

    forget()
    again = load_config(folder / "run" / "config.yaml")  # config.yaml names it as well
    values = functools.reduce(getattr, section.split("."), again).values()
    assert {name: values[name] for name in kept} == kept

    forget()
    (folder / f"{NAME}.py").unlink()
    gone = run("eval", "run")
    assert gone.exit_code == 2
    assert f"import: expected a module that can be imported, got '{NAME}'" in gone.stderr
    assert gone.stderr.count("\n") == 1


def test_modules_add_up(tiny, folder):
    """Those of the file, of an override and of the command line; an evaluation may bring an attack of its own."""
    other = "another_plugin_of_a_test"
    (folder / f"{NAME}.py").write_text(ATTACK)
    (folder / f"{other}.py").write_text("NOTHING = 0\n")
    save_config(replaced(tiny("run.epochs=1", "run.max_steps=1"), "run.imports", (other,)), folder / "run.yaml")
    done = run("train", "run.yaml", "--import", NAME, "method.attack=half-pgd")
    assert done.exit_code == 0, done.output
    assert load_config(folder / "run" / "config.yaml").run.imports == (other, NAME)
    (folder / "a_third_one.py").write_text("NOTHING = 0\n")
    done = run("eval", "run", "--n", 5, "--import", "a_third_one")
    assert done.exit_code == 0, done.output


def test_modules_that_are_no_list_are_refused_beside_the_option_too(folder):
    for option in ((), ("--import", "string")):
        done = run("config", "digits-dense", "run.imports={a: b}", *option)
        assert done.exit_code == 2
        assert done.stderr == "error: run.imports: expected a list, got {'a': 'b'}\n"
    for imports in ("[json]", "json", "json,re"):
        done = run("config", "digits-dense", f"run.imports={imports}", "--import", "string")
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "ModuleNotFoundError"),
        ("1 / 0", "ZeroDivisionError"),
        ("def", "SyntaxError"),
        (ATTACK.replace('"half-pgd"', '"pgd"'), "attack 'pgd': expected a name that is free, got one that robust_moe"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_sentence(folder, source, words):
    if source is not None:
        (folder / f"{NAME}.py").write_text(source)
    with pytest.raises(ConfigError, match=words):
        import_plugins([NAME])
    done = run("train", "digits-dense", "--import", NAME)
    assert done.exit_code == 2
    assert words in done.stderr and NAME in done.stderr


def test_an_installed_distribution_registers_by_its_entry_point(folder, monkeypatch):
    from robust_moe.settings import plugins

    (folder / f"{NAME}.py").write_text(ATTACK)
    info = folder / "of_a_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: of-a-test\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[robust_moe.plugins]\nmine = {NAME}\n")
    monkeypatch.syspath_prepend(str(folder))
    plugins.installed_plugins.cache_clear()
    try:
        assert load_config(None, ["eval.attack=half-pgd"]).eval.attack.name == "half-pgd"
    finally:
        plugins.installed_plugins.cache_clear()
