"""Components from outside the package: one file, chosen, trained, evaluated and resumed from the command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from robust_moe.attacks import ATTACKS
from robust_moe.commands import app
from robust_moe.config import ConfigError, load_config, save_config
from robust_moe.engine.checkpoint import load_checkpoint
from robust_moe.methods import METHODS
from robust_moe.settings import import_plugins

TABLES = (ATTACKS, METHODS)
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


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder of a user; what a plug-in registers is forgotten afterwards."""
    before = [dict(table._entries) for table in TABLES]
    monkeypatch.chdir(tmp_path)
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
    ("source", "chosen", "kept"),
    [
        (ATTACK, ("method.attack=half-pgd", "method.attack.share=0.25"), {"name": "half-pgd", "share": 0.25}),
        (METHOD, ("method=noise", "method.std=0.05"), {"name": "noise", "std": 0.05}),
    ],
)
def test_a_plugin_is_trained_evaluated_and_resumed(tiny, folder, source, chosen, kept):
    (folder / f"{NAME}.py").write_text(source)
    save_config(tiny("run.epochs=2", "run.max_steps=2"), folder / "run.yaml")
    done = run("train", "run.yaml", "--import", NAME, *chosen)
    assert done.exit_code == 0, done.output
    written = (folder / "run" / "config.yaml").read_text()
    assert NAME in written and kept["name"] in written

    forget()
    done = run("eval", "run", "--n", 10)  # the checkpoint names the module
    assert done.exit_code == 0, done.output
    forget()
    on = run("train", "run.yaml", "--import", NAME, *chosen, "run.max_steps=3", "--override")
    assert on.exit_code == 0, on.output
    assert load_checkpoint(folder / "run" / "last.pt")["position"]["step"] == 3

    forget()
    again = load_config(folder / "run" / "config.yaml")  # config.yaml names it as well
    section = again.method if source is METHOD else again.method.attack
    assert {"name": section.name} | {name: section.values()[name] for name in kept if name != "name"} == kept

    forget()
    (folder / f"{NAME}.py").unlink()
    gone = run("eval", "run")
    assert gone.exit_code == 2
    assert f"import: expected a module that can be imported, got '{NAME}'" in gone.stderr
    assert gone.stderr.count("\n") == 1


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
