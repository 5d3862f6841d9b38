"""``--dense``: the twin of a configuration with experts, for a comparison."""

from __future__ import annotations

import dataclasses

import pytest
from typer.testing import CliRunner

from robust_moe.commands import app
from robust_moe.config import ConfigError, load_config, preset_names, resolve_config
from robust_moe.engine.experiment import make_method
from robust_moe.settings import replaced


def is_routed(config) -> bool:
    model = config.model
    return bool(model.moe.layers) or model.mixture.num_experts > 0 or model.dual.enabled


ROUTED = [name for name in preset_names() if is_routed(load_config(name))]


def test_the_twin_of_a_preset_is_the_preset_that_was_written_by_hand():
    twin = load_config("digits-blockmoe", dense=True)
    assert replaced(twin, "run.out", "runs/digits-dense") == load_config("digits-dense")
    assert twin.run.out == "runs/digits-blockmoe-dense"


@pytest.mark.parametrize("name", ROUTED)
def test_every_preset_s_twin_differs_in_experts_and_what_is_about_them_alone(name: str):
    before, twin = load_config(name), load_config(name, dense=True)
    assert not is_routed(twin)
    make_method(twin)  # refuses what it cannot train
    for section in ("data", "optim", "eval"):
        assert getattr(twin, section) == getattr(before, section)
    assert replaced(twin, "run.out", before.run.out).run == before.run
    assert type(twin.model) is type(before.model)
    for field in dataclasses.fields(twin.model):
        if field.name not in ("moe", "mixture", "dual"):
            assert getattr(twin.model, field.name) == getattr(before.model, field.name)
    of_experts = {"rt_er": "pgd_at", "jtdmoe": "pgd_at", "advmoe": "trades", "prc": "pgd_at", "robust_gate": "pgd_at"}
    assert twin.method.name == of_experts.get(before.method.name, before.method.name)
    for field in dataclasses.fields(twin.method):
        if hasattr(before.method, field.name):
            assert getattr(twin.method, field.name) == getattr(before.method, field.name)


def test_overrides_apply_first_and_keep_their_origin():
    found = resolve_config("advmoe-cifar10-small", ["run.out=runs/mine", "method.beta=2", "model.width=6"], dense=True)
    assert (found.config.run.out, found.config.method.beta, found.config.model.width) == ("runs/mine", 2, 6)
    assert found.origins["method.name"] == "--dense"
    assert found.origins["method.beta"] == found.origins["run.out"] == "override"
    assert not any(key.startswith("model.moe") for key in found.origins)
    assert resolve_config("advmoe-cifar10-small", dense=True).origins["run.out"] == "--dense"


@pytest.mark.parametrize("override", ["model.moe.num_experts=8", "model.mixture.routing=hard", "model.dual.alpha=0.6"])
def test_settings_of_experts_beside_it_are_refused(override: str):
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^dense: expected no setting of experts beside it, got {key}$"):
        load_config("rt-er-cifar10", [override], dense=True)


def test_a_dense_configuration_has_no_twin():
    with pytest.raises(
        ConfigError, match=r"^dense: expected a configuration with experts, got one of a dense network$"
    ):
        load_config("digits-dense", dense=True)


def test_the_command_line_has_it():
    done = CliRunner().invoke(app, ["config", "rt-er-cifar10", "--dense", "--yaml"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.stderr
    assert "name: pgd_at" in done.stdout
    assert "out: runs/rt-er-cifar10-dense" in done.stdout
    done = CliRunner().invoke(app, ["train", "digits-blockmoe", "--dense", "--dry-run"], env={"COLUMNS": "200"})
    assert "run folder: runs/digits-blockmoe-dense" in done.stdout
